"""A variable of make reaches its program as it was typed and runs nothing; where it would mean nothing it is refused before set-up."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What every target takes beside DEVICE and PYTHON, and as which option its program gets it.
OPTIONS = {
    "repro": {"PROFILE": "--profile="},
    "chat": {"MODEL": "--model="},
    "train": {
        "PROFILE": "--profile=",
        "BETA": "--set-param=beta=",
        "LOSS": "--set-param=loss_type=",
        "SEED": "--set-param=seed=",
    },
    "sweep": {"BETAS": "--betas=", "SEEDS": "--seeds=", "GRID": "--grid=", "JOBS": "--jobs="},
    "verify": {"STAGE": "--stage=", "BITS": "--bits="},
    "review": {"BASE": "--base=", "HEAD": "--head="},
    "plan": {"PROFILE": "--profile=", "GPU": "--gpu=", "PRICE": "--price="},
    "wandb-report": {"ENTITY": "--entity="},
    "rehearse": {"PROFILE": "--profile=", "LAYERS": "--layers=", "PAIRS": "--pairs="},
    "publish": {"REPO": "--repo=", "PROFILE": "--profile=", "LICENCE": "--licence="},
    "doctor": {"PROFILE": "--profile="},
}
SWITCHES = {
    "verify": {"QUICK": "--quick"},
    "base": {"RESOLVE": "--resolve"},
    "publish": {"DATA": "--data", "PUSH": "--push"},
    "wandb-report": {"SAVE": "--save"},
    "bench": {"FULL": "--full"},
}
NEEDED = {"sweep": "BETAS=0.1", "review": "BASE=main", "publish": "REPO=a/b", "wandb-report": "ENTITY=a"}
VARIABLES = {name for taken in (*OPTIONS.values(), *SWITCHES.values()) for name in taken} | {"DEVICE", "PYTHON"}
TARGETS = re.findall(r"^## make ([a-z-]+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
# What the Makefile sets for itself, and what make and its functions use.
OWN = sorted(
    {
        *re.findall(r"^(?:override )?(?:define )?([\w.]+) *(?::?=|$)", (ROOT / "Makefile").read_text(), re.MULTILINE),
        *re.findall(r"\$\(foreach (\w+),", (ROOT / "Makefile").read_text()),
        *("SHELL", ".SHELLFLAGS", ".DEFAULT_GOAL", ".RECIPEPREFIX", "MAKECMDGOALS", "MAKEOVERRIDES", "MAKE", "CURDIR"),
    }
    - {"endef"}
)
HOSTILE = [
    "$(shell touch ran)",
    "${shell touch ran}",
    "$$(touch ran)",
    "$(touch ran)",
    "`touch ran`",
    "; touch ran #",
    "' ; touch ran ; '",
    '" && touch ran && "',
    "a\\",
    "\\' touch",
    "--output=ran",
    "-h",
    "two  words\t",
    "a,b=c:d%e*?[x]~{y,z}!<>|&()",
    "$@ $< $(MAKE) $(PROFILE) $",
    "\N{SNOWMAN} \x1b[31m",
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the Makefile, and programs that write down what they are given."""
    for name in VARIABLES | {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "Makefile", "Makefile")
    Path(".venv/bin").mkdir(parents=True)
    record = (
        '#!/bin/sh\n[ "$2" != tools.check_params ] || exec printf "%s\\0" "$@" >>checked\n'
        'printf "%s\\0" "$@" >>seen\nenv -0 >environment\n'
    )
    for name in ("python", "dvc", "ruff", "mypy"):
        Path(".venv/bin", name).write_text(record)
        Path(".venv/bin", name).chmod(0o755)
    Path("setup.sh").write_text('#!/bin/sh\nprintf "%s\\0" "${DEVICE:-}" "${PYTHON:-}" >set-up\n')
    Path("setup.sh").chmod(0o755)
    return tmp_path


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    Path("seen").unlink(missing_ok=True)
    Path("set-up").unlink(missing_ok=True)
    given = os.environ | environment
    return subprocess.run(["make", *words], env=given, capture_output=True, text=True, check=False)


def words(path: str) -> list[str]:
    return Path(path).read_text().split("\0")[:-1]


def needed(target: str, *given: str) -> list[str]:
    """What a target cannot do without, beside these variables."""
    return [word for word in [NEEDED.get(target, "")] if word and word.partition("=")[0] not in given]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """What a call that was refused in one line, before anything was set up, says."""
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not Path("set-up").exists()
    return done.stderr


@pytest.mark.parametrize(("target", "name"), [(target, name) for target, taken in OPTIONS.items() for name in taken])
def test_a_value_arrives_as_it_was_typed_and_runs_nothing(target: str, name: str, checkout: Path) -> None:
    others = needed(target, name)
    for value in HOSTILE:
        done = make(target, f"{name}={value}", *others)
        assert done.returncode == 0, done.stderr
        assert f"{OPTIONS[target][name]}{value}" in words("seen")
        assert len(words("seen")) == 3 + len(others) + (target == "train")
        assert not Path("ran").exists()


def test_the_makefiles_own_variables_are_known_to_the_tests() -> None:
    assert {"GIVEN", "GOALS", "PY", "check_value", "comma", "newline", "quote", "takes.repro", "v", "goal"} <= set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_a_variable_of_the_makefiles_own_is_refused_and_runs_nothing(name: str, checkout: Path) -> None:
    for value in ("$(shell touch ran)", "x $(shell touch ran) y", "1"):
        said = refused(make("repro", f"{name}={value}"))
        assert "does not take" in said
        assert not Path("ran").exists()


@pytest.mark.parametrize("name", [*sorted({*OWN, *VARIABLES} - {"MAKECMDGOALS"}), "HOME", "ANYTHING"])
def test_a_variable_of_the_environment_runs_nothing_and_changes_no_check(name: str, checkout: Path) -> None:
    expected = ["-m", "tools.repro", "--profile=a40"]
    for flags in ([], ["-e"]):
        done = make(*flags, "repro", "PROFILE=a40", **{name: "$(shell touch ran)"})
        assert (done.returncode, words("seen")) == (0, expected), done.stderr
        assert not Path("ran").exists()


def test_goals_of_the_environment_run_nothing(checkout: Path) -> None:
    refused(make("repro", "PROFILE=a40", MAKECMDGOALS="$(shell touch ran)"))
    assert make(MAKECMDGOALS="$(shell touch ran)").returncode in (0, 2)
    assert not Path("ran").exists()


@pytest.mark.parametrize("target", ["repro", "train", "sweep", "report", "plan", "rehearse", "publish", "bench"])
def test_params_are_checked_before_the_experiment_begins(target: str, checkout: Path) -> None:
    profile = ["PROFILE=a40"] if "PROFILE" in OPTIONS.get(target, {}) else []
    assert make(target, *profile, *needed(target)).returncode == 0
    assert words("checked") == ["-m", "tools.check_params", *(f"--profile={word[8:]}" for word in profile)]


@pytest.mark.parametrize("name", ["DEVICE", "PYTHON"])
def test_set_up_gets_its_values_from_the_command_line_and_from_the_environment(name: str, checkout: Path) -> None:
    for value in HOSTILE:
        for done in (make("repro", f"{name}={value}"), make("repro", **{name: value})):
            assert (done.returncode, done.stderr) == (0, "")
            assert words("set-up")[name == "PYTHON"] == value
            assert words("seen") == ["-m", "tools.repro"]
            assert not Path("ran").exists()


@pytest.mark.parametrize("target", [*TARGETS, "help"])
def test_a_variable_that_a_target_ignores_is_refused(target: str, checkout: Path) -> None:
    taken = {"DEVICE", "PYTHON", *OPTIONS.get(target, ()), *SWITCHES.get(target, ())} if target != "help" else set()
    for name in [*sorted(VARIABLES - taken), "PROFIL", "SHELL", "PY"]:
        said = refused(make(target, f"{name}=1", *needed(target)))
        assert f"make {target} does not take {name}; it takes " in said
        assert set(re.findall(r"\b[A-Z]{2,}\b", said.partition("it takes")[2])) == taken


def test_several_targets_each_take_what_is_given(checkout: Path) -> None:
    assert make("repro", "plan", "PROFILE=cpu").returncode == 0
    assert "make repro does not take BASE" in refused(make("repro", "review", "PROFILE=cpu", "BASE=main"))
    assert "make help does not take PROFILE" in refused(make("PROFILE=cpu"))


@pytest.mark.parametrize("value", ["", " ", "\n", "a\nb", "a\n\ttouch ran"])
def test_an_empty_value_and_one_of_several_lines_are_refused(value: str, checkout: Path) -> None:
    for target, taken in OPTIONS.items():
        for name in [*taken, "DEVICE"]:
            said = refused(make(target, f"{name}={value}", *needed(target, name)))
            assert f"{name} has more than one line" in said if value.strip() else f"{name} is empty" in said
    assert not Path("ran").exists()


@pytest.mark.parametrize("target", NEEDED)
def test_what_a_target_cannot_do_without_is_asked_for_by_example(target: str, checkout: Path) -> None:
    name = NEEDED[target].partition("=")[0]
    assert re.search(rf"make {target} needs {name}.*; for example: make {target} {name}=", refused(make(target)))
    assert refused(make(target, **{name: "1"}))


@pytest.mark.parametrize(("target", "name"), [(target, name) for target, taken in SWITCHES.items() for name in taken])
def test_a_switch_is_1_or_left_out(target: str, name: str, checkout: Path) -> None:
    assert make(target, f"{name}=1", *needed(target)).returncode == 0
    assert SWITCHES[target][name] in words("seen")
    for value in ("0", "no", "$(shell touch ran)", "1 1 0"):
        assert f"{name} is 1 or is left out" in refused(make(target, f"{name}={value}", *needed(target)))
    assert make(target, *needed(target), **{name: "1"}).returncode == 0
    assert SWITCHES[target][name] not in words("seen")
    assert not Path("ran").exists()


def test_a_value_of_the_environment_changes_no_run_and_is_mentioned_where_it_could(checkout: Path) -> None:
    done = make("train", SEED="$(shell touch ran)", PROFILE="a40", REPO="a/b")
    assert done.returncode == 0
    assert words("seen") == ["-m", "tools.repro", "train"]
    assert re.findall(r"([A-Z]+) of the environment is not used", done.stderr) == ["PROFILE", "SEED"]
    assert make("train", SEED="1", PROFILE="a40", REPO="a/b").stderr.count("\n") == 2
    assert make("lint", SEED="1").stderr == ""
    assert not Path("ran").exists()


def test_a_users_python_settings_reach_no_program(checkout: Path) -> None:
    settings = {"PYTHONPATH": "/elsewhere", "PYTHONHOME": "/elsewhere", "PYTHONSAFEPATH": "1"}
    assert make("repro", **settings).returncode == 0
    assert not [line for line in words("environment") if line.partition("=")[0] in settings]


def test_a_make_below_gets_no_variable(checkout: Path) -> None:
    assert make("repro", "PROFILE=$(shell touch ran)").returncode == 0
    assert not [line for line in words("environment") if line.startswith(("PROFILE=", "MAKE")) and "shell" in line]


def test_help_has_a_line_for_every_target_and_fits_a_terminal(checkout: Path) -> None:
    lines = make().stdout.splitlines()
    assert max(map(len, lines)) <= 120
    listed = re.findall(r"^make ([a-z-]+)", "\n".join(lines), re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(targets) - {"help", "checked"})
    assert len(listed) == len(set(listed))
    examples = [line.rpartition("make ")[2] for line in lines if line.count("make ") == 2]
    assert len(examples) > 8
    for example in examples:
        assert make(*shlex.split(example)).returncode == 0
