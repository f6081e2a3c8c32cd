"""Perplexity of any causal language model, and KL divergence and agreement with the dense model.

`gprune.evaluation.perplexity` computes the same numbers faster for pruned models, which share the dense model's head.
This version uses only the logits of `forward`, so it works for every model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gprune.corpora.windows import Windows
from gprune.evaluation.perplexity import PerplexityResult, kl_of_rows
from gprune.models.losses import rows_at_once
from gprune.models.offload import device_of


@torch.no_grad()
def perplexity_from_logits(
    model: PreTrainedModel, windows: Windows, dense: PreTrainedModel | None = None, *,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:  # fmt: skip
    """Measure perplexity, and with `dense` also KL(dense || model) and agreement, window by window.

    If a vocabulary is padded, both distributions are restricted to the tokens that the two models share.
    """
    sums = []
    for window in windows.tokens:
        logits = _logits(model, window)
        targets = window[1:].to(logits.device)
        dense_logits = None if dense is None else _logits(dense, window).to(logits.device)
        sums.append(_window_sums(logits, targets, dense_logits))
        if progress is not None:
            progress(window.numel())
    return PerplexityResult.from_window_sums(torch.stack(sums).cpu(), windows)


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Return the logits (T - 1, V) for tokens 2..T of a window (T,) int64."""
    return model(input_ids=window[None].to(device_of(model)), use_cache=False).logits[0, :-1]


def _window_sums(logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
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
