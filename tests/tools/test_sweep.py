"""A sweep queues one experiment for each beta, reports those that fail, and leaves the queue as it found it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hermes.console import UserError
from tools import sweep

ROOT = Path(__file__).resolve().parents[2]
DVC_YAML = """
stages:
  score:
    cmd: ./run-stage score
    params: [beta]
    metrics: [{score.json: {cache: false}}]
"""
SCORE = """
import json, pathlib, re, sys
beta = re.search("beta: ([0-9.]+)", pathlib.Path("params.yaml").read_text())[1]
if float(beta) == 0.3: sys.exit("no")
pathlib.Path("score.json").write_text(json.dumps({"beta": float(beta)}))
"""


@pytest.mark.parametrize(
    "text", ["", "0", "-0.1", "0.1,", "0.1,x", "nan", "inf", "1e999", "0x1", "1_0", "0.1 0.2", ".5", "5.", "+1"]
)
def test_what_is_no_beta_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a number above 0; write them like 0\.05,0\.1,0\.2$") as error:
        sweep.parse_betas(text)
    assert "\n" not in str(error.value)


def test_betas_keep_their_order_and_spelling() -> None:
    assert sweep.parse_betas("0.10, 1e-2,3") == ["0.10", "1e-2", "3"]


def test_a_beta_that_comes_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"0\.10 comes twice"):
        sweep.parse_betas("0.1,0.10")


@pytest.mark.parametrize("text", ["", "-1", "1.5", "007", "1,", "x", "1e3", "9999999999"])
def test_what_is_no_seed_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a whole number; write them like 42,1,2$"):
        sweep.parse_seeds(text)


def test_seeds_keep_their_order_and_none_comes_twice() -> None:
    assert sweep.parse_seeds("42, 0,7") == ["42", "0", "7"]
    with pytest.raises(UserError, match="7 comes twice"):
        sweep.parse_seeds("7,7")


def test_experiment_names_are_valid_git_references() -> None:
    names = [*sweep.assignments("beta", sweep.parse_betas("0.05,1e-2,12")), *sweep.assignments("seed", ["42"])]
    assert names[0] == "beta-0.05"
    for name in names:
        command = ["git", "check-ref-format", f"refs/exps/{name}"]
        assert subprocess.run(command, check=False).returncode == 0


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository whose one stage fails for beta 0.3, a `review` that says its arguments, and a bare PATH."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "run-stage", "run-stage")
    for folder in ("hermes", "stages", "tools"):
        shutil.copytree(ROOT / folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    Path("tools/review.py").write_text("import sys\nprint('review', *sys.argv[1:])\n")
    Path("stages/score.py").write_text(SCORE)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("params.yaml").write_text("beta: 0.1  # a comment\n")
    Path(".gitignore").write_text("__pycache__\n.scratch\n")
    command("git", "init", "-q", "-b", "main")
    command("git", "config", "user.name", "Someone")
    command("git", "config", "user.email", "someone@example.org")
    dvc("init", "-q")
    dvc("config", "core.analytics", "false")
    command("git", "add", "-A")
    command("git", "commit", "-q", "-m", "start")
    return tmp_path


def command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def dvc(*words: str) -> str:
    return command(sys.executable, "-m", "dvc", *words)


def test_a_sweep_runs_every_beta_and_reports_the_failed_one(repository: Path) -> None:
    words = [sys.executable, "-m", "tools.sweep", "--betas", "0.2,0.3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == ["beta-0.2: queued", "beta-0.3: queued", "review --compare beta-0.2"]
    assert done.stderr.splitlines()[-1].startswith("beta-0.3: failed; see .venv/bin/dvc queue logs ")
    assert command("git", "show", f"{experiment_commit('beta-0.2')}:score.json") == '{"beta": 0.2}'
    assert command("git", "status", "--porcelain") == ""
    assert Path("params.yaml").read_text() == "beta: 0.1  # a comment\n"


def experiment_commit(name: str) -> str:
    return command("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").strip()


def test_another_ones_waiting_experiment_is_not_started(repository: Path) -> None:
    dvc("exp", "run", "--queue", "-S", "beta=7", "--name", "mine")
    with pytest.raises(UserError, match=r"queue is not empty \(mine\); wait, or clear it"):
        sweep.sweep({"beta-0.2": "beta=0.2"})
    assert list(sweep.tasks().values()) == [("mine", "Queued")]


def test_stop_empties_the_queue_of_its_own_experiments_only(repository: Path) -> None:
    sweep.queue({"beta-0.2": "beta=0.2"})
    dvc("exp", "run", "--queue", "-S", "beta=7", "--name", "mine")
    handler = signal.getsignal(signal.SIGINT)
    try:
        sweep.stop({"beta-0.2"})
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(sweep.tasks().values()) == [("mine", "Queued")]


def test_a_worker_that_went_away_is_started_again_and_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(sweep, "WORKER_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "tasks", lambda: {"r": ("beta-1", "Queued")})
    monkeypatch.setattr(sweep, "has_worker", lambda: False)
    monkeypatch.setattr(sweep, "start_worker", lambda: starts.append(time.monotonic()))
    with pytest.raises(UserError, match=r"worker of DVC's queue is gone and left beta-1"):
        sweep.watch(["r"])
    assert len(starts) == sweep.WORKER_STARTS - 1


def test_a_task_between_two_lists_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{}, {"r": ("beta-1", "Running")}, {}, {"r": ("beta-1", "Success")}])
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(sweep, "tasks", lambda: next(answers))
    assert sweep.watch(["r"]) == {"r": ("beta-1", "Success")}
