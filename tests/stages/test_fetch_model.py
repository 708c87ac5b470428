"""A model arrives from a folder with what it needs, one chat template and no code; what goes wrong is one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes.artifacts import sha256_file
from hermes.console import UserError
from hermes.model.base_check import check_base
from hermes.model.gguf_files import PROBES
from stages import fetch_model
from tests.conftest import CHAT_TEMPLATE
from tests.stages.fetching import COMMIT, choose


def test_a_folder_is_a_model_too(workplace: Path, tiny_model_folder: Path) -> None:
    wanted = json.loads((tiny_model_folder / "manifest.json").read_text())["files"]
    Path("mine").symlink_to(tiny_model_folder)
    choose("model", "./mine", None)
    fetch_model.main()
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    read = wanted | {"manifest.json": sha256_file(tiny_model_folder / "manifest.json")}
    assert manifest == {"source": "./mine", "revision": "local", "files": wanted, "source_files": read}
    choose("model", "./nothing", None)
    with pytest.raises(UserError, match="holds no safetensors model"):
        fetch_model.main()
    assert json.loads(Path("models/base/manifest.json").read_text()) == manifest


def test_a_rebuilt_base_says_how_it_was_made(workplace: Path, tiny_model_folder: Path) -> None:
    shutil.copytree(tiny_model_folder, "mine")
    made = {"recipe": {"seed": 42}, "versions": {"mergekit": "0.1"}}
    Path("mine/manifest.json").write_text(json.dumps(made | {"files": {}}))
    choose("model", "./mine", None)
    fetch_model.main()
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    assert {key: manifest[key] for key in made} == made
    assert manifest["files"]


def test_a_chat_template_takes_the_place_of_the_models(workplace: Path, tiny_model_folder: Path) -> None:
    Path("mine").symlink_to(tiny_model_folder)
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    choose("model", "./mine", None, chat_template=template)
    fetch_model.main()
    messages = [{"role": "user", "content": "Hi"}]
    assert AutoTokenizer.from_pretrained("models/base").apply_chat_template(messages, tokenize=False) == "[user]Hi"
    assert "chat_template.jinja" in json.loads(Path("models/base/manifest.json").read_text())["files"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for %}", "TemplateSyntaxError: Expected an expression, got 'end of statement block'"),
        ("{{ 1 // (messages | length - 2) }}", "ZeroDivisionError: integer division or modulo by zero"),
        ("{{ messages[0] + 1 }}", "TypeError: unsupported operand type\\(s\\) for \\+: 'dict' and 'int'"),
        ("{{ messages[9]['content'] }}", "UndefinedError: list object has no element 9"),
    ],
)
def test_a_chat_template_that_renders_no_conversation_is_refused(
    workplace: Path, tiny_model_folder: Path, template: str, why: str
) -> None:
    Path("mine").symlink_to(tiny_model_folder)
    choose("model", "./mine", None, chat_template=template)
    with pytest.raises(
        UserError, match=rf"^params\.yaml: `model\.chat_template` does not render a conversation \({why}\)$"
    ):
        fetch_model.main()
    assert not Path("models/base").exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/x.safetensors", "..", "", 5])
def test_an_index_that_names_weights_elsewhere_is_refused(workplace: Path, tiny_model_folder: Path, name: Any) -> None:
    shutil.copytree(tiny_model_folder, "mine")
    Path("mine/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    choose("model", "./mine", None)
    with pytest.raises(UserError, match=r"^model\.safetensors\.index\.json: names the file .*, which is not beside it"):
        fetch_model.main()
    assert not Path("models/base").exists()


def test_a_chat_template_without_an_end_is_refused(workplace: Path, tiny_model_folder: Path) -> None:
    Path("mine").symlink_to(tiny_model_folder)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    choose("model", "./mine", None, chat_template=loop)
    with pytest.raises(UserError, match=r"^params\.yaml: `model\.chat_template`: chat template: takes more than 5 s"):
        fetch_model.main()
    assert not Path("models/base").exists()


OWN = CHAT_TEMPLATE.replace("You are a helpful assistant", "You are terse")
OTHER = CHAT_TEMPLATE.replace("You are a helpful assistant", "You are verbose")


def place_templates(folder: Path, places: tuple[str, ...]) -> None:
    """Other templates in each of these files, and none in the rest."""
    (folder / "chat_template.jinja").unlink()
    for name in places:
        path = folder / name
        if name.endswith(".jinja"):
            path.write_text(OTHER)
        else:
            found = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(found | {"chat_template": OTHER + "{# of this file #}"}))


def check_only_template(template: str) -> None:
    """The base has this template in one place, and its manifest the hash of every file as it is."""
    base = Path("models/base")
    assert (base / "chat_template.jinja").read_text() == template
    assert not (base / "chat_template.json").exists()
    assert "chat_template" not in json.loads((base / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(base).chat_template == template
    files = {path.name: sha256_file(path) for path in base.iterdir() if path.name != "manifest.json"}
    assert json.loads((base / "manifest.json").read_text())["files"] == files


PLACES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("chosen", "places"),
    [(OWN, PLACES[1:2]), (OWN, PLACES[2:]), (OWN, PLACES[::2]), (OWN, PLACES), (None, PLACES[::2]), (None, PLACES)],
    ids=lambda value: " and ".join(value) if isinstance(value, tuple) else "chosen" if value else "its own",
)
def test_a_base_has_one_chat_template(
    workplace: Path, tiny_model_folder: Path, chosen: str | None, places: tuple[str, ...]
) -> None:
    """llama.cpp's converter looks in another place first than Transformers."""
    place_templates(Path(shutil.copytree(tiny_model_folder, "mine")), places)
    choose("model", "./mine", None, chat_template=chosen)
    fetch_model.main()
    check_only_template(chosen or OTHER)


@pytest.mark.slow
@pytest.mark.parametrize("places", [PLACES[1:2], PLACES[2:], PLACES], ids=" and ".join)
def test_llama_cpp_reads_the_chat_template_that_was_chosen(
    workplace: Path, tiny_model_folder: Path, places: tuple[str, ...]
) -> None:
    place_templates(Path(shutil.copytree(tiny_model_folder, "mine")), places)
    choose("model", "./mine", None, chat_template=OWN)
    fetch_model.main()
    check_base(Path("models/base"))


def test_the_hash_of_a_file_that_was_written_anew_is_not_the_hubs(
    workplace: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch_hub(source: str, commit: str, target: Path) -> tuple[str, dict[str, str]]:
        shutil.copytree(tiny_model_folder, target, dirs_exist_ok=True)
        (target / "manifest.json").unlink()
        place_templates(target, PLACES)
        return commit, {path.name: sha256_file(path) for path in target.iterdir()}

    monkeypatch.setattr(fetch_model, "fetch_hub", fetch_hub)
    for chosen in (OWN, None):
        choose("model", "tests/tiny", COMMIT, chat_template=chosen)
        fetch_model.main()
        check_only_template(chosen or OTHER)


def test_weights_of_other_programs_beside_a_model_are_left_out(workplace: Path, tiny_model_folder: Path) -> None:
    wanted = json.loads((tiny_model_folder / "manifest.json").read_text())["files"]
    shutil.copytree(tiny_model_folder, "mine")
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy("mine/model.safetensors", f"mine/{name}")
    choose("model", "./mine", None)
    fetch_model.main()
    assert json.loads(Path("models/base/manifest.json").read_text())["files"] == wanted
    Path("mine/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"`model\.source` is 'mine', which holds no safetensors model$"):
        fetch_model.main()


def test_a_tokenizer_in_its_older_files_comes_along(
    workplace: Path, tiny_model_folder: Path, embedded_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, "mine"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (folder / "added_tokens.json").write_text(json.dumps({"<|mine|>": len(model["vocab"])}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    choose("model", "./mine", None)
    fetch_model.main()
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    for text in (*PROBES, CHAT_TEMPLATE, "a<|im_end|>b"):
        assert tokenizer(text)["input_ids"] == embedded_tokenizer(text)["input_ids"]
    assert tokenizer("<|mine|>")["input_ids"] == [len(embedded_tokenizer)]
