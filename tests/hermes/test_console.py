"""What comes from the files of others steers no terminal: neither in an error nor in a line, a bar, a log, a warning or a traceback."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from hermes import console
from hermes.run import run_tool
from tools import doctor

ROOT = Path(__file__).resolve().parents[2]
EVIL = "a\x1b[2J\x07\x9b31m\u202eb\u2066\u2028c\rd\x00\x7f\u200f"
SPELT = r"a\x1b[2J\x07\x9b31m\u202eb\u2066\u2028c\rd\x00\x7f\u200f"


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    record = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(record)
    warnings.formatwarning = console.LAYOUT


def steers(text: str) -> bool:
    return not all(c.isprintable() or c == "\n" for c in text)


def test_a_line_stays_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"column {EVIL}\nforged", 5)
    console.warn(EVIL)
    said = capsys.readouterr()
    assert said.out == f"column {SPELT}\\nforged\n5\n"
    assert said.err == f"{SPELT}\n"


def test_words_of_every_script_and_columns_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("naïve 漢字 עברית 😀 −5 %", "   1,000  abc")
    assert capsys.readouterr().out == "naïve 漢字 עברית 😀 −5 %\n   1,000  abc\n"


@pytest.mark.parametrize("kind", [console.UserError, ValueError])
def test_an_error_and_its_traceback_steer_nothing(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise kind(f"column {EVIL}")

    with pytest.raises(SystemExit) as ended:
        run_tool("subset", fail)
    said = capsys.readouterr().err + str(ended.value)
    assert not steers(said)
    assert r"\x1b[2J" in said
    assert r"\u202e" in said


def test_a_bar_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    list(console.progress([1, 2], EVIL))
    assert not steers(capsys.readouterr().err)


def test_what_libraries_log_and_warn_of_steers_nothing() -> None:
    program = f"""
import logging, warnings
from hermes.run import run_tool
def main():
    logging.warning("token %s", {EVIL!r})
    logging.warning({EVIL!r})
    logging.warning("%(one)s", {{"one": {EVIL!r}}})
    warnings.warn({EVIL!r})
run_tool("tool", main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    said = done.stderr.decode()
    assert not steers(said)
    assert said.count(SPELT.split(chr(92) + "u2028", maxsplit=1)[0]) == 4


def test_a_check_of_the_doctor_steers_nothing() -> None:
    for check in (doctor.Check("params", EVIL), doctor.Check("params", "x", EVIL)):
        assert SPELT in str(check)
        assert not steers(str(check))


@pytest.mark.parametrize(
    "text",
    [
        "401 for https://user:SECRET@host/x",
        "Bearer SECRET",
        "the token hf_abcdefghijklmnopqrstuvwxyz0123 is invalid",
        "HTTPError(url='https://SECRET@host')",
    ],
)
def test_tokens_and_passwords_are_left_out(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    console.say(text)
    console.warn(text)
    with pytest.raises(SystemExit) as ended:
        run_tool("tool", lambda: (_ for _ in ()).throw(console.UserError(text)))
    found = capsys.readouterr()
    said = found.out + found.err + str(ended.value)
    assert said.count("***") == 3
    assert "SECRET" not in said
    assert "hf_abc" not in said


def test_addresses_and_mentions_stay(capsys: pytest.CaptureFixture[str]) -> None:
    text = "tests/tiny@0123 from https://host/a@b and me@example.org; hf_token, hf_bf16"
    console.say(text)
    assert capsys.readouterr().out == f"{text}\n"
