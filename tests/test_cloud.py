"""The rented machine: it gets what it needs, and its results come back through a real DVC remote, a folder, also those of a failure."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hermes.params import read_yaml

ROOT = Path(__file__).resolve().parent.parent
SKY = read_yaml(ROOT / "cloud/sky.yaml")
COMMANDS = f"{SKY['setup']}\n{SKY['run']}"
OUTPUTS = {
    name: out
    for name, stage in read_yaml(ROOT / "dvc.yaml")["stages"].items()
    for out in stage["outs"]
    if isinstance(out, str)
}
CACHED = set(OUTPUTS.values())
# What the rented machine sends: every output of the real graph that the Hub has not.
STAGES = {name: out for name, out in OUTPUTS.items() if out not in ("data/raw", "models/base")}


def test_sky_yaml_has_the_fields_of_a_task_and_no_other() -> None:
    allowed = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config"}
    assert SKY.keys() <= allowed
    assert SKY["resources"]["infra"] == "runpod"
    assert SKY["resources"]["accelerators"] == "A40:1"
    assert SKY["resources"]["disk_size"] >= 150
    assert SKY["secrets"] == dict.fromkeys(SKY["secrets"])  # no value stands in the file


def test_sky_yaml_runs_what_is_here() -> None:
    asked = [line.split()[1:] for line in COMMANDS.splitlines() if line.startswith("make ")]
    assert asked
    for targets in asked:
        subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, check=True)
    assert SKY["envs"]["PROFILE"] in read_yaml(ROOT / "params.yaml")["profiles"]
    assert SKY["run"].split()[0] == "cloud/run"
    for script in ("run", "push-results"):
        assert os.access(ROOT / "cloud" / script, os.X_OK)


def ignored(*paths: str) -> set[str]:
    """Those of the paths that .gitignore names, whatever else this machine's git ignores and whether or not they are tracked."""
    command = ["git", "-c", f"core.excludesFile={os.devnull}", "check-ignore", "--no-index", *paths]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split())


def test_git_ignores_what_dvc_owns_and_what_is_half_written_beside_it() -> None:
    partial = {f"{Path(out).parent}/.{Path(out).name}.partial" for out in CACHED}
    assert ignored(*CACHED, *partial) == CACHED | partial


def test_the_embedded_data_reaches_the_rented_machine() -> None:
    """SkyPilot gives .gitignore to rsync, which excludes by every line of it: a `!` takes nothing back there."""
    embedded = [f"data/embedded/{path.name}" for path in (ROOT / "data/embedded").iterdir()]
    assert embedded
    assert not ignored("data/embedded", *embedded)
    assert not [line for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("!")]


def test_every_variable_of_the_commands_is_set() -> None:
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", COMMANDS)) - {"PWD"}
    assert used == SKY["envs"].keys()


@pytest.mark.parametrize("section", ["setup", "run"])
def test_the_commands_are_a_shell_s(section: str) -> None:
    subprocess.run(["sh", "-n"], input=SKY[section], text=True, check=True)


def test_set_up_fails_where_torch_cannot_use_the_gpu() -> None:
    (line,) = [line for line in SKY["setup"].splitlines() if "torch" in line]
    command = line.replace(".venv/bin/python", sys.executable)
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "torch cannot use the GPU here; make doctor says why\n")


def introduce(patch: pytest.MonkeyPatch) -> None:
    """Puts this Python and its dvc first in the PATH, and tells git an author."""
    patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        patch.setenv(f"{name}_NAME", "someone")
        patch.setenv(f"{name}_EMAIL", "someone@example.org")


@pytest.fixture
def someone(monkeypatch: pytest.MonkeyPatch) -> None:
    introduce(monkeypatch)


@pytest.fixture
def finished_run(tmp_path: Path, someone: None) -> Path:
    """A repository whose only stage has run since its last commit."""
    folder = tmp_path / "rented"
    (folder / "reports").mkdir(parents=True)
    (folder / "reports/report.md").write_text("old\n")
    (folder / "dvc.yaml").write_text(
        "stages: {train: {cmd: mkdir -p models/adapter && echo weights >models/adapter/a, outs: [models/adapter]}}\n"
    )
    (folder / ".gitignore").write_text("/models/\n/results.bundle\n")
    shell(folder, "git init -q && dvc init -q && git add -A && git commit -qm start")
    shell(folder, "dvc repro -q && echo new >reports/report.md")
    return folder


def shell(folder: Path, command: str) -> str:
    done = subprocess.run(["sh", "-ec", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reports_and_outputs_come_back_as_the_docs_say(finished_run: Path, tmp_path: Path) -> None:
    url = tmp_path / "remote"
    home = tmp_path / "home"
    shell(tmp_path, "git clone -q rented home")
    for _ in range(2):  # a second push of the same run is no error
        shell(finished_run, f"{ROOT}/cloud/push-results {url} models/adapter")
    shell(home, f"dvc get-url -q {url}/results.bundle results.bundle")
    shell(home, "git fetch -q results.bundle results:results && git merge -q results")
    assert (home / "reports/report.md").read_text() == "new\n"
    shell(home, f"dvc remote add -q --local results {url} && dvc pull -q --remote results models/adapter")
    assert (home / "models/adapter/a").read_text() == "weights\n"
    assert "results.bundle" not in shell(home, "git ls-files")


def test_an_output_that_no_stage_knows_is_one_line(finished_run: Path, tmp_path: Path) -> None:
    command = [str(ROOT / "cloud/push-results"), str(tmp_path / "remote"), "models/adaptor"]
    done = subprocess.run(command, cwd=finished_run, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.fullmatch(r"push-results: .*models/adaptor.*\n", done.stderr)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose dvc.lock is from another machine: a chain of the real graph's stages, each fails where a file says so."""
    folder = tmp_path_factory.mktemp("committed") / "rented"
    (folder / "reports").mkdir(parents=True)
    (folder / "reports/report.md").write_text("old\n")
    (folder / "params.yaml").write_text("profile: cpu\nprofiles: {cpu: {made: there}, a40: {made: here}}\n")
    stages, before = {}, "params.yaml"
    for name, out in STAGES.items():
        command = f"test ! -e fail-{name} && mkdir -p {out} && cat params.yaml >{out}/a && echo {name} >>{out}/a"
        stages[name] = {"cmd": command, "deps": [before], "params": ["profiles.${profile}.made"], "outs": [out]}
        before = out
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (folder / ".gitignore").write_text("/models/\n/data/\n/.scratch/\n/results.bundle\n/fail-*\n")
    with pytest.MonkeyPatch.context() as patch:
        introduce(patch)
        shell(folder, "git init -q && dvc init -q && dvc repro -q && git add -A && git commit -qm start")
    shell(folder, "rm -r data models .dvc/cache .dvc/tmp")
    return folder


@pytest.fixture
def rented(committed: Path, tmp_path: Path, someone: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that repository."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Path(shutil.copytree(committed, tmp_path / "rented"))


def run_there(folder: Path, remote: Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "cloud/run"), "a40", str(remote)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def come_home(tmp_path: Path) -> Path:
    """A clone with the results merged and the remote known."""
    home = tmp_path / "home"
    shell(tmp_path, "git clone -q rented home")
    shell(home, "dvc get-url -q ../remote/results.bundle results.bundle && git fetch -q results.bundle results:results")
    shell(home, "git merge -q results && dvc remote add -q --local results ../remote")
    return home


@pytest.mark.slow
def test_a_run_sends_every_output(rented: Path, tmp_path: Path) -> None:
    done = run_there(rented, tmp_path / "remote")
    assert done.returncode == 0, done.stderr
    home = come_home(tmp_path)
    shell(home, f"dvc pull -q --remote results {' '.join(STAGES.values())}")
    for name, out in STAGES.items():
        assert (home / out / "a").read_text().endswith(f"{name}\n")
    assert '"a40"' in (home / "models/gguf/a").read_text()


@pytest.mark.slow
def test_a_run_that_fails_in_its_evaluation_sends_the_models_and_keeps_its_status(rented: Path, tmp_path: Path) -> None:
    (rented / "fail-evaluate").touch()
    done = run_there(rented, tmp_path / "remote")
    assert done.returncode == 255  # DVC's
    home = come_home(tmp_path)
    shell(home, "dvc pull -q --remote results models/adapter models/gguf")
    assert '"a40"' in (home / "models/gguf/a").read_text()
    last = done.stdout.splitlines()[-1]
    assert "models/gguf" in last
    assert "data/evaluation" not in last  # dvc.lock has that of the other machine


@pytest.mark.slow
def test_a_machine_that_is_taken_back_sends_what_there_is(rented: Path, tmp_path: Path) -> None:
    """`sky cancel` sends SIGTERM to every process of the job."""
    stages = json.loads((rented / "dvc.yaml").read_text())
    stages["stages"]["merge"]["cmd"] = "touch up && exec sleep 600"
    (rented / "dvc.yaml").write_text(json.dumps(stages))
    process = subprocess.Popen([str(ROOT / "cloud/run"), "a40", str(tmp_path / "remote")], cwd=rented)
    deadline = time.monotonic() + 240
    while not (rented / "up").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job = psutil.Process(process.pid)
    for one in (job, *job.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    assert process.wait(timeout=120) == 143
    home = come_home(tmp_path)
    shell(home, "dvc pull -q --remote results models/adapter")
    assert '"a40"' in (home / "models/adapter/a").read_text()


def test_nothing_long_starts_where_nothing_can_be_sent(rented: Path, tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("not a folder")
    done = run_there(rented, tmp_path / "remote")
    assert done.returncode not in (0, 255)  # it is not DVC that failed
    assert (rented / "data/subset").is_dir()
    assert not (rented / "data/tokens").exists()


@pytest.mark.slow
def test_a_storage_that_fails_once_is_tried_again_and_stops_nothing(rented: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    stages = json.loads((rented / "dvc.yaml").read_text())
    stages["stages"]["quantize"]["cmd"] += f" && mv {remote} {remote}.gone && touch {remote}"
    stages["stages"]["evaluate"]["cmd"] += f" && rm {remote} && mv {remote}.gone {remote}"
    (rented / "dvc.yaml").write_text(json.dumps(stages))
    done = run_there(rented, remote)
    assert done.returncode == 0, done.stderr
    assert "the models were not sent" in done.stderr
    assert "data/evaluation" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["push-results"], "which URL"),
        (["push-results", "somewhere"], "which outputs"),
        (["run"], "which profile"),
        (["run", "a40"], "where to"),
    ],
)
def test_the_scripts_say_what_they_miss(command: list[str], message: str, tmp_path: Path) -> None:
    script, *arguments = command
    done = subprocess.run(
        [ROOT / "cloud" / script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert message in done.stderr
