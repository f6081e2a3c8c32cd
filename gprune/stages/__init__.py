"""Stages: LightningModules with a frozen language model, their callbacks, and the recovery `distill`."""

from gprune.registry import CALIBRATOR, LEARNER, REFINER
from gprune.stages import distill_recovery  # noqa: F401 - registers the recovery

CALIBRATOR.register("streaming")("gprune.stages.calibration:CalibrationStage")
REFINER.register("soft_assignment")("gprune.stages.refinement:AssignmentRefinement")
LEARNER.register("straight_through")("gprune.stages.threshold_learning:ThresholdLearning")
