"""Stage tokenize: data/subset + the tokenizer -> data/tokens (prompt_ids, chosen_ids, rejected_ids) and reports/data.json.

The only place where training text becomes ids. With `template: null` the tokenizer's own chat template is applied twice: to the prompt
with its opening of the assistant's turn, and to prompt and answer. What follows the prompt's ids, up to the token that ends an answer, is
the answer. Three things are errors: a template that renders the prompt differently in front of an answer, an answer without exactly one
such token, and a prompt with more beginning-of-sequence tokens than its template writes.

A template of one's own is two texts, around question and answer; the first may have a place for a system prompt. Ids are then made as TRL
0.11 made them, which the published run used. Prompt and answer are tokenized together, and the answer's ids are those behind the
prompt's. The end-of-sequence token is appended where they do not end in it. `overlong: truncate` is that version's rule too. Of a pair
longer than `max_length` the prompt keeps its last `max_prompt_length` tokens. If that is not enough, both answers keep their first
`max_length - max_prompt_length`.

Training alone follows a template of one's own. Evaluation, chat and the GGUF files use the model's chat template.

A `max_length` up to 1.0 is a share: the length that so many of the training pairs do not exceed.

Two things are not TRL's. It put a beginning-of-sequence token before a prompt without one; here the template says all. And the text of one
answer may change the last token of the prompt while the other's does not. TRL scored the other behind the whole prompt then. Here a pair
has one prompt, the shorter, so the other is scored with one token more. reports/data.json counts these pairs as `uneven_prompt_ends`.
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from hermes import params
from hermes.ahead import check_ahead
from hermes.artifacts import check_together, complete_folder, open_parquet, write_json, write_manifest, write_parquet
from hermes.console import UserError, progress
from hermes.data.chat_text import (
    Forged,
    Ids,
    answer_ids,
    check_plain,
    prompt_ids,
)
from hermes.model.base_check import check_base, check_lengths
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_stage
from hermes.settings.tokenize import TextTemplate, TokenizeSettings

SUBSET, BASE, OUTPUT, REPORT = Path("data/subset"), Path("models/base"), Path("data/tokens"), Path("reports/data.json")
COLUMNS = ("context", "question", "chosen", "rejected")
SHOWN = 5  # rows of a kind whose numbers the report gives


class Params(params.Params):
    """Parameters of tokenize."""

    tokenize: TokenizeSettings


def templated_ids(
    tokenizer: PreTrainedTokenizerBase, template: TextTemplate, question: str, answer: str, system: str = ""
) -> tuple[Ids, Ids]:
    """The ids of prompt and answer in a template of one's own, as TRL 0.11's `build_tokenized_answer` and its end of sequence.

    Where the text of the answer changes the last token of the prompt, that token is the answer's.
    """
    prompt, text = template.fill(question, answer, system)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    start = len(ids) - (ids != whole[: len(ids)])
    end = [] if whole[start:][-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
    return whole[:start], whole[start:] + end


def templated_pair(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: TextTemplate
) -> dict[str, tuple[Ids, Ids]]:
    """The ids of prompt and answer in a template of one's own, for each answer of a pair.

    Raises:
        UserError: what comes before the question does not fit into the template.
    """
    context = row.get("context") or []
    system = context[0]["content"] if context and context[0]["role"] == "system" else ""
    if len(context) > bool(system):
        raise UserError("a template of one's own has no place for turns before the question; use `template: null`")
    if system and not template.has_system:
        raise UserError(
            "the row has a system prompt, for which the template has no place; put {system} into `tokenize.template.prompt`"
        )
    return {
        name: templated_ids(tokenizer, template, row["question"], row[name], system) for name in ("chosen", "rejected")
    }


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: TextTemplate | None
) -> tuple[Ids, dict[str, Ids]]:
    """The ids of a pair's prompt and of its two answers.

    Raises:
        Forged: a text holds a special token.
        UserError: the template does not fit.
    """
    if template is None:
        check_plain(tokenizer, row)
        context = row.get("context") or []
        prompt = prompt_ids(tokenizer, row["question"], context)
        return prompt, {
            name: answer_ids(tokenizer, row["question"], row[name], context) for name in ("chosen", "rejected")
        }
    both = templated_pair(tokenizer, row, template)
    shorter = min((prompt for prompt, _ in both.values()), key=len)
    if any(prompt[: len(shorter)] != shorter for prompt, _ in both.values()):
        raise UserError(
            "the answers change more of the prompt than its last token; end the template's prompt otherwise"
        )
    return shorter, {name: (prompt + answer)[len(shorter) :] for name, (prompt, answer) in both.items()}


def truncate(prompt: Ids, answers: dict[str, Ids], limit: int, prompt_limit: int) -> tuple[Ids, dict[str, Ids]]:
    """Cuts a pair that is longer than the limit as the module's docstring says."""
    longest = max(map(len, answers.values()))
    if len(prompt) + longest > limit:
        prompt = prompt[-prompt_limit:]
    if len(prompt) + longest > limit:
        answers = {name: ids[: limit - prompt_limit] for name, ids in answers.items()}
    return prompt, answers


def common_limit(pairs: Iterable[tuple[Ids, dict[str, Ids]]], share: float) -> int:
    """The length, of the prompt with its longer answer, that this share of the pairs does not exceed."""
    found = sorted(len(prompt) + max(map(len, answers.values())) for prompt, answers in pairs)
    return found[max(1, math.ceil(share * len(found))) - 1] if found else 0


def excess(prompt: Ids, answers: dict[str, Ids], limit: int) -> tuple[str, int] | None:
    """What of a pair is longer than the limit, and how long it is; None where it fits."""
    longest = len(prompt) + max(map(len, answers.values()))
    if longest <= limit:
        return None
    return ("prompt", len(prompt)) if len(prompt) >= limit else ("pair", longest)


def lengths(kept: list[dict[str, Ids]]) -> dict[str, dict[str, float]]:
    """How long prompts and answers are, in tokens."""
    counts = {name: np.array([len(row[f"{name}_ids"]) for row in kept]) for name in ("prompt", "chosen", "rejected")}
    return {
        name: {
            "min": int(n.min()),
            "mean": round(float(n.mean()), 2),
            "p95": int(np.percentile(n, 95)),
            "max": int(n.max()),
        }
        for name, n in counts.items()
    }


def tokenize_split(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
    split: str,
    limit: int | None = None,
) -> tuple[list[dict[str, Ids]], dict[str, Any]]:
    """Tokenizes the pairs of a split, up to a length where `max_length` is a share; (rows of ids, counts for the report).

    Raises:
        UserError: a pair is longer than `max_length` or forges a turn while the settings say "error", or the template does not fit.
    """
    pairs: dict[int, tuple[Ids, dict[str, Ids]]] = {}
    forged: list[int] = []
    uneven = identical = 0
    for number, row in enumerate(progress(rows, f"tokenizing {split}", unit="pair")):
        try:
            pairs[number] = conversation_ids(tokenizer, row, settings.template)
        except UserError as error:
            if not isinstance(error, Forged) or settings.forged == "error":
                raise UserError(f"{SUBSET}/{split}.parquet, row {number}: {error}") from None
            forged.append(number)
    if isinstance(settings.max_length, int):
        limit = settings.max_length
    elif limit is None:
        limit = common_limit(pairs.values(), settings.max_length)
    kept: list[dict[str, Ids]] = []
    dropped: Counter[str] = Counter({"forged_special_token": len(forged)} if forged else {})
    truncated: Counter[str] = Counter(prompt=0, chosen=0, rejected=0)
    for number, (prompt, answers) in pairs.items():
        whole = {"prompt": prompt, **answers}
        if (found := excess(prompt, answers, limit)) and settings.max_prompt_length is not None:
            prompt, answers = truncate(prompt, answers, limit, settings.max_prompt_length)
            truncated.update(name for name, ids in {"prompt": prompt, **answers}.items() if ids != whole[name])
        elif found:
            if settings.overlong == "error":
                raise UserError(
                    f"{SUBSET}/{split}.parquet: row {number} has a {found[0]} of {found[1]} tokens; `tokenize.max_length` is "
                    f"{limit}: raise it, or set `overlong: drop`"
                )
            dropped[f"{found[0]}_longer_than_{limit}"] += 1
            continue
        identical += answers["chosen"] == answers["rejected"] and whole["chosen"] != whole["rejected"]
        if settings.template is not None:
            prompts = [prompt for prompt, _ in templated_pair(tokenizer, rows[number], settings.template).values()]
            uneven += len(prompts[0]) != len(prompts[1])
        kept.append({"prompt_ids": prompt, "chosen_ids": answers["chosen"], "rejected_ids": answers["rejected"]})
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise UserError(f"{SUBSET}/{split}.parquet: no pair is left ({why}); see `tokenize` in params.yaml")
    summary: dict[str, Any] = {
        "read": len(rows),
        "pairs": len(kept),
        "dropped": dict(dropped),
        "truncated": dict(truncated),
        "tokens": lengths(kept),
    }
    if forged:
        summary["forged_rows"] = forged[:SHOWN]
    if settings.template is not None:
        summary["uneven_prompt_ends"] = uneven
    if identical:
        summary["identical_when_truncated"] = identical
    if isinstance(settings.max_length, float):
        summary["max_length"] = limit
    return kept, summary


def main() -> None:
    settings = params.load(Params).tokenize
    hashes = check_together(BASE, SUBSET)
    check_base(BASE)
    tokenizer = load_tokenizer(BASE)
    if settings.template is not None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{BASE}: its tokenizer names no end of a sequence, which `tokenize.template` ends an answer with; use the chat template"
        )
    check_ahead(BASE, tokenizer)
    report: dict[str, dict[str, Any]] = {}
    with complete_folder(OUTPUT) as target:
        for source in sorted(SUBSET.glob("*.parquet"), key=lambda path: (path.stem != "train", path.stem)):
            with open_parquet(source) as file:
                columns = [name for name in COLUMNS if name in file.schema_arrow.names]
                rows = file.read(columns=columns).to_pylist()
            limit = report.get("train", {}).get("max_length")
            pairs, report[source.stem] = tokenize_split(rows, tokenizer, settings, source.stem, limit)
            check_lengths(
                BASE,
                max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs),
            )
            write_parquet(target / source.name, pa.Table.from_pylist(pairs, schema=schema()))
        # Nothing reads the subset beside the tokens, and another one of the same ids makes no later stage stale.
        write_manifest(target, made_from={BASE.as_posix(): hashes[BASE.as_posix()]})
    write_json(REPORT, report)


def schema() -> pa.Schema:
    """The columns of data/tokens."""
    return pa.schema([(f"{name}_ids", pa.list_(pa.int32())) for name in ("prompt", "chosen", "rejected")])


if __name__ == "__main__":
    run_stage("tokenize", main)
