"""Stage evaluate: base, merged and every smaller file on the same held-out tasks -> data/evaluation.

Asked are strict instruction accuracy over greedy answers, which is a task of lm-eval (hermes/evaluation/tasks/instructions.yaml),
preference accuracy on held-out pairs, and the log-likelihood of plain answers. The latter two go by the ids that training would make of
them. Beside them, over full distributions, is the divergence of each file (and of bfloat16) from the merged weights run in float32. An
answer that reaches the token limit is unfinished and fails. All questions meet all models, so every comparison is paired
(hermes/evaluation/intervals.py).

Benchmark suites (hermes/evaluation/suites.py) come first: they are long, need the network, and go on where a killed run stopped.
Their results stay in .scratch/suites, so that another suite or GGUF type costs only itself.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from datasets.utils.logging import disable_progress_bar
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hermes import params
from hermes.artifacts import check_together, complete_file, complete_folder, read_json, write_json
from hermes.bits import Bits
from hermes.console import UserError, say
from hermes.evaluation import evidence, general, suites
from hermes.evaluation.chat_models import ChatModel, HuggingFaceChat, opened, score
from hermes.evaluation.greedy import Ids
from hermes.evaluation.held_out import HeldOut, read_held_out
from hermes.evaluation.intervals import paired_gain, ratio_interval
from hermes.evaluation.suites import Opener
from hermes.evaluation.vllm_chat import written_by_vllm
from hermes.instructions.kinds import SEEN_KINDS
from hermes.instructions.verifiers import is_looping
from hermes.model.adapter_merge import Merger
from hermes.model.base import as_computed, compute_type, load, load_base, load_config, release, set_determinism
from hermes.model.gguf import GgufModel
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_stage
from hermes.settings.base import BaseSettings
from hermes.settings.compress import Method
from hermes.settings.evaluate import EvaluateSettings
from hermes.settings.quantize import GGUF_TYPES
from hermes.settings.train import Beta
from hermes.training import distributed

RAW, SUBSET, ADAPTER = Path("data/raw"), Path("data/subset"), Path("models/adapter")
BASE, MERGED = Path("models/base"), Path("models/merged")
GGUF, COMPRESSED = Path("models/gguf"), Path("models/compressed")
OUTPUT, TASKS = Path("data/evaluation"), Path(__file__).parent.parent / "hermes/evaluation/tasks"
SEEN = {kind.name for kind in SEEN_KINDS}
Answers = list[dict[str, Any]]


class Params(params.Params):
    """Parameters of evaluate."""

    bits: Bits
    beta: Beta
    base: BaseSettings
    evaluate: EvaluateSettings


def path_of(name: str) -> Path:
    """The folder or the file of the model of this name."""
    whole = {"base": BASE, "merged": MERGED} | {method: COMPRESSED / method for method in get_args(Method)}
    return whole.get(name, GGUF / f"{name}.gguf")


def check_context(folder: Path, context: int) -> None:
    """Refuses suites whose prompts may reach beyond the positions that a model was made for. lm-eval would cut them there.

    Raises:
        UserError: gives both lengths.
    """
    positions = getattr(load_config(folder).get_text_config(), "max_position_embeddings", None)
    if positions and context > positions:
        raise UserError(
            f"params.yaml: `evaluate.context` is {context}, and {folder} has {positions} positions (`max_position_embeddings`); lower it"
        )


def asked_files(settings: EvaluateSettings) -> list[str]:
    """The smaller files that are evaluated beside base and merged, from the largest GGUF on.

    Raises:
        UserError: one was not made.
    """
    made = [*read_json(GGUF / "quantize.json")["files"], *read_json(COMPRESSED / "compress.json")["files"]]
    if settings.types == "all":
        return sorted({*made} - {"f16"}, key=[*GGUF_TYPES, *get_args(Method)].index)
    for name in settings.types:
        if name not in made:
            raise UserError(
                f"params.yaml: `evaluate.types` names {name}, which was not made; add it to `quantize.types` or `compress.methods`"
            )
    return list(settings.types)


def write_answers(model: ChatModel, settings: EvaluateSettings) -> Answers:
    """lm-eval's logged samples of the instructions, in the order of the documents."""
    metadata = {"split": settings.split, "questions_per_kind": settings.questions_per_kind}
    results = simple_evaluate(
        model=model,
        tasks=["instructions"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata),
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    return sorted(results["samples"]["instructions"], key=lambda sample: sample["doc_id"])


def grade_answers(samples: Answers, model: ChatModel) -> Answers:
    """The rows of data/evaluation/NAME.jsonl, one a question, of a model that has just answered."""
    return [
        {name: sample["doc"][name] for name in ("id", "topic", "kind")}
        | {
            "seen": sample["doc"]["kind"] in SEEN,
            "question": sample["doc"]["question"],
            "answer": sample["filtered_resps"][0],
            "strict": bool(sample["strict"]) and is_finished,
            "grade": sample["grade"] if is_finished else 0.0,
            "finished": is_finished,
            "tokens": tokens,
        }
        for sample, is_finished, tokens in zip(samples, model.finished, model.lengths, strict=True)
    ]


def share_suites(settings: EvaluateSettings) -> None:
    """Has several processes ask the suites, a GPU each; what they have asked is then found in the scratch.

    Raises:
        UserError: there are fewer GPUs, or one of the processes failed.
    """
    if 0 < (gpus := torch.cuda.device_count()) < settings.processes:
        raise UserError(
            f"params.yaml: `evaluate.processes` is {settings.processes}, but {gpus} CUDA device(s) are here; lower it to {gpus} at most"
        )
    distributed.launch(settings.processes, "ddp", settings.threads, "stages.evaluate")


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


def perplexity(model: ChatModel, plain: HeldOut) -> dict[str, Any]:
    """exp of the mean negative log-likelihood a token, end tokens included, over all plain answers together."""
    tokens = sum(len(answer) for answers in plain.answers for answer in answers)
    total = sum(found[0][0] for found in model.scores_of(plain.prompts, plain.answers))
    return {"value": math.exp(-total / tokens), "tokens": tokens, "answers": len(plain.rows)}


def topic_of(row: dict[str, Any], number: int) -> str:
    """What a held-out row is about, by which intervals are clustered; its number where the data does not say."""
    return str(number if row.get("topic") is None else row["topic"])


def preferences(model: ChatModel, pairs: HeldOut) -> Answers:
    """Of each pair whether the chosen answer is the likelier one, and the log-likelihoods of both in nats, end tokens included."""
    scores = model.scores_of(pairs.prompts, pairs.answers)
    return [
        {
            "topic": topic_of(row, number),
            "right": float(chosen > rejected),
            "log_likelihoods": [chosen, rejected],
        }
        for number, (row, ((chosen, _), (rejected, _))) in enumerate(zip(pairs.rows, scores, strict=True))
    ]


def evaluate_model(
    name: str,
    settings: EvaluateSettings,
    open_model: Opener,
    held_out: dict[str, HeldOut],
    exact: "Exact | None",
) -> tuple[dict[str, Any], Answers, dict[str, Any]]:
    """All that one model is asked while it is loaded once.

    Returns:
        data/evaluation/NAME.json and, as `pairs`, what it is counted from; the rows of NAME.jsonl; and how far it is from `exact`, the
        merged model in float32, which is empty without one and for the base.
    """
    summary: dict[str, Any] = {"model": name}
    rows: Answers = []
    with open_model(path_of(name)) as model:
        if "instructions" in settings.tasks:
            rows = grade_answers(write_answers(model, settings), model)
            summary |= {"strict": strict_summary(rows), "failures": failures(rows)}
        if "preference" in settings.tasks:
            summary["pairs"] = preferences(model, held_out["preference"])
            right = [pair["right"] for pair in summary["pairs"]]
            summary["preference"] = {"accuracy": mean(right), "n": len(right)}
        if "plain" in settings.tasks:
            summary["perplexity"] = perplexity(model, held_out["plain"])
        if "general" in settings.tasks and name in ("base", "merged"):
            summary["general"] = general.ask(model, settings.context)
        apart = exact.divergence(model) if exact and name != "base" else {}
    return summary, rows, apart


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


@dataclass(frozen=True)
class Exact:
    """The merged model in float32 on the chosen answers of held-out pairs: logits (answer tokens, vocabulary) by the pair's number."""

    topics: list[str]
    prompts: list[Ids]
    answers: list[list[Ids]]
    logits: dict[int, torch.Tensor]

    @classmethod
    def of(cls, settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase, pairs: HeldOut) -> "Exact":
        """Computes them; the model is gone afterwards."""
        prompts, answers = pairs.first(settings.divergence_pairs, answers=1)
        model = load(MERGED, torch.float32)
        chat = HuggingFaceChat(model, tokenizer, settings.max_new_tokens, settings.batch_size)
        logits = {i: rows.cpu() for i, (rows,) in chat.logits_of(prompts, answers)}
        del model, chat
        release()
        return cls([topic_of(row, i) for i, row in enumerate(pairs.rows[: len(prompts)])], prompts, answers, logits)

    def divergence(self, model: ChatModel) -> dict[str, Any]:
        """Mean KL(merged in float32 || model) in nats a token with its interval, top-1 agreement, and what both are sums of, by pair."""
        parts = {
            i: divergence([(self.logits[i], rows.float().cpu())])
            for i, (rows,) in model.logits_of(self.prompts, self.answers)
        }
        by_topic = [
            (self.topics[i], found["mean_kl"] * found["tokens"], int(found["tokens"]))
            for i, found in sorted(parts.items())
        ]
        spread, tokens = ratio_interval(by_topic), sum(count for *_, count in by_topic)
        agreed = sum(found["top1_agreement"] * found["tokens"] for found in parts.values())
        return {
            "mean_kl": spread["mean"],
            "low": spread["low"],
            "high": spread["high"],
            "top1_agreement": round(agreed) / tokens,
            "tokens": tokens,
            "by_topic": by_topic,
        }


def faithfulness(loaded: Params, tokenizer: PreTrainedTokenizerBase, pairs: HeldOut) -> dict[str, dict[str, Any]]:
    """How the adapter's merge onto each base differs from the model as it was trained, the adapter on the base in its training type.

    Over both answers of held-out pairs: the divergence as above; the mean difference of the preference margins, log p(chosen) -
    log p(rejected) in nats; and the share of pairs that both prefer alike. `rounding` is what stages/merge.py says of the merge.
    """
    settings, base = loaded.evaluate, as_computed(loaded.base, loaded.bits)
    prompts, answers = pairs.first(settings.divergence_pairs, answers=2)

    def logits(model: Any) -> Iterator[tuple[int, list[torch.Tensor]]]:
        chat = HuggingFaceChat(model, tokenizer, settings.max_new_tokens, settings.batch_size)
        return ((i, [rows.cpu() for rows in both]) for i, both in chat.logits_of(prompts, answers))

    def margin(i: int, both: list[torch.Tensor]) -> float:
        (chosen, _), (rejected, _) = (score(rows, ids) for rows, ids in zip(both, answers[i], strict=True))
        return chosen - rejected

    trained = PeftModel.from_pretrained(load_base(BASE, base), str(ADAPTER), local_files_only=True)
    expected = dict(logits(trained.get_base_model()))
    del trained
    release()

    def compared(model: Any, margins: list[tuple[float, float]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i, both in logits(model):
            margins.append((margin(i, both), margin(i, expected[i])))
            yield from zip(expected[i], (rows.float() for rows in both), strict=True)

    result: dict[str, dict[str, Any]] = {}
    for onto in ("bf16", "nf4") if loaded.base.quantization == "nf4" else ("bf16",):
        merger = Merger(BASE, ADAPTER, onto, base)
        model = load(BASE, compute_type(loaded.bits))
        for stored in merger.tensors:
            if (weight := merger.weight(stored)) is not None:
                model.get_parameter(stored.name).data.copy_(weight)
        margins: list[tuple[float, float]] = []
        result[onto] = divergence(compared(model, margins)) | {
            "margin_difference": sum(abs(ours - theirs) for ours, theirs in margins) / len(margins),
            "preferred_alike": sum((ours > 0) == (theirs > 0) for ours, theirs in margins) / len(margins),
            "rounding": merger.rounding.summary(),
        }
        del model
        release()
    return result


def divergence(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float | int]:
    """Mean KL(left || right) over the rows of pairs of (tokens, vocabulary) logits, and how often the likeliest token agrees."""
    total, agreed, tokens = 0.0, 0, 0
    for left, right in pairs:
        p, q = left.float().log_softmax(dim=-1), right.log_softmax(dim=-1)
        total += float((p.exp() * (p - q)).sum(dim=-1).double().sum())
        agreed += int((left.argmax(dim=-1) == right.argmax(dim=-1)).sum())
        tokens += len(left)
    return {"mean_kl": total / tokens, "top1_agreement": agreed / tokens, "tokens": tokens}


def main() -> None:
    loaded = params.load(Params)
    settings = loaded.evaluate
    check_together(RAW, SUBSET, BASE, ADAPTER, MERGED, GGUF, COMPRESSED)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
    set_determinism(settings.threads)  # in each of several processes, since bits may depend on it
    if distributed.is_launched() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if settings.suites:
        check_context(BASE, settings.context)
    tokenizer = load_tokenizer(MERGED)
    paths = {name: path_of(name) for name in ("base", "merged", *asked_files(settings))}
    for path in paths.values():
        if path.suffix == ".gguf":  # a damaged one is found before hours of others
            with GgufModel(path, threads=1, weights=False):
                pass
    held_out = read_held_out(settings, tokenizer)
    dtype = compute_type(loaded.bits)
    open_model = partial(opened, batching=settings, tokenizer=tokenizer, dtype=dtype)
    on_vllm = partial(written_by_vllm, batching=settings, tokenizer=tokenizer, dtype=dtype)
    engine = (open_model, paths, on_vllm if settings.engine == "vllm" else None)
    if settings.suites and settings.processes > 1:
        if distributed.is_launched():
            suites.ask(settings, dtype, *engine, (int(os.environ["RANK"]), settings.processes))
            return
        share_suites(settings)
    folders = suites.ask(settings, dtype, *engine)
    names, compared = [*paths], settings.divergence_pairs > 0
    exact = Exact.of(settings, tokenizer, held_out["preference"]) if compared else None
    summaries, rows, apart = {}, {}, {}
    for name in names:
        say(f"evaluating {name}")
        summaries[name], rows[name], apart[name] = evaluate_model(name, settings, open_model, held_out, exact)
    del exact
    pairs = {name: summaries[name].pop("pairs", []) for name in names}
    asked = {name: summaries[name].pop("general", None) for name in ("base", "merged")}
    beside = {
        "answers": evidence.answers(rows["base"], rows["merged"]),
        "margins": evidence.margins(pairs["base"], pairs["merged"], loaded.beta),
        "general": general.compare(asked["base"], asked["merged"]) if asked["base"] and asked["merged"] else None,
    }
    comparison = {}
    for name in names[1:]:
        against = "base" if name == "merged" else "merged"
        comparison[name] = compare(rows[name], rows[against], against)
        comparison[name]["preference"] = preference_gain(pairs[name], pairs[against])
        if pairs[name]:
            summaries[name]["preference"]["reward_accuracy"] = reward_accuracy(pairs[name], pairs["base"])
    faithful = faithfulness(loaded, tokenizer, held_out["preference"]) if compared else {}
    with complete_folder(OUTPUT) as target:
        for name in names:
            write_json(target / f"{name}.json", summaries[name])
            with complete_file(target / f"{name}.jsonl") as path:
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]))
        write_json(target / "comparison.json", comparison)
        write_json(target / "evidence.json", beside)
        write_json(target / "pairs.json", pairs)
        measured = {{"merged": "hf_bf16"}.get(name, name): found for name, found in apart.items() if found}
        write_json(target / "divergence.json", measured)
        if folders:
            suites.write(settings, folders, target)
        write_json(target / "merge.json", faithful | {"rounding": read_json(MERGED / "merge.json")})


if __name__ == "__main__":
    run_stage("evaluate", main)
