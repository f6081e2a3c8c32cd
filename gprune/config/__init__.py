"""Every flag of train.py, with its help; start with `run.py`."""

from gprune.config.groups import (
    CorporaConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    PartitionConfig,
    ReliabilityConfig,
    RunFolderConfig,
    SparsityConfig,
    TrainerConfig,
)
from gprune.config.parse import CONSENT, RETIRED, check_settings, of_settings, parse
from gprune.config.recovery import DistillConfig
from gprune.config.run import RunConfig

__all__ = [
    "CONSENT", "RETIRED", "CorporaConfig", "DistillConfig", "EvaluationConfig", "LoggingConfig", "ModelConfig",
    "PartitionConfig", "ReliabilityConfig", "RunConfig", "RunFolderConfig", "SparsityConfig", "TrainerConfig",
    "check_settings", "of_settings", "parse",
]  # fmt: skip
