"""Figures over several runs: ratios, sparsity per block, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gprune.models.masks import Masks
from gprune.report.curves import curve_points, main_row
from gprune.report.style import canvas, draw_line, interval_lengths, plain_ticks, style
from gprune.report.table import Estimate

# Label -> (x axis, metric) of training curves of the main row, whose name replaces `<row>`.
LEARNED = {
    "development perplexity": ("development/tokens", "development/perplexity"),
    "loss while sparsity is learned, nats": ("learn/tokens", "learn/loss"),
    "loss of distillation, nats": ("distill/<row>/tokens", "distill/<row>/loss"),
}


@style()
def ratio_figure(rows: Sequence[tuple[str, Estimate]], *, base: str) -> Figure:
    """Figure of perplexity on unseen text relative to the base metric, with paired intervals; left is better."""
    figure, axes = canvas(4.5 + 0.07 * max(len(label) for label, _ in rows), 1.2 + 0.3 * len(rows))
    draw_ratios(axes, rows, base=base)
    return figure


def draw_ratios(axes: Axes, rows: Sequence[tuple[str, Estimate]], *, base: str) -> None:
    """Draw `ratio_figure` on existing axes."""
    ratios = [ratio for _, ratio in rows]
    axes.errorbar(
        [ratio.value for ratio in ratios], range(len(rows)), xerr=interval_lengths(ratios), ls="none", ms=5,
        capsize=2.5, lw=1.2, color="#0072B2", marker="o",
    )  # fmt: skip
    for y, (_, ratio) in enumerate(rows):
        axes.annotate(
            f"{ratio.value:.2f}", (ratio.value, y), (0, 5), textcoords="offset points", ha="center", fontsize=7
        )
    axes.axvline(1, color="black", lw=0.8)
    axes.set(xscale="log", xlabel=f"unseen perplexity / {base}; 95 % interval")
    plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")


@style()
def sparsity_lines(masks: Mapping[str, Masks]) -> Figure:
    """Figure of the share of neurons removed per block, one line per run."""
    figure, axes = canvas(7, 3.2 + 0.06 * len(masks))
    for i, (name, run_masks) in enumerate(masks.items()):
        removed = [float((~mask).float().mean()) for mask in run_masks.ffn]
        draw_line(axes, i, range(len(removed)), removed, name)
    axes.set(ylim=(-0.02, 1.02), xlabel="block", ylabel="fraction of neurons removed")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@style()
def learning_figure(curves: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Figure of training curves of the main rows: one panel per entry of `LEARNED`, one line per run.

    Lines are moving averages over a twentieth of the points.
    """
    panels: dict[str, dict[str, pd.DataFrame]] = {}  # label -> name of a run -> points
    for label, (x_axis, metric) in LEARNED.items():
        lines = {}
        for run, frame in curves.items():
            row = main_row(frame)
            lines[run] = curve_points(frame, x_axis.replace("<row>", row), metric.replace("<row>", row))
        if any(len(points) > 1 for points in lines.values()):
            panels[label] = lines
    if not panels:
        return None
    figure = Figure(figsize=(3.6 * len(panels) + 0.4, 3.4 + 0.06 * len(curves)))
    for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            if len(points) > 1:
                average = points["y"].rolling(max(1, len(points) // 20), min_periods=1).mean()
                draw_line(axes, i, points["x"], average, name)
        axes.set(xlabel="tokens learned from", ylabel=label)
        axes.grid(axis="y")
    by_label = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=3)
    return figure
