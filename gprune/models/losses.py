"""Next-token losses in chunks, without logits of a whole batch and without a gradient for the frozen head.

Logits of 1,024 tokens over 49,152 words need 200 MB in float32. As the head is frozen, training needs only
d loss / d hidden, which is computed for each chunk of tokens in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from gprune.models.families import decoder_of, record_of
from gprune.models.offload import load_parameter

CHUNK = 256  # tokens per matrix product
ROWS = 32  # largest number of tokens per element-wise operation on a CPU
CACHED_LOGITS = 32 * 49_152  # logits per element-wise operation that fit a CPU's cache; this is three times faster


@dataclass(frozen=True)
class LogitTransform:
    """Transform of the product x of hidden states and head: y = x / s; with a limit c, c tanh(y / c)."""

    scaling: float = 1.0  # s
    softcap: float | None = None  # c

    @classmethod
    def of(cls, model: PreTrainedModel) -> LogitTransform:
        """Return the transform of a model, by the config keys in its family's record."""
        family = record_of(model)
        config = model.config.get_text_config(decoder=True)
        scaling = 1.0
        if family.logits_scaling:
            key, _, divisor = family.logits_scaling.partition("/")
            scaling = getattr(config, key) / (getattr(config, divisor) if divisor else 1)
        if family.logits_multiplier:
            scaling = 1 / getattr(config, family.logits_multiplier)
        return cls(scaling, getattr(config, family.softcap) if family.softcap else None)

    def __call__(self, product: Tensor) -> Tensor:
        """Return logits, in the dtype of the product."""
        logits = product if self.scaling == 1 else product / self.scaling
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def pull_back(self, error: Tensor, logits: Tensor) -> None:
        """Convert a gradient by logits to one by the product, in place."""
        if self.softcap is not None:
            error.mul_(1 - (logits.float() / self.softcap).square())
        if self.scaling != 1:
            error.div_(self.scaling)


def why_not_measurable(model: PreTrainedModel) -> str | None:
    """Return why the perplexity of a model cannot be measured, such as "its config has no hidden_size", or None."""
    if not record_of(model).plain_head:
        return "its logits are not the product of hidden states and head"
    config = model.config.get_text_config(decoder=True)
    missing = [key for key in ("hidden_size", "vocab_size", "num_hidden_layers") if not hasattr(config, key)]
    return f"its config has no {missing[0]}" if missing else None


def same_head(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Return whether equal hidden states give equal logits in two models, so that hidden states can be compared.

    Weight and bias of the head, and the scale and limit of logits, have to be equal.
    """
    head, other_head = model.get_output_embeddings(), other.get_output_embeddings()
    for name in ("weight", "bias"):
        tensor, other_tensor = load_parameter(head, name), load_parameter(other_head, name)
        if tensor is None or other_tensor is None:
            if tensor is not other_tensor:
                return False
        elif not torch.equal(tensor, other_tensor.to(tensor.device)):
            return False
    return LogitTransform.of(model) == LogitTransform.of(other)


class _FrozenHeadLosses(torch.autograd.Function):
    """`frozen_head_losses`, with d loss / d hidden computed chunk by chunk in the forward pass.

    For both losses the gradient by logits is our distribution minus the target's.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> Tensor:
        """Return the loss of each token, (n,) float32, and save the gradient by `hidden` for `backward`."""
        gradient = torch.empty_like(hidden)
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        if torch.is_autocast_enabled(hidden.device.type):  # once instead of for each product
            head = head.to(torch.get_autocast_dtype(hidden.device.type))
        step = rows_at_once(hidden.device, len(head))
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = transform(F.linear(hidden[chunk], head, bias))
            chunk_targets = targets[chunk]
            if targets.dim() == 2:  # hidden states of a teacher
                chunk_targets = transform(F.linear(chunk_targets, head, bias))
            chunk_losses = losses[chunk]  # a view
            for first in range(0, len(logits), step):
                rows = slice(first, first + step)
                chunk_losses[rows], error = _losses_and_errors(logits[rows].float(), chunk_targets[rows])
                transform.pull_back(error, logits[rows])
                logits[rows] = error  # the logits are no longer needed, so their memory gets the gradient
            gradient[chunk] = (logits @ head).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient by `hidden`, (n, H). Other arguments have none."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output[:, None].to(gradient.dtype), None, None, None, None


def _losses_and_errors(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, (n,), and its gradient by logits, (n, V) float32.

    `targets` are ids (n,), or logits (n, V) of a teacher.
    """
    # p is our distribution, and q that of the teacher.
    log_p = logits.log_softmax(-1)  # one fused pass; logsumexp needs four
    if targets.dim() == 1:
        losses = -log_p.gather(-1, targets[:, None])[:, 0]
        error = log_p.exp_()
        error[torch.arange(len(error), device=error.device), targets] -= 1
        return losses, error
    log_q = targets.float().log_softmax(-1)
    q = log_q.exp()
    losses = log_q.sub_(log_p).mul_(q).sum(-1)  # not vecdot, which autocast rounds to bfloat16
    return losses, log_p.exp_().sub_(q)


def rows_at_once(device: torch.device, vocabulary: int) -> int:
    """Return the number of tokens per element-wise operation on logits of a device, for a size of the vocabulary."""
    return max(1, min(ROWS, CACHED_LOGITS // vocabulary)) if device.type == "cpu" else CHUNK


def frozen_head_losses(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
) -> Tensor:
    """Return the next-token loss of each token in nats, (n,) float32, differentiable only by `hidden` (n, H).

    The head is (V, H) with a bias (V,) or None. Targets are (n,) token ids, for the cross-entropy, or (n, H) hidden
    states of a teacher with the same head, for KL(teacher || ours). `transform` maps products to logits.
    """
    return _FrozenHeadLosses.apply(hidden, head, bias, targets, transform)


def next_token_losses(model: PreTrainedModel, input_ids: Tensor, *, teacher: Tensor | None = None) -> Tensor:
    """Return the mean loss of each window's tokens 2..T in nats, (B, T) -> (B,) float32.

    `teacher` is the `final_hidden` of a teacher, as in `frozen_head_losses`. Without it the loss is the cross-entropy.
    """
    head = model.get_output_embeddings()
    # If a model is on several devices, a head that is tied to the embeddings is not on that of the last layer.
    device = head.weight.device
    targets = input_ids[:, 1:].flatten() if teacher is None else teacher.flatten(0, 1)
    targets = targets.to(device)
    hidden = final_hidden(model, input_ids).flatten(0, 1).to(device)
    losses = frozen_head_losses(hidden, head.weight, head.bias, targets, LogitTransform.of(model))
    return losses.view(len(input_ids), -1).mean(1)


def require_activation_gradients(model: PreTrainedModel) -> RemovableHandle:
    """Make activations of a frozen model require gradients, by a hook on the embedding. Return its handle.

    The model gets a copy, because some models change the embedding's output in place, which is an error for a leaf.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_().clone()

    return model.get_input_embeddings().register_forward_hook(hook)


def final_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return hidden states that predict tokens 2..T of each window: (B, T - 1, H) in the model's dtype."""
    return head_input(model, decoder_of(model)(input_ids=input_ids, use_cache=False))[:, :-1]


def head_input(model: PreTrainedModel, decoded: BaseModelOutput) -> Tensor:
    """Return the hidden states that are multiplied by the head, (B, T, H), from the output of the decoder."""
    path = record_of(model).before_head
    hidden = decoded.last_hidden_state
    return hidden if path is None else model.get_submodule(path)(hidden)


@torch.no_grad()
def iter_logits(model: PreTrainedModel, input_ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield logits, targets and final hidden states of each window.

    Logits (1, T - 1, V) and hidden states (1, T - 1, H) are in the model's dtype, targets (1, T - 1) are int64.
    """
    hidden = final_hidden(model, input_ids)
    head = model.get_output_embeddings()
    transform = LogitTransform.of(model)
    for window_hidden, window_ids in zip(hidden, input_ids, strict=True):
        yield transform(head(window_hidden[None])), window_ids[None, 1:], window_hidden[None]
