"""Plots of a report: curves of training, recall by depth, and similarities of positives and negatives."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from discovla.report.data import JSON, RunData
from discovla.retrieval.ranks import Array
from discovla.retrieval.record import EvaluationRecord

# colour of the light page -> CSS variable that replaces it in an SVG
COLOURS = {
    "#2f6bd8": "--c1",
    "#d4622a": "--c2",
    "#1f9068": "--c3",
    "#8a57c4": "--c4",
    "#b8891a": "--c5",
    "#c23b63": "--c6",
    "#5c6470": "--muted",
    "#dfe3e8": "--line",
}
SERIES = tuple(COLOURS)[:6]
INK, LINE = "#5c6470", "#dfe3e8"
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "discovla",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}
POINTS = 300  # of a curve; longer ones show means of neighbours
SHOWN_SEPARATELY = ("lr", "grad_norm", "clips_per_second", "gpu_memory_gib", "seconds", "bad_clips")
NO_LOSS = ("kind", "step", "skipped_steps", *SHOWN_SEPARATELY)


@dataclass(frozen=True)
class Plot:
    """A figure with its title and one sentence of description."""

    title: str
    figure: Figure
    description: str

    @property
    def svg(self) -> str:
        """Return the figure as an SVG element whose colours are variables of the page."""
        file = io.StringIO()
        with rc_context(RC):
            self.figure.savefig(
                file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        text = file.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
        for colour, variable in COLOURS.items():
            text = text.replace(colour, f"var({variable})")
        return text

    @property
    def pixels(self) -> np.ndarray:
        """Return the figure on white, y x 3 uint8."""
        canvas = FigureCanvasAgg(self.figure)
        with rc_context(RC):
            self.figure.set_facecolor("white")
            self.figure.set_dpi(200)
            canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curves(runs: Sequence[RunData]) -> list[Plot]:
    """Return the curves of one run, or of several with one colour for each."""
    plots = []
    if any(run.train for run in runs):
        plots.append(_losses(runs))
        plots += [
            _values(
                runs, "lr", "Learning rate", "Learning rate of every step, of parameters without a factor."
            ),
            _values(runs, "grad_norm", "Gradient norm", "Norm of the gradient before clipping.", smooth=True),
        ]
    if any(run.validations for run in runs):
        plots += [_validation(runs, metric) for metric in (("R@1", "R@5") if len(runs) == 1 else ("R@1",))]
    if any(run.train for run in runs):
        about = "Clips per second of each step, over all processes, without evaluation and saving."
        plots.append(_values(runs, "clips_per_second", "Speed", about, smooth=True))
    return plots


def similarities(record: EvaluationRecord) -> Plot:
    """Return the histogram of similarities of captions with their own and with other videos."""
    figure, axes = _axes()
    both = np.concatenate([record.positive, record.negative])
    bins = np.linspace(both.min(), max(both.max(), both.min() + 1e-6), 41)
    for values, label, colour in (
        (record.negative, "other video", SERIES[1]),
        (record.positive, "own video", SERIES[0]),
    ):
        if len(values):
            heights = np.histogram(values, bins)[0] / len(values) * 100
            axes.stairs(heights, bins, color=colour, fill=True, alpha=0.25)
            axes.stairs(heights, bins, color=colour, label=label, linewidth=1.3)
    axes.set_xlabel("similarity")
    axes.set_ylabel("% of pairs")
    _legend(axes)
    about = (
        f"{len(record.positive):,} captions with their own video, {len(record.negative):,} sampled others."
    )
    return Plot("Similarities", figure, about)


def recall_by_depth(named: dict[str, Array]) -> Plot:
    """Return the share of captions whose video is among the first k, for every k, of some named ranks."""
    figure, axes = _axes()
    deepest = max(int(ranks.max()) for ranks in named.values())
    for (name, ranks), colour in zip(named.items(), SERIES, strict=False):
        depth = np.unique(np.geomspace(1, max(deepest, 2), 120).round().astype(int))
        shares = np.searchsorted(np.sort(ranks), depth, side="right") / len(ranks) * 100
        axes.plot(depth, shares, color=colour, label=name, drawstyle="steps-post")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axes.set_xlabel("k")
    axes.set_ylabel("R@k, %")
    axes.set_ylim(0, 102)
    _legend(axes, "lower right")
    return Plot(
        "Recall at every depth", figure, "Text to video: share of captions whose video is among the first k."
    )


def appearances(record: EvaluationRecord) -> Plot:
    """Return the histogram of how many captions list a clip among their best."""
    figure, axes = _axes()
    counts = np.bincount(record.top.ravel(), minlength=int(record.groups.max()) + 1)
    bins = np.arange(counts.max() + 2) - 0.5
    if len(bins) > 60:
        bins = np.linspace(-0.5, counts.max() + 0.5, 41)
    axes.stairs(np.histogram(counts, bins)[0], bins, color=SERIES[2], fill=True, alpha=0.3)
    axes.stairs(np.histogram(counts, bins)[0], bins, color=SERIES[2], linewidth=1.3)
    axes.axvline(counts.mean(), color=INK, linestyle=":", linewidth=1.2, label="mean")
    axes.set_xlabel(f"captions that list the clip among their first {record.top.shape[1]}")
    axes.set_ylabel("clips")
    _legend(axes, "upper right")
    return Plot("Hubs", figure, "Clips far to the right of the mean come up for many captions.")


def reliability(bins: Sequence[JSON]) -> Plot:
    """Return the share of right hits of an index over the probability that they were given."""
    figure, axes = _axes()
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1.2, label="ideal")
    shares = [(one["probability"], one["right"]) for one in bins]
    most = max(one["queries"] for one in bins)
    axes.plot(*zip(*shares, strict=True), color=SERIES[0], label="best hits")
    sizes = [12 + 60 * one["queries"] / most for one in bins]
    axes.scatter(*zip(*shares, strict=True), s=sizes, color=SERIES[0], zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("probability")
    axes.set_ylabel("share that is right")
    _legend(axes)
    queries = sum(one["queries"] for one in bins)
    about = (
        f"Best hits of {queries:,} queries, half of them without an answer in the index; larger points have "
        "more queries."
    )
    return Plot("Reliability of probabilities", figure, about)


def _losses(runs: Sequence[RunData]) -> Plot:
    figure, axes = _axes()
    if len(runs) == 1:
        names = ["loss", *loss_terms(runs[0].train)]
        lines = [(name, runs[0].train, name) for name in names]
    else:
        lines = [(run.name, run.train, "loss") for run in runs]
    for (label, records, key), colour in zip(lines, _cycle(len(lines)), strict=True):
        _line(axes, *_series(records, key), label=label, colour=colour, smooth=True)
    axes.set_xlabel("step")
    _legend(axes)
    about = "Total and its terms without their weights" if len(runs) == 1 else "Total of every run"
    return Plot("Losses", figure, f"{about}; pale: every step, strong: smoothed.")


def _values(runs: Sequence[RunData], key: str, title: str, about: str, *, smooth: bool = False) -> Plot:
    figure, axes = _axes()
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        label = run.name if len(runs) > 1 else None
        _line(axes, *_series(run.train, key), label=label, colour=colour, smooth=smooth)
    axes.set_xlabel("step")
    if key == "lr":
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:.1e}".replace("e-0", "e-") if x else "0")
        )
    axes.set_ylim(bottom=0)
    _legend(axes)
    return Plot(title, figure, about)


def _validation(runs: Sequence[RunData], metric: str) -> Plot:
    figure, axes = _axes()
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        for direction, style in (("t2v", "-"), ("v2t", "--")):
            steps = [record["step"] for record in run.validations]
            values = [record[direction][metric] for record in run.validations]
            label = {"t2v": "text to video", "v2t": "video to text"}[direction]
            if len(runs) > 1:
                label = run.name if direction == "t2v" else None
            elif direction == "v2t":
                colour, style = SERIES[1], "-"
            axes.plot(steps, values, style, color=colour, marker="o", markersize=3.5, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{metric}, %")
    _legend(axes)
    about = f"{metric} on the validation split; step 0 is before training."
    if len(runs) > 1:
        about += " Solid: text to video, dashed: video to text."
    return Plot(f"Validation {metric}", figure, about)


def loss_terms(records: Sequence[JSON]) -> list[str]:
    """Return the names of the loss terms in training records."""
    names = dict.fromkeys(name for record in (*records[:1], *records[-1:]) for name in record)
    return [name for name in names if name not in (*NO_LOSS, "loss")]


def _axes() -> tuple[Figure, Axes]:
    with rc_context(RC):
        figure = Figure(figsize=(4.2, 2.5))
        figure.subplots_adjust(left=0.135, right=0.98, top=0.97, bottom=0.165)
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
    return figure, axes


def _cycle(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _legend(axes: Axes, place: Literal["best", "upper right", "lower right"] = "best") -> None:
    if axes.get_legend_handles_labels()[0]:
        with rc_context(RC):
            axes.legend(loc=place, fontsize=8, handlelength=1.4, labelspacing=0.3)


def _series(records: Sequence[JSON], key: str) -> tuple[Array, Array]:
    """Return steps and values, averaged over neighbours if there are many."""
    pairs = [(record["step"], record[key]) for record in records if key in record]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    steps, values = np.array(pairs, float).T
    if len(steps) <= POINTS:
        return steps, values
    ends = np.linspace(0, len(steps), POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(ends, len(steps)))
    return np.add.reduceat(steps, ends) / counts, np.add.reduceat(values, ends) / counts


def _line(axes: Axes, steps: Array, values: Array, *, label: str | None, colour: str, smooth: bool) -> None:
    if not smooth or len(steps) < 20:
        axes.plot(steps, values, color=colour, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    width = max(3, len(steps) // 25) | 1
    kernel = np.hanning(width + 2)[1:-1]
    finite = np.where(np.isfinite(values), values, 0.0)
    total = np.convolve(finite, kernel, "same")
    axes.plot(steps, total / np.convolve(np.ones_like(finite), kernel, "same"), color=colour, label=label)
