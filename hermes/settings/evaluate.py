"""Section `evaluate`: what is asked, of which models, and how it is batched."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from hermes.evaluation.benchmarks import SUITES, SuiteName
from hermes.params import Settings, each_once
from hermes.settings.base import Count, CountOrZero, Threads
from hermes.settings.compress import Method
from hermes.settings.quantize import GgufType


class Batching(Settings):
    """How much is computed together, which stays fixed because scores move with it, and the longest answer of the stage's own tasks."""

    max_new_tokens: Count
    batch_size: Count
    slots: Annotated[int, Field(ge=2, le=10**6)]  # both answers of a pair are scored together
    context: Count
    threads: Threads
    engine: Literal["transformers", "vllm"]


class EvaluateSettings(Batching):
    """What is asked, of which split, and how it is batched."""

    split: Literal["validation", "test"]
    tasks: Annotated[list[Literal["instructions", "preference", "plain", "general"]], Field(min_length=1)]
    questions_per_kind: Count | None
    suites: list[SuiteName]
    suite_types: Literal["all"] | list[Literal["f16", GgufType, Method]]
    types: Literal["all"] | list[Literal["f16", GgufType, Method]]
    processes: Count
    divergence_pairs: CountOrZero

    _each_once = field_validator("tasks", "suites")(each_once)

    @field_validator("types", "suite_types")
    @classmethod
    def _types_once(cls, types: str | list[str]) -> str | list[str]:
        return types if isinstance(types, str) else each_once(types)

    @model_validator(mode="after")
    def _suites_are_asked_of_what_is_evaluated(self) -> "EvaluateSettings":
        if (
            isinstance(self.types, list)
            and isinstance(self.suite_types, list)
            and (more := {*self.suite_types} - {*self.types})
        ):
            raise ValueError(f"`suite_types` names {min(more)}, which `types` does not")
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> "EvaluateSettings":
        longest = {"`max_new_tokens`": self.max_new_tokens}
        longest |= {f"the longest answer of `{name}`": SUITES[name].longest_answer for name in self.suites}
        for what, tokens in longest.items():
            if tokens >= self.context:
                raise ValueError(f"{what} ({tokens} tokens) leaves no room for a prompt in `context` ({self.context})")
        return self
