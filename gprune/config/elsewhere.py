"""Settings for measuring a model that gprune did not make (`gprune.evaluate`, `gprune.recover`, rows `model: FOLDER`).

A run that measures such a model stores its folder or hub id as `made_elsewhere` in the group `model` of its settings.
It is not a setting of `RunConfig`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from gprune.config.parse import flatten
from gprune.config.run_config import RunConfig
from gprune.errors import UserError

PRUNING_SETTINGS = ("gprune", "importance", "partition", "reliability", "sparsity", "ridge")


def without_pruning(cfg: RunConfig, recovery: str, subject: str = "A model made elsewhere") -> RunConfig:
    """Return a copy with the defaults of the settings of pruning, and with the recovery `none` or `distill`.

    Raise UserError, whose message begins with `subject`, for another recovery, several processes, offloading, a
    dry run and GGUF.
    """
    if recovery not in ("none", "distill"):
        raise UserError(f"{subject} needs --recovery none or distill; got {recovery}.")
    if cfg.processes > 1 or cfg.model.device_map is not None:
        raise UserError(f"{subject} needs one process, without --model.device_map.")
    if cfg.dry_run or cfg.export.format == "gguf":
        raise UserError(f"{subject} cannot be combined with --dry_run true or --export gguf.")
    settings = cfg.model_dump(exclude=set(PRUNING_SETTINGS), warnings=False)
    return RunConfig(**settings | {"gprune": False, "recovery": recovery})


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


def default_run_name(settings: Mapping[str, Any]) -> str:
    """Return OTHER-beside-MODEL-HASH, the default name of the run folder of a model made elsewhere.

    OTHER is the measured model, MODEL is `--model.name`, and HASH is of the settings as plain data.
    """
    paths = (made_elsewhere(settings), settings["model"]["name"])
    names = (os.path.basename(os.path.normpath(path)) for path in paths)
    other, model = (name.encode()[:90].decode(errors="ignore") for name in names)  # --run.name has at most 200 bytes
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{other}-beside-{model}-{digest[:8]}"
