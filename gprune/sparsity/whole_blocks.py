"""The choice of whole blocks in scope.

Blocks are removed by whole layers. They are chosen before sparsity is allocated, and make up at most
`--sparsity.block_share` of the target (`Budget.lost`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.models.surgery import attention_by_layer, slice_model
from gprune.sparsity.budget import Budget, rounds_of_layers


def removed_layers(budget: Budget) -> list[int]:
    """Return the layers that are removed as a whole, in the order of choice."""
    neurons = budget.of_kind("neurons")
    return list(dict.fromkeys(neurons[block].layer for block in budget.removed))


def blocks_that_fit(budget: Budget, blocks: Iterable[int]) -> tuple[int, ...]:
    """Return the blocks that are removed if layers are chosen in this order of blocks."""
    return budget.ordered("layer", rounds_of_layers(budget.units, blocks)).removed


def choose_blocks(budget: Budget, loss: Callable[[list[int]], float]) -> list[int]:
    """Choose blocks to remove as a whole, greedily by the loss of the model without them.

    In each round the layer is added without which the loss is lowest, as long as a layer fits into the budget.
    """
    chosen: list[int] = []
    while True:
        candidates = [
            blocks for blocks in budget.by_layer
            if blocks[0] not in chosen and blocks[0] in blocks_that_fit(budget, [*chosen, blocks[0]])
        ]  # fmt: skip
        if not candidates:
            return chosen
        chosen += min(candidates, key=lambda blocks: loss([*chosen, *blocks]))


def trial_tokens(plan: Any) -> int:
    """Return the tokens of a choice by the loss: one window of each drift corpus for every trial.

    Each round removes one layer. It has a trial for every layer that is left, so one less than the round before.
    """
    budget, corpora = plan.budget, plan.cfg.corpora
    open_layers = sum(budget.protected.isdisjoint(blocks) for blocks in budget.by_layer)
    trials = sum(range(open_layers, open_layers - len(removed_layers(budget)), -1))
    return trials * len(corpora.drift) * corpora.seq_len


def check_attention_remains(plan: Any) -> None:
    """Raise UserError if a budget allows removing all layers with attention of a model that has others too.

    Without attention, generation with a cache fails, because recurrent layers do not count tokens.
    """
    config, budget = plan.skeleton.config, plan.budget
    has_attention = attention_by_layer(config)
    if all(has_attention) or not any(has_attention):
        return
    layers = [blocks for blocks, has in zip(budget.by_layer, has_attention, strict=True) if has]
    if any(budget.of_kind("neurons")[b].stays for blocks in layers for b in blocks):
        return
    in_order = [block for blocks in layers for block in blocks]
    if set(in_order) <= set(blocks_that_fit(budget, in_order)):
        numbers = [layer for layer, has in enumerate(has_attention) if has]
        raise UserError(
            f"--sparsity.protect must name a layer with attention of model type '{config.model_type}' if whole blocks "
            f"are removed, because generation needs one; these are {numbers}, such as --sparsity.protect "
            f"[{numbers[-1]}]."
        )


def check_renumbering(plan: Any) -> None:
    """Raise UserError if other layers would change when a layer is removed and the following ones are renumbered.

    The first layer that is not protected is removed from the model without weights; `slice_model` checks the others.
    """
    units = plan.budget.units
    first = min(u.layer for u in units if u.kind == "layer" and not u.stays)
    ffn, attention = (
        [torch.full((u.rows * u.count,), u.layer != first) for u in plan.budget.of_kind(kind)]
        for kind in ("neurons", "kv_groups")
    )
    slice_model(plan.skeleton, Masks(ffn, attention))  # the result is not needed, only its error
