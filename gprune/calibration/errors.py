"""Errors of blocks: how much the loss rises when neurons of a block go, estimated for several widths.

Neurons go in a given order. With the K last of them kept, least squares gives the best output projection V on these,
and each token t keeps the error r_t = W x_t - V x_t,K, (H,). To second order, with the Fisher information in place of
the curvature, and for errors of random direction, the loss rises in proportion to

    E(K) = mean over tokens of ||r_t||^2 ||g_t||^2,    g_t = gradient of the loss by the output of the projection,

so errors of different blocks can be compared. The gradient matters most for the first token of a window: it holds most
of the energy of the activations, and next to nothing depends on it. Two thousand tokens of each corpus are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.calibration.statistics import CorpusStatistics
from gprune.errors import UserError, require_finite
from gprune.models.blocks import Block, blocks_of
from gprune.models.losses import differentiable, next_token_losses
from gprune.models.offload import device_of

LEVELS = 8  # widths of a block whose errors are computed lie N / LEVELS apart


def check_dense(blocks: Sequence[Block]) -> None:
    """Raise UserError for blocks with experts: errors are measured of dense FFNs alone."""
    if any(block.has_experts for block in blocks):
        raise UserError(
            f"--sparsity.allocation reconstruction: expected dense blocks, got experts of model_type "
            f"'{blocks[0].family.model_type}'; use uniform."
        )


def tokens_with_gradients(model: PreTrainedModel, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What enters each output projection of an FFN, and how much the loss depends on what leaves it.

    Args:
        model: dense and frozen.
        batches: (B, T) int64 token ids each.

    Returns:
        For each block (n, N) bfloat16 activations of all n tokens and (n,) float32 ||g_t||^2 on the CPU; the loss is a
        window's mean next-token cross-entropy in nats. Two empty tensors for a block without an FFN.
    """
    blocks = blocks_of(model)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]

    def see(index: int, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2).bfloat16().cpu()

        def keep(gradient: Tensor) -> None:
            seen[index].append((x, gradient.flatten(0, -2).float().square().sum(1).cpu()))

        output.register_hook(keep)

    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
        hooks.callback(differentiable(model).remove)
        for block in blocks:
            if block.down is not None:
                host = block.parts["down"].host
                hooks.callback(host.register_forward_hook(partial(see, block.index)).remove)
        for ids in batches:
            next_token_losses(model, ids.to(device_of(model)).clone()).sum().backward()
    empty = torch.zeros(0, 0, dtype=torch.bfloat16), torch.zeros(0)
    return [tuple(torch.cat(part) for part in zip(*of, strict=True)) if of else empty for of in seen]


@torch.no_grad()
def errors_by_width(weight: Tensor, gram: Tensor, x: Tensor, energy: Tensor, *, ridge: float) -> Tensor:
    """E(K) at K = 0, N / LEVELS, ..., N kept neurons, (LEVELS + 1,) float64, the last of them 0.

    Args:
        weight: W (H, N); gram: sum of x x^T over the calibration text, (N, N); x: (n, N) tokens. All of them with
            neurons in the order in which they leave, the last one first.
        energy: ||g_t||^2 of these tokens, (n,).
        ridge: lambda of least squares over the mean diagonal of `gram`.
    """
    N = weight.shape[1]
    weight, gram, x = weight.double(), gram.double(), x.float()
    weighted = (x * energy.float()[:, None]).T @ x / max(1, len(x))
    require_finite("activation or gradient came up while errors were measured", weighted)
    damped = gram.clone()
    damped.diagonal().add_(max(ridge, torch.finfo(torch.float32).eps * N) * gram.diagonal().mean().clamp_min(1e-12))
    factor = torch.linalg.cholesky(damped)  # its leading parts are the factors of the leading parts of the matrix
    errors = torch.zeros(LEVELS + 1, dtype=torch.float64)
    for level in range(LEVELS):
        K = level * N // LEVELS
        error = weight
        if K:
            correction = torch.cholesky_solve((weight[:, K:] @ gram[K:, :K]).T, factor[:K, :K]).T
            error = torch.cat([-correction, weight[:, K:]], 1)
        error = error.float()
        errors[level] = ((error @ weighted) * error).sum(dtype=torch.float64)
    return errors


def block_errors(
    model: PreTrainedModel,
    scores: Sequence[Tensor],
    statistics: CorpusStatistics,
    batches: Sequence[Tensor],
    *,
    ridge: float = 0.01,
) -> Tensor:
    """E(K) of every block, (blocks, LEVELS + 1) float64, as `errors_by_width` gives it.

    Args:
        model: dense and frozen, its weights in memory.
        scores: (N,) of each block's neurons, of which the smallest leave first.
        statistics: with Gram matrices.
        batches: the tokens, (B, T) int64 each, to go through the model and back.
    """
    blocks, errors = blocks_of(model), []
    for block, of_block, (x, energy) in zip(blocks, scores, tokens_with_gradients(model, batches), strict=True):
        if block.down is None:
            errors.append(torch.zeros(LEVELS + 1, dtype=torch.float64))
            continue
        weight, gram = block.down.weight.detach(), statistics.ffn[block.index].total.gram
        assert gram is not None, "errors are measured behind least squares, which needs Gram matrices"
        order = of_block.argsort(descending=True, stable=True)
        weight = weight.float().cpu()[:, order]
        errors.append(errors_by_width(weight, gram.cpu()[order][:, order], x[:, order], energy, ridge=ridge))
    return torch.stack(errors)
