"""packages.yaml, the lock files and the installed packages name the same versions."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tools.doctor import DRIVERS, pins

ROOT = Path(__file__).parent.parent
TRACKED: dict[str, object] = YAML(typ="safe").load(ROOT / "packages.yaml")
PINNED = pins(ROOT / "requirements.lock") | pins(ROOT / "requirements-nodeps.lock")


@pytest.mark.parametrize("package", TRACKED)
def test_a_tracked_package_has_the_locked_version(package: str) -> None:
    assert package in PINNED, f"{package} is in packages.yaml but in neither lock file, spelt exactly so"
    assert TRACKED[package] == PINNED[package]


@pytest.mark.parametrize("package", TRACKED)
def test_a_tracked_package_is_installed_at_the_tracked_version(package: str) -> None:
    public_version, _, _build = metadata.version(package).partition("+")
    assert public_version == TRACKED[package]


def test_versions_are_strings_so_that_yaml_cannot_round_them() -> None:
    assert all(isinstance(version, str) for version in TRACKED.values())


def test_no_tracked_name_holds_a_dot_which_dvc_would_read_as_a_path() -> None:
    assert not [package for package in TRACKED if "." in package]


LOCKS = sorted(ROOT.glob("requirements*.lock"))
PIN = re.compile(r"^([\w.-]+)==(=?[\w.+]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def pinned_here(lock: str) -> list[tuple[str, str]]:
    """The (package, version) of each pin that a lock itself holds; of `===` one equals sign stays before the version."""
    return [(name, version) for name, version, _ in PIN.findall((ROOT / lock).read_text())]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_line_of_a_lock_is_a_comment_another_lock_or_a_pin_with_its_hashes(lock: Path) -> None:
    rest = PIN.sub("", lock.read_text()).splitlines()
    assert not [line for line in rest if line and not line.startswith(("#", "-r "))]
    assert pins(lock).keys() >= dict(pinned_here(lock.name)).keys() != set()


def test_no_package_is_pinned_twice() -> None:
    names = [name for part in ("-build", "", "-nodeps") for name, _ in pinned_here(f"requirements{part}.lock")]
    assert len(names) == len(set(names)) == len(PINNED)


def test_the_cpu_lock_is_the_cpu_build_of_the_locked_torch() -> None:
    assert pinned_here("requirements-cpu.lock") == [("torch", f"{PINNED['torch']}+cpu")]


def test_the_cuda_lock_is_the_other_one_and_what_cuda_adds() -> None:
    both = pins(ROOT / "requirements.lock")
    added = dict(pinned_here("requirements-cuda.lock"))
    assert added.pop("torch") == f"={both['torch']}"  # === refuses the CPU build, 2.13.0+cpu
    assert not added.keys() & both.keys()
    assert pins(ROOT / "requirements-cuda.lock") == both | added


def test_the_cuda_lock_pins_one_cuda_for_torch_and_its_libraries() -> None:
    added = pins(ROOT / "requirements-cuda.lock").items() - pins(ROOT / "requirements.lock").items()
    majors = {name[-2:] for name, _ in added if "-cu" in name and name[-2:].isdigit()}
    toolkit = dict(added)["cuda-toolkit"].split(".")[0]
    assert majors == {toolkit}
    assert toolkit in DRIVERS
