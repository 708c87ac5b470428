"""A parameter is what params.yaml says, of the type that the stage asked for, or the run stops and says why."""

import importlib
from pathlib import Path
from typing import Any, Literal

import pytest

from hermes import params
from hermes.console import UserError
from hermes.run import run_stage

ROOT = Path(__file__).resolve().parents[2]
BEFORE_MERGE = ["fetch_data", "fetch_model", "subset", "tokenize", "reference", "train"]
STAGES = [*BEFORE_MERGE, "merge", "quantize", "compress", "evaluate"]
MODULES = [f"stages.{name}" for name in STAGES]
PIPELINE = """
stages:
  one: {params: [seed, beta, name, "profiles.${profile}.fit"]}
  two: {params: ["profiles.${profile}.model", {other.yaml: [x]}]}
  three: {cmd: "true"}
"""
GOOD = """
seed: 42
beta: 0.1
name: x
profile: cpu
profiles:
  cpu:
    fit: {rate: 2.0e-4, steps: 10, mode: fast, parts: {train: a}, limit: null}
    model: {source: embedded}
  gpu:
    fit: {rate: 1e-6, steps: 20, mode: slow, parts: {}, limit: 5}
    model: {source: elsewhere}
"""


class Fit(params.Settings):
    """A section with values of several types."""

    rate: float
    steps: int
    mode: Literal["fast", "slow"]
    parts: dict[Literal["train", "test"], str]
    limit: int | None


class Params(params.Params):
    """What stage one asks for."""

    seed: int
    beta: float
    name: str
    fit: Fit


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(PIPELINE)


def load(text: str) -> Params:
    Path("params.yaml").write_text(text)
    return params.load(Params)


def refusal(text: str) -> str:
    """What is said of this params.yaml: one line that begins with the file's name."""
    with pytest.raises(UserError) as caught:
        load(text)
    message = str(caught.value)
    assert message.startswith("params.yaml: ")
    assert "\n" not in message
    return message


def change(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_a_stage_gets_its_top_level_keys_and_its_sections_of_the_selected_profile() -> None:
    loaded = load(GOOD)
    assert loaded.model_dump() == {
        "seed": 42,
        "beta": 0.1,
        "name": "x",
        "fit": {"rate": 2e-4, "steps": 10, "mode": "fast", "parts": {"train": "a"}, "limit": None},
    }
    other = load(change("profile: cpu", "profile: gpu"))
    assert (other.fit.rate, other.fit.steps, other.fit.mode, other.fit.limit) == (1e-6, 20, "slow", 5)


@pytest.mark.parametrize("text", ["1e-6", "1e-06", "1E-6", "1.0e-6", "0.000001"])
def test_scientific_notation_is_a_number(text: str) -> None:
    rate = load(change("2.0e-4", text)).fit.rate
    assert isinstance(rate, float)
    assert rate == 0.000001


def test_a_whole_number_will_do_for_a_float() -> None:
    assert load(change("beta: 0.1", "beta: 1")).beta == 1.0


def test_parameters_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(GOOD).beta = 0.2


def test_an_unknown_profile_is_named_with_those_there_are() -> None:
    message = refusal(change("profile: cpu", "profile: a40"))
    assert "`profile: a40`" in message
    assert "choose one of cpu, gpu" in message


@pytest.mark.parametrize(
    "name", ["<b>", '"a\\u001b[31m"', "a b", "'../a'", "5", "'-S'", "null", '"\\u202ea"', "''", "a" * 65, "ä"]
)
def test_a_profile_has_a_name_that_can_stand_in_a_page_a_path_and_a_command(name: str) -> None:
    found = refusal(GOOD + f"  {name}: {{}}\n")
    assert "has a name that is no text" in found
    assert found.isprintable()


def test_no_selected_profile_is_told() -> None:
    assert "choose one of cpu, gpu" in refusal(change("profile: cpu\n", ""))


@pytest.mark.parametrize(
    ("old", "new", "key", "allowed"),
    [
        ("seed: 42", "seed: 42\nsede: 1", "sede", "allowed there: beta, collect, name, profile, profiles, seed, wandb"),
        ("    model: {source: embedded}", "    modle: {}", "profiles.cpu.modle", "allowed there: fit, model"),
        ("    model: {source: elsewhere}", "    modle: {}", "profiles.gpu.modle", "allowed there: fit, model"),
        (
            "rate: 2.0e-4",
            "rate: 2.0e-4, rte: 1",
            "profiles.cpu.fit.rte",
            "allowed there: limit, mode, parts, rate, steps",
        ),
    ],
)
def test_a_misspelt_key_is_named(old: str, new: str, key: str, allowed: str) -> None:
    """In every profile, selected or not: it would silently do nothing."""
    message = refusal(change(old, new))
    assert f"unknown key `{key}`" in message
    assert allowed in message


@pytest.mark.parametrize(
    ("old", "key"),
    [
        pytest.param(
            "seed: 42\n",
            "seed",
        ),
        ("    fit: {rate: 2.0e-4, steps: 10, mode: fast, parts: {train: a}, limit: null}\n", "profiles.cpu.fit"),
        ("steps: 10, ", "profiles.cpu.fit.steps"),
        (", limit: null", "profiles.cpu.fit.limit"),
    ],
)
def test_a_missing_key_is_named(old: str, key: str) -> None:
    assert f"`{key}` is missing" in refusal(change(old, ""))


@pytest.mark.parametrize(
    ("old", "new", "key", "value", "wanted"),
    [
        ("seed: 42", "seed: 1.5", "seed", "1.5", "integer"),
        ("seed: 42", "seed: '42'", "seed", "'42'", "integer"),
        ("seed: 42", "seed: true", "seed", "True", "integer"),
        ("seed: 42", "seed:", "seed", "None", "integer"),
        ("beta: 0.1", "beta: high", "beta", "'high'", "number"),
        ("beta: 0.1", "beta: '0.1'", "beta", "'0.1'", "number"),
        ("beta: 0.1", "beta: [0.1]", "beta", "[0.1]", "number"),
        ("name: x", "name: 7", "name", "7", "string"),
        ("steps: 10", "steps: 1e1", "profiles.cpu.fit.steps", "10.0", "integer"),
        ("limit: null", "limit: none", "profiles.cpu.fit.limit", "'none'", "integer"),
        ("mode: fast", "mode: quick", "profiles.cpu.fit.mode", "'quick'", "'fast' or 'slow'"),
        ("parts: {train: a}", "parts: {train: 3}", "profiles.cpu.fit.parts.train", "3", "string"),
        ("parts: {train: a}", "parts: {dev: a}", "profiles.cpu.fit.parts.dev", "'dev'", "'train' or 'test'"),
        (
            "{rate: 2.0e-4, steps: 10, mode: fast, parts: {train: a}, limit: null}",
            "7",
            "profiles.cpu.fit",
            "7",
            "dictionary",
        ),
    ],
)
def test_a_wrong_value_is_told_with_key_value_and_what_is_wanted(
    old: str, new: str, key: str, value: str, wanted: str
) -> None:
    message = refusal(change(old, new))
    assert f"`{key}" in message
    assert f"is {value}: " in message
    assert wanted in message


def test_all_that_is_wrong_is_told_at_once() -> None:
    message = refusal(change("seed: 42", "seed: x").replace("steps: 10", "steps: y"))
    assert "`seed` is 'x'" in message
    assert "`profiles.cpu.fit.steps` is 'y'" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "not valid YAML"),
        ("a: *unknown\n", "not valid YAML"),
        ("- 1\n", "expected a mapping of keys, found list"),
        ("", "expected a mapping of keys, found NoneType"),
        ("seed: 42\n", "`profiles` must map each profile"),
    ],
)
def test_what_is_no_mapping_is_one_line_at_the_terminal(text: str, said: str) -> None:
    Path("params.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        run_stage("one", lambda: print(params.load(Params)))
    assert str(caught.value.code).startswith("one: params.yaml: ")
    assert said in str(caught.value.code)
    assert "\n" not in str(caught.value.code)


@pytest.mark.parametrize(
    "text",
    [change("profile: cpu", "profile: [cpu]"), "profile: cpu\nprofiles: cpu\n", "profile: cpu\nprofiles: {cpu: }\n"],
)
def test_a_profile_that_is_no_mapping_is_told(text: str) -> None:
    refusal(text)


def test_no_file_is_told() -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: no such file; run this from the root of the repository$"):
        params.load(Params)


@pytest.mark.parametrize("module", MODULES)
def test_the_committed_parameters_suit_every_module(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.chdir(ROOT)
    params.load(importlib.import_module(module).Params)


@pytest.mark.parametrize("profile", sorted(params.read_yaml(ROOT / "params.yaml")["profiles"]))
def test_every_committed_profile_suits_every_module(profile: str) -> None:
    tree: dict[str, Any] = params.read_yaml(ROOT / "params.yaml")
    for module in MODULES:
        model = importlib.import_module(module).Params
        model.model_validate({name: tree.get(name, tree["profiles"][profile].get(name)) for name in model.model_fields})


def test_an_unknown_loss_is_told_with_those_there_are() -> None:
    from stages import train

    text = (ROOT / "params.yaml").read_text()
    assert text.count("\nloss_type: sigmoid") == 1
    Path("params.yaml").write_text(text.replace("\nloss_type: sigmoid", "\nloss_type: sigmoidal"))
    Path("dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    with pytest.raises(UserError) as caught:
        params.load(train.Params)
    assert "`loss_type` is 'sigmoidal'" in str(caught.value)
    for name in (
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "apo_zero",
        "discopop",
    ):
        assert f"'{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)
