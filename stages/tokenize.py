"""Stage tokenize: data/subset + the tokenizer -> data/tokens (prompt_ids, chosen_ids, rejected_ids) and reports/data.json.

The only place where training text becomes ids. The chat template is applied once to the prompt with its opening of the
assistant's turn, and once to prompt and answer; what follows the prompt's ids, up to the end-of-sequence token, is the
answer. A template that would render the prompt differently in front of an answer is an error, and so is an answer without exactly
one end-of-sequence token or a prompt with more beginning-of-sequence tokens than its template writes.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import PositiveInt
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages import params
from stages.artifacts import complete_folder, open_parquet, write_json, write_parquet
from stages.console import UserError, progress, run_stage

SUBSET, BASE, OUTPUT, REPORT = Path("data/subset"), Path("models/base"), Path("data/tokens"), Path("reports/data.json")
Ids = list[int]


class TokenizeSettings(params.Settings):
    """How long a prompt with its answer may be, and what happens to a longer one."""

    max_length: PositiveInt
    overlong: Literal["error", "drop"]


class Params(params.Params):
    """Parameters of tokenize."""

    tokenize: TokenizeSettings


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> Ids:
    """The ids of a question in the chat template, up to where the assistant's answer begins.

    Raises:
        UserError: the tokenizer put a beginning-of-sequence token where the template writes none.
    """
    text = prompt_text(tokenizer, question)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token
    if bos and ids.count(tokenizer.bos_token_id) != text.count(bos):
        raise UserError(
            f"tokenizer: {ids.count(tokenizer.bos_token_id)} {bos} in the ids of a prompt whose template writes {text.count(bos)}"
        )
    return ids


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The chat template's text of a question, up to where the assistant's answer begins."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def answer_ids(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Ids:
    """The ids of an answer as a model would write it after the prompt's ids, ending in the only end-of-sequence token.

    Raises:
        UserError: the prompt's text is not a prefix of that of prompt and answer, or the answer does not hold exactly one
            end-of-sequence token.
    """
    prompt = prompt_text(tokenizer, question)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not whole.startswith(prompt):
        raise UserError(
            f"chat template: the prompt is not a prefix of prompt and answer for {question[:60]!r}; use another template"
        )
    rest, eos = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    if rest.count(eos) != 1:
        raise UserError(
            f"chat template: {rest.count(eos)} end-of-sequence tokens in the answer {answer[:60]!r}; expected exactly one"
        )
    return rest[: rest.index(eos) + 1]


def check_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Refuses text that holds one of the tokenizer's special tokens, which would forge a turn of the conversation.

    Raises:
        UserError: names the token.
    """
    for token in tokenizer.all_special_tokens:
        if token in text:
            raise UserError(f"the text {text[:60]!r} holds the special token {token}; remove that row or the token")


def tokenize_split(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, split: str
) -> tuple[list[dict[str, Ids]], dict[str, Any]]:
    """Tokenizes the pairs of a split; (rows of ids, counts for the report).

    Raises:
        UserError: a pair is longer than `max_length` while `overlong` is "error".
    """
    kept: list[dict[str, Ids]] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(progress(rows, f"tokenizing {split}", unit="pair")):
        try:
            for name in ("question", "chosen", "rejected"):
                check_plain(tokenizer, row[name])
            prompt = prompt_ids(tokenizer, row["question"])
            answers = {name: answer_ids(tokenizer, row["question"], row[name]) for name in ("chosen", "rejected")}
        except UserError as error:
            raise UserError(f"{SUBSET}/{split}.parquet, row {number}: {error}") from None
        longest = len(prompt) + max(map(len, answers.values()))
        if longest > settings.max_length:
            what = "prompt" if len(prompt) >= settings.max_length else "pair"
            if settings.overlong == "error":
                found = len(prompt) if what == "prompt" else longest
                raise UserError(
                    f"{SUBSET}/{split}.parquet: row {number} has a {what} of {found} tokens; `tokenize.max_length` is "
                    f"{settings.max_length}: raise it, or set `overlong: drop`"
                )
            dropped[f"{what}_longer_than_{settings.max_length}"] += 1
            continue
        kept.append({"prompt_ids": prompt, "chosen_ids": answers["chosen"], "rejected_ids": answers["rejected"]})
    if not kept:
        raise UserError(
            f"{SUBSET}/{split}.parquet: no pair fits `tokenize.max_length` = {settings.max_length}; raise it"
        )
    lengths = {name: np.array([len(row[f"{name}_ids"]) for row in kept]) for name in ("prompt", "chosen", "rejected")}
    summary = {
        "read": len(rows),
        "pairs": len(kept),
        "dropped": dict(dropped),
        "truncated": dict.fromkeys(lengths, 0),
        "tokens": {
            name: {
                "min": int(n.min()),
                "mean": round(float(n.mean()), 2),
                "p95": int(np.percentile(n, 95)),
                "max": int(n.max()),
            }
            for name, n in lengths.items()
        },
    }
    return kept, summary


def main() -> None:
    settings = params.load(Params).tokenize
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if not tokenizer.chat_template:
        raise UserError(f"{BASE}: its tokenizer has no chat template; choose a revision of the model that has one")
    report = {}
    with complete_folder(OUTPUT) as target:
        for source in sorted(SUBSET.glob("*.parquet")):
            with open_parquet(source) as file:
                rows = file.read(columns=["question", "chosen", "rejected"]).to_pylist()
            pairs, report[source.stem] = tokenize_split(rows, tokenizer, settings, source.stem)
            write_parquet(target / source.name, pa.Table.from_pylist(pairs, schema=schema()))
    write_json(REPORT, report)


def schema() -> pa.Schema:
    """The columns of data/tokens."""
    return pa.schema([(f"{name}_ids", pa.list_(pa.int32())) for name in ("prompt", "chosen", "rejected")])


if __name__ == "__main__":
    run_stage("tokenize", main)
