"""Language models for lm-eval that work on token ids: a Hugging Face model and a GGUF get exactly the same ones.

The context is the chat template's text, tokenized without further special tokens. A continuation is a whole answer, so its
end-of-sequence token is scored with it; lm-eval's own pairing would move the template's last line break into the answer.
"""

import contextlib
import sys
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hermes.console import progress
from hermes.data.chat_text import end_of_answer, ends_of_answer, rendered
from hermes.data.prefixes import common_length
from hermes.evaluation import choices as side_by_side
from hermes.evaluation import greedy
from hermes.evaluation.greedy import Ids, Stopped, answer_alone, greedy_answers
from hermes.evaluation.oracle import Verdicts
from hermes.model.base import load, release
from hermes.model.gguf import UBATCH, GgufModel
from hermes.settings.evaluate import Batching
from hermes.training.exactness import choose_forward
from hermes.training.shared_prefix import Forward, pair_logits

TOKENS_TOGETHER = 1024


def score(logits: torch.Tensor, answer: Ids) -> tuple[float, bool]:
    """The log-probability in nats of an answer under the logits (tokens, vocabulary), and whether it is the greedy one."""
    tokens = torch.tensor(answer, device=logits.device).unsqueeze(1)
    log_probs = logits.float().log_softmax(dim=-1).gather(1, tokens)
    return float(log_probs.double().sum()), bool((logits.argmax(dim=-1, keepdim=True) == tokens).all())


class TokenizedModel(TemplateLM):
    """lm-eval's interface to models with a tokenizer and its chat template, without its own progress bars where nobody watches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return end_of_answer(self.tokenizer)

    @cached_property
    def ends(self) -> set[int]:
        """The tokens at which an answer that is written ends: the template's and the tokenizer's."""
        return ends_of_answer(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer for lm-eval's caches, which are not used."""
        return "tracked"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the model's template."""
        return rendered(self.tokenizer, chat_history, add_generation_prompt)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Used by none of the tasks here."""
        raise TypeError("no task here asks for the likelihood of a whole text")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each answer in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())


class ChatModel(TokenizedModel):
    """What the backends share: text to ids, and ids to the results that lm-eval expects.

    `finished` says of each generated answer whether it ended before `max_new_tokens`, and `lengths` how many tokens it has.
    `stopped` is None, or says of an answer so far whether it has ended, where that is not a matter of the end token alone. `until` and
    `until_ids` are the texts and tokens that it looks for, for an engine that looks itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        super().__init__(tokenizer)
        self.max_new_tokens = max_new_tokens
        self.finished: list[bool] = []
        self.lengths: list[int] = []
        self.stopped: Stopped | None = None
        self.until: list[str] = []
        self.until_ids: set[int] = set()
        self.tokens_together, self.answers_together = TOKENS_TOGETHER, TOKENS_TOGETHER

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """The ids of a text, its special tokens parsed and none added."""
        return self.tokenizer(string, add_special_tokens=False)["input_ids"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        return self.tok_encode(context), [*self.tok_encode(continuation), self.eot_token_id]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; one that reached the token limit is returned as it is and marked in `finished`."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        answers = self.generate(prompts)
        self.finished = [ids[-1] in self.ends for ids in answers]
        self.lengths = list(map(len, answers))
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Ids, Ids]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities in nats; requests that follow each other with one context are the choices of one question."""
        prompts: list[Ids] = []
        answers: list[list[Ids]] = []
        for _, prompt, answer in requests:
            if not prompts or prompts[-1] != prompt or len(answers[-1]) == self.answers_together:
                prompts.append(prompt)
                answers.append([])
            answers[-1].append(answer)
        return [result for results in self.choices_of(prompts, answers) for result in results]

    def choices_of(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[tuple[float, bool]]]:
        """`scores_of` for the questions of a suite, which have many choices and often a beginning in common."""
        return self.scores_of(prompts, answers)

    def scores_of(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[tuple[float, bool]]]:
        """For each answer to each prompt its log-probability in nats, and whether it is the greedy one."""
        found = {
            i: [score(rows, answer) for rows, answer in zip(logits, answers[i], strict=True)]
            for i, logits in self.logits_of(prompts, answers)
        }
        return [found[i] for i in range(len(prompts))]

    def logits_of(self, prompts: list[Ids], answers: list[list[Ids]]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """`answer_logits` of each prompt with its index, in the order in which they batch well."""
        self.prepare(prompts, answers)
        bar = progress(range(len(prompts)), "scoring", unit="prompt")
        for batch in self.batches(prompts, answers):
            yield from zip(
                batch, self.answer_logits([prompts[i] for i in batch], [answers[i] for i in batch]), strict=True
            )
            bar.update(len(batch))
        bar.close()

    def prepare(self, prompts: list[Ids], answers: list[list[Ids]]) -> None:
        """What a model does before it scores these answers; nothing unless it says so."""

    def batches(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[int]]:
        """Which prompts are scored together: those of similar length, up to `tokens_together` and `answers_together`."""
        common = common_length(prompts)
        sizes = [
            len(prompt) - common + sum(map(len, choices)) for prompt, choices in zip(prompts, answers, strict=True)
        ]
        batches: list[list[int]] = []
        tokens = count = 0
        for i in sorted(range(len(prompts)), key=lambda i: (sizes[i], i)):
            tokens, count = tokens + sizes[i], count + len(answers[i])
            if not batches or tokens > self.tokens_together or count > self.answers_together:
                batches.append([])
                tokens, count = common + sizes[i], len(answers[i])
            batches[-1].append(i)
        return batches

    @abstractmethod
    def generate(self, prompts: list[Ids]) -> list[Ids]:
        """Greedy answers to prompts, with the end token where it was reached."""

    @abstractmethod
    def answer_logits(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[torch.Tensor]]:
        """For each answer to each prompt the logits that predict its tokens: (answer tokens, vocabulary)."""


class HuggingFaceChat(ChatModel):
    """A Transformers model as its folder has it; greedy answers come in batches of `batch_size` prompts of similar length."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_size: int
    ) -> None:
        super().__init__(tokenizer, max_new_tokens)
        self.model, self.batch_size = model.eval(), batch_size
        self.how = Forward()
        self.forwards: Verdicts[Forward] = Verdicts(slow=Forward(shared=False))
        self.side_by_side: Verdicts[bool] = Verdicts(slow=False)  # choices
        self.in_batches: Verdicts[bool] = Verdicts(slow=False)  # written answers

    def prepare(self, prompts: list[Ids], answers: list[list[Ids]]) -> None:
        """Finds the forward that is exact for this model and answers of this length."""
        pairs = [(prompt, found[0], found[-1]) for prompt, found in zip(prompts, answers, strict=True)]
        longest = max((sum(map(len, pair)) for pair in pairs), default=0)
        self.how = self.forwards.at((longest,), lambda: choose_forward(Path(self.model.name_or_path), pairs))

    def choices_of(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[tuple[float, bool]]]:
        """All choices of a question side by side (hermes/evaluation/choices.py), where that is exact for this model."""
        if not prompts:
            return []
        self.prepare(prompts, answers)
        asked = side_by_side.parts(prompts)
        if not (self.how.shared and self.takes_side_by_side(prompts, answers, asked)):
            return self.scores_of(prompts, answers)
        found, bar = {}, progress(range(len(prompts)), "scoring", unit="question")
        for number, scored in side_by_side.scores(self.model, self.how, prompts, answers, asked):
            found[number] = scored
            bar.update(1)
        bar.close()
        return [found[i] for i in range(len(prompts))]

    def takes_side_by_side(self, prompts: list[Ids], answers: list[list[Ids]], asked: list[side_by_side.Part]) -> bool:
        """Whether this model takes choices of this size side by side."""
        folder, size = Path(self.model.name_or_path), side_by_side.size(prompts, answers, asked)
        return self.side_by_side.at(size, lambda: side_by_side.is_exact(folder, self.how, prompts, answers, asked))

    @torch.inference_mode()
    def generate(self, prompts: list[Ids]) -> list[Ids]:
        """Greedy answers by batches of prompts sorted by length, where that is exact for this model; else one at a time."""
        if not prompts:
            return []
        folder, longest = Path(self.model.name_or_path), max(map(len, prompts)) + self.max_new_tokens
        in_batches = self.in_batches.at(
            (longest,), lambda: greedy.is_exact(folder, self.model, prompts, self.max_new_tokens)
        )
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = self.batch_size if in_batches else 1
        answers: dict[int, Ids] = {}
        for start in progress(range(0, len(order), size), "generating", unit="batch"):
            batch = order[start : start + size]
            settings = self.ends, self.max_new_tokens, self.stopped
            if in_batches:
                found = greedy_answers(self.model, [prompts[i] for i in batch], *settings)
            else:
                found = [answer_alone(self.model, prompts[i], *settings) for i in batch]
            answers |= zip(batch, found, strict=True)
        return [answers[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def answer_logits(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[torch.Tensor]]:
        """Logits of all answers by one forward of one row, a prompt computed once for two answers (hermes/training/shared_prefix.py).

        Answers of one token are all predicted by the prompt's last, so that one of them stands for all.
        """
        computed = [choices[:1] if all(len(answer) == 1 for answer in choices) else choices for choices in answers]
        pairs = [(i, choices[j : j + 2]) for i, choices in enumerate(computed) for j in range(0, len(choices), 2)]
        first = [(prompts[i], choices[0]) for i, choices in pairs]
        second = [(prompts[i], choices[1] if choices[1:] else []) for i, choices in pairs]
        logits = pair_logits(self.model, first, second, self.how)
        found: list[list[torch.Tensor]] = [[] for _ in prompts]
        for (i, choices), *both in zip(pairs, logits[: len(pairs)], logits[len(pairs) :], strict=True):
            found[i] += both[: len(choices)]
        return [rows * (len(answers[i]) // len(rows)) for i, rows in enumerate(found)]


class GgufChat(ChatModel):
    """A GGUF file in process (hermes/model/gguf.py)."""

    def __init__(self, model: GgufModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        super().__init__(tokenizer, max_new_tokens)
        self.model, self.tokens_together, self.answers_together = model, UBATCH, model.slots
        model.ends = self.ends

    def generate(self, prompts: list[Ids]) -> list[Ids]:
        """Greedy answers as parallel sequences, longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        bar = progress(range(len(prompts)), "generating", unit="answer")
        answers = self.model.generate(
            [prompts[i] for i in order],
            self.max_new_tokens,
            on_finished=lambda _: bar.update(1),
            stopped=self.stopped,
        )
        bar.close()
        return [answer for _, answer in sorted(zip(order, answers, strict=True))]

    def answer_logits(self, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[torch.Tensor]]:
        """Logits of all answers from one decode."""
        return self.model.answer_logits(prompts, answers)


@contextlib.contextmanager
def opened(
    path: Path, batching: Batching, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Iterator[ChatModel]:
    """A model for lm-eval, a folder in Transformers and `dtype`, a file in llama.cpp; its weights are gone afterwards."""
    if path.is_file():
        with GgufModel(path, batching.threads, batching.slots, batching.context, share_beginning=True) as model:
            yield GgufChat(model, tokenizer, batching.max_new_tokens)
        return
    chat = HuggingFaceChat(load(path, dtype), tokenizer, batching.max_new_tokens, batching.batch_size)
    try:
        yield chat
    finally:
        del chat.model  # whoever still names the chat
        release()
