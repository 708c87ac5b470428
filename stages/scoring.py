"""Language models for lm-eval that work on token ids: a Hugging Face model and a GGUF get exactly the same ones.

The context is the chat template's text, tokenized without further special tokens. A continuation is a whole answer, so its
end-of-sequence token is scored with it; lm-eval's own pairing would move the template's last line break into the answer.
"""

from abc import abstractmethod
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.console import progress
from stages.gguf import GgufModel

Ids = list[int]


class ChatModel(TemplateLM):
    """What the two backends share: text to ids, and ids to the results that lm-eval expects.

    Args:
        tokenizer: with the chat template.
        max_new_tokens: longest answer; `finished` says of each generated answer whether it ended before that.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        super().__init__()
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.finished: list[bool] = []

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer for lm-eval's caches, which are not used."""
        return "tracked"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """The ids of a text, its special tokens parsed and none added."""
        return self.tokenizer(string, add_special_tokens=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the model's template."""
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        return self.tok_encode(context), [*self.tok_encode(continuation), self.eot_token_id]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not a chat task, and used by none of the tasks here."""
        raise TypeError("these models score answers in a chat; rolling likelihoods are for plain text")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; one that reached the token limit is returned as it is and marked in `finished`."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        answers = self.generate(prompts)
        self.finished = [ids[-1:] == [self.eot_token_id] for ids in answers]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Ids, Ids]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities in nats; requests that follow each other with one context share its computation."""
        groups: list[tuple[Ids, list[Ids]]] = []
        for _, prompt, answer in requests:
            if groups and groups[-1][0] == prompt:
                groups[-1][1].append(answer)
            else:
                groups.append((prompt, [answer]))
        results = []
        for prompt, answers in progress(groups, "scoring", unit="prompt"):
            for logits, answer in zip(self.answer_logits(prompt, answers), answers, strict=True):
                tokens = torch.tensor(answer, device=logits.device).unsqueeze(1)
                log_probs = logits.float().log_softmax(dim=-1)
                is_greedy = bool((logits.argmax(dim=-1, keepdim=True) == tokens).all())
                results.append((float(log_probs.gather(1, tokens).double().sum()), is_greedy))
        return results

    @abstractmethod
    def generate(self, prompts: list[Ids]) -> list[Ids]:
        """Greedy answers to prompts, with the end token where it was reached."""

    @abstractmethod
    def answer_logits(self, prompt: Ids, answers: list[Ids]) -> list[torch.Tensor]:
        """For each answer to a prompt the logits that predict its tokens: (answer tokens, vocabulary)."""


class HuggingFaceChat(ChatModel):
    """A Transformers model; greedy batches are padded on the left, `batch_size` prompts of similar length together."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_size: int
    ) -> None:
        super().__init__(tokenizer, max_new_tokens)
        self.model, self.batch_size = model.eval(), batch_size

    @torch.inference_mode()
    def generate(self, prompts: list[Ids]) -> list[Ids]:
        """Greedy answers by batches of prompts sorted by length."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        answers: dict[int, Ids] = {}
        for batch in progress(batches, "generating", unit="batch"):
            texts = [{"input_ids": prompts[i]} for i in batch]
            padded = self.tokenizer.pad(texts, padding_side="left", return_tensors="pt").to(self.model.device)
            output = self.model.generate(
                **padded, do_sample=False, max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id
            )
            for i, ids in zip(batch, output[:, padded["input_ids"].size(1) :].tolist(), strict=True):
                answers[i] = ids[: ids.index(self.eot_token_id) + 1] if self.eot_token_id in ids else ids
        return [answers[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def answer_logits(self, prompt: Ids, answers: list[Ids]) -> list[torch.Tensor]:
        """Logits of each answer by one forward of prompt and answer."""
        results = []
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer[:-1]]], device=self.model.device)
            results.append(self.model(input_ids=ids, logits_to_keep=len(answer), use_cache=False).logits[0])
        return results


class GgufChat(ChatModel):
    """A GGUF file in process (stages/gguf.py)."""

    def __init__(self, model: GgufModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        super().__init__(tokenizer, max_new_tokens)
        self.model = model

    def generate(self, prompts: list[Ids]) -> list[Ids]:
        """Greedy answers as parallel sequences, longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        bar = progress(range(len(prompts)), "generating", unit="answer")
        answers = self.model.generate(
            [prompts[i] for i in order], self.max_new_tokens, on_finished=lambda _: bar.update(1)
        )
        bar.close()
        return [answer for _, answer in sorted(zip(order, answers, strict=True))]

    def answer_logits(self, prompt: Ids, answers: list[Ids]) -> list[torch.Tensor]:
        """Logits of each answer; the prompt is computed once."""
        return self.model.answer_logits(prompt, answers)
