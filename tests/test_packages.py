"""packages.yaml, the lock files and the installed packages name the same versions."""

from __future__ import annotations

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


def test_no_package_is_pinned_twice() -> None:
    locks = [pins(ROOT / "requirements.lock"), pins(ROOT / "requirements-nodeps.lock")]
    lines = [line for name in ("requirements.lock", "requirements-nodeps.lock") for line in _pin_lines(ROOT / name)]
    assert len(lines) == len(locks[0] | locks[1])


def _pin_lines(lock: Path) -> list[str]:
    return [line for line in lock.read_text().splitlines() if line.strip() and not line.startswith("#")]


def test_the_cuda_lock_is_the_other_one_and_what_cuda_adds() -> None:
    lines = _pin_lines(ROOT / "requirements-cuda.lock")
    assert lines[0] == "-r requirements.lock"
    both = pins(ROOT / "requirements.lock")
    added = dict(line.split("==", 1) for line in lines[1:])
    assert added.pop("torch") == f"={both['torch']}"  # === refuses the CPU build, 2.13.0+cpu
    assert not added.keys() & both.keys()
    assert pins(ROOT / "requirements-cuda.lock") == both | added


def test_the_cuda_lock_pins_one_cuda_for_torch_and_its_libraries() -> None:
    added = pins(ROOT / "requirements-cuda.lock").items() - pins(ROOT / "requirements.lock").items()
    majors = {name[-2:] for name, _ in added if "-cu" in name and name[-2:].isdigit()}
    toolkit = dict(added)["cuda-toolkit"].split(".")[0]
    assert majors == {toolkit}
    assert toolkit in DRIVERS
