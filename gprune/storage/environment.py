"""Information for reproducing a run: git revision, package versions, device, memory."""

from __future__ import annotations

import platform
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gprune.imports import IMPORTED

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "wandb", "scikit-learn", "scipy")


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far in MiB: resident memory, and allocated memory of the fullest GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    memory = {"peak_memory_mib": round(peak / 2**20)}
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        memory["peak_gpu_memory_mib"] = round(max(torch.cuda.max_memory_allocated(d) for d in devices) / 2**20)
    return memory


def environment() -> dict[str, Any]:
    """Git revision, package versions and device, as stored in the manifest of a run."""
    return {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    } | ({"imports": list(IMPORTED)} if IMPORTED else {})


def git_revision() -> str | None:
    """Git revision of the running checkout, with '-dirty' for uncommitted changes; None outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        described = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
