"""The whole graph through DVC in a temporary repository, on a tiny model and a slice of the embedded data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hermes.params import read_yaml

ROOT = Path(__file__).parent.parent
# Secrets that a run may use and never write.
CANARIES = {"HF_TOKEN": "hf_" + "canary" * 6, "WANDB_API_KEY": "c0ffee" * 6 + "cafe"}
ENVIRONMENT = os.environ | {
    **CANARIES,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@example.org",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@example.org",
}
BEFORE_TRAIN = ("fetch_data", "fetch_model", "subset", "tokenize", "reference")
FROM_TRAIN = ("train", "merge", "quantize", "compress", "evaluate", "report")
SMALL = [
    "profiles.cpu.base.threads=1",
    "profiles.cpu.subset.k=12",
    "profiles.cpu.train.batch_size=4",
    "profiles.cpu.train.evaluations=1",
    "profiles.cpu.merge.base=bf16",
    "profiles.cpu.calibration.pairs=4",
    "profiles.cpu.quantize.types=[Q8_0,Q4_0]",
    "profiles.cpu.compress.threads=1",
    "profiles.cpu.compress.awq_pairs=2",
    "profiles.cpu.evaluate.types=[f16,Q8_0,gptq,awq]",
    "profiles.cpu.evaluate.threads=1",
    "profiles.cpu.evaluate.max_new_tokens=8",
    "profiles.cpu.evaluate.divergence_pairs=2",
]


def run(folder: Path, *command: str, check: bool = True) -> str:
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert not check or result.returncode == 0, output[-4000:]
    return output


def dvc(folder: Path, *arguments: str, check: bool = True) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments, check=check)


def small_data(folder: Path) -> None:
    """A slice of the embedded data: the first rows of every split, and the questions and plain answers of two topics."""
    folder.mkdir()
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        pq.write_table(
            pq.read_table(ROOT / f"data/embedded/{split}.parquet").slice(0, count), folder / f"{split}.parquet"
        )
    questions = pq.read_table(ROOT / "data/embedded/questions.parquet")
    topics = sorted({row["topic"] for row in questions.to_pylist() if row["split"] == "test"})[:2]
    pq.write_table(
        questions.filter([row["topic"] in topics for row in questions.to_pylist()]), folder / "questions.parquet"
    )
    lines = [
        line
        for line in (ROOT / "data/embedded/plain.jsonl").read_text().splitlines()
        if json.loads(line)["topic"] in topics
    ]
    (folder / "plain.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone") / "repository", tiny_model_folder)


def make_clone(folder: Path, tiny_model_folder: Path) -> Path:
    """A committed copy of this repository's tracked files whose cpu profile runs small."""
    tracked = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    for name in filter(None, tracked):
        if not name.startswith(("reports/", "dvc.lock")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    small_data(folder / "small-data")
    text = (folder / "params.yaml").read_text()
    text = text.replace("source: embedded", "source: ./small-data", 1)
    text = text.replace("source: embedded", f"source: {tiny_model_folder}", 1)
    (folder / "params.yaml").write_text(text)
    run(folder, "git", "init", "-q")
    run(folder, sys.executable, "-c", f"from tests.test_pipeline import override; override({SMALL!r})")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "start")
    return folder


def override(changes: list[str]) -> None:
    """Sets dotted keys of params.yaml in the working directory, as `dvc exp run -S` does."""
    from dvc.utils.hydra import apply_overrides

    apply_overrides("params.yaml", changes)


def outs(folder: Path) -> dict[str, str]:
    """The md5 of every output in dvc.lock."""
    return {
        out["path"]: out["md5"]
        for stage in read_yaml(folder / "dvc.lock")["stages"].values()
        for out in stage.get("outs", ())
    }


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def repro(clone: Path) -> str:
    return dvc(clone, "repro")


def test_repro_runs_every_stage_and_reports(clone: Path, repro: str) -> None:
    assert sorted(ran(repro)) == sorted((*BEFORE_TRAIN, *FROM_TRAIN))
    metrics = json.loads((clone / "reports/metrics.json").read_text())
    assert set(metrics["strict_accuracy"]) == {"base", "merged", "f16", "Q8_0", "gptq", "awq"}
    assert abs(metrics["train"]["first_loss"] - 0.693147) < 5e-3
    assert metrics["quantized_kl"]["f16"] < 1e-3
    page = (clone / "reports/report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not list((clone / "models").rglob("*.bin")) + list((clone / "models").rglob("*.pkl"))
    assert not [path for path in (clone / ".scratch/train").iterdir() if path.is_dir()]  # no checkpoint is left


def test_no_secret_of_the_environment_is_written_anywhere(clone: Path, repro: str) -> None:
    """Neither said nor in any file: reports, artifacts, DVC's cache and its logs, git's objects aside, which hold what is tracked."""
    secrets = [value.encode() for value in CANARIES.values()]
    files = [path for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert len(files) > 200
    assert not [path for path in files if any(secret in path.read_bytes() for secret in secrets)]
    assert not any(value in repro for value in CANARIES.values())


def test_repro_again_runs_nothing(clone: Path, repro: str) -> None:
    assert ran(dvc(clone, "repro")) == []


@pytest.mark.slow
def test_another_beta_reruns_train_and_what_follows(clone: Path, repro: str) -> None:
    run(clone, "git", "add", "-A")
    run(clone, "git", "commit", "-q", "-m", "results")
    output = dvc(clone, "exp", "run", "--temp", "-S", "beta=0.05", "--name", "beta-0.05")
    assert ran(output) == list(FROM_TRAIN)
    assert "beta: 0.1" in (clone / "params.yaml").read_text()


@pytest.mark.slow
def test_a_second_clone_in_another_folder_makes_the_same_bits(clone: Path, repro: str, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    run(tmp_path, "git", "clone", "-q", str(clone), str(other))
    dvc(other, "repro", "train", "--force")
    made = outs(other)
    expected = outs(clone)
    assert {path: made[path] for path in made} == {path: expected[path] for path in made}
    assert "models/adapter" in made


PROGRAMS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/use-the-model.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_of_the_page_about_using_the_model_runs(number: int, clone: Path, repro: str) -> None:
    answer = run(clone, sys.executable, "-c", PROGRAMS[number])
    assert answer.strip() or "print" not in PROGRAMS[number]


def test_the_page_about_using_the_model_has_programs() -> None:
    assert [
        bool(re.search(name, text)) for name, text in zip(("merged", "gptq", "adapter", "gguf"), PROGRAMS, strict=True)
    ] == [True] * 4


def test_an_unknown_key_stops_a_stage_in_one_line_and_keeps_its_outputs(clone: Path, repro: str) -> None:
    params, before = clone / "params.yaml", (clone / "reports/subset.json").read_bytes()
    text = params.read_text()
    params.write_text(text.replace("drop_empty: true", "drop_emtpy: true", 1))
    result = subprocess.run(
        [sys.executable, "-m", "stages.subset"], cwd=clone, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    params.write_text(text)
    message = [line for line in result.stderr.splitlines() if line.startswith("subset:")]
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "drop_emtpy" in message[0]
    assert (clone / "reports/subset.json").read_bytes() == before
