"""Where processes of one run agree what is still to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from gprune.errors import UserError


class Meeting(L.LightningModule):
    """`trainer.test(meeting)` brings all processes together; `lacking` then says what any of them lacks.

    What each process sees for itself on a disk may be there a moment later: decided alone, one would compute what
    others wait for elsewhere.

    Args:
        key: of the run that this process is at.

    Raises:
        UserError: in `setup`, if another process is at another run.
    """

    def __init__(self, key: str | None, lacking: Sequence[bool]):
        super().__init__()
        self.key, self.lacking = key, list(lacking)

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        elsewhere, *self.lacking = (
            strategy.reduce_boolean_decision(mine, all=False)
            for mine in (strategy.broadcast(self.key) != self.key, *self.lacking)
        )
        if elsewhere:
            raise UserError("The processes of this run are at different runs of a list; run the same command again.")

    def test_dataloader(self) -> list[Any]:
        return []

    def test_step(self) -> None:
        """Never called: nothing is tested."""
