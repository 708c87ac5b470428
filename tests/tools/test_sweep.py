"""A sweep runs one experiment for each value, reports those that fail, and leaves the workspace and DVC's queue as they were."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hermes.console import UserError
from tools import dvc_queue, sweep
from tools.dvc_runs import Relay

ROOT = Path(__file__).resolve().parents[2]
DVC_YAML = """
stages:
  score:
    cmd: ./run-stage score
    params: [beta]
    metrics: [{score.json: {cache: false}}]
"""
# Fails for beta 0.3, and for 0.4 says that it is up and waits.
SCORE = """
import json, pathlib, re, sys, time
beta = re.search("beta: ([0-9.]+)", pathlib.Path("params.yaml").read_text())[1]
if float(beta) == 0.3: sys.exit("no")
if float(beta) == 0.4: pathlib.Path("{root}/up").touch(); time.sleep(60)
pathlib.Path("score.json").write_text(json.dumps({{"beta": float(beta)}}))
"""

# Waits until another one does: those of beta 0.2 and 0.5 can end only together, and that of 0.1 beside nobody.
MEETING = """
import json, pathlib, re, sys, time
beta = re.search("beta: ([0-9.]+)", pathlib.Path("params.yaml").read_text())[1]
if float(beta) == 0.3: sys.exit("no")
here = pathlib.Path("{root}/here")
(here / beta).touch()
deadline = time.monotonic() + 120
while beta != "0.1" and len(list(here.iterdir())) < 3 and time.monotonic() < deadline: time.sleep(0.1)
pathlib.Path("score.json").write_text(json.dumps(sorted(path.name for path in here.iterdir())))
"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0.0",
        "-0.1",
        "0.1,",
        "0.1,x",
        "nan",
        "inf",
        "1e999",
        "0x1",
        "1_0",
        "0.1 0.2",
        ".5",
        "5.",
        "+1",
        "1" * 5000,
        "0.1\n2",
        "--help",
        "0.1;id",
        "\u0661",
    ],
)
def test_what_is_no_beta_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a number above 0; write them like 0\.05,0\.1,0\.2$") as error:
        sweep.parse("beta", text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_betas_keep_their_order_and_spelling() -> None:
    assert sweep.parse("beta", "0.10, 1e-2,3") == ["0.10", "1e-2", "3"]


def test_a_beta_that_comes_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"0\.10 comes twice"):
        sweep.parse("beta", "0.1,0.10")


@pytest.mark.parametrize("text", ["", "-1", "1.5", "007", "1,", "x", "1e3", "9999999999"])
def test_what_is_no_seed_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a whole number; write them like 42,1,2$"):
        sweep.parse("seed", text)


def test_seeds_keep_their_order_and_none_comes_twice() -> None:
    assert sweep.parse("seed", "42, 0,7") == ["42", "0", "7"]
    with pytest.raises(UserError, match="7 comes twice"):
        sweep.parse("seed", "7,7")


@pytest.mark.parametrize("words", [(), ("--betas", "0.1", "--seeds", "1")])
def test_a_sweep_varies_one_thing(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.returncode, done.stderr) == (1, "sweep: give either --betas, --seeds or --grid\n")


def test_a_grid_is_every_combination_under_the_selected_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert sweep.grid("beta=0.05,0.1 train.learning_rate=1e-4,0.001") == {
        "beta-0.05-train.learning_rate-1e-4": ["beta=0.05", "profiles.cpu.train.learning_rate=1e-4"],
        "beta-0.05-train.learning_rate-0.001": ["beta=0.05", "profiles.cpu.train.learning_rate=0.001"],
        "beta-0.1-train.learning_rate-1e-4": ["beta=0.1", "profiles.cpu.train.learning_rate=1e-4"],
        "beta-0.1-train.learning_rate-0.001": ["beta=0.1", "profiles.cpu.train.learning_rate=0.001"],
    }
    assert sweep.grid("loss_type=ipo,hinge") == {
        "loss_type-ipo": ["loss_type=ipo"],
        "loss_type-hinge": ["loss_type=hinge"],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"--grid: has no key; write it like 'beta=0\.05,0\.1 train"),
        ("beta", r"--grid: 'beta' is no key with its values"),
        ("beta=0.1,", r"--grid: 'beta=0\.1,' is no key"),
        ("beta=--help", r"is no key with its values"),
        ("gamma=1,2", r"params\.yaml has no value gamma, on top or in the profile cpu"),
        ("train=1,2", r"train is a list or a section of params\.yaml"),
        ("evaluate.suites=1,2", r"evaluate\.suites is a list or a section"),
        ("profile=cpu,quick", r"params\.yaml has no value profile"),
        ("beta=0.1,0.1", r"beta or one of its values comes twice"),
        ("beta=0.1,0.10", r"beta or one of its values comes twice"),
        ("beta=0.1 beta=0.2", r"beta or one of its values comes twice"),
        ("beta=-1", r"is no key"),
        ("beta=0.1 loss_type=ipo,other", r"--grid: beta=0\.1, loss_type=other: params\.yaml: `loss_type` is 'other'"),
        ("seed=" + ",".join(map(str, range(65))), r"65 experiments; 64 at most"),
    ],
)
def test_what_is_no_grid_is_refused_before_anything_runs(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=said) as error:
        sweep.grid(text)
    assert "\n" not in str(error.value)


def test_experiment_names_are_valid_git_references() -> None:
    names = [*sweep.assignments("beta", sweep.parse("beta", "0.05,1e-2,12")), *sweep.assignments("seed", ["42"])]
    assert names[0] == "beta-0.05"
    names += sweep.grid("train.batch_size=4 evaluate.batch_size=2")
    assert names[-1] == "train.batch_size-4-evaluate.batch_size-2"
    for name in names:
        command = ["git", "check-ref-format", f"refs/exps/{name}"]
        assert subprocess.run(command, check=False).returncode == 0


def test_parts_of_a_gpu_are_not_counted_as_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tool := tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: one (UUID: GPU-1)'\necho '  MIG 1g.10gb Device 0: (UUID: MIG-2)'\n"
    )
    tool.chmod(0o755)
    assert dvc_queue.gpus() == ["0"]
    tool.write_text("#!/bin/sh\necho 'GPU access failed'\nexit 9\n")
    assert dvc_queue.gpus() == []


def test_what_a_dead_worker_left_running_ends_the_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked = iter([{}, {"seed-1": "Queued"}])
    monkeypatch.setattr(dvc_queue, "states", lambda: next(looked, {"seed-1": "Running"}))
    monkeypatch.setattr(dvc_queue, "dvc", lambda *arguments: "")
    monkeypatch.setattr(dvc_queue, "workers", lambda: 1)
    monkeypatch.setattr(dvc_queue.subprocess, "run", lambda *command, **options: None)
    monkeypatch.setattr(dvc_queue, "POLL", 0)
    said = "seed-1: its worker has died, and DVC has it for running; end it: .venv/bin/dvc queue kill seed-1\n"
    with Relay() as relay:
        assert dvc_queue.run_queued({"seed-1": ["seed=1"]}, 1, relay) == []
        assert capsys.readouterr().err == said
        dvc_queue.end_queued({"seed-1"}, signal.SIGINT)
        assert capsys.readouterr().err == said


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository of one stage, a `review` that says its arguments, and a bare PATH."""
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
    Path("stages/score.py").write_text(SCORE.format(root=tmp_path))
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("params.yaml").write_text("beta: 0.1  # a comment\n")
    Path(".gitignore").write_text("__pycache__\n.scratch\nup\n")
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


def run(*words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "tools.sweep", *words]
    return subprocess.run(whole, capture_output=True, text=True, check=False, timeout=300)


def experiments() -> dict[str, object]:
    """What the score of each experiment says, by the experiment's name."""
    found = command("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
    return {ref.split("/")[-1]: json.loads(command("git", "show", f"{ref}:score.json")) for ref in found}


def head() -> str:
    return command("git", "rev-parse", "HEAD").strip()


def check_untouched(*, interrupted: bool = False) -> None:
    """The workspace is as it was, and no copy of it is left; DVC may leave one where it was interrupted while it made or removed it."""
    assert command("git", "status", "--porcelain") == ""
    assert command("git", "symbolic-ref", "HEAD") == "refs/heads/main\n"
    assert Path("params.yaml").read_text() == "beta: 0.1  # a comment\n"
    assert len(list(Path(".dvc/tmp/exps/standalone").glob("tmp*"))) <= interrupted


@pytest.mark.slow
def test_a_sweep_runs_every_beta_reports_the_failed_one_and_replaces_older_ones(repository: Path) -> None:
    dvc("exp", "run", "--queue", "-S", "beta=7", "--name", "mine")
    done = run("--betas", "0.3,0.2")
    assert done.returncode == 1, done.stderr
    assert "beta-0.3: failed; the lines above say why\n" in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(("beta-", "review"))] == [
        "beta-0.3: experiment 1 of 2",
        "beta-0.2: experiment 2 of 2",
        "review --compare beta-0.2",
    ]
    assert experiments() == {"beta-0.2": {"beta": 0.2}}

    Path("stages/score.py").write_text("import pathlib; pathlib.Path('score.json').write_text('[]')")
    Path("dvc.yaml").write_text(DVC_YAML.replace("params:", "deps: [stages/score.py]\n    params:"))
    done = run("--betas", "0.2")
    assert done.returncode == 0, done.stderr
    assert "beta-0.2: an experiment of this commit already, it is replaced\n" in done.stdout
    assert experiments() == {"beta-0.2": []}

    command("git", "checkout", "-q", ".")
    check_untouched()
    assert "mine" in dvc("queue", "status")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_stops_the_running_one_and_keeps_those_that_ended(number: signal.Signals, repository: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.sweep", "--betas", "0.2,0.4,0.5"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not Path("up").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = run("--betas", "0.6")
    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert second.stderr.startswith("sweep: another `make sweep` is running in this folder")
    process.send_signal(number)
    assert "sweep: interrupted; experiments that had ended are kept\n" in process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    assert experiments() == {"beta-0.2": {"beta": 0.2}}
    check_untouched(interrupted=True)


def test_without_a_git_identity_nothing_is_begun(repository: Path) -> None:
    command("git", "config", "--unset", "user.email")
    done = run("--betas", "0.2")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "git config --global user.email" in done.stderr
    assert experiments() == {}


@pytest.mark.slow
def test_several_run_at_once_in_the_queue_and_the_first_one_before_them(repository: Path) -> None:
    """As the first has computed what all share when the others begin."""
    Path("stages/score.py").write_text(MEETING.format(root=repository))
    Path(".gitignore").write_text(Path(".gitignore").read_text() + "here\n")
    Path("here").mkdir()
    command("git", "commit", "-qam", "a meeting")
    done = run("--betas", "0.1,0.2,0.5,0.3", "--jobs", "2")
    assert done.returncode == 1, done.stderr
    assert "beta-0.3: failed; `.venv/bin/dvc queue logs beta-0.3` says why" in done.stderr
    assert done.stdout.splitlines()[-1] == "review --compare beta-0.1 beta-0.2 beta-0.5"
    together = ["0.1", "0.2", "0.5"]
    assert experiments() == {"beta-0.1": ["0.1"], "beta-0.2": together, "beta-0.5": together}

    # Once more on another commit: what DVC's queue says of the first sweep is not taken for the second.
    Path("stages/score.py").write_text(
        "import pathlib, time; time.sleep(5); pathlib.Path('score.json').write_text('[]')"
    )
    Path("dvc.yaml").write_text(DVC_YAML.replace("params:", "deps: [stages/score.py]\n    params:"))
    command("git", "commit", "-qam", "another score")
    done = run("--betas", "0.1,0.3,0.5", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "review --compare beta-0.1 beta-0.3 beta-0.5"
    newest = command("git", "for-each-ref", "--format=%(refname)", f"refs/exps/{head()[:2]}/{head()[2:]}/*").split()
    assert sorted(ref.split("/")[-1] for ref in newest) == ["beta-0.1", "beta-0.3", "beta-0.5"]
    check_untouched()


@pytest.mark.slow
def test_what_waits_in_the_queue_already_is_not_run_beside_a_sweep(repository: Path) -> None:
    dvc("exp", "run", "--queue", "-S", "beta=7", "--name", "mine")
    done = run("--betas", "0.1,0.2", "--jobs", "2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("sweep: --jobs: DVC's queue holds mine, which would run too;")
    assert experiments() == {}


@pytest.mark.slow
def test_a_signal_ends_the_queued_ones_too(repository: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.sweep", "--betas", "0.2,0.4,0.5", "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not Path("up").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "sweep: interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "beta-0.4" not in experiments()
    assert not [line for line in dvc("queue", "status").splitlines() if line.endswith(("Queued", "Running"))]
