"""Perplexity of a model on the windows of a corpus, and how far it is from the dense model, window by window."""

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
    """What the dense model predicts of the tokens 2..T of a window: as much as its distance from another one takes.

    With q and p the next-token distributions of the dense and of the other model, z and y their logits, x and x' their
    final hidden states, and W the head that both have,
        KL(q || p) = sum_v q_v (z_v - y_v) - log sum_v exp z_v + log sum_v exp y_v,
    whose first sum is m (x - x') / s, with m = sum_v q_v W_v: the other model takes H products for it, in place of V H
    for z. That needs logits that are linear, W x / s. Else x is kept, and z computed again. Where logits are rounded,
    such as to bfloat16, the first sum is of those that are not.
    """

    states: Tensor  # (T - 1, H): m, or x
    top: Tensor  # (T - 1,) int64, the most likely tokens
    rest: Tensor | None  # (T - 1,) float64: m x / s - log sum_v exp z_v; None where x is kept

    @classmethod
    def of(cls, model: PreTrainedModel, logits: Tensor, hidden: Tensor, log_sum: Tensor) -> Forecast:
        """The dense model's own, of logits (T - 1, V), which are written over, hidden states and log sum exp."""
        head, transform, top = model.get_output_embeddings(), LogitTransform.of(model), logits.argmax(-1)
        if transform.softcap is not None or head.weight.is_meta:  # offloaded: the head alone fetches it
            return cls(hidden.cpu(), top.cpu(), None)
        for part in logits.split(rows_at_once(logits)):
            part.copy_(part.softmax(-1))
        mean = logits @ head.weight
        rest = (mean.double() * hidden.double()).sum(-1) / transform.scaling - log_sum
        return cls(mean.cpu(), top.cpu(), rest.cpu())

    def kl(self, model: PreTrainedModel, logits: Tensor, hidden: Tensor, log_sum: Tensor) -> Tensor:
        """KL(dense || model) of each token in nats, (T - 1,), from what the model makes of the same window."""
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
    """Perplexity of one model on the windows of one corpus and, beside the dense model's forecasts, its distance."""

    perplexity: float
    nll: float  # mean, nats per predicted token
    tokens: int  # predicted tokens: windows x (seq_len - 1)
    window_nll: list[float]  # sum over the window's predicted tokens, nats
    kl: float | None = None  # KL(dense || model), mean, nats per predicted token
    window_kl: list[float] | None = None  # sums, as of nll
    agreement: float | None = None  # share of tokens for which both models have the same most likely token
    window_agreement: list[float] | None = None  # numbers of such tokens


def perplexity(
    model: PreTrainedModel,
    windows: Windows,
    *,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
    forecasts: list[Forecast] | None = None,
) -> PerplexityResult:
    """exp of the mean next-token cross-entropy over non-overlapping windows, each scored from its second token.

    Args:
        model: in eval mode, within the caller's `masked` context if it is to be masked.
        progress: is called after each batch with its tokens, such as `Screen.advance`.
        shared: share the batches out over processes, which all have to call this function with the same model, whole
            or spread over them. Batches are those of one process, and so are the bits of the result.
        forecasts: of the dense model, to which this one is compared; an empty list gets this model's. A process has
            those of its own windows.

    Raises:
        UserError: for a loss that is not finite, and for a mean loss whose exp would overflow.
    """
    rank, world = processes() if shared else (0, 1)
    batches = windows.tokens.split(batch_size)  # batch i is of process i % world
    own, dense, made = [], list(forecasts or ()), None if forecasts else forecasts
    for i, batch in enumerate(batches[rank::world]):
        own.append(_scores(model, batch, dense[i * batch_size :][: len(batch)], made))
        if progress is not None:
            progress(batch.numel() * world)
    if len(own) < len(batches[::world]):
        # A model that is spread over processes needs all of them in each pass, and other processes have one more.
        _scores(model, batches[0][:1])
    by_process: list[Any] = [[scores.cpu() for scores in own]] * world
    if world > 1:
        torch.distributed.all_gather_object(by_process, by_process[rank])
    scores = torch.cat([by_process[i % world][i // world] for i in range(len(batches))])
    window_nll = scores[:, 0].contiguous()  # the bits of a sum depend on it
    tokens = windows.tokens[:, 1:].numel()
    nll = mean_nll(window_nll, tokens, windows.corpus)
    distance = [part for sums in scores.T[1:] for part in (float(sums.sum()) / tokens, sums.tolist())]
    return PerplexityResult(math.exp(nll), nll, tokens, window_nll.tolist(), *distance)


def mean_nll(window_nll: Tensor, tokens: int, corpus: str) -> float:
    """Mean negative log-likelihood in nats per token, from the sums of windows (n,) float64 over `tokens` tokens.

    Raises:
        UserError: for a loss that is not finite, and for a mean whose exp would overflow.
    """
    require_finite("loss came up in evaluation", window_nll)
    nll = float(window_nll.sum()) / tokens
    if nll > 700:
        raise UserError(f"The mean loss on {corpus} is {nll:.0f} nats per token; the model is broken.")
    return nll


class WindowPerplexity(Metric):
    """Perplexity of a corpus from its windows: exp of the mean next-token cross-entropy, as `perplexity` computes it.

    The sum of each window is kept with the window's index and summed in the order of the text. So the result has the
    same bits for every number of processes. `torchmetrics.text.Perplexity` adds batches as they come, in float32.

    Args:
        corpus: for errors.
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
            tokens: (B,) int64, how many tokens of each window are predicted; 0 for a window that only fills a batch.
            index: (B,) int64, places of the windows in the corpus.
        """
        for state, value in (("nll", nll), ("tokens", tokens), ("index", index)):
            getattr(self, state).append(value)

    def compute(self) -> Tensor:
        """() float64.

        Raises:
            UserError: for a loss that is not finite, and for a mean whose exp would overflow.
        """
        nll, tokens, index = (dim_zero_cat(state).cpu() for state in (self.nll, self.tokens, self.index))
        order = index.argsort(stable=True)
        order = order[tokens[order] > 0]
        mean = mean_nll(nll[order], int(tokens.sum()), self.corpus)
        return torch.tensor(math.exp(mean), dtype=torch.float64)


def window_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(B,) float64: each window's negative log-likelihood in nats, summed over its tokens 2..T; tokens (B, T) int64."""
    return _scores(model, tokens)[:, 0].contiguous()


@torch.no_grad()
def _scores(
    model: PreTrainedModel, tokens: Tensor, dense: list[Forecast] | None = None, made: list[Forecast] | None = None
) -> Tensor:
    """(B, 1) float64: each window's negative log-likelihood, summed over its tokens 2..T; tokens (B, T) int64.

    Beside the dense model's forecasts (B, 3): KL in nats and the number of equal most likely tokens too. `made` gets
    the model's own forecasts. Probabilities are float32, whatever the model's dtype.
    """
    sums = []
    for i, window in enumerate(iter_logits(model, tokens.to(device_of(model), non_blocking=True))):
        # The output embeddings, and with them the logits, may lie on another device.
        logits, targets, hidden = (part[0].to(window[0].device) for part in window)
        rows = rows_at_once(logits)
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        nll = torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in chunks])
        sums.append([nll.double().sum()])
        log_sum = logits.gather(-1, targets[:, None])[:, 0].double() + nll
        if dense:
            kl, same = dense[i].kl(model, logits, hidden, log_sum), logits.argmax(-1) == dense[i].top.to(logits.device)
            sums[-1] += [kl.double().sum().clamp_min(0), same.double().sum()]  # rounding may leave less than 0
        elif made is not None:
            made.append(Forecast.of(model, logits, hidden, log_sum))
    return torch.stack([torch.stack(of_window) for of_window in sums])


def processes() -> tuple[int, int]:
    """This process's number and how many compute together: 0 and 1 unless a Trainer has brought several together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
