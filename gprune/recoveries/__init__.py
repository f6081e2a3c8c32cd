"""Recoveries: change weights of kept units to compensate for removed ones. One file per method, one interface."""

from gprune.recoveries import bias, least_squares, sequential  # noqa: F401 - they register themselves
from gprune.recoveries.contract import RECOVERY, Material, Recovery, recoveries_of, recovery, recovery_of

__all__ = ["RECOVERY", "Material", "Recovery", "recoveries_of", "recovery", "recovery_of"]
