"""Written answers by vLLM, with continuous batching: the generation tasks of suites, where `evaluate.engine` says so.

vLLM goes with an older Transformers than this project, so it has an environment of its own (`./setup.sh vllm`), and is asked for ids with
ids through a pipe (hermes/evaluation/vllm_worker.py). Likelihoods stay with this project's own forward, which reads each prompt once and
is equal to Transformers' (hermes/evaluation/choices.py).

Whether vLLM computes this model as Transformers does is tried before an answer counts: each token of its first answers has to be the
likeliest by Transformers' logits, or nearly so.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.evaluation import vllm_worker
from hermes.evaluation.chat_models import ChatModel, Ids
from hermes.model.base import load, release
from hermes.settings.evaluate import Batching

PYTHON = Path(sys.prefix) / "vllm/bin/python"
TRIED, TOKENS = 4, 32  # answers that Transformers looks at, and tokens of each
# Nats that a token may be behind the likeliest one. Two orders of a sum differ by so much, and the likeliest then changes where two tie.
BEHIND = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.1}
# Quiet, and nothing told to anybody; GiB for keys and values on a CPU.
VARIABLES = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
LAUNCHED = {
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
SHARE = 0.55  # of a GPU's memory, as Transformers' model is beside it while answers are tried


@torch.inference_mode()
def behind(folder: Path, dtype: torch.dtype, prompts: list[Ids], answers: list[Ids]) -> float:
    """How far, in nats, a token of these answers is behind the likeliest one at most, by the logits of Transformers."""
    model, far = load(folder, dtype).eval(), 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        rows = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        chosen = rows.gather(1, ids[0, len(prompt) :].unsqueeze(1))[:, 0]
        worst = float((rows.max(dim=1).values - chosen).max())
        far = max(far, worst if math.isfinite(worst) else math.inf)
    del model
    release()
    return far


def variables(threads: int, gpus: int) -> dict[str, str]:
    """The environment of vLLM: one GPU, that of this process among several, and nothing of those that `accelerate launch` set."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHED and not name.startswith("TORCHELASTIC_")
    }
    own |= VARIABLES | {"OMP_NUM_THREADS": str(threads)}
    visible = [gpu for gpu in own.pop("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or [
        str(number) for number in range(gpus)
    ]
    if gpus:  # an empty value is none that vLLM's build for CPUs expects
        own["CUDA_VISIBLE_DEVICES"] = visible[int(os.environ.get("LOCAL_RANK", "0"))]
    return own


class VllmChat(ChatModel):
    """A model folder in vLLM, for answers alone."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, batching: Batching, dtype: torch.dtype
    ) -> None:
        super().__init__(tokenizer, batching.max_new_tokens)
        self.folder, self.dtype, self.tried = folder, dtype, False
        on_gpu = {"gpu_memory_utilization": SHARE} if torch.cuda.is_available() else {"enforce_eager": True}
        options = {
            "model": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": batching.context,
            "max_num_seqs": batching.batch_size,
            "generation_config": "vllm",  # not the folder's, which may sample
            "seed": 0,
            **on_gpu,
        }
        self.process = subprocess.Popen(
            [str(PYTHON), vllm_worker.__file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables(batching.threads, torch.cuda.device_count()),
            text=True,
            process_group=0,  # vLLM has processes of its own, which hold the memory
        )

    def ask(self, prompts: list[Ids], limit: int) -> list[Ids]:
        """Greedy answers of so many tokens at most.

        Raises:
            UserError: vLLM has ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        asked: dict[str, Any] = {"prompts": prompts, "limit": limit, "until": self.until}
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(asked | {"ends": sorted(self.ends | self.until_ids)}) + "\n")
            self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise UserError(
                f"{self.folder}: vLLM does not run it (its lines are above); set `evaluate.engine: transformers`"
            )
        answers: list[Ids] = json.loads(line)
        return answers

    def generate(self, prompts: list[Ids]) -> list[Ids]:
        """Greedy answers in the order of the prompts; the first ones are tried.

        Raises:
            UserError: vLLM has ended, or computes another model than Transformers does.
        """
        if not self.tried:
            few = prompts[:TRIED]
            far = behind(self.folder, self.dtype, few, self.ask(few, TOKENS))
            if far > BEHIND[self.dtype]:
                raise UserError(
                    f"{self.folder}: vLLM writes tokens that are {far:.2g} nats behind the likeliest one of Transformers "
                    f"({BEHIND[self.dtype]} are allowed); set `evaluate.engine: transformers`"
                )
            self.tried = True
        return self.ask(prompts, self.max_new_tokens)

    def answer_logits(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[torch.Tensor]]:
        """Asked of other engines."""
        raise TypeError("vLLM is asked for answers alone")


@contextlib.contextmanager
def written_by_vllm(
    folder: Path, batching: Batching, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Iterator[VllmChat]:
    """A model folder in vLLM, which is gone afterwards.

    Raises:
        UserError: vLLM is not installed.
    """
    if not PYTHON.is_file():
        raise UserError(f"{PYTHON}: no such file, which `evaluate.engine: vllm` runs; install it: ./setup.sh vllm")
    chat = VllmChat(folder, tokenizer, batching, dtype)
    try:
        yield chat
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(chat.process.pid, signal.SIGKILL)
        chat.process.communicate()
