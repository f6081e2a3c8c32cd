"""prune(cfg): generalization-aware structured pruning, step by step, with the files that have the formulas.

 1 statistics   calibration/collector.py       one pass per corpus over the inputs of all down and output projections
 2 importance   importance/metrics.py          a score per unit, on one corpus or on several together
                sparsity/whole_blocks.py       the choice of whole blocks, if in scope
 3 drift        partition/drift.py             the variation of ranks between corpora, and its noise floor
 4 partition    partition/initial.py           neurons of a block into modules by parameter similarity and drift
 5 refinement   partition/objective.py         soft assignments optimised under a differentiable objective
                stages/refinement.py           (a LightningModule)
 6 reliability  partition/modules.py           sensitive, weakly activated modules are ranked by an activation-free
                                               metric
 7 sparsity     stages/threshold_learning.py   one threshold per module, learned with the model frozen (a
                                               LightningModule)
 8 budget       sparsity/cut.py                keep masks that reach the target and exceed it by less than a step
                method/quality.py              or the largest sparsity for a quality target
 9 pruning      models/surgery.py              smaller weight matrices
                recoveries/, stages/           recovery
10 evaluation   evaluation/perplexity.py       dense, pruned and recovered model, on seen and unseen text

By default the metric is `wanda_sp`, learning starts from the allocation `uniform`, and the recovery is
`least_squares+distill` (`recoveries/least_squares.py`, then `stages/distillation.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from gprune.calibration.block_errors import block_errors, error_tokens, error_windows
from gprune.calibration.statistics import (
    CorpusStatistics,
    Moments,
    StatisticsCache,
    kind_of,
    pool_statistics,
)
from gprune.checks import format_value, require, select_options, typed_options
from gprune.config import RunConfig
from gprune.config.groups import AVERAGED, CONSENSUS
from gprune.console import show_progress
from gprune.corpora.loaders import CorpusDataModule
from gprune.errors import UserError
from gprune.evaluation.perplexity import perplexity
from gprune.export.hf import to_portable
from gprune.importance.metrics import IMPORTANCE
from gprune.importance.scores import (
    Scores,
    channel_scores,
    comparable_scores,
    fractional_ranks,
    generator_for,
    score_experts,
    score_units,
    unit_ranks,
    unit_weights,
)
from gprune.method.evaluate import evaluate
from gprune.method.experts import store_scores
from gprune.method.quality import development_nll, with_learning_budget, with_quality_budget
from gprune.method.recover import prune_and_recover
from gprune.method.run import Run, open_run
from gprune.method.save import check_discovered_structure, save
from gprune.method.summary import summarise
from gprune.models.masks import Masks, bypassed
from gprune.models.offload import device_of, is_offloaded
from gprune.models.products import has_fast_products
from gprune.partition.drift import half_agreement, kendall_agreement, module_agreements, noise_floor, rank_drift
from gprune.partition.initial import initial_partition, parameter_embedding, same_sizes_by_drift, shuffled_partition
from gprune.partition.modules import (
    Drift,
    ModuleRanks,
    Modules,
    assess_reliability,
    module_means,
    ranks_in_modules,
    switched_share,
    within_module_ranks,
)
from gprune.partition.objective import refinement_inputs
from gprune.registry import Stage, UserCode, check_stage, class_and_arguments
from gprune.runs.folder import broadcast
from gprune.runs.results import PruningResult, corpus_file
from gprune.runs.tracking import log_scalars
from gprune.runs.trainer import launch_processes
from gprune.sparsity.allocation import ALLOCATION, checked_masks, checked_units
from gprune.sparsity.budget import Budget
from gprune.sparsity.masks import MaskFunction
from gprune.sparsity.thresholds import ModuleSparsity, Thresholds
from gprune.sparsity.whole_blocks import choose_layers
from gprune.stages.calibration import CalibrationStage
from gprune.stages.callbacks import ApplyMasks, PerplexityCurve
from gprune.stages.refinement import AssignmentRefinement
from gprune.stages.threshold_learning import ThresholdLearning
from gprune.storage.environment import model_versions
from gprune.units.structure import Units
from gprune.user_code import code_of

log = logging.getLogger("gprune")
LEARNER, REFINER = UserCode("learner"), UserCode("refiner")
BLOCK_SEED_STEP = 7919  # distance of the seeds of neighbouring blocks, a prime, so that seeds of runs do not overlap


def prune(
    cfg: RunConfig, callbacks: Sequence[Callback] = (), logger: Logger | Sequence[Logger] = (), *,
    refiner: Stage | None = None, learner: Stage | None = None, calibrator: Stage | None = None,
    collect: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> PruningResult:  # fmt: skip
    """Run the whole method, or resume an earlier run of the same settings.

    Progress is logged to stdout, unless your program has configured `logging`, and libraries log errors only.
    `logging.getLogger("gprune").setLevel("WARNING")` before the call turns progress off.

    Args:
        cfg: all settings; `RunConfig()` removes 30 % of SmolLM2-135M's FFN.
        callbacks: Lightning callbacks for the Trainers of all stages, in addition to `--trainer.callbacks`. An object
            of your own class is shared by all stages. A built-in callback of Lightning, or a subclass of one, is
            copied for each stage. After the run, your object has the state (such as `best_model_path`) of the copy
            in the last stage of the run.
        logger: Lightning loggers for all stages, in addition to CSV and W&B.
        refiner: stage of your own (docs/extend.md) instead of `stages.refinement.AssignmentRefinement`: a class, or a
            `functools.partial` of one, whose arguments are part of the settings.
        learner: stage of your own instead of `stages.threshold_learning.ThresholdLearning`.
        calibrator: stage of your own instead of `stages.calibration.CalibrationStage`.
        collect: corpus -> statistics (`gram`, `routing`, `saliency`) that later runs need. If this run has to calibrate
            on the corpus, they are cached in the same pass. `gprune study` gives what the other rows of a list need.

    Returns:
        Masks, modules, thresholds, statistics, records and the pruned model.

    Raises:
        UserError: if a setting, the model, a corpus or a file is invalid.
    """
    require(cfg, RunConfig, "The configuration must be a RunConfig, such as gprune.RunConfig(importance='wifv')")
    if cfg.dry_run:
        raise UserError("--dry_run must be false for gprune.prune; got true. Use `python train.py --dry_run true`.")
    show_progress()
    cfg = cfg.with_stages(refiner=refiner, learner=learner, calibrator=calibrator)
    cfg.run.name = cfg.run_name  # constants of a notebook, of which the default name has a hash, may change later
    with open_run(cfg, callbacks, logger) as run:  # plan, model, tokenizer, text, blocks, budget
        modules = None
        check_discovered_structure(run)
        statistics = calibrate(run, collect)  # 1
        scores = score(run, statistics)  # 2
        if "blocks" in cfg.sparsity.scope:
            run = remove_blocks(run, statistics)
        if cfg.gprune:
            modules = find_modules(run, statistics, scores)  # 3, 4, 5, 6
            masks_at = learn_sparsity(run, statistics, scores, modules)  # 7
        else:
            masks_at = base_masks(run, statistics, scores)  # a function of the budget
        if cfg.searches_quality:
            run = with_quality_budget(run, statistics, masks_at)
        thresholds, masks = meet_budget(run, masks_at)  # 8
        if cfg.measures_pruned:
            evaluate(run, "pruned", lambda: prune_and_recover(run, masks, statistics, recovery="none"))
        run.step(9, "Pruning" if cfg.recovery == "none" else "Pruning and recovering")
        with run.folder.step("shrink"):
            pruned = prune_and_recover(run, masks, statistics)
        if cfg.searches_quality and cfg.recovery_learns:
            development_nll(run, "recovered", lambda: pruned)
        is_rank_zero, summary = rank_zero_only.rank == 0, {}
        if is_rank_zero:
            save(run, pruned, masks)
        records = evaluate(run, cfg.final_stage, lambda: pruned)  # 10
        if is_rank_zero:
            summary = summarise(run, records, masks, pruned, modules)
        return PruningResult(
            path=run.folder.path, config=run.cfg, masks=masks, modules=modules, thresholds=thresholds,
            statistics=statistics, records=records, summary=summary,
            model=to_portable(pruned), tokenizer=run.tokenizer,
        )  # fmt: skip


# Step 1: statistics


def calibrate(run: Run, collect: Mapping[str, Collection[str]]) -> dict[str, CorpusStatistics]:
    """Step 1: return statistics by corpus, and write them to the run's folder without Gram matrices.

    Statistics are read from the cache. Those that the cache does not have for this model, text and kind are collected,
    together with those in `collect` (see `prune`), unless memory is limited.
    """
    run.step(1, "Calibrating")
    cfg = run.cfg
    cache = statistics_cache(run)
    kinds = ["moments", *sorted(cfg.needs)]
    statistics = {corpus: cache.read(corpus, kinds) for corpus in cfg.calibration_corpora}
    missing = [of_corpus is None for of_corpus in statistics.values()]
    if cfg.processes > 1:  # another run may write to the cache at the same time
        missing = missing_on_any_rank(run, missing)
    to_collect = [corpus for corpus, is_missing in zip(statistics, missing, strict=True) if is_missing]
    if to_collect:
        corpora_by_kinds: dict[tuple[str, ...], list[str]] = {}
        is_limited = is_offloaded(run.model) or cfg.model.max_memory is not None
        for corpus in to_collect:
            others = () if is_limited else collect.get(corpus, ())
            corpora_by_kinds.setdefault(("moments", *sorted({*cfg.needs, *others})), []).append(corpus)
        for all_kinds, corpora in corpora_by_kinds.items():
            collected = collect_statistics(run, corpora, all_kinds, cache)
            statistics |= {corpus: of_corpus.only(kinds) for corpus, of_corpus in collected.items()}
    else:
        log.info("Statistics of %s are in the cache", ", ".join(statistics))
    for corpus in cfg.calibration_corpora:
        file = f"statistics/{corpus_file(corpus)}"
        if run.folder.read(file) is None:
            # Gram matrices take hundreds of megabytes, so they are only in the cache.
            tensors = {name: t for name, t in statistics[corpus].tensors().items() if kind_of(name) != "gram"}
            run.folder.write(file, tensors)
    return statistics


def missing_on_any_rank(run: Run, missing: Sequence[bool]) -> list[bool]:
    """Launch the run's processes. Return for each corpus whether its statistics are missing on at least one rank.

    Ranks may see different files in the cache. They have to decide together, otherwise they could enter different
    collectives and deadlock. Raise UserError if they are at different runs.
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
    user_calibrator: dict[str, Any] = {}
    if calibrator := cfg.user_stage("calibrator"):
        code = code_of(calibrator)
        user_calibrator = {"calibrator": check_stage("calibrator", calibrator), "code": code}
        if None in code.values():  # the code may have changed, so only this run may use its statistics again
            user_calibrator["run"] = str(run.folder.path.resolve())
    device = device_of(run.model)
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
        stored=[u.key for u in run.budget.units if u.kind not in ("layer", "experts")] if run.plan.gram_ranges else (),
        gram_bits={"products": "bfloat16"} if has_fast_products(getattr(torch, cfg.model.dtype), device) else {},
    )  # fmt: skip


def collect_statistics(
    run: Run, corpora: list[str], kinds: Sequence[str], cache: StatisticsCache
) -> dict[str, CorpusStatistics]:
    """Collect the statistics of corpora, and write them to the cache.

    This takes one pass over each corpus. If Gram matrices exceed memory, each range of layers takes a pass, and its
    matrices are stored before the next one begins.
    """
    cfg, collected = run.cfg, {}
    saliency = cache.scopes if "saliency" in kinds else ()

    def collect(names: list[str], what: str = "", **blocks: list[int]) -> dict[str, CorpusStatistics]:
        """Return the statistics of one pass."""
        arguments = {"gram": "gram" in kinds, "saliency": saliency} | ({"routing": True} if "routing" in kinds else {})
        stage = make_stage(run, "calibrator", CalibrationStage, run.model, names, **arguments, **blocks)
        data = CorpusDataModule(
            test=[run.text.train[corpus] for corpus in names], batch_size=cfg.corpora.batch_size, seed=cfg.run.seed
        )
        what = f"Calibrating on {', '.join(names)}{what}"
        trainer = run.trainer("calibrating", what, stage, inference_mode=not saliency)
        trainer.test(stage, data, verbose=False)
        statistics, stage.statistics = stage.statistics, {}  # the stage stays in memory until garbage collection
        return statistics

    with (
        run.folder.step("calibrate"),
        run.folder.part(*corpora, shared=True),  # the tokens are split evenly, as all corpora have the same number
    ):
        if run.plan.gram_ranges:
            for corpus in corpora:
                ranges = []
                for blocks in run.plan.gram_ranges:
                    of_range = collect([corpus], f", blocks {blocks[0]} to {blocks[-1]}", blocks=blocks)[corpus]
                    ranges.append(cache.store(corpus, of_range))
                collected[corpus] = CorpusStatistics.of_ranges(ranges)
        else:
            collected = collect(corpora)
    for corpus in corpora:
        cache.write(corpus, collected[corpus], kinds)
    return collected


def make_stage(
    run: Run, kind: str, built_in: type[LightningModule], *inputs: Any, settings: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> LightningModule:  # fmt: skip
    """Construct the user's stage of a kind, or the built-in one, with those settings that its constructor names."""
    cls, own_arguments = class_and_arguments(run.cfg.user_stage(kind) or built_in)
    return cls(*inputs, **select_options(cls, settings or {}) | arguments | own_arguments)


# Step 2: importance


def score(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Scores:
    """Step 2: importance of every unit by the base metric, on the pooled statistics of `--corpora.score`."""
    run.step(2, "Scoring")
    scores = score_on(run, statistics, run.cfg.corpora.scored)
    if "experts" in run.cfg.sparsity.scope:
        store_scores(run, scores, [statistics[corpus] for corpus in run.cfg.corpora.scored])
    return scores


def score_on(run: Run, statistics: Mapping[str, CorpusStatistics], corpora: Sequence[str]) -> Scores:
    """Return the importance of every unit by the base metric, on the pooled statistics of corpora."""
    cfg, pooled = run.cfg, pool_statistics(statistics[corpus] for corpus in corpora)
    scope = ("neurons", "kv_groups") if cfg.attention else ("neurons",)
    scores = score_units(cfg.importance, run.model, pooled, seed=cfg.run.seed, scope=scope)
    if "experts" in cfg.sparsity.scope:
        scores.experts = score_experts(cfg.sparsity.expert_metric, run.model, pooled, seed=cfg.run.seed)
    return scores


def remove_blocks(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Run:
    """Return the run with a budget in which whole blocks are removed."""
    cfg, s = run.cfg, run.cfg.sparsity

    def loss_without(layers: list[int]) -> float:
        """Return the loss of the model without these layers: the sum over drift corpora, on one window each."""
        text = (run.text.train[corpus] for corpus in cfg.corpora.drift)
        with bypassed(run.model, layers):
            return sum(perplexity(run.model, replace(w, tokens=w.tokens[:1])).nll for w in text)

    def choose() -> dict[str, Tensor]:
        """Return layers in the order of their removal."""
        if s.block_choice == "influence":
            order = statistics[cfg.corpora.scored[0]].influence.argsort(stable=True).tolist()
            layer_of = [u.layer for u in run.budget.of_kind("neurons")]
            return {"gone": torch.tensor(list(dict.fromkeys(layer_of[b] for b in order)))}
        return {"gone": torch.tensor(choose_layers(run.budget, loss_without), dtype=torch.long)}

    budget = run.budget.without(run.folder.tensors("blocks", choose)["gone"].tolist())
    layers = ", ".join(map(str, budget.removed)) or "none, as a block is more than --sparsity.block_share"
    run.step(2, f"Removing whole blocks: {layers}")
    return run.with_budget(budget)


def base_masks(run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores) -> MaskFunction:
    """Return the masks of the base metric, with sparsity allocated by `--sparsity.allocation` (or `.start`).

    They are scored on `RunConfig.base_corpora`; `scores` are those of `--corpora.score`.
    """
    corpora = run.cfg.base_corpora
    if corpora != run.cfg.corpora.scored:
        scores = score_on(run, statistics, corpora)
    return allocated_masks(run, "base", scores, statistics, corpora)


def allocated_masks(
    run: Run, name: str, scores: Scores, statistics: Mapping[str, CorpusStatistics], corpora: Sequence[str]
) -> MaskFunction:
    """Return masks by scores, with sparsity allocated to blocks by `--sparsity.allocation` (or `.start`).

    The statistics are those of `corpora`. `name` is a key of `error_corpora`, if the allocation reads errors.
    """
    cfg = run.cfg
    of_corpora = [statistics[corpus] for corpus in corpora]
    return MaskFunction(
        allocation=cfg.base_allocation,
        options=typed_options(ALLOCATION[cfg.base_allocation], cfg.sparsity.options),
        layers=run.layers,
        scores=scores,
        statistics=of_corpora,
        errors=measured_errors(run, name, scores, pool_statistics(of_corpora)) if cfg.measures_errors else None,
    )


def measured_errors(run: Run, name: str, scores: Scores, statistics: CorpusStatistics) -> Tensor:
    """Return the `block_errors` of neurons in the order of scores, computed once per run and `name`.

    The text is the first `error_windows` of each corpus. A float32 model is computed in the
    precision of learning, which is part of the run's key.
    """
    cfg = run.cfg
    bfloat16 = cfg.model.dtype == "float32" and cfg.trainer.precision == "bf16-mixed"
    batches = [
        ids
        for corpus, windows in error_windows(cfg, name).items()
        for ids in run.text.train[corpus].tokens[:windows].split(cfg.corpora.batch_size)
    ]

    def compute() -> dict[str, Tensor]:
        step, tokens = 7 if name == "modules" else 2, error_tokens(cfg, name)
        run.step(step, f"Measuring the loss caused by errors of {name} on {tokens:,} tokens")
        errors = block_errors(run.model, scores, statistics, batches, ridge=cfg.ridge, bfloat16=bfloat16)
        return {"errors": errors}

    return run.folder.tensors(f"errors_{name}", compute)["errors"]


# Steps 3 to 6: modules


def find_modules(run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores) -> Modules:
    """Steps 3 to 6: return modules with their measurements, from the run's folder if an earlier session found them."""
    if (tensors := broadcast(run.folder.read("modules"))) is not None:
        return Modules.from_tensors(tensors)
    drift = measure_drift(run, statistics)  # 3
    labels = partition(run, drift)  # 4, 5
    return assess(run, statistics, scores, drift, labels)  # 6


# Step 3: drift


def measure_drift(run: Run, statistics: Mapping[str, CorpusStatistics]) -> list[Drift]:
    """Step 3: rank drift of every neuron and its split-half noise floor, per block.

    For a metric that ignores activations, drift is measured with the metric `IMPORTANCE[name].drift`. With one corpus,
    drift is 0.
    """
    run.step(3, "Measuring drift")
    drift = [drift_of_block(run, u, statistics) for u in run.budget.of_kind("neurons")]
    mean = float(torch.cat([d.drift for d in drift]).mean())
    noise = float(torch.cat([d.noise_floor for d in drift]).mean())
    log.info("Mean rank drift %.3f; sampling noise alone gives %.3f", mean, noise)
    return drift


def drift_of_block(run: Run, u: Units, statistics: Mapping[str, CorpusStatistics]) -> Drift:
    """Return the rank drift of one block's N neurons between the D drift corpora, and its noise floor."""
    cfg = run.cfg
    if not u.count:  # without an FFN
        no_neurons = torch.zeros(len(cfg.corpora.drift), 0, dtype=torch.float64)
        undefined = torch.tensor(float("nan"), dtype=torch.float64)
        return Drift(no_neurons, no_neurons, no_neurons[0], no_neurons[0], undefined)
    metric, weights = IMPORTANCE[cfg.importance].drift, unit_weights(u, run.layers[u.layer])

    def score_neurons(moments: Moments) -> Tensor:
        """Score the neurons, (N,), from the moments of a corpus or of half of it."""
        return channel_scores(metric, u, weights, moments, generator_for(cfg.run.seed, u))

    by_corpus, by_half = [], []
    for corpus in cfg.corpora.drift:
        channels = statistics[corpus].channels[u.key]
        by_corpus.append(score_neurons(channels.total))
        by_half.append(torch.stack([score_neurons(channels.half(h)) for h in (0, 1)]))
    scores = torch.stack(by_corpus)  # (D, N)
    ranks = unit_ranks(u, scores)
    half_ranks = unit_ranks(u, torch.stack(by_half))  # (D, 2, N)
    return Drift(
        comparable_scores(u, scores), ranks, rank_drift(ranks), noise_floor(half_ranks), half_agreement(half_ranks)
    )


# Steps 4 and 5: modules


def partition(run: Run, drift: Sequence[Drift]) -> list[Tensor]:
    """Steps 4 and 5: module labels per block, (N,) int64, by `--partition.method`; (0,) for a block without an FFN."""
    run.step(4, "Partitioning")

    def compute() -> dict[str, Tensor]:
        neurons = run.budget.of_kind("neurons")
        labels = [torch.zeros(0, dtype=torch.long)] * len(neurons)
        of_ffns = [u for u in neurons if u.count]
        for u, block_labels in zip(of_ffns, compute_labels(run, of_ffns, drift), strict=True):
            labels[u.number] = block_labels
        return {f"labels.{b}": block_labels for b, block_labels in enumerate(labels)}

    tensors = run.folder.tensors("assignment", compute)
    return [tensors[f"labels.{b}"] for b in range(len(drift))]


def compute_labels(run: Run, neurons: Sequence[Units], drift: Sequence[Drift]) -> list[Tensor]:
    """Compute the module labels, (N,) int64, of the neurons of blocks with an FFN.

    The controls `random` and `drift_only` keep the refined module sizes and reassign the neurons.
    """
    p, seed = run.cfg.partition, run.cfg.run.seed
    log.info("Partitioning %d blocks into modules", len(neurons))
    embeddings, labels = [], []
    for u in neurons:
        layer = run.layers[u.layer]
        weights = unit_weights(u, layer, device_of(layer))
        embedding = parameter_embedding(weights, dim=p.embedding_dim, seed=seed)
        initial = initial_partition(
            embedding, drift[u.number].drift, num_modules=p.num_modules, similarity_weight=p.similarity_weight,
            drift_weight=p.drift_weight, seed=seed,
        )  # fmt: skip
        embeddings.append(embedding)
        labels.append(initial)
    if p.method == "initial":
        return labels
    refined = refine(run, embeddings, [drift[u.number] for u in neurons], labels)
    if p.method == "random":
        pairs = zip(neurons, refined, strict=True)
        return [shuffled_partition(of_block, seed=seed + BLOCK_SEED_STEP * u.number) for u, of_block in pairs]
    if p.method == "drift_only":
        pairs = zip(neurons, refined, strict=True)
        return [same_sizes_by_drift(of_block, drift[u.number].drift) for u, of_block in pairs]
    return refined


def refine(run: Run, embeddings: list[Tensor], drift: Sequence[Drift], labels: list[Tensor]) -> list[Tensor]:
    """Step 5: fit the refiner, and return refined labels, (N,) int64 for each block with an FFN."""
    run.step(5, "Refining")
    p = run.cfg.partition
    inputs = refinement_inputs(embeddings, [d.drift for d in drift], [d.ranks for d in drift])
    stage = make_stage(run, "refiner", AssignmentRefinement, inputs, labels, settings=dict(p))
    validation = {"val_check_interval": 0.25} if is_overridden("validation_step", stage) else {}
    trainer = run.trainer(
        "refining", "Refining modules", stage, role="partition", max_epochs=1, log_every_n_steps=10, **validation
    )
    trainer.fit(stage)
    run.callbacks.keep_state()
    refined = checked_labels(type(stage).__name__, stage.labels(), labels)
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


# Step 6: reliability of modules


def assess(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores, drift: list[Drift], labels: list[Tensor]
) -> Modules:
    """Step 6: decide which modules switch to `--reliability.metric`, and rank units inside their modules."""
    run.step(6, "Assessing reliability of modules")
    r = run.cfg.reliability
    switch = "off"
    if r.switch and len(run.cfg.corpora.drift) > 1:
        switch = "everywhere" if r.everywhere else "unreliable"
    neurons = run.budget.of_kind("neurons")
    base_ranks = [unit_ranks(u, scores[u.key]) for u in neurons]
    reliability = assess_reliability(
        labels, base_ranks, [d.drift for d in drift], [d.noise_floor for d in drift],
        sensitivity_quantile=r.sensitivity_quantile, score_quantile=r.score_quantile, switch=switch,
    )  # fmt: skip
    switched = [of_block.switched for of_block in reliability]
    by_block = zip(base_ranks, fallback_ranks(run, statistics), labels, switched, strict=True)
    # Other units than neurons are one module in each block.
    p = {key: fractional_ranks(of_units, ties="ordinal") for key, of_units in scores.items()}
    p |= {u.key: within_module_ranks(*of_block) for u, of_block in zip(neurons, by_block, strict=True)}
    ranks = ranks_in_modules(p, labels)
    modules = Modules(
        ranks, drift, reliability,
        agreement=[module_agreements(d.scores, block_labels) for d, block_labels in zip(drift, labels, strict=True)],
        block_agreement=[kendall_agreement(d.scores) for d in drift],
    )  # fmt: skip
    run.folder.write("modules", modules.tensors())
    count, share = sum(int(of_block.sum()) for of_block in switched), switched_share(reliability)
    log_scalars(run.loggers, {"partition/switched_share": share}, step=0)
    level = logging.WARNING if switch != "off" and count == 0 else logging.INFO
    same = ", which is --importance, so the switch changes nothing" if r.metric == run.cfg.importance else ""
    log.log(level, "%d modules with %.1f%% of the neurons switch to %s%s", count, 100 * share, r.metric, same)
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
    by_source = [score_units(metric, run.model, source, seed=cfg.run.seed) for source in sources]
    neurons = run.budget.of_kind("neurons")
    return [unit_ranks(u, torch.stack([scores[u.key] for scores in by_source])).mean(0) for u in neurons]


# Step 7: sparsity


def learn_sparsity(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores, modules: Modules
) -> MaskFunction:
    """Step 7: compute or learn thresholds per module, which give masks for any budget.

    Learning starts from the masks of the base metric. Their budget for a target in quality is found by a search.
    """
    cfg, name, learns = run.cfg, run.cfg.sparsity.allocation, run.cfg.learns
    searches = cfg.searches_quality and learns
    start = base_masks(run, statistics, scores) if searches or not cfg.measures_errors else None
    if searches:
        run = with_learning_budget(run, statistics, start)
    run.step(7, "Learning sparsity" if learns else "Allocating sparsity")
    if cfg.measures_errors:
        in_modules = {u.key: modules.ranks.p[u.key] for u in run.budget.of_kind("neurons")}
        scores_in_modules = Scores({**scores, **in_modules}, scores.channels, scores.experts)
        start = allocated_masks(run, "modules", scores_in_modules, statistics, cfg.corpora.drift)
    # Learning keeps the scores of neurons and KV groups of the masks that it starts from. What is removed as a whole is
    # chosen by the scores on all of --corpora.score.
    start_scores = Scores(start.scores, start.scores.channels, scores.experts)
    masks = replace(start, scores=start_scores, modules=modules, module_allocation=name)
    run = run.with_budget(run.budget.ranked_by(masks.scores))
    if not learns:
        return masks
    tensors = run.folder.tensors("thresholds", lambda: fit_thresholds(run, masks).tensors())
    return replace(masks, learned=ModuleSparsity.from_tensors(tensors))


def fit_thresholds(run: Run, masks: MaskFunction) -> ModuleSparsity:
    """Fit the learner of step 7, and return what it has learned.

    Its masks are applied whenever development perplexity is measured. If there is development text, perplexity is also
    measured at the sparsities of `--evaluation.curve`, and written to the manifest.
    """
    ranks, start = masks.modules.ranks, masks.module_sparsity(run.budget).thresholds
    cfg, s = run.cfg, run.cfg.sparsity
    _set_removed_to_mean(start, run.budget)  # `start` is a new object, which nobody else reads
    stage = make_stage(run, "learner", ThresholdLearning, run.model, ranks, start, run.budget, settings=dict(s))
    name = type(stage).__name__

    def masks_at(budget: Budget) -> Masks:
        """Return the learner's masks for a budget. Raise UserError if they are invalid."""
        return checked_masks(LEARNER, name, stage.masks(budget), budget)

    curve = PerplexityCurve()
    callbacks = [curve, ApplyMasks(lambda: masks_at(run.budget))]
    num_learned = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    what = f"Learning {num_learned} {'thresholds' if s.learn == 'thresholds' else 'numbers'}"
    trainer, data = run.fit(
        "thresholds", what, stage, run.text.learn, role="learn", max_epochs=s.epochs, callbacks=callbacks
    )
    by_sparsity = {}
    if curve.by_step:  # there is development text
        budgets = {run.budget.sparsity: run.budget}
        budgets |= {sparsity: run.budget.at(sparsity) for sparsity in cfg.evaluation.curve if sparsity != s.target}
        masks_by_sparsity = {0.0: None} | {sparsity: masks_at(budget) for sparsity, budget in budgets.items()}
        with run.folder.part("curve against sparsity", shared=True):
            by_sparsity = curve.against_sparsity(trainer, stage, data, masks_by_sparsity)
    run.folder.update_manifest(
        learning={
            "steps": trainer.global_step,
            "development_perplexity_by_epoch": list(curve.by_step.values()),
            "development_perplexity_by_sparsity": {f"{x:g}": values for x, values in by_sparsity.items()},
        }
    )
    return _learned_sparsity(stage, ranks, masks_at(run.budget), run.budget)


def _set_removed_to_mean(thresholds: dict[str, Tensor], budget: Budget) -> None:
    """Give units that the budget removes the mean threshold, in place. Other sparsities of the curve may keep them."""
    for kind in budget.finer:
        mean = torch.cat([thresholds[u.key] for u in budget.kept(kind)]).mean()
        for u in budget.of_kind(kind):
            if u.layer in budget.removed:
                thresholds[u.key] = torch.full_like(thresholds[u.key], mean)


def _learned_sparsity(stage: LightningModule, ranks: ModuleRanks, masks: Masks, budget: Budget) -> ModuleSparsity:
    """Return a learner's thresholds and offsets, if it has them, and also its masks unless these follow from them."""
    thresholds = getattr(stage, "thresholds", None)
    if thresholds is None:
        return ModuleSparsity(None, fixed_masks=masks)
    offsets = getattr(stage, "offsets", None)
    learned = ModuleSparsity(
        checked_units(LEARNER, type(stage).__name__, "thresholds", thresholds, ranks.modules),
        {key: of_units.detach().cpu() for key, of_units in offsets.items()} if offsets else None,
    )
    return learned if learned.masks(ranks, budget) == masks else replace(learned, fixed_masks=masks)


# Step 8: budget


def meet_budget(run: Run, masks_at: MaskFunction) -> tuple[Thresholds | None, Masks]:
    """Step 8: return the thresholds of modules, if there are any, and the masks that meet the budget."""
    run.step(8, "Meeting the budget")
    masks = masks_at(run.budget)
    if masks_at.modules is None:
        return None, masks
    budget = run.budget.ranked_by(masks_at.scores)
    tensors = run.folder.tensors("thresholds", lambda: masks_at.module_sparsity(budget).tensors())
    if not (run.folder.finished or run.folder.manifest.get("logged_modules")):  # once, also if the run is resumed
        log_modules(run.loggers, masks_at.modules, masks)
        run.folder.update_manifest(logged_modules=True)
    return ModuleSparsity.from_tensors(tensors).thresholds, masks


def log_modules(loggers: Sequence[Logger], modules: Modules, masks: Masks) -> None:
    """Log the measurements of each module, and its sparsity, which is the share of its neurons that masks remove."""
    sparsity = [module_means(~mask, block_labels) for mask, block_labels in zip(masks.ffn, modules.labels, strict=True)]
    names = ("sensitivity", "noise_floor", "agreement", "sparsity")
    for step, numbers in enumerate(modules.rows()):
        numbers["sparsity"] = float(sparsity[numbers["block"]][numbers["module"]])
        scalars = {f"modules/{name}": float(numbers[name]) for name in names if numbers[name] is not None}
        log_scalars(loggers, {"modules/index": float(step)} | scalars, step=step)
