"""Step 1: statistics by corpus."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from gprune.calibration.layerwise import check_walk, needs_walk
from gprune.calibration.statistics import CorpusStatistics, StoredGram, kind_of
from gprune.calibration.statistics_cache import StatisticsCache
from gprune.corpora.loaders import CorpusDataModule
from gprune.errors import UserError
from gprune.models.bfloat16 import has_fast_products
from gprune.models.blocks import Block
from gprune.models.offload import device_of
from gprune.pipeline.run import Run
from gprune.registry import CALIBRATOR
from gprune.runs.results import corpus_file
from gprune.runs.trainer import check_trainer, launched

log = logging.getLogger("gprune")


def calibrate(run: Run) -> dict[str, CorpusStatistics]:
    """Return statistics by corpus, from the cache if model, text and kind of statistics are the same."""
    run.step(1, "Calibrating")
    cfg, cache = run.cfg, statistics_cache(run)
    statistics = {corpus: cache.read(corpus, ["moments", *sorted(cfg.collects)]) for corpus in cfg.calibration_corpora}
    lacking = [of_corpus is None for of_corpus in statistics.values()]
    if cfg.processes > 1:  # another run may write to the cache at the same time
        lacking = agreed(run, lacking)
    missing = [corpus for corpus, lacks in zip(statistics, lacking, strict=True) if lacks]
    if missing:
        statistics |= collect(run, missing, cache)
    else:
        log.info("Statistics of %s are in the cache", ", ".join(statistics))
    for corpus in cfg.calibration_corpora:
        copy = f"statistics/{corpus_file(corpus)}"
        if run.folder.read(copy) is None:
            # without Gram matrices, which are hundreds of megabytes and stay in the cache
            small = {name: t for name, t in statistics[corpus].tensors().items() if kind_of(name) != "gram"}
            run.folder.write(copy, small, {"corpus": corpus})
    return statistics


def agreed(run: Run, lacking: Sequence[bool]) -> list[bool]:
    """Launch the processes of the run, and return which corpora any of them lacks.

    Processes may see different files in the cache. If each decided alone, one could wait for another in a different
    collective operation.

    Raises:
        UserError: if the processes are at different runs of a list.
    """
    fabric = launched(run.cfg.trainer)
    lacks = (fabric.broadcast(run.folder.key) != run.folder.key, *lacking)
    elsewhere, *lacking = (fabric.strategy.reduce_boolean_decision(mine, all=False) for mine in lacks)
    if elsewhere:
        raise UserError("All processes must be at the same run of a list. Run the same command again.")
    return lacking


def statistics_cache(run: Run) -> StatisticsCache:
    """Return the cache of statistics for this run's model and text."""
    cfg = run.cfg
    by_block = "saliency" not in cfg.collects and needs_walk(
        run.model, corpora=len(cfg.calibration_corpora), gram="gram" in cfg.collects, sharded=cfg.model.shard
    )
    if by_block:
        check_walk(run.model.config)
    # Calibrators of users have their own keys.
    other = cfg.settings()["corpora"].get("calibrator")
    own = {"calibrator": other, "options": cfg.options.get(other, {})} if other else {}
    # A sharded model computes on the trainer's device, wherever it was loaded.
    device = check_trainer(**cfg.trainer.lightning_arguments) if cfg.model.shard else device_of(run.model)
    return StatisticsCache(
        texts={corpus: run.text.train[corpus].content_hash for corpus in cfg.calibration_corpora},
        # Includes all that can change the last bits, so that a run does not depend on who filled the cache.
        bits={
            "model": run.fingerprint, "dtype": cfg.model.dtype, "device": device.type,
            "batch_size": cfg.corpora.batch_size, "world_size": cfg.processes,
            "halves": "first and second", **cfg.matmul_settings, **own,
        },
        scopes=("ffn", "attention") if cfg.attention else ("ffn",),
        walked_blocks=len(run.blocks) if by_block else None,
        gram_bits={"products": "bfloat16"} if has_fast_products(getattr(torch, cfg.model.dtype), device) else {},
    )  # fmt: skip


def collect(run: Run, corpora: list[str], cache: StatisticsCache) -> dict[str, CorpusStatistics]:
    """Collect statistics of corpora in one pass over each, and write them to the cache."""
    cfg = run.cfg
    collected = ["moments", *sorted(cfg.collects)]
    saliency = cache.scopes if "saliency" in collected else ()

    def store(corpus: str, block: Block, grams: dict[str, Tensor]) -> dict[str, StoredGram]:
        if block.index == 0:  # once per corpus, before anything is cached
            run.check_weights(f"calibration on {corpus}")
        return cache.store(corpus, block, grams)

    with run.folder.step("calibrate"):
        name = cfg.corpora.calibrator
        stage = CALIBRATOR[name](
            run.model, corpora, gram="gram" in collected, saliency=saliency, walk=cache.walked_blocks is not None,
            store=store, shard=cfg.model.shard, **cfg.options.get(name, {}),
        )  # fmt: skip
        data = CorpusDataModule(
            test=[run.text.train[c] for c in corpora], batch_size=cfg.corpora.batch_size, seed=cfg.run.seed
        )
        trainer = run.trainer(f"Calibrating on {', '.join(corpora)}", stage, inference_mode=not saliency)
        with run.folder.part(*corpora):  # all have the same number of tokens
            trainer.test(stage, data, verbose=False)
    for corpus in corpora:
        cache.write(corpus, stage.statistics[corpus], collected)
    return stage.statistics
