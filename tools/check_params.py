"""All of params.yaml checked at once, and its JSON schema, from which editors complete and explain keys.

    python -m tools.check_params                    of the selected profile
    python -m tools.check_params --profile a40
    python -m tools.check_params --schema           writes params.schema.json; the first line of params.yaml names it

The schema is made of the typed settings (hermes/settings), and of the comments that stand above the keys of the first profile. What several
keys only get wrong together is no part of a schema; a run refuses that.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from hermes.artifacts import write_json
from hermes.params import PARAMS
from hermes.run import run
from hermes.settings import experiment
from hermes.settings.experiment import Experiment

SCHEMA = Path("params.schema.json")
LINE = re.compile(r"( *)(?:# ?(?P<comment>.*)|(?P<key>\w+):.*)")


def comments(text: str) -> dict[tuple[str, ...], str]:
    """The comment directly above each key, by the names of the key and of those around it."""
    found: dict[tuple[str, ...], str] = {}
    around: list[str] = []
    above: list[str] = []
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match and match["key"]:
            around = [*around[: len(match[1]) // 2], match["key"]]
            found[tuple(around)] = " ".join(above)
        above = [*above, match["comment"]] if match and match["comment"] else []
    return found


def schema(path: Path = PARAMS) -> dict[str, Any]:
    """The JSON schema of params.yaml; each key is described by its comment."""
    made = Experiment.model_json_schema()
    for keys, comment in comments(path.read_text()).items():
        names = ("profile", *keys[2:]) if keys[0] == "profiles" else keys
        holder: dict[str, Any] | None = made
        for name in names[:-1]:
            reference = holder["properties"].get(name, {}).get("$ref", "") if holder else ""
            holder = made["$defs"].get(reference.rpartition("/")[2])
        if comment and holder and names[-1] in holder["properties"]:
            holder["properties"][names[-1]].setdefault("description", comment)
    profile = {"$ref": made["properties"]["profile"]["$ref"]}
    made["properties"]["profiles"] = {"type": "object", "additionalProperties": profile}
    made["properties"]["profile"] = {
        "type": "string",
        "description": made["properties"]["profile"].get("description", ""),
    }
    return made | {"title": "The parameters of hermes-dpo", "required": [*made["required"], "profiles"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.check_params", description="Check all of params.yaml.")
    parser.add_argument("--profile", metavar="NAME", help="an entry of `profiles`; the selected one by default")
    parser.add_argument("--schema", action="store_true", help=f"write {SCHEMA}")
    given = parser.parse_args()
    experiment.check(profile=given.profile)
    if given.schema:
        write_json(SCHEMA, schema())


if __name__ == "__main__":
    run("check-params", main)
