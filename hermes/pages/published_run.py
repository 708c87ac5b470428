"""The published run: its settings and its loss curve, which the report of another run sets beside its own."""

from collections.abc import Mapping, Sequence
from typing import Any

BASE = "yuvraj17/Llama3-8B-SuperNova-Spectrum-dare_ties"
DATA = "mlabonne/chatml-OpenHermes2.5-dpo-binarized-alpha"
# Its settings by their key below a profile, each with what it is; profile a40_published has them all.
SETTINGS: Mapping[str, tuple[Any, str]] = {
    "model.source": (
        BASE,
        "the model that is trained; embedded is SmolLM2-135M-Instruct, which comes with the packages",
    ),
    "data.source": (DATA, "the preference pairs; embedded are those of this repository"),
    "subset.k": (2000, "how many training pairs are kept, the best by score"),
    "beta": (0.1, "how strongly training is pulled back to the model it began with"),
    "loss_type": ("sigmoid", "the formula of the preference loss"),
    "train.sft_weight": (
        0.0,
        "weight of the SFT term, a second loss that makes chosen answers likelier by themselves; 0 leaves it out",
    ),
    "train.learning_rate": (5e-5, "the largest size of a training step"),
    "train.epochs": (1.0, "how often training passes over the pairs"),
    "train.max_steps": (62, "training steps, where their number is fixed"),
    "train.batch_size": (8, "pairs in a batch, which go through the model at once"),
    "train.accumulation": (4, "batches in one training step"),
    "train.lora_rank": (32, "rank of the adapter: how many directions each trained layer may change in"),
    "train.lora_alpha": (16, "scale of the adapter; what it adds is multiplied by alpha / rank"),
    "train.warmup_steps": (100, "steps over which the learning rate rises to its peak"),
    "train.warmup_ratio": (0.0, "the share of all steps over which it rises, where warmup_steps is 0"),
    "train.weight_decay": (0.1, "how strongly the adapter's weights are pulled to zero"),
    "train.optimizer": ("paged_adamw_32bit", "the method that turns gradients into steps"),
}
# The loss of each of its 62 steps, as its log shows them.
LOSSES = (
    0.6931, 0.6931, 0.6930, 0.6927, 0.6924, 0.6913, 0.6905, 0.6891, 0.6893, 0.6843, 0.6846, 0.6843, 0.6738, 0.6773, 0.6683, 0.6675,
    0.6681, 0.6688, 0.6577, 0.6588, 0.6429, 0.6347, 0.6188, 0.6157, 0.6261, 0.5823, 0.6130, 0.5909, 0.6252, 0.5463, 0.5553, 0.5575,
    0.5566, 0.5240, 0.5630, 0.4930, 0.4823, 0.5393, 0.4421, 0.4581, 0.4822, 0.4641, 0.3778, 0.4886, 0.3101, 0.4880, 0.3152, 0.3288,
    0.3963, 0.3888, 0.3418, 0.5145, 0.3018, 0.3416, 0.4611, 0.7315, 0.3014, 0.4960, 0.1877, 0.1973, 0.2070, 0.3117,
)  # fmt: skip


def deviations(params: Mapping[str, Any]) -> list[tuple[str, Any, Any, str]]:
    """The settings of a run, by dotted keys, that are not those of the published run: (key, here, there, what it is)."""
    rows = [(key, params[key], value, meaning) for key, (value, meaning) in SETTINGS.items() if key in params]
    return [row for row in rows if row[1] != row[2]]


def curve_difference(losses: Sequence[float]) -> dict[str, float]:
    """How a run's losses differ from the published ones over the steps that both have: means, and mean absolute difference."""
    pairs = list(zip(losses, LOSSES, strict=False))
    return {
        "steps": len(pairs),
        "mean": sum(ours for ours, _ in pairs) / len(pairs),
        "published_mean": sum(theirs for _, theirs in pairs) / len(pairs),
        "mean_absolute": sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs),
    }
