"""Section `base`: how the frozen base is held in memory."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hermes.params import Settings

Count = Annotated[int, Field(gt=0, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Threads = Annotated[int, Field(ge=1, le=1024)]


class BaseSettings(Settings):
    """How the frozen base is held in memory, by reference and training alike."""

    quantization: Literal["nf4", "none"]
    double_quantization: bool
    keep_dequantized: bool
    dtype: Literal["bfloat16", "float32"]
    threads: Threads

    @model_validator(mode="after")
    def _has_something_to_keep(self) -> "BaseSettings":
        if self.quantization == "none" and self.keep_dequantized:
            raise ValueError("`keep_dequantized: true` goes with `quantization: nf4`; set it to false")
        return self
