"""Numbers of a run, computed from the records in `metrics.json`: by stage, means, ratios to dense and to base."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gprune.corpora.load import corpus_labels
from gprune.evaluation.estimate import Estimate
from gprune.evaluation.intervals import (
    generalisation_gap,
    geometric_mean,
    mean_per_token,
    mean_perplexity,
    paired_gap,
    paired_ratio,
)

Record = dict[str, Any]  # a perplexity with its evaluation protocol, as in metrics.json
Stage = tuple[str, str]  # stage, recovery
DENSE, BASE = ("dense", "none"), ("base", "none")


def row_name(stage: str, recovery: str) -> str:
    """Return the name of a row in tables: the stage and, if there is one, the recovery."""
    return stage if recovery == "none" else f"{stage} + {recovery}"


def key_part(name: str) -> str:
    """Convert a name to a part of a metric key: `gprune + least_squares` becomes `gprune_least_squares`."""
    return re.sub(r"[^\w.-]+", "_", name)


def by_stage(records: Sequence[Record], number: str = "perplexity") -> dict[Stage, dict[str, Any]]:
    """Return (stage, recovery) -> corpus -> the field `number` of the record, in the order of the records."""
    table: dict[Stage, dict[str, Any]] = {}
    for r in records:
        table.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r[number]
    return table


def records_of(records: Sequence[Record], stage: Stage, *, seen: bool | None = None) -> dict[str, Record]:
    """Return the records of a stage by corpus, optionally of seen or of unseen corpora only."""
    own = [r for r in records if (r["stage"], r["recovery"]) == stage]
    return {r["corpus"]: r for r in own if seen is None or r["seen"] == seen}


def means_and_gaps(records: Sequence[Record]) -> dict[Stage, dict[str, float]]:
    """Return means and gaps by (stage, recovery).

    The keys are the geometric means `seen` and `unseen`, the generalisation `gap`, and over unseen corpora the means
    `unseen_kl` in nats per token and `unseen_agreement`. Undefined numbers are NaN: means without corpora, the gap of
    the dense model, and numbers that were not measured.
    """
    table, seen = by_stage(records), {r["corpus"]: r["seen"] for r in records}
    dense = table[("dense", "none")]
    return {
        (stage, recovery): {
            "seen": geometric_mean(v for c, v in values.items() if seen[c]),
            "unseen": geometric_mean(v for c, v in values.items() if not seen[c]),
            "gap": generalisation_gap(values, dense, seen)
            if stage != "dense" and on_same_windows(records, (stage, recovery))
            else float("nan"),
            **{f"unseen_{n}": e.value if e else math.nan for n, e in distance(records, (stage, recovery)).items()},
        }
        for (stage, recovery), values in table.items()
    }


def on_same_windows(records: Sequence[Record], stage: Stage) -> bool:
    """Return whether a stage was measured on the dense model's windows. It was not if the tokenizers differ."""
    own, dense = ({r["corpus"]: r["content_hash"] for r in records_of(records, s).values()} for s in (stage, DENSE))
    return own == dense


def distance(records: Sequence[Record], stage: Stage) -> dict[str, Estimate | None]:
    """Mean `kl` and `agreement` of a stage with the dense model on unseen text; None if they were not measured."""
    own = records_of(records, stage, seen=False)
    if not own or any(r.get("kl") is None for r in own.values()):
        return {"kl": None, "agreement": None}
    sums = {name: {c: r[f"window_{name}"] for c, r in own.items()} for name in ("kl", "agreement")}
    return {name: Estimate(*mean_per_token(of, records[0]["seq_len"] - 1)) for name, of in sums.items()}


def unseen_ratio(
    records: Sequence[Record], stage: Stage, others: Sequence[Record], other: Stage, number: str = "nll"
) -> Estimate | None:
    """Ratio of the geometric-mean perplexities of two stages on unseen text, with a paired 95 % interval.

    Args:
        records: records of the run of `stage`.
        stage: the stage in the numerator.
        others: records of the run of `other`.
        other: the stage in the denominator.
        number: nll, or kl for the ratio of exp(KL(dense || row)).

    Returns:
        The ratio on text that neither stage has seen; None if there is no such text or number, or the windows differ.
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
    """Compute `unseen_ratio` of each pruned row to `base`: {row: {ratio, low, high}}.

    Args:
        same_recovery: whether to divide by `base` with the recovery of the row, or by `base` without recovery.
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
    """Return numbers by which trackers can sort runs. Except for names of rows and corpora, keys are always the same.

    - `final/...`: the run's main row: `unseen`, `seen`, `gap`, `unseen_kl`, `unseen_agreement`,
      `unseen_over_base_same_recovery`, `unseen_over_unrecovered_base`, `perplexity/<corpus>`, `kl/<corpus>` and
      `agreement/<corpus>`, if they are defined.
    - `rows/<row>/...`: the same for every row.
    - `parameters_after` and other numbers of the summary.
    - `quality/...`: numbers of a quality target.
    - `steps/<step>/...`: seconds, tokens and peak memory in MiB.
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
    reached = summary.get("quality") or {}
    flat |= {f"quality/{name}": value for name, value in reached.items() if type(value) is float}
    return flat | {f"steps/{step}/{name}": value for step, costs in steps.items() for name, value in costs.items()}


def estimates(records: Sequence[Record], stage: Stage, base: Sequence[Record] | None) -> dict[str, Estimate | None]:
    """Means, gap, ratios, KL and agreement of a stage, with intervals over windows; None for undefined numbers.

    Args:
        records: records of the whole run.
        stage: the stage.
        base: records of the run (this or another one) whose `base` without recovery is the denominator of
            `unseen_over_unrecovered_base`. Without them this ratio is None.
    """
    predicted, seen = records[0]["seq_len"] - 1, {r["corpus"]: r["seen"] for r in records}
    nll = by_stage(records, "window_nll")
    parts = [{c: values for c, values in nll[stage].items() if seen[c] == kind} for kind in (True, False)]
    means = [Estimate(*mean_perplexity(part, predicted)) if part else None for part in parts]
    gap = all(parts) and stage != DENSE and on_same_windows(records, stage)

    def over(others: Sequence[Record] | None, other: Stage) -> Estimate | None:
        same = others is records and stage == other
        return None if others is None or same else unseen_ratio(records, stage, others, other)

    far = {f"unseen_{name}": None if stage == DENSE else e for name, e in distance(records, stage).items()}
    return {
        "seen": means[0],
        "unseen": means[1],
        "gap": Estimate(*paired_gap(nll[stage], nll[DENSE], seen, predicted)) if gap else None,
        "unseen_over_dense": over(records, DENSE),
        "unseen_over_unrecovered_base": over(base, BASE),
        "unseen_over_base_same_recovery": over(records, ("base", stage[1])),
        **far,
    }
