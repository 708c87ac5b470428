"""Section `compress`: which methods round the weights to 4 bits, and in which groups."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from hermes.params import Settings, each_once
from hermes.settings.base import Count, Threads

Method = Literal["gptq", "awq"]


class CompressSettings(Settings):
    """Which folders of 4-bit weights are made, and how."""

    methods: list[Method]
    group_size: Annotated[int, Field(ge=16, le=1024)] | None
    awq_pairs: Count
    threads: Threads

    _each_once = field_validator("methods")(each_once)
