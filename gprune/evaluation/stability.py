"""Do other seeds, samples or corpora keep the same units? Jaccard index of keep masks, against chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import hypergeom
from torch import Tensor

from gprune.errors import UserError
from gprune.models.masks import Masks


def jaccard(a: Tensor, b: Tensor) -> float:
    """|A and B| / |A or B| of two keep masks (N,) bool; 1 where neither keeps anything."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def chance_jaccard(units: int, kept_a: int, kept_b: int) -> float:
    """Expected Jaccard index of two sets of these sizes, drawn independently and uniformly from N units.

    The intersection X is hypergeometric, so E[J] = sum over x of P(X = x) x / (kept_a + kept_b - x): exact, where the
    ratio of expectations is only near it.
    """
    if kept_a == kept_b == 0:
        return 1.0
    x = np.arange(max(0, kept_a + kept_b - units), min(kept_a, kept_b) + 1)
    return float((hypergeom.pmf(x, units, kept_a, kept_b) * x / (kept_a + kept_b - x)).sum())


@dataclass(frozen=True)
class Stability:
    """Agreement of two runs on what to keep, as a mean over blocks.

    Blocks of which one run keeps everything, or nothing, say nothing (the widths alone give the index) and are left
    out; without any other block all numbers are None.
    """

    jaccard: float | None  # in [0, 1]
    chance: float | None  # expectation for independent masks of the same widths per block
    per_block: list[float | None]

    @property
    def beyond_chance(self) -> float | None:
        """(jaccard - chance) / (1 - chance): 0 for independent masks, 1 for equal ones.

        Where the widths of a block differ, 1 is out of reach.
        """
        if self.jaccard is None or self.chance is None:
            return None
        return (self.jaccard - self.chance) / (1 - self.chance)


def stability(a: Sequence[Tensor], b: Sequence[Tensor]) -> Stability:
    """Agreement of two runs' keep masks of one kind of unit, one (N,) bool per block.

    Chance is taken at each block's own widths: that two runs prune the same blocks hard is no agreement on units.
    """
    observed: list[float | None] = []
    expected = []
    for x, y in zip(a, b, strict=True):
        chance = chance_jaccard(len(x), int(x.sum()), int(y.sum()))
        certain = any(bool(m.all()) or not bool(m.any()) for m in (x, y))
        observed.append(None if certain else jaccard(x, y))
        if not certain:
            expected.append(chance)
    found = [value for value in observed if value is not None]
    if not found:
        return Stability(None, None, observed)
    return Stability(float(np.mean(found)), float(np.mean(expected)), observed)


def pairwise_stability(masks: dict[str, Masks]) -> dict[tuple[str, str], dict[str, Stability]]:
    """(run, run) -> kind of unit ("ffn", "attention") -> agreement, for every pair of runs."""
    shapes = {name: [len(m) for m in (*found.ffn, *found.attention)] for name, found in masks.items()}
    first = next(iter(shapes), None)
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise UserError(f"Masks of {first} and {name} are of models of different shapes; expected the same model.")
    return {
        (a, b): {
            "ffn": stability(masks[a].ffn, masks[b].ffn),
            "attention": stability(masks[a].attention, masks[b].attention),
        }
        for a, b in combinations(masks, 2)
    }
