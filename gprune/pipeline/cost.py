"""What a run computes: tokens, the FLOPs of its matrix products, and how fast the machine does such products."""

from __future__ import annotations

import time
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedModel

from gprune.checks import shown
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.models.blocks import Block, blocks_of
from gprune.recoveries import recovery_of


def count_tokens(cfg: RunConfig) -> tuple[int, int]:
    """(forward, forward and backward) tokens of a run, at most."""
    forward, backward = (sum(tokens) for tokens in zip(*tokens_by_step(cfg).values(), strict=True))
    return forward, backward


def tokens_by_step(cfg: RunConfig) -> dict[int, tuple[int, int]]:
    """(forward, forward and backward) tokens of each step of the method that takes some, at most."""
    c, e, s = cfg.corpora, cfg.evaluation, cfg.sparsity
    learns = {recovery: recovery_of(recovery).learns for _, recovery in cfg.stages}
    corpora = {*cfg.roles["learn"], *(c.recover if any(learns.values()) else ())}
    development = len(corpora) * e.development_samples * c.seq_len
    calibration = calibration_tokens(cfg)
    backward = calibration if "saliency" in cfg.collects else 0
    learning = cfg.learns * s.epochs * len(c.learn) * (c.learn_samples or c.num_samples) * c.seq_len
    points = ((s.epochs + 1) + 2 + len(e.curve)) * cfg.learns * development

    def recovered(recovery: str) -> tuple[int, int]:
        forward, trained = recovery_tokens(cfg, recovery)
        return forward + learns[recovery] * s.steps * (1 + cfg.distill.points) * development, trained

    own = recovered(cfg.recovery)
    others = [recovered(recovery) for stage, recovery in cfg.stages if (stage, recovery) != (cfg.final, cfg.recovery)]
    evaluated = len(c.evaluate) * e.num_samples * e.seq_len * (1 + len(cfg.stages))
    texts, prompt, more = sample_lengths(cfg)
    evaluated += 2 * texts * (prompt + more)
    return {
        1: (s.steps * (calibration - backward), s.steps * backward),
        7: (s.steps * (points + learning * (s.loss == "kl")), s.steps * learning),
        9: (own[0] + 3 * min(e.seq_len, 128), own[1]),  # and what `pipeline.save` compares
        10: (evaluated + sum(forward for forward, _ in others), sum(trained for _, trained in others)),
    }


def sample_lengths(cfg: RunConfig) -> tuple[int, int, int]:
    """(texts, tokens of a beginning, tokens that are written after it) of `pipeline.samples`."""
    prompt = min(32, cfg.evaluation.seq_len // 2)
    return min(cfg.evaluation.samples, len(cfg.corpora.evaluate)), prompt, min(48, cfg.evaluation.seq_len - prompt)


def passes(forward: int, forward_backward: int) -> float:
    """What tokens cost, in forward passes: the way back takes twice as long as the way there."""
    return forward + 3 * forward_backward


def calibration_tokens(cfg: RunConfig) -> int:
    """Of the passes over all corpora, once."""
    return len(cfg.calibration) * cfg.corpora.num_samples * cfg.corpora.seq_len


def recovery_tokens(cfg: RunConfig, recovery: str) -> tuple[int, int]:
    """(forward, forward and backward) tokens that a recovery takes for one pruned model, at most."""
    c = cfg.corpora
    windows = len(c.recover) * c.seq_len  # one of each corpus
    found = recovery_of(recovery).tokens(
        windows * c.num_samples * cfg.sparsity.steps,
        windows * cfg.distilled_windows,
        attention=cfg.attention,
        settings=cfg.recovery_settings,
    )
    return two_counts(f"Recovery '{recovery}', tokens", found)


def two_counts(what: str, found: Any) -> tuple[int, int]:
    """Two whole numbers that a recovery said; a UserError for anything else."""
    pair = isinstance(found, tuple | list) and len(found) == 2
    if not pair or not all(isinstance(n, Integral) and n >= 0 for n in found):
        raise UserError(f"{what}: expected two whole numbers, got {shown(found)}.")
    return int(found[0]), int(found[1])


def flops(cfg: RunConfig, dense: PreTrainedModel) -> float:
    """Of all matrix products of a run, 2 for each multiply-add, at most: models count as if nothing were pruned.

    For a token forward: 2 x weights of the blocks, 4 T C for attention over T tokens, and 2 V H for the head but in
    calibration. Backward: the same again through frozen weights and the head, and once more where weights learn; twice
    for attention. Gram matrices take two thirds of 2 (N^2 + C^2), and a projection solved again k^3 / 3 + 2 H k^2 +
    2 H k (N - k), k = N / 2.
    """
    blocks, config, length = blocks_of(dense), dense.config, cfg.corpora.seq_len
    active = getattr(config, "num_experts_per_tok", 1)
    weights = sum(_weight_flops(b, active) for b in blocks)
    attention = sum(4.0 * length * b.output.in_features for b in blocks)
    head = 2.0 * config.vocab_size * config.hidden_size
    forward, backward = count_tokens(cfg)
    calibrated = cfg.sparsity.steps * calibration_tokens(cfg)
    trained = sum(tokens for _, tokens in (recovery_tokens(cfg, recovery) for _, recovery in cfg.stages))
    total = forward * (weights + attention + head)
    total += backward * (2 * weights + 3 * attention + 2 * head) + trained * weights
    if "saliency" not in cfg.collects:
        total -= calibrated * head
    if "gram" in cfg.collects:
        sides = [n for b in blocks for n in (b.neurons, b.output.in_features)]
        total += calibrated * sum(4 / 3 * n**2 for n in sides)
        solved = sum((n / 2) ** 3 / 3 + config.hidden_size * n**2 for n in sides[::2])
        total += solved * sum("gram" in recovery_of(recovery).needs for _, recovery in cfg.stages)
    return total


def _weight_flops(block: Block, active: int) -> float:
    """Of one token through the weights of a block, forward; of its experts through so many."""
    sizes = {kind: sum(p.out_features * p.in_features for p in block.parts_of(kind)) for kind in ("ffn", "attention")}
    ffn = sizes["ffn"] * (active / block.experts if block.has_experts else 1)
    return 2 * (ffn + sizes["attention"])


def speed(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], *, seconds: float = 0.5) -> float:
    """FLOP/s of products of 512 tokens with a weight of this shape (out, in), measured for so long after a first one.

    A real pass has element-wise work, attention and waiting beside them, and is slower.
    """
    tokens, weight = (torch.ones(n, shape[1], dtype=dtype, device=device) for n in (512, shape[0]))

    def work() -> None:
        tokens @ weight.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        work()
        count += 1
    return 2.0 * count * len(tokens) * weight.numel() / (time.perf_counter() - start)
