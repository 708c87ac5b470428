"""Stage evaluate: base, merged and every GGUF on the same held-out tasks -> data/evaluation.

The tasks are lm-eval's (stages/tasks/*.yaml), run through models that work on token ids (stages/scoring.py): strict instruction accuracy
over greedy answers, preference accuracy on held-out pairs, log-likelihood of plain answers. Beside them, over full
distributions, the divergence of each GGUF (and of bfloat16) from the merged weights run in float32. An answer that reaches the token
limit is unfinished and fails. All questions meet all models, so every comparison is paired (stages/intervals.py).
"""

import contextlib
import gc
import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from datasets.utils.logging import disable_progress_bar
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from pydantic import Field, PositiveInt, model_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages import params
from stages.artifacts import complete_file, complete_folder, open_parquet, write_json
from stages.console import UserError, run_stage
from stages.constraints import SEEN_KINDS
from stages.gguf import GgufModel
from stages.intervals import paired_gain
from stages.model import load, set_determinism
from stages.scoring import ChatModel, GgufChat, HuggingFaceChat
from stages.tokenize import answer_ids, prompt_ids
from stages.verifiers import is_looping

BASE, MERGED, GGUF = Path("models/base"), Path("models/merged"), Path("models/gguf")
SUBSET, OUTPUT, TASKS = Path("data/subset"), Path("data/evaluation"), Path(__file__).parent / "tasks"
NEEDED = {"instructions": Path("data/raw/questions.parquet"), "plain": Path("data/raw/plain.jsonl")}
SEEN = {kind.name for kind in SEEN_KINDS}
Answers = list[dict[str, Any]]


class EvaluateSettings(params.Settings):
    """What is asked, of which split, and how it is batched; batches stay fixed because scores move with them."""

    split: Literal["validation", "test"]
    tasks: Annotated[list[Literal["instructions", "preference", "plain"]], Field(min_length=1)]
    types: list[str]
    max_new_tokens: PositiveInt
    batch_size: PositiveInt
    slots: Annotated[int, Field(ge=2)]  # both answers of a pair are scored together
    context: PositiveInt
    divergence_pairs: PositiveInt
    threads: PositiveInt

    @model_validator(mode="after")
    def _answers_fit(self) -> "EvaluateSettings":
        if self.max_new_tokens >= self.context:
            raise ValueError(
                f"`max_new_tokens` ({self.max_new_tokens}) leaves no room for a prompt in `context` ({self.context})"
            )
        return self


class Params(params.Params):
    """Parameters of evaluate."""

    evaluate: EvaluateSettings


@contextlib.contextmanager
def opened(name: str, settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase) -> Iterator[ChatModel]:
    """The model of this name, ready for lm-eval: base and merged by Transformers in bfloat16, the others by llama.cpp."""
    if name in ("base", "merged"):
        yield HuggingFaceChat(
            load(BASE if name == "base" else MERGED, torch.bfloat16),
            tokenizer,
            settings.max_new_tokens,
            settings.batch_size,
        )
    else:
        path = GGUF / f"{name}.gguf"
        with GgufModel(path, settings.threads, settings.slots, settings.context, share_beginning=True) as model:
            yield GgufChat(model, tokenizer, settings.max_new_tokens)


def run_tasks(model: ChatModel, settings: EvaluateSettings) -> dict[str, Answers]:
    """lm-eval's logged samples of every task, in the order of the documents."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"split": settings.split})
    results = simple_evaluate(
        model=model,
        tasks=list(settings.tasks),
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in results["samples"].items()}


def grade_answers(samples: Answers, finished: list[bool]) -> Answers:
    """The rows of data/evaluation/NAME.jsonl: one a question."""
    rows = []
    for sample, is_finished in zip(samples, finished, strict=True):
        doc, answer = sample["doc"], sample["filtered_resps"][0]
        rows.append(
            {
                "id": doc["id"],
                "topic": doc["topic"],
                "kind": doc["kind"],
                "seen": doc["kind"] in SEEN,
                "question": doc["question"],
                "answer": answer,
                "strict": bool(sample["strict"]) and is_finished,
                "grade": sample["grade"] if is_finished else 0.0,
                "finished": is_finished,
            }
        )
    return rows


def mean(values: list[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def strict_summary(rows: Answers) -> dict[str, Any]:
    """Strict accuracy of seen and unseen kinds, every kind weighted equally, and of each kind."""
    by_kind: dict[str, dict[str, Any]] = {}
    for kind in sorted({row["kind"] for row in rows}):
        found = [float(row["strict"]) for row in rows if row["kind"] == kind]
        by_kind[kind] = {"accuracy": mean(found), "n": len(found), "seen": kind in SEEN}
    parts = {}
    for name, seen in (("seen", True), ("unseen", False)):
        chosen = [entry for entry in by_kind.values() if entry["seen"] is seen]
        parts[name] = {
            "accuracy": mean([entry["accuracy"] for entry in chosen]),
            "n": sum(entry["n"] for entry in chosen),
        }
    return {**parts, "by_kind": by_kind}


def failures(rows: Answers) -> dict[str, int]:
    """How many answers fail whatever was asked."""
    return {
        "empty": sum(not row["answer"] for row in rows),
        "looping": sum(is_looping(row["answer"]) and row["kind"] != "repeat" for row in rows),
        "unfinished": sum(not row["finished"] for row in rows),
    }


def perplexity(samples: Answers, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """exp of the mean negative log-likelihood a token, end tokens included, over all plain answers together."""
    tokens = sum(len(answer_ids(tokenizer, sample["doc"]["question"], sample["doc"]["answer"])) for sample in samples)
    total = sum(sample["log_likelihood"] for sample in samples)
    return {"value": math.exp(-total / tokens), "tokens": tokens, "answers": len(samples)}


def evaluate_model(
    name: str, settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], Answers]:
    """All tasks on one model: (data/evaluation/NAME.json and, as `pairs`, what it is counted from; rows of NAME.jsonl)."""
    with opened(name, settings, tokenizer) as model:
        samples = run_tasks(model, settings)
        finished = model.finished
    gc.collect()
    summary: dict[str, Any] = {"model": name}
    rows: Answers = []
    if "instructions" in samples:
        rows = grade_answers(samples["instructions"], finished)
        summary |= {"strict": strict_summary(rows), "failures": failures(rows)}
    if "preference" in samples:
        right = [float(sample["acc"]) for sample in samples["preference"]]
        summary["preference"] = {"accuracy": mean(right), "n": len(right)}
        summary["pairs"] = [
            {
                "topic": sample["doc"].get("topic", str(sample["doc_id"])),
                "right": float(sample["acc"]),
                "log_likelihoods": [resp[0] for resp in sample["filtered_resps"]],
            }
            for sample in samples["preference"]
        ]
    if "plain" in samples:
        summary["perplexity"] = perplexity(samples["plain"], tokenizer)
    return summary, rows


def reward_accuracy(tuned: Answers, base: Answers) -> float | None:
    """Share of pairs whose chosen answer gained more log-likelihood over the base than the rejected one (DPO's implicit reward)."""
    right = []
    for pair, pair_base in zip(tuned, base, strict=True):
        chosen, rejected = (
            new - old for new, old in zip(pair["log_likelihoods"], pair_base["log_likelihoods"], strict=True)
        )
        right.append(float(chosen > rejected))
    return mean(right)


def preference_gain(after: Answers, before: Answers) -> dict[str, float | int] | None:
    """The paired gain in preference accuracy, clustered by topic, or by pair where the data has no topics."""
    rows = [("pair", new["topic"], old["right"], new["right"]) for old, new in zip(before, after, strict=True)]
    return paired_gain(rows) if rows else None


def compare(after: Answers, before: Answers, against: str) -> dict[str, Any]:
    """Paired gains of one model over another, in points with 95 % intervals: seen kinds, unseen kinds, each kind."""
    rows = [
        (new["kind"], new["topic"], float(old["strict"]), float(new["strict"]))
        for old, new in zip(before, after, strict=True)
    ]
    seen, unseen = ([row for row in rows if (row[0] in SEEN) is wanted] for wanted in (True, False))
    kinds = sorted({row[0] for row in rows})
    return {
        "against": against,
        "strict": paired_gain(seen) if seen else None,
        "unseen": paired_gain(unseen) if unseen else None,
        "by_kind": {kind: paired_gain([row for row in rows if row[0] == kind]) for kind in kinds},
    }


def divergences(settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float | int]]:
    """Mean KL(merged in float32 || other) in nats a token, and top-1 agreement, over the chosen answers of held-out pairs."""
    with open_parquet(SUBSET / f"{settings.split}.parquet") as file:
        pairs = file.read(columns=["question", "chosen"]).slice(0, settings.divergence_pairs).to_pylist()
    prompts = [prompt_ids(tokenizer, row["question"]) for row in pairs]
    answers = [[answer_ids(tokenizer, row["question"], row["chosen"])] for row in pairs]

    exact = load(MERGED, torch.float32)
    reference = HuggingFaceChat(exact, tokenizer, settings.max_new_tokens, settings.batch_size)
    expected = {i: rows.cpu() for i, (rows,) in reference.logits_of(prompts, answers)}
    del exact, reference
    result = {}
    for name in ("hf_bf16", *settings.types):
        with opened("merged" if name == "hf_bf16" else name, settings, tokenizer) as model:
            found = model.logits_of(prompts, answers)
            result[name] = divergence((expected[i], rows.float().cpu()) for i, (rows,) in found)
        gc.collect()
    return result


def divergence(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float | int]:
    """Mean KL(left || right) over the rows of pairs of (tokens, vocabulary) logits, and how often the likeliest token agrees."""
    total, agreed, tokens = 0.0, 0, 0
    for left, right in pairs:
        p, q = left.log_softmax(dim=-1), right.log_softmax(dim=-1)
        total += float((p.exp() * (p - q)).sum(dim=-1).double().sum())
        agreed += int((left.argmax(dim=-1) == right.argmax(dim=-1)).sum())
        tokens += len(left)
    return {"mean_kl": total / tokens, "top1_agreement": agreed / tokens, "tokens": tokens}


def main() -> None:
    settings = params.load(Params).evaluate
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
    set_determinism(settings.threads)
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    names = ["base", "merged", *settings.types]
    for task, file in NEEDED.items():
        if task in settings.tasks and not file.is_file():
            raise UserError(f"{file}: no such file, which the task {task} asks; take it out of `evaluate.tasks`")
    for name in settings.types:
        if not (GGUF / f"{name}.gguf").is_file():
            raise UserError(
                f"params.yaml: `evaluate.types` names {name}, which is not in {GGUF}; add it to `quantize.types`"
            )
    summaries, rows = {}, {}
    for name in names:
        print(f"evaluating {name}", flush=True)
        summaries[name], rows[name] = evaluate_model(name, settings, tokenizer)
    pairs = {name: summaries[name].pop("pairs", []) for name in names}
    comparison = {}
    for name in names[1:]:
        against = "base" if name == "merged" else "merged"
        comparison[name] = compare(rows[name], rows[against], against)
        comparison[name]["preference"] = preference_gain(pairs[name], pairs[against])
        if pairs[name]:
            summaries[name]["preference"]["reward_accuracy"] = reward_accuracy(pairs[name], pairs["base"])
    apart = divergences(settings, tokenizer)
    with complete_folder(OUTPUT) as target:
        for name in names:
            write_json(target / f"{name}.json", summaries[name])
            with complete_file(target / f"{name}.jsonl") as path:
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]))
        write_json(target / "comparison.json", comparison)
        write_json(target / "divergence.json", apart)


if __name__ == "__main__":
    run_stage("evaluate", main)
