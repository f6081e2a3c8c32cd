"""Tables of perplexity: by corpus, geometric means over seen and unseen text, gap, ratios.

Intervals are Student's t of logarithms, because all numbers are ratios or geometric means. They are over the windows of
a run, or over runs that differ only in the seed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from gprune.corpora.load import corpus_labels
from gprune.errors import UserError
from gprune.evaluation.estimate import Estimate
from gprune.report.grouping import SeedGroup
from gprune.report.records import SAME_RECOVERY, UNRECOVERED
from gprune.report.table import Cell, Table
from gprune.runs.numbers import DENSE, Record, Stage, by_stage, distance, estimates, records_of, row_name, unseen_ratio
from gprune.runs.results import FinishedRun


def over_seeds(values: Sequence[float]) -> Estimate:
    """Geometric mean over seeds with a 95 % interval: exp of mean(log) +- t(0.975, n - 1) sd(log) / sqrt(n).

    Args:
        values: at least two positive values.
    """
    logs = np.log(values)
    mean = float(logs.mean())
    half = float(student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def pool_estimates(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Combine estimates of seeds: that of a single run, or `over_seeds` of several; None if any is missing."""
    if not estimates or None in estimates:
        return None
    return estimates[0] if len(estimates) == 1 else over_seeds([estimate.value for estimate in estimates])


def stages(run: FinishedRun) -> list[Stage]:
    """Rows of the run's result table, with `dense` first."""
    return list(by_stage(run.records))


def ratio_to(
    run: FinishedRun, stage: Stage, other: FinishedRun, reference: Stage, number: str = "nll"
) -> Estimate | None:
    """Compute `unseen_ratio` of stages of two runs; None for a stage with itself."""
    if run.path.resolve() == other.path.resolve() and stage == reference:
        return None
    return unseen_ratio(run.records, stage, other.records, reference, number)


def summary_table(
    groups: Sequence[SeedGroup], bases: Mapping[Path, FinishedRun] | None = None, *, seen: Sequence[str] | None = None
) -> Table:
    """Table with a row per group and stage: means over seen and unseen corpora, gap, and ratios to dense and `base`.

    Args:
        groups: groups of runs.
        bases: path of a run -> the run whose stage `base` without recovery is the denominator. A missing run has no
            ratio. By default each run's own `base` with the recovery of the row. The column's name tells which.
        seen: corpora that count as seen in every row, for the note; the records are already marked.
    """
    by_name = {run.name: run for run in (bases or {}).values()}
    for name, run in by_name.items():
        if ("base", "none") not in stages(run):
            remedy = "Use a run with --gprune false, or with base in --evaluation.controls"
            raise UserError(f"Cannot divide by run '{name}': it has no stage 'base'. {remedy}.")
    base = (
        f"the stage `base` of {', '.join(by_name)}" if by_name else "the run that rows are divided by is not there yet"
    )
    ratio = SAME_RECOVERY if bases is None else UNRECOVERED
    return Table(
        "summary",
        "Geometric means, gap and ratios",
        ["run", "stage", "seeds", "seen", "unseen", "gap", "unseen / dense", ratio],
        _stage_rows(groups, lambda run, stage: _means_and_ratios(run, stage, bases)),
        {"gap": 3, "unseen / dense": 3, ratio: 3},
        "Perplexity, lower is better. In brackets 95 % intervals: Student's t over windows (paired, for ratios) of "
        "a single run; over seeds, which have the same windows, where there are several. gap: (unseen pruned "
        "/ dense) / (seen pruned / dense). " + _division(seen) + ("" if bases is None else f" base: {base}."),
    )


def distance_table(groups: Sequence[SeedGroup]) -> Table:
    """Table with a row per group and pruned stage: KL from the dense model and agreement with it on unseen text."""
    rows = [r for r in _stage_rows(groups, lambda run, stage: list(distance(run.records, stage).values())) if r[-1]]
    columns, digits = ["run", "stage", "seeds", "KL", "agreement"], {"KL": 3, "agreement": 3}
    note = (
        "Over unseen text: KL(dense || row) in nats per token, and how often both have the same most likely token. "
        "In brackets 95 % intervals: Student's t over windows; over seeds where there are several."
    )
    return Table("distance", "Distance from dense", columns, rows, digits, note)


def comparison_table(groups: Sequence[SeedGroup]) -> Table:
    """Table of perplexity ratios for every pair of groups, between their main rows.

    The text is unseen by both. Pairs that were evaluated on different windows have no row.
    """
    rows: list[list[Cell]] = []
    for a, b in combinations(groups, 2):
        by_seed = {run.seed: run for run in b.runs}
        pairs = [(run, by_seed[run.seed]) for run in a.runs if run.seed in by_seed] or [(a.runs[0], b.runs[0])]
        ratios = [ratio_to(run, stages(run)[-1], other, stages(other)[-1]) for run, other in pairs]
        if (ratio := pool_estimates(ratios)) is not None:
            names = (f"{g.name}: {row_name(*stages(g.runs[0])[-1])}" for g in (a, b))
            rows.append([*names, len(ratios), ratio])
    columns, title = ["unseen perplexity of", "over that of", "seeds", "ratio"], "Pruned models, pair by pair"
    note = "Over text unseen by both. In brackets 95 % intervals: Student's t, paired over the windows of a single "
    note += "pair; over several seeds where there are some."
    return Table("comparison", title, columns, rows, {"ratio": 3}, note)


def perplexity_table(groups: Sequence[SeedGroup], *, seen: Sequence[str] | None = None) -> Table:
    """Table with a row per group and stage and a column per corpus; seen corpora have a star.

    Args:
        groups: groups of runs.
        seen: as in `summary_table`.
    """
    used = {r["corpus"]: r["seen"] for g in groups for run in g.runs for r in run.records}
    mixed = {c for g in groups for run in g.runs for r in run.records if used[c := r["corpus"]] != r["seen"]}
    corpora = sorted(used, key=lambda c: (c not in mixed and not used[c], c in mixed))

    def numbers(run: FinishedRun, stage: Stage) -> list[Estimate | None]:
        values = by_stage(run.records).get(stage, {})
        return [Estimate(values[c]) if c in values else None for c in corpora]

    labels = corpus_labels(corpora)
    stars = ["(*)" if c in mixed else "*" if used[c] else "" for c in corpora]
    columns = ["run", "stage", "seeds", *(labels[c] + star for c, star in zip(corpora, stars, strict=True))]
    used_by = "* seen: the corpus, in other documents, was used by the run; (*) by some of the runs."
    note = used_by if seen is None else f"* seen. {_division(seen)}"
    return Table("perplexity", "Perplexity by corpus", columns, _stage_rows(groups, numbers), note=note)


def _division(seen: Sequence[str] | None) -> str:
    if seen is None:
        return "Seen and unseen are each run's own."
    if not seen:
        return "All text is unseen in every row."
    verb = "counts" if len(seen) == 1 else "count"
    return f"In every row {', '.join(corpus_labels(seen).values())} {verb} as seen, and all other text as unseen."


def _means_and_ratios(
    run: FinishedRun, stage: Stage, bases: Mapping[Path, FinishedRun] | None
) -> list[Estimate | None]:
    """Return seen, unseen, gap, unseen / dense and the ratio to base of a run, with intervals over windows."""
    found = estimates(run.records, stage, base_of(run, bases))
    names = ("seen", "unseen", "gap", "unseen_over_dense")
    ratio = "unseen_over_base_same_recovery" if bases is None else "unseen_over_unrecovered_base"
    return [*(found[name] for name in names), None if stage == DENSE else found[ratio]]


def base_of(run: FinishedRun, bases: Mapping[Path, FinishedRun] | None) -> Sequence[Record] | None:
    """Return the records of the run whose `base` is the denominator for a run; None if there is none."""
    other = run if bases is None else bases.get(run.path)
    return run.records if other is not None and other.path.resolve() == run.path.resolve() else other and other.records


def _stage_rows(
    groups: Sequence[SeedGroup], numbers: Callable[[FinishedRun, Stage], Sequence[Estimate | None]]
) -> list[list[Cell]]:
    """Return rows of name, stage, seeds and numbers for every group and stage.

    Equal rows of several groups are merged: a dense model has its own name, a control the names of the groups.
    """
    rows: dict[tuple[Any, ...], list[Cell]] = {}
    owners: dict[tuple[Any, ...], list[str]] = defaultdict(list)  # key of a row -> groups with this row
    for group in groups:
        for stage in stages(group.runs[0]):
            dense = stage[0] == "dense"
            runs, name = (group.runs[:1], group.runs[0].records[0]["model"]) if dense else (group.runs, group.name)
            row = list(map(pool_estimates, zip(*(numbers(run, stage) for run in runs), strict=True)))
            key: tuple[Any, ...] = (group.name, stage)  # the main row of a group is never merged
            if dense or stage != stages(runs[0])[-1]:
                key = (stage, *(_rounded_results(run, stage) for run in runs))
            if dense and any(other[0] == stage for other in rows):
                name = f"{name} (of {group.name})"
            if not dense:
                key += tuple(number and f"{number.value:.5g}" for number in row)  # denominators may differ
            rows.setdefault(key, [name, row_name(*stage), None if dense else len(runs), *row])
            owners[key].append(group.name)
    for key, row in rows.items():
        if row[1] != "dense" and len(owners[key]) > 1:
            row[0] = "all runs" if len(owners[key]) == len(groups) else "; ".join(owners[key])
    return list(rows.values())


def _rounded_results(run: FinishedRun, stage: Stage) -> tuple[Any, ...]:
    """Return the dense model and the results of a stage, rounded to five digits because sums differ by machine."""
    own = records_of(run.records, stage).values()
    return run.model, *((r["corpus"], r["seen"], f"{r['perplexity']:.5g}") for r in own)
