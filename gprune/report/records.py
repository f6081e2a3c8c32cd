"""Records of one run, as in `metrics.json`: by stage, divided by the base metric, and as the table of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gprune.evaluation.intervals import generalisation_gap, geometric_mean, paired_ratio
from gprune.report.table import Cell, Estimate, Table
from gprune.runs.results import Record, row_name


def by_stage(records: Sequence[Record], number: str = "perplexity") -> dict[tuple[str, str], dict[str, Any]]:
    """(stage, recovery) -> corpus -> what the record has as `number`, in the order of the records."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for r in records:
        table.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r[number]
    return table


def corpus_labels(corpora: Iterable[str]) -> dict[str, str]:
    """What tables and figures call corpora: a path by its last part, and by as many more as tell it from the others.

    Whole paths would squeeze a figure to nothing, and say whose machine it was.
    """
    parts = {corpus: PurePath(corpus).parts for corpus in corpora}
    labels = {}
    for corpus, own in parts.items():
        labels[corpus] = corpus
        for n in range(1, len(own) + 1):
            if sum(other[-n:] == own[-n:] for other in parts.values()) == 1:
                labels[corpus] = str(PurePath(*own[-n:]))
                break
    return labels


def caption(records: Sequence[Record]) -> str:
    """Model, budget and protocol in three lines, for figures that stand alone."""
    names = ("model", "scope", "importance", "dtype", "seq_len", "split")
    pruned = [r for r in records if r["stage"] != "dense"]
    text = {name: ", ".join(dict.fromkeys(str(r[name]) for r in pruned)) for name in names}
    budgets = sorted({r["sparsity"] for r in pruned})
    removed = " to ".join(f"{100 * share:g}" for share in dict.fromkeys((budgets[0], budgets[-1])))
    return (
        f"{text['model']}\n{removed} % of {text['scope']} removed by {text['importance']}\n"
        f"{text['split']} text, windows of {text['seq_len']} tokens, {text['dtype']}"
    )


def means_and_gaps(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """(stage, recovery) -> geometric means over `seen` and `unseen` corpora, and the generalisation `gap`.

    NaN is what is undefined: means over no corpora, and the gap of the dense model to itself.
    """
    table, seen = by_stage(records), {r["corpus"]: r["seen"] for r in records}
    dense = table[("dense", "none")]
    return {
        (stage, recovery): {
            "seen": geometric_mean(v for c, v in values.items() if seen[c]),
            "unseen": geometric_mean(v for c, v in values.items() if not seen[c]),
            "gap": float("nan") if stage == "dense" else generalisation_gap(values, dense, seen),
        }
        for (stage, recovery), values in table.items()
    }


def unseen_ratios(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Unseen geometric mean of each stage over `base` with the same recovery, with a 95 % interval over windows."""
    unseen = [r for r in records if not r["seen"]]
    nll = by_stage(unseen, "window_nll")
    ratios = {}
    for (stage, recovery), values in nll.items():
        base = nll.get(("base", recovery))
        if stage in ("dense", "base") or base is None:
            continue
        ratio, low, high = paired_ratio(values, base, unseen[0]["seq_len"] - 1)
        ratios[row_name(stage, recovery)] = {"ratio": ratio, "low": low, "high": high}
    return ratios


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
        return [name, *numbers, Estimate(*ratios[name].values()) if name in ratios else None]

    return Table(
        "result",
        "Perplexity by corpus",
        ["", *(labels[c] + ("*" if seen[c] else "") for c in corpora), "seen", "unseen", "gap", "unseen / base"],
        [row(*key, values) for key, values in by_stage(records).items()],
        {"gap": 3, "unseen / base": 3},
        "\\* seen: the corpus, in other documents, was used by the run. Perplexity, lower is better.",
    )
