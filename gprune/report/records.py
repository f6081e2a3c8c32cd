"""Records of one run, as in `metrics.json`: by stage, divided by the base metric, and as the table of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gprune.evaluation.intervals import generalisation_gap, geometric_mean, paired_bootstrap_ratio
from gprune.report.table import Cell, Estimate, Table
from gprune.runs.results import Record


def row_name(stage: str, recovery: str) -> str:
    """What tables call a stage of a run: its name, and its recovery where it has one."""
    return stage if recovery == "none" else f"{stage} + {recovery}"


def by_stage(records: Sequence[Record], number: str = "perplexity") -> dict[tuple[str, str], dict[str, Any]]:
    """(stage, recovery) -> corpus -> what the record has as `number`, in the order of the records."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for r in records:
        table.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r[number]
    return table


def unseen_ratios(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Unseen geometric mean of each stage over `base` with the same recovery, with a 95 % interval over windows."""
    unseen = [r for r in records if not r["seen"]]
    nll = by_stage(unseen, "window_nll")
    ratios = {}
    for (stage, recovery), values in nll.items():
        base = nll.get(("base", recovery))
        if stage in ("dense", "base") or base is None:
            continue
        ratio, low, high = paired_bootstrap_ratio(values, base, unseen[0]["seq_len"] - 1)
        ratios[row_name(stage, recovery)] = {"ratio": ratio, "low": low, "high": high}
    return ratios


def result_table(records: Sequence[Record]) -> str:
    """Markdown: a row per stage; a column per corpus (seen ones marked), geometric means and the gap."""
    table = by_stage(records)
    seen = {r["corpus"]: r["seen"] for r in records}
    corpora = sorted(seen, key=lambda c: not seen[c])
    dense, ratios = table[("dense", "none")], unseen_ratios(records)

    def row(stage: str, recovery: str, values: dict[str, float]) -> list[Cell]:
        name = row_name(stage, recovery)
        means = [geometric_mean(v for c, v in values.items() if seen[c] == flag) for flag in (True, False)]
        gap = float("nan") if stage == "dense" else generalisation_gap(values, dense, seen)
        numbers = [None if v != v else v for v in (*(values[c] for c in corpora), *means, gap)]
        return [name, *numbers, Estimate(*ratios[name].values()) if name in ratios else None]

    return Table(
        "result",
        "Perplexity by corpus",
        ["", *(f"{c}*" if seen[c] else c for c in corpora), "seen", "unseen", "gap", "unseen / base"],
        [row(*key, values) for key, values in table.items()],
        {"gap": 3, "unseen / base": 3},
        "\\* seen: the corpus, in other documents, was used by the run. Perplexity, lower is better.",
    ).to_text()
