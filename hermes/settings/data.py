"""Section `data`: where the preference pairs come from, and how they are laid out there."""

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from hermes.evaluation.benchmarks import SuiteName
from hermes.params import Settings, each_once
from hermes.settings.sources import check_source, is_folder

Name = Annotated[str, Field(min_length=1)]
Format = Literal["plain", "chatml", "messages", "transcripts"]
Split = Literal["train", "validation", "test"]


class Columns(Settings):
    """The names of a source's columns; `a.b` is the field b inside the column a.

    Attributes:
        question: what is asked; None where the answers are whole conversations.
        chosen: the better answer; None where a `Choice` says which it is.
        rejected: the other one.
        score: how much better, or two columns, the scores of chosen and rejected; None where nobody says.
        system: a system prompt; None without one.
    """

    question: Name | None
    chosen: Name | None
    rejected: Name | None
    score: Name | Annotated[list[Name], Field(min_length=2, max_length=2)] | None
    system: Name | None

    @model_validator(mode="after")
    def _are_different(self) -> "Columns":
        texts = [name for name in (self.question, self.chosen, self.rejected, self.system) if name]
        for names in (texts, self.score if isinstance(self.score, list) else []):
            each_once(names)
        return self

    def used(self) -> list[str]:
        """Those that are read, in order."""
        scores = [self.score] if isinstance(self.score, str) else self.score or []
        return [name for name in (self.question, self.chosen, self.rejected, *scores, self.system) if name]


Verdict = list[str | int | float | bool]


class Choice(Settings):
    """Which answer is the better one, where candidates stand side by side.

    Attributes:
        candidates: the columns of the candidates, or one column that holds a list of them.
        text: the field of a candidate that holds its text, where a candidate is an object; None where it is a text or a conversation.
        by: label, a column that names the better of two; strength, a number that is above 0 where the second of two is better, and below
            where the first is; score, a number for each candidate, the larger the better; or rank, the smaller the better.
        value: the column of the label or strength, or where the scores stand: columns as many as candidates, or the field of a candidate.
        first: the labels that say the first is better.
        second: the labels that say the second is better; with any other the row is a tie.
        pairs: of more than two candidates the best against the worst, or every better one against every worse one.
    """

    candidates: Name | Annotated[list[Name], Field(min_length=2)]
    text: Name | None = None
    by: Literal["label", "strength", "score", "rank"]
    value: Name | list[Name]
    first: Verdict = Field(default_factory=list)
    second: Verdict = Field(default_factory=list)
    pairs: Literal["best_and_worst", "all"] = "best_and_worst"

    @model_validator(mode="after")
    def _is_complete(self) -> "Choice":
        two = isinstance(self.candidates, list) and len(self.candidates) == 2
        if self.by in ("label", "strength") and not (two and isinstance(self.value, str)):
            raise ValueError(
                f"`by: {self.by}` decides between two; name two columns in `candidates` and one in `value`"
            )
        if (self.by == "label") != bool(self.first and self.second):
            raise ValueError("`by: label` needs the labels of both, in `first` and `second`, and nothing else does")
        for names in (self.candidates, self.value, [*self.first, *self.second]):
            each_once(names if isinstance(names, list) else [names])
        if isinstance(self.value, list) and len(self.value) != (
            len(self.candidates) if isinstance(self.candidates, list) else 0
        ):
            raise ValueError("`value` names several columns; give one for each column of `candidates`")
        return self

    def used(self) -> list[str]:
        """The columns that are read, in order."""
        in_candidate = isinstance(self.candidates, str) and isinstance(self.value, str)
        named = [self.candidates, [] if in_candidate else self.value]
        return [name for part in named for name in ([part] if isinstance(part, str) else part)]


class Layout(Settings):
    """How a table of pairs is laid out."""

    format: Format
    columns: Columns
    choice: Choice | None

    def used(self) -> list[str]:
        """The columns that are read, in order."""
        return [*self.columns.used(), *(self.choice.used() if self.choice else [])]

    def is_standard(self) -> bool:
        """Whether a table of this layout is one that the stages read as it is."""
        standard = {"question": "question", "chosen": "chosen", "rejected": "rejected", "score": "delta_score"}
        return self.format == "plain" and self.columns.model_dump() == standard | {"system": None}

    @model_validator(mode="after")
    def _says_where_the_parts_are(self) -> "Layout":
        if self.columns.question is None and self.format not in ("messages", "transcripts"):
            raise ValueError(f"`columns.question` is null, which `format: {self.format}` cannot be without; name it")
        answers = [self.columns.chosen, self.columns.rejected]
        if self.choice and any([*answers, self.columns.score]):
            raise ValueError(
                "`choice` says which answer is better; set `chosen`, `rejected` and `score` of `columns` to null"
            )
        if not self.choice and not all(answers):
            raise ValueError(
                "`columns` names no `chosen` or no `rejected`; name both, or say by `choice` which is which"
            )
        return self


class Source(Layout):
    """Where preference pairs come from, and how they are laid out there."""

    source: str
    revision: str | None
    config: str | None
    splits: dict[Split, Name]

    @field_validator("splits")
    @classmethod
    def _has_all(cls, splits: dict[Split, str]) -> dict[Split, str]:
        if missing := sorted(set(get_args(Split)) - set(splits)):
            raise ValueError(f"says nothing of {missing[0]}; name a split for each of {', '.join(get_args(Split))}")
        return splits

    @model_validator(mode="after")
    def _fits_its_source(self) -> "Source":
        check_source(self.source, self.revision)
        if self.config is not None and is_folder(self.source):
            raise ValueError(
                f"`config` is {self.config!r}, and {self.source} is a folder, which has none; set it to null"
            )
        return self


class Share(Source):
    """A further source, of which this share of the rows is taken, evenly spaced."""

    share: Annotated[float, Field(gt=0, le=1)]


class DataSettings(Source):
    """Where the preference pairs come from: one source, or several that are mixed."""

    mixed_with: list[Share]
    decontaminate: list[SuiteName]

    _each_once = field_validator("decontaminate")(each_once)
