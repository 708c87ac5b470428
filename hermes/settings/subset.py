"""Section `subset`: which pairs training may see."""

from typing import Annotated

from pydantic import Field

from hermes.params import Settings
from hermes.settings.base import Count


class SubsetSettings(Settings):
    """Which pairs training may see."""

    k: Count | None
    held_out_k: Count | None
    drop_malformed: bool
    drop_empty: bool
    drop_identical: bool
    drop_exact_duplicates: bool
    near_duplicate_similarity: Annotated[float, Field(ge=0.7, le=1)] | None  # the bands miss less similar ones
    drop_evaluation_leaks: bool
