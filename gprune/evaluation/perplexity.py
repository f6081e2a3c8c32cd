"""Perplexity of a model on the windows of a corpus, with its KL divergence from the dense model.

Each window is summed by itself in float64, so the results have the same bits for every number of processes. KL costs
almost nothing more than perplexity, because of the dense model only a few numbers per token are kept (`Forecast`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    If logits are linear, W x / s with a constant s, the first sum is m (x - x') / s with m = sum_v q_v W_v. It costs H
    products per token, instead of V H for z. Otherwise x is stored and z is computed again. If logits are rounded, for
    instance to bfloat16, the first sum uses the unrounded logits.
    """

    states: Tensor  # (T - 1, H): m, or x
    top: Tensor  # (T - 1,) int64, the most likely tokens
    rest: Tensor | None  # (T - 1,) float64: m x / s - log sum_v exp z_v; None if x is stored

    @classmethod
    def of(cls, model: PreTrainedModel, logits: Tensor, hidden: Tensor, log_sum: Tensor) -> Forecast:
        """Compute the quantities of the dense model on a window."""
        head = model.get_output_embeddings()
        transform = LogitTransform.of(model)
        top = logits.argmax(-1)
        if transform.softcap is not None or head.weight.is_meta:  # an offloaded weight is loaded only by its module
            return cls(hidden.cpu(), top.cpu(), None)
        for chunk in logits.split(rows_at_once(logits.device, logits.shape[-1])):
            chunk.copy_(chunk.softmax(-1))  # q, in the memory of the logits
        probabilities = logits
        mean_row = probabilities @ head.weight  # m, the mean of the rows of W by the probabilities q
        rest = (mean_row.double() * hidden.double()).sum(-1) / transform.scaling - log_sum
        return cls(mean_row.cpu(), top.cpu(), rest.cpu())

    def kl(self, model: PreTrainedModel, logits: Tensor, hidden: Tensor, log_sum: Tensor) -> Tensor:
        """Return KL(dense || model) of each token in nats, (T - 1,)."""
        transform = LogitTransform.of(model)
        states = self.states.to(logits.device)
        if self.rest is not None:
            products = (states.double() * hidden.double()).sum(-1) / transform.scaling
            return self.rest.to(logits.device) + log_sum - products
        dense_logits = transform(model.get_output_embeddings()(states[None]))[0]
        rows = rows_at_once(logits.device, logits.shape[-1])
        chunks = []
        for ours, theirs in zip(logits.split(rows), dense_logits.split(rows), strict=True):
            log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
            chunks.append(kl_of_rows(log_p, log_q))
        return torch.cat(chunks)


def kl_of_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || p) of each row of log-probabilities (T, V) in nats, (T,). Where log q is -inf, 0 log 0 is 0."""
    terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    return terms.masked_fill_(log_q == -torch.inf, 0).sum(-1)


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

    @classmethod
    def from_window_sums(cls, sums: Tensor, windows: Windows) -> PerplexityResult:
        """Return the result for sums over the predicted tokens of each window, as from `_window_sums`."""
        tokens = windows.tokens[:, 1:].numel()
        window_nll = sums[:, 0].contiguous()  # the memory layout affects the last bits of the sum
        nll = mean_nll(window_nll, tokens, windows.corpus)
        result = cls(math.exp(nll), nll, tokens, window_nll.tolist())
        if sums.shape[1] == 1:
            return result
        _, window_kl, window_agreement = sums.T
        require_finite("KL divergence came up in evaluation", window_kl)
        return replace(
            result,
            kl=float(window_kl.sum()) / tokens,
            window_kl=window_kl.tolist(),
            agreement=float(window_agreement.sum()) / tokens,
            window_agreement=window_agreement.tolist(),
        )


def perplexity(
    model: PreTrainedModel,
    windows: Windows,
    *,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
    forecasts: list[Forecast] | None = None,
) -> PerplexityResult:
    """Measure exp of the mean next-token cross-entropy over windows, each scored from its second token.

    Args:
        progress: called with the number of tokens after each batch.
        shared: whether batches are divided among the ranks of torch.distributed.
        forecasts: those of the dense model for this rank's windows, for KL and agreement; or an empty list, to which
            the forecasts of this model are added.
    """
    rank, world_size = rank_and_world_size() if shared else (0, 1)
    batches = windows.tokens.split(batch_size)  # batch i belongs to rank i % world_size
    dense_forecasts = list(forecasts or ())
    collected = None if forecasts else forecasts  # the empty list to fill, or None if there is no list
    own_sums = []  # of this rank's batches
    for i, batch in enumerate(batches[rank::world_size]):
        forecasts_of_batch = dense_forecasts[i * batch_size :][: len(batch)]
        own_sums.append(_window_sums(model, batch, forecasts_of_batch, collected))
        if progress is not None:
            progress(batch.numel() * world_size)
    if len(own_sums) < len(batches[::world_size]):
        # Other ranks have one batch more, and every forward pass of a sharded model needs all ranks.
        _window_sums(model, batches[0][:1])
    by_rank: list[Any] = [[sums.cpu() for sums in own_sums]] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(by_rank, by_rank[rank])
    sums = torch.cat([by_rank[i % world_size][i // world_size] for i in range(len(batches))])
    return PerplexityResult.from_window_sums(sums, windows)


def mean_nll(window_nll: Tensor, tokens: int, corpus: str) -> float:
    """Return the mean negative log-likelihood in nats per token, from the sums of windows (n,) float64.

    Raises UserError if a sum is not finite, or exp of the mean would overflow.
    """
    require_finite("loss came up in evaluation", window_nll)
    nll = float(window_nll.sum()) / tokens
    if nll > 700:  # exp overflows above 709
        raise UserError(
            f"The mean loss on {corpus} must be at most 700 nats per token; got {nll:.0f}. Check the model."
        )
    return nll


class WindowPerplexity(Metric):
    """Metric for the perplexity of a corpus: exp of the mean next-token cross-entropy, with the bits of `perplexity`.

    The sum of each window is stored with the window's index, and the sums are added in the order of the text. So the
    result has the same bits for every number of processes. `torchmetrics.text.Perplexity` adds batches in float32 in
    the order in which they arrive.
    """

    full_state_update = False

    def __init__(self, corpus: str = "text"):
        super().__init__()
        self.corpus = corpus
        self.nll_per_token: list[float] = []
        for state in ("nll", "index", "tokens"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, nll: Tensor, tokens: Tensor, index: Tensor) -> None:
        """Add the summed negative log-likelihoods of windows in nats (B,) float64, their tokens and positions (B,).

        A window that pads the batch has 0 tokens.
        """
        for state, value in (("nll", nll), ("tokens", tokens), ("index", index)):
            getattr(self, state).append(value)

    def compute(self) -> Tensor:
        """Compute the perplexity, () float64."""
        nll, tokens, index = (dim_zero_cat(state).cpu() for state in (self.nll, self.tokens, self.index))
        order = index.argsort(stable=True)
        order = order[tokens[order] > 0]  # without windows that pad a batch
        self.nll_per_token = (nll[order] / tokens[order]).tolist()
        mean = mean_nll(nll[order], int(tokens.sum()), self.corpus)
        return torch.tensor(math.exp(mean), dtype=torch.float64)


def window_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the negative log-likelihood of each window of tokens (B, T), summed over 2..T, in nats: (B,) float64."""
    return _window_sums(model, tokens)[:, 0].contiguous()


@torch.no_grad()
def _window_sums(
    model: PreTrainedModel, tokens: Tensor, dense: list[Forecast] | None = None, collected: list[Forecast] | None = None
) -> Tensor:
    """Return sums over the predicted tokens 2..T of windows (B, T): negative log-likelihood in nats, (B, 1) float64.

    With the dense model's forecasts also KL in nats and the number of tokens with the same argmax, (B, 3) float64.
    Probabilities are float32, whatever the model's dtype. Forecasts of this model are appended to `collected`.
    """
    by_window = []
    for i, window in enumerate(iter_logits(model, tokens.to(device_of(model), non_blocking=True))):
        # The output embeddings, and so the logits, may be on another device.
        logits, targets, hidden = (part[0].to(window[0].device) for part in window)
        rows = rows_at_once(logits.device, logits.shape[-1])
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        nll = torch.cat([F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in chunks])
        sums = [nll.double().sum()]
        # nll = log sum exp of the logits, minus the target's logit.
        log_sum = logits.gather(-1, targets[:, None])[:, 0].double() + nll
        if dense:
            kl = dense[i].kl(model, logits, hidden, log_sum)
            same_argmax = logits.argmax(-1) == dense[i].top.to(logits.device)
            sums += [kl.double().sum().clamp_min(0), same_argmax.double().sum()]  # rounding can give a negative KL
        elif collected is not None:
            collected.append(Forecast.of(model, logits, hidden, log_sum))
        by_window.append(torch.stack(sums))
    return torch.stack(by_window)


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size) of torch.distributed; (0, 1) if it is not initialized."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@torch.no_grad()
def perplexity_from_logits(
    model: PreTrainedModel, windows: Windows, dense: PreTrainedModel | None = None, *,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:  # fmt: skip
    """Measure perplexity of any causal language model, and with `dense` also KL(dense || model) and agreement.

    `perplexity` computes the same numbers faster for pruned models, which share the dense model's head. This function
    uses only the logits of `forward`, window by window.

    If a vocabulary is padded, both distributions are restricted to the tokens that the two models share.
    """
    sums = []
    for window in windows.tokens:
        logits = _logits(model, window)
        targets = window[1:].to(logits.device)
        dense_logits = None if dense is None else _logits(dense, window).to(logits.device)
        sums.append(_sums_from_logits(logits, targets, dense_logits))
        if progress is not None:
            progress(window.numel())
    return PerplexityResult.from_window_sums(torch.stack(sums).cpu(), windows)


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Return the logits (T - 1, V) for tokens 2..T of a window (T,) int64."""
    return model(input_ids=window[None].to(device_of(model)), use_cache=False).logits[0, :-1]


def _sums_from_logits(logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
    """Return sums over the predicted tokens of a window, (1,) or (3,) float64.

    The sums are the negative log-likelihood in nats and, if the dense model's logits are given, KL(dense || model) in
    nats and the number of tokens with the same argmax.
    """
    rows = rows_at_once(logits.device, logits.shape[-1])
    chunk_sums = []
    for start in range(0, len(logits), rows):
        chunk = slice(start, start + rows)
        chunk_logits = logits[chunk].float()
        sums = [F.cross_entropy(chunk_logits, targets[chunk], reduction="none").double().sum()]
        if dense_logits is not None:
            common = min(dense_logits.shape[-1], logits.shape[-1])  # tokens that both models have
            ours, theirs = chunk_logits[:, :common], dense_logits[chunk, :common].float()
            log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
            # KL(q || p), q from the dense model. Rounding can give a negative sum.
            kl = kl_of_rows(log_p, log_q).double().sum().clamp_min(0)
            same_argmax = (ours.argmax(-1) == theirs.argmax(-1)).double().sum()
            sums += [kl, same_argmax]
        chunk_sums.append(torch.stack(sums))
    return torch.stack(chunk_sums).sum(0)
