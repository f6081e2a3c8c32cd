"""Records of one run, as in `metrics.json`: by stage, divided by the base metric, and as the table of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import generalisation_gap, geometric_mean, mean_per_token, paired_ratio
from gprune.report.table import Cell, Estimate, Table
from gprune.runs.results import Record, key_part, row_name

Stage = tuple[str, str]  # stage, recovery
# The two ratios to the base metric, as tables name them. They differ only for rows that were recovered.
SAME_RECOVERY = "unseen / base, same recovery"
UNRECOVERED = "unseen / unrecovered base"


def by_stage(records: Sequence[Record], number: str = "perplexity") -> dict[Stage, dict[str, Any]]:
    """(stage, recovery) -> corpus -> what the record has as `number`, in the order of the records."""
    table: dict[Stage, dict[str, Any]] = {}
    for r in records:
        table.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r[number]
    return table


def records_of(records: Sequence[Record], stage: Stage, *, seen: bool | None = None) -> dict[str, Record]:
    """By corpus, the records of a stage; of seen or unseen corpora only, unless `seen` is None."""
    own = [r for r in records if (r["stage"], r["recovery"]) == stage]
    return {r["corpus"]: r for r in own if seen is None or r["seen"] == seen}


def caption(records: Sequence[Record]) -> str:
    """Model, budget and protocol in three lines, for figures that stand alone."""
    names = ("model", "scope", "importance", "dtype", "seq_len", "split")
    pruned = [r for r in records if r["stage"] != "dense"]
    text = {name: ", ".join(dict.fromkeys(str(r[name]) for r in pruned)) for name in names}
    budgets = sorted({r["sparsity"] for r in pruned})
    removed = " to ".join(f"{100 * share:.3g}" for share in dict.fromkeys((budgets[0], budgets[-1])))
    of = ", ".join(dict.fromkeys(f"the {r['cost']} of " if "cost" in r else "" for r in pruned))
    return (
        f"{text['model']}\n{removed} % of {of}{text['scope']} removed by {text['importance']}\n"
        f"{text['split']} text, windows of {text['seq_len']} tokens, {text['dtype']}"
    )


def means_and_gaps(records: Sequence[Record]) -> dict[Stage, dict[str, float]]:
    """(stage, recovery) -> geometric means over `seen` and `unseen` corpora, the generalisation `gap`, and means over
    unseen corpora of how far a row is from dense: `unseen_kl` in nats per token, `unseen_agreement`.

    NaN is what is undefined: means over no corpora, the gap of the dense model to itself, and what was not measured.
    """
    table, seen = by_stage(records), {r["corpus"]: r["seen"] for r in records}
    dense = table[("dense", "none")]
    return {
        (stage, recovery): {
            "seen": geometric_mean(v for c, v in values.items() if seen[c]),
            "unseen": geometric_mean(v for c, v in values.items() if not seen[c]),
            "gap": float("nan") if stage == "dense" else generalisation_gap(values, dense, seen),
            **{f"unseen_{n}": e.value if e else math.nan for n, e in distance(records, (stage, recovery)).items()},
        }
        for (stage, recovery), values in table.items()
    }


def distance(records: Sequence[Record], stage: Stage) -> dict[str, Estimate | None]:
    """How far from dense a stage is on unseen text, `kl` and `agreement`; None without text, or in old records."""
    own = records_of(records, stage, seen=False)
    if not own or any(r.get("kl") is None for r in own.values()):
        return {"kl": None, "agreement": None}
    sums = {name: {c: r[f"window_{name}"] for c, r in own.items()} for name in ("kl", "agreement")}
    return {name: Estimate(*mean_per_token(of, records[0]["seq_len"] - 1)) for name, of in sums.items()}


def unseen_ratio(
    records: Sequence[Record], stage: Stage, others: Sequence[Record], other: Stage, number: str = "nll"
) -> Estimate | None:
    """Perplexity of `stage` over that of `other` in `others`, as geometric means over text that neither has seen.

    The 95 % interval is paired over windows. None without such text or `number`, and where windows are not the same.

    Args:
        number: nll; or kl, for the ratio of exp(KL(dense || row)).
    """
    there = records_of(others, other)
    here = {c: r for c, r in records_of(records, stage, seen=False).items() if c not in there or not there[c]["seen"]}
    if not here or any(c not in there or there[c]["content_hash"] != r["content_hash"] for c, r in here.items()):
        return None
    sums = [{c: own[c].get(f"window_{number}") for c in here} for own in (here, there)]
    if any(None in of.values() for of in sums):
        return None
    return Estimate(*paired_ratio(*sums, records[0]["seq_len"] - 1))


def unseen_ratios(records: Sequence[Record], *, same_recovery: bool = True) -> dict[str, dict[str, float]]:
    """`unseen_ratio` of each pruned row to `base`: {row: {ratio, low, high}}.

    Args:
        same_recovery: divide by `base` after the recovery of the row. Otherwise divide by `base` without any recovery.
    """
    ratios = {}
    for stage, recovery in by_stage(records):
        base = ("base", recovery if same_recovery else "none")
        ratio = None if stage == "dense" else unseen_ratio(records, (stage, recovery), records, base)
        if (stage, recovery) != base and ratio is not None:
            ratios[row_name(stage, recovery)] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    return ratios


def run_numbers(
    records: Sequence[Record], summary: Mapping[str, Any], steps: Mapping[str, Mapping[str, float]], final: Stage
) -> dict[str, float]:
    """What trackers sort runs by, under keys that do not depend on settings, but for the names of rows and corpora.

    `final/...` is the run's own row: `unseen`, `seen`, `gap`, `unseen_kl`, `unseen_agreement`,
    `unseen_over_base_same_recovery`, `unseen_over_unrecovered_base`, and `perplexity/<corpus>`, `kl/<corpus>`,
    `agreement/<corpus>`, those that are defined; `rows/<row>/...` the same of every row. `parameters_after` and other
    numbers are those of the summary, `steps/<step>/...` seconds, tokens and peak memory in MiB.
    """
    means, flat = means_and_gaps(records), {}
    ratios = {
        "unseen_over_base_same_recovery": unseen_ratios(records),
        "unseen_over_unrecovered_base": unseen_ratios(records, same_recovery=False),
    }
    labels = corpus_labels(r["corpus"] for r in records)
    for row in means:
        name = row_name(*row)
        numbers = dict(means[row])
        for corpus, r in records_of(records, row).items():
            of_corpus = {name: r.get(name) for name in ("perplexity", "kl", "agreement")}
            numbers |= {f"{name}/{key_part(labels[corpus])}": v for name, v in of_corpus.items() if v is not None}
        numbers |= {key: of_rows[name]["ratio"] for key, of_rows in ratios.items() if name in of_rows}
        for prefix in (f"rows/{key_part(name)}", "final")[: 1 + (row == final)]:
            flat |= {f"{prefix}/{key}": value for key, value in numbers.items() if math.isfinite(value)}
    flat |= {name: value for name, value in summary.items() if isinstance(value, int | float)}
    return flat | {f"steps/{step}/{name}": value for step, costs in steps.items() for name, value in costs.items()}


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
