"""Folders of data and models that a profile names (`source: ./my-data`): what has changed in them since they were read.

DVC does not watch them, since a path in dvc.yaml cannot depend on the profile. So fetch_data and fetch_model note the hashes of what they
read, and before DVC starts these are compared with the folders as they are. One that is not here has nothing to say.
"""

from functools import partial
from pathlib import Path
from typing import IO, Any

from hermes.artifacts import MANIFEST, read_object
from hermes.console import UserError, say
from hermes.settings import experiment
from hermes.settings.sources import is_folder
from tools.dvc_runs import DVC, Relay


def is_here(source: str) -> bool:
    """Whether a source is a folder that is here, other than the embedded data, which DVC watches."""
    return source != "embedded" and is_folder(source) and Path(source).is_dir()


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a stage noted; nothing where its output is not here."""
    return read_object(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}


def changed() -> list[str]:
    """The stages whose output is not of their folder as it is now; reads the folders, about a second a gigabyte.

    One without its output is among them, since DVC would bring an earlier one back.
    """
    try:
        profile = experiment.check().profile
    except UserError:  # which the first stage says
        return []
    data, model = [profile.data, *profile.data.mixed_with], profile.model
    if not any(map(is_here, [model.source, *(part.source for part in data)])):
        return []
    from stages import fetch_data, fetch_model  # which take seconds to import

    raw = manifest_of(fetch_data.RAW)
    noted_of = [raw, *raw.get("mixed_with", []), *({} for _ in data)]  # none of a source that was not read
    read = [
        ("fetch_data", part.source, noted, partial(fetch_data.source_files, Path(part.source), part))
        for part, noted in zip(data, noted_of, strict=False)
    ]
    noted = manifest_of(fetch_model.BASE)
    read.append(("fetch_model", model.source, noted, partial(fetch_model.source_files, Path(model.source))))
    other = {
        stage
        for stage, source, noted, files in read
        if is_here(source) and (noted.get("source"), noted.get("source_files")) != (source, files())
    }
    return sorted(other)


def fetch_changed(relay: Relay, lock: IO[str], *options: str) -> int:
    """Runs the stages whose folder has changed; the exit code of the first that fails."""
    for stage in changed():
        say(f"{stage}: its folder is to be read as it is now")
        if code := relay.run([*DVC, "repro", "--force", "--single-item", *options, stage], lock):
            return code
    return 0


def refuse_changed() -> None:
    """Refuses, by a UserError, to go on from what a folder held before."""
    if stages := changed():
        raise UserError(f"{stages[0]} has not read its folder as it is now; run `make repro` first")
