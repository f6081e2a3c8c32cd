"""Importance of units: one pure function per metric, larger = keep."""

from gprune.importance.metrics import IMPORTANCE, metric

__all__ = ["IMPORTANCE", "metric"]
