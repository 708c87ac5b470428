"""What the BIG-bench tasks name: which questions, and the grade of an answer."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset


def with_choices(documents: Dataset) -> Dataset:
    """The questions that have choices."""
    return documents.filter(lambda doc: len(doc["multiple_choice_targets"]) > 0)


def with_so_many(choices: int) -> Callable[[Dataset], Dataset]:
    """The questions about so many objects, of a set that the Nous tables divide."""
    return lambda documents: documents.filter(lambda doc: len(doc["multiple_choice_targets"]) == choices)


with_three_choices, with_five_choices, with_seven_choices = map(with_so_many, (3, 5, 7))


def grade(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """BIG-bench's multiple_choice_grade: the score of the choice with the greatest log-likelihood, the first of equals."""
    likeliest = max(range(len(results)), key=lambda i: results[i][0])
    return {"multiple_choice_grade": float(doc["multiple_choice_scores"][likeliest])}
