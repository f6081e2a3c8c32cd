"""Every flag of train.py, with its help; start with `run.py`."""

from gprune.config.groups import CorporaConfig, ModelConfig, PartitionConfig, ReliabilityConfig, SparsityConfig
from gprune.config.parse import CONSENT, FORMER_NAMES, RETIRED, check_settings, flat, of_settings, of_today, parse
from gprune.config.recovery import DistillConfig
from gprune.config.run import RunConfig
from gprune.config.running import EvaluationConfig, LoggingConfig, RunFolderConfig, TrainerConfig

__all__ = [
    "CONSENT", "FORMER_NAMES", "RETIRED", "CorporaConfig", "DistillConfig", "EvaluationConfig", "LoggingConfig",
    "ModelConfig", "PartitionConfig", "ReliabilityConfig", "RunConfig", "RunFolderConfig", "SparsityConfig",
    "TrainerConfig", "check_settings", "flat", "of_settings", "of_today", "parse",
]  # fmt: skip
