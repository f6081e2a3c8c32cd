"""Precision of training stages: resolve `--trainer.precision auto` for this hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from gprune.config import RunConfig
from gprune.models.bfloat16 import multiplies_bfloat16
from gprune.runs import schema
from gprune.runs.trainer import launched
from gprune.storage.files import read_json

Precision = Literal["32-true", "bf16-mixed"]


def resolve_precision(cfg: RunConfig, device: torch.device, *, together: bool = False) -> tuple[RunConfig, str]:
    """Replace the precision `auto` in a configuration, and return the reason for the choice.

    A resumed run keeps its precision on any hardware. With float16 weights training uses float32, because bfloat16 has
    three bits of precision less. The default name of the run does not depend on the hardware.

    Args:
        cfg: the configuration.
        device: the device of this process.
        together: whether to let all processes of several nodes decide together. They use bfloat16 only if it is faster
            on all of them.

    Returns:
        The configuration, and the reason in words.
    """
    if cfg.trainer.precision != "auto":
        return cfg, "--trainer.precision"
    began = _stored_precision(Path(cfg.folder))
    fast, why = multiplies_bfloat16(device)
    if cfg.model.dtype == "float16":
        fast, why = False, "bfloat16 has fewer digits than --model.dtype float16"
    if together and cfg.trainer.num_nodes > 1:
        slow_somewhere, began = _agree(cfg, fast=fast, began=began)
        if fast and slow_somewhere:
            fast, why = False, "another process has hardware without bfloat16"
    precision = began or ("bf16-mixed" if fast else "32-true")
    if began:
        why = "the resumed run has this precision"
    trainer = cfg.trainer.model_copy(update={"precision": precision})
    run = cfg.run.model_copy(update={"name": cfg.run_name})
    return cfg.model_copy(update={"trainer": trainer, "run": run}), why


def _stored_precision(folder: Path) -> Precision | None:
    """Return the precision of the run in a folder, or None if there is no run."""
    manifest = read_json(folder / "manifest.json", check=schema.Manifest.problem) or {}
    began = manifest.get("settings", {}).get("trainer", {}).get("precision")
    return began if began in get_args(Precision) else None


def _agree(cfg: RunConfig, *, fast: bool, began: Precision | None) -> tuple[bool, Precision | None]:
    """Return whether any process lacks hardware for bfloat16, and the precision that rank 0 has stored."""
    fabric = launched(cfg.trainer)
    return fabric.strategy.reduce_boolean_decision(not fast, all=False), fabric.broadcast(began)
