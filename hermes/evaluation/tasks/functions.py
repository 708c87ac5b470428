"""What the task files name: documents, and the grading of a result. `split` comes from the metadata that evaluate passes."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from hermes.instructions.kinds import grade, is_strict

RAW = Path("data/raw")


def load_instructions(split: str, questions_per_kind: int | None = None, **_: Any) -> dict[str, Dataset]:
    """The held-out questions of a split, or so many of every kind, evenly spaced over its topics."""
    rows = [row for row in pq.read_table(RAW / "questions.parquet").to_pylist() if row["split"] == split]
    if questions_per_kind is not None:
        of_kind: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            of_kind[row["kind"]].append(row["id"])
        n = questions_per_kind
        asked = {ids[i * len(ids) // n] for ids in of_kind.values() for i in range(n)}
        rows = [row for row in rows if row["id"] in asked]
    return {"test": Dataset.from_list(rows)}


def question(doc: dict[str, Any]) -> str:
    """What is asked. As a function, since lm-eval would evaluate what a template makes of a user's text."""
    return str(doc["question"])


def grade_instruction(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Strict success and grade of one answer by its text; stages/evaluate.py fails the unfinished ones."""
    constraint = json.loads(doc["constraint"])
    return {
        "strict": float(is_strict(doc["kind"], results[0], constraint)),
        "grade": grade(doc["kind"], results[0], constraint),
    }
