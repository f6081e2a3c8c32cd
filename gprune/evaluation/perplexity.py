"""Perplexity of a model on the windows of a corpus, with its KL divergence from the dense model.

Each window is summed by itself in float64, so the results have the same bits for every number of processes. KL costs
almost nothing more than perplexity, because of the dense model only a few numbers per token are kept (`Forecast`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from transformers import PreTrainedModel

from gprune.corpora.windows import Windows
from gprune.errors import UserError, require_finite
from gprune.models.losses import LogitTransform, iter_logits, rows_at_once
from gprune.models.offload import device_of


class Forecast(NamedTuple):
    """The quantities of the dense model needed for KL(dense || other) on the tokens 2..T of a window.

    Let q and p be the next-token distributions of the dense and the other model, z and y their logits, x and x' their
    final hidden states, and W the head, which both share. Then
        KL(q || p) = sum_v q_v (z_v - y_v) - log sum_v exp z_v + log sum_v exp y_v.
    If logits are linear, W x / s, the first sum is m (x - x') / s with m = sum_v q_v W_v. It costs H products per
    token, instead of V H for z. Otherwise x is stored and z is computed again. If logits are rounded, for instance to
    bfloat16, the first sum uses the unrounded logits.
    """

    states: Tensor  # (T - 1, H): m, or x
    top: Tensor  # (T - 1,) int64, the most likely tokens
    rest: Tensor | None  # (T - 1,) float64: m x / s - log sum_v exp z_v; None if x is stored

    @classmethod
    def of(cls, model: PreTrainedModel, logits: Tensor, hidden: Tensor, log_sum: Tensor) -> Forecast:
        """Compute the quantities of the dense model from logits (T - 1, V), hidden states and log sum exp.

        `logits` is overwritten.
        """
        head, transform, top = model.get_output_embeddings(), LogitTransform.of(model), logits.argmax(-1)
        if transform.softcap is not None or head.weight.is_meta:  # an offloaded weight is loaded only by its module
            return cls(hidden.cpu(), top.cpu(), None)
        for part in logits.split(rows_at_once(logits)):
            part.copy_(part.softmax(-1))
        mean = logits @ head.weight
        rest = (mean.double() * hidden.double()).sum(-1) / transform.scaling - log_sum
        return cls(mean.cpu(), top.cpu(), rest.cpu())

    def kl(self, model: PreTrainedModel, logits: Tensor, hidden: Tensor, log_sum: Tensor) -> Tensor:
        """KL(dense || model) of each token in nats, (T - 1,).

        Args:
            model: the other model.
            logits: (T - 1, V), its logits on the same window.
            hidden: (T - 1, H), its final hidden states.
            log_sum: (T - 1,) float64, log sum exp of its logits.
        """
        transform, states, rows = LogitTransform.of(model), self.states.to(logits.device), rows_at_once(logits)
        if self.rest is not None:
            products = (states.double() * hidden.double()).sum(-1) / transform.scaling
            return self.rest.to(logits.device) + log_sum - products
        theirs = transform(model.get_output_embeddings()(states[None]))[0]
        pairs = zip(logits.split(rows), theirs.split(rows), strict=True)
        logs = (tuple(part.float().log_softmax(-1) for part in pair) for pair in pairs)
        return torch.cat([F.kl_div(*pair, reduction="none", log_target=True).sum(-1) for pair in logs])


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a model on a corpus and, if the dense model's forecasts were given, KL and agreement."""

    perplexity: float
    nll: float  # mean, nats per predicted token
    tokens: int  # predicted tokens: windows x (seq_len - 1)
    window_nll: list[float]  # sum over the window's predicted tokens, nats
    kl: float | None = None  # KL(dense || model), mean, nats per predicted token
    window_kl: list[float] | None = None  # sum over the window's predicted tokens, nats
    agreement: float | None = None  # share of tokens with the same most likely token in both models
    window_agreement: list[float] | None = None  # number of such tokens in the window


def perplexity(
    model: PreTrainedModel,
    windows: Windows,
    *,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
    forecasts: list[Forecast] | None = None,
) -> PerplexityResult:
    """Perplexity: exp of the mean next-token cross-entropy over windows, each scored from its second token.

    Args:
        model: in eval mode, inside the caller's `masked` context if masks should apply.
        progress: called after each batch with its number of tokens, such as `Screen.advance`.
        shared: split the batches over ranks. Every rank has to call this function with the same model, whole or
            sharded. Batches do not depend on the number of ranks, so the result has the same bits.
        forecasts: forecasts of the dense model for this rank's windows, for KL and agreement. An empty list is filled
            with the forecasts of this model.

    Raises:
        UserError: if a loss is not finite, or exp of the mean loss would overflow.
    """
    rank, world = processes() if shared else (0, 1)
    batches = windows.tokens.split(batch_size)  # batch i belongs to rank i % world
    own, dense, collected = [], list(forecasts or ()), None if forecasts else forecasts
    for i, batch in enumerate(batches[rank::world]):
        own.append(_scores(model, batch, dense[i * batch_size :][: len(batch)], collected))
        if progress is not None:
            progress(batch.numel() * world)
    if len(own) < len(batches[::world]):
        # Other ranks have one batch more, and every forward pass of a sharded model needs all ranks.
        _scores(model, batches[0][:1])
    by_process: list[Any] = [[scores.cpu() for scores in own]] * world
    if world > 1:
        torch.distributed.all_gather_object(by_process, by_process[rank])
    scores = torch.cat([by_process[i % world][i // world] for i in range(len(batches))])
    window_nll = scores[:, 0].contiguous()  # the memory layout affects the last bits of the sum
    tokens = windows.tokens[:, 1:].numel()
    nll = mean_nll(window_nll, tokens, windows.corpus)
    distance = [part for sums in scores.T[1:] for part in (float(sums.sum()) / tokens, sums.tolist())]
    return PerplexityResult(math.exp(nll), nll, tokens, window_nll.tolist(), *distance)


def mean_nll(window_nll: Tensor, tokens: int, corpus: str) -> float:
    """Mean negative log-likelihood in nats per token, from the sums of windows (n,) float64 over `tokens` tokens.

    Raises:
        UserError: if a sum is not finite, or exp of the mean would overflow.
    """
    require_finite("loss came up in evaluation", window_nll)
    nll = float(window_nll.sum()) / tokens
    if nll > 700:
        raise UserError(
            f"The mean loss on {corpus} must be at most 700 nats per token; got {nll:.0f}. Check the model."
        )
    return nll


class WindowPerplexity(Metric):
    """Metric for the perplexity of a corpus: exp of the mean next-token cross-entropy, with the bits of `perplexity`.

    The sum of each window is stored with the window's index, and the sums are added in the order of the text. So the
    result has the same bits for every number of processes. `torchmetrics.text.Perplexity` adds batches in float32 in
    the order in which they arrive.

    Args:
        corpus: name of the corpus for errors.
    """

    full_state_update = False

    def __init__(self, corpus: str = "text"):
        super().__init__()
        self.corpus = corpus
        for state in ("nll", "index", "tokens"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, nll: Tensor, tokens: Tensor, index: Tensor) -> None:
        """Add a batch of windows.

        Args:
            nll: (B,) float64, the negative log-likelihood of each window, summed over its predicted tokens, in nats.
            tokens: (B,) int64, number of predicted tokens of each window; 0 for a window that pads the batch.
            index: (B,) int64, positions of the windows in the corpus.
        """
        for state, value in (("nll", nll), ("tokens", tokens), ("index", index)):
            getattr(self, state).append(value)

    def compute(self) -> Tensor:
        """Compute the perplexity, () float64.

        Raises:
            UserError: if a loss is not finite, or exp of the mean would overflow.
        """
        nll, tokens, index = (dim_zero_cat(state).cpu() for state in (self.nll, self.tokens, self.index))
        order = index.argsort(stable=True)
        order = order[tokens[order] > 0]
        mean = mean_nll(nll[order], int(tokens.sum()), self.corpus)
        return torch.tensor(math.exp(mean), dtype=torch.float64)


def window_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Sum of the negative log-likelihood of each window's tokens 2..T in nats, (B,) float64; tokens (B, T) int64."""
    return _scores(model, tokens)[:, 0].contiguous()


@torch.no_grad()
def _scores(
    model: PreTrainedModel, tokens: Tensor, dense: list[Forecast] | None = None, collected: list[Forecast] | None = None
) -> Tensor:
    """Sums over the predicted tokens 2..T of each window: negative log-likelihood in nats, (B, 1) float64.

    With the dense model's forecasts also KL in nats and the number of tokens with the same argmax, (B, 3) float64.
    Probabilities are float32, whatever the model's dtype.

    Args:
        tokens: (B, T) int64.
        dense: forecasts of the dense model, one per window.
        collected: a list to which the forecasts of this model are appended.
    """
    sums = []
    for i, window in enumerate(iter_logits(model, tokens.to(device_of(model), non_blocking=True))):
        # The output embeddings, and so the logits, may be on another device.
        logits, targets, hidden = (part[0].to(window[0].device) for part in window)
        rows = rows_at_once(logits)
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        nll = torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in chunks])
        sums.append([nll.double().sum()])
        log_sum = logits.gather(-1, targets[:, None])[:, 0].double() + nll
        if dense:
            kl, same = dense[i].kl(model, logits, hidden, log_sum), logits.argmax(-1) == dense[i].top.to(logits.device)
            sums[-1] += [kl.double().sum().clamp_min(0), same.double().sum()]  # rounding can give a negative sum
        elif collected is not None:
            collected.append(Forecast.of(model, logits, hidden, log_sum))
    return torch.stack([torch.stack(of_window) for of_window in sums])


def processes() -> tuple[int, int]:
    """Return (rank, world size) of torch.distributed; (0, 1) if it is not initialized."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
