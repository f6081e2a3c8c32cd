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
    of_stage = [r for r in records if (r["stage"], r["recovery"]) == stage]
    return {r["corpus"]: r for r in of_stage if seen is None or r["seen"] == seen}


def means_and_gaps(records: Sequence[Record]) -> dict[Stage, dict[str, float]]:
    """Return means and gaps by (stage, recovery).

    The keys are the geometric means `seen` and `unseen`, the generalisation `gap`, and over unseen corpora the means
    `unseen_kl` in nats per token and `unseen_agreement`. Undefined numbers are NaN: means without corpora, the gap of
    the dense model, and numbers that were not measured.
    """
    perplexities = by_stage(records)
    seen = {r["corpus"]: r["seen"] for r in records}
    numbers = {}
    for stage, by_corpus in perplexities.items():
        gap = math.nan
        if stage[0] != "dense" and on_same_windows(records, stage):
            gap = generalisation_gap(by_corpus, perplexities[DENSE], seen)
        numbers[stage] = {
            "seen": geometric_mean(value for corpus, value in by_corpus.items() if seen[corpus]),
            "unseen": geometric_mean(value for corpus, value in by_corpus.items() if not seen[corpus]),
            "gap": gap,
        }
        for name, estimate in distance(records, stage).items():
            numbers[stage][f"unseen_{name}"] = estimate.value if estimate else math.nan
    return numbers


def on_same_windows(records: Sequence[Record], stage: Stage) -> bool:
    """Return whether a stage was measured on the dense model's windows. It was not if the tokenizers differ."""

    def content_hashes(stage: Stage) -> dict[str, str]:
        return {corpus: r["content_hash"] for corpus, r in records_of(records, stage).items()}

    return content_hashes(stage) == content_hashes(DENSE)


def distance(records: Sequence[Record], stage: Stage) -> dict[str, Estimate | None]:
    """Mean `kl` and `agreement` of a stage with the dense model on unseen text; None if they were not measured."""
    unseen = records_of(records, stage, seen=False)
    if not unseen or any(r.get("kl") is None for r in unseen.values()):
        return {"kl": None, "agreement": None}
    predicted_tokens = records[0]["seq_len"] - 1  # of a window

    def mean(name: str, largest: float) -> Estimate:
        window_sums = {corpus: r[f"window_{name}"] for corpus, r in unseen.items()}
        return Estimate(*mean_per_token(window_sums, predicted_tokens, largest=largest))

    return {"kl": mean("kl", math.inf), "agreement": mean("agreement", 1.0)}


def unseen_ratio(
    records: Sequence[Record], stage: Stage, other_records: Sequence[Record], other_stage: Stage, number: str = "nll"
) -> Estimate | None:
    """Ratio of the geometric-mean perplexities of two stages on unseen text, with a paired 95 % interval.

    Args:
        records: records of the run of `stage`.
        stage: the stage in the numerator.
        other_records: records of the run of `other_stage`.
        other_stage: the stage in the denominator.
        number: nll, or kl for the ratio of exp(KL(dense || row)).

    Returns:
        The ratio on text that neither stage has seen; None if there is no such text or number, or the windows differ.
    """
    denominator = records_of(other_records, other_stage)
    numerator = {  # without corpora that the other stage has seen
        corpus: r
        for corpus, r in records_of(records, stage, seen=False).items()
        if corpus not in denominator or not denominator[corpus]["seen"]
    }
    if not numerator:
        return None
    for corpus, r in numerator.items():
        if corpus not in denominator or denominator[corpus]["content_hash"] != r["content_hash"]:
            return None
    numerator_sums = {corpus: numerator[corpus].get(f"window_{number}") for corpus in numerator}
    denominator_sums = {corpus: denominator[corpus].get(f"window_{number}") for corpus in numerator}
    if None in [*numerator_sums.values(), *denominator_sums.values()]:
        return None
    predicted_tokens = records[0]["seq_len"] - 1  # of a window
    return Estimate(*paired_ratio(numerator_sums, denominator_sums, predicted_tokens))


def unseen_ratios(records: Sequence[Record], *, same_recovery: bool = True) -> dict[str, dict[str, float]]:
    """Compute `unseen_ratio` of each pruned row to `base`: {row: {ratio, low, high}}.

    Args:
        records: records of the whole run.
        same_recovery: whether to divide by `base` with the recovery of the row, or by `base` without recovery.
    """
    ratios = {}
    for stage, recovery in by_stage(records):
        base = ("base", recovery if same_recovery else "none")
        if stage == "dense" or (stage, recovery) == base:
            continue
        ratio = unseen_ratio(records, (stage, recovery), records, base)
        if ratio is not None:
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
    numbers = {}
    for row, of_row in _numbers_by_row(records).items():
        prefixes = [f"rows/{key_part(row_name(*row))}"]
        if row == final:
            prefixes.append("final")
        for prefix in prefixes:
            numbers |= {f"{prefix}/{key}": value for key, value in of_row.items() if math.isfinite(value)}
    numbers |= {name: value for name, value in summary.items() if isinstance(value, int | float)}
    quality = summary.get("quality") or {}
    numbers |= {f"quality/{name}": value for name, value in quality.items() if type(value) is float}
    return numbers | {f"steps/{step}/{name}": value for step, costs in steps.items() for name, value in costs.items()}


def _numbers_by_row(records: Sequence[Record]) -> dict[Stage, dict[str, float]]:
    """Return means, numbers by corpus, and ratios to base of each row; undefined means are NaN."""
    ratios = {
        "unseen_over_base_same_recovery": unseen_ratios(records),
        "unseen_over_unrecovered_base": unseen_ratios(records, same_recovery=False),
    }
    labels = corpus_labels(r["corpus"] for r in records)
    numbers = means_and_gaps(records)
    for row, of_row in numbers.items():
        for corpus, r in records_of(records, row).items():
            for name in ("perplexity", "kl", "agreement"):
                if r.get(name) is not None:
                    of_row[f"{name}/{key_part(labels[corpus])}"] = r[name]
        for name, by_row in ratios.items():
            if row_name(*row) in by_row:
                of_row[name] = by_row[row_name(*row)]["ratio"]
    return numbers


def estimates(records: Sequence[Record], stage: Stage, base: Sequence[Record] | None) -> dict[str, Estimate | None]:
    """Means, gap, ratios, KL and agreement of a stage, with intervals over windows; None for undefined numbers.

    Args:
        records: records of the whole run.
        stage: (stage, recovery) of a row.
        base: records of the run (this or another one) whose `base` without recovery is the denominator of
            `unseen_over_unrecovered_base`. Without them this ratio is None.
    """
    predicted_tokens = records[0]["seq_len"] - 1  # of a window
    seen = {r["corpus"]: r["seen"] for r in records}
    window_nll = by_stage(records, "window_nll")
    seen_nll = {corpus: nll for corpus, nll in window_nll[stage].items() if seen[corpus]}
    unseen_nll = {corpus: nll for corpus, nll in window_nll[stage].items() if not seen[corpus]}
    gap = None
    if seen_nll and unseen_nll and stage != DENSE and on_same_windows(records, stage):
        gap = Estimate(*paired_gap(window_nll[stage], window_nll[DENSE], seen, predicted_tokens))

    def mean(nll: Mapping[str, Sequence[float]]) -> Estimate | None:
        return Estimate(*mean_perplexity(nll, predicted_tokens)) if nll else None

    def ratio_to(other_records: Sequence[Record] | None, other_stage: Stage) -> Estimate | None:
        """Return `unseen_ratio` to a stage; None without records, and for the stage itself."""
        is_same_row = other_records is records and stage == other_stage
        if other_records is None or is_same_row:
            return None
        return unseen_ratio(records, stage, other_records, other_stage)

    distances = {"kl": None, "agreement": None} if stage == DENSE else distance(records, stage)
    return {
        "seen": mean(seen_nll),
        "unseen": mean(unseen_nll),
        "gap": gap,
        "unseen_over_dense": ratio_to(records, DENSE),
        "unseen_over_unrecovered_base": ratio_to(base, BASE),
        "unseen_over_base_same_recovery": ratio_to(records, ("base", stage[1])),
        "unseen_kl": distances["kl"],
        "unseen_agreement": distances["agreement"],
    }
