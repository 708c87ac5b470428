"""What the task files name: documents, and the grading of a result. `split` comes from the metadata that evaluate passes."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from hermes.artifacts import open_parquet
from hermes.instructions.kinds import grade, is_strict

RAW, SUBSET = Path("data/raw"), Path("data/subset")


class ConversationTask(ConfigurableTask):
    """A task whose documents may bring messages that come before the question (`context`, hermes/data/pairs.py)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The prompt's text, in the chat template that lm-eval passes along."""
        if doc.get("context"):
            return kwargs["chat_template"]([*doc["context"], {"role": "user", "content": doc["question"]}])
        return super().fewshot_context(doc, *args, **kwargs)


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


def read_pairs(split: str) -> pa.Table:
    """The pairs of a held-out split: question, chosen, rejected, and where the data has them context and other columns.

    Raises:
        UserError: the split is missing or damaged.
    """
    with open_parquet(SUBSET / f"{split}.parquet") as file:
        return file.read()


def load_pairs(split: str, left_out: Sequence[int] = (), **_: Any) -> dict[str, Dataset]:
    """The held-out preference pairs of a split, but those of these numbers."""
    table = read_pairs(split)
    return {"test": Dataset(table.take(sorted(set(range(table.num_rows)) - set(left_out))))}


def load_plain(split: str, **_: Any) -> dict[str, Dataset]:
    """The plain questions and answers of a split."""
    rows = [json.loads(line) for line in (RAW / "plain.jsonl").read_text().splitlines()]
    return {"test": Dataset.from_list([row for row in rows if row["split"] == split])}


def answers(doc: dict[str, Any]) -> list[str]:
    """The two answers of a pair, chosen first."""
    return [doc["chosen"], doc["rejected"]]


def grade_instruction(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Strict success and grade of one answer by its text; stages/evaluate.py fails the unfinished ones."""
    constraint = json.loads(doc["constraint"])
    return {
        "strict": float(is_strict(doc["kind"], results[0], constraint)),
        "grade": grade(doc["kind"], results[0], constraint),
    }


def log_likelihood(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The log-likelihood of one answer in nats."""
    return {"log_likelihood": results[0][0]}
