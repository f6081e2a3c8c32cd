"""Training curves of a run, read from the CSV files of all its sessions."""

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
# Title -> (x axis, its label, metric, its label). There is a line for each corpus or row that matches `*`; the main row
# replaces `<row>`.
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
    """Read the logged metrics of a run, one row per call. Sessions are concatenated; empty if there are no files."""
    files = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda f: int(re.sub(r"\D", "", f.parent.name) or 0))
    frames = []
    for file in files:
        try:
            frames.append(pd.read_csv(io.BytesIO(read_bytes(file))))
        except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
            log.warning("Cannot read %s: %s. Its curves are left out.", file, " ".join(str(error).split()))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def curve_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Make a figure for each entry of `CURVES` with at least two points, by title."""
    figures, own = {}, own_row(frame)
    for title, (axis, axis_label, pattern, label) in CURVES.items():
        found = matching(frame, pattern.replace("<row>", own))
        axis = axis.replace("<row>", own)
        lines = {key: line_of(frame, axis.replace("*", key), name) for key, name in found.items()}
        if any(len(line) > 1 for line in lines.values()):
            figures[title] = _figure(lines, axis_label, label)
    return figures


def matching(frame: pd.DataFrame, pattern: str) -> dict[str, str]:
    """Return the columns that match a pattern of `CURVES`, by the text that matches `*`."""
    form = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
    matches = [match for name in frame if (match := form.fullmatch(name))]
    return {"".join(match.groups()): match[0] for match in matches}


def own_row(frame: pd.DataFrame) -> str:
    """Return the main row of the run, which is distilled first; empty if no row was distilled."""
    began = {row: frame[name].first_valid_index() for row, name in matching(frame, "distill/*/tokens").items()}
    return min(began, key=began.get, default="")


def line_of(frame: pd.DataFrame, axis: str, name: str) -> pd.DataFrame:
    """Return (x, y) of a metric, sorted by x, without missing values. Points of later sessions replace earlier ones."""
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
