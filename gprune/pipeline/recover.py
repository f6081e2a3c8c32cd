"""Step 9: really smaller weights, and recovery."""

from __future__ import annotations

import itertools
import shutil
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers import PreTrainedModel

from gprune.calibration.statistics import CorpusStatistics, pooled
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.models.blocks import blocks_of
from gprune.models.loading import load_weights
from gprune.models.masks import Masks
from gprune.models.offload import free_memory, is_offloaded, offload_folder
from gprune.models.surgery import prune, prune_to_files
from gprune.pipeline import elsewhere
from gprune.pipeline.run import Run
from gprune.recoveries import Material, recovery_of
from gprune.recoveries.contract import Revise, tuned
from gprune.stages.callbacks import BestWeights
from gprune.storage.files import content_hash

Stage = tuple[str, str]  # of the run's table: whose masks, and the recovery


@torch.no_grad()
def shrink(
    run: Run, masks: Masks, statistics: Mapping[str, CorpusStatistics], *, row: Stage | None = None,
    trial: int | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A copy of the dense model with smaller weights, recovered as asked.

    An offloaded model is written block by block below the cache, and its copy is loaded as the model was. Under ddp
    every process computes all of it, to the same bits.

    Args:
        masks: what stays.
        statistics: by corpus; those of `corpora.recover` are read.
        row: the stage whose masks these are (`model`: made elsewhere, without masks), and a recovery: a name in
            `RECOVERY`, or several joined by `+`. None for the run's own.
        trial: the number, from 0, of a model that is tried to find the share that keeps a quality. Its curves have a
            name of their own; what it learns is kept by its masks, so the run's own model finds it.
    """
    free_memory(run.plan.device)
    row = row or run.cfg.own_row
    material = material_of(run, masks, statistics, row, trial)
    name, method = row[1], recovery_of(row[1], run.cfg.recovery_settings)
    revise = method.revise(material)
    if run.cfg.final == "model":
        small, _ = elsewhere.load(run.cfg, run.plan.device)
        if name == "none":
            return small
    elif is_offloaded(run.model):
        # What learns lies on one device, in memory.
        small = _sliced_to_files(run, masks, revise, {} if method.learns else placement(run))
    else:
        small = _sliced(run, masks, revise)
    counted = run.meter.watch(small)
    # What a recovery draws must not depend on what ran before it: calibration, another row, an earlier sitting.
    torch.manual_seed(run.cfg.run.seed)
    with torch.enable_grad():  # a recovery of the whole model may learn
        small = tuned(name, material, small)
    counted.remove()
    return small


def _sliced(run: Run, masks: Masks, revise: Revise | None) -> PreTrainedModel:
    small = prune(run.model, masks)
    if revise is not None:
        stay = [dense for dense, kept in zip(run.blocks, masks.blocks, strict=True) if kept]
        for dense, block in zip(stay, blocks_of(small), strict=True):
            revise(dense, block)
    return small


def _sliced_to_files(run: Run, masks: Masks, revise: Revise | None, where: dict[str, Any]) -> PreTrainedModel:
    with ExitStack() as removal:
        folder = removal.enter_context(offload_folder())
        save_pruned(prune_to_files(run.model, masks, folder / "blocks", revise), None, folder / "model")
        shutil.rmtree(folder / "blocks")
        small = load_weights(folder / "model", dtype=getattr(torch, run.cfg.model.dtype), **where)
        weakref.finalize(small, removal.pop_all().close)
    return small


def placement(run: Run) -> dict[str, Any]:
    """Where weights go, for what loads a model; nothing where the trainer's device says it all."""
    m = run.cfg.model
    return {} if m.device_map is None else {"device_map": m.device_map, "max_memory": m.max_memory}


def material_of(
    run: Run, masks: Masks, statistics: Mapping[str, CorpusStatistics], row: Stage, trial: int | None
) -> Material:
    """What the recovery of a row works with: the statistics and the text of `corpora.recover` that it needs."""
    cfg, method = run.cfg, recovery_of(row[1])
    corpora = cfg.corpora.recover
    return Material(
        run.model,
        masks,
        ridge=cfg.ridge,
        statistics=pooled(statistics[corpus] for corpus in corpora) if method.needs - {"text"} else None,
        text=[run.text.train[corpus] for corpus in corpora] if "text" in method.needs else (),
        batch_size=cfg.corpora.batch_size,
        count=run.meter.add,
        fresh=run.text.fresh if method.learns else (),
        settings=cfg.recovery_settings,
        fit=fit_once(run, learned_file(masks, row[1]), row, trial),
        shard=cfg.model.shard,
        taught=run.taught,
        # The first model that is tried pays for the teacher; where none is, the run's own row does.
        paid=trial > 0 if trial is not None else row != cfg.own_row,
    )


def learned_file(masks: Masks, recovery: str) -> str:
    """How the names of the files begin, in the run folder, that hold what a recovery of a pruned model has learned."""
    return f"recovery/{recovery}-{content_hash(masks.tensors())[:8]}"


def fit_once(run: Run, path: str, row: Stage, trial: int | None = None) -> Callable[..., None]:
    """`Material.fit` of one pruned model: trains each stage once, also if the process is killed in between.

    What a stage has learned is kept in the run folder, and a recovery that is taken up gets it back. The names of files
    begin with `path`, and are numbered in the order of calls, which is the same each time.
    """
    calls, c, t = itertools.count(), run.cfg.corpora, run.cfg.trainer
    name_of_curves = row[0] if trial is None else f"{row[0]} trial {trial + 1}"

    def fit(
        what: str, stage: L.LightningModule, *, batch_size: int | None = None, clip: float | None = None,
        accumulate: int = 1, keep: Literal["last", "best"] = "last", **unknown: Any,
    ) -> None:  # fmt: skip
        """Train a stage once through the recovery's text, unless an earlier session did.

        Args:
            what: what the log and the progress bar say.
            batch_size: windows per step; by default `--corpora.batch_size`.
            clip: the largest norm of the gradient.
            accumulate: batches per optimizer step.
            keep: which weights are kept, as in `--distill.keep`.

        Raises:
            UserError: for an argument that there is not.
        """
        if unknown:
            raise UserError(
                f"material.fit: expected arguments among batch_size, clip, accumulate, keep; got {', '.join(unknown)}. "
                f"A stage trains for one epoch; --distill.tokens sets how much text it has."
            )
        number, strategy = next(calls), t.strategy
        name = f"{path}-{type(stage).__name__}-{number}".removesuffix("-0")
        if run.cfg.model.shard and is_overridden("configure_model", stage):  # it shards what learns
            strategy = ModelParallelStrategy(t.devices * t.num_nodes, 1, save_distributed_checkpoint=False)
        if (learned := run.folder.read(name)) is None:  # the step that shrinks or evaluates counts its cost
            best = BestWeights() if hasattr(stage, "student") else None
            run.fit(
                name, what, stage, run.text.fresh or [run.text.train[corpus] for corpus in c.recover],
                batch_size=batch_size, max_epochs=1, gradient_clip_val=clip, accumulate_grad_batches=accumulate,
                callbacks=[best] if best else [], strategy=strategy, row=name_of_curves,
                control=trial is not None or row != run.cfg.own_row, measured_after=0.25,
            )  # fmt: skip
            if best:
                best.restore(stage, keep=keep)
            learned = {key: value.detach().cpu().clone() for key, value in stage.state_dict().items()}
            run.folder.write(name, learned)
            run.folder.note()
        stage.load_state_dict(learned)

    return fit
