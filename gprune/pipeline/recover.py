"""Step 9: really smaller weights, and recovery."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from gprune.calibration.statistics import CorpusStatistics
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.models.blocks import blocks_of
from gprune.models.loading import load_weights
from gprune.models.masks import Masks
from gprune.models.offload import free_memory, is_offloaded, keep_until_gone, scratch_folder
from gprune.models.surgery import prune, prune_to_files
from gprune.pipeline.run import Run
from gprune.recoveries import recovery_of
from gprune.recoveries.contract import Revise


@torch.no_grad()
def shrink(
    run: Run, masks: Masks, statistics: Mapping[str, CorpusStatistics], *, recovery: str | None = None
) -> PreTrainedModel:
    """A copy of the dense model with smaller weights, recovered as asked.

    An offloaded model is written block by block below the cache, and its copy is loaded as the model was. Under ddp
    every process computes all of it, to the same bits.

    Args:
        masks: what stays.
        statistics: by corpus; those of `corpora.recover` are read.
        recovery: a name in `RECOVERY`, or several joined by `+`; None for `--recovery`.
    """
    free_memory(run.plan.device)
    name = run.cfg.recovery if recovery is None else recovery
    material = run.material(masks, statistics, name)
    method = recovery_of(name)
    revise = method.revise(material)
    if revise is not None and not callable(revise):
        raise UserError(
            f"Recovery '{name}': expected revise to return a function or None, got {type(revise).__name__}."
        )
    if is_offloaded(run.model):
        # What learns lies on one device, in memory.
        small = _sliced_to_files(run, masks, revise, {} if method.learns else placement(run))
    else:
        small = _sliced(run, masks, revise)
    counted = run.meter.watch(small)
    # What a recovery draws does not hang on what came before: an empty cache, another row, an earlier sitting.
    torch.manual_seed(run.cfg.run.seed)
    with torch.enable_grad():  # a recovery of the whole model may learn
        tuned = method.tune(material, small)
    counted.remove()
    kept = [(b.neurons, b.kv_groups) for b in blocks_of(small)]
    if not isinstance(tuned, PreTrainedModel) or [(b.neurons, b.kv_groups) for b in blocks_of(tuned)] != kept:
        raise UserError(
            f"Recovery '{name}': expected tune to return the pruned model, as wide as it was, got "
            f"{type(tuned).__name__}."
        )
    return tuned


def _sliced(run: Run, masks: Masks, revise: Revise | None) -> PreTrainedModel:
    small = prune(run.model, masks)
    if revise is not None:
        stay = [dense for dense, kept in zip(run.blocks, masks.blocks, strict=True) if kept]
        for dense, block in zip(stay, blocks_of(small), strict=True):
            revise(dense, block)
    return small


def _sliced_to_files(run: Run, masks: Masks, revise: Revise | None, where: dict[str, Any]) -> PreTrainedModel:
    with ExitStack() as removal:
        folder = removal.enter_context(scratch_folder())
        save_pruned(prune_to_files(run.model, masks, folder / "blocks", revise), None, folder / "model")
        shutil.rmtree(folder / "blocks")
        small = load_weights(folder / "model", dtype=getattr(torch, run.cfg.model.dtype), **where)
        keep_until_gone(small, removal.pop_all())
    return small


def placement(run: Run) -> dict[str, Any]:
    """Where weights go, for what loads a model; nothing where the trainer's device says it all."""
    m = run.cfg.model
    return {} if m.device_map is None else {"device_map": m.device_map, "max_memory": m.max_memory}
