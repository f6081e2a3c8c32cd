"""Tokens that a run takes, at most: known from its flags alone."""

from __future__ import annotations

from gprune.config import RunConfig
from gprune.recoveries import recovery_of


def tokens_by_step(cfg: RunConfig) -> dict[int, tuple[int, int]]:
    """(forward, forward and backward) tokens of each step of the method that takes some, at most."""
    c, e, s = cfg.corpora, cfg.evaluation, cfg.sparsity
    learns = {recovery: recovery_of(recovery).learns for _, recovery in cfg.stages}
    corpora = {*cfg.roles["learn"], *(c.recover if any(learns.values()) else ())}
    development = len(corpora) * e.development_samples * c.seq_len
    calibration = calibration_tokens(cfg)
    saliency = calibration if "saliency" in cfg.collects else 0
    learning = curve = 0
    if cfg.learns:
        learning = s.epochs * len(c.learn) * (c.learn_samples or c.num_samples) * c.seq_len
        curve = ((s.epochs + 1) + 2 + len(e.curve)) * development
    prompts, prompt, generated = sample_lengths(cfg)
    evaluated = len(c.evaluate) * e.num_samples * e.seq_len * (1 + len(cfg.stages))
    forward = {9: 3 * compared_tokens(cfg), 10: evaluated + 2 * prompts * (prompt + generated)}
    trained = {9: 0, 10: 0}
    for row in cfg.stages:
        step = 9 if row == (cfg.final, cfg.recovery) else 10
        recovered = recovery_tokens(cfg, row[1])
        forward[step] += recovered[0] + learns[row[1]] * (1 + cfg.distill.points) * development
        trained[step] += recovered[1]
    return {
        1: (calibration - saliency, saliency),
        7: (curve + learning * (s.loss == "kl"), learning),
        9: (forward[9], trained[9]),
        10: (forward[10], trained[10]),
    }


def sample_lengths(cfg: RunConfig) -> tuple[int, int, int]:
    """Number of prompts, prompt tokens and generated tokens of `pipeline.samples`."""
    prompt = min(32, cfg.evaluation.seq_len // 2)
    return min(cfg.evaluation.samples, len(cfg.corpora.evaluate)), prompt, min(48, cfg.evaluation.seq_len - prompt)


def compared_tokens(cfg: RunConfig) -> int:
    """Tokens on which `pipeline.save` compares masked, sliced and reloaded logits."""
    return min(cfg.evaluation.seq_len, 128)


def passes(forward: int, forward_backward: int) -> float:
    """What tokens cost, in forward passes: a backward pass costs two of them."""
    return forward + 3 * forward_backward


def calibration_tokens(cfg: RunConfig) -> int:
    """Tokens of one pass over each corpus that statistics are collected on."""
    return len(cfg.calibration) * cfg.corpora.num_samples * cfg.corpora.seq_len


def recovery_tokens(cfg: RunConfig, recovery: str) -> tuple[int, int]:
    """(forward, forward and backward) tokens that a recovery takes for one pruned model, at most."""
    windows = len(cfg.corpora.recover) * cfg.corpora.seq_len  # one of each corpus
    text, fresh = windows * cfg.corpora.num_samples, windows * cfg.distilled_windows
    return recovery_of(recovery, cfg.recovery_settings).tokens(text, fresh, attention=cfg.attention)
