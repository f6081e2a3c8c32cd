"""Tables of perplexity: by corpus, geometric means over seen and unseen text, gap, ratios.

Intervals are Student's t of logarithms, since all of these numbers are ratios or are averaged geometrically: over the
windows of one run, or over runs that differ in seed alone.
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
from gprune.report.grouping import Group
from gprune.report.records import SAME_RECOVERY, UNRECOVERED
from gprune.report.table import Cell, Table
from gprune.runs.numbers import DENSE, Record, Stage, by_stage, distance, estimates, records_of, row_name, unseen_ratio
from gprune.runs.results import FinishedRun


def over_seeds(values: Sequence[float]) -> Estimate:
    """Geometric mean over seeds with a 95 % interval: exp of mean(log) +- t(0.975, n - 1) sd(log) / sqrt(n).

    Two values or more, all positive.
    """
    logs = np.log(values)
    mean = float(logs.mean())
    half = float(student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def pooled(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The estimate of a single run, or `over_seeds` of several; None without any, and where one is missing."""
    if not estimates or None in estimates:
        return None
    return estimates[0] if len(estimates) == 1 else over_seeds([estimate.value for estimate in estimates])


def stages(run: FinishedRun) -> list[Stage]:
    """Rows of the run's own table, `dense` first."""
    return list(by_stage(run.records))


def ratio_to(
    run: FinishedRun, stage: Stage, other: FinishedRun, reference: Stage, number: str = "nll"
) -> Estimate | None:
    """`unseen_ratio` of a stage of one run to a stage of another; None for a stage to itself."""
    if run.path.resolve() == other.path.resolve() and stage == reference:
        return None
    return unseen_ratio(run.records, stage, other.records, reference, number)


def summary_table(
    groups: Sequence[Group], bases: Mapping[Path, FinishedRun] | None = None, *, seen: Sequence[str] | None = None
) -> Table:
    """A row per group and stage: geometric means over seen and unseen corpora, gap, unseen over dense and over `base`.

    Args:
        bases: by path of a run, the run whose stage `base`, without recovery, is the divisor; a run that is missing
            has no ratio. None: each run's own `base`, with the recovery of the row. The column's name says which.
        seen: the corpora that count as seen in every row, for the note, since the runs' records say it already; None:
            each run's own.
    """
    by_name = {run.name: run for run in (bases or {}).values()}
    for name, run in by_name.items():
        if ("base", "none") not in stages(run):
            raise UserError(
                f"The run '{name}' has no stage 'base' to divide by; expected one with --gprune false, or with base "
                f"among --evaluation.controls."
            )
    base = (
        f"the stage `base` of {', '.join(by_name)}" if by_name else "the run that rows are divided by is not there yet"
    )
    ratio = SAME_RECOVERY if bases is None else UNRECOVERED
    return Table(
        "summary",
        "Geometric means, gap and ratios",
        ["run", "stage", "seeds", "seen", "unseen", "gap", "unseen / dense", ratio],
        _rows(groups, lambda run, stage: _numbers(run, stage, bases)),
        {"gap": 3, "unseen / dense": 3, ratio: 3},
        "Perplexity, lower is better. In brackets 95 % intervals: Student's t over windows (paired, for ratios) of "
        "a single run; over seeds, which have the same windows, where there are several. gap: (unseen pruned "
        "/ dense) / (seen pruned / dense). " + _division(seen) + ("" if bases is None else f" base: {base}."),
    )


def distance_table(groups: Sequence[Group]) -> Table:
    """A row per group and pruned stage: KL to the dense model and agreement with it over unseen text."""
    rows = [r for r in _rows(groups, lambda run, stage: list(distance(run.records, stage).values())) if r[-1]]
    columns, digits = ["run", "stage", "seeds", "KL", "agreement"], {"KL": 3, "agreement": 3}
    note = (
        "Over unseen text: KL(dense || row) in nats per token, and how often both have the same most likely token. "
        "In brackets 95 % intervals: Student's t over windows; over seeds where there are several."
    )
    return Table("distance", "Distance from dense", columns, rows, digits, note)


def comparison_table(groups: Sequence[Group]) -> Table:
    """Ratios of perplexity between pruned models: a row for the last stages of every two groups.

    Over text unseen by both; pairs that were not evaluated on the same windows have no row.
    """
    rows: list[list[Cell]] = []
    for a, b in combinations(groups, 2):
        by_seed = {run.seed: run for run in b.runs}
        pairs = [(run, by_seed[run.seed]) for run in a.runs if run.seed in by_seed] or [(a.runs[0], b.runs[0])]
        ratios = [ratio_to(run, stages(run)[-1], other, stages(other)[-1]) for run, other in pairs]
        if (ratio := pooled(ratios)) is not None:
            names = (f"{g.name}: {row_name(*stages(g.runs[0])[-1])}" for g in (a, b))
            rows.append([*names, len(ratios), ratio])
    columns, title = ["unseen perplexity of", "over that of", "seeds", "ratio"], "Pruned models, pair by pair"
    note = "Over text unseen by both. In brackets 95 % intervals: Student's t, paired over the windows of a single "
    note += "pair; over several seeds where there are some."
    return Table("comparison", title, columns, rows, {"ratio": 3}, note)


def perplexity_table(groups: Sequence[Group], *, seen: Sequence[str] | None = None) -> Table:
    """A row per group and stage, a column per corpus; seen corpora are starred. `seen` as for `summary_table`."""
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
    return Table("perplexity", "Perplexity by corpus", columns, _rows(groups, numbers), note=note)


def _division(seen: Sequence[str] | None) -> str:
    if seen is None:
        return "Seen and unseen are each run's own."
    if not seen:
        return "All text is unseen in every row."
    verb = "counts" if len(seen) == 1 else "count"
    return f"In every row {', '.join(corpus_labels(seen).values())} {verb} as seen, and all other text as unseen."


def _numbers(run: FinishedRun, stage: Stage, bases: Mapping[Path, FinishedRun] | None) -> list[Estimate | None]:
    """seen, unseen, gap, unseen / dense and the ratio to base of one run; means and gap with intervals over windows."""
    found = estimates(run.records, stage, base_of(run, bases))
    names = ("seen", "unseen", "gap", "unseen_over_dense")
    ratio = "unseen_over_base_same_recovery" if bases is None else "unseen_over_unrecovered_base"
    return [*(found[name] for name in names), None if stage == DENSE else found[ratio]]


def base_of(run: FinishedRun, bases: Mapping[Path, FinishedRun] | None) -> Sequence[Record] | None:
    """Records of the run whose `base` is the divisor: the run's own by default, None where the run has no divisor."""
    other = run if bases is None else bases.get(run.path)
    return run.records if other is not None and other.path.resolve() == run.path.resolve() else other and other.records


def _rows(
    groups: Sequence[Group], numbers: Callable[[FinishedRun, Stage], Sequence[Estimate | None]]
) -> list[list[Cell]]:
    """Name, stage, seeds and numbers over the runs of every group and stage.

    What is the same in several groups stands once: a dense model by its own name, a control by theirs.
    """
    rows: dict[tuple[Any, ...], list[Cell]] = {}
    owners: dict[tuple[Any, ...], list[str]] = defaultdict(list)  # by the same key, the groups that have the row
    for group in groups:
        for stage in stages(group.runs[0]):
            dense = stage[0] == "dense"
            runs, name = (group.runs[:1], group.runs[0].records[0]["model"]) if dense else (group.runs, group.name)
            row = list(map(pooled, zip(*(numbers(run, stage) for run in runs), strict=True)))
            key: tuple[Any, ...] = (group.name, stage)  # a row of its own, for what the group is about
            if dense or stage != stages(runs[0])[-1]:
                key = (stage, *(_identity(run, stage) for run in runs))
            if dense and any(other[0] == stage for other in rows):
                name = f"{name} (of {group.name})"
            if not dense:
                key += tuple(number and f"{number.value:.5g}" for number in row)  # the divisor may be another
            rows.setdefault(key, [name, row_name(*stage), None if dense else len(runs), *row])
            owners[key].append(group.name)
    for key, row in rows.items():
        if row[1] != "dense" and len(owners[key]) > 1:
            row[0] = "all runs" if len(owners[key]) == len(groups) else "; ".join(owners[key])
    return list(rows.values())


def _identity(run: FinishedRun, stage: Stage) -> tuple[Any, ...]:
    """The dense model, and what the stage measures, to five digits: machines sum differently."""
    own = records_of(run.records, stage).values()
    return run.model, *((r["corpus"], r["seen"], f"{r['perplexity']:.5g}") for r in own)
