"""Flags of train.py with their types and help. `RunConfig` in `run_config.py` has all of them."""

from gprune.config.elsewhere import effective_settings
from gprune.config.groups import (
    DEFAULT_MULTIPLE,
    CorporaConfig,
    ModelConfig,
    PartitionConfig,
    ReliabilityConfig,
    SparsityConfig,
)
from gprune.config.parse import (
    CONSENT,
    config_from_mapping,
    flatten,
    parse,
    read_flags,
    read_settings,
)
from gprune.config.run_config import ExportConfig, RunConfig
from gprune.config.running import EvaluationConfig, LoggingConfig, RunFolderConfig, TrainerConfig

__all__ = [
    "CONSENT", "DEFAULT_MULTIPLE", "CorporaConfig", "EvaluationConfig", "ExportConfig",
    "LoggingConfig", "ModelConfig", "PartitionConfig", "ReliabilityConfig", "RunConfig", "RunFolderConfig",
    "SparsityConfig", "TrainerConfig", "config_from_mapping", "effective_settings", "flatten",
    "parse", "read_flags", "read_settings",
]  # fmt: skip
