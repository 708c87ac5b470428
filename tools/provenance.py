"""Where the results in reports/ come from: reports/provenance.json and provenance.md, which `make repro` writes.

They hold what may differ between two equal runs, such as the clock, the machine and the commit. So no stage writes or reads them, and DVC
does not hash them. A run that ends with the committed bits leaves those of the run that made these first.
"""

import json
import sys
from pathlib import Path
from typing import Any

from hermes.artifacts import read_json, write_json
from hermes.pages.render import render
from hermes.params import PARAMS, flatten, read_yaml, selected_profile
from hermes.run import TIMINGS
from tools import doctor, machine, verify

PROVENANCE = Path("reports/provenance.json")
MANIFESTS = {"data": Path("data/raw/manifest.json"), "model": Path("models/base/manifest.json")}


def origin(path: Path) -> dict[str, Any] | None:
    """The source and the revision that a manifest names; None where it is not here."""
    if not path.is_file():
        return None
    manifest = read_json(path)
    return {name: manifest.get(name) for name in ("source", "revision")}


def collect(root: Path, command: list[str]) -> dict[str, Any]:
    """All that is known of the run whose results lie in a checkout."""
    tree = read_yaml(root / PARAMS)
    profile = selected_profile(tree)
    timings = [json.loads(path.read_text()) for path in sorted((root / TIMINGS).glob("*.json"))]
    outs = verify.outs((root / verify.LOCK).read_text())
    return {
        "command": command,
        "commit": (doctor.git(root, "rev-parse", "HEAD") or "").strip() or None,
        "changed_files": [line[3:] for line in (doctor.git(root, "status", "--porcelain") or "").splitlines()],
        "profile": profile,
        "params": flatten(
            {name: value for name, value in tree.items() if name != "profiles"} | tree["profiles"][profile]
        ),
        "origins": {name: origin(root / path) for name, path in MANIFESTS.items()},
        "hashes": {path: md5 for paths in outs.values() for path, md5 in paths.items()},
        "machine": {name: value for name, value in machine.facts().items() if name != "packages"},
        "packages": machine.packages(),
        "stages": {
            entry["stage"]: {
                "minutes": round(entry["seconds"] / 60, 1),
                **{key: entry[key] for key in ("started", "commit")},
            }
            for entry in sorted(timings, key=lambda entry: entry["started"])
            if entry["stage"] in outs
        },
    }


def write(command: list[str], root: Path = Path()) -> None:
    """Writes both files."""
    found = collect(root, command)
    write_json(root / PROVENANCE, found)
    render("provenance.md.j2", root / PROVENANCE.with_suffix(".md"), found)


if __name__ == "__main__":
    write(sys.argv)
