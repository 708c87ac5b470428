"""A profile selected in params.yaml for the length of one run, and the file put back afterwards."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode

from hermes import params
from hermes.artifacts import complete_file
from hermes.console import UserError
from tools.dvc_runs import SCRATCH

BEFORE = SCRATCH / "params.yaml.before"


def write_params(source: Path, target: Path, profile: str, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Copies params.yaml with this profile selected and these keys of it changed."""
    yaml = YAML(pure=True)
    tree = yaml.load(source)
    tree["profile"] = profile
    for section, values in changes.items():
        tree["profiles"][profile][section].update(values)
    with complete_file(target) as temporary:
        yaml.dump(tree, temporary)


def with_profile(text: str, name: str) -> str:
    """`text`, a params.yaml, with `name` as the value of its top-level `profile` and every other character as it was.

    Raises:
        UserError: there is no such key.
    """
    root = YAML(pure=True).compose(text)
    for key, value in root.value if isinstance(root, MappingNode) else []:
        if key.value == "profile":
            return text[: value.start_mark.index] + json.dumps(name) + text[value.end_mark.index :]
    raise UserError(f"{params.PARAMS}: key `profile` is missing")


def check_profile(name: str, path: Path = params.PARAMS) -> None:
    """Refuses a profile that params.yaml does not have.

    Raises:
        UserError: names those allowed.
    """
    profiles = params.read_yaml(path).get("profiles") or {}
    if name not in profiles:
        raise UserError(f"--profile {name}: no such profile in {path}; choose one of {', '.join(sorted(profiles))}")


def put_back(path: Path = params.PARAMS, before: Path = BEFORE) -> bool:
    """Undoes `selected`, in this process or in one that was killed; whether there was anything to undo.

    An edit made in the meantime stays: then only the profile is put back, and it says so.
    """
    if not before.exists():
        return False
    original, current = before.read_bytes(), path.read_bytes()
    name = params.selected_profile(params.read_yaml(before), before)
    restored = with_profile(current.decode(), name).encode()
    if restored == with_profile(original.decode(), name).encode():
        restored = original
    elif params.read_yaml(path).get("profile") != name:
        print(f"repro: {path} was edited during the run; only its profile is put back to {name}", file=sys.stderr)
    else:
        restored = current
    if restored != current:
        write_bytes(path, restored)
    before.unlink()
    return restored != current


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file by rename, its permissions kept, so that a kill leaves the old or the new one."""
    with complete_file(path) as temporary:
        temporary.write_bytes(content)
        if path.exists():
            temporary.chmod(path.stat().st_mode)


@contextmanager
def selected(name: str | None, path: Path = params.PARAMS, before: Path = BEFORE) -> Iterator[None]:
    """Selects a profile in params.yaml for the length of the block; None leaves the file alone."""
    if name is None or params.read_yaml(path).get("profile") == name:
        yield
        return
    original = path.read_bytes()
    write_bytes(before, original)
    try:
        write_bytes(path, with_profile(original.decode(), name).encode())
        yield
    finally:
        put_back(path, before)
