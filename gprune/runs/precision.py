"""Precision of training stages: resolve `--trainer.precision auto` for this hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from gprune.config import RunConfig
from gprune.models.products import multiplies_bfloat16
from gprune.runs import schema
from gprune.runs.trainer import launch_processes
from gprune.storage.files import read_json

Precision = Literal["32-true", "bf16-mixed"]


def resolve_precision(cfg: RunConfig, device: torch.device, *, together: bool = False) -> tuple[RunConfig, str]:
    """Replace the precision `auto` in a configuration, and return the reason for the choice.

    A resumed run keeps its precision on any hardware. With float16 weights, training uses float32, because bfloat16 has
    three bits of precision less. The default name of the run does not depend on the hardware.
    """
    if cfg.trainer.precision != "auto":
        return cfg, "--trainer.precision"
    stored = _stored_precision(Path(cfg.folder))
    uses_bfloat16, reason = multiplies_bfloat16(device)
    if cfg.model.dtype == "float16":
        uses_bfloat16, reason = False, "bfloat16 has fewer digits than --model.dtype float16"
    if together and cfg.trainer.num_nodes > 1:
        slow_on_any_rank, stored = _decide_together(cfg, uses_bfloat16=uses_bfloat16, stored=stored)
        if uses_bfloat16 and slow_on_any_rank:
            uses_bfloat16, reason = False, "another process has hardware without bfloat16"
    precision = "bf16-mixed" if uses_bfloat16 else "32-true"
    if stored:
        precision, reason = stored, "the resumed run has this precision"
    trainer = cfg.trainer.model_copy(update={"precision": precision})
    run = cfg.run.model_copy(update={"name": cfg.run_name})
    return cfg.model_copy(update={"trainer": trainer, "run": run}), reason


def _stored_precision(folder: Path) -> Precision | None:
    """Return the precision of the run in a folder, or None if there is no run."""
    manifest = read_json(folder / "manifest.json", check=schema.check_manifest) or {}
    precision = manifest.get("settings", {}).get("trainer", {}).get("precision")
    return precision if precision in get_args(Precision) else None


def _decide_together(cfg: RunConfig, *, uses_bfloat16: bool, stored: Precision | None) -> tuple[bool, Precision | None]:
    """Return whether at least one rank does not use bfloat16, and the precision that rank 0 has stored."""
    fabric = launch_processes(cfg.trainer)
    not_on_all_ranks = fabric.strategy.reduce_boolean_decision(not uses_bfloat16, all=False)
    return not_on_all_ranks, fabric.broadcast(stored)
