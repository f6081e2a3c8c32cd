"""Perplexity of any causal language model and its distance from the dense model, from the logits of both.

`gprune.evaluation.perplexity` computes the same numbers faster, for pruned models that have the dense model's head.
Here nothing is assumed of the model: its own `forward` gives the logits.
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
    """Perplexity as in `perplexity` and, beside a dense model of the same tokenizer, KL(dense || model) and agreement.

    One window at a time goes through both models. Where one vocabulary is padded, both distributions are those over the
    tokens that the two have in common.

    Args:
        progress: is called after each window with its number of tokens.

    Raises:
        UserError: for a loss that is not finite, and for a mean loss whose exp would overflow.
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
    """(T - 1, V): the logits that predict tokens 2..T of a window (T,) int64."""
    return model(input_ids=window[None].to(device_of(model)), use_cache=False).logits[0, :-1]


def _sums(logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
    """(1,) or (3,) float64: the sum over tokens of the negative log-likelihood and, beside the dense model's logits,
    that of KL(dense || model) in nats, and the number of equal most likely tokens."""
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
