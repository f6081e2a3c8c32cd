"""Steps 3 to 6: drift, modules, and their reliability."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics, Moments, pool_statistics
from gprune.checks import format_value, select_options
from gprune.config.groups import AVERAGED, CONSENSUS
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.importance.scores import Scores, ffn_weights, fractional_ranks, generator_for, score_ffn, score_units
from gprune.models.blocks import Block
from gprune.models.offload import device_of
from gprune.partition.drift import half_agreement, kendall_agreement, module_agreements, noise_floor, rank_drift
from gprune.partition.initial import initial_partition, parameter_embedding, same_sizes_by_drift, shuffled_partition
from gprune.partition.modules import (
    Drift,
    ModuleRanks,
    Modules,
    assess_reliability,
    switched_share,
    within_module_ranks,
)
from gprune.partition.objective import refinement_inputs
from gprune.pipeline.run import Run
from gprune.registry import REFINER
from gprune.runs import tracking

log = logging.getLogger("gprune")
BLOCK_SEED_STEP = 7919  # distance of the seeds of neighbouring blocks, a prime, so that seeds of runs do not overlap


def measure_drift(run: Run, statistics: Mapping[str, CorpusStatistics]) -> list[Drift]:
    """Step 3: rank drift of every neuron and its split-half noise floor, per block.

    For a metric that ignores activations, drift is measured with the metric `IMPORTANCE[name].drift`. With one corpus,
    drift is 0.
    """
    run.step(3, "Measuring drift")
    drift = [drift_of_block(run, block, statistics) for block in run.blocks]
    mean = float(torch.cat([d.drift for d in drift]).mean())
    noise = float(torch.cat([d.floor for d in drift]).mean())
    log.info("Mean rank drift %.3f; sampling noise alone gives %.3f", mean, noise)
    return drift


def drift_of_block(run: Run, block: Block, statistics: Mapping[str, CorpusStatistics]) -> Drift:
    """Return the rank drift of one block's N neurons between the D drift corpora, and its noise floor."""
    cfg = run.cfg
    if block.down is None:
        no_neurons = torch.zeros(len(cfg.corpora.drift), 0, dtype=torch.float64)
        undefined = torch.tensor(float("nan"), dtype=torch.float64)
        return Drift(no_neurons, no_neurons, no_neurons[0], no_neurons[0], undefined)
    metric, weights = IMPORTANCE[cfg.importance].drift, ffn_weights(block)

    def score_neurons(moments: Moments) -> Tensor:
        """Score the neurons, (N,), from the moments of a corpus or of half of it."""
        return score_ffn(metric, block, weights, moments, generator_for(cfg.run.seed, block.index, "ffn"))

    by_corpus, by_half = [], []
    for corpus in cfg.corpora.drift:
        channels = statistics[corpus].ffn[block.index]
        by_corpus.append(score_neurons(channels.total))
        by_half.append(torch.stack([score_neurons(channels.half(h)) for h in (0, 1)]))
    scores = torch.stack(by_corpus)  # (D, N)
    ranks = fractional_ranks(scores, groups=block.experts)
    half_ranks = fractional_ranks(torch.stack(by_half), groups=block.experts)  # (D, 2, N)
    if block.has_experts:  # scores of different experts are on different scales
        scores = ranks.clone()
    return Drift(scores, ranks, rank_drift(ranks), noise_floor(half_ranks), half_agreement(half_ranks))


def partition(run: Run, drift: Sequence[Drift]) -> list[Tensor]:
    """Steps 4 and 5: module labels per block, (N,) int64, by `--partition.method`; (0,) for a block without an FFN."""
    run.step(4, "Partitioning")

    def compute() -> dict[str, Tensor]:
        labels = [torch.zeros(0, dtype=torch.long)] * len(run.blocks)
        ffn_blocks = [block for block in run.blocks if block.neurons]
        for block, block_labels in zip(ffn_blocks, compute_labels(run, ffn_blocks, drift), strict=True):
            labels[block.index] = block_labels
        return {f"labels.{b}": block_labels for b, block_labels in enumerate(labels)}

    tensors = run.folder.tensors("assignment", compute)
    return [tensors[f"labels.{b}"] for b in range(len(run.blocks))]


def compute_labels(run: Run, blocks: Sequence[Block], drift: Sequence[Drift]) -> list[Tensor]:
    """Compute the module labels, (N,) int64, of blocks with an FFN.

    The controls `random` and `drift_only` keep the refined module sizes and reassign the neurons.
    """
    p, seed = run.cfg.partition, run.cfg.run.seed
    log.info("Partitioning %d blocks into modules", len(blocks))
    embeddings, labels = [], []
    for block in blocks:
        embedding = parameter_embedding(ffn_weights(block, device_of(block.layer)), dim=p.embedding_dim, seed=seed)
        initial = initial_partition(
            embedding, drift[block.index].drift, num_modules=p.num_modules, similarity_weight=p.similarity_weight,
            drift_weight=p.drift_weight, seed=seed,
        )  # fmt: skip
        embeddings.append(embedding)
        labels.append(initial)
    if p.method == "initial":
        return labels
    refined = refine(run, embeddings, [drift[block.index] for block in blocks], labels)
    if p.method == "random":
        pairs = zip(blocks, refined, strict=True)
        return [shuffled_partition(of_block, seed=seed + BLOCK_SEED_STEP * block.index) for block, of_block in pairs]
    if p.method == "drift_only":
        pairs = zip(blocks, refined, strict=True)
        return [same_sizes_by_drift(of_block, drift[block.index].drift) for block, of_block in pairs]
    return refined


def refine(run: Run, embeddings: list[Tensor], drift: Sequence[Drift], labels: list[Tensor]) -> list[Tensor]:
    """Step 5: fit the refiner, and return refined labels, (N,) int64 for each block with an FFN."""
    run.step(5, "Refining")
    p = run.cfg.partition
    inputs = refinement_inputs(embeddings, [d.drift for d in drift], [d.ranks for d in drift])
    refiner, options = REFINER[p.refiner], run.cfg.options.get(p.refiner, {})
    stage = refiner(inputs, labels, **select_options(refiner, dict(p)) | options)
    validation = {"val_check_interval": 0.25} if is_overridden("validation_step", stage) else {}
    trainer = run.trainer("Refining modules", stage, role="partition", max_epochs=1, log_every_n_steps=10, **validation)
    trainer.fit(stage)
    run.callbacks.keep_state()
    refined = checked_labels(p.refiner, stage.labels(), labels)
    moved = sum(int((new != initial).sum()) for new, initial in zip(refined, labels, strict=True))
    neurons = sum(map(len, labels))
    log.info("Refinement moved %d of %d neurons", moved, neurons)
    run.folder.update_manifest(refinement={"moved": moved, "neurons": neurons})
    return refined


def checked_labels(name: str, value: Any, labels: Sequence[Tensor]) -> list[Tensor]:
    """Check the labels that a refiner returned, and return (N,) int64 on the CPU for each block with an FFN."""
    try:
        pairs = list(zip(value, labels, strict=True))
    except (TypeError, ValueError) as error:  # not a list, or a list of another length
        needed = f"a list with the labels of each of {len(labels)} blocks"
        raise UserError(f"Refiner '{name}' must return {needed}; got {format_value(value)}.") from error
    refined = [REFINER.checked(name, "labels", new, initial.shape, of="whole numbers") for new, initial in pairs]
    if any(new.min() < 0 or not torch.bincount(new).all() for new in refined):
        needed = "modules from 0 to K - 1 in each block, each with at least one neuron"
        raise UserError(f"Refiner '{name}' must return {needed}.")
    return [new.long().cpu() for new in refined]


def assess(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores, drift: list[Drift], labels: list[Tensor]
) -> Modules:
    """Step 6: decide which modules switch to `--reliability.metric`, and rank units inside their modules."""
    run.step(6, "Assessing reliability of modules")
    r = run.cfg.reliability
    switch = "off"
    if r.switch and len(run.cfg.corpora.drift) > 1:
        switch = "everywhere" if r.everywhere else "unreliable"
    base_ranks = [fractional_ranks(s, groups=b.experts) for s, b in zip(scores.ffn, run.blocks, strict=True)]
    reliability = assess_reliability(
        labels, base_ranks, [d.drift for d in drift], [d.floor for d in drift],
        sensitivity_quantile=r.sensitivity_quantile, score_quantile=r.score_quantile, switch=switch,
    )  # fmt: skip
    switched = [of_block.switched for of_block in reliability]
    by_block = zip(base_ranks, fallback_ranks(run, statistics), labels, switched, strict=True)
    ranks = ModuleRanks(
        ffn=[within_module_ranks(*of_block) for of_block in by_block],
        labels=labels,
        attention=[fractional_ranks(s, ties="ordinal") for s in scores.attention],
    )
    modules = Modules(
        ranks, drift, reliability,
        agreement=[module_agreements(d.scores, block_labels) for d, block_labels in zip(drift, labels, strict=True)],
        block_agreement=[kendall_agreement(d.scores) for d in drift],
    )  # fmt: skip
    run.folder.write("modules", modules.tensors())
    count, share = sum(int(of_block.sum()) for of_block in switched), switched_share(reliability)
    tracking.log_scalars(run.loggers, {"partition/switched_share": share}, step=0)
    level = logging.WARNING if switch != "off" and count == 0 else logging.INFO
    log.log(level, "%d modules with %.1f%% of the neurons switch to %s", count, 100 * share, r.metric)
    return modules


def fallback_ranks(run: Run, statistics: Mapping[str, CorpusStatistics]) -> list[Tensor]:
    """Return fractional ranks by `--reliability.metric` over each block, (N,) float64. Unreliable modules use them.

    Two values of `--reliability.metric` use the base metric (`cfg.importance`) on all drift corpora: `consensus` takes
    the mean of the ranks by corpus, and `averaged` the ranks by pooled statistics.
    """
    cfg = run.cfg
    metric, sources = cfg.reliability.metric, [statistics[corpus] for corpus in cfg.corpora.drift]
    if metric == AVERAGED:
        sources = [pool_statistics(sources)]
    elif metric != CONSENSUS:  # it ignores activations
        sources = sources[:1]
    if metric in (CONSENSUS, AVERAGED):
        metric = cfg.importance  # the ranks in `Drift` may be of another metric
    scores_by_source = [
        score_units(metric, run.blocks, source, seed=cfg.run.seed, attention=False).ffn for source in sources
    ]
    ranks = []
    for block, *block_scores in zip(run.blocks, *scores_by_source, strict=True):  # one score tensor per source
        ranks.append(fractional_ranks(torch.stack(block_scores), groups=block.experts).mean(0))
    return ranks
