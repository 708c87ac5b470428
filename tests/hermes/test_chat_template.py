"""A chat template of others computes in little time and memory, reaches nothing outside, and ends in one line where it would not."""

import signal
import threading
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.data import chat_template
from hermes.data.chat_text import prompt_text, rendered
from tests.conftest import CHAT_TEMPLATE

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "nested ranges": LOOP,
    "a growing text": "{% for i in range(99999) %}{% for j in range(99999) %}some text{% endfor %}{% endfor %}",
    "a macro": "{% macro again(n) %}" + LOOP + "{% endmacro %}{{ again(1) }}",
    "a large text": "{{ 'x' * 10 ** 10 }}",
    "a doubled text": "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "a large list": "{{ ([0] * 10 ** 9) | length }}",
    "a large number": "{{ 10 ** (10 ** 10) }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "for a system prompt alone": "{% if messages[0]['role'] == 'system' %}" + LOOP + "{% endif %}",
    "where an answer begins": "{% if add_generation_prompt %}" + LOOP + "{% endif %}",
}


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    monkeypatch.setattr(byte_tokenizer, "chat_template", CHAT_TEMPLATE)
    return byte_tokenizer


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_takes_too_much_is_refused(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ENDLESS[kind] + CHAT_TEMPLATE
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^chat template: takes more than .* for a short conversation; use another"):
        chat_template.check_bounded(tokenizer)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, "{{ raise_exception('no') }}", "{% for %}", "{{ range(10 ** 9) }}", "{{ ''.__class__.__mro__ }}"],
)
def test_what_ends_passes_and_its_mistakes_are_left_to_who_renders(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    chat_template.check_bounded(tokenizer)


def test_a_later_conversation_has_the_time_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if 'now' in messages[0]['content'] %}" + LOOP + "{% endif %}" + CHAT_TEMPLATE
    chat_template.check_bounded(tokenizer)
    assert "later" in prompt_text(tokenizer, "later")
    before = signal.getsignal(signal.SIGPROF)
    with pytest.raises(UserError, match=r"refuses the turns user \(takes more than 1 seconds of computing\); use"):
        prompt_text(tokenizer, "now")
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_thread_renders_too(tokenizer: PreTrainedTokenizerBase) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(prompt_text(tokenizer, "Hi")))
    thread.start()
    thread.join()
    assert found == [prompt_text(tokenizer, "Hi")]


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{% include '/etc/hostname' %}",
        "{{ ('{0.__class__.__init__.__globals__}').format(messages) }}",
    ],
)
def test_a_template_reaches_nothing_outside(
    escape: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = escape
    with pytest.raises(UserError, match=r"^chat template: refuses the turns user"):
        rendered(tokenizer, [{"role": "user", "content": "Hi"}])
    assert not list(tmp_path.iterdir())
