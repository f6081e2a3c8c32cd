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
BLOCK_SEED_STEP = 7919  # distance of the seeds of neighbouring blocks, a prime, so that seeds of runs do not overlap


def measure_drift(run: Run, statistics: Mapping[str, CorpusStatistics]) -> list[Drift]:
    """Step 3: rank drift of every neuron and its split-half noise floor, per block.

    For a metric that ignores activations, drift is measured with the metric `IMPORTANCE[name].drift`. With one corpus,
    drift is 0.
    """
    run.step(3, "Measuring drift")
    corpora = run.cfg.corpora.drift
    drift = [_drift_of(run, block, [statistics[corpus] for corpus in corpora]) for block in run.blocks]
    mean = float(torch.cat([d.drift for d in drift]).mean())
    noise = float(torch.cat([d.floor for d in drift]).mean())
    log.info("Mean rank drift %.3f; sampling noise alone gives %.3f", mean, noise)
    return drift


def _drift_of(run: Run, block: Block, statistics: Sequence[CorpusStatistics]) -> Drift:
    """Return the rank drift of one block's N neurons between D corpora, and its noise floor."""
    if block.down is None:
        no_neurons = torch.zeros(len(statistics), 0, dtype=torch.float64)
        undefined = torch.tensor(float("nan"), dtype=torch.float64)
        return Drift(no_neurons, no_neurons, no_neurons[0], no_neurons[0], undefined)
    metric, weights = IMPORTANCE[run.cfg.importance].drift, ffn_weights(block)
    moments_by_corpus = [of_corpus.ffn[block.index] for of_corpus in statistics]

    def score(moments: Moments) -> Tensor:
        """Score the neurons, (N,), from the moments of a corpus or of half of it."""
        return score_ffn(metric, block, weights, moments, generator_for(run.cfg.run.seed, block.index, "ffn"))

    scores = torch.stack([score(of_corpus.total) for of_corpus in moments_by_corpus])  # (D, N)
    half_scores = torch.stack(
        [torch.stack([score(of_corpus.half(h)) for h in (0, 1)]) for of_corpus in moments_by_corpus]
    )  # (D, 2, N)
    ranks = fractional_ranks(scores, groups=block.experts)
    half_ranks = fractional_ranks(half_scores, groups=block.experts)
    if block.has_experts:  # scores of different experts are on different scales
        scores = ranks.clone()
    return Drift(scores, ranks, rank_drift(ranks), noise_floor(half_ranks), half_agreement(half_ranks))


def partition(run: Run, drift: Sequence[Drift]) -> list[Tensor]:
    """Steps 4 and 5: module labels per block, (N,) int64, by `--partition.method`."""
    run.step(4, "Partitioning")

    def compute() -> dict[str, Tensor]:
        return {f"labels.{b}": labels for b, labels in enumerate(compute_labels(run, drift))}

    tensors = run.folder.tensors("assignment", compute)
    return [tensors[f"labels.{b}"] for b in range(len(run.blocks))]


def compute_labels(run: Run, drift: Sequence[Drift]) -> list[Tensor]:
    """Compute the module labels of every block, (N,) int64, and (0,) for a block without an FFN.

    The controls `random` and `drift_only` keep the refined module sizes and reassign the neurons.
    """
    p, seed = run.cfg.partition, run.cfg.run.seed
    ffn_blocks = [block for block in run.blocks if block.neurons]
    log.info("Partitioning %d blocks into modules", len(ffn_blocks))
    ffn_drift = [drift[block.index] for block in ffn_blocks]
    embeddings = [
        parameter_embedding(ffn_weights(block, device_of(block.layer)), dim=p.embedding_dim, seed=seed)
        for block in ffn_blocks
    ]
    labels = [
        initial_partition(
            embedding, block_drift.drift, num_modules=p.num_modules, similarity_weight=p.similarity_weight,
            drift_weight=p.drift_weight, seed=seed,
        )
        for embedding, block_drift in zip(embeddings, ffn_drift, strict=True)
    ]  # fmt: skip
    if p.method != "initial":
        labels = refine(run, embeddings, ffn_drift, labels)
    if p.method == "random":
        seeds = [seed + BLOCK_SEED_STEP * block.index for block in ffn_blocks]
        labels = [
            shuffled_partition(block_labels, seed=block_seed)
            for block_labels, block_seed in zip(labels, seeds, strict=True)
        ]
    if p.method == "drift_only":
        labels = [
            same_sizes_by_drift(block_labels, block_drift.drift)
            for block_labels, block_drift in zip(labels, ffn_drift, strict=True)
        ]
    by_block = {block.index: block_labels for block, block_labels in zip(ffn_blocks, labels, strict=True)}
    no_labels = torch.zeros(0, dtype=torch.long)
    return [by_block.get(b, no_labels) for b in range(len(run.blocks))]


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
    block_ranks = [fractional_ranks(s, groups=b.experts) for s, b in zip(scores.ffn, run.blocks, strict=True)]
    reliability = assess_reliability(
        labels, block_ranks, [d.drift for d in drift], [d.floor for d in drift],
        sensitivity_quantile=r.sensitivity_quantile, score_quantile=r.score_quantile, switch=switch,
    )  # fmt: skip
    block_fallback_ranks = fallback_ranks(run, statistics)
    module_ranks = [
        within_module_ranks(base_ranks, fallback, block_labels, of_block.switched)
        for base_ranks, fallback, block_labels, of_block in zip(
            block_ranks, block_fallback_ranks, labels, reliability, strict=True
        )
    ]
    ranks = ModuleRanks(
        ffn=module_ranks,
        labels=labels,
        attention=[fractional_ranks(s, ties="ordinal") for s in scores.attention],
    )
    modules = Modules(
        ranks, drift, reliability,
        agreement=[module_agreements(d.scores, block_labels) for d, block_labels in zip(drift, labels, strict=True)],
        block_agreement=[kendall_agreement(d.scores) for d in drift],
    )  # fmt: skip
    run.folder.write("modules", modules.tensors())
    share = switched_share(reliability)
    count = sum(int(of_block.switched.sum()) for of_block in reliability)
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
    metric, sources = cfg.reliability.metric, [statistics[cfg.corpora.scored[0]]]
    if cfg.reliability.metric in (CONSENSUS, AVERAGED):
        metric = cfg.importance  # the ranks in `Drift` may be of another metric
        sources = [statistics[corpus] for corpus in cfg.corpora.drift]
    if cfg.reliability.metric == AVERAGED:
        sources = [pool_statistics(sources)]
    scores_by_source = [
        score_units(metric, run.blocks, source, seed=cfg.run.seed, attention=False).ffn for source in sources
    ]
    ranks = []
    for block, *block_scores in zip(run.blocks, *scores_by_source, strict=True):  # one score tensor per source
        ranks.append(fractional_ranks(torch.stack(block_scores), groups=block.experts).mean(0))
    return ranks
