"""Training curves of a run, read from the CSV files of all its sessions."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from gprune.corpora.load import corpus_labels
from gprune.report.style import LETTER_WIDTH, canvas, draw_line, plain_ticks, style
from gprune.storage.files import read_json

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
TRIAL = re.compile(r"_trial_(\d+)$")  # end of the name of a row that is a trial of the search for a quality target


def read_curves(run: Path) -> pd.DataFrame:
    """Read the logged metrics of a run, with a row for each time that metrics were logged.

    Sessions are concatenated in their order. The DataFrame is empty if there are no files. In a run with a quality
    target, metrics of the trial that is the main row have the names of the main row.
    """
    files = sorted(run.glob("csv/version_*/metrics.csv"), key=_session_number)
    frames = []
    for file in files:
        try:
            frames.append(pd.read_csv(file))
        except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
            log.warning("Cannot read %s: %s. Its curves are left out.", file, " ".join(str(error).split()))
    if not frames:  # such as a record of a list, which is no folder
        return pd.DataFrame()
    frame = pd.concat(frames, ignore_index=True)
    trials = read_json(run / "quality.json") or {}
    kept = (trials.get("reached") or {}).get("trial")
    return frame if kept is None else _with_main_row(frame, kept)


def _with_main_row(frame: pd.DataFrame, kept: int) -> pd.DataFrame:
    """Rename the metrics of a trial to those of the main row, and merge them with columns that exist already."""
    columns: dict[str, pd.Series] = {}
    for column, values in frame.items():
        name = _name_in_main_row(column, kept)
        columns[name] = values.combine_first(columns[name]) if name in columns else values
    return pd.DataFrame(columns)


def _name_in_main_row(column: str, kept: int) -> str:
    """Return the name of a metric of the trial `kept` if its row is the main row; names of other metrics are kept.

    `distill/gprune_trial_2/loss` becomes `distill/gprune/loss`, and `controls/gprune_trial_2/perplexity` becomes
    `development/perplexity`.
    """
    prefix, _, rest = column.partition("/")
    row, _, metric = rest.partition("/")
    trial = TRIAL.search(row)
    if trial is None or int(trial[1]) != kept:
        return column
    return f"development/{metric}" if prefix == "controls" else f"{prefix}/{TRIAL.sub('', row)}/{metric}"


def _session_number(file: Path) -> int:
    """Return N for `csv/version_N/metrics.csv`; 0 without a number."""
    return int(re.sub(r"\D", "", file.parent.name) or 0)


def curve_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Make a figure for each entry of `CURVES` with at least two points, by title."""
    figures = {}
    row = main_row(frame)
    for title, (axis, axis_label, pattern, label) in CURVES.items():
        axis, pattern = axis.replace("<row>", row), pattern.replace("<row>", row)
        columns = matching_columns(frame, pattern)
        lines = {name: curve_points(frame, axis.replace("*", name), column) for name, column in columns.items()}
        if any(len(points) > 1 for points in lines.values()):
            figures[title] = _figure(lines, axis_label, label)
    return figures


def matching_columns(frame: pd.DataFrame, pattern: str) -> dict[str, str]:
    """Return text that matches `*` -> column, for the columns that match a pattern of `CURVES`."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
    matches = [match for column in frame if (match := expression.fullmatch(column))]
    return {"".join(match.groups()): match[0] for match in matches}


def main_row(frame: pd.DataFrame) -> str:
    """Return the name of the run's main row, which is distilled first; empty if no row was distilled.

    Trials of the search for a quality target are left out. The trial that is the main row has its name.
    """
    columns = matching_columns(frame, "distill/*/tokens")
    rows = {row: column for row, column in columns.items() if not TRIAL.search(row)}
    first_index = {row: frame[column].first_valid_index() for row, column in rows.items()}
    return min(first_index, key=first_index.get, default="")


def curve_points(frame: pd.DataFrame, axis: str, name: str) -> pd.DataFrame:
    """Return a DataFrame with columns x and y of a metric, sorted by x, without missing values.

    Points of later sessions replace earlier ones.
    """
    points = frame.reindex(columns=[axis, name]).apply(pd.to_numeric, errors="coerce").dropna()
    return points.set_axis(["x", "y"], axis=1).drop_duplicates("x", keep="last").sort_values("x")


@style()
def _figure(lines: dict[str, pd.DataFrame], axis_label: str, label: str) -> Figure:
    """Draw the lines of a metric. With several lines the y axis is logarithmic."""
    labels = corpus_labels(lines)
    figure, axes = canvas(5.4 + LETTER_WIDTH * max(8, *map(len, labels.values())), 3.2)
    for i, (name, points) in enumerate(lines.items()):
        draw_line(axes, i, points["x"], points["y"], labels[name])
    axes.set(xlabel=axis_label, ylabel=label)
    axes.grid(axis="y")
    if len(lines) > 1:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        figure.legend(loc="outside right center")
    return figure
