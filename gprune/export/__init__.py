"""A pruned model for other programs: `gprune export`, or from Python `export`."""

from gprune.export.job import EXPORTS, export

__all__ = ["EXPORTS", "export"]
