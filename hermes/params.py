"""The one reader of params.yaml: from YAML to the typed object that a stage defines for itself.

A stage's parameters are a `Params` subclass. A plain field names a key of the top level, such as `seed`. One that is a `Settings` names a
section of the selected profile: `train` means `profiles.<profile>.train`. So the class is also the list of what dvc.yaml has to track for
the stage; a test compares the two. The file is read as YAML 1.2, in which `1e-6` is a number.
"""

import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hermes.console import UserError

PARAMS, PIPELINE = Path("params.yaml"), Path("dvc.yaml")
SHOWN = 120  # characters of a value that a message quotes
NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
DIGITS = re.compile(r"\d{4301}")  # more than Python makes a number of
UNTRACKED = {"profile", "profiles", "collect", "wandb"}  # top-level keys that shape no stage's output by themselves


class Settings(BaseModel):
    """A mapping of params.yaml: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a character") from None
        return value


class Params(Settings):
    """All that one stage may know: fields are top-level keys or sections of the profile (module docstring)."""


S = TypeVar("S", bound=Settings)
P = TypeVar("P", bound=Params)


def each_once(values: list[Any]) -> list[Any]:
    """A list as it is.

    Raises:
        ValueError: something is in it twice.
    """
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is in it twice; name it once")
    return values


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
    for name in params.model_fields:
        is_section = is_settings(params, name) and name not in UNTRACKED
        where[name] = f"profiles.{profile}.{name}" if is_section else name
        source = sections if is_section else tree
        if name not in source:
            raise UserError(f"{path}: key `{where[name]}` is missing")
        values[name] = source[name]
    return validated(params, values, where, path)


def is_settings(settings: type[Settings], name: str) -> bool:
    """Whether a field holds settings of its own."""
    annotation = settings.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def validated(settings: type[S], values: Mapping[str, Any], where: Mapping[str, str], path: Path = PARAMS) -> S:
    """Values as the typed object; `where` says how params.yaml calls each field.

    Raises:
        UserError: all that is wrong with them, in one line.
    """
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_explain(error.errors(), where, settings))}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML 1.2 mapping as plain Python values.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run this from the root of the repository")
    try:
        tree = YAML(typ="safe", pure=True).load(path)
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if long := next(
            (
                n
                for n, line in enumerate(path.read_bytes().splitlines(), 1)
                if DIGITS.search(line.replace(b"_", b"").decode(errors="replace"))
            ),
            0,
        ):
            raise UserError(f"{path}, line {long}: a number of more than 4,300 digits") from None
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def selected_profile(tree: dict[str, Any], path: Path = PARAMS) -> str:
    """The name of the profile that params.yaml selects.

    Raises:
        UserError: there is no such profile, or one has a name that is no plain word.
    """
    profile, profiles = tree.get("profile"), tree.get("profiles")
    if not isinstance(profiles, dict) or not all(isinstance(body, dict) for body in profiles.values()):
        raise UserError(f"{path}: `profiles` must map each profile's name to its sections")
    for name in profiles:  # it stands in pages, files and commands
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{path}: the profile {str(name)[:SHOWN]!r} has a name that is no text (write it in quotes), or has other characters than "
                "letters, digits, `_`, `-` and `.`"
            )
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
    stages = read_yaml(pipeline).get("stages")
    if not isinstance(stages, dict) or not all(
        isinstance(stage, dict) and isinstance(stage.get("params", []), list) for stage in stages.values()
    ):
        raise UserError(
            f"{pipeline}: `stages` must map each stage to its keys, and its `params` be a list; see `git diff {pipeline}`"
        )
    tracked = {entry for stage in stages.values() for entry in stage.get("params", []) if isinstance(entry, str)}
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


def _explain(details: Sequence[Any], where: Mapping[str, str], settings: type[Settings]) -> list[str]:
    """One sentence for each key; where a key may hold one of several types, what each of them says."""
    found: dict[str, list[str]] = {}
    for detail in details:
        parts, holder = _keys(detail["loc"], settings)
        first, *rest = parts or ["?"]
        key = ".".join([where.get(first, first), *rest])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden" and holder is not None:
            found[f"unknown key `{key}`; allowed there: {', '.join(sorted(holder.model_fields))}"] = []
        elif detail["type"] == "missing":
            found[f"key `{key}` is missing"] = []
        elif not parts or (isinstance(detail["input"], dict) and detail["type"] == "value_error"):
            found[f"`{key}`: {message}" if parts else message] = []
        else:
            found.setdefault(f"`{key}` is {_shown(detail['input'])}: ", []).append(message)
    return [start + " or ".join(dict.fromkeys(messages)) for start, messages in found.items()]


def _keys(loc: Sequence[Any], settings: type[Settings]) -> tuple[list[str], type[Settings] | None]:
    """The keys of a place in the file, without the names of types that pydantic puts between; and the settings that hold the last."""
    keys: list[str] = []
    holder: Any = settings
    inside: Any = settings
    for part in loc:
        if isinstance(inside, type) and issubclass(inside, Settings):
            holder, keys = inside, [*keys, str(part)]
            inside = inside.model_fields[part].annotation if part in inside.model_fields else None
            if get_origin(inside) in (Union, types.UnionType):
                inside = next((a for a in get_args(inside) if isinstance(a, type) and issubclass(a, Settings)), inside)
        elif isinstance(part, int) or get_origin(inside) is dict:
            keys.append(str(part))
            inside = get_args(inside)[-1] if get_args(inside) else None
    return keys, holder


def _shown(value: Any) -> str:
    """A value as a message quotes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # of a number with more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
