"""The budget: the cost of every unit, and the number of parameters that have to go; counted, never estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

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

    @property
    def of_experts(self) -> tuple[int, ...]:
        """Experts of each block, 1 where there are none."""
        return self.experts or (1,) * len(self.neuron)

    @property
    def total(self) -> int:
        """Parameters of all units in the scope (biases of down and output projections belong to no unit)."""
        groups = _weighted(self.group, self.groups) if self.attention else 0
        return _weighted(self.neuron, self.neurons) + groups

    def removable(self, width_multiple: int) -> int:
        """Parameters that can go while each open block keeps `width_multiple` neurons and one KV group."""
        open_blocks = [b for b in range(len(self.neurons)) if b not in self.protected]
        removable = sum(self.neuron[b] * (self.neurons[b] - width_multiple) for b in open_blocks)
        if self.attention:
            removable += sum(self.group[b] * (self.groups[b] - 1) for b in open_blocks)
        return removable

    def removed(self, masks: Masks) -> int:
        """Parameters of the scope that the masks remove."""
        slots = [int((~m).sum()) // e for m, e in zip(masks.ffn, self.of_experts, strict=True)]
        return _weighted(self.neuron, slots) + _weighted(self.group, [int((~m).sum()) for m in masks.attention])


def _weighted(costs: Sequence[int], counts: Sequence[int]) -> int:
    return sum(cost * count for cost, count in zip(costs, counts, strict=True))


def unit_costs(blocks: Sequence[Block], *, scope: str, protect: Sequence[int] = (), uniform: bool = False) -> UnitCosts:
    """Costs of a model's units for a `--sparsity.scope`; blocks to `protect` may be counted from the end (-1)."""
    depth = len(blocks)
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
        attention=scope == "attention+ffn",
        experts=tuple(b.experts for b in blocks),
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

        Raises:
            UserError: for a width multiple that does not fit; and naming `--flag`, for a target that the rule of one
                unit per block (one `width_multiple` of neurons, one KV group) makes impossible.
        """
        if width_multiple > (narrow := min(costs.neurons)):  # of all blocks
            raise UserError(f"--sparsity.width_multiple: expected 1 to {narrow} neurons, got {width_multiple}.")
        # exact: 0.1 of 30 is 3, where float multiplication and ceil would say 4
        target = -(-Fraction(str(sparsity)) * costs.total // 1)
        removable = costs.removable(width_multiple)
        if target > removable:
            raise UserError(
                f"--{flag}: {sparsity} cannot be reached: a block keeps {width_multiple} neurons and a KV group, and "
                f"{len(costs.protected)} keep all, so at most {removable / costs.total:.4f} can go; ask for less."
            )
        return cls(costs, int(target), width_multiple, sparsity)

    def at(self, sparsity: float) -> Budget:
        """The budget of the same units and grid at another sparsity, one of `--evaluation.curve`."""
        return Budget.of(self.costs, sparsity, self.width_multiple, flag="evaluation.curve")

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's parameters that has to go."""
        return self.target / self.costs.total if self.asked is None else self.asked
