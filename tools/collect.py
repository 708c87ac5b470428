"""Makes data/embedded: preference pairs in the Hermes schema out of the embedded model's own answers. Run by `make collect`.

For every question (a topic and a checkable instruction) the model answers a few times as it is, and a few times after one worked
example of the same instruction about a subject outside the topics. The example is only in the prompt of the sampling: what is
kept is the question alone, so that training has to teach what the example showed. Verifiers grade the answers
(hermes/instructions/kinds.py); the chosen answer is among those within `tie_margin` of the best, the rejected any that fails, and those
two are taken whose lengths are nearest, so that length tells little and near misses are met. For `contrast_share` of the questions the
rejected answer follows another instruction about the same topic instead, so that no form is good in itself: what is chosen
under one instruction is rejected under another. Plain questions about each training topic, without an instruction, borrow both answers:
plain prose is chosen, an answer in some other form rejected. Where no answer follows the instruction, the best one is repaired
deterministically and serves as chosen. `delta_score` is the grade of chosen less the grade of rejected.

Sampling goes chunk by chunk into a scratch folder and resumes after an interruption. Every sequence draws from a generator seeded
by its question, and chunks are independent, so a chunk can be sampled again alone: same bits on one kind of CPU.
Written: samples.parquet (all that was sampled), {train,validation,test}.parquet, questions.parquet (the held-out
questions), plain.jsonl (held-out plain answers, written by hand, only read here) and card.json.
"""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, cast

import llama_cpp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes import params
from hermes.artifacts import complete_file, sha256_file, write_json, write_parquet
from hermes.console import UserError, progress
from hermes.instructions.kinds import KINDS, PLAIN, SEEN_KINDS, UNSEEN_KINDS, VALIDATION_KINDS, grade, is_strict, repair
from hermes.instructions.topics import split_topics
from hermes.instructions.verifiers import words
from hermes.model.gguf import GgufModel
from hermes.model.gguf_files import convert
from hermes.run import run_stage
from hermes.settings.untracked import CollectSettings

EMBEDDED = Path("data/embedded")
SCRATCH = Path(".scratch/collect")
BASE = Path("models/base")
COPIED_WORDS = 5
PLAIN_QUESTIONS = 2
TOP_K = 50
WAVES = sorted({kind.wave for kind in KINDS.values()})

DEMONSTRATIONS = {
    "paper planes": "A paper plane is a toy that is folded from one sheet. "
    "Children throw it and watch it glide. A sharp nose makes it fly straight.",
    "toast": "Toast is bread that was browned by heat. It tastes warm and crunchy. People eat it with butter or jam.",
    "sandcastles": "A sandcastle is built from wet sand near the sea. "
    "Children shape its towers with buckets. The next tide washes it away.",
    "bus tickets": "A bus ticket shows that a passenger has paid. "
    "It is often a small slip of paper. Many towns now sell it on a phone.",
    "pencils": "A pencil holds a thin stick of graphite inside wood. "
    "It leaves gray marks that can be erased. Artists like its soft lines.",
    "doorbells": "A doorbell tells people that a guest is waiting outside. "
    "Old ones were pulled by a string. Most ring when a button is pressed.",
    "blankets": "A blanket keeps a person warm at night. It traps air between its threads. Some are knitted by hand.",
    "lemonade": "Lemonade is a sour and sweet drink. "
    "It is made from lemons and cold water. Children like to sell it on hot days.",
}
Row = dict[str, Any]


class Params(params.Params):
    """Parameters of `make collect`."""

    seed: int
    collect: CollectSettings


def build_questions(settings: CollectSettings) -> list[Row]:
    """All questions in a fixed order: id, split, topic, kind, verifier parameters as JSON, and text.

    A training topic meets every seen kind and `PLAIN_QUESTIONS` plain questions. A held-out topic meets half of the kinds of
    each wave, its split's unseen ones included, so that many topics carry the same number of questions of each kind.
    """
    rows: list[Row] = []
    extra = {"test": UNSEEN_KINDS, "validation": VALIDATION_KINDS, "train": (PLAIN,) * PLAIN_QUESTIONS}
    for split, topics in split_topics().items():
        kinds = [*SEEN_KINDS, *extra[split]]
        waves = [[kind.name for kind in kinds if kind.wave == wave] for wave in WAVES]
        for number, topic in enumerate(topics if split != "train" else topics[: settings.topics]):
            asked = [name for wave in waves for name in (wave if split == "train" else wave[number % 2 :: 2])]
            for i, name in enumerate(asked):
                key = f"{split}/{topic}/{name}" + (f"/{asked[:i].count(name) + 1}" if name in asked[:i] else "")
                question, verifier = KINDS[name].ask(Random(key), topic)
                rows.append(
                    {
                        "id": key,
                        "split": split,
                        "topic": topic,
                        "kind": name,
                        "constraint": json.dumps(verifier, sort_keys=True),
                        "question": question,
                    }
                )
    return rows


def demonstration(question: Row, seed: int) -> list[dict[str, str]]:
    """One worked example of the question's instruction, as two chat messages about another subject."""
    random = Random(f"{seed}/{question['id']}/demonstration")
    subject = random.choice(sorted(DEMONSTRATIONS))
    text, verifier = KINDS[question["kind"]].ask(random, subject)
    answer = repair(question["kind"], DEMONSTRATIONS[subject], verifier)
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def sample_chunk(
    questions: list[Row], model: GgufModel, tokenizer: PreTrainedTokenizerBase, settings: CollectSettings, seed: int
) -> list[Row]:
    """Samples every answer of a chunk of questions; rows of id, sample, demonstrated, finished, answer."""
    prompts, samples, draws, rows = [], [], [], []
    for question in questions:
        for demonstrated in (False, True):
            messages = demonstration(question, seed) if demonstrated else []
            messages = [*messages, {"role": "user", "content": question["question"]}]
            prompts.append(
                cast(list[int], tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
            )
            samples.append(settings.demonstrated_samples if demonstrated else settings.samples)
            for sample in range(samples[-1]):
                key = f"{seed}/{question['id']}/{demonstrated}/{sample}"
                state = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
                draws.append(np.random.default_rng(state).random(settings.max_new_tokens, dtype=np.float32))
                rows.append({"id": question["id"], "sample": sample, "demonstrated": demonstrated})
    uniform = torch.from_numpy(np.stack(draws))

    def pick(logits: torch.Tensor, sequences: list[int], steps: list[int]) -> list[int]:
        values, tokens = logits.topk(TOP_K, dim=-1)
        cumulative = (values / settings.temperature).softmax(dim=-1).cumsum(dim=-1)
        chosen = torch.searchsorted(cumulative, uniform[sequences, steps].unsqueeze(1)).clamp(max=TOP_K - 1)
        return tokens.gather(1, chosen).squeeze(1).tolist()

    answers = model.generate(prompts, settings.max_new_tokens, pick, samples)
    for row, ids in zip(rows, answers, strict=True):
        row["finished"] = ids[-1] == model.end
        row["answer"] = str(tokenizer.decode(ids[:-1] if row["finished"] else ids, skip_special_tokens=True)).strip()
    return rows


def copies(answer: str, demonstrated: str) -> bool:
    """Whether an answer repeats five words in a row of the worked example it was shown."""
    runs = [[word.lower() for word in words(text)] for text in (answer, demonstrated)]
    grams = [set(zip(*(run[i:] for i in range(COPIED_WORDS)), strict=False)) for run in runs]
    return bool(grams[0] & grams[1])


def usable_answers(question: Row, samples: list[Row], seed: int) -> list[str]:
    """The distinct answers of a question that may enter a pair: finished, not empty, not copied from the worked example."""
    kind, example = question["kind"], demonstration(question, seed)[1]["content"]
    return list(
        dict.fromkeys(
            row["answer"]
            for row in samples
            if row["finished"]
            and row["answer"]
            and not (row["demonstrated"] and KINDS[kind].free_text and copies(row["answer"], example))
        )
    )


def build_pair(question: Row, answers: list[str], contrast: list[str], settings: CollectSettings) -> Row | str:
    """The preference pair of one question, or the reason why there is none (module docstring: the rule).

    `answers` are the question's own; where `contrast` is not empty the rejected answer is one of these.
    """
    kind, verifier = question["kind"], json.loads(question["constraint"])
    if not answers:
        return "no finished answer"
    grades = {answer: grade(kind, answer, verifier) for answer in answers}
    failing = [answer for answer in answers if not is_strict(kind, answer, verifier)]
    rejectable = contrast or failing
    if not rejectable:
        return "every answer follows the instruction"
    passing = {answer: value for answer, value in grades.items() if answer not in failing}
    repaired = not passing
    if repaired:
        fixed = first_repair(kind, sorted(answers, key=lambda answer: (-grades[answer], answer)), verifier)
        if fixed is None:
            return "no answer follows the instruction or can be repaired"
        passing = {fixed: grade(kind, fixed, verifier)}
    acceptable = [answer for answer, value in passing.items() if value >= max(passing.values()) - settings.tie_margin]
    chosen, rejected = min(
        ((good, bad) for good in acceptable for bad in rejectable),
        key=lambda pair: (abs(len(pair[0]) - len(pair[1])), pair),
    )
    return {
        "question": question["question"],
        "chosen": chosen,
        "rejected": rejected,
        "delta_score": round(passing[chosen] - grade(kind, rejected, verifier), 4),
        "id": question["id"],
        "topic": question["topic"],
        "kind": kind,
        "constraint": question["constraint"],
        "repaired": repaired,
        "contrast": bool(contrast),
    }


def contrasting_answers(question: Row, neighbours: list[tuple[Row, list[str]]], random: Random) -> list[str]:
    """Answers that follow another instruction about the same topic, drawn at random, and fail this one; may be empty.

    `neighbours` are the other questions about the topic with their usable answers. Prose is contrasted with prose only, since a
    word list or a single word would be too easy to reject.
    """
    kind, verifier = question["kind"], json.loads(question["constraint"])
    found = []
    for other, answers in neighbours:
        followed = json.loads(other["constraint"])
        fitting = [
            answer
            for answer in answers
            if is_strict(other["kind"], answer, followed) and not is_strict(kind, answer, verifier)
        ]
        if fitting and KINDS[other["kind"]].free_text >= KINDS[kind].free_text:
            found.append(fitting)
    return random.choice(found) if found else []


def first_repair(kind: str, answers: list[str], verifier: Row) -> str | None:
    """The repair of the first answer that has one; a looping answer, for one, has none."""
    for answer in answers:
        with contextlib.suppress(ValueError):
            return repair(kind, answer, verifier)
    return None


def build_splits(
    questions: list[Row], samples: Iterable[Row], settings: CollectSettings, seed: int
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Grades and pairs all samples: ({split: rows sorted by delta_score descending, then id}, reasons for no pair)."""
    by_question: dict[str, list[Row]] = {question["id"]: [] for question in questions}
    for row in samples:
        by_question[row["id"]].append(row)
    answers = {question["id"]: usable_answers(question, by_question[question["id"]], seed) for question in questions}
    by_topic: dict[tuple[str, str], list[Row]] = {}
    for question in questions:
        by_topic.setdefault((question["split"], question["topic"]), []).append(question)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    reasons: Counter[str] = Counter()
    for question in questions:
        random, contrast, own = Random(f"{seed}/{question['id']}/contrast"), [], answers[question["id"]]
        others = [other for other in by_topic[question["split"], question["topic"]] if other is not question]
        if question["kind"] == PLAIN.name:
            own = [text for other in others if KINDS[other["kind"]].free_text for text in answers[other["id"]]]
        if random.random() < settings.contrast_share or question["kind"] == PLAIN.name:
            contrast = contrasting_answers(question, [(other, answers[other["id"]]) for other in others], random)
        pair = build_pair(question, own, contrast, settings)
        if isinstance(pair, str):
            reasons[f"{question['split']}: {pair}"] += 1
        else:
            splits[question["split"]].append(pair)
    for rows in splits.values():
        rows.sort(key=lambda row: (-row["delta_score"], row["id"]))
    return splits, reasons


def leakage(rows: list[Row]) -> dict[str, float]:
    """How well shallow signs tell chosen from rejected, learnt on every second pair: the share of the other pairs guessed right.

    `length` guesses that the shorter, or the longer, answer is chosen, whichever is more often so in all pairs, and
    `length_by_kind` in those of the same kind; `words` asks a bag-of-words naive Bayes classifier which answer looks more
    like a chosen one, and `words_repaired` is that on the pairs whose chosen answer is a repair. 0.5 is chance.
    """
    rows = sorted(rows, key=lambda row: row["id"])
    learnt, asked = rows[::2], rows[1::2]
    by_words = word_guesses(learnt, asked)
    return {
        "length": mean(length_guesses(learnt, asked, lambda row: "")),
        "length_by_kind": mean(length_guesses(learnt, asked, lambda row: row["kind"])),
        "words": mean(by_words),
        "words_repaired": mean([guess for guess, row in zip(by_words, asked, strict=True) if row["repaired"]]),
    }


def mean(values: list[float]) -> float:
    """The mean to four digits."""
    return round(fmean(values), 4)


def length_guesses(learnt: list[Row], asked: list[Row], group: Callable[[Row], str]) -> list[float]:
    """For each asked pair 1 where the longer answer is chosen as often as in its group, else 0; 0.5 where both are as long."""

    def sign(row: Row) -> float:
        return float(np.sign(len(row["chosen"]) - len(row["rejected"])))

    longer: Counter[str] = Counter()
    for row in learnt:
        longer[group(row)] += int(sign(row))
    return [0.5 + 0.5 * sign(row) * float(np.sign(longer[group(row)])) for row in asked]


def word_guesses(learnt: list[Row], asked: list[Row]) -> list[float]:
    """For each asked pair 1 where the words of the chosen answer are the likelier ones of a chosen answer, else 0; 0.5 in a tie."""
    parts = ("chosen", "rejected")
    counts = {part: Counter(word for row in learnt for word in set(words(row[part].lower()))) for part in parts}

    def score(text: str) -> float:
        return sum(
            float(np.log((counts["chosen"][word] + 1) / (counts["rejected"][word] + 1)))
            for word in sorted(set(words(text.lower())))
        )

    return [0.5 + 0.5 * float(np.sign(score(row["chosen"]) - score(row["rejected"]))) for row in asked]


def card(splits: dict[str, list[Row]], reasons: Counter[str], questions: list[Row], settings: CollectSettings) -> Row:
    """Counts for the data card, of everything that a reader should know before trusting the data."""
    by_kind = {}
    for name in KINDS:
        rows = [row for found in splits.values() for row in found if row["kind"] == name]
        train = [row for row in splits["train"] if row["kind"] == name]
        by_kind[name] = {
            "train_rows": len(train),
            "repaired_share": round(sum(row["repaired"] for row in rows) / len(rows), 4),
            "mean_delta_score": round(sum(row["delta_score"] for row in rows) / len(rows), 4),
        }
    train = splits["train"]
    return {
        "questions": dict(Counter(question["split"] for question in questions)),
        "rows": {split: len(rows) for split, rows in splits.items()},
        "no_pair": dict(reasons),
        "distinct_delta_scores": len({row["delta_score"] for row in train}),
        "repaired_share": round(sum(row["repaired"] for row in train) / len(train), 4),
        "kinds": by_kind,
        "told_apart_by": leakage(train),
        "settings": settings.model_dump(),
    }


def main() -> None:
    """Samples what is missing, then grades and pairs everything and writes data/embedded."""
    loaded = params.load(Params)
    settings, seed = loaded.collect, loaded.seed
    if not (BASE / "config.json").is_file():
        raise UserError(f"{BASE}: no model; run `dvc repro fetch_model` first")
    questions = build_questions(settings)
    samples = sample_all(questions, settings, seed)
    splits, reasons = build_splits(questions, samples, settings, seed)
    write_parquet(EMBEDDED / "samples.parquet", pa.Table.from_pylist(samples))
    for split, rows in splits.items():
        write_parquet(EMBEDDED / f"{split}.parquet", pa.Table.from_pylist(rows))
    held_out = [question for question in questions if question["split"] != "train"]
    write_parquet(EMBEDDED / "questions.parquet", pa.Table.from_pylist(held_out))
    write_json(EMBEDDED / "card.json", card(splits, reasons, questions, settings))
    write_json(EMBEDDED / "sampled_on.json", processor())


def processor() -> Row:
    """The kind of CPU, as far as it decides the bits of a sample: the instructions that torch and llama.cpp use."""
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "llama_cpp": llama_cpp.llama_print_system_info().decode().split("CPU :")[-1].strip(" |"),
    }


def chunks(questions: list[Row], settings: CollectSettings) -> list[list[Row]]:
    """The questions to sample, wave by wave, in chunks of whole topics; the test samples one of them again alone.

    A chunk of the first wave has `chunk_topics` topics, one of a later, smaller wave so many that it is about as large.
    """
    found = []
    waves = [
        [question for question in questions if question["kind"] != PLAIN.name and KINDS[question["kind"]].wave == wave]
        for wave in WAVES
    ]
    for wave in waves:
        topics = list(dict.fromkeys((question["split"], question["topic"]) for question in wave))
        size = math.ceil(settings.chunk_topics * len(waves[0]) / max(1, len(wave)))
        groups = [set(topics[i : i + size]) for i in range(0, len(topics), size)]
        found += [
            [question for question in wave if (question["split"], question["topic"]) in group] for group in groups
        ]
    return found


def chunk_key(chunk: list[Row], seed: int) -> str:
    """A hash of all that a chunk asks, so that answers to another wording are never taken for its own."""
    asked = [(question["id"], question["question"], demonstration(question, seed)) for question in chunk]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def sample_all(questions: list[Row], settings: CollectSettings, seed: int) -> list[Row]:
    """Samples all chunks that the scratch folder does not hold yet; returns all rows in order."""
    key = hashlib.sha256(
        f"{settings.model_dump_json(exclude={'tie_margin', 'contrast_share'})}{seed}{sha256_file(BASE / 'model.safetensors')}".encode()
    ).hexdigest()[:16]
    folder = SCRATCH / key
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / "base.gguf"
    if not gguf.exists():
        with complete_file(gguf) as temporary:
            convert(BASE, temporary, "bf16")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.set_num_threads(settings.threads)
    samples: list[Row] = []
    with GgufModel(gguf, settings.threads, settings.slots, context=512) as model:
        for chunk in progress(chunks(questions, settings), "sampling", unit="chunk"):
            path = folder / f"{chunk_key(chunk, seed)}.parquet"
            if not path.exists():
                write_parquet(path, pa.Table.from_pylist(sample_chunk(chunk, model, tokenizer, settings, seed)))
            samples.extend(pq.read_table(path).to_pylist())
    return samples


if __name__ == "__main__":
    run_stage("collect", main)
