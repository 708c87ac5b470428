"""The table of experiments says what each one changed and what came of it, and fits 120 columns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "a-name-of-many-letters-that-has-to-be-broken-to-fit"
PARAMS = """\
seed: 42
beta: 0.1
loss_type: sigmoid
profile: cpu
profiles:
  cpu: {train: {epochs: 1.5, lora_rank: 16}}
  a40: {train: {epochs: 9.0}}
"""
DVC_YAML = """
stages:
  train:
    cmd: mkdir -p models && cp params.yaml models/adapter
    params: [beta, seed, profile, profiles]
    outs: [models/adapter]
  report:
    cmd: >-
      mkdir -p reports && echo '{"strict_accuracy": {"merged": 0.5}, "strict_gain": {"points": 12.34}}' >reports/metrics.json
    deps: [models/adapter]
    metrics: [{reports/metrics.json: {cache: false}}]
"""


def command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def dvc(*words: str) -> str:
    return command(sys.executable, "-m", "dvc", *words)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline of two stages with experiments of a commit that is no longer the current one."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("params.yaml").write_text(PARAMS)
    command("git", "init", "-q", "-b", "main")
    command("git", "config", "user.name", "Someone")
    command("git", "config", "user.email", "someone@example.org")
    dvc("init", "-q")
    dvc("config", "core.analytics", "false")
    dvc("repro", "-q")
    command("git", "add", "-A")
    command("git", "commit", "-q", "-m", "start")
    dvc("exp", "run", "--temp", "-S", "beta=0.05", "-S", "profiles.cpu.train.epochs=3.0", "-n", NAME)
    dvc("exp", "run", "--temp", "-S", "seed=7", "-n", "stopped", "train")
    dvc("exp", "run", "--temp", "-S", "profile=a40", "-n", "other")
    command("git", "commit", "-q", "--allow-empty", "-m", "later")
    return tmp_path


def shown() -> list[str]:
    return command(sys.executable, "-m", "tools.experiments").splitlines()


def test_each_experiment_says_what_it_changed_and_what_came_of_it(repository: Path) -> None:
    lines = shown()
    assert max(map(len, lines)) <= 120
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert rows["main"][-5:] == ["0.1", "sigmoid", "42", "50.0%", "+12.3"]
    assert rows["other"][-6:] == ["0.1", "sigmoid", "42", "profile=a40", "50.0%", "+12.3"]
    (folded,) = [cells for cells in rows.values() if cells[0].startswith("a-name")]
    assert folded[-6:] == ["0.05", "sigmoid", "42", "train.epochs=3.0", "50.0%", "+12.3"]
    assert rows["stopped"][-3:] == ["0.1", "sigmoid", "7"]  # the metrics that it carries are those of its commit
    assert NAME in "".join(line[: len(folded[0]) + 3].strip() for line in lines)


def test_what_dvc_cannot_show_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([sys.executable, "-m", "tools.experiments"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("experiments: `dvc exp show --json")
    assert done.stderr.count("\n") == 1
