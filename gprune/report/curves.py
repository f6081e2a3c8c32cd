"""Curves of a run, read back from the CSV that every run writes: of all its sittings."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from gprune.corpora.load import corpus_labels
from gprune.report.style import LETTER, canvas, draw_line, plain_ticks, style
from gprune.storage.reading import read_bytes

log = logging.getLogger("gprune")
# By title: the axis with its label, and what is drawn over it, with its label. There is a line for each corpus or row
# that `*` stands for; `<row>` is the run's own.
CURVES = {
    "Loss while sparsity is learned": ("step", "step", "learn/loss", "loss, nats"),
    "Development perplexity while sparsity is learned": (
        "learn/epoch", "epoch", "development/perplexity/*", "perplexity under masks",
    ),
    "Development perplexity against sparsity": (
        "curve/sparsity", "share of the scope removed", "curve/perplexity/*", "perplexity under masks",
    ),
    "Loss of distillation": ("distill/*/tokens", "tokens learned from", "distill/*/loss", "loss, nats"),
    "Development perplexity while distilling": (
        "distill/<row>/tokens", "tokens learned from", "development/perplexity/*", "perplexity",
    ),
}  # fmt: skip


def read_curves(run: Path) -> pd.DataFrame:
    """What a run logged, a row per call; of several sittings one after the other; empty where there is nothing."""
    files = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda f: int(re.sub(r"\D", "", f.parent.name) or 0))
    frames = []
    for file in files:
        try:
            frames.append(pd.read_csv(io.BytesIO(read_bytes(file))))
        except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
            log.warning("%s cannot be read (%s); its curves are left out.", file, " ".join(str(error).split()))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def curve_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """A figure by title for each of `CURVES` that has two points or more."""
    figures, own = {}, own_row(frame)
    for title, (axis, axis_label, pattern, label) in CURVES.items():
        found = matching(frame, pattern.replace("<row>", own))
        axis = axis.replace("<row>", own)
        lines = {key: line_of(frame, axis.replace("*", key), name) for key, name in found.items()}
        if any(len(line) > 1 for line in lines.values()):
            figures[title] = _figure(lines, axis_label, label)
    return figures


def matching(frame: pd.DataFrame, pattern: str) -> dict[str, str]:
    """The columns that a pattern of `CURVES` stands for, by what `*` is in them."""
    form = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
    matches = [match for name in frame if (match := form.fullmatch(name))]
    return {"".join(match.groups()): match[0] for match in matches}


def own_row(frame: pd.DataFrame) -> str:
    """The row of the run's table that the run is about: the first that was distilled; empty where none was."""
    began = {row: frame[name].first_valid_index() for row, name in matching(frame, "distill/*/tokens").items()}
    return min(began, key=began.get, default="")


def line_of(frame: pd.DataFrame, axis: str, name: str) -> pd.DataFrame:
    """(x, y) of a metric, sorted by x, none where it is missing; what a later sitting has computed again counts."""
    points = frame.reindex(columns=[axis, name]).apply(pd.to_numeric, errors="coerce").dropna()
    return points.set_axis(["x", "y"], axis=1).drop_duplicates("x", keep="last").sort_values("x")


@style()
def _figure(lines: dict[str, pd.DataFrame], axis_label: str, label: str) -> Figure:
    labels = corpus_labels(lines)
    figure, axes = canvas(5.4 + LETTER * max(8, *map(len, labels.values())), 3.2)
    for i, (name, points) in enumerate(lines.items()):
        draw_line(axes, i, points["x"], points["y"], labels[name])
    axes.set(xlabel=axis_label, ylabel=label)
    axes.grid(axis="y")
    if len(lines) > 1:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        figure.legend(loc="outside right center")
    return figure
