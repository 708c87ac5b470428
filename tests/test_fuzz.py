"""Damaged inputs of every reader: what it cannot read is one line for the user, and never a traceback.

Each case is a sound file in which bytes were changed, cut, doubled or put in, or a random value of JSON where a row is expected. A failure
names the seed of its case.
"""

import csv
import gzip
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hermes import params
from hermes.artifacts import open_parquet, read_json, read_object
from hermes.console import UserError
from hermes.data.decontamination import runs
from hermes.data.misfits import Misfit
from hermes.data.pairs import standard_pairs
from hermes.data.tables import read_table
from hermes.model.adapter_merge import Adapter
from hermes.model.safetensors_stream import stored_tensors
from hermes.settings import experiment
from hermes.settings.data import Choice, Columns, Format, Layout
from stages import fetch_data

ROOT = Path(__file__).parent.parent
CASES = 1500  # of each reader
COLUMNS = Columns(question="question", chosen="chosen", rejected="rejected", score="score", system="system")
LAYOUT = Layout(format="plain", columns=COLUMNS.model_copy(update={"score": None, "system": None}), choice=None)
ROWS = [
    {"question": f"What is {i}?", "chosen": "Ünï 🙂\n\nyes", "rejected": 'no, "never"', "extra": [i, None]}
    for i in range(5)
]


def damaged(sound: bytes, draw: random.Random) -> bytes:
    """Bytes with a few changes at random places."""
    content = bytearray(sound)
    for _ in range(draw.randint(1, 4)):
        place, kind = draw.randrange(len(content) + 1), draw.randrange(5)
        if kind == 0:
            content[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del content[place : place + draw.choice([1, 8, 1000])]
        elif kind == 2:
            content[place:place] = content[: draw.choice([1, 16, 300])]
        elif kind == 3:
            content[place:place] = draw.choice(
                [b"\0", b"\xff\xfe", b"[" * 2000, b"9" * 5000, b'"', b"\\ud83d", b"{", b": *a", b"\r"]
            )
        else:
            content[place : place + 1] = bytes(
                [(content[place] if place < len(content) else 0) ^ (1 << draw.randrange(8))]
            )
    return bytes(content)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLES = {
    "rows.jsonl": LINES,
    "rows.json": json.dumps(ROWS).encode(),
    "rows.jsonl.gz": gzip.compress(LINES, mtime=0),
    "rows.csv": as_csv(ROWS),
    "rows.parquet": as_parquet(ROWS),
}


def attempt(read: Callable[[], Any], seed: int, content: bytes) -> bool:
    """Whether it was read; any other error than one for the user fails."""
    try:
        read()
    except UserError:
        return False
    except Exception as error:
        pytest.fail(f"seed {seed}: {type(error).__name__}: {error}; {content[:200]!r}")
    return True


def fuzz(path: Path, sound: bytes, read: Callable[[], Any]) -> None:
    found = []
    for seed in range(CASES):
        path.write_bytes(content := damaged(sound, random.Random(seed)))
        found.append(attempt(read, seed, content))
    path.write_bytes(sound)
    assert attempt(read, -1, sound)
    assert not all(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    def read() -> None:
        _, batches = read_table(path, LAYOUT)
        for _ in batches:
            pass

    path = tmp_path / name
    fuzz(path, TABLES[name], read)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_split_is_made_standard_or_refused(name: str, tmp_path: Path) -> None:
    settings = fetch_data.Params.model_validate(
        {"data": read_profile()["data"] | {"columns": COLUMNS.model_dump() | {"score": None, "system": None}}}
    ).data
    path = tmp_path / name
    fuzz(path, TABLES[name], lambda: fetch_data.standardize([path], tmp_path / "out.parquet", settings, "here"))


def read_profile() -> dict[str, Any]:
    found: dict[str, Any] = params.read_yaml(ROOT / "params.yaml")["profiles"]["cpu"]
    return found


@pytest.mark.slow
def test_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    sound = (ROOT / "params.yaml").read_bytes()
    sound = sound[: sound.index(b"  # A first look")]  # one profile, as the whole file takes 0.1 s to read
    fuzz(tmp_path / "params.yaml", sound, lambda: experiment.check(Path("params.yaml")))


@pytest.mark.slow
@pytest.mark.parametrize("read", [read_json, read_object])
def test_json(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    fuzz(path, json.dumps({"a": [1, 2.5, None], "b": {"c": "text"}}).encode(), lambda: read(path))


@pytest.mark.slow
def test_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    fuzz(path, path.read_bytes(), lambda: stored_tensors(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(damage: str, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.zeros(2, 4), name.format("B"): torch.ones(4, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "sha256:0", "use_dora": False, "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / damage
    fuzz(path, path.read_bytes(), lambda: Adapter.read(tmp_path))


@pytest.mark.slow
def test_parquet_between_stages(tmp_path: Path) -> None:
    def read() -> None:
        with open_parquet(path) as file:
            assert file.schema_arrow is not None

    path = tmp_path / "train.parquet"
    fuzz(path, TABLES["rows.parquet"], read)


def value(draw: random.Random, depth: int = 3) -> Any:
    """A random value of JSON, with the keys and the texts that readers look for."""
    kind = draw.randrange(9 if depth else 7)
    marks = ["<|im_start|>user\nHi<|im_end|>", "\n\nHuman: Hi\n\nAssistant: Ho", "\ud83d", "[{'role':"]
    texts = ["", "text", "system", "user", "assistant", *marks]
    keys = ["role", "content", "from", "value", "question", "chosen", "rejected", "score", "text"]
    if kind < 3:
        return draw.choice(texts)
    if kind < 7:
        return draw.choice([None, True, False, 0, -1, 10**400, 1.5, float("nan"), float("inf"), 1 << 60])
    if kind == 7:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(keys): value(draw, depth - 1) for _ in range(draw.randrange(4))}


NAMES = ["question", "chosen", "rejected", "score", "system", "context", "candidates", "label"]
CHOICES = [
    None,
    Choice(candidates=["chosen", "rejected"], by="label", value="label", first=["text", 0], second=["user", 1]),
    Choice(candidates=["chosen", "rejected"], by="strength", value="score"),
    Choice(candidates="candidates", text="content", by="score", value="score", pairs="all"),
    Choice(candidates="candidates", by="rank", value="value"),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "chatml", "messages", "transcripts"])
@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_rows_are_pairs_or_misfits(layout: Format, choice: int) -> None:
    chosen = CHOICES[choice]
    named = COLUMNS if chosen is None else COLUMNS.model_copy(update=dict.fromkeys(("chosen", "rejected", "score")))
    settings, kinds = Layout(format=layout, columns=named, choice=chosen), set()
    for seed in range(CASES):
        draw = random.Random(seed)
        row = {name: value(draw) for name in NAMES}
        if draw.random() < 0.7:
            row["candidates"] = [
                {name: value(draw) for name in ("role", "content", "score", "value")} for _ in range(3)
            ]
        try:
            for pair in standard_pairs(row, settings):
                assert all(isinstance(pair[name], str) for name in ("question", "chosen", "rejected"))
                kinds.add("pair")
        except Misfit as misfit:
            kinds.add(misfit.kind)
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}; {row}")
    assert len(kinds) > 2, kinds


@pytest.mark.slow
def test_runs_of_any_text() -> None:
    for seed in range(CASES):
        draw = random.Random(seed)
        text = "".join(
            chr(draw.choice([draw.randrange(32, 127), draw.randrange(0x80, 0xD7FF)]))
            for _ in range(draw.randrange(200))
        )
        assert (runs(text) == sorted(set(runs(text).tolist()))).all()
