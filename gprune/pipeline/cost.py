"""Tokens that a run takes, at most: known from its flags alone."""

from __future__ import annotations

import math

from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.recoveries import recovery_of
from gprune.sparsity.budget import UnitCosts

TRIES, LEARNED_TRIES = 12, 4  # models that a search for a quality measures at most, if they are trained: about 4, 2
ERROR_TOKENS = 2048  # of each corpus on which errors are measured; 16,384 choose no better
KEPT = 2**32  # bytes of what the dense model makes of one text that are kept for rows that learn, or are evaluated


def keeps_taught(cfg: RunConfig, hidden_size: int) -> bool:
    """Whether several models learn from one text, and what the dense model makes of it is small enough to keep."""
    models = sum(recovery_of(row[1]).learns for row in cfg.stages)
    several = models > 1 or (models and cfg.sparsity.quality)
    return bool(several) and keeps(cfg, fresh_tokens(cfg), hidden_size)


def keeps(cfg: RunConfig, tokens: int, hidden_size: int) -> bool:
    """Whether the dense model's final hidden states of so many tokens are few enough to keep."""
    return tokens * hidden_size * (4 if cfg.model.dtype == "float32" else 2) <= KEPT


def tokens_by_step(cfg: RunConfig, hidden_size: int, costs: UnitCosts) -> dict[int, tuple[int, int]]:
    """(forward, forward and backward) tokens of each step of the method that takes some, at most."""
    c, e, s, taught = cfg.corpora, cfg.evaluation, cfg.sparsity, keeps_taught(cfg, hidden_size)
    text, fresh = len(c.recover) * c.num_samples * c.seq_len, fresh_tokens(cfg)
    learns = {recovery: recovery_of(recovery).learns for _, recovery in cfg.stages}
    development = development_tokens(cfg)
    calibration = calibration_tokens(cfg)
    saliency = calibration if "saliency" in cfg.collects else 0
    learning = curve = 0
    if cfg.learns:
        learning = s.epochs * learned_windows(cfg) * c.seq_len
        of_epochs = measurements(*validation_interval(cfg, learned_windows(cfg), c.batch_size, 1.0), epochs=s.epochs)
        curve = (1 + of_epochs + 2 + len(e.curve)) * development
    open_blocks = sum(costs.protected.isdisjoint(own) for own in costs.by_layer)
    rounds = len(costs.gone_layers) if s.block_choice == "loss" else 0
    tried = sum(range(open_blocks, open_blocks - rounds, -1)) * len(c.drift) * c.seq_len
    evaluated = evaluated_tokens(cfg)  # by each model
    once = keeps(cfg, evaluated, hidden_size) and cfg.final != "model"
    times = 1 if once else 2  # of each row, and the dense model's beside it
    early = 1 + times * sum(recovery == "none" for _, recovery in cfg.stages) if cfg.evaluates_early else 0
    late = 1 + times * len(cfg.stages) - early
    forward = {8: 0, 9: 3 * compared_tokens(cfg) + early * evaluated, 10: late * evaluated}
    trained = {8: 0, 9: 0, 10: 0}
    # Step, recovery, and whether it pays for the teacher's pass: the run's own row does, or the first that is tried.
    models = [(9 if row == cfg.own_row else 10, row[1], row == cfg.own_row) for row in cfg.stages]
    if s.quality:
        forward[8] = (1 + searches(cfg) * TRIES) * development
        models += [(8, cfg.unlearned_recovery, False)] * (searches(cfg) * TRIES)
        if learns[cfg.recovery]:  # the run's own model is one of those that are tried
            forward[8] += LEARNED_TRIES * development
            models = [model for model in models if model[0] != 9]
            models += [(8, cfg.recovery, number == 0) for number in range(LEARNED_TRIES)]
    for step, name, pays in models:
        recovery = recovery_of(name, cfg.recovery_settings)
        recovered = recovery.tokens(text, fresh, attention=cfg.attention)
        if taught and recovery.taught and not pays:
            forward[step] -= fresh
        forward[step] += recovered[0]
        if recovery.learns:
            d = cfg.distill
            interval = validation_interval(cfg, fresh // c.seq_len, d.batch_size, 0.25, accumulate=d.accumulate)
            points = measurements(*interval)
            forward[step] += (1 + points) * development
        trained[step] += recovered[1]
    return {
        1: (calibration - saliency, saliency),
        2: (tried, error_tokens(cfg, "base", "averaged")),
        7: (curve + learning * (s.loss == "kl"), learning + error_tokens(cfg, "modules")),
        **({8: (forward[8], trained[8])} if s.quality else {}),
        9: (forward[9], trained[9]),
        10: (forward[10], trained[10]),
    }


def error_windows(cfg: RunConfig) -> int:
    """Windows of each corpus on which the errors of blocks are measured: of 2,048 tokens together, or one."""
    return min(cfg.corpora.num_samples, max(1, ERROR_TOKENS // cfg.corpora.seq_len))


def measured_for(cfg: RunConfig) -> dict[str, list[str]]:
    """Corpora on which errors of blocks are measured, by the masks (`base`, `averaged`, `modules`) that read them."""
    if not cfg.measures_errors:
        return {}
    rows, drift = dict(cfg.stages), cfg.corpora.drift
    first = (
        cfg.learns and bool(cfg.sparsity.quality) and "averaged" not in rows
    )  # the share to learn at is that of base
    needed = {"base": "base" in rows or first, "averaged": "averaged" in rows, "modules": cfg.gprune}
    return {name: [cfg.corpora.score] if name == "base" else drift for name, need in needed.items() if need}


def error_tokens(cfg: RunConfig, *names: str) -> int:
    """Tokens on which errors of blocks are measured for masks of these names of `measured_for`."""
    corpora = sum(len(corpora) for name, corpora in measured_for(cfg).items() if name in names)
    return corpora * error_windows(cfg) * cfg.corpora.seq_len


def searches(cfg: RunConfig) -> int:
    """Searches of a target in quality whose models are not trained: of the run's own row, of controls, and of the share
    at which thresholds are learned, which is that of a control if there is one."""
    controls = {stage for stage, _ in cfg.stages} - {cfg.final}
    return 1 + max(len(controls), int(cfg.learns))


def development_tokens(cfg: RunConfig) -> int:
    """Tokens of the development text."""
    return len(cfg.developed) * cfg.evaluation.development_samples * cfg.corpora.seq_len


def learned_windows(cfg: RunConfig) -> int:
    """Windows of one epoch of threshold learning."""
    c = cfg.corpora
    return len(c.learn) * (c.learn_samples or c.num_samples)


def validation_interval(
    cfg: RunConfig, windows: int, batch_size: int, share: float, *, accumulate: int = 1
) -> tuple[int, int]:
    """Batches of an epoch, and after how many of them, in whole steps, development perplexity is measured.

    Args:
        windows: of an epoch.
        share: of the epoch, unless `--trainer.val_check_interval` is given.
        accumulate: batches of an optimizer step.

    Raises:
        UserError: for an interval of more batches than there are, and for a share of the batches that is none.
    """
    t, batches = cfg.trainer, math.ceil(windows / batch_size)
    if limit := t.limit_train_batches:
        all_batches, batches = batches, min(batches, int(limit)) if limit >= 1 else int(batches * limit)
        if not batches:
            raise UserError(
                f"--trainer.limit_train_batches must leave at least 1 of the {all_batches} batches of an epoch of each "
                f"stage that learns; got {limit:g}."
            )
    every = t.val_check_interval or share
    if isinstance(every, float):
        every = math.ceil(batches * every - 1e-9)
    if every > batches:
        raise UserError(
            f"--trainer.val_check_interval must be at most {batches}, the batches of an epoch of a stage that learns, "
            f"or a share from 0 to 1; got {every}."
        )
    return batches, min(batches, accumulate * math.ceil(every / accumulate))


def measurements(batches: int, every: int, *, epochs: int = 1) -> int:
    """Measurements of development perplexity after the one at the start: the last one after the last step."""
    return epochs * (batches // every) + bool(batches % every)


def compared_tokens(cfg: RunConfig) -> int:
    """Tokens on which `pipeline.save` compares masked, sliced and reloaded logits."""
    return min(cfg.evaluation.seq_len, 128)


def passes(forward: int, forward_backward: int) -> float:
    """What tokens cost, in forward passes: a backward pass costs two of them."""
    return forward + 3 * forward_backward


def calibration_tokens(cfg: RunConfig) -> int:
    """Tokens of one pass over each corpus that statistics are collected on."""
    return len(cfg.calibration) * cfg.corpora.num_samples * cfg.corpora.seq_len


def evaluated_tokens(cfg: RunConfig) -> int:
    """Tokens of the text that each model is evaluated on."""
    return len(cfg.corpora.evaluate) * cfg.evaluation.num_samples * cfg.evaluation.seq_len


def fresh_tokens(cfg: RunConfig) -> int:
    """Tokens of text that a recovery learns from."""
    return len(cfg.corpora.recover) * cfg.distilled_windows * cfg.corpora.seq_len
