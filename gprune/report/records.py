"""Tables of a run: results from the records of `metrics.json`, quality targets, and the cost of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gprune.corpora.load import corpus_labels
from gprune.evaluation.estimate import Estimate
from gprune.report.table import Cell, Table
from gprune.runs.numbers import Record, by_stage, means_and_gaps, row_name, unseen_ratios

# Names of the two ratios to the base metric. They differ only for rows with recovery.
SAME_RECOVERY = "unseen / base, same recovery"
UNRECOVERED = "unseen / unrecovered base"
KEPT_OF_BASE = "kept / base, same recovery"


def caption(records: Sequence[Record]) -> str:
    """Caption of figures: model, budget and protocol in three lines."""
    names = ("model", "scope", "importance", "dtype", "seq_len", "split")
    pruned = [r for r in records if r["stage"] != "dense"]
    text = {name: ", ".join(dict.fromkeys(str(r[name]) for r in pruned)) for name in names}
    budgets = sorted({r["sparsity"] for r in pruned})
    removed = " to ".join(f"{100 * share:.3g}" for share in dict.fromkeys((budgets[0], budgets[-1])))
    of = ", ".join(dict.fromkeys(f"the {r['cost']} of " if "cost" in r else "" for r in pruned))
    if all(r["stage"] == "model" for r in pruned):
        return f"beside {text['model']}\n{text['split']} text, windows of {text['seq_len']} tokens, {text['dtype']}"
    return (
        f"{text['model']}\n{removed} % of {of}{text['scope']} removed by {text['importance']}\n"
        f"{text['split']} text, windows of {text['seq_len']} tokens, {text['dtype']}"
    )


def result_table(records: Sequence[Record], labels: Mapping[str, str] | None = None) -> Table:
    """Result table of a run: a row per stage; columns of corpora (seen ones have a star), geometric means and the gap.

    Args:
        records: records of `metrics.json`.
        labels: names of corpora. Default: `corpus_labels`.
    """
    seen = {r["corpus"]: r["seen"] for r in records}
    corpora = sorted(seen, key=lambda c: not seen[c])
    means, ratios, labels = means_and_gaps(records), unseen_ratios(records), labels or corpus_labels(corpora)

    def row(stage: str, recovery: str, values: dict[str, float]) -> list[Cell]:
        name, own_means = row_name(stage, recovery), means[stage, recovery].values()
        numbers = [None if v != v else v for v in (*(values[c] for c in corpora), *own_means)]
        ratio = Estimate(*ratios[name].values()) if name in ratios else None
        return [name, *numbers[:-2], ratio, *numbers[-2:]][: len(columns)]

    columns = ["", *(labels[c] + ("*" if seen[c] else "") for c in corpora), "seen", "unseen", "gap", SAME_RECOVERY]
    note = "* seen: the corpus, in other documents, was used by the run. Perplexity, lower is better."
    if any(of_row["unseen_kl"] == of_row["unseen_kl"] for of_row in means.values()):
        columns += ["KL", "agreement"]
        note += " KL(dense || row) in nats per token, and how often both have the same most likely token: unseen text."
    rows = [row(*key, values) for key, values in by_stage(records).items()]
    digits = dict.fromkeys(("gap", SAME_RECOVERY, "KL", "agreement"), 3)
    return Table("result", "Perplexity by corpus", columns, rows, digits, note)


def cost_table(steps: Mapping[str, Mapping[str, float]]) -> Table:
    """Table of seconds, tokens and memory by step."""
    columns = {"seconds": "seconds", "forward_tokens": "tokens forward", "forward_backward_tokens": "and backward",
               "peak_memory_mib": "peak MiB"}  # fmt: skip
    if any("peak_gpu_memory_mib" in step for step in steps.values()):
        columns["peak_gpu_memory_mib"] = "of the GPU"
    rows = [
        [name, float(step.get("seconds", 0)), *(int(step.get(n, 0)) for n in list(columns)[1:])]
        for name, step in steps.items()
    ]
    note = "peak MiB: the process's highest so far, so that a step may show that of one before it."
    return Table("cost", "Cost by step", ["step", *columns.values()], rows, {"seconds": 1}, note)


def quality_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Table of quality targets: requested, predicted and measured quality, and parameters that each row keeps.

    Args:
        summaries: name of a run -> summary. Runs without a quality target have no rows. Names are shown if there are
            several.
    """
    rows: list[list[Cell]] = []
    for run, summary in summaries.items():
        quality = summary.get("quality") or {"rows": []}
        kept = {r["row"]: r.get("parameters") for r in quality["rows"]}
        for r in quality["rows"]:
            name, _, recovery = r["row"].partition(" + ")
            of_base = kept.get(row_name("base", recovery or "none"))
            parameters, own = r.get("parameters"), r is quality["rows"][-1]
            ratio = parameters / of_base if parameters and of_base and name != "base" else None
            unseen = [quality.get(end) for end in ("unseen", "unseen_low", "unseen_high")] if own else [None]
            cells = [r["row"], quality["asked"] * 100, parameters, 100 * r["share"] if parameters else None, ratio]
            ends = [r.get(end) for end in ("got", "low", "high")]
            cells += [_above([r.get("predicted")]), _above(ends), _above(unseen), r["models"]]
            rows.append([run, *cells] if len(summaries) > 1 else cells)
    columns = ["row", "asked, %", "parameters kept", "removed, %", KEPT_OF_BASE, "predicted, %", "development, %",
               "unseen, %", "models tried"]  # fmt: skip
    note = (
        "Each row at a share of its own: the largest found whose development perplexity, above dense, is at most what "
        "was asked. Controls, and a first search, are without training. A row without numbers keeps this quality by no "
        "cut. Other tables have all rows at the share of the run's own, which is the last row here. In brackets 95 % "
        "intervals: Student's t over windows, paired."
    )
    columns = ["run", *columns] if len(summaries) > 1 else columns
    return Table("quality", "Parameters at the same quality", columns, rows, {"asked, %": 1, KEPT_OF_BASE: 3}, note)


def _above(ratios: Sequence[float | None]) -> Cell:
    """Convert a ratio to dense, optionally with its interval, to percent above 1."""
    if ratios[0] is None:
        return None
    percent = [100 * (ratio - 1) for ratio in ratios]
    return Estimate(*percent) if len(percent) == 3 else percent[0]
