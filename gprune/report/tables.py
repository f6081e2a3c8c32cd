"""Tables of runs: filtered and pivoted from the frame (`runs.numbers.run_frame`), and written by pandas.

Intervals are Student's t of logarithms, because all numbers are ratios or geometric means. They are over the windows of
a run, or over runs that differ only in the seed.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pandas as pd

from gprune.evaluation.intervals import Estimate
from gprune.runs.numbers import Record, entries, final_lines, pool_seeds

# Characters that Markdown would interpret. A `*` at the end of a name, `_` inside it and most brackets are plain text.
MARKUP = re.compile(r"^\*|[\\`<|~$]|&(?=#?\w+;)|\*(?=[^\s)])|(?<![^\W_])_|_(?![^\W_])|\[(?=[^\]]*\][(\[])")
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"`": "", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)  # fmt: skip
Cell = str | int | float | Estimate | None
MANY_CORPORA = 8  # with more, the table of perplexities has a line per corpus
# Numbers over corpora -> their names in tables.
MEANS = {
    "seen": "seen", "unseen": "unseen", "seen_over_dense": "seen / dense", "unseen_over_dense": "unseen / dense",
    "gap": "gap", "unseen_kl": "KL", "unseen_agreement": "agreement",
}  # fmt: skip
DIGITS = dict.fromkeys(("seen / dense", "unseen / dense", "gap", "KL", "agreement"), 3)
INTERVALS = "In brackets 95 % intervals over windows (of ratios paired), or over the seeds of a row that has several"
ABOUT_MEANS = (
    "Perplexity, lower is better; seen and unseen are geometric means over corpora. gap: (unseen / dense) / (seen / "
    "dense). KL(dense || model) in nats per token and how often both have the same most likely token: on unseen text."
)
STARS = "* seen: the run used the corpus, in other documents."


@dataclass(frozen=True)
class Table:
    """A table that pandas writes for a terminal, and as Markdown, HTML and LaTeX.

    Attributes:
        name: name in the key `tables` of lists.
        title: title of the section.
        columns: headers; the first column is text.
        rows: cells; None is an empty cell.
        digits: column -> decimal places, by default 2.
        note: a paragraph of plain text below the table.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    digits: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def formatted(self) -> pd.DataFrame:
        """Return the cells as text."""
        texts = [
            [format_cell(cell, self.digits.get(column, 2)) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]
        return pd.DataFrame(texts, columns=list(self.columns), dtype=object)

    def to_markdown(self) -> str:
        """Format the table, without the note, as aligned Markdown."""
        texts = self.formatted().map(in_markdown).rename(columns=in_markdown)
        alignment = ["left"] + ["right"] * (len(texts.columns) - 1)
        return texts.to_markdown(index=False, disable_numparse=True, colalign=alignment)

    def to_text(self) -> str:
        """Format the table and its note as Markdown."""
        return f"{self.to_markdown()}\n\n{in_markdown(self.note)}".strip()

    def for_stdout(self) -> str:
        """Format the table and its note for the terminal's width; without a terminal, as Markdown."""
        if not sys.stdout.isatty():
            return f"{self.to_markdown()}\n\n{self.note}".strip()
        width = shutil.get_terminal_size().columns
        texts = self.formatted().set_index(self.columns[0]).rename_axis(index=None, columns=self.columns[0])
        return f"{texts.to_string(line_width=width)}\n\n{textwrap.fill(self.note, width)}".strip("\n")

    def to_html(self) -> str:
        """Format the table, without the note, as an HTML table with a row header."""
        texts = self.formatted().set_index(self.columns[0])
        return texts.rename_axis(index=None, columns=self.columns[0] or "row").to_html(border=0)

    def to_latex(self, label: str) -> str:
        """Format the table and its note as a LaTeX table environment, which needs the package booktabs."""
        caption = " ".join(filter(None, [f"{self.title}.", self.note])).translate(LATEX)
        alignment = "l" + "r" * (len(self.columns) - 1)
        return self.formatted().to_latex(
            index=False, escape=True, caption=caption, label=label, column_format=alignment
        )


def format_cell(cell: Cell, digits: int = 2) -> str:
    """Format a cell: text, an integer, or a number with its interval in brackets if it has one: 1.23 [1.20, 1.26]."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    if not isinstance(cell, Estimate):
        return str(cell)
    text = f"{cell.value:.{digits}f}"
    has_interval = cell.low is not None and not math.isnan(cell.low)
    return f"{text} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]" if has_interval else text


def in_markdown(text: str) -> str:
    """Escape text for Markdown, except indented lines, which are code."""
    return "\n".join(line if line.startswith("    ") else MARKUP.sub(r"\\\g<0>", line) for line in text.split("\n"))


def cells(frame: pd.DataFrame, index: str | list[str], columns: str | list[str]) -> pd.DataFrame:
    """Pivot lines of the frame to Estimates, in the order of the lines. Undefined cells are None."""
    estimates = [Estimate(*line) for line in frame[["value", "low", "high"]].to_numpy()]
    wide = frame.assign(cell=estimates).pivot(index=index, columns=columns, values="cell").astype(object)
    order = [pd.Index(frame[axis].drop_duplicates()) if isinstance(axis, str) else None for axis in (index, columns)]
    wide = wide.reindex(index=order[0], columns=order[1])
    return wide.where(wide.notna(), None)


def table_of(name: str, title: str, wide: pd.DataFrame, first: str, **about: Any) -> Table:
    """Return a table of a frame whose index becomes the first column, under the name `first`."""
    rows = [[label, *line] for label, line in zip(wide.index, wide.to_numpy().tolist(), strict=True)]
    return Table(name, title, [first, *wide.columns], rows, **about)


def with_stars(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the perplexities of corpora, seen ones first and with a star, or (*) if only some rows have seen them."""
    by_corpus = frame[frame["number"] == "perplexity"]
    seen = by_corpus.groupby("corpus")["seen"].transform("mean")
    stars = seen.map(lambda share: "*" if share == 1 else "(*)" if share > 0 else "")
    by_corpus = by_corpus.assign(corpus=by_corpus["corpus"] + stars)
    return by_corpus.loc[seen.sort_values(ascending=False, kind="stable").index]


def result_table(frame: pd.DataFrame) -> Table:
    """Table of one run: perplexity on each corpus, seen ones with a star, and numbers over corpora, by stage."""
    over = frame[frame["number"].isin(MEANS)]
    lines = pd.concat([with_stars(frame).assign(low=math.nan), over.assign(corpus=over["number"].map(MEANS))])
    wide = cells(lines, "corpus", "stage")
    wide = wide.loc[sorted(wide.index, key=lambda name: [*MEANS.values()].index(name) if name in DIGITS else -1)]
    texts = [[format_cell(cell, DIGITS.get(line, 2)) for cell in wide.loc[line]] for line in wide.index]
    note = f"{STARS} {ABOUT_MEANS} {INTERVALS.partition(',')[0]}."
    return table_of("result", "Perplexity", pd.DataFrame(texts, wide.index, wide.columns), "", note=note)


def lines_of_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the lines that tables of several rows show: dense models, and the final model of each row.

    Seeds of a row are pooled, and `row` names their number. Equal dense models become one row. A new column `dense`
    names the dense model of each row.
    """
    seeds = frame.groupby("row", sort=False)["seed"].nunique()
    lines = pd.concat([frame[frame["row"].map(seeds) == 1], pool_seeds(frame)], ignore_index=True)
    dense: dict[tuple[Any, ...], str] = {}  # perplexities of a dense model -> the first row that has it
    first_of = {}
    of_text = lines[(lines["stage"] == "dense") & (lines["number"] == "perplexity")].groupby("row", sort=False)
    for row, of_row in of_text:  # rounded to five digits, because sums differ by machine
        key = tuple((line.corpus, line.seen, f"{line.value:.5g}") for line in of_row.itertuples())
        first_of[row] = dense.setdefault(key, row)
    names = {row: "dense" if len(dense) == 1 else f"dense of {row}" for row in dense.values()}
    lines["dense"] = lines["row"].map(first_of).map(names)
    is_dense = lines["stage"] == "dense"
    of_dense = lines[is_dense & lines["row"].isin(names)]
    order = {row: place for place, row in enumerate(seeds.index)}
    final = final_lines(lines[~is_dense]).sort_values("row", key=lambda rows: rows.map(order), kind="stable")
    with_seeds = {row: f"{row} ({number} seeds)" if number > 1 else row for row, number in seeds.items()}
    with_names = [of_dense.assign(row=of_dense["dense"]), final.assign(row=final["row"].map(with_seeds))]
    return pd.concat(with_names, ignore_index=True)


def summary_table(lines: pd.DataFrame, note: str = "") -> Table:
    """Table of rows (`lines_of_rows`) with means over seen and unseen corpora, ratios to dense, KL and agreement."""
    over = lines[lines["number"].isin(MEANS)].assign(number=lines["number"].map(MEANS))
    wide = cells(over, "row", "number")
    wide = wide[[name for name in MEANS.values() if name in wide.columns]]
    return table_of(
        "summary", "Means over corpora", wide, "row", digits=DIGITS, note=f"{ABOUT_MEANS} {INTERVALS}. {note}".strip()
    )


def perplexity_table(lines: pd.DataFrame, note: str = "") -> Table:
    """Table of rows (`lines_of_rows`) with perplexity by corpus; with more than `MANY_CORPORA` a line per corpus.

    Intervals are over seeds; a single run has none.
    """
    by_corpus = with_stars(lines)
    by_corpus.loc[(by_corpus["seed"] != "mean") | (by_corpus["stage"] == "dense"), "low"] = math.nan
    wide = cells(by_corpus, "row", "corpus").reindex(lines["row"].unique())
    first = "row"
    if len(wide.columns) > MANY_CORPORA:
        wide, first = wide.T, "corpus"
    return table_of("perplexity", "Perplexity by corpus", wide, first, note=f"* seen. {note}".strip())


def corpora_table(lines: pd.DataFrame) -> Table:
    """Table of rows (`lines_of_rows`): ratios to dense over many corpora, the worst one, and where a row is ahead.

    Rows whose tokenizer differs from the dense model's have no ratio, and are left out.
    """
    ratios = lines[(lines["number"] == "times_dense") & ~lines["seen"].fillna(True)]
    best = ratios.groupby(["dense", "corpus"])["value"].transform("min")
    ratios = ratios.assign(ahead=ratios["value"] <= best)
    worst = ratios.loc[ratios.groupby("row", sort=False)["value"].idxmax()].set_index("row")
    means = cells(lines[lines["number"].isin(("seen_over_dense", "unseen_over_dense"))], "row", "number")
    rows = []
    for row, of_row in ratios.groupby("row", sort=False):
        mean = means.loc[row]
        rows.append([
            row, mean.get("seen_over_dense"), mean.get("unseen_over_dense"), worst.loc[row, "corpus"],
            float(worst.loc[row, "value"]), f"{of_row['ahead'].sum()} of {len(of_row)}",
        ])  # fmt: skip
    columns = ["row", "seen / dense", "unseen / dense", "worst corpus", "worst / dense", "ahead on"]
    note = f"Perplexity over that of dense, geometric mean over corpora. {INTERVALS}. worst corpus: the unseen corpus "
    note += "with the highest ratio. ahead on: unseen corpora on which no other row of the same dense model is better."
    return Table("corpora", "Many corpora", columns, rows, DIGITS | {"worst / dense": 3}, note)


def cost_table(frame: pd.DataFrame) -> Table:
    """Table of seconds, tokens and memory by step; with several rows or seeds by row, seed and step."""
    costs = frame[frame["number"].str.startswith("steps/")].copy()
    costs[["step", "cost"]] = costs["number"].str.extract(r"^steps/(.+)/([^/]+)$")
    if len(costs[["row", "seed"]].drop_duplicates()) > 1:
        costs["step"] = costs["row"] + ", seed " + costs["seed"].astype(str) + ": " + costs["step"]
    wide = costs.pivot(index="step", columns="cost", values="value").reindex(costs["step"].unique())
    names = {
        "seconds": "seconds", "forward_tokens": "tokens forward", "forward_backward_tokens": "and backward",
        "peak_memory_mib": "peak MiB", "peak_gpu_memory_mib": "of the GPU",
    }  # fmt: skip
    wide = wide[[name for name in names if name in wide]].fillna(0).rename(columns=names)
    note = "peak MiB: the highest during the step, or since the process began on systems other than Linux."
    digits = dict.fromkeys(names.values(), 0) | {"seconds": 1}
    return table_of("cost", "Cost by step", wide, "step", digits=digits, note=note)


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
            for line in content["rows"]:
                by_column = dict(zip(content["columns"], line, strict=True))
                ordered = [by_column.get(column) for column in columns]
                names = [run] if len(summaries) > 1 else []
                rows.append([*names, *(Estimate(*cell) if isinstance(cell, list) else cell for cell in ordered)])
        columns = ["run", *columns] if len(summaries) > 1 else columns
        tables.append(Table(name, first["title"], columns, rows, first["digits"], first["note"]))
    return tables


def caption(records: Sequence[Record]) -> str:
    """Return the caption of figures: model, budget and protocol, a line each; no budget for models made elsewhere."""
    names = ("model", "scope", "importance", "dtype", "seq_len", "split")
    pruned = [r for r in records if r["stage"] != "dense"]
    values = {name: ", ".join(dict.fromkeys(str(r[name]) for r in pruned)) for name in names}
    protocol = f"{values['split']} text, windows of {values['seq_len']} tokens, {values['dtype']}"
    if all(r["stage"] == "measured" for r in pruned):
        return f"beside {values['model']}\n{protocol}"
    sparsities = sorted({r["sparsity"] for r in pruned})
    removed = " to ".join(f"{100 * sparsity:.3g}" for sparsity in dict.fromkeys((sparsities[0], sparsities[-1])))
    costs = ", ".join(dict.fromkeys(f"the {r['cost']} of " if "cost" in r else "" for r in pruned))
    return f"{values['model']}\n{removed} % of {costs}{values['scope']} removed by {values['importance']}\n{protocol}"
