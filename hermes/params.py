"""The one reader of params.yaml: from YAML to the typed object that a stage defines for itself.

A stage's parameters are a `Params` subclass. A plain field names a key of the top level (`seed`, `beta`, ...), one that
is a `Settings` names a section of the selected profile (`train` means `profiles.<profile>.train`), so that the class is
also the list of what dvc.yaml has to track for the stage; a test compares the two. The file is read as YAML 1.2, in
which `1e-6` is a number.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hermes.console import UserError

PARAMS, PIPELINE = Path("params.yaml"), Path("dvc.yaml")
UNTRACKED = {"profile", "profiles", "collect", "wandb"}  # top-level keys that shape no stage's output by themselves


class Settings(BaseModel):
    """A mapping of params.yaml: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Params(Settings):
    """All that one stage may know: fields are top-level keys or sections of the profile (module docstring)."""


P = TypeVar("P", bound=Params)


def load(params: type[P], path: Path = PARAMS) -> P:
    """Reads and validates the parameters of one stage.

    Raises:
        UserError: not YAML, an unknown profile or key, a missing key, or a value that is not allowed; names key and value.
    """
    tree = read_yaml(path)
    profile = selected_profile(tree, path)
    reject_unknown_keys(tree, path)
    sections = tree["profiles"][profile]
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    for name, field in params.model_fields.items():
        is_section = (
            isinstance(field.annotation, type) and issubclass(field.annotation, Settings) and name not in UNTRACKED
        )
        where[name] = f"profiles.{profile}.{name}" if is_section else name
        source = sections if is_section else tree
        if name not in source:
            raise UserError(f"{path}: key `{where[name]}` is missing")
        values[name] = source[name]
    try:
        return params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_explain(detail, where, params) for detail in error.errors())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML 1.2 mapping as plain Python values.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run this from the root of the repository")
    try:
        tree = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def selected_profile(tree: dict[str, Any], path: Path = PARAMS) -> str:
    """The name of the profile that params.yaml selects.

    Raises:
        UserError: there is no such profile.
    """
    profile, profiles = tree.get("profile"), tree.get("profiles")
    if not isinstance(profiles, dict) or not all(isinstance(body, dict) for body in profiles.values()):
        raise UserError(f"{path}: `profiles` must map each profile's name to its sections")
    if not isinstance(profile, str) or profile not in profiles:
        raise UserError(
            f"{path}: `profile: {profile}` names no entry of `profiles`; choose one of {', '.join(sorted(profiles))}"
        )
    return profile


def reject_unknown_keys(tree: dict[str, Any], path: Path = PARAMS, pipeline: Path = PIPELINE) -> None:
    """Refuses a key that no stage of dvc.yaml tracks: a misspelt one would silently do nothing.

    Raises:
        UserError: an unknown key at the top level or in a profile; names the key and those allowed.
    """
    tracked = {
        entry
        for stage in read_yaml(pipeline)["stages"].values()
        for entry in stage.get("params", [])
        if isinstance(entry, str)
    }
    sections = {entry.rsplit(".", 1)[1] for entry in tracked if entry.startswith("profiles.")}
    top = {entry for entry in tracked if not entry.startswith("profiles.")} | UNTRACKED
    places = [("", tree, top), *((f"profiles.{name}.", body, sections) for name, body in tree["profiles"].items())]
    for prefix, body, allowed in places:
        for key in body:
            if key not in allowed:
                raise UserError(f"{path}: unknown key `{prefix}{key}`; allowed there: {', '.join(sorted(allowed))}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys, in the order of the file."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _explain(detail: Any, where: dict[str, str], params: type[Params]) -> str:
    first, *rest = detail["loc"] or ("?",)
    key = ".".join([where.get(str(first), str(first)), *map(str, rest)])
    if detail["type"] == "extra_forbidden":
        allowed: Any = params
        for name in detail["loc"][:-1]:
            allowed = allowed.model_fields[name].annotation
        return f"unknown key `{key}`; allowed there: {', '.join(sorted(allowed.model_fields))}"
    if detail["type"] == "missing":
        return f"key `{key}` is missing"
    return f"`{key}` is {detail['input']!r}: {detail['msg'].removeprefix('Value error, ')}"
