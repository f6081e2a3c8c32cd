"""Recovery: make up for what pruning removed, by the units that stay. One file per method, all with one contract."""

from gprune.recoveries import bias, least_squares, sequential  # noqa: F401 - they register themselves
from gprune.recoveries.contract import RECOVERY, Material, Recovery, recovery, recovery_of

__all__ = ["RECOVERY", "Material", "Recovery", "recovery", "recovery_of"]
