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


def layers_that_fit(budget: Budget, layers: Iterable[int]) -> tuple[int, ...]:
    """Return the layers that are removed if they are chosen in this order."""
    return budget.ordered("layer", rounds_of_layers(budget.units, layers)).removed


def choose_layers(budget: Budget, loss: Callable[[list[int]], float]) -> list[int]:
    """Choose layers to remove as a whole, greedily by the loss of the model without them.

    In each round the layer is added without which the loss is lowest, as long as a layer fits into the budget.
    """
    layers, chosen = [u.layer for u in budget.of_kind("layer")], []
    while True:
        others = (layer for layer in layers if layer not in chosen)
        candidates = [layer for layer in others if layer in layers_that_fit(budget, [*chosen, layer])]
        if not candidates:
            return chosen
        chosen.append(min(candidates, key=lambda layer: loss([*chosen, layer])))


def trial_tokens(plan: Any) -> int:
    """Return the tokens of a choice by the loss: one window of each drift corpus for every trial.

    Each round removes one layer. It has a trial for every layer that is left, so one less than the round before.
    """
    budget, corpora = plan.budget, plan.cfg.corpora
    open_layers = len(budget.of_kind("layer")) - len(budget.protected)
    trials = sum(range(open_layers, open_layers - len(budget.removed), -1))
    return trials * len(corpora.drift) * corpora.seq_len


def check_attention_remains(plan: Any) -> None:
    """Raise UserError if a budget allows removing all layers with attention of a model that has others too.

    Without attention, generation with a cache fails, because recurrent layers do not count tokens.
    """
    config, budget = plan.skeleton.config, plan.budget
    has_attention = attention_by_layer(config)
    if all(has_attention) or not any(has_attention):
        return
    numbers = [layer for layer, has in enumerate(has_attention) if has]
    if not budget.protected.isdisjoint(numbers):
        return
    if set(numbers) <= set(layers_that_fit(budget, numbers)):
        raise UserError(
            f"--sparsity.protect must name a layer with attention of model type '{config.model_type}' if whole blocks "
            f"are removed, because generation needs one; these are {numbers}, such as --sparsity.protect "
            f"[{numbers[-1]}]."
        )


def check_renumbering(plan: Any) -> None:
    """Raise UserError if other layers would change when a layer is removed and the following ones are renumbered.

    The first layer that is not protected is removed from the model without weights; `slice_model` checks the others.
    """
    first = min(u.layer for u in plan.budget.of_kind("layer") if not u.stays)
    units = [u for u in plan.budget.units if u.kind in ("neurons", "kv_groups")]
    masks = Masks({u.key: torch.full((u.size,), u.layer != first) for u in units})
    slice_model(plan.skeleton, masks)  # the result is not needed, only its error
