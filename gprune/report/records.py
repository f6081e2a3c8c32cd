"""Tables of one run: its result, from the records of `metrics.json`, and the cost of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gprune.corpora.load import corpus_labels
from gprune.evaluation.estimate import Estimate
from gprune.report.table import Cell, Table
from gprune.runs.numbers import Record, by_stage, means_and_gaps, row_name, unseen_ratios

# The two ratios to the base metric, as tables name them. They differ only for rows that were recovered.
SAME_RECOVERY = "unseen / base, same recovery"
UNRECOVERED = "unseen / unrecovered base"


def caption(records: Sequence[Record]) -> str:
    """Model, budget and protocol in three lines, for figures that stand alone."""
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
    """A row per stage; a column per corpus (seen ones marked), geometric means and the gap.

    Args:
        labels: what the corpora are called; `corpus_labels` of them by default.
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
    """Seconds, tokens and memory of each step."""
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
