"""Step 9: really smaller weights, and recovery."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from gprune.calibration.statistics import KINDS, CorpusStatistics, pooled
from gprune.config import RunConfig
from gprune.export.hf import save_pruned
from gprune.models.blocks import Block, blocks_of
from gprune.models.loading import load_weights
from gprune.models.masks import Masks
from gprune.models.offload import is_offloaded, keep_until_gone, scratch_folder
from gprune.models.surgery import prune, prune_to_files
from gprune.pipeline.inputs import Text
from gprune.pipeline.run import Run
from gprune.recovery.projection import SEQUENTIAL, recover_projection
from gprune.recovery.sequential import PrunedPrefix

log = logging.getLogger("gprune")


@torch.no_grad()
def shrink(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    text: Text,
    masks: Masks,
    statistics: Mapping[str, CorpusStatistics],
    *,
    recovery: str,
) -> PreTrainedModel:
    """Step 9: a copy of the model with smaller weights, its output projections recovered as asked.

    That of an offloaded model is written block by block below the cache, and loaded as the model was. Under ddp every
    process computes all of it, to the same bits.
    """
    if recovery in SEQUENTIAL:
        batches = [ids for c in cfg.corpora.recover for ids in text.train[c].tokens.split(cfg.corpora.batch_size)]
        prefix = PrunedPrefix(model, masks, batches, ridge=cfg.ridge)
        small = _shrink(cfg, model, masks, prefix.recover)
        run.meter.add(prefix.tokens // len(masks.ffn))
        return small
    return _shrink(cfg, model, masks, None if recovery == "none" else by_projection(cfg, masks, statistics, recovery))


def by_projection(
    cfg: RunConfig, masks: Masks, statistics: Mapping[str, CorpusStatistics], recovery: str
) -> Callable[[Block, Block], None]:
    """What recovers a sliced block, given the dense one and it, by each projection's statistics."""
    pool = pooled(statistics[c] for c in cfg.corpora.recover)

    def recover(dense: Block, block: Block) -> None:
        keeps = masks.channels(dense)
        for kind, part in KINDS:
            if not bool(keeps[kind].all()):
                moments = getattr(pool, kind)[dense.index].total
                block.parts[part].set(*recover_projection(
                    dense.parts[part].weight.cpu(), keeps[kind], moments,
                    experts=dense.experts if kind == "ffn" else 1, method=recovery, ridge=cfg.ridge,
                ))  # fmt: skip

    return recover


def _shrink(
    cfg: RunConfig, model: PreTrainedModel, masks: Masks, recover: Callable[[Block, Block], None] | None
) -> PreTrainedModel:
    if is_offloaded(model):
        return _shrink_offloaded(cfg, model, masks, recover)
    small = prune(model, masks)
    if recover is not None:
        stay = [dense for dense, kept in zip(blocks_of(model), masks.blocks, strict=True) if kept]
        for dense, block in zip(stay, blocks_of(small), strict=True):
            recover(dense, block)
    return small


def _shrink_offloaded(
    cfg: RunConfig, model: PreTrainedModel, masks: Masks, recover: Callable[[Block, Block], None] | None
) -> PreTrainedModel:
    folder, removal = scratch_folder()
    with removal:
        save_pruned(prune_to_files(model, masks, folder / "blocks", recover), None, folder / "model")
        shutil.rmtree(folder / "blocks")
        small = load_weights(folder / "model", dtype=getattr(torch, cfg.model.dtype), **placement(cfg))
        keep_until_gone(small, removal.pop_all())
    return small


def placement(cfg: RunConfig) -> dict[str, Any]:
    """Where weights go, for what loads a model; nothing where the trainer's device says it all."""
    m = cfg.model
    return {} if m.device_map is None else {"device_map": m.device_map, "max_memory": m.max_memory}
