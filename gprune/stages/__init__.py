"""What is trained: LightningModules around a frozen language model, and callbacks. One of them is a recovery."""

from gprune.registry import CALIBRATOR, LEARNER, REFINER
from gprune.stages import distill_recovery  # noqa: F401 - it registers itself

CALIBRATOR.register("streaming")("gprune.stages.calibration:CalibrationStage")
REFINER.register("soft_assignment")("gprune.stages.refinement:AssignmentRefinement")
LEARNER.register("straight_through")("gprune.stages.threshold_learning:ThresholdLearning")
