"""Step 1: statistics by corpus."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from gprune.calibration.layerwise import check_walk, needs_walk
from gprune.calibration.statistics import CorpusStatistics, StatisticsCache, StoredGram, kind_of
from gprune.corpora.loaders import CorpusDataModule
from gprune.errors import UserError
from gprune.models.blocks import Block
from gprune.models.offload import device_of
from gprune.models.products import has_fast_products
from gprune.pipeline.run import Run
from gprune.registry import CALIBRATOR
from gprune.runs.results import corpus_file
from gprune.runs.trainer import check_trainer, launch_processes
from gprune.storage.environment import model_versions

log = logging.getLogger("gprune")


def calibrate(run: Run) -> dict[str, CorpusStatistics]:
    """Step 1: return statistics by corpus, and write them to the run's folder without Gram matrices.

    Statistics are read from the cache. Those that the cache does not have for this model, text and kind are collected.
    """
    run.step(1, "Calibrating")
    cfg = run.cfg
    cache = statistics_cache(run)
    kinds = ["moments", *sorted(cfg.collects)]
    statistics = {corpus: cache.read(corpus, kinds) for corpus in cfg.calibration_corpora}
    missing = [of_corpus is None for of_corpus in statistics.values()]
    if cfg.processes > 1:  # another run may write to the cache at the same time
        missing = missing_on_any_rank(run, missing)
    to_collect = [corpus for corpus, is_missing in zip(statistics, missing, strict=True) if is_missing]
    if to_collect:
        statistics |= collect_statistics(run, to_collect, kinds, cache)
    else:
        log.info("Statistics of %s are in the cache", ", ".join(statistics))
    for corpus in cfg.calibration_corpora:
        file = f"statistics/{corpus_file(corpus)}"
        if run.folder.read(file) is None:
            # Gram matrices take hundreds of megabytes, so they are only in the cache.
            tensors = {name: t for name, t in statistics[corpus].tensors().items() if kind_of(name) != "gram"}
            run.folder.write(file, tensors, {"corpus": corpus})
    return statistics


def missing_on_any_rank(run: Run, missing: Sequence[bool]) -> list[bool]:
    """Launch the run's processes. Return for each corpus whether its statistics are missing on at least one rank.

    Ranks may see different files in the cache. They have to decide together, otherwise they could enter different
    collectives and deadlock.
    """
    fabric = launch_processes(run.cfg.trainer)

    def on_any_rank(value: bool) -> bool:
        return fabric.strategy.reduce_boolean_decision(value, all=False)

    different_run = on_any_rank(fabric.broadcast(run.folder.key) != run.folder.key)
    missing_anywhere = [on_any_rank(is_missing) for is_missing in missing]
    if different_run:
        raise UserError("All processes must be at the same run of a list. Run the same command again.")
    return missing_anywhere


def statistics_cache(run: Run) -> StatisticsCache:
    """Return the cache of statistics for this run's model and text."""
    cfg = run.cfg
    by_block = "saliency" not in cfg.collects and needs_walk(
        run.model, corpora=len(cfg.calibration_corpora), gram="gram" in cfg.collects, sharded=cfg.model.shard
    )
    if by_block:
        check_walk(run.model.config)
    calibrator = cfg.settings()["corpora"].get("calibrator")  # None for the built-in one
    user_calibrator = {}
    if calibrator:
        code = CALIBRATOR.code(calibrator)
        user_calibrator = {"calibrator": calibrator, "options": cfg.options.get(calibrator, {}), "code": code}
        if None in code.values():  # the code may have changed, so only this run may use its statistics again
            user_calibrator["run"] = str(run.folder.path.resolve())
    # A sharded model computes on the trainer's device, wherever it was loaded.
    device = check_trainer(**cfg.trainer.lightning_arguments) if cfg.model.shard else device_of(run.model)
    return StatisticsCache(
        texts={corpus: run.text.train[corpus].content_hash for corpus in cfg.calibration_corpora},
        # Everything that can change the last bits is part of the key, so that results do not depend on which run
        # has filled the cache. `halves`: how windows are split for the noise floor, which earlier versions did
        # in another way.
        bits={
            "model": run.fingerprint, "dtype": cfg.model.dtype, "device": device.type,
            "batch_size": cfg.corpora.batch_size, "world_size": cfg.processes,
            "halves": "first and second", "versions": model_versions(), **cfg.matmul_settings, **user_calibrator,
        },
        scopes=("ffn", "attention") if cfg.attention else ("ffn",),
        walked_blocks=len(run.blocks) if by_block else None,
        gram_bits={"products": "bfloat16"} if has_fast_products(getattr(torch, cfg.model.dtype), device) else {},
    )  # fmt: skip


def collect_statistics(
    run: Run, corpora: list[str], kinds: list[str], cache: StatisticsCache
) -> dict[str, CorpusStatistics]:
    """Collect the statistics of corpora in one pass over each corpus, and write them to the cache."""
    cfg = run.cfg
    saliency = cache.scopes if "saliency" in kinds else ()

    def store(corpus: str, block: Block, grams: dict[str, Tensor]) -> dict[str, StoredGram]:
        """Move the Gram matrices of a block to the cache."""
        if block.index == 0:  # once per corpus, before anything is cached
            run.check_weights(f"calibration on {corpus}")
        return cache.store(corpus, block, grams)

    with run.folder.step("calibrate"):
        name = cfg.corpora.calibrator
        stage = CALIBRATOR[name](
            run.model, corpora, gram="gram" in kinds, saliency=saliency, walk=cache.walked_blocks is not None,
            store=store, shard=cfg.model.shard, **cfg.options.get(name, {}),
        )  # fmt: skip
        data = CorpusDataModule(
            test=[run.text.train[corpus] for corpus in corpora], batch_size=cfg.corpora.batch_size, seed=cfg.run.seed
        )
        trainer = run.trainer(f"Calibrating on {', '.join(corpora)}", stage, inference_mode=not saliency)
        with run.folder.part(*corpora, shared=True):  # the tokens are split evenly, as all corpora have the same number
            trainer.test(stage, data, verbose=False)
    for corpus in corpora:
        cache.write(corpus, stage.statistics[corpus], kinds)
    return stage.statistics
