"""Tables of a run: results from the records of `metrics.json`, quality targets, and the cost of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gprune.corpora.load import corpus_labels
from gprune.evaluation.estimate import Estimate
from gprune.report.table import Cell, Table
from gprune.runs.numbers import Record, number_frame, row_name, to_estimate

if TYPE_CHECKING:
    import pandas

# Names of the two ratios to the base metric. They differ only for rows with recovery.
SAME_RECOVERY = "unseen / base, same recovery"
UNRECOVERED = "unseen / unrecovered base"
KEPT_OF_BASE = "kept / base, same recovery"
RATIO = "unseen_over_base_same_recovery"


def caption(records: Sequence[Record]) -> str:
    """Return the caption of figures: model, budget and protocol in three lines."""
    names = ("model", "scope", "importance", "dtype", "seq_len", "split")
    pruned = [r for r in records if r["stage"] != "dense"]
    values = {name: ", ".join(dict.fromkeys(str(r[name]) for r in pruned)) for name in names}
    protocol = f"{values['split']} text, windows of {values['seq_len']} tokens, {values['dtype']}"
    if all(r["stage"] == "model" for r in pruned):
        return f"beside {values['model']}\n{protocol}"
    sparsities = sorted({r["sparsity"] for r in pruned})
    lowest_and_highest = dict.fromkeys((sparsities[0], sparsities[-1]))
    removed = " to ".join(f"{100 * sparsity:.3g}" for sparsity in lowest_and_highest)
    costs = ", ".join(dict.fromkeys(f"the {r['cost']} of " if "cost" in r else "" for r in pruned))
    return f"{values['model']}\n{removed} % of {costs}{values['scope']} removed by {values['importance']}\n{protocol}"


def result_table(records: Sequence[Record], labels: Mapping[str, str] | None = None) -> Table:
    """Result table of a run.

    It has a row per stage, and columns of corpora (seen ones have a star), geometric means, gap and ratio. If the
    distance from the dense model was measured, there are also columns of KL and agreement.
    """
    is_seen = {r["corpus"]: r["seen"] for r in records}
    corpora = sorted(is_seen, key=lambda c: not is_seen[c])
    labels = labels or corpus_labels(corpora)
    columns = {("perplexity", c): labels[c] + ("*" if is_seen[c] else "") for c in corpora}
    columns |= {("seen", ""): "seen", ("unseen", ""): "unseen", ("gap", ""): "gap", (RATIO, ""): SAME_RECOVERY}
    note = "* seen: the corpus, in other documents, was used by the run. Perplexity, lower is better."
    numbers = number_frame(records)
    if "unseen_kl" in set(numbers["number"]):
        columns |= {("unseen_kl", ""): "KL", ("unseen_agreement", ""): "agreement"}
        note += " KL(dense || row) in nats per token, and how often both have the same most likely token: unseen text."
    without_interval = numbers["number"] != RATIO
    numbers.loc[without_interval, ["low", "high"]] = math.nan
    cells = cell_frame(numbers, ["row"], list(columns))
    rows = [[row, *cells.loc[row]] for row in numbers["row"].unique()]
    digits = dict.fromkeys(("gap", SAME_RECOVERY, "KL", "agreement"), 3)
    return Table("result", "Perplexity by corpus", ["", *columns.values()], rows, digits, note)


def cell_frame(numbers: pandas.DataFrame, index: list[str], columns: Sequence[tuple[str, str]]) -> pandas.DataFrame:
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
    note = "peak MiB: the process's highest so far, so that a step may show that of one before it."
    return Table("cost", "Cost by step", ["step", "seconds", *counts.values()], rows, {"seconds": 1}, note)


def quality_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Table of quality targets: requested, predicted and measured quality, and parameters that each row keeps."""
    rows: list[list[Cell]] = []
    for run, summary in summaries.items():
        quality = summary.get("quality")
        for cells in _quality_rows(quality) if quality else ():
            rows.append([run, *cells] if len(summaries) > 1 else cells)
    columns = ["row", "asked, %", "parameters kept", "removed, %", KEPT_OF_BASE, "predicted, %", "development, %",
               "unseen, %", "models tried"]  # fmt: skip
    note = (
        "Each row at the largest share that was found whose development perplexity, above dense, is at most what was "
        "asked. Runs of earlier versions also searched for controls and for the row without training. Their last row "
        "is the run's own, and a row without numbers keeps this quality by no cut. In other tables all rows have the "
        "share of the run's own row. In brackets 95 % intervals: Student's t over windows, paired."
    )
    columns = ["run", *columns] if len(summaries) > 1 else columns
    return Table("quality", "Parameters at the same quality", columns, rows, {"asked, %": 1, KEPT_OF_BASE: 3}, note)


def _quality_rows(quality: Mapping[str, Any]) -> list[list[Cell]]:
    """Return the cells of `quality_table` for each row of a run."""
    rows = []
    parameters_of_row = {r["row"]: r.get("parameters") for r in quality["rows"]}
    for r in quality["rows"]:
        name, _, recovery = r["row"].partition(" + ")
        parameters = r.get("parameters")  # missing if no cut keeps the quality
        parameters_of_base = parameters_of_row.get(row_name("base", recovery or "none"))
        kept_of_base = None
        if parameters and parameters_of_base and name != "base":
            kept_of_base = parameters / parameters_of_base
        removed = 100 * r["share"] if parameters else None
        predicted = _percent_above_dense([r.get("predicted")])
        development = _percent_above_dense([r.get(end) for end in ("got", "low", "high")])
        unseen = None
        if r is quality["rows"][-1]:
            unseen = _percent_above_dense([quality.get(end) for end in ("unseen", "unseen_low", "unseen_high")])
        requested = 100 * quality["asked"]
        rows.append(
            [r["row"], requested, parameters, removed, kept_of_base, predicted, development, unseen, r["models"]]
        )
    return rows


def _percent_above_dense(ratios: Sequence[float | None]) -> Cell:
    """Convert a ratio to dense, or (ratio, low, high) with its interval if there is one, to percent above 1."""
    if ratios[0] is None:
        return None
    percent = [None if ratio is None else 100 * (ratio - 1) for ratio in ratios]
    return Estimate(*percent) if len(percent) == 3 else percent[0]
