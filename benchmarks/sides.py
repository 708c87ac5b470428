"""One side of a comparison, in a process of its own, so that memory and caches are its own too.

    python -m benchmarks.sides train_ours '{"mix": "embedded", "pairs": 16}'

prints one line of JSON: seconds by part, what they were spent on, and the peak of resident memory in bytes. Loading a model and
preparing the data are on no side's clock.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.trainer_utils import SaveStrategy
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from benchmarks.suites import suites_hf, suites_ours
from hermes import params
from hermes.artifacts import write_parquet
from hermes.data.chat_text import prompt_text
from hermes.data.prefixes import common_length
from hermes.evaluation.chat_models import GgufChat
from hermes.model.base import load_base, set_determinism
from hermes.model.gguf import GgufModel
from hermes.training.shared_prefix import share_prefix
from stages import reference, train
from stages.tokenize import schema
from stages.train import load_pairs

ROOT = Path(__file__).parent.parent
TOKENS, BASE = ROOT / "data/tokens", ROOT / "models/base"
Pair = dict[str, list[int]]
Result = dict[str, Any]


def embedded_pairs(count: int) -> list[Pair]:
    """Pairs of the embedded profile, evenly spaced over the training rows."""
    rows = pq.read_table(TOKENS / "train.parquet").to_pylist()
    return [rows[i * len(rows) // count] for i in range(count)]


def hermes_pairs(count: int) -> list[Pair]:
    """Random ids with lengths like Hermes' own: log-normal, the means those of the 16 pairs of the first prototype.

    119 prompt tokens and 150 an answer on average, standard deviations of 0.8 and 0.7 in the logarithm, at most 512 a part.
    """
    random = np.random.default_rng(0)
    eos = AutoTokenizer.from_pretrained(BASE, local_files_only=True, trust_remote_code=False).eos_token_id

    def ids(mean: float, deviation: float) -> list[int]:
        length = int(np.clip(random.lognormal(np.log(mean) - deviation**2 / 2, deviation), 4, 512))
        return random.integers(100, 40_000, length).tolist()

    return [
        {"prompt_ids": ids(119, 0.8), "chosen_ids": [*ids(149, 0.7), eos], "rejected_ids": [*ids(149, 0.7), eos]}
        for _ in range(count)
    ]


def tokens(pairs: list[Pair], batch: int) -> Result:
    """How many tokens a forward of each batch needs as input, what prompts share computed once, and how many it predicts."""
    prompts = [pair["prompt_ids"] for pair in pairs]
    common = common_length(prompts)
    answers = sum(len(pair[name]) for pair in pairs for name in ("chosen_ids", "rejected_ids"))
    inputs = (
        common * -(-len(pairs) // batch) + sum(len(prompt) - common for prompt in prompts) + answers - 2 * len(pairs)
    )
    return {"pairs": len(pairs), "unique_tokens": inputs, "answers": answers}


MIXES = {"embedded": embedded_pairs, "hermes": hermes_pairs}


@contextlib.contextmanager
def workspace(pairs: list[Pair]) -> Iterator[None]:
    """A folder with these pairs as training and validation split, for stages that read and write in the working directory."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("models").mkdir()
        Path("models/base").symlink_to(BASE)
        for name in ("params.yaml", "dvc.yaml"):
            Path(name).symlink_to(ROOT / name)
        for split in ("train", "validation"):
            write_parquet(Path(f"data/tokens/{split}.parquet"), pa.Table.from_pylist(pairs, schema=schema()))
        yield


def settings() -> tuple[reference.Params, train.Params]:
    """The parameters of reference and train as params.yaml has them, for one epoch without an evaluation."""
    loaded = params.load(train.Params)
    once = loaded.train.model_copy(update={"epochs": 1.0, "evaluations": 0, "checkpoint_steps": 10**6})
    return params.load(reference.Params), loaded.model_copy(update={"train": once})


def train_ours(mix: str, pairs: int) -> Result:
    """The reference pass and one epoch of this repository's training."""
    rows = MIXES[mix](pairs)
    with workspace(rows):
        for_reference, loaded = settings()
        set_determinism(loaded.base.threads)
        model = load_base(train.BASE, loaded.base)
        share_prefix(model)
        collate, size = DataCollatorForPreference(pad_token_id=0), for_reference.reference.batch_size
        began = time.perf_counter()
        scored = [row for i in range(0, len(rows), size) for row in reference.score(model, rows[i : i + size], collate)]
        middle = time.perf_counter()
        del model
        for split in ("train", "validation"):
            write_parquet(reference.OUTPUT / f"{split}.parquet", pa.Table.from_pylist(scored, schema=reference.SCHEMA))
        trainer = train.build_trainer(
            loaded,
            Path("scratch"),
            AutoTokenizer.from_pretrained(train.BASE, local_files_only=True, trust_remote_code=False),
            [],
        )
        trainer.args.save_strategy = SaveStrategy.NO  # a checkpoint at the end is no part of a step
        answers = count_answers(trainer)
        started = time.perf_counter()
        trainer.train()
        ended = time.perf_counter()
    counted = tokens(rows, loaded.train.batch_size) | {"answers": sum(answers)}
    return counted | {"reference": middle - began, "train": ended - started}


def count_answers(trainer: DPOTrainer) -> list[int]:
    """Makes a trainer append the number of answer tokens of every batch whose loss it computes to the list."""
    counts: list[int] = []
    compute_loss = trainer.compute_loss

    def counting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(int(inputs["completion_mask"].sum()))
        return compute_loss(model, inputs, *args, **kwargs)

    vars(trainer)["compute_loss"] = counting
    return counts


def train_trl(mix: str, pairs: int, quantized: bool, checkpointing: bool, precompute: bool, batch_size: int) -> Result:
    """One epoch of stock TRL on the same ids, its own reference pass included; a model as its documentation loads one."""
    rows = MIXES[mix](pairs)
    _, loaded = settings()
    torch.set_num_threads(loaded.base.threads)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=loaded.base.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        BASE,
        dtype=torch.bfloat16,
        quantization_config=quantization if quantized else None,
        local_files_only=True,
        trust_remote_code=False,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else its gradients are wrong (hermes/model/base.py)
    s = loaded.train

    reference_seconds = 0.0

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Dataset:
            nonlocal reference_seconds
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            reference_seconds = time.perf_counter() - began
            return dataset

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=loaded.beta,
            learning_rate=s.learning_rate,
            max_length=None,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=s.batch_size * s.accumulation // batch_size,
            gradient_checkpointing=checkpointing,
            precompute_ref_log_probs=precompute,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),  # with it, TRL's default of bfloat16 autocast holds on a CPU too
            report_to="none",
            disable_tqdm=True,
        )
        trainer = OnIds(
            model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(BASE, local_files_only=True, trust_remote_code=False),
            peft_config=LoraConfig(
                r=s.lora_rank,
                lora_alpha=s.lora_alpha,
                lora_dropout=s.lora_dropout,
                target_modules=sorted(s.lora_modules),
                task_type="CAUSAL_LM",
            ),
        )
        answers = count_answers(trainer)
        began = time.perf_counter()
        trainer.train()
        ended = time.perf_counter()
    counted = tokens(rows, s.batch_size) | {"answers": sum(answers)}
    return counted | {"reference": reference_seconds, "train": ended - began}


def matrix_peak(rows: int, seconds: float) -> Result:
    """The rate of bfloat16 matrix products at the base's own shapes, forward and by input, in FLOP/s; and the FLOPs of a token.

    `layers` and `head` are multiply-adds times two of one token through every linear layer, and through the output matrix.
    """
    torch.set_num_threads(settings()[1].base.threads)
    model = AutoModelForCausalLM.from_pretrained(
        BASE, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
    )
    linear = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in name]
    shapes = [tuple(weight.shape) for weight in linear]
    products = [
        (torch.randn(rows, size, dtype=torch.bfloat16), weight.detach())
        for weight, (_, size) in zip(linear, shapes, strict=True)
    ]
    began, done = 0.0, -1  # the first pass warms up
    while done < 1 or time.perf_counter() - began < seconds:
        for inputs, weight in products:
            outputs = inputs @ weight.T
            outputs @ weight
        done += 1
        began = began or time.perf_counter()
    flops = 2 * 2 * rows * sum(a * b for a, b in shapes) * done / (time.perf_counter() - began)
    head = model.get_output_embeddings().weight
    return {"peak": flops, "layers": 2 * sum(a * b for a, b in shapes), "head": 2 * head.numel()}


def zero_reference_trainer(loaded: train.Params, pairs: int) -> train.TrackedDPOTrainer:
    """The trainer on the pairs of a workspace, their reference log-probabilities taken as 0, which costs a step the same."""
    zeros = [{"chosen_logps": [0.0], "rejected_logps": [0.0]}] * pairs
    for split in ("train", "validation"):
        write_parquet(reference.OUTPUT / f"{split}.parquet", pa.Table.from_pylist(zeros, schema=reference.SCHEMA))
    return train.build_trainer(
        loaded,
        Path("scratch"),
        AutoTokenizer.from_pretrained(train.BASE, local_files_only=True, trust_remote_code=False),
        [],
    )


def step_profile(mix: str, pairs: int, operations: int = 10) -> Result:
    """Where the time of our training goes: the operations that take most, each as a share of the seconds of an epoch."""
    _, loaded = settings()
    set_determinism(loaded.base.threads)
    with workspace(MIXES[mix](pairs)):
        trainer = zero_reference_trainer(loaded, pairs)
        trainer.args.save_strategy = SaveStrategy.NO
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
    found = sorted(recorded.key_averages(), key=lambda entry: -entry.self_cpu_time_total)[:operations]
    return {
        "seconds": seconds,
        "shares": {entry.key: round(entry.self_cpu_time_total / 1e6 / seconds, 3) for entry in found},
    }


def forward_backward(prompt: int, answer: int, pairs: int, repetitions: int) -> Result:
    """Seconds of a forward and backward of `pairs` pairs of one shape, the median of a few."""
    _, loaded = settings()
    set_determinism(loaded.base.threads)
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return random.integers(100, 40_000, count).tolist()

    rows = [{"prompt_ids": ids(prompt), "chosen_ids": ids(answer), "rejected_ids": ids(answer)} for _ in range(pairs)]
    with workspace(rows):
        trainer = zero_reference_trainer(loaded, pairs)
        batch = trainer.data_collator(load_pairs("train").to_list())
        times = []
        for _ in range(repetitions + 1):
            began = time.perf_counter()
            trainer.compute_loss(trainer.model, batch).backward()
            times.append(time.perf_counter() - began)
    return tokens(rows, pairs) | {"seconds": sorted(times[1:])[repetitions // 2]}


def evaluation_pairs(count: int) -> list[tuple[str, str]]:
    """Prompts in the chat template, each with an answer, of held-out pairs."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True, trust_remote_code=False)
    rows = pq.read_table(ROOT / "data/subset/test.parquet", columns=["question", "chosen", "rejected"]).to_pylist()
    found = []
    for row in rows[: count // 2]:
        prompt = prompt_text(tokenizer, row["question"])
        found += [(prompt, row["chosen"]), (prompt, row["rejected"])]
    return found


def score_ours(file: str, answers: int) -> Result:
    """Log-likelihoods of answers through the evaluation's own model."""
    loaded = settings()[1]
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True, trust_remote_code=False)
    torch.set_num_threads(loaded.base.threads)
    with GgufModel(Path(file), loaded.base.threads, slots=64, context=512, share_beginning=True) as model:
        chat = GgufChat(model, tokenizer, max_new_tokens=96)
        requests = [((c, a), chat.tok_encode(c), chat.tok_encode(a)) for c, a in evaluation_pairs(answers)]
        began = time.perf_counter()
        scored = chat._loglikelihood_tokens(requests)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "answers": len(scored), "log_likelihood": sum(total for total, _ in scored)}


def score_http(file: str, answers: int) -> Result:
    """The same through lm-eval's `gguf` model, which asks a completion server for every answer.

    The server is llama-cpp-python's `create_completion` behind the standard library's HTTP server, on this machine.
    """
    from llama_cpp import Llama
    from lm_eval.api.instance import Instance
    from lm_eval.models.gguf import GGUFLM

    loaded = settings()[1]
    llama = Llama(file, n_ctx=512, n_batch=512, n_threads=loaded.base.threads, logits_all=True, verbose=False)

    class Completions(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(llama.create_completion(**asked), default=float).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    model = GGUFLM(base_url=f"http://127.0.0.1:{server.server_port}", max_length=512)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(evaluation_pairs(answers))]
    began = time.perf_counter()
    scored = model.loglikelihood(requests, disable_tqdm=True)
    seconds = time.perf_counter() - began
    server.shutdown()
    return {"seconds": seconds, "answers": len(scored), "log_likelihood": sum(total for total, _ in scored)}


def generate(file: str, prompts: int, slots: int) -> Result:
    """Greedy answers of a GGUF file to held-out questions, `slots` at a time."""
    loaded = settings()[1]
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True, trust_remote_code=False)
    with GgufModel(Path(file), loaded.base.threads, slots, context=512, share_beginning=True) as model:
        chat = GgufChat(model, tokenizer, max_new_tokens=96)
        asked = [chat.tok_encode(prompt) for prompt, _ in evaluation_pairs(2 * prompts)[::2]]
        began = time.perf_counter()
        answers = chat.generate(asked)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "answers": len(answers), "tokens": sum(map(len, answers))}


SIDES: dict[str, Callable[..., Result]] = {
    side.__name__: side
    for side in (
        *(train_ours, train_trl, matrix_peak, step_profile, forward_backward),
        *(score_ours, score_http, generate, suites_ours, suites_hf),
    )
}


def main() -> None:
    side, arguments = SIDES[sys.argv[1]], json.loads(sys.argv[2])
    with Path(os.devnull).open("w") as devnull, contextlib.redirect_stdout(devnull):
        result = side(**arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result | {"peak_rss": peak}))


if __name__ == "__main__":
    main()
