"""Whole experts: what routers need, and the order in which experts are removed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gprune.errors import UserError
from gprune.units.structure import Units


def check_routers(units: Sequence[Units], model_type: str, scope: str) -> None:
    """Raise UserError, which names the `--sparsity.scope`, if no expert can be removed."""
    of_experts = [u for u in units if u.kind == "experts"]
    if not of_experts:
        raise UserError(
            f"--sparsity.scope {scope} needs a mixture of experts; model type '{model_type}' has none. Use ffn."
        )
    if why_not := next((u.stays for u in of_experts if u.stays), ""):
        raise UserError(
            f"--sparsity.scope {scope} cannot remove experts of model type '{model_type}': {why_not}. Use ffn, which "
            "narrows every expert."
        )


def rounds_of_experts(u: Units, scores: Sequence[float] | None = None) -> list[tuple[float, tuple[int, ...]]]:
    """Return the rounds in which experts of a layer are removed, lowest scores first: one of each group.

    Ties are broken by number; without scores, experts are removed by number. The score of a round is the mean of its
    experts relative to the mean absolute score of the layer, so that layers can be compared. Experts with the score
    -inf, which no token reaches, come first and are not averaged.
    """
    scores = tuple(map(float, range(u.count))) if scores is None else scores
    size, least, by_group = u.count // u.step, u.least // u.step, []
    for group in range(u.step):
        numbers = range(group * size, (group + 1) * size)
        by_group.append(sorted(numbers, key=lambda expert: (scores[expert], expert))[: max(0, size - least)])
    sizes = [abs(score) for score in scores if math.isfinite(score)]
    scale = sum(sizes) / max(1, len(sizes)) or 1.0
    rounds = zip(*by_group, strict=True)
    return [(sum(scores[e] for e in experts) / len(experts) / scale, experts) for experts in rounds]
