"""What token sequences have in common at their beginning."""

from collections.abc import Sequence


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    columns = enumerate(zip(*prompts, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, prompts), default=0))
