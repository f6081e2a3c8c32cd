"""The budget: the units of every block with their exact costs, and the cost to be removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.models.blocks import Block, by_layer
from gprune.models.masks import Masks, bypassed
from gprune.sparsity.cost import BlockCosts, cost_beyond
from gprune.sparsity.target import Target, format_cost


@dataclass(frozen=True)
class BlockUnits:
    """Units of one block, what they cost, and which of them may be removed.

    In blocks with experts neurons are removed in *slots*, so that experts stay equally wide. Slot j has the j-th neuron
    of every expert, in the order of that expert's margins. The cost of a slot is the sum over its neurons.
    """

    costs: BlockCosts  # in the currency of the budget
    parameters: BlockCosts  # in parameters
    layer: int  # index of the decoder layer, which is removed with all its blocks
    experts: int = 1
    attention: bool = False  # whether KV groups may be removed
    protected: bool = False  # whether the block keeps everything
    ffn: bool = True  # whether neurons may be removed

    @property
    def neurons(self) -> int:
        """Number of neurons (or slots)."""
        return len(self.costs.neurons) - 1

    @property
    def all_neurons(self) -> int:
        """Number of neurons of all experts together."""
        return self.experts * self.neurons

    @property
    def groups(self) -> int:
        """Number of KV groups."""
        return len(self.costs.groups) - 1

    def removable_neurons(self, width_multiple: int) -> int:
        """Number of neurons (or slots) that may be removed; `width_multiple` neurons are kept."""
        return max(0, self.neurons - width_multiple) if self.ffn and not self.protected else 0

    @property
    def removable_groups(self) -> int:
        """Number of KV groups that may be removed; one is kept."""
        return max(0, self.groups - 1) if self.attention and not self.protected else 0

    def removable(self, width_multiple: int) -> int:
        """Return the cost of all units that may be removed."""
        cost = cost_beyond(self.costs.neurons, self.neurons - self.removable_neurons(width_multiple))
        return cost + cost_beyond(self.costs.groups, self.groups - self.removable_groups)


def block_units(
    blocks: Sequence[Block], *, scope: str, protect: Sequence[int] = (), costs: Sequence[BlockCosts] | None = None
) -> list[BlockUnits]:
    """Return the units of a model's blocks for a `--sparsity.scope`, with costs in parameters by default."""
    depth = len(by_layer(blocks))
    for index in protect:
        if not -depth <= index < depth:
            raise UserError(
                f"--sparsity.protect must name layers from {-depth} to {depth - 1}, as there are {depth}; got {index}."
            )
    protected_layers = {index % depth for index in protect}
    parameters = [
        BlockCosts.by_unit(
            b.unit_cost("ffn"), b.unit_cost("attention"), b.cost, b.expert_cost(), neurons=b.neurons, groups=b.kv_groups
        )
        for b in blocks
    ]  # fmt: skip
    return [
        BlockUnits(
            of_block, in_parameters, block.layer_index, block.experts, attention="attention" in scope,
            protected=block.layer_index in protected_layers, ffn="ffn" in scope,
        )
        for block, of_block, in_parameters in zip(blocks, costs or parameters, parameters, strict=True)
    ]  # fmt: skip


def narrowest_width(units: Iterable[BlockUnits]) -> int:
    """Return the width of the narrowest FFN; blocks without an FFN do not count."""
    return min(block.neurons for block in units if block.neurons)


def default_width_multiple(units: Sequence[BlockUnits]) -> int:
    """Return the width multiple of `--sparsity.width_multiple default`.

    It is 8 for models with experts, for their grouped kernels, and 32 for others, for the blocks of q8_0. It is 1 if
    that is more than a sixteenth of the narrowest FFN.
    """
    multiple = 8 if max(block.experts for block in units) > 1 else 32
    return multiple if 16 * multiple <= narrowest_width(units) else 1


@dataclass(frozen=True)
class Budget:
    """The units of all blocks, the cost to be removed from them, and the widths that are possible."""

    units: Sequence[BlockUnits]  # one per block
    target: int  # cost to be removed
    width_multiple: int = 1  # widths that change become multiples of it
    uniform: bool = False  # whether all blocks must have the same widths
    block_share: float = 0.0  # share of the target that may be removed as whole blocks; 0: they are not in scope
    outside: int = 0  # cost of everything outside of blocks
    removed: tuple[int, ...] = ()  # blocks that are removed as a whole, in the order of choice
    setting: float | str | None = None  # `--sparsity.target`, before it was rounded up to `target`

    @classmethod
    def of(
        cls, units: Sequence[BlockUnits], setting: float | str, width_multiple: int = 1, *, uniform: bool = False,
        block_share: float = 0.0, outside: int = 0, **of_class: Any,
    ) -> Self:  # fmt: skip
        """Return the budget for a `--sparsity.target`, such as a share in (0, 1) of the scope's cost, rounded up.

        If whole blocks are in scope, the first ones are removed, until others are chosen (`without`). `of_class` has
        the fields of a subclass.
        """
        nothing = cls(units, 0, width_multiple, uniform, block_share, outside, **of_class)
        return nothing.meeting(setting, order=range(len(units)) if block_share else ())

    def meeting(self, setting: float | str, *, order: Iterable[int], flag: str = "--sparsity.target") -> Self:
        """Return the budget of the same units for another target. UserError, which names `flag`, if it cannot be met.

        Blocks are removed as a whole in the given order, as far as they fit into `block_share`. For a target whose cost
        is searched for, this is the largest possible budget.
        """
        narrowest = narrowest_width(self.units)
        if self.width_multiple > narrowest:
            raise UserError(f"--sparsity.width_multiple must be 1 to {narrowest} neurons; got {self.width_multiple}.")
        order = tuple(order)
        goal = Target.of(setting)
        if goal.is_searched:
            largest = replace(self, removed=order).removing(self.total)
            if largest.target:
                return replace(largest, setting=setting)
        target = 0 if goal.is_searched else goal.removes(self.total, self.model)
        if target < 1:
            currency = goal.unit if goal.unit in ("parameters", "bytes") else ""
            scope, model = (format_cost(cost, currency).strip() for cost in (self.total, self.model))
            raise UserError(f"{flag} {setting} cannot remove anything: the scope has {scope}, the model {model}.")
        budget = replace(self, target=target, removed=self.blocks_that_fit(order, target), setting=setting)
        if target > budget.removable:
            protected = sum(block.protected for block in self.units)
            raise UserError(
                f"{flag} must be {goal.limit(budget.removable, self.total, self.model)}, because {self.least}, and "
                f"{protected} blocks keep everything; got {setting}."
            )
        if target < budget.unavoidable:
            raise UserError(
                f"{flag} must be {goal.limit(budget.unavoidable, self.total, self.model, least=True)}, because "
                f"--sparsity.uniform_width cuts every block to the narrowest one; got {setting}."
            )
        return budget

    def at(self, sparsity: float) -> Self:
        """Return the budget of the same units and possible widths at a sparsity of `--evaluation.curve`."""
        return self.meeting(sparsity, order=self.removed, flag="--evaluation.curve")

    def without(self, blocks: Iterable[int]) -> Self:
        """Return this budget, with blocks removed as a whole: the given ones in order, as many as fit."""
        return self.meeting(self.setting or self.sparsity, order=blocks)

    def removing(self, target: int) -> Self:
        """Return the budget of the same units and possible widths that removes this cost, or the nearest possible cost.

        The removable cost depends on the blocks that are removed as a whole, and these depend on the target. The target
        is lowered until it is removable. It is raised only if blocks of different widths must have the same widths.
        """
        while True:
            budget = replace(self, target=target, removed=self.blocks_that_fit(self.removed, target), setting=None)
            if target <= budget.removable:
                return replace(budget, target=max(target, budget.unavoidable))
            target = budget.removable

    @property
    def least(self) -> str:
        """What every block keeps in any case, in words."""
        return f"each block keeps {self.width_multiple} neurons and a KV group"

    # Hooks of `expert_budget.ExpertBudget`, which also removes whole experts. Without them these change nothing.

    def ranked_by(self, scores: Any) -> Self:
        """Return the budget for these `importance.scores.Scores`, which choose what is removed whole."""
        return self

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells budgets of the same units and possible widths apart."""
        return (self.target,)

    def bypassing(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Context in which what is removed as a whole takes no part in the model."""
        return bypassed(model, self.removed)

    @property
    def kept_experts(self) -> list[int]:
        """Number of experts of each block that are not removed as a whole."""
        return [block.experts for block in self.units]

    def of_kept_neurons(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return values of all neurons, (E x N,) per block, without those of experts that are removed as a whole."""
        return list(values)

    def with_removed_neurons(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return keep masks of all neurons from those of kept experts: the inverse of `of_kept_neurons`."""
        return list(masks)

    @property
    def attention(self) -> bool:
        """Whether KV groups may be removed."""
        return any(block.attention for block in self.units)

    @property
    def protected(self) -> frozenset[int]:
        """Blocks that keep everything."""
        return frozenset(b for b, block in enumerate(self.units) if block.protected)

    @property
    def kept(self) -> list[int]:
        """Blocks that are not removed as a whole."""
        return [b for b in range(len(self.units)) if b not in self.removed]

    @cached_property
    def by_layer(self) -> list[list[int]]:
        """The blocks of each layer."""
        blocks_by_layer = groupby(range(len(self.units)), key=lambda block: self.units[block].layer)
        return [list(blocks) for _, blocks in blocks_by_layer]

    @property
    def removable_layers(self) -> list[list[int]]:
        """The blocks of each layer that may be removed as a whole: it has units and no protected block."""
        return [
            blocks for blocks in self.by_layer
            if not any(self.units[b].protected for b in blocks) and self._has_units(blocks)
        ]  # fmt: skip

    def _has_units(self, blocks: Sequence[int]) -> bool:
        return any(self.units[b].neurons + self.units[b].groups for b in blocks)

    @property
    def total(self) -> int:
        """Cost of all units in scope. Biases of down and output projections belong to no unit."""
        return self._in_scope([block.costs for block in self.units])

    @property
    def total_parameters(self) -> int:
        """Number of parameters of all units in scope."""
        return self._in_scope([block.parameters for block in self.units])

    def _in_scope(self, costs: Sequence[BlockCosts]) -> int:
        """Return the cost of all units in scope, from the costs of all blocks."""
        if self.block_share:
            return sum(of_block.whole for of_block in costs)
        return self._of_units(costs)

    def _of_units(self, costs: Sequence[BlockCosts]) -> int:
        """Return the cost of all neurons and of the KV groups in scope, from the costs of all blocks."""
        total = sum(of_block.neurons[-1] for of_block in costs)
        if self.attention:
            total += sum(of_block.groups[-1] for of_block in costs)
        return total

    @property
    def model(self) -> int:
        """Cost of the whole model."""
        return sum(block.costs.whole for block in self.units) + self.outside

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's cost that is to be removed."""
        return self.setting if isinstance(self.setting, float) else self.target / self.total

    @property
    def cost_of_blocks(self) -> int:
        """Cost of the blocks that are removed as a whole."""
        return sum(self.units[b].costs.whole for b in self.removed)

    @property
    def removable(self) -> int:
        """The largest removable cost, if every block keeps at least `width_multiple` neurons and one KV group.

        Protected blocks keep everything, and blocks in `removed` nothing.
        """
        kept = [self.units[b] for b in self.kept]
        return self.cost_of_blocks + sum(block.removable(self.width_multiple) for block in kept)

    @property
    def unavoidable(self) -> int:
        """The smallest cost that can be removed if all blocks must have the same widths; 0 if they may differ.

        Blocks of different widths are cut to the narrowest one, rounded down to a multiple, and blocks with different
        numbers of KV groups to the smallest number. Blocks in `removed` keep nothing.
        """
        if not self.uniform:
            return 0
        kept = [self.units[b].costs for b in self.kept]
        cost = self.cost_of_blocks
        cost += _cost_of_equal_numbers([of_block.neurons for of_block in kept], self.width_multiple)
        if self.attention:
            cost += _cost_of_equal_numbers([of_block.groups for of_block in kept], 1)
        return cost

    def removed_by(self, masks: Masks) -> int:
        """Return the cost that masks remove. For a block that keeps nothing this is the whole block with its norms."""
        return removed_cost([block.costs for block in self.units], masks)

    def parameters_removed_by(self, masks: Masks) -> int:
        """Return the number of parameters that masks remove."""
        return removed_cost([block.parameters for block in self.units], masks)

    @property
    def step(self) -> int:
        """The smallest difference in cost between masks: `width_multiple` neurons or a KV group of a block.

        If all blocks must have the same width, it is the sum of these over all blocks.
        """
        multiple = self.width_multiple
        step_costs = []
        for block in self.units:
            by_width = block.costs.neurons
            first_step = block.neurons % multiple or multiple  # neurons that make the width a multiple
            if first_step <= block.neurons:
                step_costs.append(by_width[-1] - by_width[-1 - first_step])
            if block.attention and block.groups:
                step_costs.append(block.costs.groups[-1] - block.costs.groups[-2])
        step_costs = [cost for cost in step_costs if cost > 0] or [1]
        return sum(step_costs) if self.uniform else min(step_costs)

    @property
    def largest_step(self) -> int:
        """The largest cost of one step: `width_multiple` neurons, or a KV group if attention is in scope.

        If all blocks must have the same width, a step is removed in every block.
        """
        combine = sum if self.uniform else max
        kept = [self.units[b].costs for b in self.kept]
        step = combine(_largest_difference(of_block.neurons, self.width_multiple) for of_block in kept)
        if self.attention:
            step = max(step, combine(_largest_difference(of_block.groups, 1) for of_block in kept))
        return step

    def blocks_that_fit(self, order: Sequence[int], target: int) -> tuple[int, ...]:
        """Choose blocks to remove as a whole, by whole layers in the given order of blocks.

        Layers are chosen as long as their total cost is at most `block_share` of the target, and at least one layer
        with units is kept. Blocks of layers that may not be removed are ignored.
        """
        layer_of = {block: blocks for blocks in self.removable_layers for block in blocks}
        # A layer is listed once, at the place of its first block.
        layers = {layer_of[block][0]: layer_of[block] for block in order if block in layer_of}
        total_costs = accumulate(sum(self.units[b].costs.whole for b in blocks) for blocks in layers.values())
        limit = Fraction(str(self.block_share)) * target  # of the decimal number, because a float is not exact
        layers_with_units = sum(self._has_units(blocks) for blocks in self.by_layer)
        number = min(sum(cost <= limit for cost in total_costs), layers_with_units - 1)
        return tuple(block for blocks in list(layers.values())[:number] for block in blocks)

    @cached_property
    def rest(self) -> Budget:
        """The remaining budget for units of the blocks that are not removed as a whole."""
        kept = [self.units[b] for b in self.kept]
        target = self.target - self.cost_of_blocks
        return replace(self, units=kept, target=target, removed=(), block_share=0.0, outside=0, setting=None)


def removed_cost(costs: Sequence[BlockCosts], masks: Masks) -> int:
    """Return the cost that masks remove, from the costs of all blocks.

    For a block that keeps nothing this is the whole block with its norms.
    """
    removed = 0
    for of_block, neurons, groups, is_kept in zip(costs, masks.ffn, masks.attention, masks.blocks, strict=True):
        if not is_kept:
            removed += of_block.whole
            continue
        width = len(of_block.neurons) - 1
        by_expert = neurons.view(-1, width or 1)  # kept experts keep equally many neurons, and removed ones none
        experts, kept = len(by_expert) or 1, int(by_expert.any(1).sum()) or 1
        removed += (experts - kept) * of_block.expert
        removed += cost_beyond(of_block.neurons, int(neurons.sum()) // kept) * kept // experts
        removed += cost_beyond(of_block.groups, int(groups.sum()))
    return removed


def _cost_of_equal_numbers(tables: Sequence[Sequence[int]], multiple: int) -> int:
    """Return the cost of cutting blocks to their smallest number of units, rounded down to a multiple; 0 if equal."""
    numbers = {len(table) - 1 for table in tables} - {0}  # a block may have no FFN or no attention
    if len(numbers) < 2:
        return 0
    return sum(cost_beyond(table, min(numbers) // multiple * multiple) for table in tables)


def _largest_difference(table: Sequence[int], size: int) -> int:
    """Return the largest cost of `size` consecutive units, from a table of `BlockCosts`."""
    return max((upper - lower for lower, upper in zip(table, table[size:], strict=False)), default=0)
