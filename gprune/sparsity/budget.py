"""The budget: what every unit costs, and how many parameters have to go. Integers, counted and never estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gprune.errors import UserError
from gprune.models.blocks import Block
from gprune.models.masks import Masks

SCOPES = ("ffn", "attention+ffn")


@dataclass(frozen=True)
class UnitCosts:
    """Parameters per unit and the size of the scope. Integers: budgets are counted, not estimated.

    Where a block has experts, its neurons go in *slots*: slot j is the j-th neuron of every expert, in the order of
    each one's own margins, so that experts stay equally wide. A slot counts all its neurons' parameters.
    """

    neuron: list[int]  # per block; of a slot
    group: list[int]  # per block
    neurons: list[int]  # per block; slots
    groups: list[int]
    attention: bool  # whether KV groups may go
    experts: tuple[int, ...] = ()  # per block; empty: one each
    protected: frozenset[int] = frozenset()  # blocks that keep everything
    uniform: bool = False  # all blocks end up equally wide

    @property
    def of_experts(self) -> tuple[int, ...]:
        """Experts per block."""
        return self.experts or (1,) * len(self.neuron)

    @property
    def total(self) -> int:
        """Parameters in the scope that units account for (shared biases of down/o projections stay out)."""
        ffn = sum(c * n for c, n in zip(self.neuron, self.neurons, strict=True))
        attention = sum(c * n for c, n in zip(self.group, self.groups, strict=True))
        return ffn + attention * self.attention

    def removable(self, width_multiple: int) -> int:
        """Parameters that can go while each open block keeps `width_multiple` neurons and one KV group."""
        open_blocks = [b for b in range(len(self.neurons)) if b not in self.protected]
        ffn = sum(self.neuron[b] * (self.neurons[b] - width_multiple) for b in open_blocks)
        return ffn + self.attention * sum(self.group[b] * (self.groups[b] - 1) for b in open_blocks)

    def removed(self, masks: Masks) -> int:
        """Parameters of the scope that the masks remove."""
        slots = [int((~m).sum()) // e for m, e in zip(masks.ffn, self.of_experts, strict=True)]
        ffn = sum(c * n for c, n in zip(self.neuron, slots, strict=True))
        return ffn + sum(c * int((~m).sum()) for c, m in zip(self.group, masks.attention, strict=True))


def unit_costs(blocks: Sequence[Block], *, scope: str, protect: Sequence[int] = (), uniform: bool = False) -> UnitCosts:
    """Costs of the units of a model for a scope of `SCOPES`; blocks to `protect` may be counted from the end (-1)."""
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
    """How many parameters have to go, out of which units, and on which grid of widths."""

    costs: UnitCosts
    target: int  # parameters to remove
    width_multiple: int = 1  # widths end up on multiples of it
    asked: float | None = None  # the sparsity that `target` was rounded up from

    @classmethod
    def of(cls, costs: UnitCosts, sparsity: float, width_multiple: int = 1, *, flag: str = "sparsity.target") -> Budget:
        """The budget for a `sparsity` in (0, 1), in parameters of the scope, rounded up.

        Raises:
            UserError: naming `--flag`, for a sparsity outside (0, 1), a width multiple that does not fit, or a target
                that the rule of one unit per block (one `width_multiple` of neurons, one KV group) makes impossible.
        """
        if not 0 < sparsity < 1:
            raise UserError(
                f"--{flag}: expected a fraction of parameters removed inside (0, 1), got {sparsity}; "
                f"half the parameters is 0.5."
            )
        narrow = min(costs.neurons)
        if not 1 <= width_multiple <= narrow:
            raise UserError(
                f"--sparsity.width_multiple: expected 1 to {narrow} (the narrowest block's neurons), got "
                f"{width_multiple}."
            )
        # exact: 0.1 of 30 is 3, where float multiplication and ceil would say 4
        target = -(-Fraction(str(sparsity)) * costs.total // 1)
        removable = costs.removable(width_multiple)
        if target > removable:
            kept = f"{width_multiple} neuron{'s' * (width_multiple > 1)}" + " and one KV group" * costs.attention
            raise UserError(
                f"--{flag}: {sparsity} cannot be reached: every block keeps {kept}"
                + f" and {len(costs.protected)} keep everything" * bool(costs.protected)
                + f", so at most {removable / costs.total:.4f} of the parameters can go; ask for less."
            )
        return cls(costs, int(target), width_multiple, sparsity)

    def at(self, sparsity: float) -> Budget:
        """The same units and grid at another sparsity of `--evaluation.curve`."""
        return Budget.of(self.costs, sparsity, self.width_multiple, flag="evaluation.curve")

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's parameters that has to go."""
        return self.target / self.costs.total if self.asked is None else self.asked
