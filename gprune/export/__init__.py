"""Export pruned models for other programs: `gprune export`, or `export` in Python."""

from gprune.export.convert import export

__all__ = ["export"]
