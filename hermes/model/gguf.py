"""A GGUF model in process, on token ids, through llama.cpp's batch interface.

Text never enters here. The caller gives token ids and gets token ids or logits back, so that a GGUF and its Hugging Face counterpart are
compared on exactly the same tokens. Many sequences are decoded at once. Each has a slot: a stream of its own in the key-value cache. That
makes sampling on two cores bearable.

The order in which sequences enter the slots is fixed by the arguments, so equal calls give equal bits on one kind of CPU.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from hermes.console import UserError
from hermes.data.prefixes import common_length

UBATCH = 512
Pick = Callable[[torch.Tensor, list[int], list[int]], list[int]]


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many of them are computed once for all: the last token of each prompt is computed for its logits."""
    return min(common_length(prompts), min(map(len, prompts)) - 1)


def greedy(logits: torch.Tensor, sequences: list[int], steps: list[int]) -> list[int]:
    """The most likely next token of each row of `logits` (rows, vocabulary); the `Pick` of greedy decoding."""
    return logits.argmax(dim=-1).tolist()


@llama_cpp.llama_log_callback
def _discard(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


def quiet_llama_cpp() -> None:
    """Silences llama.cpp's log; what goes wrong is told by return codes, which become errors here."""
    llama_cpp.llama_log_set(_discard, ctypes.c_void_p(0))


class Context:
    """A llama.cpp context: a key-value cache for so many tokens of all sequences together, and the batch that is decoded next.

    With `unified` all sequences share one cache. A token may belong to several of them, and meets the keys of all others under a mask.
    So sequences of any lengths fill a decode together. Else each has its own part, and meets its own keys alone.

    Raises:
        MemoryError: no memory for the cache.
    """

    def __init__(
        self, model: llama_cpp.llama_model_p_ctypes, tokens: int, sequences: int, threads: int, unified: bool
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = tokens
        params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified
        self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            raise MemoryError(f"no memory for a context of {tokens} tokens")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.batch = llama_cpp.llama_batch_init(tokens, 0, sequences)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def close(self) -> None:
        """Frees cache and batch."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.ctx)

    def clear(self) -> None:
        """Empties the cache."""
        llama_cpp.llama_memory_clear(self.memory, False)

    def copy(self, source: int, target: int) -> None:
        """Copies the tokens of one sequence to another, which is empty."""
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def remove(self, sequence: int) -> None:
        """Empties a sequence."""
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def add(self, tokens: Sequence[int], position: int, sequences: Sequence[int], wants_logits: bool = True) -> None:
        """Appends tokens that stand from `position` on in each of `sequences` to the batch."""
        batch = self.batch
        for i, token in enumerate(tokens, start=batch.n_tokens):
            batch.token[i] = token
            batch.pos[i] = position + i - batch.n_tokens
            batch.n_seq_id[i] = len(sequences)
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
            batch.logits[i] = wants_logits
        batch.n_tokens += len(tokens)

    def decode(self, rows: int) -> torch.Tensor:
        """Runs the batch, empties it, and views the logits asked for, in the order they were added: (rows, vocabulary)."""
        count, shape = self.batch.n_tokens, (rows, self.vocabulary_size)
        code = llama_cpp.llama_decode(self.ctx, self.batch) if count else 0
        self.batch.n_tokens = 0
        if code:
            raise RuntimeError(f"llama_decode failed with code {code} on a batch of {count} tokens")
        if not rows:
            return torch.empty(shape)
        return torch.from_numpy(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), shape=shape))


class GgufModel:
    """A GGUF file loaded for scoring and parallel generation.

    Args:
        path: the GGUF file.
        threads: CPU threads.
        slots: sequences decoded in parallel.
        context: tokens a slot can hold, prompt and answer together.
        share_beginning: compute what all prompts begin with once, in one more slot, when generating; it moves logits by a rounding.
        weights: load them; without, text can be tokenized and no more.

    Raises:
        UserError: the file is missing, damaged or not a GGUF, or there is no memory for it.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        slots: int = 1,
        context: int = 1024,
        share_beginning: bool = False,
        weights: bool = True,
    ) -> None:
        quiet_llama_cpp()
        llama_cpp.llama_backend_init()
        if not path.is_file():
            raise UserError(f"{path}: no such GGUF file; run `dvc repro quantize`")
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only = not weights
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise UserError(
                f"{path}: llama.cpp cannot load it; it is no GGUF or damaged (then delete it and run `dvc repro quantize`), "
                "or more than the free memory of the device"
            )
        self.path, self.threads = path, threads
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.ends = {llama_cpp.llama_vocab_eos(self.vocab)}  # the tokens that end an answer
        self.slots, self.context, self.share_beginning = slots, context, share_beginning
        self.tokens_together = max(UBATCH, 2 * context)
        self.contexts: list[Context] = []

    def __enter__(self) -> "GgufModel":
        return self

    def __exit__(self, *exc: object) -> None:
        for context in self.contexts:
            context.close()
        llama_cpp.llama_model_free(self.model)

    def _open(self, tokens: int, sequences: int, unified: bool) -> Context:
        try:
            self.contexts.append(Context(self.model, tokens, sequences, self.threads, unified))
        except MemoryError as error:
            raise UserError(f"{self.path}: {error}; lower the number of slots") from None
        return self.contexts[-1]

    @cached_property
    def generator(self) -> Context:
        """Where answers grow, a slot each, and the slot of the shared beginning behind the last."""
        slots = self.slots + self.share_beginning
        return self._open(slots * self.context, slots, unified=False)

    @cached_property
    def scorer(self) -> Context:
        """Where answers that are known are scored."""
        return self._open(self.tokens_together, self.slots, unified=True)

    def tokenize(self, text: str) -> list[int]:
        """The file's own tokenization of a text, special tokens parsed and none added."""
        raw = text.encode()
        buffer = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), False, True)
        return list(buffer[:count])

    def answer_logits(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[torch.Tensor]]:
        """The logits that predict the tokens of every answer to every prompt: (answer tokens, vocabulary) float32 each.

        Every prompt is computed once, and what they begin with once for all.

        Args:
            prompts: token ids of each prompt.
            answers: the answers to each prompt, no more of them together than slots.

        Raises:
            ValueError: an empty prompt or answer, too many answers, or more tokens than `tokens_together`.
        """
        counts = [len(choices) for choices in answers]
        if sum(counts) > self.slots:
            raise ValueError(f"{sum(counts)} answers need as many slots; this model has {self.slots}")
        if not all(prompts) or not all(counts) or not all(answer for choices in answers for answer in choices):
            raise ValueError("a prompt or an answer is empty")
        if not prompts:
            return []
        shared = common_beginning(prompts)
        tokens = sum(map(len, prompts)) - shared * (len(prompts) - 1) + sum(len(a) - 1 for c in answers for a in c)
        if tokens > self.tokens_together:
            raise ValueError(
                f"{len(prompts)} prompts with their answers have {tokens} tokens; {self.tokens_together} fit together"
            )
        context, rows, sequence = self.scorer, 0, 0
        places: list[list[torch.Tensor]] = []
        context.clear()
        context.add(prompts[0][:shared], 0, range(sum(counts)), wants_logits=False)
        for prompt, choices in zip(prompts, answers, strict=True):
            sequences = range(sequence, sequence + len(choices))
            context.add(prompt[shared:-1], shared, sequences, wants_logits=False)
            context.add(prompt[-1:], len(prompt) - 1, sequences)
            first, rows = rows, rows + 1
            places.append([])
            for sequence, answer in zip(sequences, choices, strict=True):
                context.add(answer[:-1], len(prompt), [sequence])
                places[-1].append(torch.tensor([first, *range(rows, rows + len(answer) - 1)]))
                rows += len(answer) - 1
            sequence += 1
        logits = context.decode(rows)
        return [[logits[place] for place in row] for row in places]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        pick: Pick = greedy,
        samples: Sequence[int] | None = None,
        on_finished: Callable[[int], None] | None = None,
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Continues every prompt, once or `samples` times, until the end-of-sequence token or `max_new_tokens`.

        A prompt is computed once and its cache copied to the other samples' slots; what all prompts begin with is computed once.

        Args:
            prompts: token ids of each prompt.
            max_new_tokens: the longest answer, end-of-sequence token included.
            pick: (logits (rows, vocabulary), sequence index of each row, answer tokens so far of each row) -> next tokens.
            samples: answers wanted of each prompt, none above the number of slots; one each where not given.
            on_finished: called with the index of a sequence when it is complete (progress).
            stopped: says of an answer so far whether it has ended, without that token.

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
        context, shared = self.generator, self._begin(prompts)
        prompt_of = [prompt for prompt, count in enumerate(samples) for _ in range(count)]
        answers: list[list[int]] = [[] for _ in prompt_of]
        in_slot: list[int] = []  # in_slot[slot] is the sequence decoded there; slots stay contiguous (_release)
        entered = 0

        def ended(answer: list[int]) -> bool:
            last = answer[-1] in self.ends or len(answer) >= max_new_tokens
            return last or (stopped is not None and stopped(answer))

        def append(sequences: list[int], logits: torch.Tensor) -> None:
            tokens = pick(logits, sequences, [len(answers[sequence]) for sequence in sequences])
            for sequence, token in zip(sequences, tokens, strict=True):
                answers[sequence].append(token)

        while entered < len(answers) or in_slot:
            entering: list[int] = []
            while entered < len(answers) and len(in_slot) + len(entering) + samples[prompt_of[entered]] <= self.slots:
                entering += range(entered, entered + samples[prompt_of[entered]])
                entered = entering[-1] + 1
            if entering:
                found = list(dict.fromkeys(prompt_of[sequence] for sequence in entering))
                counts = [samples[prompt] for prompt in found]
                logits = self._prefill([prompts[prompt] for prompt in found], counts, shared, slot=len(in_slot))
                append(entering, logits.repeat_interleave(torch.tensor(counts), dim=0))
                in_slot += entering
            self._release(in_slot, answers, ended, on_finished)
            if not in_slot:
                continue
            for slot, sequence in enumerate(in_slot):
                position = len(prompts[prompt_of[sequence]]) + len(answers[sequence]) - 1
                context.add(answers[sequence][-1:], position, [slot])
            append(in_slot, context.decode(len(in_slot)))
            self._release(in_slot, answers, ended, on_finished)
        return answers

    def _begin(self, prompts: Sequence[Sequence[int]]) -> int:
        """Empties all slots, and computes what several prompts begin with in the slot behind the last; how many tokens that is."""
        self.generator.clear()
        if len(prompts) < 2 or not self.share_beginning:
            return 0
        shared = common_beginning(prompts)
        self.generator.add(prompts[0][:shared], 0, [self.slots], wants_logits=False)
        self.generator.decode(0)
        return shared

    def _prefill(self, prompts: Sequence[Sequence[int]], counts: Sequence[int], shared: int, slot: int) -> torch.Tensor:
        """Computes each prompt once, into `counts` slots of its own from `slot` on; the last logits, (prompts, vocabulary).

        Its first `shared` tokens are copied (`_begin`).
        """
        starts = [slot + sum(counts[:i]) for i in range(len(counts))]
        for prompt, start in zip(prompts, starts, strict=True):
            if shared:
                self.generator.copy(self.slots, start)
            self.generator.add(prompt[shared:-1], shared, [start], wants_logits=False)
            self.generator.add(prompt[-1:], len(prompt) - 1, [start])
        logits = self.generator.decode(len(prompts))
        for start, count in zip(starts, counts, strict=True):
            for copied in range(start + 1, start + count):
                self.generator.copy(start, copied)
        return logits

    def _release(
        self,
        in_slot: list[int],
        answers: list[list[int]],
        ended: Callable[[list[int]], bool],
        on_finished: Callable[[int], None] | None,
    ) -> None:
        """Frees the slots of finished sequences and moves the last slots into the gaps.

        llama.cpp decodes sequences together only where their slots are consecutive, so a gap would split every batch.
        """
        for slot in reversed(range(len(in_slot))):
            sequence = in_slot[slot]
            if not ended(answers[sequence]):
                continue
            last = len(in_slot) - 1
            self.generator.remove(slot)
            if slot != last:
                self.generator.copy(last, slot)
                self.generator.remove(last)
                in_slot[slot] = in_slot[last]
            in_slot.pop()
            if on_finished:
                on_finished(sequence)
