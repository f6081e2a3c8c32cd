"""Stability of masks between the runs of a list: Jaccard index of kept units, compared with chance.

python -m experiments.stability experiments/lists/headline.yaml                        between the seeds of each row
python -m experiments.stability experiments/lists/stability.yaml --pairs     also for each pair of runs
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import gammaln
from torch import Tensor

from gprune.console import Parser, run_guarded
from gprune.report.grouping import group_by_seed, with_distinct_names
from gprune.report.tables import Table
from gprune.runs.results import FinishedRun

from .summary import runs_of

COLUMNS = ["unit", "Jaccard", "chance", "beyond chance"]
DIGITS = dict.fromkeys(COLUMNS[1:], 3)
NOTE = (
    "Jaccard index of the kept units of two runs, mean over blocks (several seeds: and over pairs of seeds); chance: "
    "its expectation for independent masks of the same widths; beyond chance: (Jaccard - chance) / (1 - chance)."
)


def jaccard(a: Tensor, b: Tensor) -> float:
    """|A and B| / |A or B| of two keep masks (N,) bool; 1 if both masks are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


@functools.cache
def chance_jaccard(units: int, kept_a: int, kept_b: int) -> float:
    """Expected Jaccard index of two sets of these sizes, drawn independently and uniformly from N units.

    The intersection X is hypergeometric, so E[J] = sum over x of P(X = x) x / (kept_a + kept_b - x). This is exact,
    unlike the ratio of expectations. P is computed from log-gamma, because `scipy.stats.hypergeom.pmf` is slow: it took
    most of the time of a table.
    """
    if kept_a == kept_b == 0:
        return 1.0

    def log_choose(n: int, k: np.ndarray | int) -> np.ndarray:
        return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)

    x = np.arange(max(0, kept_a + kept_b - units), min(kept_a, kept_b) + 1)
    log_p = log_choose(kept_a, x) + log_choose(units - kept_a, kept_b - x) - log_choose(units, kept_b)
    return float(np.exp(log_p) @ (x / (kept_a + kept_b - x)))


def stability(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float, float] | None:
    """Agreement of two runs' keep masks of one kind of unit, one (N,) bool per block, as means over blocks.

    Chance is computed from the widths of each block, so that pruning the same blocks more does not count as agreement.
    Blocks of which one run keeps all units or none are ignored, because their index depends on the widths only.

    Returns:
        Jaccard index, its expectation for independent masks of the same widths (chance), and (index - chance) /
        (1 - chance): 0 for independent masks, 1 for equal masks. None if all blocks are ignored.
    """
    open_blocks = [(x, y) for x, y in zip(a, b, strict=True) if all(0 < int(m.sum()) < len(m) for m in (x, y))]
    if not open_blocks:
        return None
    chance = float(np.mean([chance_jaccard(len(x), int(x.sum()), int(y.sum())) for x, y in open_blocks]))
    index = float(np.mean([jaccard(x, y) for x, y in open_blocks]))
    return index, chance, (index - chance) / (1 - chance)


def pairs(runs: Iterable[FinishedRun]) -> Iterator[tuple[Any, ...]]:
    """Names, kind of unit (`ffn`, `attention`) and agreement of each pair of runs of one model with stored masks."""
    for one, other in combinations([run for run in with_distinct_names(runs) if run.masks is not None], 2):
        for units in ("ffn", "attention") if one.model == other.model else ():
            if (agreement := stability(getattr(one.masks, units), getattr(other.masks, units))) is not None:
                yield one.name, other.name, units, *agreement


def tables(runs: Sequence[FinishedRun], *, of_pairs: bool) -> Iterator[Table]:
    """Tables of agreement of each pair of runs, and of runs that differ only in the seed, as means over pairs."""
    named = group_by_seed(runs)
    if of_pairs:
        rows = list(map(list, pairs(named)))
        yield Table("stability", "", ["row", "and", *COLUMNS], rows, DIGITS, NOTE)
    rows = []
    for name in dict.fromkeys(run.name for run in named):
        within = list(pairs(run for run in named if run.name == name))
        for units in ("ffn", "attention"):
            if numbers := [found for _, _, kind, *found in within if kind == units]:
                rows.append([name, units, *np.mean(numbers, axis=0).tolist()])
    yield Table("repeatability", "", ["row", *COLUMNS], rows, DIGITS, NOTE)


def main(args: Sequence[str]) -> int:
    """Print the tables of a list. Returns the exit code."""

    def work() -> str:
        parser = Parser("python -m experiments.stability", description=__doc__)
        parser.add_argument("list", metavar="LIST", help="a list of runs")
        parser.add_argument("--pairs", action="store_true", help="print the agreement of each pair of runs too")
        flags = parser.parse_args(args)
        runs = runs_of(str(Path(flags.list).resolve()))
        return "\n\n".join(table.for_stdout() for table in tables(runs, of_pairs=flags.pairs)) + "\n"

    return run_guarded("experiments.stability", work)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
