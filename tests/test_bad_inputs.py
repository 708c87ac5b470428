"""Bad inputs of every kind: each is refused in one line that says where and what to do, and leaves all files as they were.

A row is a name, what is done to a sound project, the program that then meets it as a user starts it, and what its line has to hold.
"""

import gzip
import hashlib
import io
import json
import math
import re
import runpy
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from hermes.artifacts import (
    MANIFEST,
    check_together,
    file_hashes,
    sha256_file,
    write_json,
    write_manifest,
    write_parquet,
)
from hermes.console import UserError
from hermes.model.base import load
from hermes.model.tokenizer import load_tokenizer
from hermes.settings.tokenize import TokenizeSettings
from stages import tokenize
from stages.train import save_adapter
from tests.conftest import ROOT, cpu_params, make_byte_tokenizer, write_random_llama
from tests.stages.test_report import write_reports
from tests.test_pipeline import CANARIES
from tools import verify

SEALED = (
    "data/raw",
    "data/subset",
    "models/base",
    "data/tokens",
    "data/reference",
    "models/adapter",
    "models/merged",
    "models/gguf",
    "models/compressed",
)
SPLITS = ("train", "validation", "test")
PROGRESS = re.compile(r".*: \d+ of (\d+|\?) .*")  # hermes.console.Lines
Change = Callable[[Path], Any]


class Row(NamedTuple):
    """A bad input."""

    name: str
    change: Change  # of a sound project, in its folder
    program: str  # a stage, or a tool with its arguments
    said: str  # a pattern of its line
    environment: Mapping[str, str] = {}
    with_gguf: bool = False  # whether the project has a sound GGUF file first


def run(program: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code of a program that is run as `python -m` does, in this process, and what it says at its exit."""
    name, *arguments = program.split()
    module = name if "." in name else f"stages.{name}"
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy: it is imported already
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        return (end.code or 0, "") if not isinstance(end.code, str) else (1, f"{end.code}\n")
    return 0, ""


def contents(root: Path) -> dict[str, str]:
    """The hash of every file but locks, which a kill -9 may leave anyway, and every folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
        if path.name == "dvc.lock" or not (path.suffix == ".lock" or (path.is_dir() and ".scratch" in path.parts))
    }


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which every stage has run, on a random model and made-up data."""
    disable_progress_bar()  # of Transformers, as hermes/__init__.py does where it is imported first
    root = tmp_path_factory.mktemp("sound")
    (root / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    (root / "packages.yaml").write_bytes((ROOT / "packages.yaml").read_bytes())
    write_random_llama(root / "my-model", make_byte_tokenizer())
    (root / "my-data").mkdir()
    for split in SPLITS:
        rows = [
            {"question": f"What is {i}, {split}?", "chosen": f"It is {i}.", "rejected": "No.", "delta_score": i / 8}
            for i in range(6)
        ]
        (root / f"my-data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "params.yaml").write_text(json.dumps(params()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in ("fetch_data", "fetch_model", "subset"):
            assert run(stage, patch) == (0, "")
        tokenizer, settings = (
            load_tokenizer(Path("models/base")),
            TokenizeSettings(**params()["profiles"]["cpu"]["tokenize"]),
        )
        for split in SPLITS:
            rows = pq.read_table(f"data/subset/{split}.parquet").to_pylist()
            ids, _ = tokenize.tokenize_split(rows, tokenizer, settings, split)
            write_parquet(Path(f"data/tokens/{split}.parquet"), pa.Table.from_pylist(ids, schema=tokenize.schema()))
        write_manifest(Path("data/tokens"), made_from=check_together(Path("models/base")))
        assert run("reference", patch) == (0, "")
        torch.manual_seed(0)
        model = get_peft_model(
            load(Path("models/base"), torch.float32), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
        )
        Path("models/adapter").mkdir()
        save_adapter(model, Path("models/adapter"), sha256_file(Path("models/base/manifest.json")))
        made_from = check_together(*map(Path, ("models/base", "data/tokens", "data/reference")))
        write_manifest(Path("models/adapter"), made_from=made_from)
        assert run("merge", patch) == (0, "")
        write_reports(root)
        Path("dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
        Path("params.yaml").write_text(json.dumps(params()))
        assert run("report", patch) == (0, "")
    return root


def params() -> dict[str, Any]:
    """Sound parameters of that project."""
    return cpu_params(
        data={"source": "./my-data"},
        model={"source": "./my-model"},
        subset={"k": None},
        base={"quantization": "none", "keep_dequantized": False, "dtype": "float32", "threads": 1},
        train={"lora_rank": 4, "lora_modules": ["q_proj"], "max_steps": 2},
        quantize={"types": ["Q8_0"]},
        evaluate={"tasks": ["preference"], "types": ["f16"], "slots": 2, "context": 256, "max_new_tokens": 8, "threads": 1},
    )  # fmt: skip


def seal(root: Path) -> None:
    """Has manifests agree with what lies there, so that what they would notice first is found by whoever reads it."""
    hashes: dict[str, str] = {}
    for name in SEALED:
        path = root / name / MANIFEST
        if not path.is_file():
            continue
        manifest = json.loads(path.read_text())
        manifest["made_from"] = {made: hashes.get(made, known) for made, known in manifest.get("made_from", {}).items()}
        write_json(path, {**manifest, "files": file_hashes(path.parent)})
        hashes[name] = sha256_file(path)


@pytest.fixture
def project(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound project, to be spoilt."""
    return shutil.copytree(sound, tmp_path / "project")


# What is done to a project.


def wrote(path: str, content: str | bytes) -> Change:
    """Another content of a file."""
    return lambda root: (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(path: str, share: float = 0.5) -> Change:
    """The beginning of a file alone."""
    return lambda root: (root / path).write_bytes(
        (root / path).read_bytes()[: int(share * (root / path).stat().st_size)]
    )


def gone(path: str) -> Change:
    """No such file or folder."""
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def replaced(path: str, old: str, new: str) -> Change:
    """Another text at one place of a file."""

    def change(root: Path) -> None:
        content = (root / path).read_bytes()
        assert old.encode() in content
        (root / path).write_bytes(content.replace(old.encode(), new.encode(), 1))

    return change


def keyed(path: str, key: str, value: Any) -> Change:
    """Another value of a key of a JSON file, where dots lead into it; None takes it out."""

    def change(root: Path) -> None:
        tree = place = json.loads((root / path).read_text())
        *around, last = key.split(".")
        for name in around:
            place = place[int(name) if isinstance(place, list) else name]
        if value is None:
            del place[last]
        else:
            place[last] = value
        text = json.dumps(tree)
        if path == "params.yaml":
            text = text.replace("NaN", ".nan").replace("Infinity", ".inf")
        (root / path).write_text(text)

    return change


def param(key: str, value: Any) -> Change:
    """Another value of a key of the profile, or of the top level behind a slash."""
    return keyed("params.yaml", key[1:] if key.startswith("/") else f"profiles.cpu.{key}", value)


def both(*changes: Change) -> Change:
    """Several changes."""
    return lambda root: [change(root) for change in changes]


def instead(name: str, content: bytes) -> Change:
    """Another file of the training rows."""

    def change(root: Path) -> None:
        (root / "my-data/train.jsonl").unlink()
        (root / "my-data" / name).write_bytes(content)

    return change


def parquet(make: Callable[[pa.Table], pa.Table] = lambda rows: rows) -> bytes:
    """A Parquet file of what is made of four sound rows."""
    file = io.BytesIO()
    rows = [{"question": f"{i}?", "chosen": "a", "rejected": "b", "delta_score": i / 2} for i in range(4)]
    pq.write_table(make(pa.Table.from_pylist(rows)), file)
    return file.getvalue()


def flipped(content: bytes, start: int, stop: int) -> bytes:
    """Bytes of which some are the opposite."""
    return content[:start] + bytes(255 - byte for byte in content[start:stop]) + content[stop:]


def tensors(path: str, make: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Other tensors in a sound safetensors file."""

    def change(root: Path) -> None:
        save_file({name: t.contiguous() for name, t in make(load_file(root / path)).items()}, root / path)

    return change


def headed(path: str, name: str, key: str, value: Any) -> Change:
    """Another entry of a tensor in the header of a safetensors file."""

    def change(root: Path) -> None:
        content = (root / path).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header[name][key] = value
        text = json.dumps(header).encode()
        (root / path).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return change


def indexed(index: str) -> Change:
    """A base in another file, which this index is to find."""

    def change(root: Path) -> None:
        (root / BASE).rename(root / "models/base/model-1.safetensors")
        (root / "models/base/model.safetensors.index.json").write_text(index)

    return change


def numbered(place: int, value: int, kind: str = "<Q") -> Change:
    """Another number in the header of the GGUF file."""
    return packed(lambda content: content[:place] + struct.pack(kind, value) + content[place + struct.calcsize(kind) :])


def packed(make: Callable[[bytes], bytes]) -> Change:
    """Other bytes of the GGUF file."""

    def change(root: Path) -> None:
        (root / GGUF).write_bytes(make((root / GGUF).read_bytes()))

    return change


def packed_file(path: str) -> Change:
    """Flipped bytes in the pages of a Parquet file."""
    return lambda root: (root / path).write_bytes(flipped((root / path).read_bytes(), 8, 60))


def lines(path: str, make: Callable[[str], str]) -> Change:
    """Another text of a file."""

    def change(root: Path) -> None:
        old = (root / path).read_text()
        assert make(old) != old
        (root / path).write_text(make(old))

    return change


def nothing(root: Path) -> None:
    """What is wrong is said by the arguments or the environment."""


BASE, GGUF = "models/base/model.safetensors", "models/gguf/f16.gguf"
ADAPTER, CONFIG = "models/adapter/adapter_model.safetensors", "models/adapter/adapter_config.json"
EVAL, TRAIN = "data/evaluation", "reports/train"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
REMAKE = r"delete it and run `dvc repro`$"
SEEN = r"; no other row fits either, see `data\.format` and `data\.columns` in params\.yaml$"
PAIR = '"question": "q", "chosen": "a", "rejected": "b", "delta_score": 1'
CSV = "question,chosen,rejected,delta_score\n"

PARAMS = [  # a key of the profile, or of the top level behind a slash; a value; what the line says of it
    ("/seed", 2**32, r"`seed` is 4294967296: .* less than 4294967296$"),
    ("/seed", True, r"`seed` is True: .* valid integer$"),
    ("/beta", "0,1", r"`beta` is '0,1': .* valid number$"),
    ("/beta", float("nan"), r"`beta` is nan: "),
    ("/label_smoothing", 0.5, r"`label_smoothing` is 0\.5: .* less than 0\.5$"),
    ("/loss_type", ["sigmoid", "sft"], r"`loss_type` is \['sigmoid', 'sft'\]: Input should be 'sigmoid', "),
    ("/loss_type", "\ud83d", r"`loss_type` is '\\ud83d': "),
    ("/loss_type", "sig\nmoid\r\x07", r"`loss_type` is 'sig\\nmoid\\r\\x07': "),
    ("/se\x1b[31med", 1, r"unknown key `se\\x1b\[31med`; allowed there: beta, "),
    ("/collect", "no", r"`collect` is 'no': .* valid dictionary"),
    ("/wandb", {"enabled": True, "project": 7}, r"`wandb\.project` is 7: .* valid string$"),
    ("/profile", [], r"`profile: \[\]` names no entry of `profiles`; choose one of cpu$"),
    ("/profiles", [1], r"`profiles` must map each profile's name to its sections$"),
    ("\u202etrain", 1, r"unknown key `profiles\.cpu\.\\u202etrain`; allowed there: base, "),
    ("tokenize", None, r"key `profiles\.cpu\.tokenize` is missing$"),
    ("train", [], r"`profiles\.cpu\.train` is \[\]: .* valid dictionary"),
    ("data.source", ["./a"], r"`profiles\.cpu\.data\.source` is \['\./a'\]: .* valid string$"),
    ("data.source", "owner/../../x", r"`source` is 'owner/\.\./\.\./x'; write embedded, owner/name, or a folder"),
    ("data.columns", ["question"], r"data\.columns` is \['question'\]: .* valid dictionary"),
    ("data.columns.score", ["a", "b", "c"], r"data\.columns\.score` is \['a', 'b', 'c'\]: "),
    ("data.splits.dev", "dev", r"data\.splits\.dev` is 'dev': Input should be 'train', 'validation' or 'test'$"),
    ("data.splits.train", 1, r"data\.splits\.train` is 1: .* valid string$"),
    ("data.mixed_with", {"source": "./x"}, r"data\.mixed_with` is \{'source': '\./x'\}: .* valid list$"),
    ("data.decontaminate", ["nous", "nous"], r"data\.decontaminate` .*: nous is in it twice; name it once$"),
    ("data.choice", "best", r"data\.choice` is 'best': .* valid dictionary"),
    ("model.source", 7, r"model\.source` is 7: .* valid string$"),
    ("model.chat_template", ["x"], r"model\.chat_template` is \['x'\]: .* valid string$"),
    ("subset.k", 1.5, r"subset\.k` is 1\.5: .* valid integer$"),
    ("subset.drop_empty", "no", r"subset\.drop_empty` is 'no': .* valid boolean$"),
    ("subset.near_duplicate_similarity", 1.1, r"near_duplicate_similarity` is 1\.1: .* less than or equal to 1$"),
    ("tokenize.max_length", -5, r"tokenize\.max_length` is -5: .* greater than 0$"),
    ("tokenize.max_length", 0.9, r"`max_length` is a share \(0\.9\), which goes with `overlong: drop`$"),
    ("tokenize.template", ["{question}"], r"tokenize\.template` is \['\{question\}'\]: .* valid dictionary"),
    ("tokenize.template", {"prompt": "{question}{date}", "answer": "{answer}"}, r"holds \{date\}; there is only \{question\} and"),
    ("base.threads", 0, r"base\.threads` is 0: .* greater than or equal to 1$"),
    ("base.double_quantization", 1, r"base\.double_quantization` is 1: .* valid boolean$"),
    ("reference.batch_size", 1e3, r"reference\.batch_size` is 1000\.0: .* valid integer$"),
    ("train.lora_alpha", 0.5, r"train\.lora_alpha` is 0\.5: .* valid integer$"),
    ("train.lora_dropout", 1, r"train\.lora_dropout` is 1: .* less than 1$"),
    ("train.lora_modules", "q_proj", r"train\.lora_modules` is 'q_proj': .* valid list or Input should be 'all-linear'$"),
    ("train.learning_rate", float("nan"), r"train\.learning_rate` is nan: "),
    ("train.max_grad_norm", float("inf"), r"train\.max_grad_norm` is inf: "),
    ("train.epochs", 0, r"train\.epochs` is 0: .* greater than 0$"),
    ("train.processes", 0, r"train\.processes` is 0: .* greater than 0$"),
    ("data.source", "./" + "a" * 5000, r"`source` is '\./a+'\.\.\.; no file can have such a name$"),
    ("data.source", "./a\0b", r"`source` is '\./a\\x00b'\.\.\.; no file can have such a name$"),
    ("model.chat_template", "\ud83d{{ messages }}", r"model\.chat_template` is '\\ud83d\{\{ messages \}\}': holds half a character$"),
    ("merge.max_shard_size", "٢GB", r"merge\.max_shard_size` is '٢GB': write it like 200MB or 5GB$"),
    ("merge.max_shard_size", "5TB", r"merge\.max_shard_size` is '5TB': write it like 200MB or 5GB$"),
    ("quantize.types", ["f16"], r"quantize\.types\.0` is 'f16': Input should be 'Q8_0', "),
    ("evaluate.split", "train", r"evaluate\.split` is 'train': Input should be 'validation' or 'test'$"),
    ("evaluate.suites", {}, r"evaluate\.suites` is \{\}: .* valid list$"),
    ("evaluate.suites", ["open_llm_v2"], r"the longest answer of `open_llm_v2` \(1280 tokens\) leaves no room .* `context` \(256\)$"),
]  # fmt: skip
TEXTS: list[tuple[str, str | bytes, str]] = [  # params.yaml as a whole; what the line says of it
    ("comments alone", "# nothing\n", r"expected a mapping of keys, found NoneType$"),
    ("NUL", b"seed: 42\0\n", r"not valid YAML: .*position 8$"),
    ("latin-1", "project: hérmes\n".encode("latin-1"), r"not valid YAML: .*position 10$"),
    ("two documents", "---\nseed: 1\n---\nseed: 2\n", r"not valid YAML: expected a single document .* line 3"),
    ("a tag that would run code", "seed: !!python/object/apply:os.system ['true']\n", r"could not determine a constructor for the tag"),
    ("a profile inside itself", "profile: cpu\nprofiles: &a {cpu: *a}\n", r"unknown key `profiles\.cpu\.cpu`; allowed there: base"),
    ("a profile named by a number", "profile: 1\nprofiles: {1: {}}\n", r"the profile '1' has a name that is no text \(write"),
    ("profiles of mixed names", "profile: x\nprofiles: {1: {}, a: {}}\n", r"the profile '1' has a name that is no text"),
    ("a merge key of numbers", "<<: [1]\nprofile: cpu\nprofiles: {cpu: {}}\n", r"not valid YAML: .* expected a mapping for merging"),
    ("a list as a key", "? [1, 2]\n: 2\nprofile: cpu\nprofiles: {cpu: {}}\n", r"unknown key `\(1, 2\)`; allowed there: "),
]  # fmt: skip
JSONL: list[tuple[str, bytes, str]] = [  # my-data/train.jsonl; what the line says of it
    ("a byte order mark alone", b"\xef\xbb\xbf", r": has no rows$"),
    ("UTF-16", ("{" + PAIR + "}\n").encode("utf-16"), r": not a readable jsonl file \('utf-8' codec can't decode"),
    ("Latin-1", b'{"question": "\xe9"}\n', r": not a readable jsonl file \('utf-8' codec can't decode"),
    ("a list with a comma too many", b'[{"question": "a"},]', r": not a readable jsonl file \("),
    ("lists as rows", b"[[1]]", r": row 0 is '\[1\]'; expected an object with the columns as keys$"),
    (
        "columns of values",
        b'{"question": ["a"], "chosen": ["b"], "rejected": ["c"], "delta_score": [1]}',
        r", row 0: `question` is .* expected text" + SEEN,
    ),
    (
        "rows under a key",
        b'{"data": [{"question": "a"}]}',
        r": column `question` is missing; found data; see `data\.columns`",
    ),
    ("empty objects", b"{}\n{}\n", r": has no rows$"),
    (
        "not a number as text",
        b'{"question": NaN, "chosen": "a", "rejected": "b", "delta_score": 1}',
        r", row 0: `question` is 'nan' .* expected text" + SEEN,
    ),
    (
        "five hundred brackets",
        b'{"question": ' + b"[" * 500 + b"]" * 500 + b', "chosen": "a", "rejected": "b", "delta_score": 1}',
        r", row 0: `question` is .* expected text" + SEEN,
    ),
    (
        "half a character in a question",
        b'{"question": "\\ud83d", "chosen": "a", "rejected": "b", "delta_score": 1}',
        r", row 0: a text holds half a character",
    ),
    (
        "half a character in a column's name",
        b'{"\\ud83d": 1, ' + PAIR.encode() + b"}",
        r": not a readable jsonl file \(.*surrogates not allowed",
    ),
    (
        "half a character in a carried column",
        b'{"topic": "\\ud83d", ' + PAIR.encode() + b"}",
        r", row 0: a value that no column can hold",
    ),
    (
        "a column's name that clears the screen",
        b'{"\\u001b[2J": "x"}',
        r": column `question` is missing; found \\x1b\[2J; ",
    ),
    (
        "messages as a plain answer",
        b'{"question": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": "b", "delta_score": 1}',
        r", row 0: `chosen` is .* expected text" + SEEN,
    ),
    (
        "a score in words",
        b'{"question": "q", "chosen": "a", "rejected": "b", "delta_score": "high"}',
        r", row 0: delta_score is \['high'\]; expected numbers" + SEEN,
    ),
]
FILES: list[tuple[str, str, bytes, str]] = [  # in its place this file of my-data
    ("is no gzip", "train.jsonl.gz", b"x", r"not a readable jsonl\.gz file \(Not a gzipped file"),
    (
        "ends inside",
        "train.jsonl.gz",
        gzip.compress(b'{"question": "a"}\n' * 90)[:30],
        r"not a readable jsonl\.gz file \(Compressed file ended",
    ),
    (
        "rubbish behind",
        "train.jsonl.gz",
        gzip.compress(b'{"question": "a"}\n') + b"rubbish",
        r"not a readable jsonl\.gz file \(",
    ),
    ("empty", "train.csv", b"", r"not a readable csv file \(Empty CSV file\)$"),
    ("header alone", "train.csv", CSV.encode(), r"has no rows$"),
    ("short row", "train.csv", CSV.encode() + b"a,b\n", r"not a readable csv file \(.*Expected 4 columns, got 2"),
    (
        "semicolons",
        "train.csv",
        CSV.replace(",", ";").encode() + b"a;b;c;1\n",
        r"column `question` is missing; found question;chosen",
    ),
    ("open quote", "train.csv", CSV.encode() + b'"a,b,c,1\n', r"not a readable csv file \("),
    ("Latin-1", "train.csv", CSV.encode() + b"\xe9,b,c,1\n", r"not a readable csv file \(.*invalid UTF8 data\)$"),
    ("UTF-16", "train.csv", (CSV + "a,b,c,1\n").encode("utf-16"), r"not a readable csv file \("),
    ("empty", "train.parquet", b"", r"not a readable parquet file \(Parquet file size is 0 bytes\)$"),
    ("magic alone", "train.parquet", b"PAR1PAR1", r"not a readable parquet file \("),
    ("cut", "train.parquet", parquet()[:-20], r"not a readable parquet file \("),
    ("JSON lines", "train.parquet", b'{"question": "a"}\n' * 9, r"not a readable parquet file \("),
    ("footer flipped", "train.parquet", flipped(parquet(), -60, -8), r"not a readable parquet file \("),
    (
        "pages flipped",
        "train.parquet",
        flipped(parquet(), 8, 60),
        r"not a readable parquet file \(row 0 or one behind it: ",
    ),
    ("no rows", "train.parquet", parquet(lambda t: t.slice(0, 0)), r"has no rows$"),
    ("no columns", "train.parquet", parquet(lambda t: t.select([])), r"has no rows$"),
    (
        "bytes",
        "train.parquet",
        parquet(lambda t: t.set_column(0, "question", pa.array([b"\xff"] * 4))),
        r"row 0: `question` is .*\(bytes\); expected text",
    ),
    (
        "texts that are none",
        "train.parquet",
        parquet(lambda t: t.set_column(0, "question", pa.array([b"\xff"] * 4).view(pa.string()))),
        r"can't decode byte 0xff",
    ),
    (
        "only nothing",
        "train.parquet",
        parquet(lambda t: t.set_column(1, "chosen", pa.nulls(4))),
        r"row 0: `chosen` is empty" + SEEN,
    ),
    (
        "times",
        "train.parquet",
        parquet(lambda t: t.set_column(0, "question", pa.array([0] * 4, pa.timestamp("ns")))),
        r"row 0: `question` is '1970-01-01 .* expected text",
    ),
    (
        "column twice",
        "train.parquet",
        parquet(lambda t: t.append_column("chosen", t["chosen"])),
        r"two columns are named `chosen`; rename one$",
    ),
]
BETWEEN: list[tuple[str, Change, str, str]] = [  # a table that a stage hands to another
    ("raw pages flipped", packed_file("data/raw/train.parquet"), "subset", r"data/raw/train\.parquet: "),
    (
        "raw of other columns",
        wrote("data/raw/train.parquet", parquet(lambda t: t.select(["chosen"]))),
        "subset",
        r"data/raw/train\.parquet: column `question` is missing; found chosen",
    ),
    (
        "raw gone",
        gone("data/raw/train.parquet"),
        "subset",
        r"data/raw: has no train\.parquet; run `dvc repro fetch_data`$",
    ),
    (
        "misfits a list",
        wrote("data/raw/misfits.json", "[]"),
        "subset",
        r"data/raw/misfits\.json: holds '\[\]'; expected an object; " + REMAKE,
    ),
    (
        "misfits without numbers",
        wrote("data/raw/misfits.json", '{"train": {"zero": {"kind": "a", "found": "b"}}}'),
        "subset",
        r"data/raw/misfits\.json: not the misfits of train .*" + REMAKE,
    ),
    (
        "misfits without kind",
        wrote("data/raw/misfits.json", '{"train": {"0": {"found": "b"}}}'),
        "subset",
        r"data/raw/misfits\.json: not the misfits of train .*" + REMAKE,
    ),
    (
        "suites no Parquet",
        wrote("data/raw/suites.parquet", "no"),
        "subset",
        r"data/raw/suites\.parquet: not a readable Parquet file .*" + REMAKE,
    ),
    (
        "suites of other columns",
        wrote("data/raw/suites.parquet", parquet()),
        "subset",
        r"data/raw/suites\.parquet: has no column `suite`, but question, .*" + REMAKE,
    ),
    (
        "tokens pages flipped",
        packed_file("data/tokens/train.parquet"),
        "reference",
        r"data/tokens/train\.parquet: .*dvc repro",
    ),
    (
        "tokens of other columns",
        wrote("data/tokens/train.parquet", parquet()),
        "reference",
        r"data/tokens/train\.parquet: .*dvc repro",
    ),
    (
        "tokens pages flipped before training",
        packed_file("data/tokens/train.parquet"),
        "train",
        r"data/tokens/train\.parquet: .*dvc repro",
    ),
    (
        "reference pages flipped",
        packed_file("data/reference/train.parquet"),
        "train",
        r"data/reference/train\.parquet: .*dvc repro",
    ),
    (
        "reference of other columns",
        wrote("data/reference/train.parquet", parquet()),
        "train",
        r"data/reference/train\.parquet: .*dvc repro",
    ),
    (
        "reference gone",
        gone("data/reference"),
        "train",
        r"data/reference: no such folder; run `dvc repro` to make it$",
    ),
    (
        "tokens pages flipped before a plan",
        packed_file("data/tokens/train.parquet"),
        "tools.plan --gpu A40",
        r"data/tokens/train\.parquet: not a readable Parquet file .*" + REMAKE,
    ),
    (
        "counts of rows a list before a plan",
        wrote("reports/subset.json", "[]"),
        "tools.plan --gpu A40",
        r"reports/subset\.json: holds '\[\]'; expected an object",
    ),
    (
        "no counts of rows before a plan",
        wrote("reports/subset.json", '{"train": null}'),
        "tools.plan --gpu A40",
        r"reports/subset\.json: does not count the training pairs; run `dvc repro --force subset`$",
    ),
    (
        "manifest a list before a plan",
        wrote("models/base/manifest.json", "[]"),
        "tools.plan --gpu A40",
        r"models/base/manifest\.json: holds '\[\]'; expected an object",
    ),
    (
        "manifest of other data",
        wrote("data/raw/manifest.json", "{}"),
        "tools.compare_published",
        r"the last run's data are None, not ",
    ),
]
MODELS: list[tuple[str, Change, str, str]] = [  # a model, its tokenizer or its chat template
    (
        "source: config cut",
        cut("my-model/config.json"),
        "fetch_model",
        r"my-model/config\.json: not valid JSON .*; mend it at its source",
    ),
    (
        "source: weights a folder",
        both(gone("my-model/model.safetensors"), lambda root: (root / "my-model/model.safetensors").mkdir()),
        "fetch_model",
        r"`model\.source` is 'my-model', which holds no safetensors model$",
    ),
    (
        "source: manifest a list",
        wrote("my-model/manifest.json", "[]"),
        "fetch_model",
        r"my-model/manifest\.json: holds '\[\]'; expected an object",
    ),
    (
        "source: template no UTF-8",
        wrote("my-model/chat_template.jinja", b"\xff\xfe"),
        "fetch_model",
        r"\./my-model: chat_template\.jinja is no UTF-8 .*; mend it at its source",
    ),
    (
        "source: tokenizer cut under a template of one's own",
        both(param("model.chat_template", "{{ messages }}"), cut("my-model/tokenizer.json")),
        "fetch_model",
        r"\./my-model: its tokenizer cannot be read ",
    ),
    *(
        (
            f"template {text}",
            param("model.chat_template", text),
            "fetch_model",
            rf"`model\.chat_template` does not render a conversation \({said}",
        )
        for text, said in (
            ("{% for %}", "TemplateSyntaxError: "),
            ("{{ 1 / 0 }}", "ZeroDivisionError: "),
            ("{{ nobody.name }}", "UndefinedError: "),
            ("{% include '/etc/passwd' %}", "TypeError: no loader"),
            ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
        )
    ),
    ("base gone", gone("models/base"), "tokenize", r"models/base: no such folder; run `dvc repro` to make it$"),
    ("merged gone", gone("models/merged"), "quantize", r"models/merged: no such folder; run `dvc repro` to make it$"),
    *(
        (
            f"config.json {key}={value!r}",
            keyed("models/base/config.json", key, value),
            "tokenize",
            rf"models/base: {said}",
        )
        for key, value, said in (
            ("model_type", "nobody", r"is not a readable model \(ValueError: .* model type `nobody`"),
            ("num_hidden_layers", "two", r"is not a readable model \(.*'num_hidden_layers' expected int"),
            ("num_hidden_layers", 3, r"lacks model\.layers\.2\."),
            ("num_hidden_layers", 1, r"holds what the architecture has no place for, model\.layers\.1\."),
            ("num_attention_heads", 0, r"is not a readable model \(ZeroDivisionError"),
            ("vocab_size", 10, r"its tokenizer has the id 258, and its embedding 10 rows"),
            ("hidden_size", 10**12, r"has another shape than the architecture for model\.embed_tokens\.weight"),
            ("dtype", "float7", r"is not a readable model \(.*float7"),
            ("eos_token_id", -1, r"`eos_token_id` of config\.json is -1; correct it in a copy"),
            ("quantization_config", {"bits": 4}, r"is quantized already "),
        )
    ),
    *(
        (
            f"config cut before {stage}",
            cut("models/base/config.json"),
            stage,
            r"models/base: .*config\.json' is not a valid JSON file.*dvc repro`$",
        )
        for stage in ("tokenize", "reference", "train", "merge")
    ),
    (
        "config gone before a merge onto nf4",
        both(gone("models/base/config.json"), param("merge.base", "nf4"), param("base.quantization", "nf4")),
        "merge",
        r"models/base: is not a readable model .*" + REMAKE,
    ),
    (
        "generation_config cut before merge",
        cut("models/base/generation_config.json"),
        "merge",
        r"models/base: its generation_config\.json cannot be read .*" + REMAKE,
    ),
    (
        "generation_config a list",
        wrote("models/base/generation_config.json", "[]"),
        "tokenize",
        r"models/base: is not a readable model \(",
    ),
    ("weights cut", cut(BASE), "tokenize", r"models/base/model\.safetensors: is cut or has bytes too many"),
    (
        "weights a pointer of Git LFS",
        wrote(BASE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"),
        "tokenize",
        r"model\.safetensors: .*its header would be longer than the file",
    ),
    (
        "weights a pickle",
        wrote(BASE, b"\x80\x04K\x01."),
        "tokenize",
        r"model\.safetensors: not a readable safetensors file \(",
    ),
    (
        "weights' header a list",
        wrote(BASE, (2).to_bytes(8, "little") + b"[]"),
        "tokenize",
        r"model\.safetensors: .*its header is no object",
    ),
    (
        "a shape that is not its bytes",
        headed(BASE, Q_PROJ, "shape", [7]),
        "merge",
        r"model\.safetensors: model\.layers\.0\.self_attn\.q_proj\.weight of \(7,\) has 8192 bytes; delete the folder",
    ),
    (
        "an offset below zero",
        headed(BASE, "model.norm.weight", "data_offsets", [-8, 120]),
        "tokenize",
        r"models/base.*: ",
    ),
    (
        "a tensor missing",
        tensors(BASE, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}),
        "tokenize",
        r"models/base: lacks model\.norm\.weight",
    ),
    (
        "a tensor too many",
        tensors(BASE, lambda t: t | {"extra": torch.zeros(2)}),
        "tokenize",
        r"holds what the architecture has no place for, extra",
    ),
    (
        "a tensor of another shape",
        tensors(BASE, lambda t: t | {"model.norm.weight": torch.zeros(2)}),
        "tokenize",
        r"another shape than the architecture for model\.norm\.weight",
    ),
    (
        "a tensor of int8",
        tensors(BASE, lambda t: t | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
        "tokenize",
        r"model\.norm\.weight is I8; F32, F16, BF16 are read",
    ),
    (
        "weights that are no numbers",
        tensors(BASE, lambda t: t | {"model.norm.weight": torch.full((64,), math.nan)}),
        "reference",
        r"models/base: .*its weights are damaged$",
    ),
    ("index a list", indexed("[]"), "tokenize", r"models/base: is not a readable model \("),
    ("index cut", indexed('{"metadata": {'), "tokenize", r"models/base: is not a readable model \(JSONDecodeError"),
    (
        "index of another file",
        indexed('{"metadata": {}, "weight_map": {"model.norm.weight": "model-9.safetensors"}}'),
        "tokenize",
        r"is not a readable model \(FileNotFoundError: .*model-9\.safetensors",
    ),
    (
        "tokenizer cut",
        cut("models/base/tokenizer.json"),
        "tokenize",
        r"models/base: has no readable tokenizer \(JSONDecodeError",
    ),
    (
        "tokenizer empty",
        wrote("models/base/tokenizer.json", "{}"),
        "tokenize",
        r"models/base: has no readable tokenizer \(",
    ),
    (
        "tokenizer of a kind that is none",
        keyed("models/base/tokenizer.json", "model.type", "Nobody"),
        "tokenize",
        r"models/base: has no readable tokenizer \(",
    ),
    (
        "tokenizer with an id too large",
        keyed("models/base/tokenizer.json", "model.vocab.zzz", 100000),
        "tokenize",
        r"its tokenizer has the id 100000, and its embedding 259 rows",
    ),
    (
        "tokenizer_config a list",
        wrote("models/base/tokenizer_config.json", "[]"),
        "tokenize",
        r"models/base: has no readable tokenizer \(",
    ),
    *(
        (f"base template {name}", wrote("models/base/chat_template.jinja", text), "tokenize", rf"models/base: .*{said}")
        for name, text, said in (
            ("empty", "", r"has no chat template; write one into `model\.chat_template`$"),
            ("constant", "Hello", r"leaves out the answer; use a template that writes it$"),
            (
                "unfinished",
                "{% for m in messages %}",
                r"refuses the turns user, assistant \(Unexpected end of template",
            ),
            ("endless", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", r"refuses the turns .*recursion"),
            ("no text", b"\xff", r"has no readable tokenizer \(UnicodeDecodeError"),
            (
                "random",
                "{{ [1, 2] | random }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
                r"draws at random, so that ids differ from run to run",
            ),
        )
    ),
]
ADAPTERS: list[tuple[str, Change, str]] = [
    *(
        (f"{key}={value!r}", keyed(CONFIG, key, value), said)
        for key, value, said in (
            ("r", True, r"adapter_config\.json: `r` is True; expected a positive number; " + REMAKE),
            ("r", 10**400, r"adapter_config\.json: `r` is 10+; expected a positive number; " + REMAKE),
            ("lora_alpha", -6, r"`lora_alpha` is -6; expected a positive number"),
            ("lora_alpha", [6], r"`lora_alpha` is \[6\]; expected a positive number"),
            ("base_model_name_or_path", None, r"`base_model_name_or_path` is None; expected text"),
            ("use_dora", True, r"`use_dora` is True; only plain LoRA is merged here$"),
            ("rank_pattern", {"q_proj": 8}, r"`rank_pattern` is \{'q_proj': 8\}; only plain LoRA"),
            ("peft_type", "IA3", r"`peft_type` is 'IA3'; only plain LoRA is merged here$"),
        )
    ),
    ("config a list", wrote(CONFIG, "[]"), r"adapter_config\.json: holds '\[\]'; expected an object; " + REMAKE),
    ("weights gone", gone(ADAPTER), r"models/adapter: cannot be merged \(No such file"),
    ("weights cut", cut(ADAPTER), r"models/adapter: cannot be merged \(.*; delete it and run `dvc repro train`$"),
    ("weights empty", wrote(ADAPTER, ""), r"models/adapter: cannot be merged \("),
    (
        "no tensors",
        tensors(ADAPTER, lambda t: {}),
        r"models/adapter: holds 0 tensors, of which 0 are pairs of A and B; " + REMAKE,
    ),
    (
        "A without B",
        tensors(ADAPTER, lambda t: {k: v for k, v in t.items() if "layers.0" not in k or "lora_A" in k}),
        r"models/adapter: cannot be merged \(File does not contain tensor .*lora_B",
    ),
    (
        "B without A",
        tensors(ADAPTER, lambda t: {k: v for k, v in t.items() if "layers.0" not in k or "lora_B" in k}),
        r"models/adapter: holds 3 tensors, of which 1 are pairs of A and B",
    ),
    (
        "of a layer that is not there",
        tensors(ADAPTER, lambda t: {k.replace("layers.0", "layers.9"): v for k, v in t.items()}),
        r"changes model\.layers\.9\.self_attn\.q_proj\.weight, which models/base does not have",
    ),
    (
        "of another width",
        tensors(ADAPTER, lambda t: {k: torch.zeros(3, 4) if "lora_B" in k else v for k, v in t.items()}),
        r"changes model\.layers\.0\.self_attn\.q_proj\.weight by \(3, 64\); it is \(64, 64\)$",
    ),
    (
        "a scalar",
        tensors(ADAPTER, lambda t: {k: torch.tensor(1.0) if "lora_A" in k else v for k, v in t.items()}),
        r"lora_A\.weight is F32 of \[\]; expected an F32 matrix; " + REMAKE,
    ),
    (
        "three dimensions",
        tensors(ADAPTER, lambda t: {k: v[..., None] for k, v in t.items()}),
        r"is F32 of \[4, 64, 1\]; expected an F32 matrix",
    ),
    (
        "int8",
        tensors(ADAPTER, lambda t: {k: v.to(torch.int8) for k, v in t.items()}),
        r"is I8 of .*; expected an F32 matrix",
    ),
    (
        "half of it bfloat16",
        tensors(ADAPTER, lambda t: {k: v.bfloat16() if "lora_A" in k else v for k, v in t.items()}),
        r"is BF16 of .*; expected an F32 matrix",
    ),
    (
        "no numbers",
        tensors(ADAPTER, lambda t: {k: v * math.nan for k, v in t.items()}),
        r"makes model\.layers\.0\.self_attn\.q_proj\.weight infinite or no number",
    ),
]
GGUFS: list[tuple[str, Change]] = [
    ("empty", packed(lambda content: b"")),
    ("of another magic", packed(lambda content: b"GGML" + content[4:])),
    ("of version 0", numbered(4, 0, "<I")),
    ("in the other byte order", numbered(4, 3, ">I")),
    ("of 2^63 tensors", numbered(8, 2**63)),
    ("of 2^40 tensors", numbered(8, 2**40)),
    ("of 2^62 keys", numbered(16, 2**62)),
    ("of no keys", numbered(16, 0)),
    ("with a key of 2^60 bytes", numbered(24, 2**60)),
    ("cut in its header", cut(GGUF, 30 / 7e6)),
    ("cut in its vocabulary", packed(lambda content: content[:5000])),
    ("cut in its weights", packed(lambda content: content[:-1000])),
    ("with flipped metadata", packed(lambda content: flipped(content, 24, 400))),
    ("of an unknown architecture", packed(lambda content: content.replace(b"llama", b"nobod"))),
    ("without tokens", packed(lambda content: content.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))),
    ("with a tensor twice", packed(lambda content: content.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))),
]
REPORTS: list[tuple[str, Change, str, str]] = [  # what report reads: the file, what is done, what the line says
    ("a list", wrote(f"{EVAL}/comparison.json", "[]"), "comparison.json", r"expected an object, found '\[\]'"),
    (
        "a list of pairs",
        wrote(f"{EVAL}/comparison.json", '[["merged", {}]]'),
        "comparison.json",
        r"expected an object, found ",
    ),
    ("no merged", keyed(f"{EVAL}/comparison.json", "merged", None), "comparison.json", r"says nothing of merged"),
    ("merged is null", wrote(f"{EVAL}/comparison.json", '{"merged": null}'), "comparison.json", r"`merged`: "),
    (
        "a gain in words",
        keyed(f"{EVAL}/comparison.json", "merged.strict.points", "many"),
        "comparison.json",
        r"`merged\.strict\.points`: .*valid number",
    ),
    (
        "a gain without an end",
        keyed(f"{EVAL}/comparison.json", "merged.strict.low", None),
        "comparison.json",
        r"`merged\.strict\.low`: Field required",
    ),
    (
        "a gain that is no number",
        keyed(f"{EVAL}/comparison.json", "merged.strict.points", math.nan),
        "comparison.json",
        r"`merged\.strict\.points`: .*finite number",
    ),
    (
        "a kind nobody was asked",
        keyed(f"{EVAL}/comparison.json", "merged.by_kind.nobody", {"points": 1.0, "low": 0.0, "high": 2.0, "n": 3}),
        "comparison.json",
        r"compares nobody, which base\.json does not have",
    ),
    ("brackets", wrote(f"{EVAL}/comparison.json", "[" * 100_000), "comparison.json", r"recursion"),
    (
        "a folder",
        both(gone(f"{EVAL}/comparison.json"), lambda root: (root / f"{EVAL}/comparison.json").mkdir()),
        "comparison.json",
        r"Is a directory",
    ),
    ("no text", wrote(f"{EVAL}/comparison.json", b"\xff\xfe{}"), "comparison.json", r"codec can't decode"),
    ("a number", wrote(f"{EVAL}/divergence.json", "7"), "divergence.json", r"expected an object, found '7'"),
    ("a file's list", keyed(f"{EVAL}/divergence.json", "Q8_0", []), "divergence.json", r"`Q8_0`: "),
    (
        "a divergence in words",
        keyed(f"{EVAL}/divergence.json", "Q8_0.mean_kl", "small"),
        "divergence.json",
        r"`Q8_0\.mean_kl`: ",
    ),
    ("empty", wrote(f"{EVAL}/merge.json", "{}"), "merge.json", r"`rounding`: Field required"),
    ("a text", keyed(f"{EVAL}/merge.json", "bf16", "x"), "merge.json", r"`bf16`: "),
    (
        "a share without accuracy",
        keyed(f"{EVAL}/merged.json", "strict.seen", {}),
        "merged.json",
        r"`strict\.seen\.accuracy`: Field required",
    ),
    (
        "an accuracy in quotes",
        keyed(f"{EVAL}/merged.json", "strict.seen.accuracy", "0.5"),
        "merged.json",
        r"`strict\.seen\.accuracy`: .*valid number",
    ),
    (
        "nothing measured",
        wrote(f"{EVAL}/merged.json", '{"strict": null}'),
        "comparison.json",
        r"compares .*, which merged\.json does not have",
    ),
    (
        "fewer answers",
        lines(f"{EVAL}/merged.jsonl", lambda text: "".join(text.splitlines(True)[:5])),
        "merged.jsonl",
        r"has 5 answers, and merged\.json counts 60",
    ),
    ("no answers", wrote(f"{EVAL}/merged.jsonl", ""), "merged.jsonl", r"has 0 answers, and merged\.json counts 60"),
    (
        "each answer twice",
        lines(f"{EVAL}/merged.jsonl", lambda text: 2 * text),
        "merged.jsonl",
        r"two rows have one id",
    ),
    (
        "an answer without a question",
        wrote(f"{EVAL}/merged.jsonl", '{"id": "1"}\n'),
        "merged.jsonl",
        r"`kind`: Field required",
    ),
    ("a number as a row", wrote(f"{EVAL}/base.jsonl", "1\n"), "base.jsonl", r"not what a stage wrote"),
    ("no files", wrote("models/gguf/quantize.json", "{}"), "quantize.json", r"`files`: Field required"),
    ("no folders", wrote("models/compressed/compress.json", "{}"), "compress.json", r"`files`: Field required"),
    (
        "a size in words",
        keyed("models/gguf/quantize.json", "files.f16.bytes", "big"),
        "quantize.json",
        r"`files\.f16\.bytes`: .*valid integer",
    ),
    ("a list", wrote("reports/subset.json", "[]"), "subset.json", r"expected an object, found '\[\]'"),
    ("no count", keyed("reports/subset.json", "train.kept", None), "subset.json", r"`train\.kept`: Field required"),
    (
        "reasons in a list",
        keyed("reports/subset.json", "train.removed", []),
        "subset.json",
        r"`train\.removed`: .*valid dictionary",
    ),
    ("no lengths", keyed("reports/data.json", "train.tokens", None), "data.json", r"`train\.tokens`: Field required"),
    ("null", wrote("reports/data.json", "null"), "data.json", r"expected an object, found 'None'"),
    ("empty", wrote(f"{TRAIN}/summary.json", "{}"), "summary.json", r"`first_loss`: Field required"),
    (
        "a loss in words",
        keyed(f"{TRAIN}/summary.json", "first_loss", "low"),
        "summary.json",
        r"`first_loss`: .*valid number",
    ),
    (
        "without its last cell",
        lines(f"{TRAIN}/history.csv", lambda text: text.rpartition(",")[0]),
        "history.csv",
        r"a row has more or fewer cells",
    ),
    (
        "a cell too many",
        lines(f"{TRAIN}/history.csv", lambda text: text.replace("\n1,", "\n1,1,")),
        "history.csv",
        r"a row has more or fewer cells",
    ),
    (
        "a column twice",
        lines(f"{TRAIN}/history.csv", lambda text: text.replace("preference_loss", "loss", 1)),
        "history.csv",
        r"a column is there twice",
    ),
    (
        "a column missing",
        lines(f"{TRAIN}/history.csv", lambda text: text.replace("preference_loss", "other", 1)),
        "history.csv",
        r"has no column preference_loss",
    ),
    (
        "without its header",
        lines(f"{TRAIN}/history.csv", lambda text: text.partition("\n")[2]),
        "history.csv",
        r"not the 120 steps",
    ),
    ("NUL", wrote(f"{TRAIN}/history.csv", b"step,loss\n1,\0\n"), "history.csv", r"not what a stage wrote"),
    (
        "a huge name",
        wrote(f"{TRAIN}/history.csv", "step," + "x" * 200_000 + "\n1,2\n"),
        "history.csv",
        r"field larger than field limit",
    ),
    (
        "its header alone",
        lines(f"{TRAIN}/evaluation.csv", lambda text: text.partition("\n")[0]),
        "evaluation.csv",
        r"does not end at step 81, as summary\.json says",
    ),
    ("a list", wrote(f"{EVAL}/suites.json", "[]"), "suites.json", r"expected an object, found '\[\]'"),
    ("a suite of nothing", wrote(f"{EVAL}/suites.json", '{"nous": null}'), "suites.json", r"`nous`: "),
    (
        "a suite without models",
        wrote(f"{EVAL}/suites.json", '{"nous": {"title": "a", "models": {}}}'),
        "suites.json",
        r"`nous` says nothing of base",
    ),
]
PIPELINES = [  # dvc.yaml; what the line says of it
    ("gone", gone("dvc.yaml"), r"no such file; run this from the root of the repository$"),
    ("empty", wrote("dvc.yaml", ""), r"expected a mapping of keys, found NoneType$"),
    ("in conflict", replaced("dvc.yaml", "stages:\n", "<<<<<<< HEAD\nstages:\n"), r"not valid YAML: "),
    *(
        (
            text,
            wrote("dvc.yaml", text),
            r"`stages` must map each stage to its keys, and its `params` be a list; see `git diff dvc\.yaml`$",
        )
        for text in (
            "plots: []\n",
            "stages: [subset]\n",
            "stages: {subset: }\n",
            "stages: {subset: {params: }}\n",
            "stages: {subset: {params: seed}}\n",
        )
    ),
]
HELD_OUT: list[tuple[str, Change, str]] = [  # what evaluate is to ask, by its task
    (
        "plain",
        wrote("data/raw/plain.jsonl", '{"split": "test", "question"'),
        r"data/raw/plain\.jsonl: not what fetch_data wrote .*" + REMAKE,
    ),
    (
        "plain",
        wrote("data/raw/plain.jsonl", '{"question": "a", "answer": "b"}\n'),
        r"data/raw/plain\.jsonl: not what fetch_data wrote \(KeyError\('split'\)\); " + REMAKE,
    ),
    ("plain", wrote("data/raw/plain.jsonl", "1\n"), r"data/raw/plain\.jsonl: not what fetch_data wrote .*" + REMAKE),
    (
        "plain",
        wrote("data/raw/plain.jsonl", b"\xff\n"),
        r"data/raw/plain\.jsonl: not what fetch_data wrote \(UnicodeDecodeError.*" + REMAKE,
    ),
    (
        "instructions",
        wrote("data/raw/questions.parquet", "x"),
        r"data/raw/questions\.parquet: not a readable Parquet file .*" + REMAKE,
    ),
    (
        "instructions",
        wrote("data/raw/questions.parquet", parquet()),
        r"data/raw/questions\.parquet: has no column `id`, but question, .*" + REMAKE,
    ),
    ("preference", packed_file("data/subset/test.parquet"), r"data/subset/test\.parquet: .*dvc repro"),
]
TOOLS: list[tuple[str, Change, str, str]] = [  # a tool with arguments or files that it cannot take
    (
        "check-params of nobody",
        nothing,
        "tools.check_params --profile nobody",
        r"^check-params: params\.yaml: `profile: nobody` names no entry of `profiles`; choose one of cpu$",
    ),
    ("chat without files", nothing, "tools.chat", r"^chat: models/gguf/\*\.gguf: no such file; run: make repro$"),
    (
        "chat outside its folder",
        wrote(GGUF, "x"),
        "tools.chat --model ../gguf/f16",
        r"^chat: MODEL=\.\./gguf/f16: neither a GGUF file nor a folder with safetensors; there is f16",
    ),
    (
        "chat without a base",
        both(wrote(GGUF, "x"), gone("models/base")),
        "tools.chat",
        r"^chat: models/base: no model there; run: make repro$",
    ),
    (
        "sweep over nothing",
        nothing,
        "tools.sweep --betas ,",
        r"^sweep: --betas: '' is not a number above 0; write them like ",
    ),
    ("sweep over infinity", nothing, "tools.sweep --betas inf", r"^sweep: --betas: 'inf' is not a number above 0"),
    ("sweep outside a repository", nothing, "tools.sweep --seeds=1", r"^sweep: .* is not a git repository; clone it"),
    (
        "review outside a repository",
        nothing,
        "tools.review --base main",
        r"^review: `main` is no commit, branch, tag or experiment here",
    ),
    (
        "verify with hashes in a list",
        wrote("reports/hashes.json", "[]"),
        "tools.verify",
        r"^verify: reports/hashes\.json: holds '\[\]'; expected an object; `git checkout reports/hashes\.json` brings it back$",
    ),
    (
        "verify with hashes cut",
        wrote("reports/hashes.json", '{"cpu": '),
        "tools.verify",
        r"^verify: reports/hashes\.json: not valid JSON .*; `git checkout reports/hashes\.json` brings it back$",
    ),
    (
        "repro of profiles in a list",
        param("/profiles", [1]),
        "tools.repro --profile a40",
        r"^repro: --profile a40: no such profile in params\.yaml; choose one of 1$",
    ),
    (
        "repro of suites in a number",
        param("evaluate.suites", 7),
        "tools.repro",
        r"^repro: params\.yaml: `data\.decontaminate` and `evaluate\.suites` have to be lists; .*check_params",
    ),
    (
        "recipe of nothing",
        wrote("base-merge.yaml", "{}"),
        "tools.merge_base",
        r"^merge-base: base-merge\.yaml: `seed`: Field required$",
    ),
    (
        "publish under no name",
        nothing,
        "tools.publish --repo a/b/c",
        r"^publish: REPO=a/b/c: not a repository of the Hub; expected owner/name$",
    ),
    (
        "publish without git",
        nothing,
        "tools.publish --repo a/b",
        r"^publish: this folder has no commit, or git is not installed; ",
    ),
    (
        "verify without git",
        wrote("reports/hashes.json", '{"cpu": {"portable": {"stages": {}}}}'),
        "tools.verify",
        r"^verify: this folder is no clone, or git is not installed; ",
    ),
    ("sweep without git", nothing, "tools.sweep --seeds 1", r"^sweep: git is not installed; run: apt-get install git$"),
]
PLAIN: list[tuple[str, str, str]] = [  # my-data/plain.jsonl
    ("a list of numbers", "[1]", r"plain\.jsonl: row 0 is '1'; expected an object"),
    (
        "an unknown split",
        '{"split": "dev", "question": "a", "answer": "b"}',
        r"plain\.jsonl, row 0: `split` is 'dev'; expected one of train, validation, test$",
    ),
]
QUESTION = {"id": "1", "topic": "tea", "kind": "lowercase", "constraint": "{}", "question": "Q?", "split": "test"}
ROWS = [
    *(
        Row(f"params {key}={value!r:.40}", param(key, value), "subset", f"^subset: params\\.yaml: .*{said}")
        for key, value, said in PARAMS
    ),
    *(
        Row(f"params.yaml: {name}", wrote("params.yaml", text), "train", f"^train: params\\.yaml: .*{said}")
        for name, text, said in TEXTS
    ),
    *(Row(f"dvc.yaml: {name!r}", change, "subset", f"^subset: dvc\\.yaml: {said}") for name, change, said in PIPELINES),
    *(
        Row(
            f"rows: {name}",
            wrote("my-data/train.jsonl", text),
            "fetch_data",
            f"^fetch_data: my-data/train\\.jsonl{said}",
        )
        for name, text, said in JSONL
    ),
    *(
        Row(f"{file}: {name}", instead(file, content), "fetch_data", f"^fetch_data: my-data/{file}.*{said}")
        for name, file, content, said in FILES
    ),
    Row(
        "rows in two files",
        lambda root: shutil.copy(root / "my-data/train.jsonl", root / "my-data/train.json"),
        "fetch_data",
        r"^fetch_data: my-data: train\.jsonl and train\.json are both split train; keep one$",
    ),
    Row(
        "rows cut",
        cut("my-data/test.jsonl", 0.55),
        "fetch_data",
        r"^fetch_data: my-data/test\.jsonl: not a readable jsonl file \(line 4: ",
    ),
    *(
        Row(f"plain.jsonl: {name}", wrote("my-data/plain.jsonl", text), "fetch_data", f"^fetch_data: my-data/{said}")
        for name, text, said in PLAIN
    ),
    Row(
        "two questions of one id",
        wrote("my-data/questions.parquet", parquet(lambda rows: pa.Table.from_pylist([QUESTION] * 2))),
        "fetch_data",
        r"^fetch_data: my-data/questions\.parquet: two questions have the id '1'; .* give each its own$",
    ),
    *(Row(name, change, program, said) for name, change, program, said in BETWEEN),
    *(Row(name, change, program, said) for name, change, program, said in MODELS),
    *(Row(f"adapter: {name}", change, "merge", said) for name, change, said in ADAPTERS),
    *(
        Row(
            f"GGUF {name}",
            change,
            "evaluate",
            r"^evaluate: models/gguf/f16\.gguf: llama\.cpp cannot load it; .*`dvc repro quantize`",
        )
        for name, change in GGUFS
    ),
    *(
        Row(
            f"held out: {task} {number}",
            both(param("evaluate.tasks", [task]), change),
            "evaluate",
            f"^evaluate: {said}",
            with_gguf=True,
        )
        for number, (task, change, said) in enumerate(HELD_OUT)
    ),
    *(
        Row(f"{file}: {name}", change, "report", rf"^report: .*/{file}: .*{said}.*run `dvc repro")
        for name, change, file, said in REPORTS
    ),
    Row(
        "merged.jsonl cut",
        cut(f"{EVAL}/merged.jsonl"),
        "report",
        r"^report: data/evaluation/merged\.jsonl: not what a stage wrote \(.*\); " + REMAKE,
    ),
    *(
        Row(name, change, program, said, {"PATH": "/nowhere"} if "without git" in name else {})
        for name, change, program, said in TOOLS
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_bad_input_is_refused_in_one_line_and_leaves_the_rest_alone(
    row: Row,
    project: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    if row.with_gguf or row.name.startswith("GGUF"):
        shutil.copy(request.getfixturevalue("gguf_file"), project / GGUF)
        for folder in ("models/gguf", "models/compressed"):
            write_manifest(project / folder)
    row.change(project)
    if "manifest" not in row.name:
        seal(project)
    before = contents(project)
    capfd.readouterr()
    for name, value in {**CANARIES, **row.environment}.items():
        monkeypatch.setenv(name, value)
    code, last = run(row.program, monkeypatch)
    out, err = capfd.readouterr()
    said = err + last
    assert not [name for name, value in CANARIES.items() if value in out + said]
    lines = [line for line in said.splitlines() if line and not PROGRESS.fullmatch(line)]
    assert code == 1, (code, said)
    assert len(lines) == 1, said
    assert re.search(row.said, lines[0]), lines[0]
    assert contents(project) == before


@pytest.mark.parametrize(
    "lock", ["[", "[]", "", "stages: [1]", "stages: {a: }", "stages: {a: {outs: [{path: x}]}}", "\0"]
)
def test_a_lock_that_dvc_did_not_write_is_named_with_the_way_back(lock: str) -> None:
    with pytest.raises(UserError, match=r"(?s)^dvc\.lock: not what DVC writes .*; `git checkout dvc\.lock` brings"):
        verify.outs(lock)
