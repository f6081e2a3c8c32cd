"""Tokens that a run takes, at most: known from its flags alone."""

from __future__ import annotations

from numbers import Integral

from gprune.checks import shown
from gprune.config import RunConfig
from gprune.errors import UserError
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
    final = others = (0, 0)
    for row in cfg.stages:
        forward, trained = recovery_tokens(cfg, row[1])
        if learns[row[1]]:
            forward += (1 + cfg.distill.points) * development
        if row == (cfg.final, cfg.recovery):
            final = forward, trained
        else:
            others = others[0] + forward, others[1] + trained
    evaluated = len(c.evaluate) * e.num_samples * e.seq_len * (1 + len(cfg.stages))
    prompts, prompt, generated = sample_lengths(cfg)
    evaluated += 2 * prompts * (prompt + generated)
    return {
        1: (calibration - saliency, saliency),
        7: (curve + learning * (s.loss == "kl"), learning),
        9: (final[0] + 3 * compared_tokens(cfg), final[1]),
        10: (evaluated + others[0], others[1]),
    }


def sample_lengths(cfg: RunConfig) -> tuple[int, int, int]:
    """Number of prompts, prompt tokens and generated tokens of `pipeline.samples`."""
    prompt = min(32, cfg.evaluation.seq_len // 2)
    return min(cfg.evaluation.samples, len(cfg.corpora.evaluate)), prompt, min(48, cfg.evaluation.seq_len - prompt)


def compared_tokens(cfg: RunConfig) -> int:
    """Tokens on which `pipeline.save` compares masked, sliced and reloaded logits."""
    return min(cfg.evaluation.seq_len, 128)


def passes(forward: int, forward_backward: int) -> float:
    """What tokens cost, in forward passes: the way back takes twice as long as the way there."""
    return forward + 3 * forward_backward


def calibration_tokens(cfg: RunConfig) -> int:
    """Tokens of one pass over each corpus that statistics are collected on."""
    return len(cfg.calibration) * cfg.corpora.num_samples * cfg.corpora.seq_len


def recovery_tokens(cfg: RunConfig, recovery: str) -> tuple[int, int]:
    """(forward, forward and backward) tokens that a recovery takes for one pruned model, at most.

    Raises:
        UserError: for a registered recovery whose `tokens` returns anything else.
    """
    c = cfg.corpora
    windows = len(c.recover) * c.seq_len  # one of each corpus
    fresh = windows * cfg.distilled_windows
    found = recovery_of(recovery).tokens(windows * c.num_samples, fresh, attention=cfg.attention)
    pair = isinstance(found, tuple | list) and len(found) == 2
    if not pair or not all(isinstance(n, Integral) and n >= 0 for n in found):
        raise UserError(f"Recovery '{recovery}', tokens: expected two whole numbers, got {shown(found)}.")
    return int(found[0]), int(found[1])
