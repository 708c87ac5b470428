"""A profile selected in params.yaml for the length of one run, and the file put back afterwards."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode

from hermes.artifacts import complete_file
from hermes.console import UserError
from hermes.params import PARAMS, read_yaml
from tools.dvc_runs import SCRATCH

BEFORE = SCRATCH / "profile.before"  # as params.yaml had it


def write_params(source: Path, target: Path, profile: str, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Copies params.yaml with this profile selected and these keys of it changed."""
    yaml = YAML(pure=True)
    tree = yaml.load(source)
    tree["profile"] = profile
    for section, values in changes.items():
        tree["profiles"][profile][section].update(values)
    with complete_file(target) as temporary:
        yaml.dump(tree, temporary)


def with_key(text: str, name: str, value: str) -> tuple[str, str]:
    """`text`, a params.yaml, with `value` written at this top-level key and every other character as it was; and what stood there."""
    root = YAML(pure=True).compose(text)
    for key, node in root.value if isinstance(root, MappingNode) else []:
        if key.value == name:
            start, end = node.start_mark.index, node.end_mark.index
            return text[:start] + value + text[end:], text[start:end]
    raise UserError(f"{PARAMS}: key `{name}` is missing")


def with_profile(text: str, value: str) -> tuple[str, str]:
    """The same at `profile`."""
    return with_key(text, "profile", value)


def put_back() -> bool:
    """Undoes `selected`, in this process or in one that was killed, and no edit made since then; whether there was anything to undo."""
    if not BEFORE.exists():
        return False
    current = PARAMS.read_bytes().decode()
    restored, _ = with_profile(current, BEFORE.read_text())
    if restored != current:
        replace(PARAMS, restored)
    BEFORE.unlink()
    return restored != current


def replace(path: Path, text: str) -> None:
    """Replaces a file by rename, its permissions kept, so that a kill leaves the old or the new one."""
    with complete_file(path) as temporary:
        temporary.write_bytes(text.encode())
        if path.exists():
            temporary.chmod(path.stat().st_mode)


@contextmanager
def selected(name: str | None) -> Iterator[None]:
    """Selects a profile in params.yaml for the length of the block; None leaves the file alone."""
    tree = read_yaml(PARAMS)
    profiles = tree.get("profiles") or {}
    if name is not None and name not in profiles:
        raise UserError(
            f"--profile {name}: no such profile in {PARAMS}; choose one of {', '.join(sorted(map(str, profiles)))}"
        )
    if name in (None, tree.get("profile")):
        yield
        return
    text, before = with_profile(PARAMS.read_bytes().decode(), json.dumps(name))
    replace(BEFORE, before)
    try:
        replace(PARAMS, text)
        yield
    finally:
        put_back()
