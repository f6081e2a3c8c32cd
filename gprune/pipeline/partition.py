"""Steps 3 to 6: drift, modules, and which of them can be trusted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics, Moments, pooled
from gprune.config import AVERAGED, CONSENSUS, RunConfig
from gprune.importance.metrics import IMPORTANCE
from gprune.importance.scores import Scores, generator_for, score_ffn, score_units
from gprune.importance.weights import UnitWeights, ffn_weights
from gprune.models.blocks import Block
from gprune.partition.drift import (
    above_noise,
    fractional_ranks,
    half_agreement,
    kendall_agreement,
    module_agreements,
    noise_floor,
    rank_drift,
)
from gprune.partition.initial import initial_partition, parameter_embedding, same_sizes_by_drift, shuffled_partition
from gprune.partition.objective import ObjectiveWeights, refinement_inputs
from gprune.partition.record import Drift, Modules
from gprune.partition.reliability import assess_reliability, switched_share, within_module_ranks
from gprune.pipeline.run import Run
from gprune.runs import tracking
from gprune.sparsity.thresholds import ModuleRanks
from gprune.stages.refinement import AssignmentRefinement

log = logging.getLogger("gprune")


def measure_drift(cfg: RunConfig, blocks: Sequence[Block], statistics: Mapping[str, CorpusStatistics]) -> list[Drift]:
    """Step 3: rank drift of every neuron and its split-half noise floor, per block.

    A metric that ignores activations has no drift of its own, and one that needs a Gram matrix cannot score half a
    corpus; another one stands in (`IMPORTANCE[name].drift`). One corpus has no drift at all.
    """
    corpora = cfg.corpora.drift
    name = IMPORTANCE[cfg.importance].drift
    found, raw = [], []
    for block in blocks:
        weights = ffn_weights(block)
        channels = [statistics[c].ffn[block.index] for c in corpora]

        def scored(moments: Moments, weights: UnitWeights = weights, block: Block = block) -> Tensor:
            return score_ffn(name, block, weights, moments, generator_for(cfg.run.seed, block.index, "ffn"))

        scores = torch.stack([scored(c.total) for c in channels])
        half_scores = torch.stack([torch.stack([scored(c.half(h)) for h in (0, 1)]) for c in channels])
        ranks = fractional_ranks(scores, groups=block.experts)
        half_ranks = fractional_ranks(half_scores, groups=block.experts)
        floor, halves = noise_floor(half_ranks), half_agreement(half_ranks)
        if block.has_experts:  # scores of different experts are on different scales
            scores = ranks.clone()
        drift = rank_drift(ranks)
        raw.append(drift)
        drift = above_noise(drift, floor) if cfg.partition.subtract_noise else drift
        found.append(Drift(scores, ranks, drift, floor, halves))
    if len(corpora) < 2:
        log.warning("One drift corpus (%s): rank drift and the metric switch are off.", corpora[0])
    else:
        mean = float(torch.cat(raw).mean())
        noise = float(torch.cat([d.floor for d in found]).mean())
        log.info("Rank drift %.3f on average, of which sampling alone would show %.3f", mean, noise)
    return found


def partition_neurons(cfg: RunConfig, run: Run, blocks: Sequence[Block], drift: Sequence[Drift]) -> list[Tensor]:
    """Steps 4 and 5: module labels per block, by the method of `--partition.method`."""

    def compute() -> dict[str, Tensor]:
        labels = initial_and_refined(cfg, run, blocks, drift)
        return {f"labels.{b}": y for b, y in enumerate(labels)}

    tensors = run.folder.tensors("assignment", compute)
    return [tensors[f"labels.{b}"] for b in range(len(blocks))]


def initial_and_refined(cfg: RunConfig, run: Run, blocks: Sequence[Block], drift: Sequence[Drift]) -> list[Tensor]:
    """The partition, computed; the controls take the refined sizes."""
    p = cfg.partition
    log.info("Partitioning %d blocks into modules", len(blocks))
    embeddings = [parameter_embedding(ffn_weights(b), dim=p.embedding_dim, seed=cfg.run.seed) for b in blocks]
    labels = [
        initial_partition(
            e, d.drift, num_modules=p.num_modules, similarity_weight=p.similarity_weight,
            drift_weight=p.drift_weight, seed=cfg.run.seed,
        )
        for e, d in zip(embeddings, drift, strict=True)
    ]  # fmt: skip
    if p.method == "initial":
        return labels
    stage = AssignmentRefinement(
        refinement_inputs(embeddings, [d.drift for d in drift], [d.ranks for d in drift]),
        labels,
        weights=ObjectiveWeights(
            p.similarity_weight, p.drift_weight, p.consistency_weight, p.balance_weight, p.entropy_weight
        ),
        steps=p.steps,
        learning_rate=p.learning_rate,
    )
    run.trainer("Refining modules", max_epochs=1, log_every_n_steps=10).fit(stage)
    refined = stage.labels()
    run.folder.update_manifest(
        refinement={
            "moved": stage.moved(),
            "neurons": sum(map(len, labels)),
            "terms_at_start": stage.history[0],
            "terms_at_end": stage.history[-1],
        }
    )
    log.info("Refinement moved %d of %d neurons", stage.moved(), sum(map(len, labels)))
    if p.method == "random":
        return [shuffled_partition(y, seed=cfg.run.seed + 7919 * b) for b, y in enumerate(refined)]
    if p.method == "drift_only":
        return [same_sizes_by_drift(y, d.drift) for y, d in zip(refined, drift, strict=True)]
    return refined


def rank_inside_modules(
    cfg: RunConfig,
    run: Run,
    blocks: Sequence[Block],
    statistics: Mapping[str, CorpusStatistics],
    scores: Scores,
    drift: list[Drift],
    labels: list[Tensor],
) -> tuple[Modules, ModuleRanks]:
    """Step 6: which modules switch to the activation-free metric (or to what all drift corpora say together), and
    every unit's rank inside its module.
    """
    r = cfg.reliability
    block_ranks = [fractional_ranks(s, groups=b.experts) for s, b in zip(scores.ffn, blocks, strict=True)]
    switch = r.switch and len(cfg.corpora.drift) > 1
    reliability = assess_reliability(
        labels, block_ranks, [d.drift for d in drift], 
        # Drift from which the floor is subtracted is above it wherever it is above 0.
        [torch.zeros_like(d.floor) if cfg.partition.subtract_noise else d.floor for d in drift],
        sensitivity_quantile=r.sensitivity_quantile, score_quantile=r.score_quantile, switch=switch,
        everywhere=r.everywhere,
    )  # fmt: skip
    if r.metric == CONSENSUS:
        fallback = [d.ranks.mean(0) for d in drift]
    else:
        source, name = statistics[cfg.corpora.score], r.metric
        if r.metric == AVERAGED:
            source, name = pooled(statistics[corpus] for corpus in cfg.corpora.drift), cfg.importance
        free = score_units(name, blocks, source, seed=cfg.run.seed, attention=False).ffn
        fallback = [fractional_ranks(s, groups=b.experts) for s, b in zip(free, blocks, strict=True)]
    ranks = ModuleRanks(
        ffn=[
            within_module_ranks(s, f, y, record.switched)
            for s, f, y, record in zip(block_ranks, fallback, labels, reliability, strict=True)
        ],
        labels=labels,
        attention=[fractional_ranks(s) for s in scores.attention],
    )
    modules = Modules(
        labels, drift, reliability,
        agreement=[module_agreements(d.scores, y) for d, y in zip(drift, labels, strict=True)],
        block_agreement=[kendall_agreement(d.scores) for d in drift],
    )  # fmt: skip
    run.folder.write("modules", modules.tensors())
    share, count = switched_share(reliability), sum(int(record.switched.sum()) for record in reliability)
    run.folder.update_manifest(switch={"modules": count, "share_of_neurons": share})
    tracking.log_scalars(run.loggers, {"partition/switched_share": share}, step=0)
    if switch and count == 0:
        log.warning("No module switches to %s: the switch does nothing at these quantiles.", r.metric)
    elif switch:
        log.info("%d modules with %.1f%% of the neurons switch to %s", count, 100 * share, r.metric)
    return modules, ranks
