"""A pruned model for other programs: `gprune export`, or from Python `export`."""

from gprune.export.convert import export

__all__ = ["export"]
