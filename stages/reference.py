"""Stage reference: data/tokens + models/base -> data/reference, the per-token log-probabilities of every answer under the frozen base.

They depend on the base and its quantization alone, so no beta, learning rate or loss ever computes them again. They come out of
the very forward that training runs, which is held against the model's own first (hermes/training/exactness.py). They are kept per token
because some losses reweight tokens.
"""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hermes import params
from hermes.artifacts import check_together, complete_folder, open_parquet, write_manifest, write_parquet
from hermes.bits import Bits
from hermes.console import UserError, progress
from hermes.model.base import as_computed, load_base, set_determinism
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_stage
from hermes.settings.base import BaseSettings
from hermes.settings.reference import ReferenceSettings
from hermes.training.exactness import choose_forward
from hermes.training.shared_prefix import share_prefix

BASE, TOKENS, OUTPUT = Path("models/base"), Path("data/tokens"), Path("data/reference")
SPLITS = ("train", "validation")
SCHEMA = pa.schema([("chosen_logps", pa.list_(pa.float32())), ("rejected_logps", pa.list_(pa.float32()))])


class Params(params.Params):
    """Parameters of reference."""

    bits: Bits
    base: BaseSettings
    reference: ReferenceSettings


@torch.no_grad()
def score(
    model: PreTrainedModel, pairs: list[dict[str, Any]], collate: DataCollatorForPreference
) -> list[dict[str, list[float]]]:
    """The log-probability of every answer token, in nats, of a batch of pairs of ids: chosen_logps, rejected_logps."""
    batch = {name: tensor.to(model.device) for name, tensor in collate(pairs).items()}
    completion = batch.pop("completion_mask")
    labels = batch["input_ids"].masked_fill(completion == 0, -100)
    log_probs = model(**batch, labels=labels, fused_lm_head=True).log_probs
    rows = [row[mask].tolist() for row, mask in zip(log_probs, completion[:, 1:].bool(), strict=True)]
    return [
        {"chosen_logps": chosen, "rejected_logps": rejected}
        for chosen, rejected in zip(rows[: len(pairs)], rows[len(pairs) :], strict=True)
    ]


def check_finite(scored: list[dict[str, list[float]]], where: str) -> None:
    """Refuses log-probabilities that are no numbers.

    Raises:
        UserError: names the row.
    """
    for number, row in enumerate(scored):
        if not all(map(math.isfinite, (*row["chosen_logps"], *row["rejected_logps"]))):
            raise UserError(
                f"{BASE}: gives no finite log-probability for {where}, row {number}; its weights are damaged"
            )


def read_pairs(split: str) -> list[dict[str, Any]]:
    """The pairs of ids of a split."""
    with open_parquet(TOKENS / f"{split}.parquet") as file:
        return file.read(["prompt_ids", "chosen_ids", "rejected_ids"]).to_pylist()


def main() -> None:
    loaded = params.load(Params)
    made_from = check_together(BASE, TOKENS)
    set_determinism(loaded.base.threads)
    pairs = {split: read_pairs(split) for split in SPLITS}
    how = choose_forward(BASE, [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in pairs["train"]])
    model = load_base(BASE, as_computed(loaded.base, loaded.bits))
    share_prefix(model, how)
    size = loaded.reference.batch_size
    collate = DataCollatorForPreference(pad_token_id=load_tokenizer(BASE).pad_token_id or 0)
    with complete_folder(OUTPUT) as target:
        for split in SPLITS:
            batches = [pairs[split][i : i + size] for i in range(0, len(pairs[split]), size)]
            scored = [
                row
                for batch in progress(batches, f"reference {split}", unit="batch")
                for row in score(model, batch, collate)
            ]
            check_finite(scored, f"{TOKENS}/{split}.parquet")
            write_parquet(target / f"{split}.parquet", pa.Table.from_pylist(scored, schema=SCHEMA))
        write_manifest(target, made_from=made_from)


if __name__ == "__main__":
    run_stage("reference", main)
