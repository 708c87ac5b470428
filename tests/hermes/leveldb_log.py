"""The records of a LevelDB-style log, which an offline run of wandb is: blocks of 32 KiB, a seven-byte header before every part."""

from collections.abc import Iterator

BLOCK, HEADER, BEGINNING = 32768, 7, 7  # the file begins with a header of its own
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_log(data: bytes) -> Iterator[bytes]:
    """The whole records of a log, their parts joined; what a writer left unfinished at the end is not among them."""
    place, parts = BEGINNING, b""
    while place + HEADER <= len(data):
        room = BLOCK - place % BLOCK
        if room < HEADER:
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        part = data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield parts
