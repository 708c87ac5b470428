"""Data and model arrive from the Hub at exactly the pinned commit, complete or not at all; what goes wrong is one line."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hermes import hub as hermes_hub
from hermes.artifacts import sha256_file
from hermes.console import UserError
from stages import fetch_data, fetch_model
from tests.stages.fetching import (
    COMMIT,
    LARGE_FILE,
    MB,
    ROWS,
    SPLITS,
    Hub,
    as_lines,
    choose,
)


def run(stage: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    """Runs a stage as a user does, against this Hub."""
    environment = os.environ | {"HF_ENDPOINT": endpoint}
    command = [sys.executable, "-m", f"stages.{stage}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def complaint(finished: subprocess.CompletedProcess[str], stage: str) -> str:
    """The one line in which a stage said why it failed."""
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith(f"{stage}: ")]
    assert finished.stderr.rstrip().endswith(line)
    return line


@pytest.mark.parametrize(
    "revision", [None, "", "main", COMMIT[:7], COMMIT[:39], COMMIT + "0", COMMIT.upper(), COMMIT + "\n"]
)
@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_only_a_full_commit_is_a_revision(workplace: Path, stage: str, revision: str | None) -> None:
    section = stage.removeprefix("fetch_")
    choose(section, "tests/tiny", revision, {"train": "train"} if section == "data" else None)
    module = {"fetch_data": fetch_data, "fetch_model": fetch_model}[stage]
    with pytest.raises(
        UserError, match=rf"`profiles\.cpu\.{section}`: `revision` is .*pin the full 40-digit commit of tests/tiny"
    ) as caught:
        module.main()
    assert repr(revision or "") in str(caught.value) or repr(revision) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("data/raw").exists()
    assert not Path("models/base").exists()


@pytest.mark.parametrize("source", ["", "~/mine", "my mine", "a/b/c"])
@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_a_source_that_is_neither_a_name_nor_a_folder_is_refused(workplace: Path, stage: str, source: str) -> None:
    section, module = stage.removeprefix("fetch_"), {"fetch_data": fetch_data, "fetch_model": fetch_model}[stage]
    choose(section, source, None, {"train": "train"} if section == "data" else None)
    with pytest.raises(UserError, match=rf"`source` is '{source}'; write .*begins with \./ or /$"):
        module.main()


@pytest.mark.parametrize("source", ["embedded", "./mine"])
@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_a_revision_is_not_claimed_for_what_has_none(workplace: Path, stage: str, source: str) -> None:
    section, module = stage.removeprefix("fetch_"), {"fetch_data": fetch_data, "fetch_model": fetch_model}[stage]
    choose(section, source, "abc", {"train": "train"} if section == "data" else None)
    with pytest.raises(UserError, match=rf"`revision` is 'abc', and {source} is no Hub repository; set it to null$"):
        module.main()


def test_a_model_with_code_of_its_own_is_refused_before_its_weights_come(
    workplace: Path, hub: str, tiny_model_folder: Path
) -> None:
    shutil.copytree(tiny_model_folder, "mine")
    Path("mine/tokenizer_evil.py").write_text("raise SystemExit")
    choose("model", "./mine", None)
    fetch_model.main()
    assert not list(Path("models/base").glob("*.py"))
    config = Path("mine/tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(UserError, match=r"^mine: tokenizer_config\.json names code of the model's own \(`auto_map`\)"):
        fetch_model.main()
    Hub.repositories["models/tests/code"] = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    mark = len(Hub.asked)
    choose("model", "tests/code", COMMIT)
    assert "tests/code: tokenizer_config.json names code" in complaint(run("fetch_model", hub), "fetch_model")
    assert not [line for line in Hub.asked[mark:] if "model.safetensors" in line or ".py" in line]


def test_a_model_from_the_hub_is_the_pinned_one_without_pickles_and_code(
    workplace: Path, hub: str, tiny_model_folder: Path
) -> None:
    choose("model", "tests/tiny", COMMIT)
    finished = run("fetch_model", hub)
    assert finished.returncode == 0, finished.stderr
    wanted = json.loads((tiny_model_folder / "manifest.json").read_text())["files"]
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    assert manifest == {"source": "tests/tiny", "revision": COMMIT, "files": wanted}
    assert {
        path.name: sha256_file(path) for path in Path("models/base").iterdir() if path.name != "manifest.json"
    } == wanted


def test_data_from_the_hub_are_the_rows_of_the_pinned_commit(workplace: Path, hub: str) -> None:
    choose("data", "tests/pairs", COMMIT, {"train": "train", "validation": "test"})
    finished = run("fetch_data", hub)
    assert finished.returncode == 0, finished.stderr
    for split in ("train", "validation"):
        assert pq.read_table(f"data/raw/{split}.parquet").to_pylist() == ROWS
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["revision"] == COMMIT
    assert (manifest["config"], manifest["card"]) == (None, {})  # it has no card
    assert manifest["files"] == {f"{split}.parquet": sha256_file(Path(f"data/raw/{split}.parquet")) for split in SPLITS}


def test_a_repository_without_safetensors_is_refused(workplace: Path, hub: str) -> None:
    Hub.repositories["models/tests/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    choose("model", "tests/pickled", COMMIT)
    line = complaint(run("fetch_model", hub), "fetch_model")
    assert f"tests/pickled@{COMMIT}: has no safetensors weights" in line
    assert not Path("models/base").exists()


def test_weights_in_a_folder_of_the_repository_and_those_of_other_programs_are_left_out(
    workplace: Path, hub: str
) -> None:
    others = ("original/model.safetensors", "consolidated.safetensors", "adapter_model.safetensors")
    files = {"config.json": b"{}", "model.safetensors": b"weights", **dict.fromkeys(others, b"others")}
    Hub.repositories["models/tests/folders"] = files
    choose("model", "tests/folders", COMMIT)
    assert run("fetch_model", hub).returncode == 0
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors"]


def asked_since(mark: int, file: str) -> list[str]:
    return [line for line in Hub.asked[mark:] if line.startswith("GET /storage/") and f":{file}" in line]


def scratch() -> list[str]:
    """What is left of downloads."""
    return sorted(path.name for path in Path(".scratch/hub").rglob("*") if path.is_file())


def test_a_download_that_is_cut_goes_on_where_it_stopped(workplace: Path, large: str) -> None:
    Hub.cut, mark = {"model.safetensors": [12 * MB, 23 * MB]}, len(Hub.asked)
    choose("model", "tests/large", COMMIT)
    finished = run("fetch_model", large)
    assert finished.returncode == 0, finished.stderr
    ranges = [line.rpartition(" ")[2] for line in asked_since(mark, "model.safetensors")]
    assert ranges[1:] == [f"bytes={10 * MB}-", f"bytes={20 * MB}-"]
    assert Path("models/base/model.safetensors").read_bytes() == LARGE_FILE
    assert scratch() == []


def test_a_run_goes_on_where_one_that_failed_stopped(workplace: Path, large: str) -> None:
    Hub.cut = {"model.safetensors": [12 * MB] * 50}  # nothing comes after that
    choose("model", "tests/large", COMMIT)
    line = complaint(run("fetch_model", large), "fetch_model")
    assert f"tests/large@{COMMIT}: cannot be fetched from the Hub" in line
    assert "model.safetensors.partial" in scratch()
    Hub.cut, mark = {}, len(Hub.asked)
    assert run("fetch_model", large).returncode == 0
    assert [entry.rpartition(" ")[2] for entry in asked_since(mark, "model.safetensors")] == [f"bytes={10 * MB}-"]
    assert not [
        entry for entry in Hub.asked[mark:] if entry.startswith("GET") and "config.json" in entry
    ]  # complete already
    assert Path("models/base/model.safetensors").read_bytes() == LARGE_FILE
    assert scratch() == []


@pytest.mark.parametrize(
    ("stage", "file"), [("fetch_model", "model.safetensors"), ("fetch_data", "data/train-00000-of-00001.parquet")]
)
def test_bytes_of_another_hash_are_removed(workplace: Path, hub: str, stage: str, file: str) -> None:
    section, source = stage.removeprefix("fetch_"), {"fetch_model": "tests/tiny", "fetch_data": "tests/pairs"}[stage]
    choose(section, source, COMMIT, {"train": "train"} if section == "data" else None)
    Hub.corrupt = {file}
    line = complaint(run(stage, hub), stage)
    assert (
        f"{source}@{COMMIT}: {file} arrived with another hash than the Hub lists; it is removed, run this again" in line
    )
    Hub.corrupt = set()
    assert run(stage, hub).returncode == 0
    assert scratch() == []


@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_an_unknown_commit_and_an_unknown_repository_are_told_apart(workplace: Path, hub: str, stage: str) -> None:
    section, source = stage.removeprefix("fetch_"), {"fetch_model": "tests/tiny", "fetch_data": "tests/pairs"}[stage]
    splits = {"train": "train"} if section == "data" else None
    choose(section, source, "f" * 40, splits)
    assert complaint(run(stage, hub), stage).endswith(
        f"{source}@{'f' * 40}: the Hub knows no such commit of it; see its history"
    )
    choose(section, "tests/nothing", COMMIT, splits)
    assert "tests/nothing@" in (line := complaint(run(stage, hub), stage))
    assert line.endswith("the Hub shows no such repository; check the name, and HF_TOKEN if it is private")


@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_a_gated_repository_opens_with_a_token(
    workplace: Path, hub: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, source = stage.removeprefix("fetch_"), {"fetch_model": "tests/tiny", "fetch_data": "tests/pairs"}[stage]
    choose(section, source, COMMIT, {"train": "train"} if section == "data" else None)
    Hub.gated = {"models/tests/tiny", "datasets/tests/pairs"}
    try:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        line = complaint(run(stage, hub), stage)
        assert line.endswith("it is gated: accept its licence on its page, and set HF_TOKEN to a token of that account")
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        assert run(stage, hub).returncode == 0
    finally:
        Hub.gated = set()


def test_a_split_of_several_files_in_another_layout(workplace: Path, hub: str) -> None:
    """UltraFeedback's: whole conversations beside the prompt, and the scores of both answers."""

    def shard(start: int) -> bytes:
        rows = [
            {
                "prompt": f"q{i}",
                "chosen": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"c{i}"}],
                "rejected": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"r{i}"}],
                "score_chosen": 9.0,
                "score_rejected": float(i),
            }
            for i in range(start, start + 3)
        ]
        return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())

    Hub.repositories["datasets/tests/feedback"] = {f"data/train-0000{i}.jsonl.gz": shard(3 * i) for i in range(2)}
    columns = {
        "question": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "score": ["score_chosen", "score_rejected"],
        "system": None,
    }
    choose("data", "tests/feedback", COMMIT, {"train": "train"}, format="messages", columns=columns)
    finished = run("fetch_data", hub)
    assert finished.returncode == 0, finished.stderr
    expected = [
        {"context": [], "question": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", "delta_score": 9.0 - i}
        for i in range(6)
    ]
    assert pq.read_table("data/raw/train.parquet").to_pylist() == expected
    choose("data", "tests/feedback", COMMIT, {"train": "train", "test": "test"}, format="messages", columns=columns)
    assert complaint(run("fetch_data", hub), "fetch_data").endswith("has no split test; it has train")


CONFIGURED = """---
license: cc-by-4.0
pretty_name: Pairs in two languages
configs:
- config_name: de
  data_files: [{split: train, path: de/*.jsonl}]
- config_name: fr
  data_files: [{split: train, path: fr/*.jsonl}]
---
# Pairs
"""


def test_of_several_configurations_one_is_named(workplace: Path, hub: str) -> None:
    files = {f"{name}/train.jsonl": as_lines([row | {"id": name} for row in ROWS]) for name in ("de", "fr")}
    Hub.repositories["datasets/tests/configured"] = files | {"README.md": CONFIGURED.encode()}
    for config in (None, "en"):
        choose("data", "tests/configured", COMMIT, {"train": "train"}, config=config)
        said = "null" if config is None else config
        assert complaint(run("fetch_data", hub), "fetch_data").endswith(
            f"tests/configured@{COMMIT}: `data.config` is {said}; it has the configurations de, fr: name one"
        )
    choose("data", "tests/configured", COMMIT, {"train": "train"}, config="fr")
    finished = run("fetch_data", hub)
    assert finished.returncode == 0, finished.stderr
    assert pq.read_table("data/raw/train.parquet").to_pylist() == [row | {"id": "fr"} for row in ROWS]
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["config"] == "fr"
    assert manifest["card"] == {"license": "cc-by-4.0", "pretty_name": "Pairs in two languages"}
    assert scratch() == []


@pytest.mark.parametrize("path", ["../x.parquet", "/tmp/x.parquet", "data/../../x.parquet", "..", "a\0b.parquet"])
def test_a_listed_file_outside_of_the_repository_is_refused(workplace: Path, hub: str, path: str) -> None:
    Hub.repositories["datasets/tests/outside"] = {"train.csv": b"a,b\n1,2\n", path: b"question\nx\n"}
    choose("data", "tests/outside", COMMIT, {"train": "train"})
    said = complaint(run("fetch_data", hub), "fetch_data")
    assert f"lists {path!r}, which is no file of its folder" in said.replace("\\\\", "\\")
    assert not Path("data/raw").exists()


@pytest.mark.parametrize("path", ["..", "../x", "/x", "a/../../x", "", "a\0"])
def test_a_path_that_leaves_its_folder_is_known(path: str) -> None:
    assert not hermes_hub.stays_inside(path)


@pytest.mark.parametrize("path", ["x", "a/b.parquet", "a..b/c", "..a"])
def test_a_path_that_stays_is_known(path: str) -> None:
    assert hermes_hub.stays_inside(path)


def test_a_card_that_names_a_file_of_this_machine_reads_none(workplace: Path, hub: str) -> None:
    secret = workplace / "secret.csv"
    secret.write_text("question,chosen,rejected\nprivate,a,b\n")
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {secret}\n---\n"
    Hub.repositories["datasets/tests/reaching"] = {"README.md": card.encode(), "train.csv": b"a\n1\n"}
    choose("data", "tests/reaching", COMMIT, {"train": "train"})
    said = complaint(run("fetch_data", hub), "fetch_data")
    assert "private" not in said
    assert not Path("data/raw").exists()


def test_no_token_and_no_password_is_said_where_the_hub_refuses(
    workplace: Path, hub: str, no_network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "canary" * 6
    monkeypatch.setenv("HF_TOKEN", token)
    Hub.gated.add("models/tests/tiny")
    choose("model", "tests/tiny", COMMIT)
    for endpoint in (hub, no_network):
        for address in (
            endpoint,
            endpoint.replace("://", f"://someone:{token}@"),
            endpoint.replace("://", "://someone:s3cret@"),
        ):
            done = run("fetch_model", address)
            assert complaint(done, "fetch_model")
            assert token not in done.stdout + done.stderr
            assert "s3cret" not in done.stdout + done.stderr
    Hub.gated.clear()
    written = [path for path in workplace.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert not written


@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_no_network_is_one_line_and_leaves_the_earlier_files(workplace: Path, no_network: str, stage: str) -> None:
    section = stage.removeprefix("fetch_")
    earlier = {"data": Path("data/raw"), "model": Path("models/base")}[section] / "earlier"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    choose(section, "tests/tiny", COMMIT, {"train": "train"} if section == "data" else None)
    line = complaint(run(stage, no_network), stage)
    assert f"tests/tiny@{COMMIT}" in line
    assert re.search(r"check (the )?name, (the )?network and HF_TOKEN$", line)
    assert [path.name for path in earlier.parent.iterdir()] == ["earlier"]
    assert [path.name for path in earlier.parent.parent.iterdir()] == [earlier.parent.name]
