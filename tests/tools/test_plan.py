"""`make plan`: what every stage needs of a GPU or of this CPU, and a run that does not fit is refused with the change that helps."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hermes.artifacts import write_json, write_parquet
from hermes.console import UserError
from hermes.model import compressed, llama3
from hermes.settings.quantize import GGUF_TYPES, LADDERS
from tests.hermes.test_architectures import small_config
from tools import plan, quantization_plan, repro
from tools.evaluation_plan import evaluation_seconds
from tools.memory_plan import CONTEXT, training_memory, with_overhead
from tools.plan import (
    GPUS,
    Lengths,
    Run,
    changed,
    changes,
    disk_of,
    evaluating,
    held_out,
    host_memory,
    load,
    memory_of,
    on_cpu,
    refusal,
    run_of,
    seconds_of,
    smallest_change,
    training_step,
)

ROOT = Path(__file__).resolve().parents[2]
A40, SMALL = GPUS["A40"], GPUS["RTX 4090"]
# Minutes of all stages, training and evaluation of the default profile on two cores (docs/hardware-log.md), and what it had then.
MEASURED = {"avx512": (41.8, 17.3, 19.6), "portable": (56.7, 24.6, 23.0)}
THEN: dict[str, dict[str, Any]] = {
    "quantize": {"types": ["Q8_0", "Q5_K_M", "Q4_K_M"], "imatrix": False},
    "compress": {"methods": []},
    "evaluate": {"types": ["f16", "Q8_0", "Q5_K_M", "Q4_K_M"], "tasks": ["instructions", "preference", "plain"]},
}
LENGTHS = Lengths(np.full(64, 120), np.full(64, 150), np.full(64, 140))


@pytest.fixture
def published() -> Run:
    """The published experiment's run, on pairs of one length."""
    return Run(load("a40"), llama3.SHAPE, LENGTHS)


def total(run: Run) -> int:
    return memory_of(run, is_gpu=True)["train"]


@pytest.mark.parametrize("profile", ["cpu", "quick", "a40", "a40_published"])
def test_every_profile_fits_an_a40(profile: str) -> None:
    text, why = plan.plan(profile, "A40")
    assert why is None
    for line in (
        "weights",
        "constants",
        "adapter",
        "optimizer",
        "activations",
        "logits",
        "compress",
        "evaluate",
        "prediction",
    ):
        assert line in text


def test_the_published_base_has_its_shape_without_the_hub() -> None:
    assert run_of(load("a40"))[0].shape == llama3.SHAPE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r": no such file; `model\.source` of params\.yaml names this folder$"),
        (
            "{",
            r": says no shape of a Llama-like model \(It looks like the config file at .* is not a valid JSON file\.\)$",
        ),
        ("[]", r": says no shape of a Llama-like model \(Unrecognized model in "),
        ('{"model_type": "llama", "num_attention_heads": "4"}', r": says no shape of a Llama-like model \("),
        ('{"model_type": "llama", "num_attention_heads": 0}', r": says no shape of a Llama-like model \("),
        ('{"model_type": "mamba"}', r": says no shape of a Llama-like model \('MambaConfig' object has no attribute "),
    ],
)
def test_a_folder_that_says_no_shape_is_named(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("cpu")
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    if content is not None:
        Path("mine/config.json").write_text(content)
    model = loaded.model.model_copy(update={"source": "./mine"})
    with pytest.raises(UserError, match=rf"^\./mine/config\.json{message}") as error:
        plan.model_shape(loaded.model_copy(update={"model": model}))
    assert "\n" not in str(error.value)


def test_a_base_whose_config_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("cpu")
    monkeypatch.chdir(tmp_path)
    write_json(plan.BASE / "manifest.json", {"source": loaded.model.source})
    with pytest.raises(UserError, match=r"^models/base(/config\.json)?: .*`dvc repro`"):
        plan.model_shape(loaded)


def test_a_folder_has_the_shape_that_its_config_says(tmp_path: Path) -> None:
    loaded = load("cpu")
    small_config("llama").save_pretrained(tmp_path)
    model = loaded.model.model_copy(update={"source": str(tmp_path)})
    found = plan.model_shape(loaded.model_copy(update={"model": model}))
    assert found == llama3.Shape(4, 64, 96, heads=4, kv_heads=2, head_size=16, vocabulary=128, tied=False)


def test_a_float32_model_is_too_much_for_24_gb_and_the_change_named_helps() -> None:
    run, _ = run_of(load("a40"))
    why = refusal(run, SMALL)
    assert why is not None
    assert why.startswith("evaluate needs about 3")
    assert why.endswith("smallest change: evaluate.divergence_pairs: 0, evaluate.batch_size: 16")

    def refused(**values: int) -> bool:
        return refusal(changed(run, {"evaluate": values}), SMALL) is not None

    assert refused(batch_size=16)  # the model in float32
    assert refused(divergence_pairs=0)  # the cache of Transformers
    assert refused(divergence_pairs=0, batch_size=16, slots=64)  # that of llama.cpp
    assert not refused(divergence_pairs=0, batch_size=16)


def test_the_largest_row_is_one_of_the_epoch() -> None:
    lengths = Lengths(np.array([5, 1, 1, 1]), np.array([9, 2, 2, 2]), np.array([9, 3, 3, 3]))
    assert lengths.tokens.tolist() == [21, 4, 4, 4]
    assert lengths.largest_row(1) == (21, 18)
    assert lengths.largest_row(4) == (33, 33)


def test_the_largest_row_is_found_over_many_orders() -> None:
    lengths = Lengths(*(np.where(np.arange(400) < 2, 1000, 10) for _ in range(3)))
    both_long = (2 * 2998 + 6 * 28, 2 * 2000 + 6 * 20)  # which few orders have in one row
    assert lengths.largest_row(8) == both_long


def test_under_fsdp_the_weights_are_shared_and_the_base_still_loads_whole(published: Run) -> None:
    sharded = changed(published, {"train": {"distribution": "fsdp", "processes": 4}})
    whole, part = training_step(published, is_gpu=True), training_step(sharded, is_gpu=True)
    assert part.weights == whole.weights // 4
    assert part.activations == whole.activations
    assert part.workspace == whole.workspace + 128_256 * 4096 * 2
    assert total(changed(published, {"train": {"processes": 4}})) == total(published)
    assert max(whole.weights + whole.constants, part.total) < total(sharded) < total(published)


def test_the_change_named_fits_and_none_before_it(published: Run) -> None:
    larger = {"gradient_checkpointing": False, "batch_size": 32, "accumulation": 1}
    large = changed(published, {"base": {"keep_dequantized": True}, "train": larger})
    found = list(changes(large.settings, "train"))
    totals = [total(changed(large, change)) for change in found]
    for limit in totals:
        first = next(i for i, memory in enumerate(totals) if memory <= limit)
        assert smallest_change(large, "train", A40._replace(memory=limit)) == found[first]
    assert smallest_change(large, "train", A40._replace(memory=min(totals) - 1)) is None
    assert found[:2] == [
        {"base": {"keep_dequantized": False}, "train": {}},
        {"base": {"keep_dequantized": False}, "train": {"gradient_checkpointing": True}},
    ]


def test_where_no_change_is_enough_it_says_so(published: Run) -> None:
    why = refusal(published, A40._replace(memory=1 << 30))
    assert why is not None
    assert why.endswith(", and no change of the profile is enough")


def test_every_change_leaves_the_pairs_of_a_step(published: Run) -> None:
    odd = changed(
        published, {"base": {"quantization": "none"}, "train": {"batch_size": 6, "accumulation": 2, "processes": 2}}
    )
    for change in changes(odd.settings, "train"):
        settings = changed(odd, change).settings.train
        assert settings.batch_size * settings.accumulation == 12
        assert settings.accumulation % settings.processes == 0


def test_a_fast_gpu_waits_for_python_and_a_slow_one_does_not() -> None:
    run, _ = run_of(load("a40"))
    passes = 3 * len(run.lengths.prompt) + run.settings.train.evaluations * held_out(run.settings)  # with checkpointing
    waiting = passes / run.settings.train.batch_size * llama3.SHAPE.layers * plan.LAUNCHING
    seconds = {name: seconds_of(run, gpu)["train"] - plan.STARTING for name, gpu in GPUS.items()}
    assert seconds["H100"] == pytest.approx(waiting)
    assert seconds["A40"] > 2 * waiting


def test_needs_follow_the_model() -> None:
    run, _ = run_of(load("a40"))
    weights = 8_030_261_248
    disk, memory = disk_of(run.settings, run.shape), memory_of(run, is_gpu=True)
    assert disk["fetch_model"] == disk["merge"] == 2 * weights
    assert plan.disk(run.settings) == sum(disk.values()) > 70 * 2**30
    assert memory["evaluate"] > 4 * weights
    assert memory["train"] > memory["reference"]
    assert memory["evaluate"] > 2 * weights + (17 + 2) * 4096 * 131_072  # llama.cpp's f16 with its caches


def test_training_reads_its_pairs_three_times_an_epoch_with_checkpointing() -> None:
    run, _ = run_of(load("a40"))
    seconds = {stage: value - plan.STARTING for stage, value in seconds_of(run, A40).items()}
    share = held_out(run.settings) / len(run.lengths.prompt)
    assert seconds["train"] == pytest.approx((3 + 2 * share) * seconds["reference"] / (1 + share))


def test_evaluation_takes_the_work_at_the_rates_given() -> None:
    run, _ = run_of(load("a40"))
    pairs = changed(run, {"evaluate": {"suites": [], "divergence_pairs": 0, "tasks": ["preference"]}})
    answers = (run.lengths.chosen + run.lengths.rejected).mean()
    work = (run.lengths.prompt.mean() + answers) * llama3.SHAPE.linear_weights + answers * 128_256 * 4096
    found = evaluation_seconds(*pairs[:2], *run.lengths.means, 1e12, 1e12)
    assert list(found) == ["base", "merged", "Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M", "gptq", "awq"]
    for parts in found.values():
        assert parts == {"held-out": pytest.approx(held_out(run.settings) * 2 * work / 1e12, rel=0.02)}

    def total(name: str, bandwidth: float) -> float:
        asked = changed(pairs, {"evaluate": {"suites": [name]}})
        return sum(
            parts.get(name, 0) for parts in evaluation_seconds(*asked[:2], *run.lengths.means, 1e12, bandwidth).values()
        )

    assert total("nous", 2e12) == total("nous", 1e12)  # no answer is written
    assert total("open_llm_v2", 2e12) < total("open_llm_v2", 1e12)


def test_gptq_and_awq_are_evaluated_as_fast_as_the_merged_model_and_a_smaller_file_faster() -> None:
    whole = changed(run_of(load("a40"))[0], {"evaluate": {"suite_types": "all"}})
    found = {model: sum(parts.values()) for model, parts in evaluating(whole, A40).items()}
    assert found["gptq"] == found["awq"] < found["merged"] == found["base"]  # which alone are asked prose
    assert found["Q3_K_M"] < found["Q4_K_M"] < found["Q8_0"]
    assert sum(found.values()) == pytest.approx(seconds_of(whole, A40)["evaluate"] - plan.STARTING)


def test_suites_are_asked_of_base_and_merged_and_of_the_files_that_are_named() -> None:
    run, _ = run_of(load("a40"))
    assert {model for model, parts in evaluating(run, A40).items() if "nous" in parts} == {"base", "merged"}
    more = changed(run, {"evaluate": {"suite_types": ["Q4_K_M"]}})
    assert {model for model, parts in evaluating(more, A40).items() if "nous" in parts} == {"base", "merged", "Q4_K_M"}


def test_the_8b_profile_ends_within_an_evening_on_an_a40() -> None:
    """Training included, as the issue of the default asks: 8 hours."""
    assert sum(seconds_of(run_of(load("a40"))[0], A40).values()) <= 8 * 3600


def test_what_prompts_share_is_read_once_by_transformers_and_each_time_by_llama_cpp() -> None:
    run = changed(run_of(load("a40"))[0], {"evaluate": {"suites": ["open_llm_v1"], "suite_types": ["Q8_0"]}})
    found = {
        m: parts.get("open_llm_v1", 0)
        for m, parts in evaluation_seconds(*run[:2], *run.lengths.means, 1e12, 1e18).items()
    }
    weights = 2 * llama3.SHAPE.linear_weights
    assert found["Q8_0"] - found["merged"] == pytest.approx(14042 * 600 * weights / 1e12, rel=1e-6)


@pytest.mark.parametrize("bits", MEASURED)
def test_a_cpu_takes_what_the_default_profile_took_on_two_cores(
    bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(plan, "TOKENS", tmp_path)  # the pairs in this checkout may be those of another profile
    run = changed(run_of(load("cpu"))[0], THEN)
    run = run._replace(settings=on_cpu(run.settings, bits))
    seconds = seconds_of(run, plan.device_here(run.settings.base.threads, bits)[1])
    found = sum(seconds.values()), seconds["train"], seconds["evaluate"]
    assert [value / 60 for value in found] == pytest.approx(MEASURED[bits], rel=0.1)


@pytest.mark.parametrize(("methods", "measured"), [([], 0), (["gptq"], 92), (["awq"], 73), (["gptq", "awq"], 165)])
def test_rounding_to_4_bits_takes_what_smollm2_took_on_two_cores(
    methods: list[str], measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 2)
    run = changed(run_of(load("cpu"))[0], {"compress": {"methods": methods}})
    run = run._replace(settings=on_cpu(run.settings, "portable"), lengths=Lengths(*(np.full(128, 40),) * 3))
    seconds = seconds_of(run, plan.device_here(2, "portable")[1])["compress"] - plan.STARTING
    assert seconds == pytest.approx(measured, rel=0.1)
    if methods:
        assert memory_of(run, is_gpu=False)["compress"] == pytest.approx(1.9e9, rel=0.15)


def test_an_importance_matrix_takes_a_forward_over_the_calibration_pairs() -> None:
    run = run_of(load("cpu"))[0]
    without = changed(run, {"quantize": {"imatrix": False}})
    pairs = changed(run, {"calibration": {"pairs": 256}})
    seconds = [seconds_of(one, plan.device_here(2, "portable")[1])["quantize"] for one in (without, run, pairs)]
    assert seconds[2] - seconds[0] == pytest.approx(2 * (seconds[1] - seconds[0]))
    assert seconds[1] - seconds[0] == pytest.approx(20, rel=0.3)


def test_the_ladder_and_all_are_what_suits_the_shape() -> None:
    cpu, a40 = (run_of(load(name))[0] for name in ("cpu", "a40"))
    for run, divides in ((cpu, False), (a40, True)):
        assert quantization_plan.gguf_types(run.settings, run.shape) == LADDERS[divides]
        assert quantization_plan.evaluated(run.settings, run.shape) == (*LADDERS[divides], "gptq", "awq")
    named = changed(a40, {"quantize": {"types": ["Q2_K"]}, "evaluate": {"types": ["f16", "awq"]}})
    assert quantization_plan.gguf_types(named.settings, named.shape) == ("Q2_K",)
    assert quantization_plan.evaluated(named.settings, named.shape) == ("f16", "awq")
    assert quantization_plan.BITS.keys() == {"f16", *GGUF_TYPES}
    assert quantization_plan.TRIED == compressed.SEARCHED
    assert quantization_plan.SIZES == compressed.SIZES


def test_a_folder_of_4_bit_weights_has_scales_and_zero_points_for_each_group() -> None:
    run = run_of(load("cpu"))[0]
    sizes = [disk_of(changed(run, {"compress": {"group_size": n}}).settings, run.shape)["compress"] for n in (32, 64)]
    linear, other = run.shape.linear_weights, run.shape.other_weights
    assert sizes[0] == 2 * (linear // 2 + linear // 32 * 20 // 8 + 2 * other)
    assert sizes[0] - sizes[1] == 2 * linear // 64 * 20 // 8
    null = changed(run, {"compress": {"group_size": None}})
    assert disk_of(null.settings, run.shape)["compress"] == sizes[1]  # 64 divides 576 and 1536, 128 does not


def test_8b_is_compressed_on_an_a40_and_on_24_gb_with_24_gb_of_the_hosts() -> None:
    run = run_of(load("a40"))[0]
    needed = memory_of(run, is_gpu=True)
    assert 2 * 8_030_261_248 + 2 * 4 * 14_336**2 < needed["compress"] < SMALL.memory
    assert needed["quantize"] < SMALL.memory
    assert 2 * 8_030_261_248 < host_memory(run) < 24e9
    small = A40._replace(memory=needed["compress"] - 1)
    assert smallest_change(run, "compress", small) == {"compress": {"methods": ["awq"]}}
    assert smallest_change(run, "compress", small._replace(memory=10**10)) == {"compress": {"methods": []}}
    assert smallest_change(run, "quantize", small._replace(memory=10**10)) == {"quantize": {"imatrix": False}}


def test_a_cpu_has_the_threads_of_the_profile_and_no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 4)
    rates = [plan.device_here(threads, "portable")[1].flops for threads in (2, 4, 8)]
    assert rates == [2 * plan.CORE["portable"][0], *[4 * plan.CORE["portable"][0]] * 2]


def test_a_first_look_is_planned_as_one() -> None:
    device = A40._replace(flops=1e11, is_gpu=False)
    quick, whole = (seconds_of(run_of(load(name))[0], device) for name in ("quick", "cpu"))
    assert all(quick[stage] < whole[stage] / 4 for stage in ("reference", "train", "evaluate"))


def test_on_a_cpu_python_and_the_model_are_one_memory_and_cuda_is_not_there() -> None:
    run, _ = run_of(load("cpu"))
    memory = memory_of(run, is_gpu=False)
    tokens, answers = run.lengths.largest_row(run.settings.train.batch_size)
    step = training_memory(run.shape, run.settings.base, run.settings.train, tokens, answers, cuda=False)
    assert memory["train"] == with_overhead(step) - CONTEXT + plan.PYTHON
    assert memory["evaluate"] > 4 * (run.shape.linear_weights + run.shape.other_weights)


@pytest.mark.parametrize(
    ("tokens", "answers", "measured"),
    [(950, 760, 2_181), (3_800, 3_040, 4_898), (948, 190, 2_116), (3_950, 790, 4_969)],
)
def test_on_a_cpu_training_needs_what_the_benchmark_measured(
    tokens: int, answers: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_of(load("cpu"))
    monkeypatch.setattr(Lengths, "largest_row", lambda self, pairs: (tokens, answers))
    assert memory_of(run, is_gpu=False)["train"] / 1e6 == pytest.approx(measured, rel=0.15)


def test_the_pairs_here_count_as_many_as_the_profile_takes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    ids = [[0] * length for length in (3, 5, 7)]
    write_parquet(plan.TOKENS / "train.parquet", pa.table({f"{n}_ids": ids for n in ("prompt", "chosen", "rejected")}))
    write_json(plan.RAW / "manifest.json", {"source": "embedded"})
    write_json(plan.SUBSET, {"train": {"read": 3776, "removed": {"empty": 76}}})
    for profile, pairs in (("quick", 240), ("cpu", 2100)):
        lengths, source = plan.pair_lengths(load(profile))
        assert len(lengths.prompt) == pairs
        assert set(lengths.chosen) == {3, 5, 7}
        assert source == f"data/tokens/train.parquet, {pairs:,} pairs"
    write_json(plan.SUBSET, {"train": {"read": 3, "removed": {}}})
    assert plan.pair_lengths(load("cpu"))[0].prompt.tolist() == [3, 5, 7]


def test_the_command_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "tools.plan", "--profile", "a40", "--gpu", "RTX 4090", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("plan: does not fit: evaluate needs")
    assert done.stderr.rstrip().endswith("(a prediction for RTX 4090, 23.99 GiB)")


def test_without_a_gpu_the_plan_is_for_this_cpu() -> None:
    text, why = plan.plan("quick", None)
    assert why is None
    assert "device: CPU, " in text
    assert "what follows is a prediction" in text


def test_a_model_too_large_for_this_cpu_is_one_line_that_holds_no_stage_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=20 << 30))
    monkeypatch.setattr(sys, "argv", ["plan", "--profile", "a40"])
    with pytest.raises(UserError, match=r"^does not fit: evaluate needs about .*GPU=NAME \(--gpu\) plans for a GPU$"):
        plan.main()
    monkeypatch.setattr(sys, "argv", ["plan", "--profile", "a40", "--quiet"])
    plan.main()  # as run-stage asks: a CPU swaps where it must
    assert capsys.readouterr().out == ""


def test_a_run_that_the_disk_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["plan", "--profile", "a40", "--gpu", "A40", "--quiet"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 30))
    monkeypatch.setattr(sys, "argv", argv)
    plan.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--disk"])
    with pytest.raises(UserError, match=r"^does not fit: 5 GB free in .*, \d\d are needed; free some"):
        plan.main()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500 << 30))
    plan.main()


def test_nothing_starts_where_the_plan_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[2:])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(repro.subprocess, "run", run)
    with pytest.raises(UserError, match="nothing was started"):
        repro.check_plan("a40")
    assert asked == [["tools.plan", "--quiet", "--disk", "--profile", "a40"]]


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(UserError, match="`profile: b40` names no entry of `profiles`"):
        plan.plan("b40", None)


def test_a_price_of_an_hour_gives_the_cost_by_suite_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text, _ = plan.plan("a40", "A40", 0.5)
    minutes, cost = (
        text.split(f"{unit} of evaluate")[1].split("\n\n")[0].splitlines()[2].split() for unit in ("minutes", "cost")
    )
    assert minutes[0] == cost[0] == "base"
    for spent, paid in zip(minutes[1:], cost[1:], strict=True):
        assert float(paid) == pytest.approx(float(spent) / 60 * 0.5, abs=0.006)
    assert re.search(r"^cost of all: \d+\.\d\d, which is \d+\.\d hours at 0\.50$", text, re.MULTILINE)
    assert "cost" not in plan.plan("a40", "A40")[0]
