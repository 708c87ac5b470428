"""Several processes: the steps of one, the same bits after a kill, and a refusal of what would not be distributed.

The processes are real ones: two on the CPU, under DDP, as `accelerate launch` starts them.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from peft import get_peft_model_state_dict
from pydantic import ValidationError
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hermes.artifacts import check_together, sha256_file, write_manifest, write_parquet
from hermes.console import UserError
from hermes.model.base import load_base
from hermes.training import distributed
from stages import train
from tests.conftest import cpu_params
from tests.stages.test_train import NF4, PARAMS, SETTINGS, workspace

__all__ = ["workspace"]  # the fixture
ROOT = Path(__file__).resolve().parents[2]
# 20 pairs in batches of 3, 4 batches a step: the last step of an epoch has 3, the last of them 2 pairs.
SHARED = {"batch_size": 3, "accumulation": 4, "epochs": 4.0, "evaluations": 2, "checkpoint_steps": 3}
ONE = PARAMS.model_copy(update={"train": SETTINGS.model_copy(update=SHARED)})
TWO = ONE.model_copy(update={"train": ONE.train.model_copy(update={"processes": 2})})
LAUNCH = "run_tool('train', lambda: distributed.launch(2, 'ddp', 1, 'slowed'))"
KILLER = """
import os, signal
from hermes import bits
bits.choose("train")  # which `python -m stages.train` does
from transformers import TrainerCallback
from stages import train

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

build = train.build_trainer
train.build_trainer = lambda *given: build(*given[:3], [*given[3], Kill()])
train.main()
"""


def write_params(loaded: train.Params) -> None:
    values = loaded.model_dump(mode="json")
    profile = {name: values.pop(name) for name in ("base", "train")}
    YAML().dump(cpu_params(**profile) | values, Path("params.yaml"))
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the working directory with a home that holds another configuration for Accelerate."""
    home = Path("home/accelerate")
    home.mkdir(parents=True, exist_ok=True)
    (home / "default_config.yaml").write_text("not: a configuration\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home.parent.absolute()), **variables}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def outputs() -> dict[str, str]:
    return {path.name: sha256_file(path) for path in (*train.ADAPTER.iterdir(), *train.REPORTS.iterdir())}


def rows(name: str) -> list[dict[str, float]]:
    with (train.REPORTS / name).open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts back what handles the signals that a launch relays to its processes."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals() if signal.getsignal(number)}
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def twenty_pairs(workspace: Path) -> Path:
    for folder in (train.TOKENS, train.REFERENCE):
        write_parquet(folder / "train.parquet", pq.read_table(folder / "train.parquet").slice(0, 20))
        write_manifest(folder)
    return workspace


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_resume_to_the_same_bits(
    twenty_pairs: Path, monkeypatch: pytest.MonkeyPatch, signals: None
) -> None:
    train.run(ONE, Path("one"), check_together(train.BASE, train.TOKENS, train.REFERENCE))
    expected = {name: rows(name) for name in ("history.csv", "evaluation.csv")}
    adapter = load_file(train.ADAPTER / "adapter_model.safetensors")

    write_params(TWO)
    whole = python("-m", "stages.train")
    assert whole.returncode == 0, whole.stderr
    for name, columns in (("history.csv", train.HISTORY), ("evaluation.csv", train.EVALUATION)):
        found = rows(name)
        assert [row["step"] for row in found] == [row["step"] for row in expected[name]]
        for ours, theirs in zip(found, expected[name], strict=True):
            for column in columns:
                assert ours[column] == pytest.approx(theirs[column], abs=1e-4, rel=0), (name, ours["step"], column)
    found_adapter = load_file(train.ADAPTER / "adapter_model.safetensors")
    assert found_adapter.keys() == adapter.keys()
    assert all((found_adapter[name] - adapter[name]).abs().max() < 1e-3 for name in adapter)
    bits = outputs()

    for folder in (train.ADAPTER, train.REPORTS):
        shutil.rmtree(folder)
    Path("killer.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(UserError, match="one of the 2 processes failed"):
        distributed.launch(2, "ddp", 1, "killer")
    (checkpoint,) = Path(".scratch/train").glob("*/checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    distributed.launch(2, "ddp", 1, "stages.train")
    assert outputs() == bits
    assert not any(path.is_dir() for path in Path(".scratch/train").iterdir())


SLOWED = """
import time
from hermes import bits
bits.choose("train")
from pathlib import Path
from transformers import TrainerCallback
from hermes.run import run_stage
from stages import train

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        Path(f"up-{args.process_index}").touch()
        time.sleep(0.2)

build = train.build_trainer
train.build_trainer = lambda *given: build(*given[:3], [*given[3], Slow()])
run_stage("train", train.main)
"""


def stop(told: str) -> int:
    """Sends SIGTERM to a running launcher, to one of its two processes or to all three; the step that they say they have saved."""
    for path in Path().glob("up-*"):
        path.unlink()
    program = f"from hermes.training import distributed\nfrom hermes.run import run_tool\n{LAUNCH}"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{ROOT}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (Path("up-0").exists() and Path("up-1").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if "slowed" in child.cmdline()]
    assert len(ranks) == 2
    pids = {"launcher": [process.pid], "one": [ranks[1].pid], "all": [process.pid, *(rank.pid for rank in ranks)]}[told]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    assert not psutil.wait_procs(children, timeout=30)[1]
    line = r"^train: stopped by SIGTERM behind step (\d+) of \d+, which is kept; run the same command again to go on$"
    (step,) = re.findall(line, said, re.MULTILINE)
    return int(step)


@pytest.mark.slow
def test_sigterm_saves_in_all_processes_and_the_run_goes_on_to_the_same_bits(twenty_pairs: Path) -> None:
    write_params(TWO)
    whole = python("-m", "stages.train")
    assert whole.returncode == 0, whole.stderr
    bits = outputs()
    for folder in (train.ADAPTER, train.REPORTS):
        shutil.rmtree(folder)
    Path("slowed.py").write_text(SLOWED)
    steps = []
    for told in ("launcher", "all", "one"):
        steps.append(stop(told))
        (checkpoint,) = Path(".scratch/train").glob("*/checkpoint-*")
        assert checkpoint.name == f"checkpoint-{steps[-1]}"
        assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert steps == sorted(steps)
    again = python("-m", "stages.train")
    assert again.returncode == 0, again.stderr
    assert outputs() == bits
    assert not any(path.is_dir() for path in Path(".scratch/train").iterdir())


def test_a_run_that_would_not_be_distributed_is_an_error(workspace: Path) -> None:
    """A process that believes itself launched, and Accelerate that finds no others."""
    write_params(TWO)
    place = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    alone = python("-m", "stages.train", **place)
    assert alone.returncode == 1
    (message,) = [line for line in alone.stderr.splitlines() if line.startswith("train: ")]
    assert "asks for 2 process(es) as MULTI_CPU, and Accelerate runs 1 as" in message
    assert not train.ADAPTER.exists()


def test_the_kind_of_distribution_is_checked() -> None:
    accelerator = Accelerator()
    distributed.check_distribution(accelerator, 1, "ddp")
    for wanted in ((2, "ddp"), (1, "fsdp"), (2, "fsdp")):
        with pytest.raises(UserError, match="Accelerate runs 1 as NO"):
            distributed.check_distribution(accelerator, *wanted)


@pytest.mark.parametrize(
    ("count", "distribution", "gpus", "message"),
    [
        (2, "fsdp", 0, "needs CUDA devices"),
        (4, "ddp", 2, "`train.processes` is 4, but 2 CUDA device"),
        (4, "fsdp", 2, "`train.processes` is 4, but 2 CUDA device"),
        (2, "ddp", 0, None),
        (2, "fsdp", 2, None),
        (1, "ddp", 2, None),
    ],
)
def test_what_the_devices_cannot_run_is_refused(count: int, distribution: str, gpus: int, message: str | None) -> None:
    if message is None:
        distributed.check(count, distribution, gpus)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        distributed.check(count, distribution, gpus)


def test_fsdp_is_refused_on_the_cpu_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    write_params(TWO.model_copy(update={"train": TWO.train.model_copy(update={"distribution": "fsdp"})}))
    with pytest.raises(UserError, match="needs CUDA devices and none is here"):
        train.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 0}, "processes"),
        ({"processes": 3}, r"must divide accumulation \(4\)"),
        ({"processes": 8}, r"must divide accumulation \(4\)"),
        ({"distribution": "fsdp"}, "nothing to shard"),
        ({"distribution": "zero"}, "distribution"),
    ],
)
def test_processes_that_cannot_share_a_step_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train.TrainSettings.model_validate(ONE.train.model_dump() | change)


def launched_with(distribution: str, folder: Path) -> Any:
    """The arguments as Accelerate understands them, without a look at the machine's own configuration."""
    configuration = folder / "accelerate.json"
    configuration.write_text('{"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO"}')
    arguments = distributed.launch_arguments(4, distribution, 3, configuration, "stages.train")
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def test_the_launch_of_ddp(tmp_path: Path) -> None:
    understood = launched_with("ddp", tmp_path)
    assert understood.multi_gpu
    assert not understood.use_fsdp
    assert (understood.num_processes, understood.num_machines, understood.mixed_precision) == (4, 1, "no")
    assert understood.module
    assert understood.training_script == "stages.train"
    assert prepare_multi_gpu_env(understood)["OMP_NUM_THREADS"] == "3"


def test_the_launch_of_fsdp_is_what_peft_documents_for_qlora(tmp_path: Path) -> None:
    environment = prepare_multi_gpu_env(launched_with("fsdp", tmp_path))
    expected = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "FSDP_VERSION": "1",
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_USE_ORIG_PARAMS": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_SYNC_MODULE_STATES": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
    }
    assert {name: environment.get(name) for name in expected} == expected


def test_nf4_packed_for_fsdp_has_the_same_bits(workspace: Path) -> None:
    ids = torch.arange(40).reshape(2, 20)
    plain, packed = (load_base(train.BASE, NF4, sharded=sharded) for sharded in (False, True))
    layers = [model.model.layers[0].mlp.up_proj.weight for model in (plain, packed)]
    assert [layer.dtype for layer in layers] == [torch.uint8, torch.bfloat16]
    assert torch.equal(layers[0].flatten(), layers[1].view(torch.uint8).flatten())
    assert torch.equal(plain(input_ids=ids).logits, packed(input_ids=ids).logits)


def test_the_adapter_in_a_whole_state_is_the_one_that_peft_finds(workspace: Path) -> None:
    trainer: Any = train.build_trainer(ONE, Path("scratch"), AutoTokenizer.from_pretrained(train.BASE), [])
    found, expected = distributed.adapter_of(trainer.model.state_dict()), get_peft_model_state_dict(trainer.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("batches", range(1, 13))
def test_every_batch_weighs_the_same_and_a_repeated_one_nothing(batches: int, count: int) -> None:
    forwards = -(-batches // count)
    found = [
        [
            distributed.weight(batches, process, count, last=i == forwards - 1) / forwards / count
            for i in range(forwards)
        ]
        for process in range(count)
    ]
    dealt = [len(range(process, batches, count)) for process in range(count)]
    expected = [[1 / batches] * own + [0.0] * (forwards - own) for own in dealt]
    assert found == [pytest.approx(row) for row in expected]
