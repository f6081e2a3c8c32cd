"""The budget: the exact cost of every unit, such as its number of parameters, and the cost to be removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, groupby

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
        costs = [*zip(self.neuron, self.group, self.block or self.group, strict=True)]
        return self.price or Price.by_unit((costs, 0), self.neurons, self.groups)

    @property
    def in_parameters(self) -> UnitCosts:
        """The same units with parameters as the currency."""
        return replace(self, price=None)

    @property
    def stay(self) -> list[int]:
        """Blocks that are not removed as a whole."""
        return [b for b in range(len(self.neurons)) if b not in self.removed_blocks]

    @cached_property
    def by_layer(self) -> list[list[int]]:
        """The blocks of each layer."""
        layers = self.layers or range(len(self.neurons))
        return [[b for b, _ in own] for _, own in groupby(enumerate(layers), key=lambda pair: pair[1])]

    @property
    def removed_layers(self) -> list[int]:
        """Layers that are removed as a whole, in the order of choice."""
        layer_of = {block: layer for layer, own in enumerate(self.by_layer) for block in own}
        return list(dict.fromkeys(layer_of[block] for block in self.removed_blocks))

    @property
    def open_layers(self) -> list[list[int]]:
        """The blocks of each layer that may be removed as a whole: it has units and no protected block."""
        return [
            own for own in self.by_layer
            if not self.protected.intersection(own) and any(self.neurons[b] + self.groups[b] for b in own)
        ]  # fmt: skip

    @property
    def of_experts(self) -> tuple[int, ...]:
        """Number of experts of each block; 1 without experts."""
        return self.experts or (1,) * len(self.neuron)

    @property
    def total(self) -> int:
        """Cost of all units in scope. Biases of down and output projections belong to no unit."""
        if self.block_share:
            return sum(self.prices.blocks)
        return sum(n[-1] + self.attention * g[-1] for n, g in zip(self.prices.neurons, self.prices.groups, strict=True))

    def removable(self, width_multiple: int) -> int:
        """Return the largest removable cost, if every block keeps at least `width_multiple` neurons and one KV group.

        Protected blocks keep everything, and blocks in `removed_blocks` nothing.
        """
        p = self.prices
        return sum(p.blocks[b] for b in self.removed_blocks) + sum(
            p.neurons[b][-1] - p.neurons[b][min(width_multiple, self.neurons[b])]
            + self.attention * (p.groups[b][-1] - p.groups[b][min(1, self.groups[b])])
            for b in self.stay if b not in self.protected
        )  # fmt: skip

    def removed(self, masks: Masks) -> int:
        """Return the cost that masks remove. For a block that keeps nothing this is the whole block with its norms."""
        removed, p = 0, self.prices
        for b, stays in enumerate(masks.blocks):
            neurons, groups = (int(kind[b].sum()) for kind in (masks.ffn, masks.attention))
            tables = (p.neurons[b], neurons // self.of_experts[b]), (p.groups[b], groups)
            removed += sum(table[-1] - table[kept] for table, kept in tables) if stays else p.blocks[b]
        return removed

    def fitting(self, blocks: Sequence[int], target: int) -> tuple[int, ...]:
        """Return as many of these blocks, in this order and by whole layers, as fit the target's `block_share`."""
        layer_of = {b: own for own in self.open_layers for b in own}
        layers = list({own[0]: own for own in (layer_of[b] for b in blocks if b in layer_of)}.values())
        spent = accumulate(sum(self.prices.blocks[b] for b in own) for own in layers)
        fit = layers[: sum(cost <= Fraction(str(self.block_share)) * target for cost in spent)]
        return tuple(b for own in fit for b in own)

    def with_gone(self, masks: Masks) -> Masks:
        """Return masks of all blocks, from masks of the blocks that are not removed as a whole."""
        ffn, attention = list(masks.ffn), list(masks.attention)
        for b in sorted(self.removed_blocks):
            ffn.insert(b, masks.ffn[0].new_zeros(self.of_experts[b] * self.neurons[b]))
            attention.insert(b, masks.attention[0].new_zeros(self.groups[b]))
        return Masks(ffn, attention)


def unit_costs(
    blocks: Sequence[Block], *, scope: str, protect: Sequence[int] = (), uniform: bool = False,
    block_share: float = 1.0, price: Price | None = None,
) -> UnitCosts:  # fmt: skip
    """Return the costs of a model's units for a `--sparsity.scope`.

    Args:
        protect: layers whose blocks keep everything; negative numbers count from the end.
    """
    depth, whole = len(by_layer(blocks)), "blocks" in scope
    for index in protect:
        if not -depth <= index < depth:
            raise UserError(
                f"--sparsity.protect must name layers from {-depth} to {depth - 1}, as there are {depth}; got {index}."
            )
    kept = {index % depth for index in protect}
    return UnitCosts(
        neuron=[b.unit_cost("ffn") for b in blocks],
        group=[b.unit_cost("attention") for b in blocks],
        neurons=[b.neurons for b in blocks],
        groups=[b.kv_groups for b in blocks],
        attention="attention" in scope,
        experts=tuple(b.experts for b in blocks),
        block=tuple(b.cost for b in blocks),
        block_share=block_share if whole else 0.0,
        removed_blocks=tuple(range(len(blocks))) if whole else (),  # placeholders until blocks are chosen
        protected=frozenset(b.index for b in blocks if b.layer_index in kept),
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
    asked: float | str | None = None  # `--sparsity.target`, before it was rounded up to `target`

    @classmethod
    def of(
        cls, costs: UnitCosts, asked: float | str, width_multiple: int = 1, flag: str = "--sparsity.target"
    ) -> Budget:
        """Return the budget for a `--sparsity.target`, such as a share in (0, 1) of the scope's cost, rounded up.

        For a quality target this is the largest possible budget; the run then searches for one that keeps the quality.
        Blocks in `costs.removed_blocks` are removed as a whole, in their order, as far as they fit into `block_share`.

        Args:
            costs: costs of the units.
            asked: the target.
            width_multiple: the grid of widths.
            flag: the flag that errors name.

        Raises:
            UserError: if the width multiple is larger than a block; if the target removes nothing; or if it leaves a
                block less than `width_multiple` neurons or one KV group.
        """
        if width_multiple > (narrow := min(filter(None, costs.neurons))):  # of all blocks that have an FFN
            raise UserError(f"--sparsity.width_multiple must be 1 to {narrow} neurons; got {width_multiple}.")
        goal, total, model = Target.of(asked), costs.total, costs.prices.model
        if goal.unit == "quality" and (largest := cls(costs, 0, width_multiple, asked).largest()).target:
            return largest
        if goal.unit == "quality" or (target := goal.removes(total, model)) < 1:
            raise UserError(f"{flag} {asked} cannot remove anything: the scope has {total:,}, the model {model:,}.")
        costs = replace(costs, removed_blocks=costs.fitting(costs.removed_blocks, target))
        removable = costs.removable(width_multiple)
        if target > removable:
            raise UserError(
                f"{flag} must be {goal.limit(removable, total, model)}, because each block keeps {width_multiple} "
                f"neurons and a KV group, and {len(costs.protected)} blocks keep everything; got {asked}."
            )
        return cls(costs, target, width_multiple, asked)

    def at(self, sparsity: float) -> Budget:
        """Return the budget of the same units and grid at a sparsity of `--evaluation.curve`."""
        return Budget.of(self.costs, sparsity, self.width_multiple, flag="--evaluation.curve")

    def without(self, blocks: Sequence[int]) -> Budget:
        """Return this budget with as many of these blocks removed as a whole, in this order, as fit."""
        return Budget.of(
            replace(self.costs, removed_blocks=tuple(blocks)), self.asked or self.sparsity, self.width_multiple
        )

    def removing(self, target: int) -> Budget:
        """Return the budget of the same units and grid that removes this cost, which must be possible."""
        costs = replace(self.costs, removed_blocks=self.costs.fitting(self.costs.removed_blocks, target))
        return Budget(costs, target, self.width_multiple)

    def largest(self) -> Budget:
        """Return the largest possible budget of the same units and grid.

        The removable cost depends on the blocks that are removed as a whole, and these depend on the target. The target
        is lowered from the total cost until it is removable.
        """
        target, allowed = 0, self.costs.total
        while target != allowed:
            target, removed = allowed, self.costs.fitting(self.costs.removed_blocks, allowed)
            allowed = min(target, replace(self.costs, removed_blocks=removed).removable(self.width_multiple))
        return replace(self.removing(target), asked=self.asked)

    @property
    def step(self) -> int:
        """The smallest difference in cost between masks: `width_multiple` neurons of a block, or of all if uniform."""
        p, costs, grid = self.costs.prices, self.costs, self.width_multiple
        # Neurons of the first step, which reaches the grid.
        odd = [(len(table) - 1) % grid or grid for table in p.neurons]
        tables = [*zip(p.neurons, odd, strict=True), *((table, 1) for table in p.groups if costs.attention)]
        steps = [table[-1] - table[-1 - size] for table, size in tables if size < len(table)]
        return (sum if costs.uniform else min)([cost for cost in steps if cost > 0] or [1])

    @property
    def rest(self) -> Budget:
        """The remaining budget for units of other blocks, after blocks were removed as a whole."""
        costs, p = self.costs, self.costs.prices
        kinds = costs.neuron, costs.group, costs.neurons, costs.groups, costs.of_experts, p.neurons, p.groups, p.blocks
        neuron, group, neurons, groups, experts, *price = ([kind[b] for b in costs.stay] for kind in kinds)
        protected, price = frozenset(costs.stay.index(b) for b in costs.protected), Price(*price)
        left = UnitCosts(
            neuron, group, neurons, groups, costs.attention, tuple(experts), protected, costs.uniform, price=price
        )
        return Budget(left, self.target - sum(p.blocks[b] for b in costs.removed_blocks), self.width_multiple)

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's cost that is to be removed."""
        return self.asked if isinstance(self.asked, float) else self.target / self.costs.total


def least_missed(budget: Budget, loss: Callable[[list[int]], float]) -> list[int]:
    """Choose blocks to remove as a whole, greedily: the layer without which the loss is lowest, then the next one, as
    long as they fit."""
    costs, removed = budget.costs, []
    while fit := [
        own for own in costs.by_layer
        if own[0] not in removed and own[0] in costs.fitting([*removed, own[0]], budget.target)
    ]:  # fmt: skip
        removed += min(fit, key=lambda own: loss([*removed, *own]))
    return removed
