"""Importance of units: one pure function per metric, larger = keep."""

from gprune.importance.metrics import EXPERT_IMPORTANCE, IMPORTANCE, expert_metric, metric

__all__ = ["EXPERT_IMPORTANCE", "IMPORTANCE", "expert_metric", "metric"]
