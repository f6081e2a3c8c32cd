"""Steps 1 to 8: from statistics to keep masks. Each wires pure functions and a stage to the run folder."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune import tracking
from gprune.allocation import allocate, depth_masks
from gprune.architectures import Block, blocks_of, decoder_layers
from gprune.callbacks import ApplyMasks, ModuleReport, PerplexityCurve, log_modules
from gprune.config import AVERAGED, CONSENSUS, RunConfig
from gprune.data import CorpusDataModule
from gprune.drift import (
    above_noise,
    fractional_ranks,
    half_agreement,
    kendall_agreement,
    module_agreements,
    noise_floor,
    rank_drift,
)
from gprune.importance import (
    IMPORTANCE,
    Scores,
    UnitWeights,
    ffn_weights,
    generator_for,
    score_ffn,
    score_units,
)
from gprune.masks import Masks, UnitCosts, check_budget, keep_masks
from gprune.offload import device_of
from gprune.partition import (
    ObjectiveWeights,
    initial_partition,
    parameter_embedding,
    refinement_inputs,
    same_sizes_by_drift,
    shuffled_partition,
)
from gprune.preparation import Text
from gprune.recovery import least_squares_correction
from gprune.reliability import assess_reliability, switched_share, within_module_ranks
from gprune.results import Drift, Modules, corpus_file
from gprune.session import Run
from gprune.stages.assignment import AssignmentRefinement
from gprune.stages.calibration import CalibrationStage
from gprune.stages.sparsity import (
    Corrections,
    ModuleRanks,
    Recover,
    ThresholdLearning,
    masks_from_thresholds,
    start_thresholds,
)
from gprune.statistics import KINDS, CorpusStatistics, Moments, kind_of, pooled
from gprune.statistics_cache import StatisticsCache
from gprune.trainer import check_trainer
from gprune.walk import walks

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


def base_masks(
    cfg: RunConfig,
    blocks: Sequence[Block],
    scores: Scores,
    statistics: CorpusStatistics,
    costs: UnitCosts,
    target: int,
) -> Masks:
    """The base metric alone, its sparsity spread over blocks by `--sparsity.allocation` (or `.start`).

    Args:
        scores: of the metric; statistics: of the text they come from.
    """
    s, name = cfg.sparsity, cfg.base_allocation
    if name == "depth":
        return depth_masks(
            scores, statistics, blocks, target=target, width_multiple=s.width_multiple, protected=costs.protected
        )
    options = {"multiple": s.owl_multiple, "spread": s.owl_spread} if name == "owl" else {}
    neurons, groups = allocate(name, scores, statistics, blocks, s.target, **options)
    return keep_masks(costs, neurons, groups, target=target, width_multiple=s.width_multiple)


def base_candidates(
    cfg: RunConfig,
    blocks: Sequence[Block],
    statistics: Mapping[str, CorpusStatistics],
    scores: Scores,
    costs: UnitCosts,
    target: int,
) -> dict[str, Masks]:
    """Masks of the base metric: `base` by `scores`, those of `corpora.score`; `base_averaged`, where it is a row of the
    table, by the same metric on all drift corpora together.
    """
    found = {"base": base_masks(cfg, blocks, scores, statistics[cfg.corpora.score], costs, target)}
    if "base_averaged" in dict(cfg.stages):
        pool = pooled(statistics[corpus] for corpus in cfg.corpora.drift)
        averaged = score_units(cfg.importance, blocks, pool, seed=cfg.run.seed, attention=costs.attention)
        found["base_averaged"] = base_masks(cfg, blocks, averaged, pool, costs, target)
    return found


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


def learn_sparsity(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    text: Text,
    statistics: Mapping[str, CorpusStatistics],
    modules: Modules,
    ranks: ModuleRanks,
    base: Masks,
    costs: UnitCosts,
    target: int,
) -> tuple[tuple[list[Tensor], list[Tensor]], Masks]:
    """Steps 7 and 8: thresholds per module, and the masks that meet the budget with them.

    Without learning, thresholds are equal everywhere (`equal`) or those that learning would start from: every module
    keeps as much as the base metric keeps of it under its own allocation.
    """
    s = cfg.sparsity
    if s.allocation == "learned":
        compute = functools.partial(
            fit_thresholds, cfg, run, model, text, statistics, modules, ranks, base, costs, target
        )
    elif s.allocation == "equal":
        compute = functools.partial(equal_thresholds, ranks)
    else:
        compute = functools.partial(named_thresholds, start_thresholds(base, ranks))
    taken_up = run.folder.read("thresholds") is not None
    tensors = run.folder.tensors("thresholds", compute)
    thresholds = tuple([tensors[f"{kind}.{b}"] for b in range(len(ranks.ffn))] for kind in ("ffn", "attention"))
    if "offsets.0" in tensors:
        ranks = ranks.moved([tensors[f"offsets.{b}"] for b in range(len(ranks.ffn))])
    masks = masks_from_thresholds(ranks, thresholds, costs, target=target, width_multiple=s.width_multiple)
    if taken_up or not cfg.learns:  # else the ModuleReport of the fit has done it
        log_modules(run.loggers, modules.rows(), masks, modules.labels)
    return thresholds, masks


def make_corrections(cfg: RunConfig, model: PreTrainedModel, statistics: Mapping[str, CorpusStatistics]) -> Recover:
    """A function of masks: what `least_squares` on the recovery corpora adds to the frozen model's projections."""
    pool = pooled(statistics[c] for c in cfg.corpora.recover)

    def corrections(masks: Masks) -> Corrections:
        found: Corrections = ([], [])
        for block in blocks_of(model):
            keeps = masks.channels(block)
            for added, (kind, part) in zip(found, KINDS, strict=True):
                if bool((keep := keeps[kind]).all()):
                    added.append(None)
                    continue
                weight, moments = block.parts[part].weight.detach(), getattr(pool, kind)[block.index].total
                correction = least_squares_correction(weight.cpu(), keep, moments, ridge=cfg.ridge)
                added.append(correction.to(weight.device))  # once, and not at each forward pass
        return found

    return corrections


def equal_thresholds(ranks: ModuleRanks) -> dict[str, Tensor]:
    """The same threshold everywhere: every module loses the same fraction."""
    ffn = [torch.zeros(k, dtype=torch.float64) for k in ranks.modules]
    return named_thresholds((ffn, [torch.zeros(1, dtype=torch.float64) for _ in ranks.attention]))


def named_thresholds(thresholds: tuple[Sequence[Tensor], Sequence[Tensor]]) -> dict[str, Tensor]:
    """Thresholds per block of neurons and of KV groups, as saved in safetensors."""
    pairs = zip(("ffn", "attention"), thresholds, strict=True)
    return {f"{kind}.{b}": t.detach().cpu() for kind, group in pairs for b, t in enumerate(group)}


def fit_thresholds(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    text: Text,
    statistics: Mapping[str, CorpusStatistics],
    modules: Modules,
    ranks: ModuleRanks,
    base: Masks,
    costs: UnitCosts,
    target: int,
) -> dict[str, Tensor]:
    """Step 7, computed: fit ThresholdLearning under the callbacks that mask, measure and report."""
    s = cfg.sparsity
    stage = ThresholdLearning(
        model, ranks, start_thresholds(base, ranks), costs,
        target=target, width_multiple=s.width_multiple, learning_rate=s.learning_rate, learn=s.learn, loss=s.loss,
        objective=s.objective, worst_step=s.worst_step, corpora=cfg.corpora.learn, shard=cfg.model.shard,
        offset_learning_rate=s.offset_learning_rate, offset_limit=s.offset_limit,
        recover=make_corrections(cfg, model, statistics) if cfg.learns_recovered else None,
    )  # fmt: skip
    multiple = s.width_multiple
    budgets = {
        v: check_budget(costs, v, width_multiple=multiple, flag="evaluation.curve") for v in cfg.evaluation.curve
    }
    budgets[s.target] = target
    # Only the first process computes these, and a sharded model needs all.
    development = [] if cfg.model.shard else text.development
    curve = PerplexityCurve(development, targets=budgets, batch_size=cfg.corpora.batch_size)
    report = ModuleReport(modules.rows())
    data = CorpusDataModule(train=text.learn, batch_size=cfg.corpora.batch_size, seed=cfg.run.seed)
    numbers = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    trainer = run.trainer(
        f"Learning {numbers} thresholds" if s.learn == "thresholds" else f"Learning {numbers} numbers",
        max_epochs=s.epochs, log_every_n_steps=1, callbacks=[ApplyMasks(), curve, report],
    )  # fmt: skip
    trainer.fit(stage, data)
    run.folder.update_manifest(
        learning={
            "steps": trainer.global_step,
            "development_perplexity_by_epoch": curve.by_epoch,
            "development_perplexity_by_sparsity": {f"{k:g}": v for k, v in sorted(curve.by_sparsity.items())},
        }
    )
    offsets = {f"offsets.{b}": o.detach().cpu() for b, o in enumerate(stage.offsets or ())}
    return named_thresholds(stage.thresholds) | offsets
