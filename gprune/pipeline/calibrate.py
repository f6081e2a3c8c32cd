"""Step 1: statistics by corpus."""

from __future__ import annotations

import logging
from dataclasses import asdict

from transformers import PreTrainedModel

from gprune.calibration.cache import StatisticsCache
from gprune.calibration.layerwise import walks
from gprune.calibration.statistics import CorpusStatistics, kind_of
from gprune.config import RunConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.models.blocks import decoder_layers
from gprune.models.offload import device_of
from gprune.pipeline.inputs import Text
from gprune.pipeline.run import Run
from gprune.runs.folder import corpus_file
from gprune.runs.trainer import check_trainer
from gprune.stages.calibration import CalibrationStage

log = logging.getLogger("gprune")


def calibrate(cfg: RunConfig, run: Run, model: PreTrainedModel, text: Text) -> dict[str, CorpusStatistics]:
    """Step 1: statistics by corpus, from the cache where model, text and kind of statistics are the same."""
    scopes = ("ffn", "attention") if cfg.sparsity.scope == "attention+ffn" else ("ffn",)
    by_block = "saliency" not in cfg.collects and walks(
        model, corpora=len(cfg.calibration), gram="gram" in cfg.collects, sharded=cfg.model.shard
    )

    # A sharded model computes where the trainer is, whatever device it is taken from.
    device = check_trainer(**asdict(cfg.trainer)) if cfg.model.shard else device_of(model)
    cache = StatisticsCache(
        texts={corpus: text.train[corpus].content_hash for corpus in cfg.calibration},
        # What may move the last bits too: the same run finds the same bits whatever the cache saw before.
        bits={
            "model": run.fingerprint, "dtype": cfg.model.dtype, "device": device.type,
            "batch_size": cfg.corpora.batch_size, "world_size": cfg.trainer.devices * cfg.trainer.num_nodes,
            "halves": "first and second",
        },
        scopes=scopes,
        walked_blocks=len(decoder_layers(model)) if by_block else None,
    )  # fmt: skip
    found = {corpus: cache.read(corpus, ["moments", *sorted(cfg.needs)]) for corpus in cfg.calibration}
    missing = [corpus for corpus, statistics in found.items() if statistics is None]
    if missing:
        found |= collect_missing(cfg, run, model, text, missing, cache, saliency=scopes)
    else:
        log.info("Statistics of %s are in the cache", ", ".join(found))
    for corpus in cfg.calibration:
        copy = f"statistics/{corpus_file(corpus)}"
        if run.folder.read(copy) is None:
            # without Gram matrices, which are hundreds of megabytes and stay in the cache
            small = {name: t for name, t in found[corpus].tensors().items() if kind_of(name) != "gram"}
            run.folder.write(copy, small, {"corpus": corpus})
    return found


def collect_missing(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    text: Text,
    corpora: list[str],
    cache: StatisticsCache,
    *,
    saliency: tuple[str, ...],
) -> dict[str, CorpusStatistics]:
    """Step 1, computed: one pass over each corpus, for this run and for those that find it in the cache.

    Args:
        saliency: the scopes of it, if any is collected.
    """
    kinds = ["moments", *sorted(cfg.collects)]
    saliency = saliency if "saliency" in kinds else ()
    with run.folder.step("calibrate"):
        stage = CalibrationStage(
            model, corpora, gram="gram" in kinds, saliency=saliency, walk=cache.walked_blocks is not None,
            store=cache.store, shard=cfg.model.shard,
        )  # fmt: skip
        data = CorpusDataModule(
            test=[text.train[c] for c in corpora], batch_size=cfg.corpora.batch_size, seed=cfg.run.seed
        )
        trainer = run.trainer(f"Calibrating on {', '.join(corpora)}", inference_mode=not saliency)
        trainer.test(stage, data, verbose=False)
    for corpus in corpora:
        cache.write(corpus, stage.statistics[corpus], kinds)
    return stage.statistics
