"""Figures of the reports, drawn without a display and with the same bytes for the same numbers.

Each function takes plain rows and returns a matplotlib figure; `save` writes it as a PNG without a date or a
version. The style is figures.mplstyle; the machine's own matplotlib settings are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

Curves = Mapping[str, Sequence[float]]
Row = dict[str, Any]

DPI, WIDTH = 150, 9.0
INK, MUTED, PAPER = "#1f2430", "#8a91a0", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#d9730d", "#1a8754", "#c6373c"
RUN_COLOURS = (BLUE, ORANGE, GREEN, "#8250df", RED, "#0e8a9c", "#9a6700", "#bf3989")
STYLED = matplotlib.rc_context(fname=Path(__file__).with_suffix(".mplstyle"))
POINT: dict[str, Any] = {"ms": 4.5, "mec": PAPER, "lw": 0.9}
PANELS = (
    ("Preference loss", ("preference_loss",)),
    ("Reward margin", ("rewards/margins",)),
    ("Reward accuracy", ("rewards/accuracies",)),
    ("Rewards of both answers", ("rewards/chosen", "rewards/rejected")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
)


@STYLED
def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG; equal figures give equal bytes."""
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


@STYLED
def training_curves(history: Curves, validation: Curves, published: Sequence[float] = ()) -> Figure:
    """Six panels over the optimizer steps; the validation split is drawn as points, the loss of an untrained policy as a line.

    Args:
        history: one value per optimizer step for `step` and each measured name.
        validation: the same for the steps at which the validation split was measured.
        published: the preference loss of each step of the published run, where this one can be compared with it.
    """
    figure = _figure(height=5.2)
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        if published and names == ("preference_loss",):
            axes.plot(range(1, len(published) + 1), published, color=MUTED, linewidth=1.0, label="published run")
        for name, colour in zip(names, (BLUE, ORANGE), strict=False):
            label = name.removeprefix("rewards/") if len(names) > 1 else "train"
            _draw_curve(axes, history, name, colour, label)
            if name in validation:
                measured = {"color": ORANGE, "label": "validation"} if len(names) == 1 else {"color": colour}
                axes.plot(validation["step"], validation[name], "o--", **POINT, **measured)
        if names == ("preference_loss",) and abs(history["preference_loss"][0] - math.log(2)) < 0.01:
            axes.axhline(math.log(2), color=INK, lw=0.8, ls=":", label="ln 2, before training")
        _label_panel(axes, title, percent=names[0] == "rewards/accuracies")
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
    return figure


@STYLED
def overlaid_curves(runs: Sequence[tuple[str, Curves, Curves]]) -> Figure:
    """Loss, margin, accuracy and gradient norm of several runs, each (name, training history, validation history), over one another."""
    figure = _figure(height=5.6)
    grid = figure.subplots(2, 2)
    for axes, (title, names) in zip(grid.flat, (PANELS[0], PANELS[1], PANELS[2], PANELS[5]), strict=True):
        name = names[0]
        for i, (run, history, validation) in enumerate(runs):
            colour = RUN_COLOURS[i % len(RUN_COLOURS)]
            _draw_curve(axes, history, name, colour, run, style=("-", "--", ":")[i // len(RUN_COLOURS) % 3])
            if name in validation:
                axes.plot(validation["step"], validation[name], "o--", color=colour, **POINT)
        _label_panel(axes, title, percent=name == "rewards/accuracies")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)))
    return figure


@STYLED
def gains_by_kind(rows: Sequence[Row]) -> Figure:
    """Left, accuracy before and after as a dumbbell per kind; right, the gain with its paired 95 % interval."""
    figure = _figure(height=1.1 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, row in enumerate(rows):
        colour = GREEN if row["low"] > 0 else RED if row["high"] < 0 else MUTED
        left.plot([row["before"], row["after"]], [y, y], "-", color=colour, lw=2, alpha=0.45, zorder=2)
        left.plot(row["before"], y, "o", color=MUTED, ms=6, zorder=3)
        left.plot(row["after"], y, "o", color=BLUE if row["seen"] else ORANGE, ms=7, zorder=4)
        right.plot([row["low"], row["high"]], [y, y], "-", color=colour, lw=2)
        right.plot(row["points"], y, "o", color=colour, ms=5.5)
    left.set_yticks(
        range(len(rows)), [row["kind"].replace("_", " ") + ("" if row["seen"] else " (unseen)") for row in rows]
    )
    left.set(title="Followed exactly, before and after", xlim=(-0.03, 1.03), ylim=(len(rows) - 0.4, -0.6))
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for marker_colour, label in ((MUTED, "base"), (BLUE, "merged"), (ORANGE, "merged, kind not trained on")):
        left.plot([], [], "o", color=marker_colour, label=label)
    right.axvline(0, color=INK, lw=0.8)
    right.set_title("Gain in points, paired 95% interval")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for axes in (left, right):
        axes.tick_params(length=0)
    return figure


@STYLED
def reward_margins(found: Row, calibrated: bool) -> Figure:
    """Left, held-out reward margins as a histogram; right, how many of them are right over how sure they are, with 95 % intervals.

    The right one is drawn where the loss says how sure a margin is.
    """
    figure = _figure(height=3.4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    starts, ends = found["edges"][:-1], found["edges"][1:]
    for start, end, count in zip(starts, ends, found["counts"], strict=True):
        left.bar(start, count, end - start, align="edge", color=GREEN if start + end > 0 else RED, alpha=0.75, ec=PAPER)
    left.axvline(0, color=INK, lw=0.8)
    left.set(title="Held-out reward margins", xlabel="margin", ylabel="pairs")
    if not calibrated:
        right.remove()
        left.tick_params(length=0)
        return figure
    right.plot([0.5, 1], [0.5, 1], ":", color=INK, lw=0.8, label="calibrated")
    for row in found["calibration"]["bins"]:
        right.plot([row["confidence"]] * 2, [row["low"], row["high"]], "-", color=BLUE, lw=2, alpha=0.5)
        right.plot(row["confidence"], row["right"], "o", color=BLUE, ms=6)
    right.set(title="Right, by confidence", xlabel="confidence", xlim=(0.48, 1.02), ylim=(-0.03, 1.03))
    right.legend()
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.tick_params(length=0)
    return figure


@STYLED
def quantization_tradeoff(files: Sequence[Row], score: str) -> Figure:
    """Over the size of each evaluated file: distance from the merged model, and change of the named score, with their 95 % intervals."""
    figure = _figure(height=3.6)
    left, right = figure.subplots(1, 2)
    shown = [file for file in files if file["mean_kl"] is not None]
    for file in shown:
        size, kl = file["bytes"] / 1e6, file["mean_kl"]
        if file["low"] is not None:
            left.plot([size, size], [file["low"], file["high"]], "-", color=_colour(file), lw=2.5, alpha=0.5)
        left.plot(size, kl, "o", color=_colour(file), ms=7)
        left.annotate(file["name"], (size, kl), xytext=(6, 4), textcoords="offset points", fontsize=8)
    left.set_title("Mean KL from merged, nats per token")
    if shown and min(file["mean_kl"] for file in shown) > 0:
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
    right.axhline(0, color=INK, lw=0.8)
    for file in files:
        if gain := file["against_merged"]:
            size = file["bytes"] / 1e6
            right.plot([size, size], [gain["low"], gain["high"]], "-", color=_colour(file), lw=2.5, alpha=0.5)
            right.plot(size, gain["points"], "o", color=_colour(file), ms=7)
            right.annotate(file["name"], (size, gain["points"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    right.set_title(f"{score}, points from merged")
    for axes in (left, right):
        axes.set_xlabel("MB")
        axes.margins(x=0.18)
        axes.tick_params(length=0, which="both")
    for colour, label in ((BLUE, "GGUF"), (ORANGE, "GPTQ and AWQ")):
        left.plot([], [], "o", color=colour, label=label)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _colour(file: Row) -> str:
    return ORANGE if "group_size" in file else BLUE


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _draw_curve(axes: Axes, curves: Curves, name: str, colour: str, label: str, style: str = "-") -> None:
    if name not in curves:
        return
    steps, values = curves["step"], curves[name]
    window = len(values) // 25
    if window < 2 or name == "learning_rate":  # which is exact
        axes.plot(steps, values, style, color=colour, lw=1.4, label=label)
        return
    axes.plot(steps, values, style, color=colour, lw=0.6, alpha=0.3)
    axes.plot(steps, _moving_mean(values, window), style, color=colour, lw=1.7, label=label)


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value with up to `window` neighbours on either side."""
    spans = (values[max(0, i - window) : i + window + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def _label_panel(axes: Axes, title: str, percent: bool) -> None:
    axes.set(title=title, xlabel="step")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
