"""Whole experts: what routers need, and the order in which experts are removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gprune.errors import UserError
from gprune.models.blocks import Block
from gprune.models.experts import experts_per_token, least_experts, why_experts_stay
from gprune.units.structure import Units


def router_needs(block: Block, config: Any) -> tuple[int, int, str]:
    """Return the groups of a block's router, the least number of experts, and why none may be removed, or ""."""
    groups, least = least_experts(config, block.experts)
    needed, why_not = experts_per_token(config.get_text_config(decoder=True)), why_experts_stay(block)
    if not why_not and needed is None:
        why_not = "its configuration does not tell how many experts a token needs"
    if not why_not and needed >= block.experts:
        why_not = f"its router chooses all {block.experts} experts"
    return groups, groups * least, why_not


def check_routers(blocks: Sequence[Block], config: Any, scope: str) -> None:
    """Raise UserError, which names the `--sparsity.scope`, if no expert can be removed."""
    of_experts = [block for block in blocks if block.has_experts]
    if not of_experts:
        raise UserError(
            f"--sparsity.scope {scope} needs a mixture of experts; model type '{config.model_type}' has none. Use ffn."
        )
    if why_not := next((why for block in of_experts if (why := router_needs(block, config)[2])), ""):
        raise UserError(
            f"--sparsity.scope {scope} cannot remove experts of model type '{config.model_type}': {why_not}. Use ffn, "
            "which narrows every expert."
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
