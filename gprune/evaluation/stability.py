"""Stability: whether runs with other seeds, samples or corpora keep the same units, by the Jaccard index of masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gprune.errors import UserError
from gprune.models.masks import Masks


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


def pairwise_stability(masks: dict[str, Masks]) -> dict[tuple[str, str], dict[str, Stability]]:
    """(run, run) -> agreement by "ffn" and "attention", as far as they say something, for every pair of runs."""
    shapes = {name: [len(m) for m in (*mask.ffn, *mask.attention)] for name, mask in masks.items()}
    first = next(iter(shapes), None)
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise UserError(f"Masks of {first} and {name} are of models of different shapes; expected the same model.")
    pairs = {}
    for a, b in combinations(masks, 2):
        by_unit = {unit: stability(getattr(masks[a], unit), getattr(masks[b], unit)) for unit in ("ffn", "attention")}
        pairs[a, b] = {unit: agreement for unit, agreement in by_unit.items() if agreement is not None}
    return pairs
