"""The budget: the cost of every unit, its parameters, and how much has to go; counted, never estimated."""

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
    """Parameters per unit, numbers of units, and what units cost in the currency of the budget, per block.

    Where a block has experts, its neurons go in *slots*: slot j is the j-th neuron of every expert, in the order of
    each expert's own margins, so that experts stay equally wide. A slot has the parameters of all its neurons.
    """

    neuron: list[int]  # parameters of a neuron or slot
    group: list[int]  # parameters of a KV group
    neurons: list[int]  # neurons or slots
    groups: list[int]  # KV groups
    attention: bool  # whether KV groups may go
    experts: tuple[int, ...] = ()  # empty: one each
    protected: frozenset[int] = frozenset()  # blocks that keep everything
    uniform: bool = False  # all blocks end up equally wide
    block: tuple[int, ...] = ()  # parameters of a whole block, norms included
    block_share: float = 0.0  # of a target, that whole blocks may take; 0: they are not in scope
    gone: tuple[int, ...] = ()  # blocks that go as a whole, in the order in which they were chosen
    layers: tuple[int, ...] = ()  # number of each block's layer, which goes with all of its blocks; empty: one each
    price: Price | None = None  # None: parameters are the currency

    @cached_property
    def prices(self) -> Price:
        """What blocks cost in the budget's currency, by what they keep."""
        costs = [*zip(self.neuron, self.group, self.block or self.group, strict=True)]
        return self.price or Price.by_unit((costs, 0), self.neurons, self.groups)

    @property
    def in_parameters(self) -> UnitCosts:
        """The same units, their parameters being what they cost."""
        return replace(self, price=None)

    @property
    def stay(self) -> list[int]:
        """Blocks that do not go as a whole."""
        return [b for b in range(len(self.neurons)) if b not in self.gone]

    @cached_property
    def by_layer(self) -> list[list[int]]:
        """The blocks of each layer."""
        layers = self.layers or range(len(self.neurons))
        return [[b for b, _ in own] for _, own in groupby(enumerate(layers), key=lambda pair: pair[1])]

    @property
    def gone_layers(self) -> list[int]:
        """Layers that go as a whole, in the order in which they were chosen."""
        return list(dict.fromkeys(next(i for i, own in enumerate(self.by_layer) if b in own) for b in self.gone))

    @property
    def open_layers(self) -> list[list[int]]:
        """The blocks of each layer that may go as a whole: one that is not protected and has units."""
        return [
            own for own in self.by_layer
            if not self.protected.intersection(own) and any(self.neurons[b] + self.groups[b] for b in own)
        ]  # fmt: skip

    @property
    def of_experts(self) -> tuple[int, ...]:
        """Experts of each block, 1 where there are none."""
        return self.experts or (1,) * len(self.neuron)

    @property
    def total(self) -> int:
        """Cost of all units in the scope (biases of down and output projections belong to no neuron or group)."""
        if self.block_share:
            return sum(self.prices.blocks)
        return sum(n[-1] + self.attention * g[-1] for n, g in zip(self.prices.neurons, self.prices.groups, strict=True))

    def removable(self, width_multiple: int) -> int:
        """Cost that can go while each open block that stays keeps `width_multiple` neurons and one KV group."""
        p = self.prices
        return sum(p.blocks[b] for b in self.gone) + sum(
            p.neurons[b][-1] - p.neurons[b][min(width_multiple, self.neurons[b])]
            + self.attention * (p.groups[b][-1] - p.groups[b][min(1, self.groups[b])])
            for b in self.stay if b not in self.protected
        )  # fmt: skip

    def removed(self, masks: Masks) -> int:
        """Cost that the masks remove: of units where a block stays, and of all of a block that goes, norms included."""
        removed, p = 0, self.prices
        for b, stays in enumerate(masks.blocks):
            neurons, groups = (int(kind[b].sum()) for kind in (masks.ffn, masks.attention))
            tables = (p.neurons[b], neurons // self.of_experts[b]), (p.groups[b], groups)
            removed += sum(table[-1] - table[kept] for table, kept in tables) if stays else p.blocks[b]
        return removed

    def fitting(self, blocks: Sequence[int], target: int) -> tuple[int, ...]:
        """Blocks of the layers that these are of, first one first, that fit the share of a target for whole blocks."""
        layer_of = {b: own for own in self.open_layers for b in own}
        layers = list({own[0]: own for own in (layer_of[b] for b in blocks if b in layer_of)}.values())
        spent = accumulate(sum(self.prices.blocks[b] for b in own) for own in layers)
        fit = layers[: sum(cost <= Fraction(str(self.block_share)) * target for cost in spent)]
        return tuple(b for own in fit for b in own)

    def with_gone(self, masks: Masks) -> Masks:
        """Masks of all blocks, from masks of those that stay."""
        ffn, attention = list(masks.ffn), list(masks.attention)
        for b in sorted(self.gone):
            ffn.insert(b, masks.ffn[0].new_zeros(self.of_experts[b] * self.neurons[b]))
            attention.insert(b, masks.attention[0].new_zeros(self.groups[b]))
        return Masks(ffn, attention)


def unit_costs(
    blocks: Sequence[Block], *, scope: str, protect: Sequence[int] = (), uniform: bool = False,
    block_share: float = 1.0, price: Price | None = None,
) -> UnitCosts:  # fmt: skip
    """Costs of a model's units for a `--sparsity.scope`.

    Args:
        protect: layers whose blocks keep everything; they may be counted from the end (-1).
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
        gone=tuple(range(len(blocks))) if whole else (),  # the first that fit stand in until they are chosen
        protected=frozenset(b.index for b in blocks if b.layer_index in kept),
        uniform=uniform,
        price=price,
        layers=tuple(b.layer_index for b in blocks),
    )


@dataclass(frozen=True)
class Budget:
    """How much has to go, the units it may come from, and the grid of widths."""

    costs: UnitCosts
    target: int  # to remove, in the currency of the costs
    width_multiple: int = 1  # widths that change end up on multiples of it
    asked: float | str | None = None  # what `target` was rounded up from

    @classmethod
    def of(
        cls, costs: UnitCosts, asked: float | str, width_multiple: int = 1, flag: str = "--sparsity.target"
    ) -> Budget:
        """The budget for what `--sparsity.target` says, such as a share in (0, 1) of the scope's cost, rounded up.

        For a quality it is the largest budget that these units allow: a run finds the one that keeps the quality.

        Of the blocks that are to go as a whole, as many go, first chosen first, as fit their share of it.

        Raises:
            UserError: for a width multiple that does not fit; and naming `--flag`, for a target that the rule of one
                unit per block (one `width_multiple` of neurons, one KV group) makes impossible.
        """
        if width_multiple > (narrow := min(filter(None, costs.neurons))):  # of all blocks that have an FFN
            raise UserError(f"--sparsity.width_multiple must be 1 to {narrow} neurons; got {width_multiple}.")
        goal, total, model = Target.of(asked), costs.total, costs.prices.model
        if goal.unit == "quality" and (largest := cls(costs, 0, width_multiple, asked).largest()).target:
            return largest
        if goal.unit == "quality" or (target := goal.removes(total, model)) < 1:
            raise UserError(f"{flag} {asked} cannot remove anything: the scope has {total:,}, the model {model:,}.")
        costs = replace(costs, gone=costs.fitting(costs.gone, target))
        removable = costs.removable(width_multiple)
        if target > removable:
            raise UserError(
                f"{flag} must be {goal.limit(removable, total, model)}, because each block keeps {width_multiple} "
                f"neurons and a KV group, and {len(costs.protected)} blocks keep everything; got {asked}."
            )
        return cls(costs, target, width_multiple, asked)

    def at(self, sparsity: float) -> Budget:
        """The budget of the same units and grid at another sparsity, one of `--evaluation.curve`."""
        return Budget.of(self.costs, sparsity, self.width_multiple, flag="--evaluation.curve")

    def without(self, blocks: Sequence[int]) -> Budget:
        """This budget with those of these blocks gone, first one first, that fit their share."""
        return Budget.of(replace(self.costs, gone=tuple(blocks)), self.asked or self.sparsity, self.width_multiple)

    def removing(self, target: int) -> Budget:
        """The budget of the same units and grid that removes this cost, which the units allow."""
        costs = replace(self.costs, gone=self.costs.fitting(self.costs.gone, target))
        return Budget(costs, target, self.width_multiple)

    def largest(self) -> Budget:
        """The largest budget of the same units and grid.

        How much can go depends on the whole blocks that go, and they on how much has to go: from above, the first cost
        that the blocks that fit its share allow.
        """
        target, allowed = 0, self.costs.total
        while target != allowed:
            target, gone = allowed, self.costs.fitting(self.costs.gone, allowed)
            allowed = min(target, replace(self.costs, gone=gone).removable(self.width_multiple))
        return replace(self.removing(target), asked=self.asked)

    @property
    def step(self) -> int:
        """The smallest cost by which masks differ, such as that of `width_multiple` neurons of one block, or of all."""
        p, costs, grid = self.costs.prices, self.costs, self.width_multiple
        odd = [(len(table) - 1) % grid or grid for table in p.neurons]  # neurons of the first step, onto the grid
        tables = [*zip(p.neurons, odd, strict=True), *((table, 1) for table in p.groups if costs.attention)]
        steps = [table[-1] - table[-1 - size] for table, size in tables if size < len(table)]
        return (sum if costs.uniform else min)([cost for cost in steps if cost > 0] or [1])

    @property
    def rest(self) -> Budget:
        """What whole blocks leave of the target, for the units of the blocks that stay."""
        costs, p = self.costs, self.costs.prices
        kinds = costs.neuron, costs.group, costs.neurons, costs.groups, costs.of_experts, p.neurons, p.groups, p.blocks
        neuron, group, neurons, groups, experts, *price = ([kind[b] for b in costs.stay] for kind in kinds)
        protected, price = frozenset(costs.stay.index(b) for b in costs.protected), Price(*price)
        left = UnitCosts(
            neuron, group, neurons, groups, costs.attention, tuple(experts), protected, costs.uniform, price=price
        )
        return Budget(left, self.target - sum(p.blocks[b] for b in costs.gone), self.width_multiple)

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's cost that has to go."""
        return self.asked if isinstance(self.asked, float) else self.target / self.costs.total


def least_missed(budget: Budget, loss: Callable[[list[int]], float]) -> list[int]:
    """Blocks that go as a whole, as many as fit: those of the layer without which the loss is lowest, then again with
    it gone."""
    costs, gone = budget.costs, []
    while fit := [
        own for own in costs.by_layer
        if own[0] not in gone and own[0] in costs.fitting([*gone, own[0]], budget.target)
    ]:  # fmt: skip
        gone += min(fit, key=lambda own: loss([*gone, *own]))
    return gone
