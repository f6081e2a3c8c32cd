"""Precision of training stages: resolve `--trainer.precision auto` for this hardware."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import torch

from gprune.config import RunConfig
from gprune.runs import schema
from gprune.runs.trainer import launched
from gprune.storage.files import read_json

Precision = Literal["32-true", "bf16-mixed"]


def multiplies_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Return whether matrix products in bfloat16 are faster than in float32 on this hardware, and the reason.

    They are on GPUs if all visible GPUs have compute capability 8 or above, and on CPUs with AMX. AVX512-BF16 alone is
    not enough: on Sapphire Rapids without AMX (`ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`) products of SmolLM2's sizes take
    1.4 to 1.9 times as long in bfloat16 as in float32.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return True, "assumed for the planned GPU"
        if torch.version.hip:
            return True, "an AMD GPU"
        least = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        return least >= (8, 0), f"a GPU of compute capability {least[0]}.{least[1]}"
    if device.type != "cpu" or not _has_amx():
        return False, f"{'a processor' if device.type == 'cpu' else device.type} without AMX"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit not in ("", "ALL", "DEFAULT") and "AMX" not in limit:
        return False, f"ONEDNN_MAX_CPU_ISA={limit}"
    return True, "a processor with AMX"


def _has_amx() -> bool:
    """Return whether the CPU has AMX for bfloat16, and torch has the library that uses it (oneDNN)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # torch 2.6


def settled(cfg: RunConfig, device: torch.device, *, together: bool = False) -> tuple[RunConfig, str]:
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
