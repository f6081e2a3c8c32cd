"""Settings for measuring a model that gprune did not make (`gprune.measure`, rows `model: FOLDER` of lists).

The record of such a row stores the folder or hub id of the model as `made_elsewhere` in the group `model` of its
settings. It is not a setting of `RunConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gprune.config.parse import flatten
from gprune.config.run_config import RunConfig
from gprune.errors import UserError

PRUNING_SETTINGS = ("gprune", "importance", "partition", "reliability", "sparsity", "ridge")


def without_pruning(cfg: RunConfig, subject: str = "A model made elsewhere") -> RunConfig:
    """Return a copy with the defaults of the settings of pruning and recovery.

    Raise UserError, whose message begins with `subject`, for several processes and offloading.
    """
    if cfg.processes > 1 or cfg.model.device_map is not None:
        raise UserError(f"{subject} needs one process, without --model.device_map.")
    settings = cfg.model_dump(exclude={*PRUNING_SETTINGS, "recovery", "dry_run"}, warnings=False)
    return RunConfig(**settings, gprune=False, recovery="none")


def with_made_elsewhere(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return settings as plain data with the name of the measured model."""
    return {**settings, "model": settings["model"] | {"made_elsewhere": name}}


def made_elsewhere(settings: Mapping[str, Any]) -> str | None:
    """Return the name of the measured model in settings as plain data; None for a run that pruned its model."""
    return settings.get("model", {}).get("made_elsewhere")


def effective_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run by dotted name, without those of pruning if the run did not prune its model."""
    ignored = () if made_elsewhere(settings) is None else PRUNING_SETTINGS
    return {name: value for name, value in flatten(settings).items() if name.partition(".")[0] not in ignored}
