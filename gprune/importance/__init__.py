"""How important each unit is: one pure function per metric, larger = keep."""

from gprune.importance.metrics import IMPORTANCE, metric
from gprune.importance.scores import Scores, score_units
from gprune.importance.weights import UnitWeights

__all__ = ["IMPORTANCE", "Scores", "UnitWeights", "metric", "score_units"]
