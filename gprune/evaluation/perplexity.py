"""Perplexity of a model on the windows of a corpus, with the negative log-likelihood of each window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gprune.corpora.windows import Windows
from gprune.errors import UserError, require_finite
from gprune.models.losses import iter_logits, rows_at_once
from gprune.models.offload import device_of


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
        progress: is called after each batch with its tokens, such as what `Screen.bar` gives.
        shared: share the batches out over processes, which all have to call this function with the same model, whole
            or spread over them. Batches are those of one process, and so are the bits of the result.

    Raises:
        UserError: for a loss that is not finite, and for a mean loss whose exp would overflow.
    """
    rank, world = processes() if shared else (0, 1)
    batches = windows.tokens.split(batch_size)  # batch i is of process i % world
    own = []
    for batch in batches[rank::world]:
        own.append(_window_nll(model, batch))
        if progress is not None:
            progress(batch.numel() * world)
    if len(own) < len(batches[::world]):
        # A model that is spread over processes needs all of them in each pass, and other processes have one more.
        _window_nll(model, batches[0][:1])
    by_process: list[Any] = [[nll.cpu() for nll in own]] * world
    if world > 1:
        torch.distributed.all_gather_object(by_process, by_process[rank])
    window_nll = torch.cat([by_process[i % world][i // world] for i in range(len(batches))])
    require_finite("loss came up in evaluation", window_nll)
    tokens = windows.tokens[:, 1:].numel()
    nll = float(window_nll.sum()) / tokens
    if nll > 700:  # exp would overflow
        raise UserError(f"The mean loss on {windows.corpus} is {nll:.0f} nats per token; the model is broken.")
    return PerplexityResult(math.exp(nll), nll, tokens, window_nll.tolist())


def _window_nll(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(B,) float64: each window's negative log-likelihood, summed over its tokens 2..T; tokens (B, T) int64.

    The cross-entropy is taken in float32, whatever the model's dtype.
    """
    sums = []
    for logits, targets in iter_logits(model, tokens.to(device_of(model), non_blocking=True)):
        rows = rows_at_once(logits)
        # The output embeddings, and with them the logits, may lie on another device.
        chunks = zip(logits[0].split(rows), targets[0].to(logits.device).split(rows), strict=True)
        nll = torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in chunks])
        sums.append(nll.double().sum())
    return torch.stack(sums)


def processes() -> tuple[int, int]:
    """This process's number and how many compute together: 0 and 1 unless a Trainer has brought several together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
