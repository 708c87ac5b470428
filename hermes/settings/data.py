"""Section `data`: where the preference pairs come from, and how they are laid out there."""

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from hermes.params import Settings
from hermes.settings.sources import check_source, is_folder

Format = Literal["plain", "chatml", "messages"]
Split = Literal["train", "validation", "test"]


class Columns(Settings):
    """The names of a source's columns.

    Attributes:
        question: what is asked; None where the answers are whole conversations.
        chosen: the better answer.
        rejected: the other one.
        score: how much better, or two columns, the scores of chosen and rejected; None where nobody says.
        system: a system prompt; None without one.
    """

    question: str | None
    chosen: str
    rejected: str
    score: str | Annotated[list[str], Field(min_length=2, max_length=2)] | None
    system: str | None

    def used(self) -> list[str]:
        """Those that are read, in order."""
        scores = [self.score] if isinstance(self.score, str) else self.score or []
        return [name for name in (self.question, self.chosen, self.rejected, *scores, self.system) if name]

    def are_standard(self, layout: Format) -> bool:
        """Whether a table of this layout is one that the stages read as it is."""
        standard = {"question": "question", "chosen": "chosen", "rejected": "rejected", "score": "delta_score"}
        return layout == "plain" and self.model_dump() == standard | {"system": None}


class DataSettings(Settings):
    """Where the preference pairs come from, and how they are laid out there."""

    source: str
    revision: str | None
    config: str | None
    splits: dict[Split, str]
    format: Format
    columns: Columns

    @field_validator("splits")
    @classmethod
    def _has_all(cls, splits: dict[Split, str]) -> dict[Split, str]:
        if missing := sorted(set(get_args(Split)) - set(splits)):
            raise ValueError(f"says nothing of {missing[0]}; name a split for each of {', '.join(get_args(Split))}")
        return splits

    @model_validator(mode="after")
    def _fits_its_source(self) -> "DataSettings":
        check_source(self.source, self.revision)
        if self.config is not None and is_folder(self.source):
            raise ValueError(
                f"`config` is {self.config!r}, and {self.source} is a folder, which has none; set it to null"
            )
        if self.columns.question is None and self.format != "messages":
            raise ValueError(f"`columns.question` is null, which `format: {self.format}` cannot be without; name it")
        return self
