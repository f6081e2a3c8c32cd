"""Whole blocks: the scope `blocks`, and the allocation `depth`, which removes little else.

Blocks are removed by whole layers. With the scope `blocks`, blocks are chosen before sparsity is allocated, and make up
at most `--sparsity.block_share` of the target (`Budget.removed`). With `depth`, they make up all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gprune.errors import UserError
from gprune.sparsity.allocation import allocation
from gprune.sparsity.units import UNITS, Unit

if TYPE_CHECKING:  # allocations are imported to check flags, which should not wait for PyTorch
    from transformers import PreTrainedModel

    from gprune.calibration.statistics import CorpusStatistics
    from gprune.importance.scores import Scores
    from gprune.models.blocks import Block
    from gprune.models.masks import Masks
    from gprune.sparsity.budget import Budget


def choose_blocks(budget: Budget, loss: Callable[[list[int]], float]) -> list[int]:
    """Choose blocks to remove as a whole, greedily by the loss of the model without them.

    In each round the layer is added without which the loss is lowest, as long as a layer fits into the budget.
    """
    chosen: list[int] = []
    while True:
        candidates = [
            blocks for blocks in budget.by_layer
            if blocks[0] not in chosen and blocks[0] in budget.blocks_that_fit([*chosen, blocks[0]], budget.target)
        ]  # fmt: skip
        if not candidates:
            return chosen
        chosen += min(candidates, key=lambda blocks: loss([*chosen, *blocks]))


class WholeBlocks(Unit):
    """Whole blocks, by layer. They are chosen before units of the other blocks."""

    flags = ("block_share", "block_choice")

    def reads_drift(self, sparsity: Any) -> bool:
        return sparsity.block_choice == "loss"

    def forward_passes(self, sparsity: Any, budget: Budget) -> int:
        """Return how often `choose_blocks` measures the loss, for as many removed layers as the budget has.

        Each round has a trial for every layer that is left, so one less than the round before.
        """
        if sparsity.block_choice != "loss":
            return 0
        open_layers = sum(budget.protected.isdisjoint(blocks) for blocks in budget.by_layer)
        return sum(range(open_layers, open_layers - len(removed_layers(budget)), -1))

    def describe(self, budget: Budget) -> str:
        return f"{len(removed_layers(budget))} are removed as a whole"


UNITS["blocks"] = WholeBlocks()


def removed_layers(budget: Budget) -> list[int]:
    """Return the layers that are removed as a whole, in the order of choice."""
    return list(dict.fromkeys(budget.units[block].layer for block in budget.removed))


@allocation("depth", whole_blocks=True)
def depth(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Masks:
    """Remove whole blocks, least influential first: ShortGPT (arXiv 2403.03853), BI_b = 1 - E cos(x_b, x_b+1).

    Blocks are removed until the next one would exceed the target. The next block only loses its lowest-scoring neurons,
    so that the baseline removes as many parameters as other methods. If its FFN is too small for that, the block is
    removed too. A removed block includes attention and norms, whatever the scope. A width that changes becomes a
    multiple of the budget's `width_multiple`. `checked_budget` rejects targets that would leave no block.
    """
    import torch

    from gprune.models.masks import Masks
    from gprune.sparsity.cut import top_of_experts

    masks = Masks([torch.ones(b.experts * b.neurons, dtype=torch.bool) for b in blocks],
                  [torch.ones(b.kv_groups, dtype=torch.bool) for b in blocks])  # fmt: skip
    remaining = budget.target  # the cost that is still to be removed
    for layer in _layers_by_influence(statistics, budget):
        units = {b: budget.units[b] for b in layer}
        if remaining <= 0 or any(of_block.protected for of_block in units.values()):
            continue
        largest = max(layer, key=lambda b: budget.units[b].costs.neurons[-1])  # the block with the largest FFN
        by_width = units[largest].costs.neurons
        widths = range(0, units[largest].neurons, budget.width_multiple)
        wide_enough = [width for width in widths if by_width[-1] - by_width[width] >= remaining]
        kept_width = max(wide_enough, default=0)
        whole_cost = sum(of_block.costs.whole for of_block in units.values())
        if remaining < whole_cost and kept_width > 0:
            experts = units[largest].experts
            masks.ffn[largest] = top_of_experts(scores.ffn[largest], kept_width, experts=experts)
            break
        for b in layer:
            masks.ffn[b][:] = False
            masks.attention[b][:] = False
        remaining -= whole_cost
    return masks


def _layers_by_influence(statistics: CorpusStatistics, budget: Budget) -> list[list[int]]:
    """Return the blocks of each layer, the least influential layer first.

    All blocks of a layer have the same influence.
    """
    layer_of = {block: blocks for blocks in budget.by_layer for block in blocks}
    order = [layer_of[block] for block in statistics.influence.argsort(stable=True).tolist()]
    return list({blocks[0]: blocks for blocks in order}.values())  # each layer once


def checked_budget(budget: Budget, dense: PreTrainedModel, *, depth: bool) -> Budget:
    """Check that whole blocks of a model without weights can be removed, and return the budget.

    For the allocation `depth` the budget is limited.
    """
    if depth:
        budget = _limit_to_depth(budget)
    if depth or budget.block_share:
        check_attention_remains(dense, budget)
    if depth or budget.removed:
        _check_renumbering(dense, budget)
    return budget


def _limit_to_depth(budget: Budget) -> Budget:
    """Limit a budget to the cost of all whole blocks except one.

    A target whose cost is searched for is lowered to that limit.
    """
    layers = [layer for layer in budget.by_layer if budget.protected.isdisjoint(layer)]
    layer_costs = [sum(budget.units[block].costs.whole for block in layer) for layer in layers]
    kept = 0 if budget.protected else max(layer_costs)  # protected blocks are kept, otherwise the largest layer
    removable = sum(layer_costs) - kept
    if budget.is_searched:
        return replace(budget.removing(min(budget.target, removable)), setting=budget.setting)
    if budget.target > removable:
        raise UserError(
            f"--sparsity.allocation depth cannot remove {budget.target:,}: whole blocks are at most {removable:,} if "
            "one block is kept. Use a lower --sparsity.target."
        )
    return budget


def check_attention_remains(dense: PreTrainedModel, budget: Budget) -> None:
    """Raise UserError if a budget allows removing all layers with attention of a model that has others too.

    Without attention, generation with a cache fails, because recurrent layers do not count tokens.
    """
    from gprune.models.surgery import attention_by_layer

    has_attention = attention_by_layer(dense.config)
    if all(has_attention) or not any(has_attention):
        return
    layers = [blocks for blocks, has in zip(budget.by_layer, has_attention, strict=True) if has]
    if any(blocks not in budget.removable_layers for blocks in layers):
        return
    layer_costs = [sum(budget.units[block].costs.whole for block in blocks) for blocks in layers]
    limit = budget.block_share * budget.target if budget.block_share else budget.target
    # The last removed layer may exceed the target.
    if sum(layer_costs) - max(layer_costs) < limit:
        numbers = [layer for layer, has in enumerate(has_attention) if has]
        raise UserError(
            f"--sparsity.protect must name a layer with attention of model type '{dense.config.model_type}' if whole "
            f"blocks are removed, because generation needs one; these are {numbers}, such as --sparsity.protect "
            f"[{numbers[-1]}]."
        )


def _check_renumbering(dense: PreTrainedModel, budget: Budget) -> None:
    """Raise UserError if other layers would change when a layer is removed and the following ones are renumbered.

    The first removable layer of the model without weights is removed, and `prune` compares the others.
    """
    import torch

    from gprune.models.masks import Masks
    from gprune.models.surgery import prune

    first = min(block.layer for block in budget.units if not block.protected)
    ffn = [torch.full((block.experts * block.neurons,), block.layer != first) for block in budget.units]
    attention = [torch.full((block.groups,), block.layer != first) for block in budget.units]
    prune(dense, Masks(ffn, attention))  # the result is not needed, only its error
