"""Perplexity with its protocol: per-window negative log-likelihoods, geometric means, the generalisation gap."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics.text
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from gprune.data import Windows
from gprune.errors import UserError
from gprune.losses import iter_logits
from gprune.offload import device_of


class Perplexity(torchmetrics.text.Perplexity):
    """torchmetrics' Perplexity with a float32 cross-entropy.

    The stock update goes through softmax().log() in the logits' dtype, where one underflow gives infinity. Keeps the
    negative log-likelihood of each window too, for paired comparisons.
    """

    window_nll: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("window_nll", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (B, T, V) that predict target (B, T) int64.

        Raises:
            UserError: for a non-finite loss. It is never skipped: a mean without it would look like a good model.
        """
        nll = F.cross_entropy(preds.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        if not bool(torch.isfinite(nll).all()):
            raise UserError(
                "A non-finite loss came up in evaluation; expected finite numbers. Check the model's weights, or use "
                "--model.dtype float32 instead of a 16-bit type."
            )
        self.total_log_probs += nll.double().sum()
        self.count += target.numel()
        self.window_nll.append(nll.double().sum(1).cpu())


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on the windows of one corpus."""

    perplexity: float
    nll: float  # mean, nats per predicted token
    tokens: int  # predicted tokens: windows x (seq_len - 1)
    window_nll: list[float]  # sum over the window's predicted tokens, nats


def perplexity(
    model: PreTrainedModel, windows: Windows, *, batch_size: int = 4, progress: str | None = None
) -> PerplexityResult:
    """exp of the mean next-token cross-entropy over non-overlapping windows, each scored from its second token.

    Args:
        model: eval mode; masks, if any, are the caller's context.
        windows: tokens (n, seq_len) int64.
        batch_size: windows per forward pass.
        progress: label of a progress bar, or None for none.
    """
    device = device_of(model)
    metric = Perplexity().to(device)
    batches: Iterable[Tensor] = windows.tokens.split(batch_size)
    bar = {"desc": progress, "unit": "batch", "leave": False, "mininterval": 1.0, "file": sys.stdout}
    for batch in tqdm(batches, disable=True if progress is None else None, **bar):  # None: off where no one watches
        for logits, targets in iter_logits(model, batch.to(device)):
            metric.update(logits, targets.to(logits.device))
    window_nll = torch.cat(metric.window_nll)  # float64; torchmetrics' own sum is float32
    nll = float(window_nll.sum()) / int(metric.count)
    if nll > 700:  # exp would overflow
        raise UserError(f"The mean loss on {windows.corpus} is {nll:.0f} nats per token; the model is broken.")
    return PerplexityResult(math.exp(nll), nll, int(metric.count), window_nll.tolist())


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; NaN for no values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def generalisation_gap(pruned: dict[str, float], dense: dict[str, float], seen: dict[str, bool]) -> float:
    """(geometric mean of pruned/dense perplexity over unseen corpora) / (the same over seen ones).

    Above 1, pruning cost more where nothing was looked at. NaN without corpora of both kinds.
    """
    ratios = {corpus: pruned[corpus] / dense[corpus] for corpus in pruned}
    unseen = geometric_mean(ratio for corpus, ratio in ratios.items() if not seen[corpus])
    return unseen / geometric_mean(ratio for corpus, ratio in ratios.items() if seen[corpus])


def paired_bootstrap_ratio(
    a: dict[str, list[float]],
    b: dict[str, list[float]],
    tokens_per_window: int,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Geometric-mean perplexity of model a over that of model b, with a 95 % interval over windows.

    Args:
        a, b: corpus -> summed nll per window, for the same windows of both models.
        tokens_per_window: predicted tokens per window.

    Returns:
        (ratio, lower, upper); windows are resampled within each corpus, jointly for both models.
    """
    point, total = _bootstrap_log_ratio(a, b, tokens_per_window, draws=draws, seed=seed)
    return math.exp(point), *_interval(total)


def _bootstrap_log_ratio(
    a: dict[str, list[float]], b: dict[str, list[float]], tokens_per_window: int, *, draws: int, seed: int
) -> tuple[float, Tensor]:
    """Log of the ratio of geometric means, and its (draws,) float64 bootstrap replicates."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(draws, dtype=torch.float64)
    point = 0.0
    for corpus in a:
        difference = torch.tensor(a[corpus], dtype=torch.float64) - torch.tensor(b[corpus], dtype=torch.float64)
        pick = torch.randint(len(difference), (draws, len(difference)), generator=generator)
        total += difference[pick].mean(1) / tokens_per_window
        point += float(difference.mean()) / tokens_per_window
    return point / len(a), total / len(a)


def _interval(logs: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(logs, torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return low, high


def bootstrap_gap(
    pruned: dict[str, list[float]],
    dense: dict[str, list[float]],
    seen: dict[str, bool],
    tokens_per_window: int,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`generalisation_gap` with a 95 % interval over windows; arguments as there and for `paired_bootstrap_ratio`.

    Returns:
        (gap, lower, upper); NaN without corpora of both kinds. Seen and unseen text are resampled apart.
    """
    found = []
    for kind in (False, True):
        a, b = ({c: nll[c] for c in nll if seen[c] == kind} for nll in (pruned, dense))
        if not a:
            return (math.nan,) * 3
        found.append(_bootstrap_log_ratio(a, b, tokens_per_window, draws=draws, seed=seed + kind))
    (unseen, unseen_draws), (known, known_draws) = found
    return math.exp(unseen - known), *_interval(unseen_draws - known_draws)


def bootstrap_perplexity(
    nll: dict[str, list[float]], tokens_per_window: int, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Geometric-mean perplexity of one model over corpora, with a 95 % interval over windows.

    Args:
        nll: corpus -> summed nll per window, nats.
        tokens_per_window: predicted tokens per window.

    Returns:
        (perplexity, lower, upper)
    """
    certain = {corpus: [0.0] * len(values) for corpus, values in nll.items()}  # perplexity 1, without noise
    return paired_bootstrap_ratio(nll, certain, tokens_per_window, draws=draws, seed=seed)


def paired_bootstrap_difference(
    a: dict[str, list[float]],
    b: dict[str, list[float]],
    tokens_per_window: int,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean negative log-likelihood of model a minus that of model b, in nats per token, with a 95 % interval.

    The logarithm of `paired_bootstrap_ratio`: what an additive comparison of two pruned models should be made in,
    since differences of perplexities grow with the perplexity. Arguments as there; below 0, model a is better.
    """
    ratio, low, high = paired_bootstrap_ratio(a, b, tokens_per_window, draws=draws, seed=seed)
    return math.log(ratio), math.log(low), math.log(high)
