"""A suite's questions through the project's own model and through lm-eval's: two sides of a comparison (benchmarks/sides.py).

    python -m benchmarks.sides suites_ours '{"shape": "shared", "questions": 32}'
    python -m benchmarks.sides suites_hf '{"shape": "shared", "questions": 32}'

The questions have the shapes of benchmarks, and texts of the embedded data, since no benchmark's data set comes with the project:

    shared       MMLU: worked examples before every question, the same for all, and four choices of one token; five examples twice, which
                 makes the prompts about as long as MMLU's
    unshared     HellaSwag: ten worked examples, others for every question, and four choices of several tokens
    generation   GSM8K: five worked examples, others for every question, and a written answer
"""

import time
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hermes.console import UserError
from hermes.evaluation.chat_models import HuggingFaceChat
from hermes.evaluation.run_benchmarks import SuiteModel
from hermes.model.base import load
from hermes.model.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
BASE = ROOT / "models/base"
Shape = Literal["shared", "unshared", "generation"]
CONTEXT, THREADS = 2048, 2
HF_BATCH = 8  # the fastest of 1, 4, 8 and 16 here, for choices and for answers
ANSWERS_TOGETHER = 96  # as the profile has it
WRITTEN = {"until": ["Question:", "\n\n"], "max_gen_toks": 128, "do_sample": False, "temperature": 0.0}


def requests_of(shape: Shape, questions: int) -> list[Instance]:
    """What lm-eval asks a model about so many questions: one request a choice, or one an answer that is written."""
    rows = pq.read_table(ROOT / "data/subset/test.parquet", columns=["question", "chosen", "rejected"]).to_pylist()
    if questions > len(rows):
        raise UserError(
            f"data/subset/test.parquet: {len(rows)} rows, and {questions} are needed; run `make repro PROFILE=cpu`"
        )
    lines = [f"Question: {row['question']}\nAnswer: {row['chosen']}\n\n" for row in rows]
    examples = {"shared": 5, "unshared": 10, "generation": 5}[shape]
    found = []
    for number in range(questions):
        row, others = rows[number], [rows[(number + i) % len(rows)] for i in (50, 100, 150)]
        first = questions if shape == "shared" else questions + number * 7
        shown = "".join(lines[(first + i) % len(lines)] for i in range(examples))
        asked = [row["chosen"], *(other["rejected"] for other in others)]
        if shape == "shared":
            listed = "\n".join(
                f"{letter}. {' '.join(text.split()[:12])}" for letter, text in zip("ABCD", asked, strict=True)
            )
            prompt, choices = f"{shown * 2}Question: {row['question']}\n{listed}\nAnswer:", [" A", " B", " C", " D"]
        else:
            prompt = f"{shown}Question: {row['question']}\nAnswer:"
            choices = [f" {' '.join(text.split()[:20])}" for text in asked]
        if shape == "generation":
            found.append(Instance("generate_until", {}, (prompt, WRITTEN), number))
        else:
            found += [Instance("loglikelihood", {}, (prompt, choice), number) for choice in choices]
    return found


def answered(model: Any, shape: Shape, questions: int) -> dict[str, Any]:
    """The seconds of all requests, the log-likelihoods or answers, and the likeliest choice of each question."""
    requests = requests_of(shape, questions)
    began = time.perf_counter()
    if shape == "generation":
        answers = model.generate_until(requests, disable_tqdm=True)
        return {"seconds": time.perf_counter() - began, "answers": answers}
    totals = [total for total, _ in model.loglikelihood(requests, disable_tqdm=True)]
    seconds = time.perf_counter() - began
    found = [totals[i : i + 4] for i in range(0, len(totals), 4)]
    return {"seconds": seconds, "totals": totals, "answers": [four.index(max(four)) for four in found]}


def suites_ours(shape: Shape, questions: int) -> dict[str, Any]:
    """The project's own model, its check of the first questions on the clock."""
    torch.set_num_threads(THREADS)
    chat = HuggingFaceChat(load(BASE, torch.float32), load_tokenizer(BASE), 0, ANSWERS_TOGETHER)
    return answered(SuiteModel(chat, CONTEXT), shape, questions)


def suites_hf(shape: Shape, questions: int) -> dict[str, Any]:
    """lm-eval's Transformers model."""
    torch.set_num_threads(THREADS)
    model = HFLM(
        pretrained=str(BASE),
        dtype="float32",
        device="cpu",
        batch_size=HF_BATCH,
        max_length=CONTEXT,
        trust_remote_code=False,
    )
    return answered(model, shape, questions)
