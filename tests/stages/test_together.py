"""Artifacts that belong together: a stage refuses one that is not as its manifest says, or that was made from another one."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from hermes.artifacts import check_together, read_json, sha256_file, write_manifest
from hermes.console import UserError
from tests.conftest import ROOT, cpu_params

STAGES = ("fetch_data", "fetch_model", "subset", "tokenize", "reference", "train", "merge", "quantize", "compress")
RUN = f"from stages import {', '.join(STAGES)}; [stage.main() for stage in ({', '.join(STAGES)})]"
# What each folder says that it was made from, in the order in which they are made.
MADE_FROM = {
    "data/raw": [],
    "models/base": [],
    "data/subset": ["data/raw"],
    "data/tokens": ["models/base"],
    "data/reference": ["data/tokens", "models/base"],
    "models/adapter": ["data/reference", "data/tokens", "models/base"],
    "models/merged": ["models/adapter", "models/base"],
    "models/gguf": ["data/tokens", "models/merged"],
    "models/compressed": ["data/tokens", "models/merged"],
}
# What each stage reads.
READ = {
    "subset": ["data/raw"],
    "tokenize": ["models/base", "data/subset"],
    "reference": ["models/base", "data/tokens"],
    "train": ["models/base", "data/tokens", "data/reference"],
    "merge": ["models/base", "models/adapter"],
    "quantize": ["models/merged", "data/tokens"],
    "compress": ["models/merged", "data/tokens"],
    "evaluate": [
        *("data/raw", "data/subset", "models/base", "models/adapter", "models/merged", "models/gguf"),
        "models/compressed",
    ],
}
PAIRS = [
    (stage, folder, source)
    for stage, folders in READ.items()
    for folder in folders
    for source in MADE_FROM[folder]
    if source in folders
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder in which every stage up to compress has run, on a tiny model and a few pairs."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine").mkdir()
    for split in ("train", "validation", "test"):
        pq.write_table(
            pq.read_table(ROOT / f"data/embedded/{split}.parquet").slice(0, 8), folder / f"mine/{split}.parquet"
        )
    for name in ("dvc.yaml", "packages.yaml"):
        shutil.copy(ROOT / name, folder)
    tree = cpu_params(
        data={"source": "./mine"},
        model={"source": str(tiny_model_folder)},
        subset={"k": 4},
        base={"threads": 1},
        train={"batch_size": 2, "max_steps": 2, "evaluations": 0},
        calibration={"pairs": 2},
        quantize={"types": ["Q8_0"]},
        compress={"methods": ["gptq"], "awq_pairs": 2, "threads": 1},
        evaluate={"tasks": ["preference"], "types": ["f16", "Q8_0", "gptq"]},
    )
    YAML().dump(tree, folder / "params.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def refused(stage: str, message: str) -> None:
    """The stage stops with this one line before it has written anything."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(UserError, match=message) as error:
        import_module(f"stages.{stage}").main()
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_every_folder_names_those_that_it_was_made_from(project: Path) -> None:
    for folder, sources in MADE_FROM.items():
        manifest = read_json(Path(folder) / "manifest.json")
        wanted = {source: sha256_file(Path(source) / "manifest.json") for source in sources}
        assert manifest.get("made_from", {}) == wanted
    for folders in READ.values():
        assert list(check_together(*map(Path, folders))) == folders


def test_an_adapter_names_its_base_in_its_configuration_too(project: Path) -> None:
    config = read_json(Path("models/adapter/adapter_config.json"))
    assert config["base_model_name_or_path"] == f"sha256:{sha256_file(Path('models/base/manifest.json'))}"


def flip(path: Path) -> None:
    """Changes the last byte; the length stays."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(("stage", "folder", "source"), PAIRS)
def test_a_folder_made_from_another_one_is_refused(stage: str, folder: str, source: str, project: Path) -> None:
    """The other one is whole, and everything else fits it."""
    other = Path(source)
    flip(min(path for path in other.iterdir() if path.suffix in (".parquet", ".safetensors")))
    for name in MADE_FROM:
        manifest = read_json(Path(name) / "manifest.json")
        made_from = {
            place: known if (name, place) == (folder, source) else sha256_file(Path(place) / "manifest.json")
            for place, known in manifest.pop("made_from", {}).items()
        }
        manifest.pop("files")
        write_manifest(Path(name), **manifest, **({"made_from": made_from} if made_from else {}))
    refused(stage, rf"^{folder}: was made from another {source} than the one here; delete it and run `dvc repro`$")


@pytest.mark.parametrize(("stage", "folder"), [(stage, folder) for stage in READ for folder in READ[stage]])
def test_a_flipped_bit_is_refused_by_every_stage_that_reads_the_file(stage: str, folder: str, project: Path) -> None:
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "manifest.json"]
    path = max(files, key=lambda path: path.stat().st_size)
    flip(path)
    name = re.escape(path.relative_to(folder).as_posix())
    refused(stage, rf"^{folder}: {name} differs, says its manifest\.json; delete it and run `dvc repro`$")


def rows(change: Callable[[list[dict[str, list[float]]]], list[dict[str, list[float]]]]) -> None:
    """Rewrites the reference of the training pairs."""
    path = Path("data/reference/train.parquet")
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found[1:] + found[:1],
        lambda found: [{name: values[1:] for name, values in row.items()} for row in found],
        lambda found: [{name: [float("nan")] * len(values) for name, values in row.items()} for row in found],
    ],
    ids=["rotated", "of other lengths", "not a number"],
)
def test_another_reference_of_as_many_rows_is_refused(
    change: Callable[[list[dict[str, list[float]]]], list[dict[str, list[float]]]], project: Path
) -> None:
    count = pq.read_table("data/reference/train.parquet").num_rows
    rows(change)
    assert pq.read_table("data/reference/train.parquet").num_rows == count
    refused(
        "train", r"^data/reference: train\.parquet differs, says its manifest\.json; delete it and run `dvc repro`$"
    )


def test_the_reference_of_the_other_split_is_refused(project: Path) -> None:
    shutil.copyfile("data/reference/validation.parquet", "data/reference/train.parquet")
    refused("train", r"^data/reference: train\.parquet differs")


@pytest.mark.parametrize("changes", [{"lora_alpha": 3200}, {"modules_to_save": ["lm_head"]}, {"r": 8}])
def test_an_adapter_whose_configuration_was_edited_is_not_merged(changes: dict[str, object], project: Path) -> None:
    path = Path("models/adapter/adapter_config.json")
    path.write_text(json.dumps(read_json(path) | changes))
    refused("merge", r"^models/adapter: adapter_config\.json differs, says its manifest\.json")


def test_an_adapter_of_a_lower_rank_is_not_merged(project: Path) -> None:
    path = Path("models/adapter/adapter_model.safetensors")
    tensors = {
        name: tensor[:8] if "lora_A" in name else tensor[:, :8].contiguous() for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    refused("merge", r"^models/adapter: adapter_model\.safetensors differs, says its manifest\.json")


def test_weights_beside_the_models_own_are_not_merged(project: Path) -> None:
    shutil.copyfile("models/base/model.safetensors", "models/base/consolidated.safetensors")
    refused("merge", r"^models/base: consolidated\.safetensors does not belong there, says its manifest\.json")


def test_a_stage_run_alone_says_so_in_one_line(project: Path) -> None:
    flip(Path("data/reference/train.parquet"))
    done = subprocess.run(
        [sys.executable, "-m", "stages.train"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = "train: data/reference: train.parquet differs, says its manifest.json; delete it and run `dvc repro`\n"
    assert (done.returncode, done.stderr) == (1, said)
