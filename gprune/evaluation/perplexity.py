"""Perplexity of a model on the windows of a corpus, with the negative log-likelihood of each window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics.text
from torch import Tensor
from transformers import PreTrainedModel

from gprune.corpora.windows import Windows
from gprune.errors import UserError, require_finite
from gprune.models.losses import iter_logits, rows_at_once
from gprune.models.offload import device_of


class Perplexity(torchmetrics.text.Perplexity):
    """torchmetrics' Perplexity with a float32 cross-entropy.

    The stock update goes through softmax().log() in the logits' dtype, where one underflow gives infinity. This one
    also keeps the negative log-likelihood of each window, for paired comparisons.
    """

    window_nll: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("window_nll", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (B, T, V) that predict target (B, T) int64."""
        rows = rows_at_once(preds)
        pairs = zip(preds.flatten(0, 1).split(rows), target.flatten().split(rows), strict=True)
        nll = torch.cat([F.cross_entropy(p.float(), t, reduction="none") for p, t in pairs]).view(target.shape)
        self.total_log_probs += nll.double().sum()
        self.count += target.numel()
        self.window_nll.append(nll.double().sum(1))


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on the windows of one corpus."""

    perplexity: float
    nll: float  # mean, nats per predicted token
    tokens: int  # predicted tokens: windows x (seq_len - 1)
    window_nll: list[float]  # sum over the window's predicted tokens, nats


def perplexity(
    model: PreTrainedModel,
    windows: Windows,
    *,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
) -> PerplexityResult:
    """exp of the mean next-token cross-entropy over non-overlapping windows, each scored from its second token.

    Args:
        model: in eval mode, within the caller's `masked` context if it is to be masked.
        windows: tokens (n, seq_len) int64.
        batch_size: windows per forward pass.
        progress: is called after each batch with its tokens, such as what `Screen.bar` gives.
        shared: share the batches out over processes, which all have to call this function with the same model, whole
            or spread over them. Batches are those of one process, and so are the bits of the result.
    """
    rank, world = processes() if shared else (0, 1)
    device, batches = device_of(model), windows.tokens.split(batch_size)
    metric = Perplexity().to(device_of(model.get_output_embeddings()))  # which may lie on another device
    own = batches[rank::world]
    for batch in own:
        for logits, targets in iter_logits(model, batch.to(device, non_blocking=True)):
            metric.update(logits, targets.to(logits.device))
        if progress is not None:
            progress(batch.numel() * world)
    if len(own) < len(batches[::world]):  # all run equally often: of a model spread over them each gives its part
        next(iter_logits(model, batches[0][:1].to(device)))
    window_nll = torch.cat(metric.window_nll).cpu() if metric.window_nll else torch.empty(0, dtype=torch.float64)
    if world > 1:
        parts: list[Tensor] = [window_nll] * world
        torch.distributed.all_gather_object(parts, window_nll)
        places = torch.arange(len(windows.tokens)).split(batch_size)
        window_nll = torch.empty(len(windows.tokens), dtype=torch.float64)
        for of, part in enumerate(parts):
            window_nll[torch.cat([places[0][:0], *places[of::world]])] = part
    require_finite("loss came up in evaluation", window_nll)
    tokens = windows.tokens[:, 1:].numel()
    nll = float(window_nll.sum()) / tokens  # float64; torchmetrics' own sum is float32
    if nll > 700:  # exp would overflow
        raise UserError(f"The mean loss on {windows.corpus} is {nll:.0f} nats per token; the model is broken.")
    return PerplexityResult(math.exp(nll), nll, tokens, window_nll.tolist())


def processes() -> tuple[int, int]:
    """This process's number and how many compute together: 0 and 1 unless a Trainer has brought several together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
