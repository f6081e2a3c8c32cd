"""Step 9: construct the pruned model with smaller weights, and recover it."""

from __future__ import annotations

import itertools
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedModel

from gprune.calibration.statistics import CorpusStatistics, pool_statistics
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.method.run import Run, TokenMeter
from gprune.models.families import attach_record, record_of
from gprune.models.loading import load_weights
from gprune.models.masks import Masks
from gprune.models.offload import free_memory, is_offloaded, offload_folder
from gprune.models.surgery import kept_layers, slice_model, slice_to_files
from gprune.recoveries import RECOVERY, Material, Recovery, recoveries_of, recovery_learns, recovery_needs
from gprune.recoveries.contract import Revise
from gprune.runs.folder import broadcast
from gprune.stages.callbacks import RisingPerplexity


@torch.no_grad()
def prune_and_recover(
    run: Run, masks: Masks, statistics: Mapping[str, CorpusStatistics], *, recovery: str | None = None
) -> PreTrainedModel:
    """Return a pruned copy of the dense model, after a recovery: by default that of the run.

    If the model is offloaded, the copy is written to the cache layer by layer, and then loaded with the same
    arguments. With DDP every process computes the whole copy, with the same bits.
    """
    cfg = run.cfg
    free_memory(run.plan.device)
    recovery = recovery or cfg.recovery
    needs, recoveries = recovery_needs(recovery), recoveries_of(recovery, cfg.recovery_settings)
    corpora = cfg.corpora.recover
    texts = [run.text.train[corpus] for corpus in corpora] if "text" in needs else []
    material = Material(
        run.model,
        masks,
        ridge=cfg.ridge,
        statistics=pool_statistics(statistics[corpus] for corpus in corpora) if needs - {"text"} else None,
        batches=[ids for windows in texts for ids in windows.tokens.split(cfg.corpora.batch_size)],
        fit=fit_once(run),
    )
    # Only the first recovery of a chain may change blocks one at a time. Least squares is recoveries/least_squares.py.
    revise = recoveries[0].revise(material)
    if is_offloaded(run.model):
        # A model that is trained has to be in memory on one device.
        pruned = _slice_to_files(run, masks, revise, {} if recovery_learns(recovery) else loading_arguments(run))
    else:
        pruned = _slice_in_memory(run, masks, revise)
    return tune(recoveries, material, pruned, meter=run.meter, seed=cfg.run.seed)


def tune(
    recoveries: Sequence[Recovery], material: Material, pruned: PreTrainedModel, *, meter: TokenMeter, seed: int
) -> PreTrainedModel:
    """Return a model after `tune` of each recovery, which may change it in place. Its tokens are counted."""
    counting = meter.watch(pruned)
    # Random numbers of a recovery must not depend on earlier work: calibration, a search, an earlier session.
    torch.manual_seed(seed)
    with torch.enable_grad():  # a recovery may train the model
        for recovery in recoveries:
            pruned = recovery.tune(material, pruned)
            if not isinstance(pruned, PreTrainedModel):
                received = type(pruned).__name__
                raise UserError(f"Recovery '{recovery.name}' must return the pruned model from tune; got {received}.")
    counting.remove()
    chain = "+".join(recovery.name for recovery in recoveries)
    for name, weight in pruned.named_parameters():
        if not weight.is_meta:  # offloaded
            RECOVERY.checked(chain, name, weight, tuple(weight.shape), of="finite floats")
    return pruned


def _slice_in_memory(run: Run, masks: Masks, revise: Revise | None) -> PreTrainedModel:
    """Return a pruned copy of the dense model, after `revise` of each kept layer."""
    pruned = slice_model(run.model, masks)
    if revise is not None:
        for dense_layer, layer, units in kept_layers(run.model, pruned, masks):
            revise(dense_layer, layer, units)
    return pruned


def _slice_to_files(run: Run, masks: Masks, revise: Revise | None, load_arguments: dict[str, Any]) -> PreTrainedModel:
    """Return a pruned copy of an offloaded model. Its files are removed when the copy is garbage-collected."""
    with ExitStack() as removal:
        folder = removal.enter_context(offload_folder())
        save_pruned(slice_to_files(run.model, masks, folder / "blocks", revise), None, folder / "model")
        shutil.rmtree(folder / "blocks")
        pruned = load_weights(folder / "model", dtype=run.cfg.model.dtype, **load_arguments)
        attach_record(pruned, record_of(run.model))
        weakref.finalize(pruned, removal.pop_all().close)
    return pruned


def loading_arguments(run: Run) -> dict[str, Any]:
    """Arguments `device_map` and `max_memory` for loading a model; empty without `--model.device_map`."""
    m = run.cfg.model
    return {} if m.device_map is None else {"device_map": m.device_map, "max_memory": m.max_memory}


def fit_once(run: Run) -> Callable[..., None]:
    """Return the function `Material.fit` of the run's model, which trains each stage once, even over several sessions.

    Learned tensors are stored in the run folder, and loaded when the recovery is repeated. The function raises
    UserError for unknown arguments.
    """
    call_numbers, c = itertools.count(), run.cfg.corpora

    def fit(
        what: str, stage: L.LightningModule, *, batch_size: int | None = None, clip: float | None = None,
        accumulate: int = 1, **unknown: Any,
    ) -> None:  # fmt: skip
        """Train a stage for one epoch on the recovery's text, unless an earlier session did."""
        if unknown:
            raise UserError(
                f"Arguments of material.fit must be among batch_size, clip, accumulate; got {', '.join(unknown)}."
                " A stage trains for one epoch; --distill.tokens sets how much text it has."
            )
        name = f"recovery/{type(stage).__name__}-{next(call_numbers)}".removesuffix("-0")
        learned = broadcast(run.folder.read(name))
        if learned is None:  # the cost of training is recorded in the enclosing step
            rise = RisingPerplexity() if hasattr(stage, "student") else None
            run.fit(
                name, what, stage, run.text.fresh or [run.text.train[corpus] for corpus in c.recover],
                batch_size=batch_size, max_epochs=1, gradient_clip_val=clip, accumulate_grad_batches=accumulate,
                callbacks=[rise] if rise else [], measured_after=0.25,
            )  # fmt: skip
            if rise:
                rise.warn()
            learned = {key: value.detach().cpu().clone() for key, value in stage.state_dict().items()}
            run.folder.write(name, learned)
        stage.load_state_dict(learned)

    return fit
