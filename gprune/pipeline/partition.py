"""Steps 3 to 6: drift, modules, and their reliability."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics, Moments, pool_statistics
from gprune.checks import select_options
from gprune.config.groups import AVERAGED, CONSENSUS
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.importance.scores import Scores, fractional_ranks, generator_for, score_ffn, score_units
from gprune.importance.weights import ffn_weights
from gprune.models.blocks import Block
from gprune.models.offload import device_of
from gprune.partition.drift import half_agreement, kendall_agreement, module_agreements, noise_floor, rank_drift
from gprune.partition.initial import initial_partition, parameter_embedding, same_sizes_by_drift, shuffled_partition
from gprune.partition.modules import Drift, ModuleRanks, Modules
from gprune.partition.objective import refinement_inputs
from gprune.partition.reliability import assess_reliability, switched_share, within_module_ranks
from gprune.pipeline.run import Run
from gprune.registry import REFINER
from gprune.runs import tracking

log = logging.getLogger("gprune")


def measure_drift(run: Run, statistics: Mapping[str, CorpusStatistics]) -> list[Drift]:
    """Step 3: rank drift of every neuron and its split-half noise floor, per block.

    Metrics that ignore activations have no drift; the drift of another metric is used (`IMPORTANCE[name].drift`). With
    one corpus there is no drift.
    """
    run.step(3, "Measuring drift")
    corpora = run.cfg.corpora.drift
    drift = [_drift_of(run, block, [statistics[corpus] for corpus in corpora]) for block in run.blocks]
    mean = float(torch.cat([d.drift for d in drift]).mean())
    noise = float(torch.cat([d.floor for d in drift]).mean())
    log.info("Mean rank drift %.3f; sampling noise alone gives %.3f", mean, noise)
    return drift


def _drift_of(run: Run, block: Block, statistics: Sequence[CorpusStatistics]) -> Drift:
    """Return the rank drift of one block's neurons between corpora, and its noise floor."""
    if block.down is None:
        none = torch.zeros(len(statistics), 0, dtype=torch.float64)
        return Drift(none, none, none[0], none[0], torch.tensor(float("nan"), dtype=torch.float64))
    name, weights = IMPORTANCE[run.cfg.importance].drift, ffn_weights(block)
    channels = [s.ffn[block.index] for s in statistics]

    def scored(moments: Moments) -> Tensor:
        return score_ffn(name, block, weights, moments, generator_for(run.cfg.run.seed, block.index, "ffn"))

    scores = torch.stack([scored(c.total) for c in channels])
    half_scores = torch.stack([torch.stack([scored(c.half(h)) for h in (0, 1)]) for c in channels])
    ranks = fractional_ranks(scores, groups=block.experts)
    half_ranks = fractional_ranks(half_scores, groups=block.experts)
    floor = noise_floor(half_ranks)
    if block.has_experts:  # scores of different experts are on different scales
        scores = ranks.clone()
    return Drift(scores, ranks, rank_drift(ranks), floor, half_agreement(half_ranks))


def partition(run: Run, drift: Sequence[Drift]) -> list[Tensor]:
    """Steps 4 and 5: module labels per block, (N,) int64, by `--partition.method`."""
    run.step(4, "Partitioning")
    tensors = run.folder.tensors(
        "assignment", lambda: {f"labels.{b}": y for b, y in enumerate(partitioned(run, drift))}
    )
    return [tensors[f"labels.{b}"] for b in range(len(run.blocks))]


def partitioned(run: Run, drift: Sequence[Drift]) -> list[Tensor]:
    """Compute the partition. Control methods use the sizes of refined modules. Blocks without an FFN have no labels."""
    p, seed = run.cfg.partition, run.cfg.run.seed
    own = [block.index for block in run.blocks if block.neurons]
    log.info("Partitioning %d blocks into modules", len(own))
    weights = (ffn_weights(run.blocks[b], device_of(run.blocks[b].layer)) for b in own)
    drift = [drift[b] for b in own]
    embeddings = [parameter_embedding(of_block, dim=p.embedding_dim, seed=seed) for of_block in weights]
    how = p.model_dump(include={"num_modules", "similarity_weight", "drift_weight"}) | {"seed": seed}
    labels = [initial_partition(e, d.drift, **how) for e, d in zip(embeddings, drift, strict=True)]
    if p.method != "initial":
        labels = refine(run, embeddings, drift, labels)
    if p.method == "random":
        labels = [shuffled_partition(y, seed=seed + 7919 * b) for b, y in zip(own, labels, strict=True)]
    if p.method == "drift_only":
        labels = [same_sizes_by_drift(y, d.drift) for y, d in zip(labels, drift, strict=True)]
    none, found = torch.zeros(0, dtype=torch.long), dict(zip(own, labels, strict=True))
    return [found.get(b, none) for b in range(len(run.blocks))]


def refine(run: Run, embeddings: list[Tensor], drift: Sequence[Drift], labels: list[Tensor]) -> list[Tensor]:
    """Step 5: fit the refiner, and return refined labels per block."""
    run.step(5, "Refining")
    p = run.cfg.partition
    inputs = refinement_inputs(embeddings, [d.drift for d in drift], [d.ranks for d in drift])
    refiner, options = REFINER[p.refiner], run.cfg.options.get(p.refiner, {})
    stage = refiner(inputs, labels, **select_options(refiner, dict(p)) | options)
    often = {"val_check_interval": 0.25} if is_overridden("validation_step", stage) else {}
    run.trainer("Refining modules", stage, role="partition", max_epochs=1, log_every_n_steps=10, **often).fit(stage)
    run.callbacks.keep_state()
    pairs = zip(stage.labels(), labels, strict=True)
    refined = [REFINER.checked(p.refiner, "labels", y, old.shape, of="whole numbers") for y, old in pairs]
    if any(y.min() < 0 or not torch.bincount(y).all() for y in refined):
        needed = "modules from 0 to K - 1 in each block, each with at least one neuron"
        raise UserError(f"Refiner '{p.refiner}' must return {needed}.")
    refined = [y.long().cpu() for y in refined]
    moved = {"moved": sum(int((y != old).sum()) for y, old in zip(refined, labels, strict=True))}
    moved["neurons"] = sum(map(len, labels))
    log.info("Refinement moved %(moved)d of %(neurons)d neurons", moved)
    run.folder.update_manifest(refinement=moved)
    return refined


def assess(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores, drift: list[Drift], labels: list[Tensor]
) -> Modules:
    """Step 6: decide which modules switch to `--reliability.metric`, and rank units inside their modules."""
    run.step(6, "Assessing reliability of modules")
    r, switch = run.cfg.reliability, "off"
    if r.switch and len(run.cfg.corpora.drift) > 1:
        switch = "everywhere" if r.everywhere else "unreliable"
    block_ranks = [fractional_ranks(s, groups=b.experts) for s, b in zip(scores.ffn, run.blocks, strict=True)]
    reliability = assess_reliability(
        labels, block_ranks, [d.drift for d in drift], [d.floor for d in drift],
        sensitivity_quantile=r.sensitivity_quantile, score_quantile=r.score_quantile, switch=switch,
    )  # fmt: skip
    of_blocks = zip(block_ranks, fallback_ranks(run, statistics), labels, reliability, strict=True)
    ranks = ModuleRanks(
        ffn=[within_module_ranks(own, fallback, y, judged.switched) for own, fallback, y, judged in of_blocks],
        labels=labels,
        attention=[fractional_ranks(s, ties="ordinal") for s in scores.attention],
    )
    modules = Modules(
        ranks, drift, reliability,
        agreement=[module_agreements(d.scores, y) for d, y in zip(drift, labels, strict=True)],
        block_agreement=[kendall_agreement(d.scores) for d in drift],
    )  # fmt: skip
    run.folder.write("modules", modules.tensors())
    share, count = switched_share(reliability), sum(int(judged.switched.sum()) for judged in reliability)
    tracking.log_scalars(run.loggers, {"partition/switched_share": share}, step=0)
    level = logging.WARNING if switch != "off" and count == 0 else logging.INFO
    log.log(level, "%d modules with %.1f%% of the neurons switch to %s", count, 100 * share, r.metric)
    return modules


def fallback_ranks(run: Run, statistics: Mapping[str, CorpusStatistics]) -> list[Tensor]:
    """Return ranks inside blocks by `--reliability.metric`, to which unreliable modules switch: (N,) per block."""
    cfg, name = run.cfg, run.cfg.reliability.metric
    sources = [statistics[cfg.corpora.score]]
    if name in (CONSENSUS, AVERAGED):
        sources = [statistics[corpus] for corpus in cfg.corpora.drift]
        sources = [pool_statistics(sources)] if name == AVERAGED else sources
        name = cfg.importance  # not the ranks of drift, which may be of another metric
    scores = [score_units(name, run.blocks, s, seed=cfg.run.seed, attention=False).ffn for s in sources]
    return [
        fractional_ranks(torch.stack(of_block), groups=b.experts).mean(0)
        for *of_block, b in zip(*scores, run.blocks, strict=True)
    ]
