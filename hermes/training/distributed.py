"""Training in several processes: the launch through Accelerate, and the batches of one process dealt out to all of them.

`train.processes: n` changes how fast a run is and no more. Of an epoch's batches, in the order of one process, process p gets batch p,
p + n, p + 2n, ..., each whole. n divides `train.accumulation`, so the batches of an optimizer step are those of one process. The mean over
processes of their weighted losses is then the step's mean over batches. Where the last batches of an epoch are not enough for all,
those without one repeat an earlier batch at weight 0: every process has to take part in every collective operation.
Only the masks of dropout differ, since every process draws its own.

`train.distribution: ddp` keeps the whole base in every process. `fsdp` shards it over GPUs, as PEFT documents for QLoRA (its guide
accelerate/fsdp.md). It is FSDP version 1, since version 2 loses what bitsandbytes packs (its issue 1945). nf4 is packed into the compute
type, and every LoRA matrix is wrapped by itself. It takes GPUs, and has not run on any yet.
"""

import json
import os
import signal
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType, gather_object, patch_environment
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import DPOTrainer

from hermes.console import UserError

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a process that a signal ended in order
# An empty one, given by name: otherwise `accelerate launch` reads the user's own from the home directory.
CONFIGURATION = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO"}
FSDP = {
    "fsdp_version": "1",
    "fsdp_sharding_strategy": "FULL_SHARD",
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_use_orig_params": "false",
    "fsdp_cpu_ram_efficient_loading": "true",
    "fsdp_sync_module_states": "true",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_offload_params": "false",
}


def is_launched() -> bool:
    """Whether this process is one of several that `launch` has started."""
    return "LOCAL_RANK" in os.environ


def is_main(processes: int) -> bool:
    """Whether this one of so many processes writes the outputs: the first, or the only one."""
    return processes == 1 or os.environ["RANK"] == "0"


def check(processes: int, distribution: str, gpus: int) -> None:
    """Refuses what the devices here cannot run.

    Raises:
        UserError: FSDP without a GPU, or more processes than GPUs.
    """
    if distribution == "fsdp" and not gpus:
        raise UserError(
            "params.yaml: `train.distribution: fsdp` needs CUDA devices and none is here, where Accelerate would run DDP "
            "without a word; set it to ddp"
        )
    if 0 < gpus < processes:
        raise UserError(
            f"params.yaml: `train.processes` is {processes}, but {gpus} CUDA device(s) are here; lower it to {gpus} at most"
        )


def launch_arguments(processes: int, distribution: str, threads: int, configuration: Path, module: str) -> list[str]:
    """What follows `accelerate launch`: every process runs `python -m MODULE` with so many CPU threads."""
    flags = {
        "config_file": configuration,
        "num_processes": processes,
        "num_machines": 1,
        "main_process_port": 0,  # any that is free
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "num_cpu_threads_per_process": threads,
        **(FSDP if distribution == "fsdp" else {}),
    }
    values = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*values, "--use_fsdp" if distribution == "fsdp" else "--multi_gpu", "--module", module]


def launch(processes: int, distribution: str, threads: int, module: str) -> None:
    """Runs `python -m MODULE` in several processes at once and waits for their end.

    Without a GPU they are CPU processes: `accelerate launch --cpu` would start a single one, so Accelerate is told by its variable.

    SIGTERM and SIGINT are passed on to them, and this process ends when they have; after 30 seconds they are killed.

    Raises:
        UserError: the devices cannot run it, or one of the processes failed.
    """
    gpus = torch.cuda.device_count()
    check(processes, distribution, gpus)
    with tempfile.TemporaryDirectory() as folder, patch_environment(**({} if gpus else {"ACCELERATE_USE_CPU": "true"})):
        configuration = Path(folder) / "accelerate.json"
        configuration.write_text(json.dumps(CONFIGURATION))
        arguments = launch_arguments(processes, distribution, threads, configuration, module)
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        except SignalException as stop:
            sys.exit(128 + stop.sigval)
        except ChildFailedError as error:
            if (code := error.get_first_failure()[1].exitcode) in STOPPED:  # and it has said so
                sys.exit(code)
            raise UserError(f"one of the {processes} processes failed; its message is above") from None


def any_of(value: bool) -> bool:
    """Whether a value is true in one of the processes; all take part and hear the same."""
    return any(gather_object([value]))


def wait() -> None:
    """Waits until all processes are here."""
    PartialState().wait_for_everyone()


def check_distribution(accelerator: Accelerator, processes: int, distribution: str) -> None:
    """Refuses to train otherwise than asked; Accelerate falls back silently.

    Raises:
        UserError: another number of processes, or another kind of distribution.
    """
    several = DistributedType.MULTI_GPU if accelerator.device.type == "cuda" else DistributedType.MULTI_CPU
    wanted = DistributedType.FSDP if distribution == "fsdp" else several if processes > 1 else DistributedType.NO
    if (accelerator.distributed_type, accelerator.num_processes) != (wanted, processes):
        raise UserError(
            f"params.yaml asks for {processes} process(es) as {wanted.value}, and Accelerate runs {accelerator.num_processes} as "
            f"{accelerator.distributed_type.value}; run `dvc repro train`, which launches them, where LOCAL_RANK is not set"
        )


def weight(batches: int, process: int, processes: int, last: bool) -> float:
    """What a forward counts in the mean over processes and their forwards, so that each batch counts 1 / `batches`.

    Args:
        batches: how many the processes share, in an optimizer step or an evaluation.
        process: the number of this one.
        processes: how many there are.
        last: whether it is this process's last forward of those batches, for which there may be none left: then 0.
    """
    if last and process >= (batches % processes or processes):
        return 0.0
    return processes * -(-batches // processes) / batches


def adapter_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter in the whole state of a model that FSDP has sharded, under PEFT's names.

    PEFT's own function (0.21.2) looks for modules by names that FSDP has changed, and returns nothing, without an error.
    """
    return {name.replace(".default.", "."): tensor for name, tensor in state.items() if ".lora_" in name}


class OwnMasks(TrainerCallback):
    """Gives every process its own masks of dropout; the pairs' order and the adapter's first weights are drawn before."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(args.seed + args.process_index)


class DealtBatches(DPOTrainer):
    """Makes a DPO trainer in several processes take the steps of one process (module docstring); to be inherited from before it."""

    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL gathers each metric at every forward, where batches differ in size and some do not count: `log` gathers all at once.
        self.accelerator.gather = self.accelerator.gather_for_metrics = lambda values, **_: values
        if self.is_fsdp_enabled:
            # Trainer would cast all to the type of the packed nf4: the adapter, its gradients, the frequencies of the positions.
            self.accelerator.state.fsdp_plugin.set_mixed_precision = lambda *_, **__: None
        self.add_callback(OwnMasks())

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Accelerate's, which fills the last batch up to its size; where it knows of none, it deals the batches as they are."""
        loader: Any = super()._get_dataloader(*args, **kwargs)
        loader.batch_sampler.batch_size = None
        return loader

    def weight(self) -> float:
        """What this forward's loss is multiplied by."""
        training, processes = self.model.training, self.args.world_size
        pairs = len(self.train_dataset if training else self.eval_dataset)
        batches, last = -(-pairs // self.args.per_device_train_batch_size), self.accelerator.sync_gradients
        if not training:
            return weight(
                batches, self.args.process_index, processes, self.accelerator.gradient_state.end_of_dataloader
            )
        step = self.args.gradient_accumulation_steps * processes
        done = self.state.global_step % -(-batches // step) * step  # of this epoch
        return weight(min(step, batches - done), self.args.process_index, processes, last)

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The weighted loss of this process's batch; a repeated one leaves no metrics."""
        weight, metrics = self.weight(), self._metrics
        if not weight:
            self._metrics = {mode: defaultdict(list) for mode in metrics}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._metrics = metrics
        if weight and not self.model.training:  # Trainer's own mean of it is over pairs, and over this process's alone
            metrics["eval"]["loss"] += [float(loss)] * (len(inputs["input_ids"]) // 2)
        return loss * weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the metrics of all processes in each."""
        mode = "train" if self.model.training else "eval"
        together: defaultdict[str, list[float]] = defaultdict(list)
        for metrics in gather_object([dict(self._metrics[mode])]):
            for name, values in metrics.items():
                together[name] += values
        self._metrics[mode] = together
        super().log(logs, start_time)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Trainer's; under FSDP with the checkpoint's adapter in the model before that is sharded."""
        if self.is_fsdp_enabled and resume_from_checkpoint:
            state = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
            set_peft_model_state_dict(self.model, state)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, *args: Any) -> None:
        """Trainer's, but for FSDP, where the adapter is there already."""
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(*args)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trainer's, and under FSDP the adapter, which that leaves out."""
        super()._save(output_dir, state_dict)
        if self.is_fsdp_enabled and output_dir and state_dict and self.args.should_save:
            save_file(adapter_of(state_dict), Path(output_dir) / "adapter_model.safetensors")

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's, and then waits: the file that marks a checkpoint as complete is written next, by the first process."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
