"""A figure for a talk from the committed records: perplexity on unseen text against the share of removed neurons of two
models, against the number of distillation tokens of the first model, and the effect of each part of the method.

`python -m experiments.summary FOLDER` writes it as summary.png and .svg, the curve of tokens as distill-tokens, and
metrics relative to their base as sparsity-curve. Rows without a record are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gprune.console import Parser, quiet, run_guarded
from gprune.report.figures import (
    FORMATS,
    LINES,
    add_title,
    canvas,
    interval_lengths,
    plain_ticks,
    save,
    style,
)
from gprune.report.page import pair_ratios
from gprune.report.tables import Estimate
from gprune.runs.numbers import by_stage, final, pool_estimates, unseen_ratio
from gprune.runs.results import FinishedRun
from gprune.studies.archive import finished_record, row_to_run
from gprune.studies.listing import Listing

HERE = Path(__file__).resolve().parent / "lists"
# Rows of the headline in the order in which parts are added.
PARTS = {
    "paper": "the paper: modules, thresholds",
    "paper, centred": "the same, centred gradient",
    "averaged": "scores averaged over corpora",
    "averaged, least squares": "and least squares",
    "gates": "and gates by KL, 49k tokens",
    "best": "or distillation, 98k tokens",
}
# (method, recovery, tokens of distillation): label in the figure
LINES_BY_BUDGET = {
    ("base", "none", None): "base metric",
    ("gprune", "none", None): "the paper",
    ("averaged", "none", None): "averaged scores",
    ("averaged", "least_squares", None): "averaged, least squares",
    ("gprune", "least_squares", None): "and gates, 49k tokens",
    ("averaged", "least_squares+distill", 49152): "or distillation, 49k",
    ("averaged", "least_squares+distill", 98304): "or distillation, 98k",
}
SMOLLM2 = {
    "sparsity.yaml": [
        f"wanda_sp {share}{row}" for share in (0.2, 0.3, 0.4, 0.5, 0.6) for row in ("", ", base", ", averaged")
    ],
    "distill_budgets.yaml": None,
    "distill.yaml": ["averaged, least squares", "averaged, 49k", "averaged, 98k", "gates"],
}
GEMMA = {
    "gemma_budgets.yaml": [
        f"{share} %, {row}"
        for share in (20, 30)
        for row in ("base", "averaged", "paper", "averaged, least squares", "averaged, 49k at 3e-5", "gates")
    ],
    "gemma.yaml": ["base", "averaged", "averaged, least squares", "averaged, 49k at 3e-5", "paper", "gates"],
}
BY_TOKENS = {  # rows of distill.yaml
    "base": ["base, least squares", "base, 49k", "base, 98k", "base, 196k", "base, 393k"],
    "averaged": ["averaged, least squares", "averaged, 49k", "averaged, 98k", "averaged, 196k", "averaged, 393k"],
    "gates": ["gates", "gates, then 49k", "gates, then 147k", "gates, then 344k"],
    "paper": ["paper, least squares", "paper, then 49k", "paper, then 344k"],
}
AXES = {"over": "thousands of tokens learned from, forward and backward", "ticks": "{x:.0f}", "reference": "dense"}
Lines = dict[tuple[str, str], list[tuple[float, Estimate]]]


@cache
def runs_of(name: str) -> list[FinishedRun]:
    """Runs of the rows of a list that have a record. `name` is the path of the list below `experiments`."""
    listing = Listing.read(HERE / name)
    return [
        row_to_run(row, kept, listing.content.seen)
        for row in listing.rows
        if (kept := finished_record(row)) is not None
    ]


def by_budget(lists: Mapping[str, Collection[str] | None]) -> Lines:
    """Perplexity relative to dense against the share of removed neurons, with a line per method.

    Args:
        lists: names of rows by list; None for all rows that prune only the FFN.
    """
    lines: Lines = {}
    runs = [run for name, rows in lists.items() for run in runs_of(name) if rows is None or run.name in rows]
    for run in runs:
        of = run.settings["sparsity"]
        label, ratio = _label(run), times_dense(run)
        if of["scope"] == "ffn" and label is not None and ratio is not None:
            lines.setdefault((label, ""), []).append((of["target"], ratio))
    order = [(label, "") for label in LINES_BY_BUDGET.values() if (label, "") in lines]
    return {name: sorted(lines[name], key=lambda point: point[0]) for name in order}


def times_dense(run: FinishedRun) -> Estimate | None:
    """Unseen perplexity of the final model of a run relative to dense."""
    return unseen_ratio(final(run.records), by_stage(run.records)["dense"])


def _label(run: FinishedRun) -> str | None:
    """Label of a run's final model; None if it is not drawn."""
    recovery, scored = run.settings["recovery"], run.settings["corpora"]["score"]
    method = "gprune" if run.settings["gprune"] else "base" if isinstance(scored, str) else "averaged"
    learned = run.settings["distill"]["tokens"] if recovery.endswith("distill") else None
    return LINES_BY_BUDGET.get((method, recovery, learned))


def by_tokens() -> Lines:
    """Perplexity of the result of each row relative to dense, against the number of training tokens."""
    runs = {run.name: run for run in runs_of("distill.yaml")}
    lines: Lines = {}
    for line, rows in BY_TOKENS.items():
        for run in (runs[name] for name in rows if name in runs):
            if (ratio := times_dense(run)) is not None:
                lines.setdefault((line, ""), []).append((run.summary["learned_tokens"] / 1000, ratio))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def over_base() -> Lines:
    """Perplexity relative to base against the share removed: thresholds and averaged scores by metric."""
    lines: Lines = {}
    runs = {run.name: run for run in runs_of("sparsity.yaml")}
    for name, run in runs.items():
        row, _, control = name.partition(", ")
        if control != "base" and (ratios := pair_ratios(list(runs.values()), name, f"{row}, base")):
            point = run.settings["sparsity"]["target"], ratios[0]
            lines.setdefault((run.settings["importance"], control or "gprune"), []).append(point)
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def parts() -> list[tuple[str, Estimate]]:
    """Perplexity of the headline's rows relative to the unrecovered base, pooled over seeds."""
    runs = runs_of("headline.yaml")
    by_part = [(label, pair_ratios(runs, row, "base")) for row, label in PARTS.items()]
    dense = [unseen_ratio(by_stage(run.records)["dense"], final(run.records)) for run in runs if run.name == "base"]
    by_part.append(("the dense model", dense))
    return [("the base metric", Estimate(1.0))] + [(label, pool_estimates(of)) for label, of in by_part if of]


@style()
def curve_figure(lines: Lines, **labels: str) -> Figure:
    """Make a figure of `draw_curves` with a legend."""
    figure, axes = canvas(6, 3.8)
    draw_curves(axes, lines, **labels)
    figure.legend(loc="outside right center")
    return figure


def draw_curves(
    axes: Axes, lines: Lines, *, over: str, ticks: str, reference: str, subjects: Sequence[str] | None = None
) -> None:
    """Draw unseen perplexity relative to a reference against a number, with paired intervals. Lower is better.

    Args:
        lines: (subject, stage): points (number, ratio). Each subject has a colour and a marker. The stage `gprune` and
            the empty stage have filled markers and solid lines, other stages hollow markers and dashed lines.
        over: name of the number.
        ticks: format of its values.
        reference: name of the reference.
        subjects: all subjects of a figure, so that its panels draw a subject alike. Default: those of `lines`.
    """
    subjects = subjects or list(dict.fromkeys(subject for subject, _ in lines))
    for (subject, stage), points in lines.items():
        colour, _, marker = LINES[subjects.index(subject) % len(LINES)]
        full = stage in ("gprune", "")
        values, ratios = zip(*points, strict=True)
        axes.errorbar(
            values, [ratio.value for ratio in ratios], yerr=interval_lengths(ratios), color=colour, marker=marker,
            mfc=colour if full else "white", ms=5, ls="-" if full else "--", lw=1.3, capsize=2.5,
            label=f"{subject}, {stage}" if stage else subject,
        )  # fmt: skip
    axes.axhline(1, color="black", lw=0.8)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xlabel(over)
    axes.set_xticks(sorted({value for points in lines.values() for value, _ in points}))
    axes.xaxis.set_major_formatter(ticks)
    axes.set_ylabel(f"unseen perplexity / {reference}")
    axes.grid(axis="y")


def draw_ratios(axes: Axes, rows: Sequence[tuple[str, Estimate]], *, base: str) -> None:
    """Draw ratios of unseen perplexities with their intervals, one line per row; left is better."""
    ratios = [ratio for _, ratio in rows]
    axes.errorbar(
        [ratio.value for ratio in ratios], range(len(rows)), xerr=interval_lengths(ratios), ls="none", ms=5,
        capsize=2.5, lw=1.2, color="#0072B2", marker="o",
    )  # fmt: skip
    axes.axvline(1, color="black", lw=0.8)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # hides the line at 1 behind a number
    for y, (_, ratio) in enumerate(rows):
        axes.annotate(
            f"{ratio.value:.2f}", (ratio.value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8,
            bbox=behind,
        )  # fmt: skip
    axes.set(xscale="log", xlabel=f"unseen perplexity / {base}; 95 % interval")
    plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")


@style()
def drawn() -> Figure:
    """Draw the figure: two rows of two panels."""
    figure = Figure(figsize=(11, 8))
    (removed, second), (tokens, added) = figure.subplots(2, 2)
    for axes, lists in ((removed, SMOLLM2), (second, GEMMA)):
        draw_curves(axes, by_budget(lists), over="neurons of the FFN removed", ticks="{x:.0%}", reference="dense")
    second.sharex(removed)
    second.sharey(removed)
    draw_curves(tokens, by_tokens(), **AXES)
    draw_ratios(added, parts(), base="unrecovered base")
    for axes, title in (
        (removed, "What is removed: SmolLM2-135M"),
        (second, "What is removed: Gemma-3-270M"),
        (tokens, "What is learned from (SmolLM2-135M, half of the FFN)"),
        (added, "What each part adds (the same, three seeds)"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
    for axes, place in ((removed, "upper left"), (second, "upper left"), (tokens, "upper right")):
        axes.legend(loc=place)
    return add_title(
        figure,
        "Standard protocol: stackexchange, gsm8k, stories, python_docs, never read; 95 % intervals; one seed unless "
        "it says three\nGemma, and base, averaged and the paper by budget, in bfloat16; the rest in float32",
    )


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.summary", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for the figures")
    folder = parser.parse_args(arguments).folder
    quiet()
    removed = {"over": "parameters of the scope removed", "ticks": "{x:.0%}", "reference": "unrecovered base"}
    figures = {
        "summary": drawn(),
        "distill-tokens": curve_figure(by_tokens(), **AXES),
        "sparsity-curve": curve_figure(over_base(), **removed),
    }
    files = [path for name, figure in figures.items() for path in save(figure, folder, name, FORMATS)]
    return f"Drawn: {', '.join(map(str, files))}.\n"


def main() -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.summary", work)


if __name__ == "__main__":
    sys.exit(main())
