"""Tables of perplexity: by corpus, geometric means over seen and unseen text, gap, ratios.

Intervals are Student's t of logarithms, because all numbers are ratios or geometric means. They are over the windows of
a run, or over runs that differ only in the seed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from gprune.corpora.load import corpus_labels
from gprune.errors import UserError
from gprune.evaluation.estimate import Estimate
from gprune.report.grouping import SeedGroup
from gprune.report.records import RATIO, SAME_RECOVERY, UNRECOVERED, cell_frame
from gprune.report.table import Cell, Table
from gprune.runs.numbers import (
    Record,
    Stage,
    by_stage,
    number_frame,
    records_of,
    row_name,
    to_estimate,
    unseen_ratio,
)
from gprune.runs.results import FinishedRun


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Return the geometric mean over seeds with exp(mean(log) +- t(0.975, n - 1) sd(log) / sqrt(n)) as its interval."""
    mean, half_width = _mean_and_half_width(np.log(values))
    return Estimate(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


def arithmetic_mean_over_seeds(values: Sequence[float], largest: float = math.inf) -> Estimate:
    """Return the arithmetic mean over seeds with a 95 % interval by Student's t, for KL and agreement."""
    mean, half_width = _mean_and_half_width(np.array(values))
    return Estimate(mean, max(0.0, mean - half_width), min(largest, mean + half_width))


def _mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of n values, and half of its 95 % interval: t(0.975, n - 1) sd / sqrt(n)."""
    half_width = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half_width)


MEANS = {  # how numbers of several seeds are combined; all others by `mean_over_seeds`
    "kl": arithmetic_mean_over_seeds,
    "unseen_kl": arithmetic_mean_over_seeds,
    "agreement": partial(arithmetic_mean_over_seeds, largest=1.0),
    "unseen_agreement": partial(arithmetic_mean_over_seeds, largest=1.0),
}


def pool_estimates(
    estimates: Sequence[Estimate | None], mean: Callable[[Sequence[float]], Estimate] = mean_over_seeds
) -> Estimate | None:
    """Combine the estimates of seeds."""
    if not estimates or None in estimates:
        return None
    return estimates[0] if len(estimates) == 1 else mean([estimate.value for estimate in estimates])


def run_stages(run: FinishedRun) -> list[Stage]:
    """Return (stage, recovery) of the rows of a run's result table, with `dense` first."""
    return list(by_stage(run.records))


def ratio_to(
    run: FinishedRun, stage: Stage, other: FinishedRun, reference: Stage, number: str = "nll"
) -> Estimate | None:
    """Compute `unseen_ratio` of stages of two runs."""
    if run.path.resolve() == other.path.resolve() and stage == reference:
        return None
    return unseen_ratio(run.records, stage, other.records, reference, number)


def group_frame(groups: Sequence[SeedGroup], bases: Mapping[Path, FinishedRun] | None = None) -> pd.DataFrame:
    """Return `number_frame` of all groups, pooled over seeds, with the place of the group in a column `group`.

    The dense model does not depend on the seed, so its numbers are those of the first run. `bases` is as for
    `summary_table`.
    """
    lines = []
    for place, group in enumerate(groups):
        frames = [number_frame(run.records, base=base_records(run, bases)) for run in group.runs]
        numbers = pd.concat([frames[0], *(frame[frame["stage"] != "dense"] for frame in frames[1:])])
        for (row, corpus, number), same_number in numbers.groupby(["row", "corpus", "number"], sort=False):
            seeds = 1 if row == "dense" else len(group.runs)
            if len(same_number) == seeds:  # otherwise undefined for a seed
                values = [to_estimate(line.value, line.low, line.high) for line in same_number.itertuples()]
                estimate = pool_estimates(values, MEANS.get(number, mean_over_seeds))
                lines.append((place, row, corpus, number, *estimate))
    columns = ["group", "row", "corpus", "number", "value", "low", "high"]
    return pd.DataFrame(lines, columns=columns).astype({"low": float, "high": float})


def summary_table(
    groups: Sequence[SeedGroup], numbers: pd.DataFrame, bases: Mapping[Path, FinishedRun] | None = None, *,
    seen: Sequence[str] | None = None,
) -> Table:  # fmt: skip
    """Table with a row per group and stage: means over seen and unseen corpora, gap, and ratios to dense and `base`."""
    by_name = {run.name: run for run in (bases or {}).values()}
    for name, run in by_name.items():
        if ("base", "none") not in run_stages(run):
            remedy = "Use a run with --gprune false, or with base in --evaluation.controls"
            raise UserError(f"Cannot divide by run '{name}': it has no stage 'base'. {remedy}.")
    ratio, number = (SAME_RECOVERY, RATIO) if bases is None else (UNRECOVERED, "unseen_over_unrecovered_base")
    wanted = [(name, "") for name in ("seen", "unseen", "gap", "unseen_over_dense", number)]
    note = (
        "Perplexity, lower is better. In brackets 95 % intervals: Student's t over windows (paired, for ratios) of "
        "a single run; over seeds, which have the same windows, where there are several. gap: (unseen pruned "
        f"/ dense) / (seen pruned / dense). {_seen_note(seen)}"
    )
    if bases is not None:
        base = f"the stage `base` of {', '.join(by_name)}"
        note += f" base: {base if by_name else 'the run that rows are divided by is not there yet'}."
    return Table(
        "summary",
        "Geometric means, gap and ratios",
        ["run", "stage", "seeds", "seen", "unseen", "gap", "unseen / dense", ratio],
        _stage_rows(groups, numbers, wanted),
        {"gap": 3, "unseen / dense": 3, ratio: 3},
        note,
    )


def distance_table(groups: Sequence[SeedGroup], numbers: pd.DataFrame) -> Table:
    """Table with a row per group and pruned stage: KL from the dense model and agreement with it on unseen text."""
    rows = _stage_rows(groups, numbers, [("unseen_kl", ""), ("unseen_agreement", "")])
    rows = [row for row in rows if row[-1]]  # stages without a distance have no row
    columns, digits = ["run", "stage", "seeds", "KL", "agreement"], {"KL": 3, "agreement": 3}
    note = (
        "Over unseen text: KL(dense || row) in nats per token, and how often both have the same most likely token. "
        "In brackets 95 % intervals: Student's t over windows; where there are several seeds, over seeds, with their "
        "arithmetic mean."
    )
    return Table("distance", "Distance from dense", columns, rows, digits, note)


def comparison_table(groups: Sequence[SeedGroup]) -> Table:
    """Table of perplexity ratios for every pair of groups, between their main rows.

    The text is unseen by both. Runs are paired by seed; without a common seed the first runs are a pair. Groups that
    were evaluated on different windows have no row.
    """
    rows: list[list[Cell]] = []
    for group, other_group in combinations(groups, 2):
        by_seed = {run.seed: run for run in other_group.runs}
        pairs = [(run, by_seed[run.seed]) for run in group.runs if run.seed in by_seed]
        if not pairs:
            pairs = [(group.runs[0], other_group.runs[0])]
        ratios = [ratio_to(run, run_stages(run)[-1], other, run_stages(other)[-1]) for run, other in pairs]
        ratio = pool_estimates(ratios)
        if ratio is not None:
            names = [f"{g.name}: {row_name(*run_stages(g.runs[0])[-1])}" for g in (group, other_group)]
            rows.append([*names, len(ratios), ratio])
    columns, title = ["unseen perplexity of", "over that of", "seeds", "ratio"], "Pruned models, pair by pair"
    note = "Over text unseen by both. In brackets 95 % intervals: Student's t, paired over the windows of a single "
    note += "pair; over several seeds where there are some."
    return Table("comparison", title, columns, rows, {"ratio": 3}, note)


def perplexity_table(groups: Sequence[SeedGroup], numbers: pd.DataFrame, *, seen: Sequence[str] | None = None) -> Table:
    """Table with a row per group and stage and a column per corpus; seen corpora have a star.

    Intervals are over seeds; a single run has none. Arguments are as for `summary_table`.
    """
    records = [r for group in groups for run in group.runs for r in run.records]
    is_seen = {r["corpus"]: r["seen"] for r in records}
    mixed = {r["corpus"] for r in records if r["seen"] != is_seen[r["corpus"]]}  # seen by some of the runs
    corpora = sorted(is_seen, key=lambda c: (c not in mixed and not is_seen[c], c in mixed))
    labels = corpus_labels(corpora)
    stars = ["(*)" if c in mixed else "*" if is_seen[c] else "" for c in corpora]
    columns = ["run", "stage", "seeds", *(labels[c] + star for c, star in zip(corpora, stars, strict=True))]
    note = "* seen: the corpus, in other documents, was used by the run; (*) by some of the runs."
    if seen is not None:
        note = f"* seen. {_seen_note(seen)}"
    single = [place for place, group in enumerate(groups) if len(group.runs) == 1]
    numbers = numbers.copy()
    numbers.loc[(numbers["row"] == "dense") | numbers["group"].isin(single), ["low", "high"]] = math.nan
    rows = _stage_rows(groups, numbers, [("perplexity", c) for c in corpora])
    return Table("perplexity", "Perplexity by corpus", columns, rows, note=note)


def _seen_note(seen: Sequence[str] | None) -> str:
    """Return a sentence on the corpora that count as seen: `seen`, or by default those of each run."""
    if seen is None:
        return "Seen and unseen are each run's own."
    if not seen:
        return "All text is unseen in every row."
    verb = "counts" if len(seen) == 1 else "count"
    return f"In every row {', '.join(corpus_labels(seen).values())} {verb} as seen, and all other text as unseen."


def base_records(run: FinishedRun, bases: Mapping[Path, FinishedRun] | None) -> Sequence[Record] | None:
    """Return the records of the run whose `base` is the denominator for a run; None if there is no such run."""
    base = run if bases is None else bases.get(run.path)
    if base is None:
        return None
    is_same_run = base.path.resolve() == run.path.resolve()
    return run.records if is_same_run else base.records


def _stage_rows(
    groups: Sequence[SeedGroup], numbers: pd.DataFrame, wanted: Sequence[tuple[str, str]]
) -> list[list[Cell]]:
    """Return rows of name, stage, seeds and the wanted (number, corpus) of `group_frame` for every group and stage.

    Equal rows of several groups are merged. A merged dense row is named after the dense model, and a merged control
    after its groups.
    """
    all_cells = cell_frame(numbers, ["group", "row"], wanted)
    rows: dict[tuple[Any, ...], list[Cell]] = {}  # equal rows have the same key
    groups_of_row: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for place, group in enumerate(groups):
        for stage in run_stages(group.runs[0]):
            is_dense = stage[0] == "dense"
            runs = group.runs[:1] if is_dense else group.runs
            cells = list(all_cells.loc[place, row_name(*stage)])
            key = _row_key(group, runs, stage, cells)
            name = group.name
            if is_dense:
                name = runs[0].records[0]["model"]
                if any(other_key[0] == stage for other_key in rows):  # another dense model has a row
                    name = f"{name} (of {group.name})"
            rows.setdefault(key, [name, row_name(*stage), None if is_dense else len(runs), *cells])
            groups_of_row[key].append(group.name)
    for key, row in rows.items():
        if row[1] != "dense" and len(groups_of_row[key]) > 1:
            row[0] = "all runs" if len(groups_of_row[key]) == len(groups) else "; ".join(groups_of_row[key])
    return list(rows.values())


def _row_key(
    group: SeedGroup, runs: Sequence[FinishedRun], stage: Stage, cells: Sequence[Estimate | None]
) -> tuple[Any, ...]:
    """Return a key that is equal for rows of several groups that are merged into one.

    Dense rows are merged if their results are equal, and controls if results and cells are. Main rows are not merged.
    """
    results = tuple(_rounded_results(run, stage) for run in runs)
    if stage[0] == "dense":
        return (stage, *results)
    rounded_cells = tuple(cell and f"{cell.value:.5g}" for cell in cells)  # denominators of ratios may differ
    is_main_row = stage == run_stages(runs[0])[-1]
    if is_main_row:  # never merged with a row of another group
        return (group.name, stage, *rounded_cells)
    return (stage, *results, *rounded_cells)


def _rounded_results(run: FinishedRun, stage: Stage) -> tuple[Any, ...]:
    """Return the dense model and the results of a stage, rounded to five digits because sums differ by machine."""
    records = records_of(run.records, stage).values()
    return run.model, *((r["corpus"], r["seen"], f"{r['perplexity']:.5g}") for r in records)
