"""Tables of runs: perplexity, gap and ratios, distance from dense, cost; formatted by pandas.

Intervals are Student's t of logarithms, because all numbers are ratios or geometric means. They are over the windows of
a run, or over runs that differ only in the seed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import Estimate
from gprune.report.grouping import format_setting, run_flags
from gprune.runs.numbers import (
    DENSE,
    Record,
    ResultRow,
    by_row,
    entries,
    number_frame,
    records_of,
    row_name,
    to_estimate,
    unseen_ratio,
)

if TYPE_CHECKING:
    from gprune.report.grouping import SeedGroup
    from gprune.runs.results import FinishedRun

# Characters that Markdown would interpret. A `*` at the end of a name, `_` inside it and most brackets are plain text.
MARKUP = re.compile(r"^\*|[\\`<|~$]|&(?=#?\w+;)|\*(?=[^\s)])|(?<![^\W_])_|_(?![^\W_])|\[(?=[^\]]*\][(\[])")
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"`": "", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)  # fmt: skip
CONTINUED = re.compile(r" *\\?$", re.MULTILINE)  # pandas marks lines that are continued in the next part
HEADER = re.compile(r"(?:\A|(?<=\n\n)).+")  # of each part in a terminal
INTERVAL = re.compile(r" (\[[^\[\]<]*\])</td>")  # in HTML
Cell = str | int | float | Estimate | None
MANY_CORPORA = 8  # with more, the table of perplexities has a line per corpus
OVER_DENSE = "unseen / dense"


@dataclass(frozen=True)
class Table:
    """A table that is formatted for readers (Markdown, terminal) and for programs (CSV).

    Attributes:
        name: name of files.
        title: title of the section.
        columns: headers; the first column is text.
        rows: cells; None is an empty cell.
        digits: column -> decimal places in Markdown, by default 2. CSV has all digits.
        note: a paragraph of plain text below the table.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    digits: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def formatted(self) -> pd.DataFrame:
        """Return the cells as text of one line, in a frame that all writers for readers use."""
        texts = [
            [self._format_cell(cell, column) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]
        return pd.DataFrame(texts, columns=list(self.columns), dtype=object)

    def values(self) -> pd.DataFrame:
        """Return the numbers with all digits, and columns `_low` and `_high` after columns with intervals."""
        columns: dict[str, list[str | int | float | None]] = {}
        for place, name in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            estimates = [cell if isinstance(cell, Estimate) else Estimate(cell) for cell in cells]
            columns[name or "row"] = [estimate.value for estimate in estimates]
            if any(isinstance(cell, Estimate) for cell in cells):
                columns[f"{name}_low"] = [estimate.low for estimate in estimates]
                columns[f"{name}_high"] = [estimate.high for estimate in estimates]
        return pd.DataFrame(columns, dtype=object)

    def to_csv(self) -> str:
        """Format `values` as CSV."""
        return self.values().to_csv(index=False, lineterminator="\n")

    def to_markdown(self) -> str:
        """Format the table, without the note, as aligned Markdown."""
        texts = self.formatted().map(in_markdown).rename(columns=in_markdown)
        alignment = ["left"] + ["right"] * (len(texts.columns) - 1)
        return texts.to_markdown(index=False, disable_numparse=True, colalign=alignment)

    def to_text(self) -> str:
        """Format the table and its note as Markdown."""
        return f"{self.to_markdown()}\n\n{in_markdown(self.note)}".strip()

    def for_stdout(self) -> str:
        """Format for the terminal's width; without a terminal, as Markdown with the note as plain text."""
        if sys.stdout.isatty():
            return self.to_terminal(shutil.get_terminal_size().columns)
        return f"{self.to_markdown()}\n\n{self.note}".strip()

    def to_terminal(self, width: int) -> str:
        """Format the table and its note as plain text for a terminal with `width` characters per line.

        A table that is too wide is split into several parts. Each begins with the columns that identify a row, which
        are the index of the frame. Headers are bold if stdout is a terminal and `$NO_COLOR` is not set.
        """
        texts = self.formatted()
        num_keys = next((n for n in range(1, len(texts.columns)) if not texts.iloc[:, :n].duplicated().any()), 1)
        lines = [texts.columns.to_list(), *texts.to_numpy().tolist()]
        key_widths = [max(len(line[column]) for line in lines) for column in range(num_keys)]
        header, *keys = ["  ".join(map(str.ljust, line, key_widths)) for line in lines]
        others = texts.iloc[:, num_keys:].set_axis(keys, axis="index").rename_axis(columns=header)
        text = CONTINUED.sub("", others.to_string(line_width=width))
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            text = HEADER.sub("\x1b[1m\\g<0>\x1b[0m", text)
        return f"{text}\n\n{textwrap.fill(self.note, width)}".strip("\n")

    def to_html(self) -> str:
        """Format the table, without the note, as an HTML table with a row header and with intervals in `<small>`."""
        texts = self.formatted()
        name = texts.columns[0]
        frame = texts.set_index(name).rename_axis(index=None, columns=name or "row")
        return INTERVAL.sub(r" <small>\1</small></td>", frame.to_html(border=0))

    def to_latex(self, label: str) -> str:
        """Format the table and its note as a LaTeX table environment, which needs the package booktabs."""
        caption = " ".join(filter(None, [f"{self.title}.", self.note])).translate(LATEX)
        alignment = "l" + "r" * (len(self.columns) - 1)
        return self.formatted().to_latex(
            index=False, escape=True, caption=caption, label=label, column_format=alignment
        )

    def _format_cell(self, cell: Cell, column: str) -> str:
        """Format a cell: numbers with the digits of the column, and intervals in brackets."""
        digits = self.digits.get(column, 2)
        if cell is None:
            return ""
        if isinstance(cell, Estimate):
            return format_estimate(cell, digits)
        return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def format_estimate(estimate: Estimate, digits: int = 2) -> str:
    """Format a number and, if there is one, its interval in brackets: 1.23 [1.20, 1.26]."""
    text = f"{estimate.value:.{digits}f}"
    return text if estimate.low is None else f"{text} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def in_markdown(text: str) -> str:
    """Escape text for Markdown."""
    return MARKUP.sub(r"\\\g<0>", text)


def caption(records: Sequence[Record]) -> str:
    """Return the caption of figures: model, budget and protocol, a line each; no budget for models made elsewhere."""
    names = ("model", "scope", "importance", "dtype", "seq_len", "split")
    pruned = [r for r in records if r["stage"] != "dense"]
    values = {name: ", ".join(dict.fromkeys(str(r[name]) for r in pruned)) for name in names}
    protocol = f"{values['split']} text, windows of {values['seq_len']} tokens, {values['dtype']}"
    if all(r["stage"] == "measured" for r in pruned):
        return f"beside {values['model']}\n{protocol}"
    sparsities = sorted({r["sparsity"] for r in pruned})
    lowest_and_highest = dict.fromkeys((sparsities[0], sparsities[-1]))
    removed = " to ".join(f"{100 * sparsity:.3g}" for sparsity in lowest_and_highest)
    costs = ", ".join(dict.fromkeys(f"the {r['cost']} of " if "cost" in r else "" for r in pruned))
    return f"{values['model']}\n{removed} % of {costs}{values['scope']} removed by {values['importance']}\n{protocol}"


def result_table(records: Sequence[Record], labels: Mapping[str, str] | None = None) -> Table:
    """Result table of a run.

    It has columns of corpora (seen ones have a star), geometric means, gap and ratio. If the distance from the dense
    model was measured, there are also columns of KL and agreement.
    """
    is_seen = {r["corpus"]: r["seen"] for r in records}
    corpora = sorted(is_seen, key=lambda c: not is_seen[c])
    labels = labels or corpus_labels(corpora)
    columns = {("perplexity", c): labels[c] + ("*" if is_seen[c] else "") for c in corpora}
    columns |= {("seen", ""): "seen", ("unseen", ""): "unseen", ("gap", ""): "gap"}
    columns[("unseen_over_dense", "")] = OVER_DENSE
    note = "* seen: the corpus, in other documents, was used by the run. Perplexity, lower is better."
    numbers = number_frame(records)
    if "unseen_kl" in set(numbers["number"]):
        columns |= {("unseen_kl", ""): "KL", ("unseen_agreement", ""): "agreement"}
        note += " KL(dense || row) in nats per token, and how often both have the same most likely token: unseen text."
    without_interval = numbers["number"] != "unseen_over_dense"
    numbers.loc[without_interval, ["low", "high"]] = math.nan
    cells = cell_frame(numbers, ["row"], list(columns))
    rows = [[row, *cells.loc[row]] for row in numbers["row"].unique()]
    digits = dict.fromkeys(("gap", OVER_DENSE, "KL", "agreement"), 3)
    return Table("result", "Perplexity by corpus", ["", *columns.values()], rows, digits, note)


def cell_frame(numbers: pd.DataFrame, index: list[str], columns: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return lines of `number_frame` as a frame of Estimates, by `index` and (number, corpus); None if undefined."""
    estimates = [to_estimate(line.value, line.low, line.high) for line in numbers.itertuples()]
    cells = numbers.assign(cell=estimates).pivot(index=index, columns=["number", "corpus"], values="cell")
    cells = cells.reindex(columns=list(columns)).astype(object)
    return cells.where(cells.notna(), None)


def cost_table(steps: Mapping[str, Mapping[str, float]]) -> Table:
    """Table of seconds, tokens and memory by step."""
    counts = {  # entry of a step -> column
        "forward_tokens": "tokens forward",
        "forward_backward_tokens": "and backward",
        "peak_memory_mib": "peak MiB",
    }
    if any("peak_gpu_memory_mib" in step for step in steps.values()):
        counts["peak_gpu_memory_mib"] = "of the GPU"
    rows = [
        [name, float(step.get("seconds", 0)), *(int(step.get(entry, 0)) for entry in counts)]
        for name, step in steps.items()
    ]
    note = "peak MiB: the highest during the step, or since the process began on systems other than Linux."
    return Table("cost", "Cost by step", ["step", "seconds", *counts.values()], rows, {"seconds": 1}, note)


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Return the geometric mean over seeds with exp(mean(log) +- t(0.975, n - 1) sd(log) / sqrt(n)) as its interval."""
    mean, half_width = _mean_and_half_width(np.log(values))
    return Estimate(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


def arithmetic_mean_over_seeds(values: Sequence[float], largest: float = math.inf) -> Estimate:
    """Return the arithmetic mean over seeds with a 95 % interval by Student's t, cut off at 0 and `largest`."""
    mean, half_width = _mean_and_half_width(np.array(values))
    return Estimate(mean, max(0.0, mean - half_width), min(largest, mean + half_width))


def _mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of n values, and half of its 95 % interval: t(0.975, n - 1) sd / sqrt(n)."""
    half_width = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half_width)


MEANS = {  # how numbers of several seeds are combined; all others by `mean_over_seeds`
    "kl": arithmetic_mean_over_seeds,
    "unseen_kl": arithmetic_mean_over_seeds,
    "agreement": partial(arithmetic_mean_over_seeds, largest=1.0),
    "unseen_agreement": partial(arithmetic_mean_over_seeds, largest=1.0),
}


def pool_estimates(
    estimates: Sequence[Estimate | None], mean: Callable[[Sequence[float]], Estimate] = mean_over_seeds
) -> Estimate | None:
    """Combine the estimates of seeds by `mean`; None if one is None.

    A single estimate, and estimates that do not depend on the seed, keep their interval over windows.
    """
    if not estimates or None in estimates:
        return None
    values = [estimate.value for estimate in estimates]
    return estimates[0] if len(set(values)) == 1 else mean(values)


def result_rows(run: FinishedRun) -> list[ResultRow]:
    """Return (stage, recovery) of the rows of a run's result table, with `dense` first."""
    return list(by_row(run.records))


def ratio_to(
    run: FinishedRun, row: ResultRow, other: FinishedRun, reference: ResultRow, number: str = "nll"
) -> Estimate | None:
    """Compute `unseen_ratio` of rows of two runs; None for a row and itself."""
    if run.path.resolve() == other.path.resolve() and row == reference:
        return None
    return unseen_ratio(run.records, row, other.records, reference, number)


def group_frame(groups: Sequence[SeedGroup]) -> pd.DataFrame:
    """Return `number_frame` of all groups, pooled over seeds, with the place of the group in a column `group`.

    The dense model does not depend on the seed, so its numbers are those of the first run.
    """
    lines = []
    for place, group in enumerate(groups):
        frames = [number_frame(run.records) for run in group.runs]
        numbers = pd.concat([frames[0], *(frame[frame["stage"] != "dense"] for frame in frames[1:])])
        for (row, corpus, number), same_number in numbers.groupby(["row", "corpus", "number"], sort=False):
            seeds = 1 if row == "dense" else len(group.runs)
            if len(same_number) == seeds:  # otherwise undefined for a seed
                values = [to_estimate(line.value, line.low, line.high) for line in same_number.itertuples()]
                estimate = pool_estimates(values, MEANS.get(number, mean_over_seeds))
                lines.append((place, row, corpus, number, *estimate))
    columns = ["group", "row", "corpus", "number", "value", "low", "high"]
    return pd.DataFrame(lines, columns=columns).astype({"low": float, "high": float})


def summary_table(groups: Sequence[SeedGroup], numbers: pd.DataFrame, *, seen: Sequence[str] | None = None) -> Table:
    """Table with a line per group and stage: means over seen and unseen corpora, gap, and ratio to dense.

    `seen` are the corpora that count as seen in every row; by default those of each run.
    """
    wanted = [(name, "") for name in ("seen", "unseen", "gap", "unseen_over_dense")]
    note = (
        "Perplexity, lower is better. In brackets 95 % intervals: Student's t over windows (paired, for ratios) of "
        "a single run; over seeds, which have the same windows, where there are several. gap: (unseen pruned "
        f"/ dense) / (seen pruned / dense). {_seen_note(seen)}"
    )
    return Table(
        "summary",
        "Geometric means, gap and ratio",
        ["run", "stage", "seeds", "seen", "unseen", "gap", OVER_DENSE],
        _lines_of_groups(groups, numbers, wanted),
        {"gap": 3, OVER_DENSE: 3},
        note,
    )


def distance_table(groups: Sequence[SeedGroup], numbers: pd.DataFrame) -> Table:
    """Table with a line per group and pruned row: KL from the dense model and agreement with it on unseen text."""
    rows = _lines_of_groups(groups, numbers, [("unseen_kl", ""), ("unseen_agreement", "")])
    rows = [row for row in rows if row[-1]]  # without those that have no distance
    columns, digits = ["run", "stage", "seeds", "KL", "agreement"], {"KL": 3, "agreement": 3}
    note = (
        "Over unseen text: KL(dense || row) in nats per token, and how often both have the same most likely token. "
        "In brackets 95 % intervals: Student's t over windows; where there are several seeds, over seeds, with their "
        "arithmetic mean."
    )
    return Table("distance", "Distance from dense", columns, rows, digits, note)


def comparison_table(groups: Sequence[SeedGroup]) -> Table:
    """Table of perplexity ratios for every pair of groups, between their final models.

    The text is unseen by both. Runs are paired by seed; without a common seed the first runs are a pair. Groups that
    were evaluated on different windows have no row.
    """
    rows: list[list[Cell]] = []
    for group, other_group in combinations(groups, 2):
        by_seed = {run.seed: run for run in other_group.runs}
        pairs = [(run, by_seed[run.seed]) for run in group.runs if run.seed in by_seed]
        if not pairs:
            pairs = [(group.runs[0], other_group.runs[0])]
        ratios = [ratio_to(run, result_rows(run)[-1], other, result_rows(other)[-1]) for run, other in pairs]
        ratio = pool_estimates(ratios)
        if ratio is not None:
            names = [f"{g.name}: {row_name(*result_rows(g.runs[0])[-1])}" for g in (group, other_group)]
            rows.append([*names, len(ratios), ratio])
    columns, title = ["unseen perplexity of", "over that of", "seeds", "ratio"], "Pruned models, pair by pair"
    note = "Over text unseen by both. In brackets 95 % intervals: Student's t, paired over the windows of a single "
    note += "pair; over several seeds where there are some."
    return Table("comparison", title, columns, rows, {"ratio": 3}, note)


def perplexity_table(groups: Sequence[SeedGroup], numbers: pd.DataFrame, *, seen: Sequence[str] | None = None) -> Table:
    """Table with a line per group and row, and a column per corpus; seen corpora have a star.

    With more than `MANY_CORPORA` corpora it has a row per corpus. Intervals are over seeds; a single run has none.
    Arguments are as for `summary_table`.
    """
    records = [r for group in groups for run in group.runs for r in run.records]
    is_seen = {r["corpus"]: r["seen"] for r in records}
    mixed = {r["corpus"] for r in records if r["seen"] != is_seen[r["corpus"]]}  # seen by some of the runs
    corpora = sorted(is_seen, key=lambda c: (c not in mixed and not is_seen[c], c in mixed))
    labels = corpus_labels(corpora)
    stars = ["(*)" if c in mixed else "*" if is_seen[c] else "" for c in corpora]
    headers = [labels[c] + star for c, star in zip(corpora, stars, strict=True)]
    note = "* seen: the corpus, in other documents, was used by the run; (*) by some of the runs."
    if seen is not None:
        note = f"* seen. {_seen_note(seen)}"
    single = [place for place, group in enumerate(groups) if len(group.runs) == 1]
    numbers = numbers.copy()
    numbers.loc[(numbers["row"] == "dense") | numbers["group"].isin(single), ["low", "high"]] = math.nan
    columns = ["run", "stage", "seeds", *headers]
    rows = _lines_of_groups(groups, numbers, [("perplexity", c) for c in corpora])
    if len(corpora) > MANY_CORPORA:
        columns, rows = _with_a_line_per_corpus(headers, rows)
    return Table("perplexity", "Perplexity by corpus", columns, rows, note=note)


def _with_a_line_per_corpus(corpora: list[str], lines: Sequence[list[Cell]]) -> tuple[list[str], list[list[Cell]]]:
    """Transpose lines of run, row, seeds and a cell per corpus. Returns columns and lines.

    A column is named after its run, and after its row too if the run has several. A single dense model is `dense`.
    """
    of_run, of_row = Counter(line[0] for line in lines), Counter(line[1] for line in lines)
    names = []
    for run, row, *_ in lines:
        if row == "dense" and of_row[row] == 1:
            names.append("dense")
        else:
            names.append(f"{run}: {row}" if of_run[run] > 1 else str(run))
    cells = zip(*(line[3:] for line in lines), strict=True)
    return ["corpus", *names], [[corpus, *of_corpus] for corpus, of_corpus in zip(corpora, cells, strict=True)]


def corpora_table(groups: Sequence[SeedGroup]) -> Table:
    """Table with a line per group: how its final model does on many corpora, in perplexity divided by dense.

    Ratios of a corpus are geometric means over seeds. Groups whose tokenizer differs from the dense model's are left
    out.
    """
    by_group = {
        place: pd.concat([over_dense(run) for run in group.runs]).groupby(level=0).mean()
        for place, group in enumerate(groups)
        if not any(run.has_another_tokenizer for run in group.runs)
    }
    rows: list[list[Cell]] = []
    for place, logarithms in by_group.items():
        group = groups[place]
        first = group.runs[0]
        final = result_rows(first)[-1]
        others = [by_group[other] for other in by_group if groups[other].runs[0].model == first.model]
        is_seen = pd.Series({r["corpus"]: r["seen"] for r in first.records})
        seen, unseen = logarithms[is_seen], logarithms[~is_seen]
        if unseen.empty:
            continue
        ahead = (unseen <= pd.concat(others, axis=1).loc[unseen.index].min(axis=1)).sum()
        ratio = pool_estimates([ratio_to(run, final, run, DENSE) for run in group.runs])
        seen_ratio = None if seen.empty else math.exp(seen.mean())
        worst = corpus_labels(unseen.index)[unseen.idxmax()]
        of_worst = math.exp(unseen.max())
        name = [group.name, row_name(*final), len(group.runs)]
        rows.append([*name, seen_ratio, ratio, worst, of_worst, f"{ahead} of {len(unseen)}"])
    columns = ["run", "stage", "seeds", "seen / dense", "unseen / dense", "worst corpus", "worst / dense", "ahead on"]
    digits = dict.fromkeys(("seen / dense", "unseen / dense", "worst / dense"), 3)
    note = (
        "seen / dense, unseen / dense: perplexity over that of the dense model, geometric mean over corpora (in "
        "brackets 95 % intervals over windows or, if there are several, over seeds). worst corpus: the unseen corpus "
        "with the highest ratio. ahead on: unseen corpora on which no other line of the same dense model has a lower "
        "perplexity."
    )
    return Table("corpora", "Many corpora", columns, rows, digits, note)


def over_dense(run: FinishedRun) -> pd.Series:
    """Return log (perplexity of a run's final model / perplexity of its dense model) by corpus."""
    perplexities = by_row(run.records)
    return np.log(pd.Series(perplexities[result_rows(run)[-1]]) / pd.Series(perplexities[DENSE]))


def _seen_note(seen: Sequence[str] | None) -> str:
    """Return a sentence on the corpora that count as seen: `seen`, or by default those of each run."""
    if seen is None:
        return "Seen and unseen are each run's own."
    if not seen:
        return "All text is unseen in every row."
    verb = "counts" if len(seen) == 1 else "count"
    return f"In every row {', '.join(corpus_labels(seen).values())} {verb} as seen, and all other text as unseen."


def _lines_of_groups(
    groups: Sequence[SeedGroup], numbers: pd.DataFrame, wanted: Sequence[tuple[str, str]]
) -> list[list[Cell]]:
    """Return lines of name, row, seeds and the wanted (number, corpus) of `group_frame` for every row of every group.

    Equal rows of several groups are merged. A merged dense row is named after the dense model, and another merged row
    after its groups.
    """
    all_cells = cell_frame(numbers, ["group", "row"], wanted)
    lines: dict[tuple[Any, ...], list[Cell]] = {}  # equal rows have the same key
    groups_of_row: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for place, group in enumerate(groups):
        for row in result_rows(group.runs[0]):
            is_dense = row[0] == "dense"
            runs = group.runs[:1] if is_dense else group.runs
            cells = list(all_cells.loc[place, row_name(*row)])
            key = _row_key(group, runs, row, cells)
            name = group.name
            if is_dense:
                name = runs[0].records[0]["model"]
                if any(other_key[0] == row for other_key in lines):  # another dense model has a row
                    name = f"{name} (of {group.name})"
            lines.setdefault(key, [name, row_name(*row), None if is_dense else len(runs), *cells])
            groups_of_row[key].append(group.name)
    for key, line in lines.items():
        if line[1] != "dense" and len(groups_of_row[key]) > 1:
            line[0] = "all runs" if len(groups_of_row[key]) == len(groups) else "; ".join(groups_of_row[key])
    return list(lines.values())


def _row_key(
    group: SeedGroup, runs: Sequence[FinishedRun], row: ResultRow, cells: Sequence[Estimate | None]
) -> tuple[Any, ...]:
    """Return a key that is equal for rows of several groups that are merged into one.

    Dense rows are merged if their results are equal, and models before recovery if results and cells are.
    """
    results = []
    for run in runs:  # rounded to five digits, because sums differ by machine
        records = records_of(run.records, row).values()
        results.append((run.model, *((r["corpus"], r["seen"], f"{r['perplexity']:.5g}") for r in records)))
    if row[0] == "dense":
        return (row, *results)
    rounded_cells = tuple(cell and f"{cell.value:.5g}" for cell in cells)
    is_final = row == result_rows(runs[0])[-1]
    if is_final:  # never merged with a row of another group
        return (group.name, row, *rounded_cells)
    return (row, *results, *rounded_cells)


def entry_tables(summaries: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return a table per entry that has one, with the rows of all runs, from name of a run -> summary.

    With several runs the first column is their name. A column that a run does not have is empty for it.
    """
    by_entry: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for run, summary in summaries.items():
        for name, entry in entries(summary).items():
            if "table" in entry:
                by_entry[name][run] = entry["table"]
    tables = []
    for name, contents in by_entry.items():
        first = next(iter(contents.values()))
        columns = list(dict.fromkeys(chain(*(content["columns"] for content in contents.values()))))
        rows: list[list[Cell]] = []
        for run, content in contents.items():
            for cells in content["rows"]:
                by_column = dict(zip(content["columns"], cells, strict=True))
                ordered = [by_column.get(column) for column in columns]
                rows.append([run, *(Estimate(*cell) if isinstance(cell, list) else cell for cell in ordered)])
        table = Table(name, first["title"], ["run", *columns], rows, first["digits"], first["note"])
        if len(summaries) == 1:
            table = replace(table, columns=columns, rows=[row[1:] for row in rows])
        tables.append(table)
    return tables


def settings_table(groups: Sequence[SeedGroup]) -> Table:
    """Table with a row per flag in which groups differ, and a column per group."""
    settings = [run_flags(group.runs[0]) | {"run.seed": [run.seed for run in group.runs]} for group in groups]
    first = settings[0]
    different = [
        flag
        for flag in dict.fromkeys(chain(*settings))
        if any(other.get(flag) != first.get(flag) for other in settings)
    ]
    rows = [[flag, *(format_setting(values.get(flag)) for values in settings)] for flag in different]
    return Table("settings", "Settings that differ", ["flag", *(group.name for group in groups)], rows)
