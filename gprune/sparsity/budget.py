"""The budget: the cost of every unit, and the number of parameters that have to go; counted, never estimated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from gprune.errors import UserError
from gprune.models.blocks import Block
from gprune.models.masks import Masks


@dataclass(frozen=True)
class UnitCosts:
    """Parameters per unit, and numbers of units, per block.

    Where a block has experts, its neurons go in *slots*: slot j is the j-th neuron of every expert, in the order of
    each expert's own margins, so that experts stay equally wide. A slot costs the parameters of all its neurons.
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

    @property
    def stay(self) -> list[int]:
        """Blocks that do not go as a whole."""
        return [b for b in range(len(self.neurons)) if b not in self.gone]

    @property
    def of_experts(self) -> tuple[int, ...]:
        """Experts of each block, 1 where there are none."""
        return self.experts or (1,) * len(self.neuron)

    @property
    def total(self) -> int:
        """Parameters of all units in the scope (biases of down and output projections belong to no neuron or group)."""
        if self.block_share:
            return sum(self.block)
        units = zip(self.neuron, self.neurons, self.group, self.groups, strict=True)
        return sum(neuron * n + self.attention * group * g for neuron, n, group, g in units)

    def removable(self, width_multiple: int) -> int:
        """Parameters that can go while each open block that stays keeps `width_multiple` neurons and one KV group."""
        return sum(self.block[b] for b in self.gone) + sum(
            self.neuron[b] * (self.neurons[b] - width_multiple) + self.attention * self.group[b] * (self.groups[b] - 1)
            for b in self.stay if b not in self.protected
        )  # fmt: skip

    def removed(self, masks: Masks) -> int:
        """Parameters that the masks remove: units where a block stays, and all of a block that goes, norms included."""
        removed = 0
        for b, stays in enumerate(masks.blocks):
            neurons, groups = (int((~kind[b]).sum()) for kind in (masks.ffn, masks.attention))
            units = neurons // self.of_experts[b] * self.neuron[b] + groups * self.group[b]
            removed += units if stays else self.block[b]
        return removed

    def fitting(self, blocks: Sequence[int], target: int) -> tuple[int, ...]:
        """Those of these blocks, first one first, that fit the share of a target for whole blocks."""
        blocks = [b for b in blocks if b not in self.protected]
        spent = accumulate(self.block[b] for b in blocks)
        return tuple(blocks[: sum(parameters <= Fraction(str(self.block_share)) * target for parameters in spent)])

    def with_gone(self, masks: Masks) -> Masks:
        """Masks of all blocks, from masks of those that stay."""
        ffn, attention = list(masks.ffn), list(masks.attention)
        for b in sorted(self.gone):
            ffn.insert(b, masks.ffn[0].new_zeros(self.of_experts[b] * self.neurons[b]))
            attention.insert(b, masks.attention[0].new_zeros(self.groups[b]))
        return Masks(ffn, attention)


def unit_costs(
    blocks: Sequence[Block], *, scope: str, protect: Sequence[int] = (), uniform: bool = False, block_share: float = 1.0
) -> UnitCosts:  # fmt: skip
    """Costs of a model's units for a `--sparsity.scope`; blocks to `protect` may be counted from the end (-1)."""
    depth, whole = len(blocks), "blocks" in scope
    for index in protect:
        if not -depth <= index < depth:
            raise UserError(
                f"--sparsity.protect: expected blocks from {-depth} to {depth - 1}, got {index}; the model has {depth}."
            )
    return UnitCosts(
        neuron=[b.neuron_cost for b in blocks],
        group=[b.group_cost for b in blocks],
        neurons=[b.neurons for b in blocks],
        groups=[b.kv_groups for b in blocks],
        attention="attention" in scope,
        experts=tuple(b.experts for b in blocks),
        block=tuple(b.cost for b in blocks),
        block_share=block_share if whole else 0.0,
        gone=tuple(range(depth)) if whole else (),  # the first that fit stand in until they are chosen
        protected=frozenset(index % depth for index in protect),
        uniform=uniform,
    )


@dataclass(frozen=True)
class Budget:
    """The number of parameters that have to go, the units they may come from, and the grid of widths."""

    costs: UnitCosts
    target: int  # parameters to remove
    width_multiple: int = 1  # widths that change end up on multiples of it
    asked: float | None = None  # the sparsity that `target` was rounded up from

    @classmethod
    def of(cls, costs: UnitCosts, sparsity: float, width_multiple: int = 1, *, flag: str = "sparsity.target") -> Budget:
        """The budget for a `sparsity` in (0, 1), in parameters of the scope, rounded up.

        Of the blocks that are to go as a whole, as many go, first chosen first, as fit their share of it.

        Raises:
            UserError: for a width multiple that does not fit; and naming `--flag`, for a target that the rule of one
                unit per block (one `width_multiple` of neurons, one KV group) makes impossible.
        """
        if width_multiple > (narrow := min(costs.neurons)):  # of all blocks
            raise UserError(f"--sparsity.width_multiple: expected 1 to {narrow} neurons, got {width_multiple}.")
        # exact: 0.1 of 30 is 3, where float multiplication and ceil would say 4
        target = int(-(-Fraction(str(sparsity)) * costs.total // 1))
        costs = replace(costs, gone=costs.fitting(costs.gone, target))
        removable = costs.removable(width_multiple)
        if target > removable:
            raise UserError(
                f"--{flag}: {sparsity} cannot be reached: a block keeps {width_multiple} neurons and a KV group, and "
                f"{len(costs.protected)} keep all, so at most {removable / costs.total:.4f} can go; ask for less."
            )
        return cls(costs, target, width_multiple, sparsity)

    def at(self, sparsity: float) -> Budget:
        """The budget of the same units and grid at another sparsity, one of `--evaluation.curve`."""
        return Budget.of(self.costs, sparsity, self.width_multiple, flag="evaluation.curve")

    def without(self, blocks: Sequence[int]) -> Budget:
        """This budget with those of these blocks gone, first one first, that fit their share."""
        return Budget.of(replace(self.costs, gone=tuple(blocks)), self.sparsity, self.width_multiple)

    @property
    def rest(self) -> Budget:
        """What whole blocks leave of the target, for the units of the blocks that stay."""
        costs = self.costs
        kinds = costs.neuron, costs.group, costs.neurons, costs.groups, costs.of_experts
        neuron, group, neurons, groups, experts = ([of_block[b] for b in costs.stay] for of_block in kinds)
        protected = frozenset(costs.stay.index(b) for b in costs.protected)
        left = UnitCosts(neuron, group, neurons, groups, costs.attention, tuple(experts), protected, costs.uniform)
        return Budget(left, self.target - sum(costs.block[b] for b in costs.gone), self.width_multiple)

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's parameters that has to go."""
        return self.target / self.costs.total if self.asked is None else self.asked


def least_missed(budget: Budget, loss: Callable[[list[int]], float]) -> list[int]:
    """Blocks that go as a whole, as many as fit: the one without which the loss is lowest, then again with it gone."""
    costs, gone, depth = budget.costs, [], range(len(budget.costs.neurons))
    while fit := [b for b in depth if b not in gone and b in costs.fitting([*gone, b], budget.target)]:
        gone.append(min(fit, key=lambda b: loss([*gone, b])))
    return gone
