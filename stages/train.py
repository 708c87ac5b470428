"""Stage train: data/tokens + data/reference + models/base -> models/adapter and reports/train.

TRL's DPOTrainer does the training: its losses, metrics, schedule and checkpoints. What differs is what it reads, the tracked ids
and reference log-probabilities, and the forward below it (hermes/training/shared_prefix.py). The adapter's weights are float32, since
updates of a bfloat16 adapter round away at small learning rates; dropout is what `lora_dropout` says, nothing hidden.

With `processes` above 1 the stage launches itself that many times (hermes/training/distributed.py): the same steps, faster.

Checkpoints go to a scratch folder. Its name is a hash of all inputs, code and package versions included. So a killed run resumes to the
same bits, and never from another run's state. The folder is removed when the adapter is written.
"""

import csv
import hashlib
import json
import logging
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

from hermes import params
from hermes.artifacts import (
    check_together,
    complete_file,
    complete_folder,
    open_parquet,
    prune_scratch,
    scratch_folder,
    sha256_file,
    write_json,
    write_manifest,
)
from hermes.bits import Bits
from hermes.console import UserError, say
from hermes.model.base import as_computed, load_base, set_determinism
from hermes.model.base_check import check_adapter
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_stage
from hermes.settings.base import BaseSettings
from hermes.settings.train import Science, TrainSettings
from hermes.training import distributed
from hermes.training.callbacks import CheckpointAndStop, EvaluationSteps, ProgressAndTracking
from hermes.training.exactness import choose_forward
from hermes.training.lora import fuse_updates, lora_config
from hermes.training.shared_prefix import Forward, share_prefix
from hermes.training.tracking import Tracking

BASE, TOKENS, REFERENCE = Path("models/base"), Path("data/tokens"), Path("data/reference")
ADAPTER, REPORTS = Path("models/adapter"), Path("reports/train")
ROOT = Path(__file__).parent.parent
PIPELINE, PACKAGES = ROOT / "dvc.yaml", ROOT / "packages.yaml"
HISTORY = (
    "loss",
    "preference_loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "learning_rate",
    "grad_norm",
)
EVALUATION = (*HISTORY[:6], "logps/chosen", "logps/rejected")


class Params(params.Params, Science):
    """Parameters of train."""

    bits: Bits
    base: BaseSettings
    train: TrainSettings


class TrackedDPOTrainer(DPOTrainer):
    """TRL's DPO trainer on rows that are tokenized already and know their reference log-probabilities.

    The data set's columns: prompt_ids, chosen_ids, rejected_ids (lists of ids), ref_chosen_logps, ref_rejected_logps (nats, summed).
    """

    model: Any

    def __init__(self, model: PreTrainedModel, how: Forward, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.remove_callback(PrinterCallback)  # the history goes to files, the latest loss to the progress bar
        share_prefix(self.model.get_base_model(), how)
        if not self.is_fsdp_enabled:  # which has a matrix whole in its own module's forward only
            fuse_updates(self.model)
        # Set after construction: with the flag of the same name in DPOConfig, TRL would compute the reference itself.
        self.precompute_ref_logps = True
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        """TRL's loss, and as a metric the part of it that is not the chosen answers' negative log-likelihood."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        counts = {name: len(values) for name, values in metrics.items()}
        result = super()._compute_loss(model, inputs, return_outputs)
        loss = result[0] if return_outputs else result
        chosen = inputs["completion_mask"][: len(inputs["completion_mask"]) // 2, 1:]
        sft_loss = -metrics["logps/chosen"][-1] * len(chosen) / int(chosen.sum())
        weight = sum(w for name, w in zip(self.loss_types, self.loss_weights, strict=True) if name == "sft")
        metrics["preference_loss"].append(float(loss.detach()) - weight * sft_loss)
        if not self.model.training:  # TRL reports the mean of batch means, and the last batch may be smaller
            for values in (values for name, values in metrics.items() if len(values) > counts.get(name, 0)):
                values.extend(values[-1:] * (len(chosen) - 1))
        return result


class DealtDPOTrainer(distributed.DealtBatches, TrackedDPOTrainer):
    """The same in several processes."""


def load_pairs(split: str) -> Dataset:
    """The tracked ids of a split beside the summed reference log-probabilities of its answers.

    Raises:
        UserError: the two tables do not belong together.
    """
    with open_parquet(TOKENS / f"{split}.parquet") as tokens, open_parquet(REFERENCE / f"{split}.parquet") as reference:
        ids = Dataset(tokens.read(["prompt_ids", "chosen_ids", "rejected_ids"]))
        logps = reference.read(["chosen_logps", "rejected_logps"]).to_pylist()
    if len(ids) != len(logps):
        raise UserError(
            f"{REFERENCE}/{split}.parquet: {len(logps)} rows for {len(ids)} pairs of ids; run `dvc repro reference`"
        )
    sums = {
        f"ref_{name}_logps": [float(torch.tensor(row[f"{name}_logps"]).sum()) for row in logps]
        for name in ("chosen", "rejected")
    }
    return concatenate_datasets([ids, Dataset.from_dict(sums)], axis=1)


def run_key(loaded: Params, made_from: dict[str, str]) -> str:
    """A hash of everything the trained adapter depends on, by dvc.yaml; `made_from` are the hashes of the folders.

    It names the scratch folder, and the run at W&B. It stands in the summary, so it has to be equal wherever DVC's inputs are.
    """
    stage, versions = params.read_yaml(PIPELINE)["stages"]["train"], params.read_yaml(PACKAGES)
    tracked = next(entry["packages.yaml"] for entry in stage["params"] if isinstance(entry, dict))
    code = {file: sha256_file(ROOT / file) for file in stage["deps"] if file.endswith(".py")}
    inputs = [loaded.model_dump(mode="json"), made_from, code, {name: versions.get(name) for name in tracked}]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a folder; those that a kill left unfinished are removed."""
    while found := get_last_checkpoint(str(folder)) if folder.exists() else None:
        try:
            json.loads((Path(found) / "trainer_state.json").read_text())  # the Trainer writes it last
            return found
        except (OSError, ValueError):
            shutil.rmtree(found)
    return None


def trainer_config(loaded: Params, output: Path, pairs: int) -> DPOConfig:
    """TRL's configuration from the parameters.

    Raises:
        UserError: a combination that TRL refuses, in its words.
    """
    s = loaded.train
    steps = s.max_steps or math.ceil(s.epochs * math.ceil(math.ceil(pairs / s.batch_size) / s.accumulation))
    if s.warmup_steps >= steps:
        reached = s.learning_rate * (steps - 1) / s.warmup_steps
        say(f"train: the warm-up of {s.warmup_steps} steps outlasts the {steps} steps; the rate reaches {reached:.3g}")
    try:
        config = DPOConfig(
            output_dir=str(output),
            seed=loaded.seed,
            beta=loaded.beta,
            loss_type=[loaded.loss_type, *(["sft"] if s.sft_weight else [])],
            loss_weights=[1.0, *([s.sft_weight] if s.sft_weight else [])],
            label_smoothing=loaded.label_smoothing,
            max_length=None,
            disable_dropout=False,
            learning_rate=s.learning_rate,
            lr_scheduler_type=s.schedule,
            warmup_steps=s.warmup_steps or int(s.warmup_ratio * steps),
            weight_decay=s.weight_decay,
            max_grad_norm=s.max_grad_norm,
            optim=s.optimizer,
            num_train_epochs=s.epochs,
            max_steps=s.max_steps or -1,
            per_device_train_batch_size=s.batch_size,
            per_device_eval_batch_size=s.batch_size,
            gradient_accumulation_steps=s.accumulation // s.processes,
            gradient_checkpointing=s.gradient_checkpointing,
            bf16=False,  # the base computes in its own type and the adapter in float32; autocast would blur both
            logging_steps=1,
            logging_first_step=True,
            eval_strategy="no",  # EvaluationSteps says when
            save_strategy="steps",
            save_steps=s.checkpoint_steps,
            save_total_limit=1,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,  # every adapter takes part in every forward
            ddp_broadcast_buffers=False,  # no buffer ever changes
            disable_tqdm=True,
            report_to="none",
        )
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    # A process has one GPU, or none; Trainer would spread the model over all that it sees.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def build_trainer(
    loaded: Params, scratch: Path, tokenizer: PreTrainedTokenizerBase, callbacks: list[TrainerCallback]
) -> TrackedDPOTrainer:
    """The trainer on the tracked data, ready to run.

    Raises:
        UserError: damaged inputs, a combination of parameters that TRL refuses, or other processes than asked for.
    """
    train, validation = load_pairs("train"), load_pairs("validation")
    s = loaded.train
    config = trainer_config(loaded, scratch, len(train))
    check_adapter(BASE, s)
    pairs = zip(*(train[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
    how = choose_forward(BASE, list(pairs))
    model = load_base(BASE, as_computed(loaded.base, loaded.bits), sharded=s.distribution == "fsdp")
    try:
        trainer = (DealtDPOTrainer if s.processes > 1 else TrackedDPOTrainer)(
            model,
            how,
            args=config,
            train_dataset=train,
            eval_dataset=validation if s.evaluations else None,
            processing_class=tokenizer,
            peft_config=lora_config(s),
            callbacks=[EvaluationSteps(s.evaluations), *callbacks],
        )
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    distributed.check_distribution(trainer.accelerator, s.processes, s.distribution)
    return trainer


def save_adapter(
    model: PeftModel, folder: Path, base_hash: str, gathered: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes an adapter canonically: sorted safetensors, and a config without paths, sets or class names that vary.

    `gathered` are its tensors where the model is sharded.
    """
    state = get_peft_model_state_dict(model) if gathered is None else gathered
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"base_model_name_or_path": f"sha256:{base_hash}", "inference_mode": True}
    write_json(folder / "adapter_config.json", json.loads(json.dumps(config, default=str)))


def write_history(rows: list[dict[str, Any]], columns: tuple[str, ...], path: Path, prefix: str = "") -> None:
    """Writes the logged rows that have `columns` as CSV, one row a step."""
    with complete_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *columns])
        for row in rows:
            if f"{prefix}{columns[0]}" in row:
                writer.writerow([row["step"], *(float(row[f"{prefix}{name}"]) for name in columns)])


def reference_difference(trainer: TrackedDPOTrainer, batches: int = 4) -> float:
    """Mean absolute difference, in nats an answer, of policy and reference before the first step.

    The policy is still the base, so that this is numerical noise: another batch is another composition of the same matrix
    products.
    """
    differences: list[float] = []
    for number, batch in enumerate(trainer.get_train_dataloader()):
        if number == batches:
            break
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            scored = trainer.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
            )
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        differences += (scored.log_probs.sum(dim=1).cpu() - reference.cpu()).abs().tolist()
    return sum(differences) / len(differences)


def summarize(trainer: TrackedDPOTrainer, pairs: int, trained: int, difference: float) -> dict[str, Any]:
    """The numbers of a finished run for reports/train/summary.json."""
    history = trainer.state.log_history
    losses = [float(row["preference_loss"]) for row in history if "loss" in row]
    evaluations = [row for row in history if "eval_loss" in row]
    last = evaluations[-1] if evaluations else {}
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "steps": trainer.state.global_step,
        "pairs": pairs,
        "epochs": trainer.state.epoch,
        "trained_parameters": trained,
        "reference_difference": difference,
        "validation_step": last.get("step"),
        "validation_loss": last.get("eval_preference_loss"),
        "validation_accuracy": last.get("eval_rewards/accuracies"),
    }


def run(loaded: Params, scratch: Path, made_from: dict[str, str]) -> None:
    """Trains, from the last checkpoint in `scratch` where there is one, and writes adapter and reports; `made_from` as `run_key`."""
    tokenizer = load_tokenizer(BASE)
    main = distributed.is_main(loaded.train.processes)
    with Tracking.start(loaded.model_dump(mode="json"), scratch.name) if main else Tracking() as tracking:
        callbacks = [*([ProgressAndTracking(tracking)] if main else []), CheckpointAndStop(loaded.train.processes)]
        trainer = build_trainer(loaded, scratch, tokenizer, callbacks)
        trained = sum(int(p.numel()) for p in trainer.model.parameters() if p.requires_grad)
        state = torch.get_rng_state()
        difference = reference_difference(trainer)
        torch.set_rng_state(state)
        checkpoint = broadcast_object_list([last_checkpoint(scratch) if main else None])[0]
        if main and checkpoint:
            say(f"train: goes on from {Path(checkpoint).name}")
        trainer.train(resume_from_checkpoint=checkpoint)
    gathered = None
    if trainer.is_fsdp_enabled:  # all processes take part
        gathered = distributed.adapter_of(trainer.accelerator.get_state_dict(trainer.model))
    trainer.accelerator.wait_for_everyone()  # no process writes to `scratch` any more
    for row in trainer.state.log_history:
        for name in ("preference_loss", "grad_norm"):  # Trainer leaves what is no number out of the loss that it logs
            if "loss" in row and not math.isfinite(float(row[name])):
                raise UserError(
                    f"{name} is {row[name]} at step {row['step']}; lower train.learning_rate, train.sft_weight or beta"
                )
    if not main:
        return
    REPORTS.mkdir(parents=True, exist_ok=True)
    write_history(trainer.state.log_history, HISTORY, REPORTS / "history.csv")
    write_history(trainer.state.log_history, EVALUATION, REPORTS / "evaluation.csv", prefix="eval_")
    write_json(
        REPORTS / "summary.json",
        summarize(trainer, len(load_pairs("train")), trained, difference) | {"run": scratch.name},
    )
    with complete_folder(ADAPTER) as folder:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_adapter(model, folder, made_from[BASE.as_posix()], gathered)
        write_manifest(folder, made_from=made_from)


def run_alone(loaded: Params, scratch: Path, made_from: dict[str, str]) -> None:
    """`run` where nobody else writes the same adapter or the same run's checkpoints, which are removed at its end.

    Of several processes the first one sees to that.

    Raises:
        UserError: somebody else does.
    """
    if not distributed.is_main(loaded.train.processes):
        run(loaded, scratch, made_from)
        return
    scratch.parent.mkdir(parents=True, exist_ok=True)
    ADAPTER.parent.mkdir(exist_ok=True)
    try:
        with FileLock(f"{ADAPTER}.lock", timeout=0), FileLock(f"{scratch}.lock", timeout=0):
            prune_scratch("train")  # not the own folder, whose lock is held
            run(loaded, scratch, made_from)
            shutil.rmtree(scratch, ignore_errors=True)
    except Timeout as error:
        raise UserError(f"{error.lock_file}: another training is running; wait for it or stop it") from None


def main() -> None:
    loaded = params.load(Params)
    s, threads = loaded.train, max(1, loaded.base.threads // loaded.train.processes)
    if s.processes > 1 and not distributed.is_launched():
        distributed.launch(s.processes, s.distribution, threads, "stages.train")
        return
    made_from = check_together(BASE, TOKENS, REFERENCE)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    set_determinism(threads)
    run_alone(loaded, scratch_folder("train") / run_key(loaded, made_from), made_from)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run_stage("train", main)
