"""The precision in which stages learn: what `--trainer.precision auto` is on this hardware."""

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


def settled(cfg: RunConfig, device: torch.device, *, together: bool = False) -> tuple[RunConfig, str]:
    """The configuration with a precision in place of `auto`, and why it is this one.

    A run that has begun keeps its precision, on whatever hardware it resumes. With float16 weights learning stays in
    float32, as bfloat16 has three bits fewer. The default name of the run does not depend on the hardware.

    Args:
        together: with several nodes, ask all processes, which take float32 unless all of them multiply bfloat16.

    Returns:
        The configuration, and a reason in words.
    """
    if cfg.trainer.precision != "auto":
        return cfg, "--trainer.precision"
    began = _begun(Path(cfg.folder))
    fast, why = multiplies_bfloat16(device)
    if cfg.model.dtype == "float16":
        fast, why = False, "bfloat16 has fewer digits than --model.dtype float16"
    if together and cfg.trainer.num_nodes > 1:
        slow_somewhere, began = _asked_everywhere(cfg, fast=fast, began=began)
        if fast and slow_somewhere:
            fast, why = False, "another process has hardware without bfloat16"
    precision = began or ("bf16-mixed" if fast else "32-true")
    if began:
        why = "as the run began"
    trainer = cfg.trainer.model_copy(update={"precision": precision})
    run = cfg.run.model_copy(update={"name": cfg.run_name})
    return cfg.model_copy(update={"trainer": trainer, "run": run}), why


def _begun(folder: Path) -> Precision | None:
    """The precision of the run in this folder; None if there is no run."""
    manifest = read_json(folder / "manifest.json", check=schema.Manifest.problem) or {}
    began = manifest.get("settings", {}).get("trainer", {}).get("precision")
    return began if began in get_args(Precision) else None


def _asked_everywhere(cfg: RunConfig, *, fast: bool, began: Precision | None) -> tuple[bool, Precision | None]:
    """Whether any process lacks hardware for bfloat16, and the precision that rank 0 has begun with."""
    fabric = launched(cfg.trainer)
    return fabric.strategy.reduce_boolean_decision(not fast, all=False), fabric.broadcast(began)
