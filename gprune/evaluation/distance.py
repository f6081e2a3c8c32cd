"""Perplexity of any causal language model, and KL divergence and agreement with the dense model.

`gprune.evaluation.perplexity` computes the same numbers faster for pruned models, which share the dense model's head.
This version uses only the logits of `forward`, so it works for every model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gprune.corpora.windows import Windows
from gprune.evaluation.perplexity import PerplexityResult, mean_nll
from gprune.models.losses import rows_at_once
from gprune.models.offload import device_of


@torch.no_grad()
def measured_apart(
    model: PreTrainedModel, windows: Windows, dense: PreTrainedModel | None = None, *,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:  # fmt: skip
    """Measure perplexity, and with `dense` also KL(dense || model) and agreement, window by window.

    If a vocabulary is padded, both distributions are restricted to the tokens that the two models share.

    Args:
        dense: a model with the same tokenizer.
        progress: called after each window with its number of tokens.

    Raises:
        UserError: if a loss is not finite, or exp of the mean loss would overflow.
    """
    sums = []
    for window in windows.tokens:
        logits, targets = _logits(model, window), window[1:]
        theirs = None if dense is None else _logits(dense, window).to(logits.device)
        sums.append(_sums(logits, targets.to(logits.device), theirs))
        if progress is not None:
            progress(window.numel())
    scores, tokens = torch.stack(sums).cpu(), windows.tokens[:, 1:].numel()
    nll = mean_nll(scores[:, 0].contiguous(), tokens, windows.corpus)
    distance = [part for of in scores.T[1:] for part in (float(of.sum()) / tokens, of.tolist())]
    return PerplexityResult(math.exp(nll), nll, tokens, scores[:, 0].tolist(), *distance)


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Logits (T - 1, V) for tokens 2..T of a window (T,) int64."""
    return model(input_ids=window[None].to(device_of(model)), use_cache=False).logits[0, :-1]


def _sums(logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
    """Sums over the tokens of a window, (1,) or (3,) float64.

    The sums are the negative log-likelihood in nats and, if the dense model's logits are given, KL(dense || model) in
    nats and the number of tokens with the same argmax.
    """
    rows, parts = rows_at_once(logits), []
    common = None if dense is None else min(dense.shape[-1], logits.shape[-1])
    for start in range(0, len(logits), rows):
        ours, wanted = logits[start : start + rows].float(), targets[start : start + rows]
        part = [F.cross_entropy(ours, wanted, reduction="none").double().sum()]
        if dense is not None:
            ours, theirs = ours[:, :common], dense[start : start + rows, :common].float()
            logs = ours.log_softmax(-1), theirs.log_softmax(-1)
            kl = F.kl_div(*logs, reduction="none", log_target=True).sum(-1).double().sum().clamp_min(0)
            part += [kl, (ours.argmax(-1) == theirs.argmax(-1)).double().sum()]
        parts.append(torch.stack(part))
    return torch.stack(parts).sum(0)
