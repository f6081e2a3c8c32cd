"""Recovery `least_squares_sequential`: least squares along the pruned prefix, which `prefix.py` computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gprune.recoveries.contract import Material, Recovery, Revise, recovery

if TYPE_CHECKING:
    from gprune.models.blocks import Block


@recovery("least_squares_sequential")
class SequentialLeastSquares(Recovery):
    """Recovery by `PrunedPrefix`. It reads the text of `corpora.recover`, and no statistics."""

    needs = frozenset({"text"})
    flags = frozenset({"ridge"})
    experts = sharded = False

    def refuse(self, plan: Any) -> None:
        """Raise UserError as `Recovery.refuse`, and if the model cannot be computed layer by layer."""
        from gprune.calibration.layerwise import check_walk

        super().refuse(plan)
        check_walk(plan.skeleton.config, along_prefix=True)

    def revise(self, material: Material) -> Revise:
        """Return a function that solves projections of each block after all earlier blocks."""
        from gprune.recoveries.prefix import PrunedPrefix

        prefix = PrunedPrefix(material.dense, material.masks, material.batches, ridge=material.ridge)

        def revise(dense: Block, block: Block) -> None:
            """Recover the next block. After the last one, count the tokens of passes through pruned layers."""
            prefix.recover(dense, block)
            if dense.index == prefix.last_solved:
                number_of_layers = 1 + prefix.blocks[-1].layer_index
                material.count(prefix.tokens // number_of_layers)  # a token counts if it passes all layers

        return revise

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """Return the tokens of one pass through the dense layers, and of all passes through the pruned layers.

        The text passes the dense layers once. It passes the pruned layers at most once for each projection, which are
        `down` and, with attention in scope, the output projection, and once more.
        """
        return (3 + attention) * text, 0
