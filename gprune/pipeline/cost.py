"""Upper bounds of the tokens of a run, computed from its settings."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.models.blocks import Block
from gprune.recoveries import recovery_of
from gprune.sparsity.budget import UnitCosts

# Fields of configurations with the number of experts to which each token is routed.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
ERROR_TOKENS = 2048  # tokens per corpus for errors of blocks; 16,384 tokens do not give a better choice
MAX_CACHED_BYTES = 2**32  # limit of the dense model's hidden states that are cached for other rows


def caches_teacher(cfg: RunConfig, hidden_size: int) -> bool:
    """Return whether the teacher's hidden states are cached: several models are distilled and the states are small."""
    recoveries = [*cfg.trials, *(recovery for _, recovery in cfg.stages)]
    distilled_models = sum(recovery_of(recovery).learns for recovery in recoveries)
    return distilled_models > 1 and fits_cache(cfg, fresh_tokens(cfg), hidden_size)


def fits_cache(cfg: RunConfig, tokens: int, hidden_size: int) -> bool:
    """Return whether the dense model's final hidden states of a number of tokens are small enough to cache."""
    bytes_per_number = 4 if cfg.model.dtype == "float32" else 2
    return tokens * hidden_size * bytes_per_number <= MAX_CACHED_BYTES


def active_experts(config: PreTrainedConfig, block: Block) -> int:
    """Return how many experts of a block compute each token; 1 without experts, all if the config does not tell."""
    for name in EXPERTS_PER_TOKEN:
        if value := getattr(config, name, None):
            per_token = max(value) if isinstance(value, list | tuple) else value  # some configs have a list by layer
            return min(per_token, block.experts)
    return block.experts


def tokens_by_step(cfg: RunConfig, hidden_size: int, costs: UnitCosts) -> dict[int, tuple[int, int]]:
    """Return upper bounds of the tokens of each step of the method that computes the model."""
    calibration = calibration_tokens(cfg)
    saliency = calibration if "saliency" in cfg.collects else 0
    learning, curve = _learning_tokens(cfg)
    kl_teacher = learning if cfg.sparsity.loss == "kl" else 0
    early_rows, late_rows = evaluated_models(cfg, hidden_size)
    evaluated = evaluated_tokens(cfg)
    compared = 3 * compared_tokens(cfg)  # by the masked, the sliced and the reloaded model
    forward = {8: 0, 9: compared + early_rows * evaluated, 10: late_rows * evaluated}
    forward_backward = {8: 0, 9: 0, 10: 0}
    if cfg.trials:
        forward[8] = (1 + len(cfg.trials)) * development_tokens(cfg)  # the dense model and every trial
    teacher_cached = caches_teacher(cfg, hidden_size)
    for step, recovery, counts_teacher in _recovered_models(cfg):
        model_forward, model_trained = recovery_tokens(cfg, recovery)
        uses_teacher = recovery_of(recovery, cfg.recovery_settings).uses_teacher
        if teacher_cached and uses_teacher and not counts_teacher:
            model_forward -= fresh_tokens(cfg)
        forward[step] += model_forward
        forward_backward[step] += model_trained
    tokens = {
        1: (calibration - saliency, saliency),
        2: (_block_choice_tokens(cfg, costs), error_tokens(cfg, "base", "averaged")),
        7: (curve + kl_teacher, learning + error_tokens(cfg, "modules")),
    }
    if cfg.trials:
        tokens[8] = (forward[8], forward_backward[8])
    return tokens | {step: (forward[step], forward_backward[step]) for step in (9, 10)}


def _learning_tokens(cfg: RunConfig) -> tuple[int, int]:
    """Return the tokens of threshold learning: (tokens of training, tokens of development perplexity)."""
    if not cfg.learns:
        return 0, 0
    windows = learned_windows(cfg)
    batches, interval = validation_interval(cfg, windows, cfg.corpora.batch_size, 1.0)
    # The first measurement, those during learning, and the curve with the dense model, the target and other sparsities.
    measured = 1 + num_measurements(batches, interval, epochs=cfg.sparsity.epochs) + 2 + len(cfg.evaluation.curve)
    return cfg.sparsity.epochs * windows * cfg.corpora.seq_len, measured * development_tokens(cfg)


def _block_choice_tokens(cfg: RunConfig, costs: UnitCosts) -> int:
    """Return the tokens that pass forward to choose whole blocks by the loss: one window per corpus and trial.

    Each round removes one layer. It has a trial for every layer that is left, so one less than the round before. There
    are none if blocks are not chosen by the loss.
    """
    open_layers = sum(costs.protected.isdisjoint(blocks) for blocks in costs.by_layer)
    rounds = len(costs.removed_layers) if cfg.sparsity.block_choice == "loss" else 0
    trials = sum(range(open_layers, open_layers - rounds, -1))
    return trials * len(cfg.corpora.drift) * cfg.corpora.seq_len


def evaluated_models(cfg: RunConfig, hidden_size: int) -> tuple[int, int]:
    """Return how many models are evaluated in step 9 (rows without recovery) and in step 10.

    If the dense model's forecasts are not cached, the dense model is evaluated again beside each row, and counts each
    time.
    """
    forecasts_cached = fits_cache(cfg, evaluated_tokens(cfg), hidden_size)
    models_per_row = 1 if forecasts_cached else 2
    total = 1 + models_per_row * len(cfg.stages)
    unrecovered_rows = sum(recovery == "none" for _, recovery in cfg.stages)
    early = 1 + models_per_row * unrecovered_rows if cfg.evaluates_early else 0
    return early, total - early


def _recovered_models(cfg: RunConfig) -> list[tuple[int, str, bool]]:
    """List the models that are recovered: (step, recovery, whether the teacher's pass is counted for this model).

    The teacher's pass is counted in the main row or, if there are trials with training, in the first of them.
    """
    main = [(9, cfg.recovery, True)]
    controls = [(10, recovery, False) for stage, recovery in cfg.stages if (stage, recovery) != cfg.own_row]
    trials = [(8, recovery, False) for recovery in cfg.trials]
    if trials and recovery_of(cfg.recovery).learns:  # the main row's model is one of the trials
        main = []
        trials[cfg.trials.index(cfg.recovery)] = (8, cfg.recovery, True)
    return main + controls + trials


def recovery_tokens(cfg: RunConfig, name: str) -> tuple[int, int]:
    """Return the (forward, forward and backward) tokens of one model's recovery, including development text."""
    c = cfg.corpora
    recovery = recovery_of(name, cfg.recovery_settings)
    text = len(c.recover) * c.num_samples * c.seq_len
    forward, trained = recovery.tokens(text, fresh_tokens(cfg), attention=cfg.attention)
    if recovery.learns:
        windows = fresh_tokens(cfg) // c.seq_len
        d = cfg.distill
        interval = validation_interval(cfg, windows, d.batch_size, 0.25, accumulate=d.accumulate)
        forward += (1 + num_measurements(*interval)) * development_tokens(cfg)
    return forward, trained


def error_windows(cfg: RunConfig) -> int:
    """Number of windows per corpus for errors of blocks: as many as fit into `ERROR_TOKENS`, but at least one."""
    return min(cfg.corpora.num_samples, max(1, ERROR_TOKENS // cfg.corpora.seq_len))


def error_corpora(cfg: RunConfig) -> dict[str, list[str]]:
    """Return the corpora on which errors of blocks are measured, by the masks that are allocated by these errors.

    The keys are among `base`, `averaged` and `modules`. There are none if the allocation does not read errors.
    """
    if not cfg.measures_errors:
        return {}
    stages = {stage for stage, _ in cfg.stages}
    # Without the control `averaged`, the sparsity at which thresholds are learned is found with masks of `base`.
    base_starts_learning = cfg.learns and bool(cfg.trials) and "averaged" not in stages
    corpora = {}
    if "base" in stages or base_starts_learning:
        corpora["base"] = cfg.scored_on["base"]
    if "averaged" in stages:
        corpora["averaged"] = cfg.scored_on["averaged"]
    if cfg.gprune:
        corpora["modules"] = cfg.corpora.drift
    return corpora


def error_tokens(cfg: RunConfig, *names: str) -> int:
    """Number of tokens on which errors of blocks are measured for masks with these names (see `error_corpora`)."""
    num_corpora = sum(len(corpora) for name, corpora in error_corpora(cfg).items() if name in names)
    return num_corpora * error_windows(cfg) * cfg.corpora.seq_len


def development_tokens(cfg: RunConfig) -> int:
    """Largest number of tokens in the development text. By default a quality target uses less of small corpora."""
    return len(cfg.development_corpora) * cfg.development_windows * cfg.corpora.seq_len


def learned_windows(cfg: RunConfig) -> int:
    """Number of windows in an epoch of threshold learning."""
    c = cfg.corpora
    return len(c.learn) * (c.learn_samples or c.num_samples)


def validation_interval(
    cfg: RunConfig, windows: int, batch_size: int, share: float, *, accumulate: int = 1
) -> tuple[int, int]:
    """Return the number of batches in an epoch, and the number of batches between two development measurements.

    The interval is rounded up to whole optimizer steps.
    """
    all_batches = math.ceil(windows / batch_size)
    batches = all_batches
    if limit := cfg.trainer.limit_train_batches:  # a number of batches, or a share below 1
        batches = min(all_batches, int(limit)) if limit >= 1 else int(all_batches * limit)
        if not batches:
            raise UserError(
                f"--trainer.limit_train_batches must leave at least 1 of the {all_batches} batches in an epoch of each "
                f"training stage; got {limit:g}."
            )
    interval = cfg.trainer.val_check_interval or share
    if isinstance(interval, float):
        rounding_error = 1e-9  # of the product, which would otherwise add a batch
        interval = math.ceil(batches * interval - rounding_error)
    if interval > batches:
        raise UserError(
            f"--trainer.val_check_interval must be {batches} or less, the batches in an epoch of a training stage, or "
            f"a share from 0 to 1; got {interval}."
        )
    whole_steps = accumulate * math.ceil(interval / accumulate)
    return batches, min(batches, whole_steps)


def num_measurements(batches: int, interval: int, *, epochs: int = 1) -> int:
    """Number of measurements of development perplexity during training, without the one before the first step.

    The last measurement is after the last step, also if the interval does not divide the batches of an epoch.
    """
    after_last_step = int(batches % interval > 0)
    return epochs * (batches // interval) + after_last_step


def compared_tokens(cfg: RunConfig) -> int:
    """Number of tokens on which `pipeline.save` compares masked, sliced and reloaded logits."""
    return min(cfg.evaluation.seq_len, 128)


def forward_equivalents(forward: int, forward_backward: int) -> float:
    """Cost of tokens in forward passes of one token. A backward pass costs as much as two forward passes."""
    return forward + 3 * forward_backward


def calibration_tokens(cfg: RunConfig) -> int:
    """Number of tokens in a pass over all calibration corpora."""
    return len(cfg.calibration_corpora) * cfg.corpora.num_samples * cfg.corpora.seq_len


def evaluated_tokens(cfg: RunConfig) -> int:
    """Number of tokens that each model is evaluated on."""
    return len(cfg.corpora.evaluate) * cfg.evaluation.num_samples * cfg.evaluation.seq_len


def fresh_tokens(cfg: RunConfig) -> int:
    """Number of training tokens of a recovery."""
    return len(cfg.corpora.recover) * cfg.distilled_windows * cfg.corpora.seq_len
