"""The base is merged as its recipe says, bit for bit, and the recipe is the published one."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hermes import params
from hermes.console import UserError
from hermes.data.chat_text import prompt_text
from stages import fetch_model
from tests.conftest import make_byte_tokenizer
from tests.stages.fetching import COMMIT, Hub
from tools import merge_base, publish
from tools.merge_base import OUTPUT, RECIPE, read_recipe, resolve

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("base", "spectrum", "philosophy", "supernova")
WEIGHTS = (0.12, 0.12, 0.55)
DENSITIES = (0.56, 0.56, 0.58)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def constituents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four narrow Llamas in float32, three of them at a distance from the first, which is a base without a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("constituents"), make_byte_tokenizer()
    tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        for name in NAMES:
            if name != NAMES[0]:
                model.load_state_dict({key: w + 0.02 * torch.randn_like(w) for key, w in start.items()})
            model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["base_merge"])
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    return tmp_path


def write_recipe(
    folder: Path | str,
    seed: int = 42,
    dtype: str = "float32",
    densities: tuple[float, ...] = DENSITIES,
    revision: str | None = None,
) -> None:
    """The repository's recipe with other models in it."""
    text = (ROOT / RECIPE).read_text()
    text = text.replace("seed: 42", f"seed: {seed}").replace("threads: 8", "threads: 2")
    text = text.replace("dtype: bfloat16", f"dtype: {dtype}")
    names, shares = iter(NAMES), iter(densities)
    text = re.sub(r"path: [^,]+", lambda _: f"path: {folder}/{next(names)}", text)
    text = re.sub(r"density: [\d.]+", lambda _: f"density: {next(shares)}", text)
    if revision:
        text = text.replace("revision: null", f"revision: {revision}")
    RECIPE.write_text(text)


def files() -> dict[str, str]:
    """The hashes of what was made."""
    return dict(json.loads((OUTPUT / "manifest.json").read_text())["files"])


def merged() -> Tensors:
    merge_base.main()
    return load_file(OUTPUT / "model.safetensors")


def weights(folder: Path) -> list[Tensors]:
    """All weights of the four models, the base's first."""
    return [load_file(folder / name / "model.safetensors") for name in NAMES]


def ties(base: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    """TIES as its paper has it (Yadav et al. 2023, section 4.2): weighted changes, the heavier sign elected, its changes added."""
    changes = [w * (other.double() - base.double()) for w, other in zip(WEIGHTS, others, strict=True)]
    positive = torch.stack([change.clamp(min=0) for change in changes]).sum(0)
    negative = torch.stack([change.clamp(max=0) for change in changes]).sum(0)
    return base.double() + torch.where(positive + negative >= 0, positive, negative)


def test_where_nothing_is_dropped_the_merge_is_ties_by_hand(workplace: Path, constituents: Path) -> None:
    write_recipe(constituents, densities=(1.0, 1.0, 1.0))
    found, (base, *others) = merged(), weights(constituents)
    assert set(found) == set(base)
    for name, tensor in found.items():
        expected = ties(base[name], [other[name] for other in others])
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-7)
        assert (tensor != base[name]).any()


def test_the_seed_decides_the_bits(workplace: Path, constituents: Path) -> None:
    made = []
    for seed in (42, 42, 43):
        write_recipe(constituents, seed, dtype="bfloat16")
        merged()
        made.append(files())
    assert made[0] == made[1]
    assert {name for name in made[0] if made[0][name] != made[2][name]} == {"model.safetensors"}


def test_each_model_keeps_the_share_of_its_changes_that_its_density_says(workplace: Path, constituents: Path) -> None:
    write_recipe(constituents)
    found, base = merged(), weights(constituents)[0]
    same = sum(int((found[name] == base[name]).sum()) for name in base)
    count = sum(tensor.numel() for tensor in base.values())
    dropped_by_all = (1 - DENSITIES[0]) * (1 - DENSITIES[1]) * (1 - DENSITIES[2])
    deviation = (dropped_by_all * (1 - dropped_by_all) / count) ** 0.5
    assert abs(same / count - dropped_by_all) < 5 * deviation


def test_the_rebuilt_base_is_a_model_for_fetch_model(workplace: Path, constituents: Path) -> None:
    write_recipe(constituents, dtype="bfloat16")
    merged()
    manifest = json.loads((OUTPUT / "manifest.json").read_text())
    assert manifest["recipe"]["seed"] == 42
    assert manifest["recipe"]["models"][2]["parameters"] == {"density": 0.58, "weight": 0.55}
    model = {"source": f"./{OUTPUT}", "revision": None, "chat_template": None}
    Path("params.yaml").write_text(json.dumps({"profile": "x", "profiles": {"x": {"model": model}}}))
    fetch_model.main()
    carried = json.loads((fetch_model.BASE / "manifest.json").read_text())
    assert (carried["recipe"], carried["versions"]) == (manifest["recipe"], manifest["versions"])
    assert [model["density"] for model in publish.constituents(carried)[1:]] == list(DENSITIES)
    (fetch_model.BASE / "manifest.json").unlink()  # names the constituents, which are folders here
    texts = [path.read_text() for path in fetch_model.BASE.iterdir() if path.suffix != ".safetensors"]
    assert not [text for text in texts if str(constituents) in text or str(workplace) in text]
    loaded = AutoModelForCausalLM.from_pretrained(fetch_model.BASE)
    assert loaded.dtype == torch.bfloat16
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(fetch_model.BASE)
    shown = prompt_text(tokenizer, "Tea?").removeprefix(str(tokenizer.bos_token))
    assert shown == (
        "<|start_header_id|>user<|end_header_id|>\n\nTea?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert GenerationConfig.from_pretrained(fetch_model.BASE).eos_token_id == tokenizer.eos_token_id


def test_the_recipe_is_the_published_one(workplace: Path) -> None:
    text = (ROOT / RECIPE).read_text()
    RECIPE.write_text(text.replace("revision: null", f"revision: {COMMIT}"))
    recipe = read_recipe()
    assert (recipe.merge_method, recipe.dtype) == ("dare_ties", "bfloat16")
    assert recipe.chat_template == params.read_yaml(ROOT / "params.yaml")["profiles"]["a40"]["model"]["chat_template"]
    assert [entry["model"].path for entry in (recipe.base_model, *(entry.model for entry in recipe.models))] == [
        "NousResearch/Meta-Llama-3-8B",
        "yuvraj17/Llama-3-8B-spectrum-25",
        "ruggsea/Llama3-stanford-encyclopedia-philosophy-QA",
        "arcee-ai/Llama-3.1-SuperNova-Lite",
    ]
    assert tuple(entry.parameters.density for entry in recipe.models) == DENSITIES
    assert tuple(entry.parameters.weight for entry in recipe.models) == WEIGHTS


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper()])
def test_without_full_commits_nothing_is_downloaded(workplace: Path, revision: str | None) -> None:
    write_recipe("tests", revision=revision and f'"{revision}"')
    with pytest.raises(
        UserError, match=r"base-merge\.yaml: `base_model.*the revision of tests/base is .*make base RESOLVE=1"
    ) as caught:
        merge_base.main()
    assert repr(revision) in str(caught.value)
    assert not OUTPUT.parent.exists()


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("density", "densty", "models.0.parameters.densty"),
        ("seed: 42", "seed: x", "seed"),
        ("path:", "Path:", "base_model"),
    ],
)
def test_a_misspelt_recipe_is_named(workplace: Path, old: str, new: str, key: str) -> None:
    RECIPE.write_text((ROOT / RECIPE).read_text().replace(old, new))
    with pytest.raises(UserError, match=rf"^base-merge\.yaml: `{key}") as caught:
        read_recipe()
    assert "\n" not in str(caught.value)


@pytest.fixture
def stand_in(constituents: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Hub on the loopback with the four models, which this process takes for the Hub."""
    Hub.repositories = {
        f"models/tests/{name}": {path.name: path.read_bytes() for path in (constituents / name).iterdir()}
        for name in NAMES
    }
    Hub.asked, Hub.cut, Hub.corrupt, Hub.gated = [], {}, set(), set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        yield address
        server.shutdown()


@pytest.mark.slow
def test_from_the_hub_at_its_commits_another_process_makes_the_same_bits(
    workplace: Path, constituents: Path, stand_in: str
) -> None:
    write_recipe(constituents, dtype="bfloat16")
    merged()
    expected = files()
    write_recipe("tests", dtype="bfloat16")
    before = RECIPE.read_text()
    environment = os.environ | {
        "HF_ENDPOINT": stand_in,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-m", "tools.merge_base", "--resolve"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert RECIPE.read_text() == before.replace("revision: null", f"revision: {COMMIT}")
    assert files() == expected
    manifest = json.loads((OUTPUT / "manifest.json").read_text())
    assert manifest["recipe"]["base_model"]["model"] == {"path": "tests/base", "revision": COMMIT}
    assert not (workplace / ".scratch/base-merge").exists()


def test_a_repository_that_the_hub_does_not_know_leaves_the_recipe(workplace: Path, stand_in: str) -> None:
    write_recipe("elsewhere")
    before = RECIPE.read_text()
    with pytest.raises(UserError, match="elsewhere/base@main: the Hub shows no such repository"):
        resolve()
    assert RECIPE.read_text() == before
