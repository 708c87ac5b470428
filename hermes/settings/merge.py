"""Section `merge`: what the adapter is merged onto, and how the merged weights are stored."""

from typing import Literal

from pydantic import field_validator

from hermes.params import Settings

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as 200MB or 5GB.

    Raises:
        ValueError: it is not one.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in UNITS or not (number.isascii() and number.isdecimal()) or len(number) > 18 or not int(number):
        raise ValueError("write it like 200MB or 5GB")
    return int(number) * UNITS[unit]


class MergeSettings(Settings):
    """What the adapter is merged onto, and how the merged weights are stored."""

    base: Literal["bf16", "nf4"]
    max_shard_size: str

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, text: str) -> str:
        parse_size(text)
        return text
