"""Where `gprune evaluate` puts a model: on one device, offloaded, or sharded over processes, as runs do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gprune.benchmarks.settings import Benchmarks
from gprune.console import process_index
from gprune.errors import UserError
from gprune.models.copies import sharded_copy
from gprune.runs.results import config_of, read_numbers


@dataclass(frozen=True)
class Placement:
    """Where models are computed."""

    device: torch.device
    loading: dict[str, Any]  # arguments `device_map` and `max_memory` for loading; empty without offloading
    processes: int = 1  # with more than one, layers are sharded

    @property
    def writes(self) -> bool:
        """Whether this process writes results."""
        return self.processes == 1 or torch.distributed.get_rank() == 0

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a loaded model on its device, or a copy that is sharded over processes."""
        if self.processes > 1:
            return sharded_copy(model, self.device, self.processes)
        return model if self.loading else model.to(self.device)


@contextmanager
def placement(benchmarks: Benchmarks, run: Path) -> Iterator[Placement]:
    """Context with the placement of the flags, or that of a run's `--model.device_map`.

    With `--shard`, the processes that torchrun has started are connected while the context lasts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not benchmarks.shard:
        yield Placement(device, _loading(benchmarks, run))
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes < 2:
        raise UserError(
            "--shard needs two or more processes. Start them with torchrun --nproc-per-node 2 -m gprune evaluate ..."
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=process_index(), world_size=processes)
    try:
        yield Placement(device, {}, processes)
    finally:
        torch.distributed.destroy_process_group()


def _loading(benchmarks: Benchmarks, run: Path) -> dict[str, Any]:
    """Return the arguments for loading: those of the flags or, without them, of the run's own settings."""
    if benchmarks.device_map is not None:
        return {"device_map": benchmarks.device_map, "max_memory": benchmarks.max_memory}
    if not (run / "manifest.json").is_file():
        return {}
    numbers = read_numbers(run)
    if numbers.settings["model"].get("device_map") is None:
        return {}
    model = config_of(numbers).model
    return {"device_map": model.device_map, "max_memory": model.max_memory}
