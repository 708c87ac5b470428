"""packages.yaml, the two lock files and the installed packages name the same versions."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.doctor import pins

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
