"""Section `tokenize`: how a conversation is written, and how long it may be."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from hermes.params import Settings

PLACE = re.compile(r"\{(\w+)\}")


class TextTemplate(Settings):
    """The texts around a question, with a system prompt or not, and around an answer."""

    prompt: str
    answer: str

    @field_validator("prompt", "answer")
    @classmethod
    def _has_its_places(cls, text: str, info: Any) -> str:
        needed, known = {"prompt": ("question", {"question", "system"}), "answer": ("answer", {"answer"})}[
            info.field_name
        ]
        places = PLACE.findall(text)
        if places.count(needed) != 1:
            raise ValueError(f"has to hold {{{needed}}} once")
        if unknown := sorted(set(places) - known):
            raise ValueError(
                f"holds {{{unknown[0]}}}; there is only {' and '.join(f'{{{name}}}' for name in sorted(known))}"
            )
        return text

    @property
    def has_system(self) -> bool:
        """Whether it has a place for a system prompt."""
        return "system" in PLACE.findall(self.prompt)

    def fill(self, question: str, answer: str, system: str = "") -> tuple[str, str]:
        """The text of a prompt and of its answer."""
        texts = {"question": question, "system": system, "answer": answer}
        prompt, text = (PLACE.sub(lambda place: texts[place[1]], part) for part in (self.prompt, self.answer))
        return prompt, text


class TokenizeSettings(Settings):
    """How a conversation is written, how long it may be, and what happens to a longer one."""

    template: TextTemplate | None
    forged: Literal["error", "drop"]
    max_length: Annotated[int, Field(gt=0, le=10**7)] | Annotated[float, Field(gt=0, le=1)]
    max_prompt_length: PositiveInt | None
    overlong: Literal["error", "drop", "truncate"]

    @model_validator(mode="after")
    def _knows_how_to_truncate(self) -> "TokenizeSettings":
        if (self.overlong == "truncate") != (self.max_prompt_length is not None):
            raise ValueError("`overlong: truncate` needs `max_prompt_length`, and nothing else does")
        if isinstance(self.max_length, float) and self.overlong != "drop":
            raise ValueError(f"`max_length` is a share ({self.max_length}), which goes with `overlong: drop`")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(f"`max_prompt_length` leaves no room for an answer in `max_length` ({self.max_length})")
        return self
