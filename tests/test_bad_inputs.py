"""Bad inputs of every kind: each is refused in one line that says where and what to do, and leaves all files as they were.

A row is a name, what is done to a sound project, the program that then meets it as a user starts it, and what its line has to hold.
"""

import hashlib
import json
import re
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.utils.logging import disable_progress_bar

from hermes.artifacts import sha256_file, write_parquet
from hermes.model.base import load
from hermes.model.tokenizer import load_tokenizer
from hermes.settings.tokenize import TokenizeSettings
from stages import tokenize
from stages.train import save_adapter
from tests.conftest import ROOT, cpu_params, make_byte_tokenizer, write_random_llama
from tests.stages.test_report import write_reports

SPLITS = ("train", "validation", "test")
PROGRESS = re.compile(r".*: \d+ of (\d+|\?) .*")  # hermes.console.Lines
Change = Callable[[Path], Any]


class Row(NamedTuple):
    """A bad input."""

    name: str
    change: Change  # of a sound project, in its folder
    program: str  # a stage, or a tool with its arguments
    said: str  # a pattern of its line


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
            rows = pa.parquet.read_table(f"data/subset/{split}.parquet").to_pylist()
            ids, _ = tokenize.tokenize_split(rows, tokenizer, settings, split)
            write_parquet(Path(f"data/tokens/{split}.parquet"), pa.Table.from_pylist(ids, schema=tokenize.schema()))
        assert run("reference", patch) == (0, "")
        torch.manual_seed(0)
        model = get_peft_model(
            load(Path("models/base"), torch.float32), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
        )
        Path("models/adapter").mkdir()
        save_adapter(model, Path("models/adapter"), sha256_file(Path("models/base/manifest.json")))
        assert run("merge", patch) == (0, "")
        write_reports(root)
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
    ("a merge key of numbers", "<<: [1]\nprofile: cpu\nprofiles: {cpu: {}}\n", r"not valid YAML: .* expected a mapping for merging"),
    ("a list as a key", "? [1, 2]\n: 2\nprofile: cpu\nprofiles: {cpu: {}}\n", r"unknown key `\(1, 2\)`; allowed there: "),
]  # fmt: skip
ROWS = [
    *(
        Row(f"params {key}={value!r}", param(key, value), "subset", f"^subset: params\\.yaml: .*{said}")
        for key, value, said in PARAMS
    ),
    *(
        Row(f"params.yaml of {name}", wrote("params.yaml", text), "train", f"^train: params\\.yaml: .*{said}")
        for name, text, said in TEXTS
    ),
    Row(
        "rows cut",
        cut("my-data/test.jsonl", 0.55),
        "fetch_data",
        r"^fetch_data: my-data/test\.jsonl: not a readable jsonl file \(line 4: ",
    ),
    Row(
        "adapter of another rank",
        keyed("models/adapter/adapter_config.json", "r", 8),
        "merge",
        r"^merge: models/adapter: .* is of rank 4, and adapter_config\.json says 8; ",
    ),
    Row(
        "base: header beyond the file",
        wrote("models/base/model.safetensors", b"\xff" * 16),
        "tokenize",
        r"^tokenize: models/base/model\.safetensors: .*delete the folder and run `dvc repro`$",
    ),
    Row(
        "merged.jsonl cut",
        cut("data/evaluation/merged.jsonl"),
        "report",
        r"^report: data/evaluation/merged\.jsonl: not what a stage wrote \(.*\); delete it and run `dvc repro`$",
    ),
    Row(
        "history.csv with text",
        wrote("reports/train/history.csv", "step,loss\n1,low\n"),
        "report",
        r"^report: reports/train/history\.csv: not what a stage wrote",
    ),
    Row(
        "recipe cut",
        wrote("base-merge.yaml", "seed: [1"),
        "tools.merge_base",
        r"^merge-base: base-merge\.yaml: not valid YAML: ",
    ),
    Row(
        "GGUF type that is none",
        wrote("models/gguf/f16.gguf", "x"),
        "tools.chat --gguf Q9",
        r"^chat: models/gguf/Q9\.gguf: no such file; choose one of f16$",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_bad_input_is_refused_in_one_line_and_leaves_the_rest_alone(
    row: Row, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    row.change(project)
    before = contents(project)
    capfd.readouterr()
    code, last = run(row.program, monkeypatch)
    said = capfd.readouterr().err + last
    lines = [line for line in said.splitlines() if line and not PROGRESS.fullmatch(line)]
    assert code == 1, (code, said)
    assert len(lines) == 1, said
    assert re.search(row.said, lines[0]), lines[0]
    assert contents(project) == before
