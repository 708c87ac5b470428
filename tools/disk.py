"""The disk of a checkout: what its outputs hold, and whether there is room for more. Only the standard library, for the doctor."""

import shutil
from pathlib import Path

MEND = "free some, or drop what no commit or experiment names: .venv/bin/dvc gc -A --all-experiments"


def held(root: Path) -> int:
    """Bytes of the files in models/, data/ and DVC's cache, each once, whatever number of names DVC's links give it."""
    paths = (path for folder in ("models", "data", ".dvc/cache") for path in (root / folder).rglob("*"))
    files = (path.stat() for path in paths if path.is_file())
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


def room(root: Path, needed: float) -> tuple[str, str]:
    """How much is free, and what to do where so many bytes do not fit; that is empty where they do."""
    free = shutil.disk_usage(root).free
    found = f"{free / 2**30:.0f} GB free in {root}"
    return (found, "") if free >= needed else (f"{found}, {needed / 2**30:.0f} are needed", MEND)
