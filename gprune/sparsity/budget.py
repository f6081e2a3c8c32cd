"""The budget: the exact cost of every unit, such as its number of parameters, and the cost to be removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from gprune.errors import UserError
from gprune.models.blocks import Block, by_layer
from gprune.models.masks import Masks
from gprune.sparsity.cost import Price
from gprune.sparsity.target import Target


@dataclass(frozen=True)
class UnitCosts:
    """Per block: parameters per unit, numbers of units, and costs of units in the currency of the budget.

    In blocks with experts neurons are removed in *slots*, so that experts stay equally wide. Slot j has the j-th neuron
    of every expert, in the order of that expert's margins. The cost of a slot is the sum over its neurons.
    """

    neuron: list[int]  # parameters of a neuron or slot
    group: list[int]  # parameters of a KV group
    neurons: list[int]  # neurons or slots
    groups: list[int]  # KV groups
    attention: bool  # whether KV groups may be removed
    experts: tuple[int, ...] = ()  # experts of each block; empty: 1 each
    protected: frozenset[int] = frozenset()  # blocks that keep everything
    uniform: bool = False  # whether all blocks must have the same widths
    block: tuple[int, ...] = ()  # parameters of a whole block, norms included
    block_share: float = 0.0  # share of the target that may be removed as whole blocks; 0: not in scope
    removed_blocks: tuple[int, ...] = ()  # blocks that are removed as a whole, in the order of choice
    layers: tuple[int, ...] = ()  # layer of each block (a layer is removed with all its blocks); empty: one each
    price: Price | None = None  # None: the currency is parameters

    @cached_property
    def prices(self) -> Price:
        """Costs of blocks in the budget's currency, by the number of kept units."""
        if self.price is not None:
            return self.price
        # `group` is a placeholder of the same length if costs of whole blocks are not given, because none is removed.
        costs_by_block = list(zip(self.neuron, self.group, self.block or self.group, strict=True))
        return Price.by_unit((costs_by_block, 0), self.neurons, self.groups)

    @property
    def in_parameters(self) -> UnitCosts:
        """The same units with parameters as the currency."""
        return replace(self, price=None)

    @property
    def remaining_blocks(self) -> list[int]:
        """Indices of the blocks that are not removed as a whole."""
        return [b for b in range(len(self.neurons)) if b not in self.removed_blocks]

    @cached_property
    def by_layer(self) -> list[list[int]]:
        """The indices of the blocks of each layer."""
        layers = self.layers or range(len(self.neurons))
        blocks_by_layer = groupby(range(len(layers)), key=lambda block: layers[block])
        return [list(blocks) for _, blocks in blocks_by_layer]

    @property
    def removed_layers(self) -> list[int]:
        """Layers that are removed as a whole, in the order of choice."""
        layer_of = {block: layer for layer, blocks in enumerate(self.by_layer) for block in blocks}
        return list(dict.fromkeys(layer_of[block] for block in self.removed_blocks))

    @property
    def open_layers(self) -> list[list[int]]:
        """The blocks of each layer that may be removed as a whole: it has units and no protected block."""
        return [
            blocks for blocks in self.by_layer
            if self.protected.isdisjoint(blocks) and any(self.neurons[b] + self.groups[b] for b in blocks)
        ]  # fmt: skip

    @property
    def experts_per_block(self) -> tuple[int, ...]:
        """Number of experts of each block; 1 without experts."""
        return self.experts or (1,) * len(self.neuron)

    @property
    def total(self) -> int:
        """Cost of all units in scope. Biases of down and output projections belong to no unit."""
        if self.block_share:
            return sum(self.prices.blocks)
        total = sum(by_width[-1] for by_width in self.prices.neurons)
        if self.attention:
            total += sum(by_groups[-1] for by_groups in self.prices.groups)
        return total

    @property
    def narrowest(self) -> int:
        """Width of the narrowest FFN; blocks without an FFN do not count."""
        return min(width for width in self.neurons if width)

    @property
    def default_multiple(self) -> int:
        """The width multiple of `--sparsity.width_multiple default`.

        It is 8 for models with experts, for their grouped kernels, and 32 for others, for the blocks of q8_0. It is 1
        if that is more than a sixteenth of the narrowest FFN.
        """
        multiple = 8 if max(self.experts_per_block) > 1 else 32
        return multiple if 16 * multiple <= self.narrowest else 1

    def removable(self, width_multiple: int) -> int:
        """Return the largest removable cost, if every block keeps at least `width_multiple` neurons and one KV group.

        Protected blocks keep everything, and blocks in `removed_blocks` nothing.
        """
        prices = self.prices
        removable = sum(prices.blocks[b] for b in self.removed_blocks)
        for b in self.remaining_blocks:
            if b in self.protected:
                continue
            by_width, by_groups = prices.neurons[b], prices.groups[b]
            removable += by_width[-1] - by_width[min(width_multiple, self.neurons[b])]
            if self.attention:
                removable += by_groups[-1] - by_groups[min(1, self.groups[b])]
        return removable

    def unavoidable(self, width_multiple: int) -> int:
        """Return the smallest removable cost if all blocks must have the same widths; 0 if they have.

        Blocks of different widths are cut to the narrowest one, rounded down to a multiple, and blocks with different
        numbers of KV groups to the smallest number. Blocks in `removed_blocks` keep nothing.
        """
        if not self.uniform:
            return 0
        kinds = [(self.prices.neurons, self.neurons, width_multiple)]
        if self.attention:
            kinds.append((self.prices.groups, self.groups, 1))
        cost = sum(self.prices.blocks[b] for b in self.removed_blocks)
        for tables, units, multiple in kinds:
            with_units = [b for b in self.remaining_blocks if units[b]]  # a block may have no FFN or no attention
            if len({units[b] for b in with_units}) > 1:
                common = min(units[b] for b in with_units) // multiple * multiple
                cost += sum(tables[b][-1] - tables[b][common] for b in with_units)
        return cost

    def removed(self, masks: Masks) -> int:
        """Return the cost that masks remove. For a block that keeps nothing this is the whole block with its norms."""
        prices = self.prices
        removed = 0
        for b, keeps_units in enumerate(masks.blocks):
            if not keeps_units:
                removed += prices.blocks[b]
                continue
            kept_width = int(masks.ffn[b].sum()) // self.experts_per_block[b]
            kept_groups = int(masks.attention[b].sum())
            removed += prices.neurons[b][-1] - prices.neurons[b][kept_width]
            removed += prices.groups[b][-1] - prices.groups[b][kept_groups]
        return removed

    def blocks_that_fit(self, candidates: Sequence[int], target: int) -> tuple[int, ...]:
        """Choose blocks to remove as a whole, by whole layers in the order of the candidates.

        Layers are chosen as long as their total cost is at most `block_share` of the target, and another layer keeps
        its units. Candidates in layers that may not be removed are ignored.
        """
        layer_of = {block: blocks for blocks in self.open_layers for block in blocks}
        # A layer is listed once, at the place of its first candidate.
        layers = {layer_of[block][0]: layer_of[block] for block in candidates if block in layer_of}
        total_costs = accumulate(sum(self.prices.blocks[b] for b in blocks) for blocks in layers.values())
        limit = Fraction(str(self.block_share)) * target  # of the decimal number, because a float is not exact
        layers_with_units = sum(any(self.neurons[b] + self.groups[b] for b in blocks) for blocks in self.by_layer)
        number = min(sum(cost <= limit for cost in total_costs), layers_with_units - 1)
        return tuple(block for blocks in list(layers.values())[:number] for block in blocks)

    def with_removed_blocks(self, masks: Masks) -> Masks:
        """Return masks of all blocks, from masks of the blocks that are not removed as a whole."""
        ffn, attention = list(masks.ffn), list(masks.attention)
        for b in sorted(self.removed_blocks):
            ffn.insert(b, masks.ffn[0].new_zeros(self.experts_per_block[b] * self.neurons[b]))
            attention.insert(b, masks.attention[0].new_zeros(self.groups[b]))
        return Masks(ffn, attention)


def unit_costs(
    blocks: Sequence[Block], *, scope: str, protect: Sequence[int] = (), uniform: bool = False,
    block_share: float = 1.0, price: Price | None = None,
) -> UnitCosts:  # fmt: skip
    """Return the costs of a model's units for a `--sparsity.scope`."""
    depth = len(by_layer(blocks))
    with_blocks = "blocks" in scope
    for index in protect:
        if not -depth <= index < depth:
            raise UserError(
                f"--sparsity.protect must name layers from {-depth} to {depth - 1}, as there are {depth}; got {index}."
            )
    protected_layers = {index % depth for index in protect}
    return UnitCosts(
        neuron=[b.unit_cost("ffn") for b in blocks],
        group=[b.unit_cost("attention") for b in blocks],
        neurons=[b.neurons for b in blocks],
        groups=[b.kv_groups for b in blocks],
        attention="attention" in scope,
        experts=tuple(b.experts for b in blocks),
        block=tuple(b.cost for b in blocks),
        block_share=block_share if with_blocks else 0.0,
        removed_blocks=tuple(range(len(blocks))) if with_blocks else (),  # placeholders until blocks are chosen
        protected=frozenset(b.index for b in blocks if b.layer_index in protected_layers),
        uniform=uniform,
        price=price,
        layers=tuple(b.layer_index for b in blocks),
    )


@dataclass(frozen=True)
class Budget:
    """The cost to be removed, the units that may be removed, and the grid of widths."""

    costs: UnitCosts
    target: int  # cost to be removed, in the currency of `costs`
    width_multiple: int = 1  # widths that change become multiples of it
    setting: float | str | None = None  # `--sparsity.target`, before it was rounded up to `target`

    @classmethod
    def of(
        cls, costs: UnitCosts, setting: float | str, width_multiple: int = 1, flag: str = "--sparsity.target"
    ) -> Budget:
        """Return the budget for a `--sparsity.target`, such as a share in (0, 1) of the scope's cost, rounded up.

        For a quality target this is the largest possible budget; the run then searches for one that keeps the quality.
        Blocks in `costs.removed_blocks` are removed as a whole, in their order, as far as they fit into `block_share`.
        """
        if width_multiple > costs.narrowest:
            raise UserError(f"--sparsity.width_multiple must be 1 to {costs.narrowest} neurons; got {width_multiple}.")
        goal = Target.of(setting)
        total, model = costs.total, costs.prices.model
        if goal.unit == "quality":
            largest = cls(costs, 0, width_multiple, setting).largest()
            if largest.target:
                return largest
            target = 0
        else:
            target = goal.removes(total, model)
        if target < 1:
            raise UserError(f"{flag} {setting} cannot remove anything: the scope has {total:,}, the model {model:,}.")
        costs = replace(costs, removed_blocks=costs.blocks_that_fit(costs.removed_blocks, target))
        removable = costs.removable(width_multiple)
        if target > removable:
            raise UserError(
                f"{flag} must be {goal.limit(removable, total, model)}, because each block keeps {width_multiple} "
                f"neurons and a KV group, and {len(costs.protected)} blocks keep everything; got {setting}."
            )
        if target < (unavoidable := costs.unavoidable(width_multiple)):
            raise UserError(
                f"{flag} must be {goal.limit(unavoidable, total, model, least=True)}, because --sparsity.uniform_width "
                f"cuts every block to the narrowest one; got {setting}."
            )
        return cls(costs, target, width_multiple, setting)

    def at(self, sparsity: float) -> Budget:
        """Return the budget of the same units and grid at a sparsity of `--evaluation.curve`."""
        return Budget.of(self.costs, sparsity, self.width_multiple, flag="--evaluation.curve")

    def without(self, blocks: Sequence[int]) -> Budget:
        """Return this budget, with blocks removed as a whole: the given ones in order, as many as fit."""
        costs = replace(self.costs, removed_blocks=tuple(blocks))
        return Budget.of(costs, self.setting or self.sparsity, self.width_multiple)

    def removing(self, target: int) -> Budget:
        """Return the budget of the same units and grid that removes this cost, or the nearest possible one.

        The removable cost depends on the blocks that are removed as a whole, and these depend on the target. The target
        is lowered until it is removable. It is raised only if blocks of different widths must have the same widths.
        """
        while True:
            removed_blocks = self.costs.blocks_that_fit(self.costs.removed_blocks, target)
            costs = replace(self.costs, removed_blocks=removed_blocks)
            removable = costs.removable(self.width_multiple)
            if target <= removable:
                return Budget(costs, max(target, costs.unavoidable(self.width_multiple)), self.width_multiple)
            target = removable

    def largest(self) -> Budget:
        """Return the largest possible budget of the same units and grid."""
        return replace(self.removing(self.costs.total), setting=self.setting)

    @property
    def step(self) -> int:
        """The smallest difference in cost between masks: `width_multiple` neurons of a block, or of all if uniform."""
        costs = self.costs
        multiple = self.width_multiple
        step_costs = []
        for by_width in costs.prices.neurons:
            width = len(by_width) - 1
            first_step = width % multiple or multiple  # neurons of the first step, after which widths are multiples
            if first_step <= width:
                step_costs.append(by_width[-1] - by_width[-1 - first_step])
        if costs.attention:
            step_costs += [by_groups[-1] - by_groups[-2] for by_groups in costs.prices.groups if len(by_groups) > 1]
        step_costs = [cost for cost in step_costs if cost > 0] or [1]
        return sum(step_costs) if costs.uniform else min(step_costs)

    @property
    def rest(self) -> Budget:
        """The remaining budget for units of other blocks, after blocks were removed as a whole."""
        costs = self.costs
        prices = self.costs.prices
        remaining = self.costs.remaining_blocks

        def select(by_block: Sequence[Any]) -> list[Any]:
            """Return the entries of the remaining blocks."""
            return [by_block[b] for b in remaining]

        rest = UnitCosts(
            neuron=select(costs.neuron),
            group=select(costs.group),
            neurons=select(costs.neurons),
            groups=select(costs.groups),
            attention=costs.attention,
            experts=tuple(select(costs.experts_per_block)),
            protected=frozenset(remaining.index(b) for b in costs.protected),
            uniform=costs.uniform,
            price=Price(select(prices.neurons), select(prices.groups), select(prices.blocks)),
        )
        removed = sum(prices.blocks[b] for b in costs.removed_blocks)
        return Budget(rest, self.target - removed, self.width_multiple)

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's cost that is to be removed."""
        return self.setting if isinstance(self.setting, float) else self.target / self.costs.total


def choose_blocks(budget: Budget, loss: Callable[[list[int]], float]) -> list[int]:
    """Choose blocks to remove as a whole, greedily by the loss of the model without them.

    In each round the layer is added without which the loss is lowest, as long as a layer fits into the budget.
    """
    costs = budget.costs
    chosen: list[int] = []
    while True:
        candidates = [
            blocks for blocks in costs.by_layer
            if blocks[0] not in chosen and blocks[0] in costs.blocks_that_fit([*chosen, blocks[0]], budget.target)
        ]  # fmt: skip
        if not candidates:
            return chosen
        chosen += min(candidates, key=lambda blocks: loss([*chosen, *blocks]))
