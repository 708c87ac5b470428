"""What the BIG-bench tasks name: which questions, and the grade of an answer."""

from typing import Any

from datasets import Dataset


def with_choices(documents: Dataset) -> Dataset:
    """The questions that have choices."""
    return documents.filter(lambda doc: len(doc["multiple_choice_targets"]) > 0)


def with_three_choices(documents: Dataset) -> Dataset:
    """The questions about three objects, of a set that the Nous tables divide."""
    return documents.filter(lambda doc: len(doc["multiple_choice_targets"]) == 3)


def with_five_choices(documents: Dataset) -> Dataset:
    """The questions about five objects."""
    return documents.filter(lambda doc: len(doc["multiple_choice_targets"]) == 5)


def with_seven_choices(documents: Dataset) -> Dataset:
    """The questions about seven objects."""
    return documents.filter(lambda doc: len(doc["multiple_choice_targets"]) == 7)


def grade(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """BIG-bench's multiple_choice_grade: the score of the choice with the greatest log-likelihood, the first of equals."""
    likeliest = max(range(len(results)), key=lambda i: results[i][0])
    return {"multiple_choice_grade": float(doc["multiple_choice_scores"][likeliest])}
