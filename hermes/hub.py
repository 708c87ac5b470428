"""Files of a Hub repository at one commit: resumed where an earlier download stopped, and checked against the Hub's own hashes.

A file arrives in `.scratch/hub`, under repository and commit, where a later run continues it. The stage moves it from there to its place,
so that there is no second copy. HF_TOKEN opens gated repositories, HF_ENDPOINT names another Hub.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub import HfApi, RepoFile, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from hermes.artifacts import scratch_folder
from hermes.console import UserError
from hermes.shortage import lack

Kind = Literal["dataset", "model"]
CONNECTIONS = 4
ERRORS = (OSError, ValueError, HTTPError)  # what the libraries raise when the Hub cannot give something


def failure(error: Exception, source: str, revision: str) -> UserError:
    """Why the Hub did not give something, in one line, and what to do.

    Raises:
        Exception: the error itself, where it is this machine that lacks something.
    """
    if lack(error):
        raise error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError | OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, GatedRepoError):
        mend = "it is gated: accept its licence on its page, and set HF_TOKEN to a token of that account"
    elif isinstance(cause, RevisionNotFoundError):
        mend = "the Hub knows no such commit of it; see its history"
    elif isinstance(cause, RepositoryNotFoundError):
        mend = "the Hub shows no such repository; check the name, and HF_TOKEN if it is private"
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        mend = f"cannot be fetched from the Hub ({lines[0]}); check the name, the network and HF_TOKEN"
    return UserError(f"{source}@{revision}: {mend}")


def list_files(source: str, revision: str, kind: Kind) -> list[RepoFile]:
    """All files of a repository at a commit, with their sizes and hashes.

    Raises:
        UserError: the Hub cannot give it, says why; or it lists a file outside of it.
    """
    try:
        tree = HfApi().list_repo_tree(source, revision=revision, repo_type=kind, recursive=True)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
    except ERRORS as error:
        raise failure(error, source, revision) from None
    for file in files:
        if not stays_inside(file.path):
            raise UserError(f"{source}@{revision}: lists {file.path!r}, which is no file of its folder; choose another")
    return files


def stays_inside(path: str) -> bool:
    """Whether a path that others name lies in the folder that it is joined to."""
    parts = PurePosixPath(path)
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and "\0" not in path


def why_closed(source: str, kind: Kind) -> Exception | None:
    """Why the Hub does not let this user read a repository, if that is what it says; `datasets` keeps it to itself."""
    try:
        HfApi().auth_check(source, repo_type=kind)
    except ERRORS as error:
        return error
    return None


def fetch_file(source: str, revision: str, kind: Kind, file: RepoFile, target: Path) -> None:
    """Downloads one file, on from the bytes that an earlier try left in its `.partial`; cut connections are tried again while bytes come.

    `snapshot_download` begins a file anew in every process and after every reset connection, and a shard of 5 GB is many minutes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    url = hf_hub_url(source, file.path, repo_type=kind, revision=revision)
    while not target.is_file():
        size = partial.stat().st_size if partial.is_file() else 0
        try:
            with partial.open("ab" if size < file.size else "wb") as out:
                http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file.size)
            partial.replace(target)
        except HTTPError:
            if partial.stat().st_size <= size:
                raise


def download(source: str, revision: str, kind: Kind, files: Sequence[RepoFile]) -> Path:
    """Brings these files of a repository into the scratch folder, each checked; returns the folder.

    Raises:
        UserError: the Hub cannot give one, or gave other bytes than it lists; those are removed.
    """
    folder = scratch_folder("hub") / f"{kind}s--{source.replace('/', '--')}" / revision
    try:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda file: fetch_file(source, revision, kind, file, folder / file.path), files))
        found = HfApi().verify_repo_checksums(source, repo_type=kind, revision=revision, local_dir=folder)
    except ERRORS as error:
        raise failure(error, source, revision) from None
    for damaged in found.mismatches:
        (folder / damaged["path"]).unlink()
    if found.mismatches:
        names = ", ".join(damaged["path"] for damaged in found.mismatches)
        raise UserError(
            f"{source}@{revision}: {names} arrived with another hash than the Hub lists; it is removed, run this again"
        )
    return folder


def forget(folder: Path) -> None:
    """Removes what is left of a download."""
    shutil.rmtree(folder, ignore_errors=True)
