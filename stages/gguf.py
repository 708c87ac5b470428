"""A GGUF model in process, on token ids, through llama.cpp's batch interface.

Text never enters here: the caller gives token ids and gets token ids or logits back, so that a GGUF and its Hugging Face
counterpart can be compared on exactly the same tokens. Many sequences are decoded at once, each in a slot with a stream of the
key-value cache of its own, which is what makes sampling on two cores bearable.

The order in which sequences enter the slots is fixed by the arguments, so equal calls give equal bits on one kind of CPU.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from stages.console import UserError

UBATCH = 512
Pick = Callable[[torch.Tensor, list[int], list[int]], list[int]]


def greedy(logits: torch.Tensor, sequences: list[int], steps: list[int]) -> list[int]:
    """The most likely next token of each row of `logits` (rows, vocabulary); the `Pick` of greedy decoding."""
    return logits.argmax(dim=-1).tolist()


@llama_cpp.llama_log_callback
def _discard(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


def quiet_llama_cpp() -> None:
    """Silences llama.cpp's log; what goes wrong is told by return codes, which become errors here."""
    llama_cpp.llama_log_set(_discard, ctypes.c_void_p(0))


class GgufModel:
    """A GGUF file loaded for scoring and parallel generation.

    Args:
        path: the GGUF file.
        threads: CPU threads.
        slots: sequences decoded in parallel.
        context: tokens a slot can hold, prompt and answer together.

    Raises:
        UserError: the file is missing, damaged or not a GGUF.
    """

    def __init__(self, path: Path, threads: int, slots: int = 1, context: int = 1024) -> None:
        quiet_llama_cpp()
        llama_cpp.llama_backend_init()
        if not path.is_file():
            raise UserError(f"{path}: no such GGUF file; run `dvc repro quantize`")
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise UserError(
                f"{path}: llama.cpp cannot load it (damaged or not a GGUF); delete it and run `dvc repro quantize`"
            )
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.eos = llama_cpp.llama_vocab_eos(self.vocab)
        self.slots, self.context = slots, context
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = slots * context
        params.n_batch = self.batch_size = max(2048, slots, context)
        params.n_ubatch = UBATCH
        params.n_seq_max = slots
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise UserError(f"{path}: no memory for a context of {slots} x {context} tokens; lower the number of slots")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.batch = llama_cpp.llama_batch_init(self.batch_size, 0, 1)

    def __enter__(self) -> "GgufModel":
        return self

    def __exit__(self, *exc: object) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """The file's own tokenization of a text, special tokens parsed and none added."""
        raw = text.encode()
        buffer = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), False, True)
        return list(buffer[:count])

    def answer_logits(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The logits that predict the tokens of each answer to a prompt: (answer tokens, vocabulary) float32 each.

        The prompt is computed once; what an answer added to the cache is removed before the next.

        Raises:
            ValueError: an empty prompt or answer, or a prompt that does not fit the context with its longest answer.
        """
        longest = len(prompt) + max(map(len, answers))
        if not prompt or not all(answers) or longest > self.context:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens with its answer does not fit a context of {self.context}"
            )
        llama_cpp.llama_memory_clear(self.memory, False)
        first = self._prefill(prompt, [0]).clone()
        results = []
        for answer in answers:
            llama_cpp.llama_memory_seq_rm(self.memory, 0, len(prompt), -1)
            rows = [first]
            if len(answer) > 1:
                self.batch.n_tokens = 0
                for position, token in enumerate(answer[:-1], start=len(prompt)):
                    self._add(token, position, slot=0, wants_logits=True)
                rows.append(self._decode(len(answer) - 1).clone())
            results.append(torch.cat(rows))
        return results

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        pick: Pick = greedy,
        samples: Sequence[int] | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Continues every prompt, once or `samples` times, until the end-of-sequence token or `max_new_tokens`.

        A prompt is computed once and its cache copied to the other samples' slots.

        Args:
            prompts: token ids of each prompt.
            max_new_tokens: the longest answer, end-of-sequence token included.
            pick: (logits (rows, vocabulary), sequence index of each row, answer tokens so far of each row) -> next tokens.
            samples: answers wanted of each prompt, none above the number of slots; one each where not given.
            on_finished: called with the index of a sequence when it is complete (progress).

        Returns:
            Answer ids of `prompt 0 sample 0, prompt 0 sample 1, ...`, the end-of-sequence token kept where it was reached.

        Raises:
            ValueError: more samples than slots, or a prompt that does not fit its slot with the answer.
        """
        samples = samples or [1] * len(prompts)
        if max(samples, default=0) > self.slots:
            raise ValueError(f"{max(samples)} samples of a prompt need as many slots; this model has {self.slots}")
        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > self.context:
            raise ValueError(
                f"a prompt of {longest} and {max_new_tokens} new tokens do not fit a context of {self.context}"
            )
        llama_cpp.llama_memory_clear(self.memory, False)
        prompt_of = [prompt for prompt, count in enumerate(samples) for _ in range(count)]
        answers: list[list[int]] = [[] for _ in prompt_of]
        in_slot: list[int] = []  # in_slot[slot] is the sequence decoded there; slots stay contiguous (_release)
        entered = 0
        while entered < len(answers) or in_slot:
            while entered < len(answers) and len(in_slot) + samples[prompt_of[entered]] <= self.slots:
                prompt = prompt_of[entered]
                sequences = list(range(entered, entered + samples[prompt]))
                logits = self._prefill(prompts[prompt], range(len(in_slot), len(in_slot) + len(sequences)))
                self._append(
                    answers, sequences, pick(logits.expand(len(sequences), -1), sequences, [0] * len(sequences))
                )
                in_slot.extend(sequences)
                entered += len(sequences)
            self._release(in_slot, answers, max_new_tokens, on_finished)
            if not in_slot:
                continue
            self.batch.n_tokens = 0
            for slot, sequence in enumerate(in_slot):
                position = len(prompts[prompt_of[sequence]]) + len(answers[sequence]) - 1
                self._add(answers[sequence][-1], position, slot, wants_logits=True)
            logits = self._decode(len(in_slot))
            self._append(answers, in_slot, pick(logits, in_slot, [len(answers[sequence]) for sequence in in_slot]))
            self._release(in_slot, answers, max_new_tokens, on_finished)
        return answers

    @staticmethod
    def _append(answers: list[list[int]], sequences: Sequence[int], tokens: list[int]) -> None:
        for sequence, token in zip(sequences, tokens, strict=True):
            answers[sequence].append(token)

    def _prefill(self, prompt: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """Computes a prompt in the first of `slots`, copies its cache to the others; the last logits, (1, vocabulary)."""
        self.batch.n_tokens = 0
        for position, token in enumerate(prompt):
            self._add(token, position, slots[0], wants_logits=position == len(prompt) - 1)
        logits = self._decode(1)
        for slot in slots[1:]:
            llama_cpp.llama_memory_seq_cp(self.memory, slots[0], slot, -1, -1)
        return logits

    def _release(
        self,
        in_slot: list[int],
        answers: list[list[int]],
        max_new_tokens: int,
        on_finished: Callable[[int], None] | None,
    ) -> None:
        """Frees the slots of finished sequences and moves the last slots into the gaps.

        llama.cpp decodes sequences together only where their slots are consecutive, so a gap would split every batch.
        """
        for slot in reversed(range(len(in_slot))):
            sequence = in_slot[slot]
            if answers[sequence][-1] != self.eos and len(answers[sequence]) < max_new_tokens:
                continue
            last = len(in_slot) - 1
            llama_cpp.llama_memory_seq_rm(self.memory, slot, -1, -1)
            if slot != last:
                llama_cpp.llama_memory_seq_cp(self.memory, last, slot, -1, -1)
                llama_cpp.llama_memory_seq_rm(self.memory, last, -1, -1)
                in_slot[slot] = in_slot[last]
            in_slot.pop()
            if on_finished:
                on_finished(sequence)

    def _add(self, token: int, position: int, slot: int, wants_logits: bool) -> None:
        batch, i = self.batch, self.batch.n_tokens
        batch.token[i] = token
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = slot
        batch.logits[i] = wants_logits
        batch.n_tokens = i + 1

    def _decode(self, rows: int) -> torch.Tensor:
        """Runs the batch and views the logits asked for, in the order they were added: (rows, vocabulary)."""
        code = llama_cpp.llama_decode(self.ctx, self.batch)
        if code:
            raise RuntimeError(f"llama_decode failed with code {code} on a batch of {self.batch.n_tokens} tokens")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), shape=(rows, self.vocabulary_size))
        return torch.from_numpy(logits)
