"""Tables of masks: sparsity per block, and how far several runs keep the same units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

from gprune.evaluation.stability import Stability, pairwise_stability
from gprune.models.masks import Masks
from gprune.report.grouping import Group, with_distinct_names
from gprune.report.table import Cell, Table
from gprune.runs.results import FinishedRun

COLUMNS = ["unit", "Jaccard", "chance", "beyond chance"]
DIGITS = dict.fromkeys(COLUMNS[1:], 3)
NOTE = (
    "Jaccard index of kept units, mean over blocks; chance: its expectation for independent masks of the same widths; "
    "beyond chance: (Jaccard - chance) / (1 - chance)."
)


def masks_of(runs: Iterable[FinishedRun]) -> dict[str, Masks]:
    """Final masks by names that tell runs apart, of the runs whose masks were kept."""
    return {run.name: run.masks for run in with_distinct_names(runs) if run.masks is not None}


def sparsity_table(runs: Sequence[FinishedRun]) -> Table:
    """Fraction of units that the runs' final masks remove: a row per kind of unit and block, a column per run."""
    rows: list[list[Cell]] = []
    masks = masks_of(runs)
    for units, unit in (("ffn", "neurons"), ("attention", "KV groups")):
        columns = [[float((~m).float().mean()) for m in getattr(run_masks, units)] for run_masks in masks.values()]
        if any(value for column in columns for value in column):
            rows += [[unit, b, *cells] for b, cells in enumerate(zip_longest(*columns))]
    note = "Fraction of the block's units that the final masks remove."
    return Table("sparsity", "Sparsity per block", ["unit", "block", *masks], rows, dict.fromkeys(masks, 3), note)


def stability_table(groups: Sequence[Group]) -> Table:
    """Jaccard index of kept units for every pair of runs of one model."""
    rows: list[list[Cell]] = [
        [*pair, units, *s, s.beyond_chance]
        for pair, by_units in pairs(run for group in groups for run in group.runs).items()
        for units, s in by_units.items()
    ]
    return Table("stability", "Mask stability", ["run", "and", *COLUMNS], rows, DIGITS, NOTE)


def repeatability_table(groups: Sequence[Group]) -> Table:
    """The same between runs that differ in seed alone: a row per group of several, means over its pairs."""
    rows: list[list[Cell]] = []
    for group in groups:
        within = list(pairs(group.runs).values())
        for units in ("ffn", "attention"):
            numbers = [[*by_units[units], by_units[units].beyond_chance] for by_units in within if units in by_units]
            if numbers:
                rows.append([group.name, units, *np.mean(numbers, axis=0).tolist()])
    return Table("repeatability", "Mask stability across seeds, mean over pairs", ["run", *COLUMNS], rows, DIGITS, NOTE)


def pairs(runs: Iterable[FinishedRun]) -> dict[tuple[str, str], dict[str, Stability]]:
    """`pairwise_stability` of the final masks of runs of the same dense model, by names that tell runs apart."""
    models: dict[str, dict[str, Masks]] = {}
    for run in with_distinct_names(runs):
        if run.masks is not None:
            models.setdefault(run.model, {})[run.name] = run.masks
    return {pair: by_kind for same in models.values() for pair, by_kind in pairwise_stability(same).items()}
