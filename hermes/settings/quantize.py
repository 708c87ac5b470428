"""Section `quantize`: which GGUF files are made."""

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from hermes.params import Settings, each_once

# By how many weights of a row share a scale, and each by size. llama.cpp takes another type for a row that blocks of 256 do not divide.
Blocks32 = Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0"]
Blocks256 = Literal[
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q4_K_M",
    "Q4_K_S",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "IQ3_M",
    "Q3_K_S",
    "IQ3_XXS",
    "Q2_K",
    "IQ2_M",
]
GgufType = Literal[Blocks32, Blocks256]
LADDERS: dict[bool, tuple[GgufType, ...]] = {  # by whether most weights stand in rows that blocks of 256 divide
    True: ("Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M"),
    False: ("Q8_0", "Q5_0", "IQ4_NL"),
}
# llama.cpp refuses to round to so few bits without an importance matrix.
WEIGHED = frozenset({"IQ3_XXS", "IQ2_M"})


class QuantizeSettings(Settings):
    """Which GGUF files are made beside f16."""

    types: Literal["ladder"] | Annotated[list[GgufType], Field()]
    imatrix: bool

    @field_validator("types")
    @classmethod
    def _types_once(cls, types: str | list[GgufType]) -> str | list[GgufType]:
        return types if isinstance(types, str) else each_once(types)

    @model_validator(mode="after")
    def _can_be_rounded(self) -> "QuantizeSettings":
        if not self.imatrix and (weighed := WEIGHED.intersection(self.types)):
            raise ValueError(f"{min(weighed)} is rounded by an importance matrix alone; set `quantize.imatrix: true`")
        return self

    def named(self, divides: bool) -> tuple[GgufType, ...]:
        """The types by name; `divides` says whether blocks of 256 divide the rows of most weights (hermes/model/gguf_files.py)."""
        return LADDERS[divides] if isinstance(self.types, str) else tuple(self.types)


GGUF_TYPES: tuple[GgufType, ...] = get_args(Blocks32) + get_args(Blocks256)
