"""Curves of a run, read back from the CSV that every run writes: of all its sittings."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from gprune.report.records import corpus_labels
from gprune.report.style import LETTER, LINES, canvas, plain_ticks, style
from gprune.storage.reading import read_bytes

log = logging.getLogger("gprune")
# By title: the axis with its label, and what is drawn over it (`*`: a line for each corpus) with its label.
CURVES = {
    "Loss while sparsity is learned": ("step", "step", "learn/loss", "loss, nats"),
    "Development perplexity while sparsity is learned": (
        "learn/epoch", "epoch", "learn/perplexity/*", "perplexity under masks",
    ),
    "Development perplexity against sparsity": (
        "curve/sparsity", "share of the scope removed", "curve/perplexity/*", "perplexity under masks",
    ),
    "Loss of distillation": ("step", "step", "distill/loss", "loss, nats"),
    "Development perplexity while distilling": (
        "distill/tokens", "tokens learned from", "distill/perplexity/*", "perplexity",
    ),
}  # fmt: skip


def read_curves(run: Path) -> pd.DataFrame:
    """What a run logged, a row per call; of several sittings one after the other; empty where there is nothing."""
    files = sorted(
        run.glob("csv/version_*/metrics.csv"), key=lambda file: int(re.sub(r"\D", "", file.parent.name) or 0)
    )
    frames = []
    for file in files:
        try:
            frame = pd.read_csv(io.BytesIO(read_bytes(file)))
            if "fit" in frame:  # it is said when a fit begins
                frame["fit"] = pd.to_numeric(frame["fit"], errors="coerce").ffill()
            frames.append(frame)
        except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
            log.warning("%s cannot be read (%s); its curves are left out.", file, " ".join(str(error).split()))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def curve_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """A figure by title for each of `CURVES` that has two points or more."""
    figures = {}
    for title, (axis, axis_label, pattern, label) in CURVES.items():
        prefix = pattern.removesuffix("*")
        columns = [name for name in frame if name == pattern or (pattern != prefix and name.startswith(prefix))]
        lines = {name.removeprefix(prefix): own_line(frame, axis, name) for name in columns if axis in frame}
        if any(len(line) > 1 for line in lines.values()):
            figures[title] = _figure(lines, axis_label, label)
    return figures


def own_line(frame: pd.DataFrame, axis: str, name: str) -> pd.DataFrame:
    """(x, y) of a metric, sorted by x; of several models that learn in turn, the run's own.

    That is the first fit that logs the metric, in all sittings at it: what a later sitting has computed again counts.
    """
    points = frame[[axis, name]].apply(pd.to_numeric, errors="coerce").dropna().set_axis(["x", "y"], axis=1)
    if "fit" in frame:
        fits = frame["fit"][points.index]
        points = points[fits == fits.min()]
    return points.drop_duplicates("x", keep="last").sort_values("x")


@style()
def _figure(lines: dict[str, pd.DataFrame], axis_label: str, label: str) -> Figure:
    labels = corpus_labels(lines)
    figure, axes = canvas(5.4 + LETTER * max(8, *map(len, labels.values())), 3.2)
    for i, (name, points) in enumerate(lines.items()):
        colour, dashes, marker = LINES[i % len(LINES)]
        few = marker if len(points) < 12 else None
        axes.plot(
            points["x"], points["y"], color=colour, ls=dashes, marker=few, ms=4, lw=1.3, label=labels[name] or None
        )
    axes.set_xlabel(axis_label)
    axes.set_ylabel(label)
    axes.grid(axis="y")
    if len(lines) > 1:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        figure.legend(loc="outside right center")
    return figure
