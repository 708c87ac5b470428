"""The held-out rows that models are asked, with their ids, made as those of training are (hermes/data/chat_text.py)."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hermes.artifacts import REMAKE, open_parquet
from hermes.console import UserError, say
from hermes.data.chat_text import Forged, Ids, answer_ids, check_plain, prompt_ids
from hermes.evaluation.tasks.functions import load_instructions
from hermes.instructions.kinds import KINDS, grade
from hermes.settings.evaluate import EvaluateSettings

SUBSET = Path("data/subset")
NEEDED = {"instructions": Path("data/raw/questions.parquet"), "plain": Path("data/raw/plain.jsonl")}
Answers = list[dict[str, Any]]


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows with their ids, made as those of training are (hermes/data/chat_text.py).

    Attributes:
        rows: as the data have them.
        prompts: ids of each row's prompt.
        answers: ids of its answers.
    """

    rows: Answers
    prompts: list[Ids]
    answers: list[list[Ids]]

    @classmethod
    def of(cls, rows: Answers, tokenizer: PreTrainedTokenizerBase, parts: Sequence[str], where: str) -> "HeldOut":
        """The rows with the answers that stand in the columns `parts`.

        Raises:
            UserError: the chat template does not take a row; names it.
        """
        prompts, answers = [], []
        for number, row in enumerate(rows):
            context = row.get("context") or ()
            try:
                prompts.append(prompt_ids(tokenizer, row["question"], context))
                answers.append([answer_ids(tokenizer, row["question"], row[part], context) for part in parts])
            except UserError as error:
                raise UserError(f"{where}, row {number}: {error}") from None
        return cls(rows, prompts, answers)

    def first(self, count: int, answers: int) -> tuple[list[Ids], list[list[Ids]]]:
        """The prompts of the first rows, and so many answers to each."""
        return self.prompts[:count], [found[:answers] for found in self.answers[:count]]

    def check_length(self, context: int, where: str) -> None:
        """Refuses what does not fit, before any model is loaded.

        Raises:
            UserError: a prompt is too long together with its answer; says which.
        """
        for number, (prompt, found) in enumerate(zip(self.prompts, self.answers, strict=True)):
            if (tokens := len(prompt) + max(map(len, found))) > context:
                raise UserError(
                    f"{where}, row {number}: has {tokens} tokens; `evaluate.context` is {context}: raise it"
                )


def check_constraint(row: dict[str, Any]) -> None:
    """Refuses a question whose answers could not be graded.

    Raises:
        UserError: says which and why.
    """
    where, text = NEEDED["instructions"], row["constraint"]
    if row["kind"] not in KINDS:
        raise UserError(f"{where}: the question {row['id']} is of the unknown kind {row['kind']!r:.40}")
    try:
        constraint = json.loads(text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: the constraint of {row['id']} is not JSON ({error})") from None
    if not isinstance(constraint, dict):
        raise UserError(f"{where}: the constraint of {row['id']} is {text!r:.40}; expected an object")
    try:
        grade(row["kind"], "An answer.", constraint)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}: the constraint of {row['id']} does not suit its kind {row['kind']} ({error!r})"
        ) from None


def read_held_out(settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, HeldOut]:
    """The pairs and the plain answers of the split that is asked, as far as they are wanted.

    A pair that holds a special token could forge a turn of the conversation, and is left out.

    Raises:
        UserError: a row is not what the chat template or `evaluate.context` takes, or a file is missing.
    """
    found, split = {}, settings.split
    for task, file in NEEDED.items():
        if task in settings.tasks and not file.is_file():
            raise UserError(f"{file}: no such file, which the task {task} asks; take it out of `evaluate.tasks`")
    if "preference" in settings.tasks or settings.divergence_pairs:
        path, pairs = SUBSET / f"{split}.parquet", []
        with open_parquet(path) as file:
            for row in file.read().to_pylist():
                with suppress(Forged):
                    check_plain(tokenizer, row)
                    pairs.append(row)
            forged = file.metadata.num_rows - len(pairs)
        if forged:
            say(f"evaluation: {forged} pairs of {split} hold special tokens and are left out")
        if not pairs:
            raise UserError(f"{path}: all of its pairs hold special tokens, so that none can be asked")
        found["preference"] = HeldOut.of(pairs, tokenizer, ("chosen", "rejected"), str(path))
        found["preference"].check_length(settings.context, str(path))
    if "instructions" in settings.tasks:
        with open_parquet(NEEDED["instructions"]) as file:
            file.read(["id", "topic", "kind", "constraint", "question", "split"])  # or it says what is wrong with it
        questions = load_instructions(split, settings.questions_per_kind)["test"]
        if not len(questions):
            raise UserError(f"{NEEDED['instructions']}: has no question of the split {split}")
        for row in questions:
            check_constraint(row)
            tokens = len(prompt_ids(tokenizer, row["question"])) + settings.max_new_tokens
            if tokens > settings.context:
                raise UserError(
                    f"{NEEDED['instructions']}: the question {row['id']} and `evaluate.max_new_tokens` need {tokens} tokens; "
                    f"`evaluate.context` is {settings.context}: raise it"
                )
    if "plain" in settings.tasks:
        path = NEEDED["plain"]
        try:
            rows = [json.loads(line) for line in path.read_text().split("\n") if line]
            asked = [row for row in rows if row["split"] == split]
            if not all(isinstance(row[name], str) for row in asked for name in ("question", "answer")):
                raise TypeError("a question or an answer is no text")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}: not what fetch_data wrote ({error!r}); {REMAKE}") from None
        if not asked:
            raise UserError(f"{path}: has no row of the split {split}; take plain out of `evaluate.tasks`")
        found["plain"] = HeldOut.of(asked, tokenizer, ("answer",), str(path))
        found["plain"].check_length(settings.context, str(path))
    return found
