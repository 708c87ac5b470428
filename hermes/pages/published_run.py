"""The published run: its base, its data, and its loss curve, which the report of a run on the same base draws beside its own."""

from collections.abc import Sequence

BASE = "yuvraj17/Llama3-8B-SuperNova-Spectrum-dare_ties"
DATA = "mlabonne/chatml-OpenHermes2.5-dpo-binarized-alpha"
# The loss of each of its 62 steps, as its log shows them.
LOSSES = (
    0.6931, 0.6931, 0.6930, 0.6927, 0.6924, 0.6913, 0.6905, 0.6891, 0.6893, 0.6843, 0.6846, 0.6843, 0.6738, 0.6773, 0.6683, 0.6675,
    0.6681, 0.6688, 0.6577, 0.6588, 0.6429, 0.6347, 0.6188, 0.6157, 0.6261, 0.5823, 0.6130, 0.5909, 0.6252, 0.5463, 0.5553, 0.5575,
    0.5566, 0.5240, 0.5630, 0.4930, 0.4823, 0.5393, 0.4421, 0.4581, 0.4822, 0.4641, 0.3778, 0.4886, 0.3101, 0.4880, 0.3152, 0.3288,
    0.3963, 0.3888, 0.3418, 0.5145, 0.3018, 0.3416, 0.4611, 0.7315, 0.3014, 0.4960, 0.1877, 0.1973, 0.2070, 0.3117,
)  # fmt: skip


def curve_difference(losses: Sequence[float]) -> dict[str, float]:
    """How a run's losses differ from the published ones over the steps that both have: means, and mean absolute difference."""
    pairs = list(zip(losses, LOSSES, strict=False))
    return {
        "steps": len(pairs),
        "mean": sum(ours for ours, _ in pairs) / len(pairs),
        "published_mean": sum(theirs for _, theirs in pairs) / len(pairs),
        "mean_absolute": sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs),
    }
