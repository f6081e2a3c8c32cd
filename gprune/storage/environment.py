"""Information for reproducing a run: git revision, package versions, device, memory."""

from __future__ import annotations

import platform
import resource
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from gprune.user_code import IMPORTED

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "wandb", "scikit-learn", "scipy")


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory. Resident memory is only reset on Linux."""
    with suppress(OSError):  # another system, or a container that does not allow it: the peak since the process began
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory() -> dict[str, int]:
    """Return the peak memory in MiB since `reset_peak_memory`: resident memory, and that of the fullest GPU."""
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes; Linux reports KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    memory = {"peak_memory_mib": round(peak / 2**20)}
    if torch.cuda.is_initialized():
        gpu_peaks = [torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())]
        memory["peak_gpu_memory_mib"] = round(max(gpu_peaks) / 2**20)
    return memory


def model_versions() -> list[str]:
    """Return the versions of the packages that compute a model, for keys of cached results."""
    return [torch.__version__, transformers.__version__]


def environment() -> dict[str, Any]:
    """Return git revision, versions, machine, threads, GPU and user modules, as stored in the manifest of a run."""
    described = {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if IMPORTED:
        described["imports"] = list(IMPORTED)
    return described


def git_revision() -> str | None:
    """Return the git revision of the running checkout, with '-dirty' for uncommitted changes; None outside git."""
    root = Path(__file__).resolve().parent.parent  # a folder in the checkout; git finds its root
    try:
        result = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
