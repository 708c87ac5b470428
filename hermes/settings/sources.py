"""Where a model or a data set comes from: embedded here, a folder, or a repository of the Hub at one commit."""

import re


def is_folder(source: str) -> bool:
    """Whether a source is here, embedded or a folder, rather than owner/name on the Hub."""
    return source == "embedded" or source.startswith((".", "/"))


def check_source(source: str, revision: str | None) -> None:
    """Refuses a source that is no place, and a revision that does not pin it.

    Raises:
        ValueError: says which of the two, and what is allowed.
    """
    if is_folder(source):
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, and {source} is no Hub repository; set it to null")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"`source` is {source!r}; write embedded, a folder such as ./mine, or owner/name on the Hub")
    elif not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ValueError(f"`revision` is {revision!r}; pin the full 40-digit commit of {source}")
