"""Section `quantize`: which GGUF files are made."""

from typing import Literal

from pydantic import field_validator

from hermes.params import Settings, each_once

GgufType = Literal["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"]


class QuantizeSettings(Settings):
    """Which GGUF files are made beside f16."""

    types: list[GgufType]

    _types_once = field_validator("types")(each_once)
