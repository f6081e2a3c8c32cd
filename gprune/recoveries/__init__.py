"""Recoveries: change weights of kept units to compensate for removed ones. One file per method, one interface.

The recovery `distill` is in `stages/distill_recovery.py`, because it trains a LightningModule.
"""

from gprune.recoveries import bias, least_squares  # noqa: F401 - they register themselves
from gprune.recoveries.contract import (
    RECOVERY,
    Material,
    Recovery,
    check_chain,
    recoveries_of,
    recovery,
    recovery_learns,
    recovery_needs,
)

__all__ = [
    "RECOVERY", "Material", "Recovery", "check_chain", "recoveries_of", "recovery", "recovery_learns", "recovery_needs",
]  # fmt: skip
