"""Makes data/embedded: preference pairs in the Hermes schema out of the embedded model's own answers (`make collect`).

data/embedded/README.md says how questions, answers and pairs come about. Verifiers grade the answers (hermes/instructions/kinds.py).
A worked example is only in the prompt of an answer: training has to teach what it showed.

Sampling goes chunk by chunk into a scratch folder and resumes after an interruption. Each sequence draws from a generator seeded by
its question, so a chunk sampled again alone has the same bits on one kind of CPU. `python -m tools.collect --pairs` samples
nothing: it picks the pairs again from the committed samples, without a model and with the same bits anywhere.

Written: samples.parquet (all that was sampled) and sampled_on.json (the CPU), then {train,validation,test}.parquet,
questions.parquet (the held-out questions) and card.json. plain.jsonl was written by hand.
"""

import argparse
import contextlib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain, groupby, product
from operator import itemgetter
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import llama_cpp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from hermes.artifacts import read_json, scratch_folder, sha256_file, write_json, write_parquet
from hermes.console import UserError, progress
from hermes.data.chat_text import prompt_ids
from hermes.instructions.kinds import KINDS, PLAIN, SEEN_KINDS, UNSEEN_KINDS, VALIDATION_KINDS, grade, is_strict, repair
from hermes.instructions.topics import split_topics
from hermes.instructions.verifiers import sentences, words
from hermes.model.gguf import GgufModel
from hermes.model.gguf_files import convert
from hermes.model.tokenizer import load_tokenizer
from hermes.params import read_yaml
from hermes.run import run_tool
from hermes.settings import experiment
from hermes.settings.untracked import CollectSettings

EMBEDDED = Path("data/embedded")
BASE = Path("models/base")
COPIED_WORDS = 5  # as many in a row are copied from the worked example
ECHOED_WORDS = 3  # as many in a row make an answer unfit for a plain question
LONG_WORD = 5  # letters of a word that tells an instruction
PLAIN_QUESTIONS = 2
PAIRING = {"tie_margin", "contrast_share"}  # settings that shape the pairs and not the samples
TOP_K = 50
WAVES = sorted({kind.wave for kind in KINDS.values()})
DEMONSTRATIONS: dict[str, str] = read_yaml(Path(__file__).with_name("worked_examples.yaml"))
Row = dict[str, Any]


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
                row = {"id": key, "split": split, "topic": topic, "kind": name}
                rows.append(row | {"constraint": json.dumps(verifier, sort_keys=True), "question": question})
    return rows


def demonstration(question: Row, seed: int) -> tuple[list[dict[str, str]], Row]:
    """A worked example of the question's instruction about another subject: its two chat messages, and its verifier parameters."""
    random = Random(f"{seed}/{question['id']}/demonstration")
    subject = random.choice(sorted(DEMONSTRATIONS))
    text, verifier = KINDS[question["kind"]].ask(random, subject)
    answer = repair(question["kind"], DEMONSTRATIONS[subject], verifier)
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], verifier


def sample_chunk(
    questions: list[Row], model: GgufModel, tokenizer: PreTrainedTokenizerBase, settings: CollectSettings, seed: int
) -> list[Row]:
    """Samples every answer of a chunk of questions; rows of id, sample, demonstrated, finished, answer."""
    prompts, counts, draws, rows = [], [], [], []
    for question in questions:
        for demonstrated, count in ((False, settings.samples), (True, settings.demonstrated_samples)):
            example = demonstration(question, seed)[0] if demonstrated else []
            prompts.append(prompt_ids(tokenizer, question["question"], example))
            counts.append(count)
            for sample in range(count):
                rows.append({"id": question["id"], "sample": sample, "demonstrated": demonstrated})
                key = f"{seed}/{question['id']}/{demonstrated}/{sample}"
                state = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
                draws.append(np.random.default_rng(state).random(settings.max_new_tokens, dtype=np.float32))
    uniform = torch.from_numpy(np.stack(draws))

    def pick(logits: torch.Tensor, sequences: list[int], steps: list[int]) -> list[int]:
        values, tokens = logits.topk(TOP_K, dim=-1)
        cumulative = (values / settings.temperature).softmax(dim=-1).cumsum(dim=-1)
        chosen = torch.searchsorted(cumulative, uniform[sequences, steps].unsqueeze(1)).clamp(max=TOP_K - 1)
        return tokens.gather(1, chosen).squeeze(1).tolist()

    answers = model.generate(prompts, settings.max_new_tokens, pick, counts)
    for row, ids in zip(rows, answers, strict=True):
        row["finished"] = ids[-1] in model.ends
        row["answer"] = str(tokenizer.decode(ids[:-1] if row["finished"] else ids, skip_special_tokens=True)).strip()
    return rows


def copies(answer: str, text: str, count: int = COPIED_WORDS) -> bool:
    """Whether an answer repeats `count` words in a row of a text, whatever their case."""
    found = [words(part.lower()) for part in (answer, text)]
    runs = [set(zip(*(part[i:] for i in range(count)), strict=False)) for part in found]
    return not runs[0].isdisjoint(runs[1])


def usable_answers(question: Row, samples: list[Row], seed: int) -> list[str]:
    """The distinct answers of a question that may enter a pair: finished, not empty, not copied from the worked example."""
    example = demonstration(question, seed)[0][1]["content"] if KINDS[question["kind"]].free_text else ""
    finished = [row for row in samples if row["finished"] and row["answer"]]
    own = [row["answer"] for row in finished if not (row["demonstrated"] and copies(row["answer"], example))]
    return list(dict.fromkeys(own))


def unmarked_answers(question: Row, answers: list[str], seed: int) -> list[str]:
    """The plain prose among the answers to a question that shows no sign of the instruction, and so could answer a plain question.

    A sign is any of three: a verifier, with the parameters of the question or of its worked example, finds more in the answer than
    in hand-written prose; the answer repeats three words in a row of its prompt; or it has a long word of the instruction.
    """
    kind = KINDS[question["kind"]]
    if not kind.free_text:
        return []
    messages, shown = demonstration(question, seed)
    prompt = [question["question"], *(message["content"] for message in messages)]
    instruction = [word.lower() for text in prompt[:2] for part in sentences(text)[1:] for word in words(part)]
    telling = {word for word in instruction if len(word) >= LONG_WORD}
    verifiers = [json.loads(question["constraint"]), shown]
    by_hand = [max(kind.satisfied(text, verifier) for text in DEMONSTRATIONS.values()) for verifier in verifiers]
    return [
        answer
        for answer in answers
        if is_strict(PLAIN.name, answer, shown)
        and all(kind.satisfied(answer, verifier) <= most for verifier, most in zip(verifiers, by_hand, strict=True))
        and not any(copies(re.sub("['’]s\\b", " is", answer), text, ECHOED_WORDS) for text in prompt)
        and telling.isdisjoint(words(answer.lower()))
    ]


def follows(question: Row, answer: str) -> bool:
    """Whether an answer follows the instruction of a question exactly."""
    return is_strict(question["kind"], answer, json.loads(question["constraint"]))


def build_pair(question: Row, answers: list[str], contrast: list[str], settings: CollectSettings) -> Row | str:
    """The preference pair of one question, or the reason why there is none (data/embedded/README.md: the rule).

    `answers` are the question's own; where `contrast` is not empty the rejected answer is one of these.
    """
    kind, verifier = question["kind"], json.loads(question["constraint"])
    if not answers:
        return "no finished answer"
    passing = [answer for answer in answers if follows(question, answer)]
    rejectable = contrast or [answer for answer in answers if answer not in passing]
    if not rejectable:
        return "every answer follows the instruction"
    following = passing or first_repair(kind, answers, verifier)
    if not following:
        return "no answer follows the instruction or can be repaired"
    grades = {answer: grade(kind, answer, verifier) for answer in following}
    acceptable = [answer for answer, value in grades.items() if value >= max(grades.values()) - settings.tie_margin]
    both = product(acceptable, rejectable)
    chosen, rejected = min(both, key=lambda texts: (abs(len(texts[0]) - len(texts[1])), texts))
    pair: Row = {"question": question["question"], "chosen": chosen, "rejected": rejected}
    pair["delta_score"] = round(grades[chosen] - grade(kind, rejected, verifier), 4)
    pair |= {name: question[name] for name in ("id", "topic", "kind", "constraint")}
    return pair | {"repaired": not passing, "contrast": bool(contrast)}


def first_repair(kind: str, answers: list[str], verifier: Row) -> list[str]:
    """The repair of the best answer that has one, or nothing; a looping answer, for one, has none."""
    for answer in sorted(answers, key=lambda answer: (-grade(kind, answer, verifier), answer)):
        with contextlib.suppress(ValueError):
            return [repair(kind, answer, verifier)]
    return []


def contrasting_answers(question: Row, neighbours: list[tuple[Row, list[str]]], random: Random) -> list[str]:
    """Answers that follow another instruction about the same topic, drawn at random, and fail this one; may be empty.

    `neighbours` are the questions about the topic with the answers that follow them. Prose is contrasted with prose only,
    since a word list or a single word would be too easy to reject.
    """
    found = [
        fitting
        for other, answers in neighbours
        if KINDS[other["kind"]].free_text >= KINDS[question["kind"]].free_text
        and (fitting := [answer for answer in answers if not follows(question, answer)])
    ]
    return random.choice(found) if found else []


def build_splits(
    questions: list[Row], samples: Iterable[Row], settings: CollectSettings, seed: int
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Grades and pairs all samples: ({split: rows sorted by delta_score descending, then id}, reasons for no pair).

    The questions about a topic follow each other, as do the samples of a question.
    """
    sampled = {key: list(rows) for key, rows in groupby(samples, itemgetter("id"))}
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    reasons: Counter[str] = Counter()
    for _, group in groupby(questions, itemgetter("topic")):
        asked = [(question, usable_answers(question, sampled.get(question["id"], []), seed)) for question in group]
        following = [(question, [text for text in answers if follows(question, text)]) for question, answers in asked]
        unmarked = [text for question, answers in asked for text in unmarked_answers(question, answers, seed)]
        for question, answers in asked:
            is_plain = question["kind"] == PLAIN.name
            random, contrast = Random(f"{seed}/{question['id']}/contrast"), []
            if random.random() < settings.contrast_share or is_plain:
                contrast = contrasting_answers(question, following, random)
            pair = build_pair(question, unmarked if is_plain else answers, contrast, settings)
            if isinstance(pair, str):
                reasons[f"{question['split']}: {pair}"] += 1
            else:
                splits[question["split"]].append(pair)
    for rows in splits.values():
        rows.sort(key=lambda row: (-row["delta_score"], row["id"]))
    return splits, reasons


def leakage(rows: list[Row]) -> dict[str, float]:
    """How well shallow signs tell chosen from rejected, learnt on every second pair: the share of the other pairs guessed right.

    `length` guesses that the longer, or the shorter, answer is chosen, whichever is so more often; `length_by_kind` learns that for
    each kind apart. `words` asks a bag-of-words naive Bayes classifier which answer looks more like a chosen one, and
    `words_repaired` is that on the pairs whose chosen answer is a repair. 0.5 is chance, and the guess of a tie.
    """
    rows = sorted(rows, key=lambda row: row["id"])
    longer = np.sign([len(row["chosen"]) - len(row["rejected"]) for row in rows])
    kinds, repaired = (np.array([row[name] for row in rows]) for name in ("kind", "repaired"))
    longer_of_kind = np.array([longer[::2][kinds[::2] == kind].sum() for kind in kinds])
    texts = [[set(words(row[part].lower())) for row in rows] for part in ("chosen", "rejected")]
    chosen, rejected = (Counter(chain(*found[::2])) for found in texts)

    def likeness(text: set[str]) -> float:
        return math.fsum(math.log((chosen[word] + 1) / (rejected[word] + 1)) for word in text)

    def right(guess: np.ndarray) -> float:
        return round(0.5 + 0.5 * float(np.sign(guess).mean()), 4)

    by_words = np.array([likeness(one) - likeness(other) for one, other in zip(*texts, strict=True)])[1::2]
    return {
        "length": right(longer[1::2] * longer[::2].sum()),
        "length_by_kind": right((longer * longer_of_kind)[1::2]),
        "words": right(by_words),
        "words_repaired": right(by_words[repaired[1::2]]),
    }


def echoes(rows: list[Row]) -> dict[str, int]:
    """How many of the rows have a chosen answer that holds the phrase asked for twice, or five words in a row of its question."""

    def is_twice(row: Row) -> bool:
        asked = json.loads(row["constraint"])
        phrase = asked.get("opening", asked.get("ending", "")).lower().rstrip(".,!:")
        return bool(phrase) and row["chosen"].lower().count(phrase) > 1

    return {
        "rows": len(rows),
        "phrase_twice": sum(is_twice(row) for row in rows),
        "question_echoed": sum(copies(row["chosen"], row["question"]) for row in rows),
    }


def card(splits: dict[str, list[Row]], reasons: Counter[str], questions: list[Row]) -> Row:
    """Counts for the data card, of everything that a reader should know before trusting the data."""
    train = splits["train"]
    by_kind = {name: [row for row in chain(*splits.values()) if row["kind"] == name] for name in KINDS}
    return {
        "questions": dict(Counter(question["split"] for question in questions)),
        "rows": {split: len(rows) for split, rows in splits.items()},
        "no_pair": dict(reasons),
        "distinct_delta_scores": len({row["delta_score"] for row in train}),
        "repaired_share": round(fmean(row["repaired"] for row in train), 4),
        "kinds": {
            name: {
                "train_rows": sum(row["kind"] == name for row in train),
                "repaired_share": round(fmean(row["repaired"] for row in rows), 4),
                "mean_delta_score": round(fmean(row["delta_score"] for row in rows), 4),
            }
            for name, rows in by_kind.items()
        },
        "told_apart_by": leakage(train),
        "chosen_as_sampled": echoes([row for row in train if not row["repaired"]]),
        "chosen_repaired": echoes([row for row in train if row["repaired"]]),
    }


def main() -> None:
    """Samples what is missing, or takes the committed samples; then picks the pairs and writes data/embedded."""
    parser = argparse.ArgumentParser(prog="python -m tools.collect", description="Make data/embedded.")
    parser.add_argument("--pairs", action="store_true", help="pick the pairs anew from samples.parquet; sample nothing")
    only_pairs = parser.parse_args().pairs
    loaded = experiment.check()
    settings, seed = loaded.collect, loaded.seed
    questions = build_questions(settings)
    if only_pairs:
        samples = committed_samples(settings, seed)
    else:
        samples = sample_all(questions, settings, seed)
        write_parquet(EMBEDDED / "samples.parquet", pa.Table.from_pylist(samples))
        write_json(EMBEDDED / "sampled_on.json", processor())
    splits, reasons = build_splits(questions, samples, settings, seed)
    held_out = [question for question in questions if question["split"] != "train"]
    for name, rows in (splits | {"questions": held_out}).items():
        write_parquet(EMBEDDED / f"{name}.parquet", pa.Table.from_pylist(rows))
    made_with = {"settings": settings.model_dump() | {"seed": seed}}
    write_json(EMBEDDED / "card.json", card(splits, reasons, questions) | made_with)


def committed_samples(settings: CollectSettings, seed: int) -> list[Row]:
    """All that was sampled, as data/embedded holds it; a UserError where a file is missing, or params.yaml asks for other samples."""
    path, made = EMBEDDED / "samples.parquet", EMBEDDED / "card.json"
    for file in (path, made):
        if not file.is_file():
            raise UserError(f"{file}: no such file; restore it with `git checkout {EMBEDDED}`")
    sampled = read_json(made)["settings"]
    for name, value in (settings.model_dump(exclude=PAIRING) | {"seed": seed}).items():
        if value != sampled[name]:
            wanted = f"put {sampled[name]} back, or sample anew with `make collect`"
            raise UserError(f"params.yaml: {name} is {value}, but {path} was sampled with {sampled[name]}; {wanted}")
    return pq.read_table(path).to_pylist()


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
    found: list[list[Row]] = []
    sampled = [question for question in questions if question["kind"] != PLAIN.name]
    largest = 0
    for wave in WAVES:
        asked = [question for question in sampled if KINDS[question["kind"]].wave == wave]
        largest = largest or len(asked)
        size = math.ceil(settings.chunk_topics * largest / max(1, len(asked)))
        topics = [list(group) for _, group in groupby(asked, itemgetter("topic"))]
        found += [[*chain(*topics[i : i + size])] for i in range(0, len(topics), size)]
    return found


def sample_all(questions: list[Row], settings: CollectSettings, seed: int) -> list[Row]:
    """Samples all chunks that the scratch folder does not hold yet; returns all rows in order.

    A chunk's file is named by a hash of all that shapes it, so that answers to another wording are never taken for its own.
    """
    if not (BASE / "config.json").is_file():
        raise UserError(f"{BASE}: no model; run `dvc repro fetch_model` first")
    shaped_by = [settings.model_dump(exclude=PAIRING), seed, sha256_file(BASE / "model.safetensors")]
    folder = scratch_folder("collect")
    folder.mkdir(parents=True, exist_ok=True)
    convert(BASE, folder / "base.gguf", "bf16")
    tokenizer = load_tokenizer(BASE)
    torch.set_num_threads(settings.threads)
    samples: list[Row] = []
    with GgufModel(folder / "base.gguf", settings.threads, settings.slots, context=512) as model:
        for chunk in progress(chunks(questions, settings), "sampling", unit="chunk"):
            asked = [shaped_by, [(question, demonstration(question, seed)) for question in chunk]]
            path = folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.parquet"
            if not path.exists():
                write_parquet(path, pa.Table.from_pylist(sample_chunk(chunk, model, tokenizer, settings, seed)))
            samples.extend(pq.read_table(path).to_pylist())
    return samples


if __name__ == "__main__":
    run_tool("collect", main)
