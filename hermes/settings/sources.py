"""Where a model or a data set comes from: embedded here, a folder, or a repository of the Hub at one commit."""

import re

LONGEST = 255  # bytes of a file's name


def is_folder(source: str) -> bool:
    """Whether a source is here, embedded or a folder, rather than owner/name on the Hub."""
    return source == "embedded" or source.startswith((".", "/"))


def check_source(source: str, revision: str | None) -> None:
    """Refuses a source that is no place, and a revision that does not pin it.

    Raises:
        ValueError: says which of the two, and what is allowed.
    """
    if "\0" in source or max(len(part.encode()) for part in source.split("/")) > LONGEST:
        raise ValueError(f"`source` is {source[:40]!r}...; no file can have such a name")
    if is_folder(source):
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, and {source} is no Hub repository; set it to null")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"`source` is {source!r}; write embedded, owner/name, or a folder that begins with ./ or /")
    elif not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ValueError(f"`revision` is {revision!r}; pin the full 40-digit commit of {source}")
