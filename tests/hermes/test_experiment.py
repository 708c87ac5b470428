"""All of params.yaml is checked at the first second: a mistake in any section stops any stage, in one line that names the key."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from hermes.console import UserError
from hermes.params import read_yaml
from hermes.settings import experiment
from tests.conftest import ROOT

PROFILES = sorted(read_yaml(ROOT / "params.yaml")["profiles"])
SHA = "0123456789abcdef0123456789abcdef01234567"
COLUMNS = {"question": "question", "chosen": "chosen", "rejected": "rejected", "score": "delta_score", "system": None}
CHOICE = {"candidates": ["x", "y"], "by": "label", "value": "better", "first": ["a"], "second": ["b"]}
SHARE: dict[str, Any] = {
    **{"source": "./more", "revision": None, "config": None, "format": "plain", "columns": COLUMNS, "choice": None},
    **{"splits": {"train": "train", "validation": "validation", "test": "test"}, "share": 0.5},
}
# A key of the profile cpu, or of the top level behind a slash; a value that it cannot have; what the message says of it.
MISTAKES: list[tuple[str, Any, str]] = [
    ("evaluate.typs", ["f16"], r"unknown key `profiles\.cpu\.evaluate\.typs`; allowed there: batch_size, .* types"),
    ("evaluate.types", ["Q9_K"], r"`profiles\.cpu\.evaluate\.types\.0` is 'Q9_K': Input should be 'f16', 'Q8_0', .*, 'gptq' or 'awq'$"),
    ("evaluate.types", "ladder", r"evaluate\.types` is 'ladder': Input should be 'all' or Input should be a valid list$"),
    ("merge.max_shard_size", "lots", r"`profiles\.cpu\.merge\.max_shard_size` is 'lots': write it like 200MB or 5GB"),
    ("evaluate.types", ["f16", "f16"], r"evaluate\.types` .* f16 is in it twice"),
    ("evaluate.tasks", [], r"evaluate\.tasks` is \[\]: List should have at least 1 item"),
    ("evaluate.suites", ["mmlu"], r"evaluate\.suites\.0` is 'mmlu': Input should be 'nous'"),
    ("evaluate.context", 96, r"`max_new_tokens` \(96 tokens\) leaves no room for a prompt in `context` \(96\)"),
    ("evaluate.slots", 1, r"evaluate\.slots` is 1: Input should be greater than or equal to 2"),
    ("evaluate.threads", 100_000, r"evaluate\.threads` is 100000: Input should be less than or equal to 1024"),
    ("quantize.types", ["Q8_0", "Q8_0"], r"quantize\.types` .* Q8_0 is in it twice"),
    ("quantize.types", "Q8_0", r"quantize\.types` is 'Q8_0': Input should be 'ladder' or Input should be a valid list$"),
    ("quantize.types", "all", r"quantize\.types` is 'all': Input should be 'ladder' or Input should be a valid list$"),
    ("quantize.types", ["f16"], r"quantize\.types\.0` is 'f16': Input should be 'Q8_0', .* or 'IQ2_M'$"),
    ("quantize.imatrix", "yes", r"quantize\.imatrix` is 'yes': Input should be a valid boolean"),
    ("calibration.pairs", 0, r"calibration\.pairs` is 0: Input should be greater than 0$"),
    ("calibration.pairs", 15, r"`compress\.awq_pairs` is 16; `calibration\.pairs` is 15: it can be no more$"),
    ("compress.awq_pairs", 129, r"`compress\.awq_pairs` is 129; `calibration\.pairs` is 128: it can be no more$"),
    ("compress.awq_pairs", 0, r"compress\.awq_pairs` is 0: Input should be greater than 0$"),
    ("compress.methods", ["gguf"], r"compress\.methods\.0` is 'gguf': Input should be 'gptq' or 'awq'$"),
    ("compress.methods", ["awq", "awq"], r"compress\.methods` .* awq is in it twice; name it once$"),
    ("compress.group_size", 8, r"compress\.group_size` is 8: Input should be greater than or equal to 16$"),
    ("compress.threads", 0, r"compress\.threads` is 0: Input should be greater than or equal to 1$"),
    ("base.quantization", "none", r"`keep_dequantized: true` goes with `quantization: nf4`"),
    ("base.dtype", "float16", r"base\.dtype` is 'float16': Input should be 'bfloat16' or 'float32'"),
    ("train.learning_rate", 1.0e30, r"train\.learning_rate` is 1e\+30: Input should be less than or equal to 1"),
    ("train.learning_rate", "fast", r"train\.learning_rate` is 'fast': Input should be a valid number"),
    ("train.processes", 3, r"train\.processes` is 3: it must divide accumulation \(1\)"),
    ("train.distribution", "fsdp", r"train\.distribution` is 'fsdp': there is nothing to shard with one process"),
    ("train.lora_modules", [], r"train\.lora_modules` is \[\]: List should have at least 1 item"),
    ("train.lora_modules", ["q_proj", "q_proj"], r"train\.lora_modules` .* q_proj is in it twice"),
    ("train.lora_modules", [""], r"train\.lora_modules\.0` is '': String should have at least 1 character"),
    ("train.lora_rank", 10**30, r"train\.lora_rank` is 10{30}: Input should be less than or equal to 65536$"),
    ("train.sft_weight", 1e300, r"train\.sft_weight` is 1e\+300: Input should be less than or equal to 1000$"),
    ("train.use_dora", True, r"`profiles\.cpu\.train`: `use_dora`: DoRA is not trained here, and only plain LoRA is merged; take it out$"),
    ("train.use_rslora", False, r"`profiles\.cpu\.train`: `use_rslora`: rank-stabilized LoRA is plain LoRA whose .*; take it out$"),
    ("train.modules_to_save", ["lm_head"], r"`profiles\.cpu\.train`: `modules_to_save`: only LoRA is trained here; take it out$"),
    ("train.init_lora_weights", "pissa", r"`profiles\.cpu\.train`: `init_lora_weights`: LoRA begins with B at zero here, .*; take it out$"),
    ("reference.batch_size", 0, r"reference\.batch_size` is 0: Input should be greater than 0"),
    ("subset.k", 0, r"subset\.k` is 0: Input should be greater than 0"),
    ("subset.k", 7 * 10**3999, r"subset\.k` is 70{119}\.\.\.: Input should be less than or equal to 1000000000$"),
    ("subset.near_duplicate_similarity", 0.5, r"near_duplicate_similarity` is 0\.5: Input should be greater than or equal"),
    ("tokenize.max_length", 1.5, r"tokenize\.max_length` is 1\.5: Input should be a valid integer or .* less than or equal"),
    ("tokenize.overlong", "truncate", r"`overlong: truncate` needs `max_prompt_length`, and nothing else does"),
    ("tokenize.template", {"prompt": "x", "answer": "{answer}"}, r"template\.prompt` is 'x': has to hold \{question\} once"),
    ("data.source", "", r"`profiles\.cpu\.data`: `source` is ''; write embedded, owner/name, or a folder that begins with \./ or /$"),
    ("data.source", "~/my-data", r"`source` is '~/my-data'; write embedded, owner/name"),
    ("data.source", "owner/name", r"`revision` is None; pin the full 40-digit commit of owner/name"),
    ("data.revision", SHA, r"`revision` is '0123.*', and embedded is no Hub repository; set it to null"),
    ("data.config", "all", r"`config` is 'all', and embedded is a folder"),
    ("data.splits", {"train": "train", "test": "test"}, r"says nothing of validation; name a split for each"),
    ("data.columns", {"question": "q"}, r"key `profiles\.cpu\.data\.columns\.chosen` is missing"),
    ("data.columns", COLUMNS | {"chosen": "question"}, r"`profiles\.cpu\.data\.columns`: question is in it twice; name it once$"),
    ("data.columns.score", ["s", "s"], r"`profiles\.cpu\.data\.columns`: s is in it twice; name it once$"),
    ("data.columns.question", "", r"data\.columns\.question` is '': String should have at least 1 character$"),
    ("data.splits.train", "", r"data\.splits\.train` is '': String should have at least 1 character$"),
    ("data.choice", CHOICE | {"second": ["a", "b"]}, r"`profiles\.cpu\.data\.choice`: a is in it twice; name it once$"),
    ("data.choice", CHOICE | {"candidates": ["x", "x"]}, r"`profiles\.cpu\.data\.choice`: x is in it twice; name it once$"),
    ("data.mixed_with", [SHARE | {"share": 0.0}], r"data\.mixed_with\.0\.share` is 0\.0: Input should be greater than 0$"),
    ("data.mixed_with", [SHARE | {"share": 1.5}], r"data\.mixed_with\.0\.share` is 1\.5: Input should be less than or equal to 1$"),
    ("data.mixed_with", [SHARE, {"source": "./a"}], r": key `profiles\.cpu\.data\.mixed_with\.1\.\w+` is missing; .*\.share` is missing$"),
    ("data.mixed_with", [SHARE | {"weight": 2}], r": unknown key `profiles\.cpu\.data\.mixed_with\.0\.weight`; allowed there: choice, "),
    ("data.mixed_with", [SHARE | {"columns": COLUMNS | {"sytem": None}}], r"unknown key `.*\.mixed_with\.0\.columns\.sytem`; allowed"),
    ("data.mixed_with", [SHARE | {"choice": {"by": "score"}}], r"key `.*\.data\.mixed_with\.0\.choice\.candidates` is missing; key"),
    *(
        (key, 10**30, rf"{key.replace('.', chr(92) + '.')}` is 10{{30}}: Input should be less than or equal to 10+$")
        for key in (
            "train.batch_size", "train.warmup_steps", "train.max_steps", "train.checkpoint_steps", "train.evaluations",
            "reference.batch_size", "evaluate.context", "evaluate.slots", "evaluate.batch_size", "evaluate.divergence_pairs",
        )
    ),
    ("merge.max_shard_size", "9" * 4400 + "GB", r"max_shard_size` is '9{100,}\.\.\.: write it like 200MB or 5GB$"),
    ("model.revision", "main", r"`revision` is 'main', and embedded is no Hub repository"),
    ("/seed", -1, r"`seed` is -1: Input should be greater than or equal to 0"),
    ("/beta", 1e30, r"`beta` is 1e\+30: Input should be less than or equal to 1000$"),
    ("/beta", 0.0, r"`beta` is 0\.0: Input should be greater than 0"),
    ("/loss_type", "exo_pair", r"`loss_type: exo_pair` needs a `label_smoothing` above 0"),
    ("/loss_type", "sigmoidal", r"`loss_type` is 'sigmoidal': Input should be 'sigmoid', 'hinge'"),
    ("/betta", 0.1, r"unknown key `betta`; allowed there: beta, "),
    ("/profile", "cpux", r"`profile: cpux` names no entry of `profiles`; choose one of a40, "),
    ("/wandb", {"enabled": "yes", "project": "x"}, r"`wandb\.enabled` is 'yes': Input should be a valid boolean"),
    ("/collect", {}, r"key `collect\.topics` is missing"),
]  # fmt: skip


def write(path: Path, key: str, value: Any, source: Path = ROOT / "params.yaml") -> None:
    """Writes the committed params.yaml, or another, with one value changed."""
    yaml = YAML(pure=True)
    tree = yaml.load(source)
    place = tree if key.startswith("/") else tree["profiles"]["cpu"]
    *sections, last = key.removeprefix("/").split(".")
    for section in sections:
        place = place[section]
    place[last] = value
    yaml.dump(tree, path)


@pytest.mark.parametrize(("key", "value", "said"), MISTAKES, ids=[f"{key}={value}"[:50] for key, value, _ in MISTAKES])
def test_a_mistake_in_any_section_is_one_line_that_names_the_key(
    key: str, value: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    write(tmp_path / "params.yaml", key, value)
    with pytest.raises(UserError, match=said) as caught:
        experiment.check(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("made", "asked", "missing"),
    [
        (["Q8_0"], ["Q6_K"], "quantize.types"),
        (["Q8_0"], ["f16", "Q8_0", "gptq", "Q4_0"], "quantize.types"),
        (["Q8_0"], ["f16", "Q8_0", "gptq"], None),
        (["Q8_0"], "all", None),
        ("ladder", ["f16", "Q8_0", "IQ4_NL", "awq"], None),
        ("ladder", ["f16", "Q8_0", "Q4_K_M"], None),
        ("ladder", ["Q4_K_M", "IQ4_NL"], "quantize.types"),  # no one ladder has both
        ("ladder", ["f16", "Q6_K"], "quantize.types"),
        ([], ["gptq", "awq"], None),
        ([], [], None),
    ],
)
def test_what_is_evaluated_has_to_be_made(
    made: Any, asked: Any, missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "params.yaml"
    write(path, "quantize.types", made)
    write(path, "evaluate.types", asked, path)
    if missing is None:
        assert experiment.check(path, "cpu").profile.evaluate.types == asked
    else:
        with pytest.raises(
            UserError, match=rf"asks for {asked[-1]}, which is not made; add it to `{missing}` or take it out$"
        ):
            experiment.check(path, "cpu")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_method_that_is_evaluated_has_to_be_made(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "params.yaml"
    write(path, "compress.methods", [{"gptq": "awq", "awq": "gptq"}[method]])
    assert experiment.check(path, "cpu").profile.evaluate.types == "all"  # of what is made
    write(path, "evaluate.types", ["f16", method], path)
    with pytest.raises(
        UserError, match=rf"asks for {method}, which is not made; add it to `compress\.methods` or take it out$"
    ):
        experiment.check(path, "cpu")


def test_a_further_source_is_an_entry_with_all_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    write(tmp_path / "params.yaml", "data.mixed_with", [SHARE, SHARE | {"share": 1.0}])
    assert [entry.share for entry in experiment.check(tmp_path / "params.yaml").profile.data.mixed_with] == [0.5, 1.0]


def test_a_number_of_thousands_of_digits_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, lines = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text().splitlines()
    number = next(number for number, line in enumerate(lines) if line.startswith("      k: "))
    lines[number] = "      k: " + "7" * 5000
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        experiment.check(path)
    assert str(caught.value) == f"{path}, line {number + 1}: a number of more than 4,300 digits"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_committed_profile_passes(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert experiment.check(profile=profile).profile.train.batch_size > 0


def test_the_first_stage_stops_at_a_mistake_of_the_last_ones_section(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    write(tmp_path / "params.yaml", "evaluate.typs", ["f16"])
    done = subprocess.run(
        [sys.executable, "-m", "stages.subset"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("subset: params.yaml: ")
    assert "unknown key `profiles.cpu.evaluate.typs`" in line
