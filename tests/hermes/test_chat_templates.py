"""Layouts of well-known chat templates, written anew: ids are those of the whole conversation, or one line says why not.

docs/bring-a-model.md has the result as a table, which is what is expected here.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.data.chat_text import end_of_answer
from hermes.model.base_check import check_template
from stages.tokenize import conversation_ids
from tests.conftest import make_byte_tokenizer, table_of

RESULTS = {name: cells for name, *cells in table_of("Which chat templates are right?")}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TAKE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA_2 = (
    TAKE_SYSTEM + "{% for m in turns %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') }}"
    "{{ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + TAKE_SYSTEM + "{% for m in turns %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OLD_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) }}"
    "{{ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% for m in messages %}{% set text = m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '') }}"
    "{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m['role']] + '_TOKEN|>' }}"
    "{{ m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
THINKS = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
TEMPLATES: dict[str, Any] = {
    "ChatML": CHATML,
    "Llama 3": LLAMA_3,
    "Llama 3.1, with today's date": "{{ strftime_now('%d %b %Y') }}" + LLAMA_3,
    "Llama 2": LLAMA_2,
    "Mistral 0.3": MISTRAL,
    "Mistral 0.1": OLD_MISTRAL,
    "Gemma": GEMMA,
    "Phi-3": PHI_3,
    "Zephyr": ZEPHYR,
    "Qwen3": QWEN_3,
    "Command R": COMMAND_R,
    "a thought begun in the prompt": THINKS,
    "a system prompt left out in silence": CHATML.replace("in messages", "in messages if m['role'] != 'system'"),
    "earlier turns left out in silence": CHATML.replace("in messages", "in messages[-2:]"),
    "texts trimmed": CHATML.replace("m['content']", "m['content'] | trim"),
    "a space in front of the answer": CHATML.replace("m['content']", "(' ' if m['role'] == 'assistant' else '') + m['content']"),
    "no end of an answer": CHATML.replace("<|im_end|>", ""),
    "several templates": {"default": CHATML, "tool_use": CHATML},
    "none at all": None,
}  # fmt: skip
MARKS = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"]
MARKS += ["<|user|>", "<|system|>", "<|assistant|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]
MARKS += ["<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>"]

QUESTION, ANSWER, SPACED = "What is salt?", "It is NaCl.", "  It is NaCl. \n"
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."}]
CASES: dict[str, tuple[list[dict[str, str]], str]] = {
    "alone": ([], ANSWER),
    "system prompt": ([SYSTEM], ANSWER),
    "earlier turns": (EARLIER, ANSWER),
    "spaces": ([], SPACED),
}


@pytest.fixture(params=["bytes", "SmolLM2"])
def tokenizer(request: pytest.FixtureRequest, embedded_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that merges nothing and one that merges letters, with a token for each mark of a turn."""
    found = make_byte_tokenizer() if request.param == "bytes" else copy.deepcopy(embedded_tokenizer)
    found.add_special_tokens({"additional_special_tokens": MARKS})
    return found


def outcome(tokenizer: PreTrainedTokenizerBase, context: list[dict[str, str]], answer: str) -> str:
    """What becomes of a pair: "the same ids", with "trimmed" where spaces around the answer are lost, or the refusal."""
    row = {"question": QUESTION, "chosen": answer, "rejected": "No.", "context": context}
    try:
        check_template(tokenizer, Path("base"))
        prompt, answers = conversation_ids(tokenizer, row, None)
    except UserError as error:
        return f"refused: {error}"
    messages = [*context, {"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    ids = prompt + answers["chosen"]
    begun = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = list(tokenizer.apply_chat_template(messages, return_dict=False))
    assert prompt == list(begun)
    assert ids[-1] == end_of_answer(tokenizer)
    assert ids.count(ids[-1]) == whole.count(ids[-1])  # nothing is written behind it but what ends the sequence
    if prompt == whole[: len(prompt)]:
        assert ids == whole[: len(ids)]
    else:  # where the answer changes the prompt's last token, a model goes on from the prompt's ids, so the text is the same
        assert len(tokenizer) > 40_000
        assert str(tokenizer.apply_chat_template(messages, tokenize=False)).startswith(str(tokenizer.decode(ids)))
    trimmed = answer not in str(tokenizer.decode(answers["chosen"]))
    return "the same ids, trimmed" if trimmed else "the same ids"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_does_what_the_documents_say(name: str, case: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    expected, found = RESULTS[name][list(CASES).index(case)], outcome(tokenizer, *CASES[case])
    if expected.startswith("refused: "):
        assert found.startswith("refused: ")
        assert "\n" not in found
        assert expected.removeprefix("refused: ").strip("`") in found
    else:
        assert found == expected


def test_the_documents_have_every_template() -> None:
    assert RESULTS.keys() == TEMPLATES.keys()
