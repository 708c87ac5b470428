"""A local folder of data or of a model is read again when it has changed, and only then."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from hermes.console import UserError
from hermes.params import read_yaml
from stages import fetch_data, fetch_model
from tests.conftest import ROOT, cpu_params
from tests.test_pipeline import SMALL, dvc, make_clone, outs, run, small_data
from tools import sources


@pytest.fixture
def fetched(tmp_path: Path, byte_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which fetch_data, with a second source, and fetch_model have read local folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "more"):
        small_data(tmp_path / name)
    shutil.copytree(byte_model_folder, "model")
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    data = cpu_params()["profiles"]["cpu"]["data"]
    further = {key: data[key] for key in data if key not in ("mixed_with", "decontaminate")}
    mixed = [further | {"source": str(tmp_path / "more"), "share": 0.5}]
    write(data={"source": "./mine", "mixed_with": mixed}, model={"source": "./model"})
    fetch_data.main()
    fetch_model.main()
    return tmp_path


def write(**sections: dict[str, object]) -> None:
    YAML().dump(cpu_params(**sections), Path("params.yaml"))


def append(name: str) -> Callable[[], object]:
    """Adds a byte to a file, or makes it."""

    def change() -> int:
        path = Path(name)
        return path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n")

    return change


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (lambda: None, []),
        (append("mine/train.parquet"), ["fetch_data"]),
        (append("mine/plain.jsonl"), ["fetch_data"]),
        (lambda: Path("mine/questions.parquet").unlink(), ["fetch_data"]),
        (lambda: shutil.copy("mine/test.parquet", "mine/train.parquet"), ["fetch_data"]),
        (append("mine/train.csv"), ["fetch_data"]),
        (append("more/validation.parquet"), ["fetch_data"]),
        (append("mine/notes.txt"), []),
        (append("model/config.json"), ["fetch_model"]),
        (append("model/vocab.json"), ["fetch_model"]),
        (append("model/manifest.json"), ["fetch_model"]),
        (append("model/training.log"), []),
        (lambda: (append("mine/train.parquet")(), append("model/config.json")()), ["fetch_data", "fetch_model"]),
        (lambda: [shutil.move("mine", "gone"), shutil.move("model", "gone-too")], []),
        (lambda: [shutil.move("data", "gone"), shutil.move("models", "gone-too")], ["fetch_data", "fetch_model"]),
    ],
)
def test_a_stage_is_named_where_a_file_that_it_read_is_another(
    change: Callable[[], object], stages: list[str], fetched: Path
) -> None:
    change()
    assert sources.changed() == stages


def test_embedded_sources_and_those_that_dvc_sees_are_not_compared(fetched: Path) -> None:
    append("mine/train.parquet")()
    append("model/config.json")()
    write()
    assert sources.changed() == []


def test_another_folder_than_was_read_is_read(fetched: Path) -> None:
    """DVC would bring back what it held when it was read last."""
    shutil.copytree("model", "other")
    write(data={"source": "./more"}, model={"source": "./other"})
    assert sources.changed() == ["fetch_data", "fetch_model"]
    write(data={"source": "./mine"}, model={"source": "./model"})  # one source less
    assert sources.changed() == []


def test_no_sweep_starts_from_what_a_folder_held_before(fetched: Path) -> None:
    sources.refuse_changed()
    append("mine/train.parquet")()
    message = r"^fetch_data has not read its folder as it is now; run `make repro` first$"
    with pytest.raises(UserError, match=message):
        sources.refuse_changed()


@pytest.mark.slow
def test_make_repro_reads_a_changed_folder_again_and_what_follows(tmp_path: Path, tiny_model_folder: Path) -> None:
    clone = make_clone(tmp_path / "clone", tiny_model_folder)
    shutil.copytree(tiny_model_folder, clone / "my-model")
    change = "profiles.cpu.model.source=./my-model"
    run(clone, sys.executable, "-c", f"from tests.test_pipeline import override; override({[*SMALL, change]!r})")

    def repro(*arguments: str) -> list[str]:
        """The stages that ran."""
        said = run(clone, sys.executable, "-m", "tools.repro", *arguments, "subset", "fetch_model")
        return [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]

    assert sorted(repro()) == ["fetch_data", "fetch_model", "subset"]
    first = outs(clone)
    assert repro() == []
    train = clone / "small-data/train.parquet"
    pq.write_table(pq.read_table(train).slice(1), train)
    sweep = [sys.executable, "-m", "tools.sweep", "--betas", "0.1"]
    done = subprocess.run(sweep, cwd=clone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        ["sweep: fetch_data has not read its folder as it is now; run `make repro` first"],
    )
    assert repro("--dry") == ["fetch_data"]
    assert outs(clone) == first
    assert repro() == ["fetch_data", "subset"]
    second = outs(clone)
    assert {path for path in first if first[path] != second[path]} == {"data/raw", "data/subset", "reports/subset.json"}
    assert repro() == []
    config = clone / "my-model/generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.5}))
    assert repro() == ["fetch_model"]
    assert outs(clone)["models/base"] != second["models/base"]
    assert repro() == []
    assert read_yaml(clone / "dvc.lock")["stages"].keys() == {"fetch_data", "fetch_model", "subset"}
    assert dvc(clone, "status", "subset", "fetch_model").strip().endswith("up to date.")
