"""How far the rows of a list keep the same units, by the Jaccard index of their masks, against chance.

python -m experiments.stability experiments/headline.yaml                        between the seeds of each row
python -m experiments.stability experiments/questions/stability.yaml --pairs     and for each pair of runs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gprune.console import Parser, guarded, quiet
from gprune.report.grouping import groups, with_distinct_names
from gprune.report.table import Cell, Table
from gprune.runs.results import FinishedRun

from .summary import runs_of

COLUMNS = ["unit", "Jaccard", "chance", "beyond chance"]
DIGITS = dict.fromkeys(COLUMNS[1:], 3)
NOTE = (
    "Jaccard index of kept units, mean over blocks; chance: its expectation for independent masks of the same widths; "
    "beyond chance: (Jaccard - chance) / (1 - chance)."
)


def jaccard(a: Tensor, b: Tensor) -> float:
    """|A and B| / |A or B| of two keep masks (N,) bool; 1 where neither keeps anything."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def chance_jaccard(units: int, kept_a: int, kept_b: int) -> float:
    """Expected Jaccard index of two sets of these sizes, drawn independently and uniformly from N units.

    The intersection X is hypergeometric, so E[J] = sum over x of P(X = x) x / (kept_a + kept_b - x). This is exact; the
    ratio of expectations is not.
    """
    if kept_a == kept_b == 0:
        return 1.0
    x = np.arange(max(0, kept_a + kept_b - units), min(kept_a, kept_b) + 1)
    before = x[:-1]  # P(x + 1) / P(x) is a ratio of products, whose logarithms add up without cancelling
    steps = (kept_a - before) * (kept_b - before) / ((before + 1) * (units - kept_a - kept_b + before + 1))
    log_p = np.concatenate([[0.0], np.log(steps).cumsum()])
    p = np.exp(log_p - log_p.max())
    return float((p * x / (kept_a + kept_b - x)).sum() / p.sum())


class Stability(NamedTuple):
    """Agreement of two runs on which units to keep, as a mean over blocks."""

    jaccard: float  # in [0, 1]
    chance: float  # expectation for independent masks of the same widths per block

    @property
    def beyond_chance(self) -> float:
        """(jaccard - chance) / (1 - chance): 0 for independent masks, 1 for equal ones, less if widths differ."""
        return (self.jaccard - self.chance) / (1 - self.chance)


def stability(a: Sequence[Tensor], b: Sequence[Tensor]) -> Stability | None:
    """Agreement of two runs' keep masks of one kind of unit, one (N,) bool per block.

    Chance is computed from each block's own widths, so two runs do not agree because they prune the same blocks hard.
    A block is left out if one run keeps all of its units, or none: the widths alone then give the index. None if all
    blocks are left out.
    """
    open_blocks = [(x, y) for x, y in zip(a, b, strict=True) if all(0 < int(m.sum()) < len(m) for m in (x, y))]
    if not open_blocks:
        return None
    expected = [chance_jaccard(len(x), int(x.sum()), int(y.sum())) for x, y in open_blocks]
    return Stability(float(np.mean([jaccard(x, y) for x, y in open_blocks])), float(np.mean(expected)))


def pairs(runs: Iterable[FinishedRun]) -> Iterator[tuple[str, str, str, Stability]]:
    """Names, kind of unit (`ffn`, `attention`) and agreement of each two runs of one model whose masks were kept."""
    for one, other in combinations([run for run in with_distinct_names(runs) if run.masks is not None], 2):
        for units in ("ffn", "attention") if one.model == other.model else ():
            if (agreement := stability(getattr(one.masks, units), getattr(other.masks, units))) is not None:
                yield one.name, other.name, units, agreement


def tables(runs: Sequence[FinishedRun], *, of_pairs: bool) -> Iterator[Table]:
    """Agreement of each pair, and between runs that differ in seed alone: a row per group, means over its pairs."""
    of_seeds = groups(runs)
    if of_pairs:
        together = pairs(run for group in of_seeds for run in group.runs)
        rows: list[list[Cell]] = [[*names, *found, found.beyond_chance] for *names, found in together]
        yield Table("stability", "", ["run", "and", *COLUMNS], rows, DIGITS, NOTE)
    rows = []
    for group in of_seeds:
        within = list(pairs(group.runs))
        for units in ("ffn", "attention"):
            if numbers := [[*found, found.beyond_chance] for *_, kind, found in within if kind == units]:
                rows.append([group.name, units, *np.mean(numbers, axis=0).tolist()])
    yield Table("repeatability", "", ["run", *COLUMNS], rows, DIGITS, NOTE)


def work(arguments: Sequence[str] | None = None) -> str:
    """What the command prints."""
    parser = Parser("python -m experiments.stability", description=__doc__)
    parser.add_argument("list", type=Path, metavar="LIST", help="whose records have masks (`masks: true`)")
    parser.add_argument("--pairs", action="store_true", help="each pair of runs too")
    options = parser.parse_args(arguments)
    quiet()
    runs = runs_of(str(options.list.resolve()))
    return "\n\n".join(table.shown() for table in tables(runs, of_pairs=options.pairs)) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what a user can mend."""
    return guarded("experiments.stability", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
