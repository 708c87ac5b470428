"""A profile chosen for one run is gone after it, whatever ended it; what would fail hours later is refused; stages run in their .venv."""

import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import util
from pathlib import Path
from threading import Thread
from typing import Any

import nltk
import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hermes.console import UserError
from hermes.run import run_tool
from tools import doctor, dvc_runs, profiles, repro

ROOT = Path(__file__).resolve().parents[2]
PARAMS = (
    b"# a comment\nseed: 1  # of everything\r\nprofile:   cpu   # the default\nprofiles:\n"
    b"  cpu: {profile: x}\n  a40: {}\n\n\n# the end, without a newline"
)
# Stands in for `python -m dvc repro`: what it does is in the file `behave`, what it was told and saw goes to `seen`. And for `dvc status`,
# to which all is up to date where there is a file `current`.
DVC = """
import os, pathlib, sys, time
if sys.argv[1] == "status":
    sys.exit(not pathlib.Path("current").exists())
pathlib.Path("seen").write_text(" ".join(sys.argv[1:]) + "\\n" + pathlib.Path("params.yaml").read_text())
exec(pathlib.Path("behave").read_text())
"""
WAIT = "pathlib.Path('up').touch(); time.sleep(60)"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a params.yaml and a stand-in for dvc."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    Path("params.yaml").write_bytes(PARAMS)
    Path("dvc.py").write_text(DVC)
    Path("behave").write_text("")
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run from beginning to end, in this process but for dvc."""
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["repro", *arguments])
        try:
            run_tool("repro", repro.main)
            code = 0
        except SystemExit as exit:
            code = exit.code
    if isinstance(code, str):
        return subprocess.CompletedProcess(sys.argv, 1, out.getvalue(), f"{err.getvalue()}{code}\n")
    return subprocess.CompletedProcess(sys.argv, code or 0, out.getvalue(), err.getvalue())


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, for what is read when packages are imported."""
    command = [sys.executable, "-m", "tools.repro", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A run that is inside dvc when this returns."""
    process = subprocess.Popen([sys.executable, "-m", "tools.repro", *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not Path("up").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process


def seen_profile() -> str:
    return next(line for line in Path("seen").read_text().splitlines() if line.startswith("profile:"))


def test_without_instructions_the_result_is_of_preferences_and_suites() -> None:
    gain = {"points": 2.5, "low": -0.5, "high": 5.5, "n": 700}
    metrics = {"preference_accuracy": {"base": 0.5, "merged": 0.75}, "suites_gain": {"nous": gain}}
    assert repro.headline(metrics) == (
        "preference accuracy of base: 50.0%; preference accuracy of merged: 75.0%; nous +2.5 points, 95% interval -0.5 to +5.5"
    )


def test_only_the_profile_changes() -> None:
    text = PARAMS.decode()
    changed = text.replace("profile:   cpu   #", "profile:   a40   #")
    assert profiles.with_profile(text, "a40") == (changed, "cpu")


@pytest.mark.parametrize("code", [0, 3])
def test_profile_is_selected_during_the_run_only_and_the_exit_code_is_dvcs(checkout: Path, code: int) -> None:
    Path("behave").write_text(f"sys.exit({code})")
    done = run("--profile", "a40", "-f", "train")
    assert done.returncode == code, done.stderr
    assert seen_profile() == 'profile:   "a40"   # the default'
    assert Path("seen").read_text().splitlines()[0] == "repro -f train"
    assert Path("params.yaml").read_bytes() == PARAMS
    assert not profiles.BEFORE.exists()


def test_a_changed_value_is_an_experiment_under_the_profile(checkout: Path) -> None:
    assert run("--profile=a40", "--set-param=beta=0.05", "-S", "seed=-1", "train").returncode == 0
    assert Path("seen").read_text().splitlines()[0] == "exp run --set-param=beta=0.05 --set-param=seed=-1 train"
    assert seen_profile() == 'profile:   "a40"   # the default'
    assert Path("params.yaml").read_bytes() == PARAMS


def test_without_a_profile_the_file_is_not_touched(checkout: Path) -> None:
    os.utime("params.yaml", ns=(1, 1))
    assert run().returncode == 0
    assert Path("params.yaml").stat().st_mtime_ns == 1
    assert seen_profile() == "profile:   cpu   # the default"


def test_permissions_stay(checkout: Path) -> None:
    Path("params.yaml").chmod(0o640)
    assert run("--profile", "a40").returncode == 0
    assert Path("params.yaml").stat().st_mode & 0o777 == 0o640


def test_an_unknown_profile_is_one_line_before_anything_runs(checkout: Path) -> None:
    done = run("--profile", "a41")
    assert done.returncode == 1
    assert done.stderr == "repro: --profile a41: no such profile in params.yaml; choose one of a40, cpu\n"
    assert not Path("seen").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_whole_run_and_restores(checkout: Path, number: signal.Signals) -> None:
    # dvc's own stage is a grandchild here, which dvc itself would leave running
    Path("behave").write_text(
        "import subprocess; p = subprocess.Popen(['sleep', '60']); pathlib.Path('grandchild').write_text(str(p.pid))\n"
        + WAIT
    )
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup, which would be inherited
    try:
        process = start("--profile", "a40")
    finally:
        signal.signal(number, before)
    grandchild = int(Path("grandchild").read_text())
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    assert Path("params.yaml").read_bytes() == PARAMS
    deadline = time.monotonic() + 10
    while is_running(grandchild):
        assert time.monotonic() < deadline, "a stage survived"
        time.sleep(0.05)


@pytest.mark.parametrize("all_of_them", [False, True])
def test_sigterm_lets_a_stage_save_and_waits_for_it(checkout: Path, all_of_them: bool) -> None:
    """DVC ignores the Ctrl-C that SIGTERM becomes; a rented machine may send SIGTERM to each process, and that ends DVC at once."""
    Path("behind_dvc.py").write_text(
        "import pathlib, signal, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    pathlib.Path('saved').touch()\n"
        "    raise SystemExit(143)\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, save)\n" + WAIT.replace("60", "600")
    )
    Path("behave").write_text(
        "import signal, subprocess\n"
        "p = subprocess.Popen([sys.executable, 'behind_dvc.py'])\n"
        "pathlib.Path('pids').write_text(f'{os.getpid()} {p.pid}')\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.exit(p.wait() and 255)"
    )
    process = start("--profile", "a40")
    for pid in (process.pid, *(map(int, Path("pids").read_text().split()) if all_of_them else ())):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert Path("saved").exists()
    assert Path("params.yaml").read_bytes() == PARAMS


def test_a_stage_that_the_kernel_killed_for_want_of_memory_is_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counters are the kernel's, in files of ours: a real one would take this machine's memory."""
    Path("vmstat").write_text("pgfault 7\noom_kill 3\n")
    monkeypatch.setattr(repro, "KILLS", (Path("events"), Path("vmstat")))
    Path("behave").write_text("sys.exit(255)")
    assert "memory" not in run().stderr
    Path("behave").write_text("pathlib.Path('events').write_text('oom 1\\noom_kill 1\\n'); sys.exit(255)")
    done = run()
    assert (done.returncode, done.stderr.count("for want of memory")) == (255, 1)


def test_the_kernel_s_counter_of_such_kills_is_read() -> None:
    assert re.search(r"^oom_kill \d+$", repro.KILLS[1].read_text(), re.MULTILINE)
    assert repro.out_of_memory_kills() >= 0


def is_running(pid: int) -> bool:
    """Whether a process lives; one that only waits to be reaped does not."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(listed.strip()) and not listed.startswith("Z")


def test_nohup_holds(checkout: Path) -> None:
    Path("behave").write_text(WAIT.replace("60", "2"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("--profile", "a40")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=20) == 0


def test_after_kill_9_no_second_run_enters_and_the_next_one_restores(checkout: Path) -> None:
    Path("behave").write_text("pathlib.Path('pid').write_text(str(os.getpid()))\n" + WAIT)
    process = start("--profile", "a40")
    process.kill()
    process.wait()
    assert Path("params.yaml").read_bytes() != PARAMS
    blocked = run()  # the orphaned dvc still reads params.yaml
    assert blocked.returncode == 1
    assert blocked.stderr == "repro: another `make repro` is running in this folder; wait for it or stop it\n"
    os.kill(int(Path("pid").read_text()), signal.SIGKILL)
    Path("behave").write_text("")
    wait_for_lock()
    assert run().returncode == 0
    assert seen_profile() == "profile:   cpu   # the default"
    assert Path("params.yaml").read_bytes() == PARAMS


def wait_for_lock() -> None:
    with Path(".scratch/repro.lock").open("a") as lock:
        deadline = time.monotonic() + 10
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


LOCK = (
    "schema: '2.0'\nstages:\n  one:\n    cmd: run\n    outs:\n    - path: data/raw\n      hash: md5\n      md5: abc\n"
)


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("text", ["", LOCK[:49], LOCK[:-40], LOCK + "  two: {cmd: run, outs: [{path", b"\xff\xfe"])
def test_a_dvc_lock_that_a_killed_dvc_left_gives_way_to_the_committed_one(
    text: str | bytes,
    committed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = partial(subprocess.run, check=True, capture_output=True)
    shell(["git", "init", "-q"])
    lock = Path("dvc.lock")
    if committed:
        lock.write_text(LOCK)
        shell(["git", "add", "dvc.lock"])
        shell(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "a run"])
    Path(".scratch").mkdir()
    broken = text if isinstance(text, bytes) else text.encode()
    lock.write_bytes(broken)
    repro.mend_lock()
    assert (lock.read_text() if lock.exists() else None) == (LOCK if committed else None)
    assert Path(".scratch/dvc.lock.broken").read_bytes() == broken
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "repro: DVC cannot read dvc.lock, as after a kill while it wrote that; it is .scratch/dvc.lock.broken now"
    )


@pytest.mark.parametrize("text", ["", '{"read": {', '{"read": {"a": [{"pid": 7, "cmd": "dvc'])
def test_a_cut_list_of_paths_in_use_fails_dvc_and_is_deleted(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = partial(subprocess.run, capture_output=True, text=True, check=False)
    shell(["git", "init", "-q"])
    shell([*dvc_runs.DVC, "init", "-q"])
    Path("dvc.yaml").write_text("stages:\n  one:\n    cmd: echo 1 >out\n    outs: [out]\n")
    repro.HELD.write_text(text)
    failed = shell([*dvc_runs.DVC, "repro"])
    assert failed.returncode
    assert "Unable to read RWLock-file" in failed.stderr
    repro.mend_held()
    assert (
        capsys.readouterr().err
        == "repro: DVC cannot read .dvc/tmp/rwlock, as after a kill while it wrote that; it is deleted\n"
    )
    assert shell([*dvc_runs.DVC, "repro"]).returncode == 0
    sound = repro.HELD.read_bytes()
    repro.mend_held()
    assert (repro.HELD.read_bytes(), capsys.readouterr().err) == (sound, "")


def test_a_dvc_lock_cut_anywhere_is_judged_as_dvc_does() -> None:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    text = (
        LOCK
        + "      size: 12\n      nfiles: 3\n    deps:\n    - path: a.csv\n      hash: md5\n      md5: 699a\n      isexec: true\n"
    )
    text += (
        "    params:\n      params.yaml:\n        seed: 42\n        profiles.cpu.model:\n          source: embedded\n"
    )

    def is_sound(check: Callable[[Any], object], cut: str) -> bool:
        try:
            check(YAML(typ="safe").load(cut) or {})  # as DVC reads an empty one
        except (YAMLError, Invalid, ValueError):
            return False
        return True

    cuts = [text[:end] for end in range(len(text) + 1)]
    ours, theirs = (
        [is_sound(check, cut) for cut in cuts] for check in (repro.LockFile.model_validate, COMPILED_LOCKFILE_SCHEMA)
    )
    assert [cut[-30:] for cut, a, b in zip(cuts, ours, theirs, strict=True) if a != b] == []
    assert 0 < sum(ours) < len(cuts)


@pytest.mark.parametrize("text", [LOCK, LOCK + "<<<<<<< HEAD\n", None])
def test_a_dvc_lock_that_dvc_reads_or_that_git_could_not_merge_is_left_alone(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("dvc.lock").write_text(text)
    repro.mend_lock()
    assert (Path("dvc.lock").read_text() if Path("dvc.lock").exists() else None) == text
    assert capsys.readouterr().err == ""


def test_an_edit_made_during_the_run_stays(checkout: Path) -> None:
    with profiles.selected("a40"):
        edited = Path("params.yaml").read_bytes().replace(b"seed: 1", b"seed: 2")
        Path("params.yaml").write_bytes(edited)
    assert Path("params.yaml").read_bytes() == PARAMS.replace(b"seed: 1", b"seed: 2")
    assert not profiles.BEFORE.exists()


def test_a_failure_to_write_leaves_the_old_file(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"), profiles.selected("a40"):
        pass
    assert Path("params.yaml").read_bytes() == PARAMS


def test_how_many_outs_have_the_committed_bits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert repro.against_the_commit() == []
    lock = "stages:\n  one:\n    outs:\n    - {path: a, md5: 11}\n    - {path: b, md5: 22.dir}\n"
    Path("dvc.lock").write_text(lock)
    Path("params.yaml").write_text("bits: avx512\nprofile: cpu\nprofiles: {cpu: {}, quick: {}}\n")
    Path("reports").mkdir()
    Path("reports/hashes.json").write_text('{"quick": {"avx512": {"outs": {"one": {"b": "33.dir"}}}}}')
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], check=True)
    assert repro.against_the_commit() == ["2 of 2 outs have the committed bits"]
    Path("dvc.lock").write_text(lock.replace("22.dir", "33.dir"))
    first, second = repro.against_the_commit()
    assert first == "1 of 2 outs have the committed bits; the first that has not: b of one"
    assert second.endswith("git restore dvc.lock reports && .venv/bin/dvc checkout")
    assert repro.against_the_commit("quick") == ["1 of 1 outs have the committed bits"]  # of the run that is on record


def test_a_finished_run_says_the_result_and_where_the_report_is(checkout: Path) -> None:
    Path("reports").mkdir()
    Path("reports/metrics.json").write_text(
        '{"strict_accuracy": {"base": 0.1, "merged": 0.4321},'
        ' "strict_gain": {"points": 33.2, "low": 30.04, "high": 36, "n": 480}}'
    )
    out = run().stdout
    assert "base 10.0%, merged 43.2%; gain +33.2 points, 95% interval +30.0 to +36.0, n = 480" in out
    assert "reports/report.html" in out
    assert run("train").stdout == ""  # the report may be older than this run
    Path("behave").write_text("sys.exit(1)")
    assert run().stdout == ""


def test_children_find_this_python_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/somewhere")
    assert dvc_runs.environment()["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/somewhere"


def test_one_at_a_time(checkout: Path) -> None:
    with (
        dvc_runs.only_one("repro"),
        pytest.raises(UserError, match="another `make repro` is running"),
        dvc_runs.only_one("repro"),
    ):
        pass


@pytest.mark.parametrize(
    ("variables", "stamp", "uses"),
    [
        ({}, "cuda 1 2", True),
        ({}, None, True),
        ({}, "cpu 1 2", False),
        ({"DEVICE": "cpu"}, "cuda 1 2", False),
        ({"DEVICE": "cuda"}, "cpu 1 2", True),
        ({"CUDA_VISIBLE_DEVICES": ""}, "cuda 1 2", False),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "cuda 1 2", True),
    ],
)
def test_a_gpu_is_for_use_unless_someone_said_no(
    variables: dict[str, str], stamp: str | None, uses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if stamp:
        (tmp_path / "stamp").write_text(stamp)
    assert doctor.uses_gpu(tmp_path, tmp_path / "stamp") is uses
    assert not doctor.uses_gpu(tmp_path / "no-driver", tmp_path / "stamp")


def put_torch(available: bool) -> None:
    """A stand-in for torch, for the children of a test in the folder `checkout`."""
    Path("torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {available})\n")


def test_nothing_starts_on_the_cpu_for_a_gpu_that_torch_cannot_use(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "uses_gpu", lambda: True)
    monkeypatch.setattr(doctor, "present_gpu", lambda: doctor.Gpu("NVIDIA A40", "550.127.05"))
    monkeypatch.setattr(doctor, "folder_of", lambda package: checkout / package)
    (checkout / "torch").mkdir()
    (checkout / "torch/version.py").write_text("cuda: Optional[str] = '13.0'\n")
    put_torch(available=False)
    with pytest.raises(
        UserError, match=r"driver 550.127.05, too old for CUDA 13.0; install driver 580.65 or newer"
    ) as why:
        repro.repro("a40", [])
    assert "\n" not in str(why.value)
    assert not Path("seen").exists()


@pytest.mark.parametrize("uses", [True, False])
def test_with_a_gpu_everything_is_checked_before_anything_starts(
    uses: bool, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(doctor, "uses_gpu", lambda: uses)
    for name in ("check_cuda", "check_plan"):
        monkeypatch.setattr(repro, name, lambda *given, name=name: asked.append((name, *given, Path("seen").exists())))
    assert repro.repro("a40", []) == 0
    assert asked == ([("check_cuda", False), ("check_plan", "a40", False)] if uses else [])
    assert Path("seen").exists()


def test_a_gpu_that_torch_can_use_is_no_obstacle(checkout: Path) -> None:
    put_torch(available=True)
    repro.check_cuda()


class Gate(BaseHTTPRequestHandler):
    """The part of the Hub that says who may read GPQA: those with the token hf_good."""

    asked: list[str]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        good = self.headers.get("Authorization") == "Bearer hf_good"
        self.send_response(200 if good else 403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def gate(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub on the loopback, for a checkout whose profile asks for open_llm_v2 and which has all else that this needs."""
    suites = "{evaluate: {suites: [open_llm_v2]}}"
    Path("params.yaml").write_text(f"profile: big\nprofiles: {{big: {suites}, cpu: {{evaluate: {{suites: []}}}}}}\n")
    Path("setup.sh").write_text("#!/bin/sh\necho $* >>set-up\n")
    Path("setup.sh").chmod(0o755)
    (checkout / "nltk" / repro.PUNKT).mkdir(parents=True)
    monkeypatch.setenv("NLTK_DATA", str(checkout / "nltk"))
    monkeypatch.setenv("HF_HOME", str(checkout / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    Gate.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Gate) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()


def test_a_licence_that_was_not_accepted_is_one_line_before_anything_runs(gate: None) -> None:
    done = launch()
    assert done.returncode == 1
    assert done.stderr == (
        "repro: the suite open_llm_v2 asks for Idavidrein/gpqa@main: it is gated: accept its licence on its page, and set "
        "HF_TOKEN to a token of that account; nothing was started\n"
    )
    assert not Path("seen").exists()
    assert Path("set-up").read_text() == "math\n"


def test_with_the_licence_accepted_the_run_starts(gate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert launch().returncode == 0
    assert Path("seen").exists()
    assert Gate.asked[-1] == f"/api/datasets/{repro.GPQA}/auth-check"


def test_an_evaluation_that_is_up_to_date_asks_for_no_licence(gate: None) -> None:
    Path("current").touch()
    assert launch().returncode == 0
    assert Path("seen").exists()
    assert not Gate.asked


def test_without_a_network_what_is_here_already_may_do(gate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert launch().returncode == 0
    assert not Gate.asked


def test_a_profile_without_suites_needs_nothing(gate: None) -> None:
    assert run("--profile", "cpu").returncode == 0
    assert not Gate.asked
    assert not Path("set-up").exists()


def test_a_run_that_ends_with_training_needs_nothing_of_the_evaluation(gate: None) -> None:
    assert run("train").returncode == 0
    assert not Gate.asked


def test_a_set_up_that_fails_is_one_line_before_anything_runs(gate: None) -> None:
    Path("setup.sh").write_text("#!/bin/sh\nexit 1\n")
    done = launch()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "./setup.sh math failed" in done.stderr
    assert not Path("seen").exists()


def test_gpqa_is_what_lm_eval_calls_it() -> None:
    spec = util.find_spec("lm_eval")
    assert spec
    assert spec.origin
    template = Path(spec.origin).parent / "tasks/leaderboard/gpqa/_template_yaml"
    assert f"dataset_path: {repro.GPQA}\n" in template.read_text()
    sources = (Path(spec.origin).parent / "tasks/leaderboard/ifeval/instructions_util.py").read_text()
    assert f'nltk.data.find("{repro.PUNKT}")' in sources


@pytest.mark.parametrize("arrives", [True, False])
def test_what_splits_sentences_is_downloaded_first_or_the_run_refused(
    arrives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, quiet: bool) -> bool:
        asked.append(name)
        return arrives

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", download)
    if arrives:
        repro.prepare_punkt()
    else:
        with pytest.raises(UserError, match="punkt_tab, which cannot be downloaded"):
            repro.prepare_punkt()
    assert asked == ["punkt_tab"]
    (tmp_path / repro.PUNKT).mkdir(parents=True)
    repro.prepare_punkt()
    assert asked == ["punkt_tab"]


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """A checkout with the launcher and a .venv whose python says what it is given and where it is."""
    (tmp_path / "checkout/.venv/bin").mkdir(parents=True)
    python = tmp_path / "checkout/.venv/bin/python"
    python.write_text('#!/bin/sh\necho "venv $* in $(pwd -P)"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "run-stage", tmp_path / "checkout/run-stage")
    return tmp_path / "checkout"


@pytest.mark.parametrize("copy", [".", ".dvc/tmp/exps/tmp1", ".dvc/tmp/exps/standalone/tmp2"])
def test_launcher_takes_the_checkouts_venv_and_stays_where_it_is(launcher: Path, copy: str) -> None:
    folder = launcher / copy
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [str(launcher / "run-stage"), "train"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"venv -m stages.train in {folder.resolve()}\n"


def test_launcher_does_not_let_a_users_python_settings_break_a_stage(
    launcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (launcher / ".venv/bin/python").unlink()
    (launcher / ".venv/bin/python").symlink_to(sys.executable)
    (launcher / "stages").mkdir()
    (launcher / "stages/train.py").write_text("import json; print(json.__file__)")
    (launcher / "elsewhere").mkdir()
    (launcher / "elsewhere/json.py").write_text("raise SystemExit('another json')")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONHOME", str(launcher / "elsewhere"))
    monkeypatch.setenv("PYTHONPATH", str(launcher / "elsewhere"))
    done = subprocess.run(["./run-stage", "train"], cwd=launcher, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_launcher_without_a_venv_takes_the_path_and_no_parents_venv(launcher: Path, tmp_path: Path) -> None:
    inner, tools = launcher / "clone", tmp_path / "tools"
    inner.mkdir()
    tools.mkdir()
    (tools / "python").write_text('#!/bin/sh\necho "path $*"\n')
    (tools / "python").chmod(0o755)
    command = [str(launcher / "run-stage"), "train"]
    done = subprocess.run(command, cwd=inner, env={"PATH": str(tools)}, capture_output=True, text=True, check=True)
    assert done.stdout == "path -m stages.train\n"
    done = subprocess.run(command, cwd=inner, env={"PATH": str(inner)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (127, "run-stage: no .venv and no python; run: make setup\n")
