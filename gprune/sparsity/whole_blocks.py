"""Whole blocks as a feature of a run: in the scope (`WholeBlocks`), or by an allocation that removes nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gprune.errors import UserError
from gprune.features import Feature, Tokens
from gprune.sparsity.target import Target


class WholeBlocks(Feature):
    """Whole blocks that are removed, chosen by `--sparsity.block_choice`."""

    def __init__(self, choice: str):
        self.chosen_by_loss = choice == "loss"
        self.also_reads = frozenset({"corpora.drift"} if self.chosen_by_loss else ())

    def identity(self, cfg: Any) -> dict[str, Any]:
        """Return the settings of whole blocks, which identify no run without them."""
        return {"sparsity": {name: getattr(cfg.sparsity, name) for name in ("block_share", "block_choice")}}

    def refuse(self, plan: Any) -> None:
        """Raise UserError if a layer cannot be removed, or all layers with attention would be."""
        if plan.budget.costs.block_share:
            check_attention_remains(plan)
        if plan.budget.costs.removed_blocks:
            check_renumbering(plan)

    def planned_tokens(self, plan: Any) -> Tokens:
        """Return the tokens of a choice by the loss: one window of each corpus for every trial.

        Each round removes one layer. It has a trial for every layer that is left, so one less than the round before.
        """
        costs, corpora = plan.budget.costs, plan.cfg.corpora
        open_layers = sum(costs.protected.isdisjoint(blocks) for blocks in costs.by_layer)
        rounds = len(costs.removed_layers) if self.chosen_by_loss else 0
        trials = sum(range(open_layers, open_layers - rounds, -1))
        return {2: (trials * len(corpora.drift) * corpora.seq_len, 0)}

    def lines(self, plan: Any) -> dict[str, str]:
        """Return how many layers are removed."""
        return {"blocks": f"{len(plan.budget.costs.removed_layers)} are removed as a whole"}


def refuse_modules(cfg: Any) -> None:
    """Raise UserError for an allocation that removes whole blocks if the run has modules."""
    if cfg.gprune:
        raise UserError(f"--sparsity.allocation {cfg.base_allocation} needs --gprune false, because it has no modules.")


def refuse_layers(plan: Any) -> None:
    """Raise UserError if a layer cannot be removed, or all layers with attention would be."""
    check_attention_remains(plan)
    check_renumbering(plan)


def limit_to_depth(budget: Any) -> Any:
    """Limit a budget to the cost of all whole blocks except one. A quality target is lowered to that limit."""
    protected, prices = budget.costs.protected, budget.costs.prices.blocks
    layers = [layer for layer in budget.costs.by_layer if protected.isdisjoint(layer)]
    layer_costs = [sum(prices[block] for block in layer) for layer in layers]
    kept = 0 if protected else max(layer_costs)  # protected blocks are kept, otherwise the largest layer
    removable = sum(layer_costs) - kept
    if Target.of(budget.setting).is_searched:
        return replace(budget.removing(min(budget.target, removable)), setting=budget.setting)
    if budget.target > removable:
        raise UserError(
            f"--sparsity.allocation depth cannot remove {budget.target:,}: whole blocks are at most {removable:,} if "
            "one block is kept. Use a lower --sparsity.target."
        )
    return budget


def check_attention_remains(plan: Any) -> None:
    """Raise UserError if a budget allows removing all layers with attention of a model that has others too.

    Without attention, generation with a cache fails, because recurrent layers do not count tokens.
    """
    from gprune.models.surgery import attention_by_layer

    config, budget, costs = plan.skeleton.config, plan.budget, plan.budget.costs
    has_attention = attention_by_layer(config)
    if all(has_attention) or not any(has_attention):
        return
    layers = [blocks for blocks, has in zip(costs.by_layer, has_attention, strict=True) if has]
    if any(blocks not in costs.open_layers for blocks in layers):
        return
    layer_costs = [sum(costs.prices.blocks[block] for block in blocks) for blocks in layers]
    limit = costs.block_share * budget.target if costs.block_share else budget.target
    # The last removed layer may exceed the target.
    if sum(layer_costs) - max(layer_costs) < limit:
        numbers = [layer for layer, has in enumerate(has_attention) if has]
        raise UserError(
            f"--sparsity.protect must name a layer with attention of model type '{config.model_type}' if whole blocks "
            f"are removed, because generation needs one; these are {numbers}, such as --sparsity.protect "
            f"[{numbers[-1]}]."
        )


def check_renumbering(plan: Any) -> None:
    """Raise UserError if other layers would change when a layer is removed and the following ones are renumbered.

    The first removable layer of the model without weights is removed, and `prune` compares the others.
    """
    import torch

    from gprune.models.blocks import blocks_of
    from gprune.models.masks import Masks
    from gprune.models.surgery import prune

    blocks = blocks_of(plan.skeleton)
    first = min(b.layer_index for b in blocks if b.index not in plan.budget.costs.protected)
    ffn = [torch.full((b.experts * b.neurons,), b.layer_index != first) for b in blocks]
    attention = [torch.full((b.kv_groups,), b.layer_index != first) for b in blocks]
    prune(plan.skeleton, Masks(ffn, attention))  # the result is not needed, only its error
