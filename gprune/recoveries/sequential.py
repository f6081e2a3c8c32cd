"""Least squares along the pruned prefix, as a recovery of runs; the mathematics is in `prefix.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gprune.recoveries.contract import Material, Recovery, Revise, recovery

if TYPE_CHECKING:
    from gprune.models.blocks import Block


@recovery("least_squares_sequential")
class SequentialLeastSquares(Recovery):
    """The recovery of a run by `PrunedPrefix`: reads the text of `corpora.recover`, and no statistics."""

    needs = frozenset({"text"})
    experts = sharded = False

    def revise(self, material: Material) -> Revise:
        """Solve each block's projections behind the blocks that are recovered already."""
        from gprune.recoveries.prefix import PrunedPrefix

        prefix = PrunedPrefix(material.dense, material.masks, material.batches, ridge=material.ridge)

        def revise(dense: Block, block: Block) -> None:
            prefix.recover(dense, block)
            if dense.index == prefix.last:
                material.count(prefix.tokens // (1 + prefix.blocks[-1].layer_index))

        return revise

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """One pass through the dense layers, one through the pruned ones, and another for each projection."""
        return (3 + attention) * text, 0
