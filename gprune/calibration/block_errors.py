"""Errors of blocks: estimates of how much the loss rises if a block is cut to a given width, for several widths.

Neurons are removed in a given order. If the last K of them are kept, least squares gives the best output projection V,
and token t has the error r_t = W x_t - V x_t,K, (H,). The rise of the loss is estimated to second order, with the
Fisher information instead of the curvature and for errors of random direction. It is proportional to

    E(K) = mean over tokens of ||r_t||^2 ||g_t||^2,    g_t = gradient of the loss by the output of the projection,

so errors of different blocks are comparable. The factor ||g_t||^2 matters most for the first token of a window, which
has most of the energy of the activations but hardly influences the loss. Two thousand tokens per corpus are enough.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.calibration.moments import add_gram, fill_gram
from gprune.calibration.statistics import CorpusStatistics
from gprune.errors import UserError, require_finite
from gprune.models.experts import is_of_experts
from gprune.models.families import decoder_layers, record_of
from gprune.models.losses import next_token_losses, require_activation_gradients
from gprune.models.offload import device_of
from gprune.models.products import CastWeights, fast_products
from gprune.models.units import output_weight, units_of

log = logging.getLogger("gprune")

ERROR_TOKENS = 2048  # tokens per corpus for errors of blocks; 16,384 tokens do not give a better choice
LEVELS = 8  # errors are computed for widths that are N / LEVELS apart


def refuse_experts(model: PreTrainedModel) -> None:
    """Raise UserError for a model with experts. Errors are only implemented for dense FFNs."""
    if any(is_of_experts(decoder_layers(model)[u.layer], u) for u in units_of(model)):
        raise UserError(
            f"--sparsity.allocation reconstruction cannot measure experts ('{record_of(model).model_type}'). "
            "Use uniform."
        )


def error_corpora(cfg: Any) -> dict[str, list[str]]:
    """Return the corpora on which errors of blocks are measured, by the masks that are allocated by these errors.

    The keys are among `base` and `modules`. There are none if the allocation does not read errors.
    """
    if not cfg.measures_errors:
        return {}
    if not cfg.gprune:
        return {"base": cfg.base_corpora}
    # The sparsity at which thresholds are learned for a target in quality is found with masks of the base metric.
    of_base = {"base": cfg.base_corpora} if cfg.learns and cfg.searches_quality else {}
    return of_base | {"modules": cfg.corpora.drift}


def error_windows(cfg: Any, name: str) -> dict[str, int]:
    """Return the number of windows of each corpus for errors of blocks, for masks with a name of `error_corpora`.

    On average a corpus has as many windows as fit into `ERROR_TOKENS`, but at least one.
    """
    each = min(cfg.corpora.num_samples, max(1, ERROR_TOKENS // cfg.corpora.seq_len))
    return cfg.corpora.windows_of(error_corpora(cfg).get(name, []), each)


def error_tokens(cfg: Any, name: str) -> int:
    """Number of tokens on which errors of blocks are measured for masks with a name of `error_corpora`."""
    return sum(error_windows(cfg, name).values()) * cfg.corpora.seq_len


def tokens_with_gradients(
    model: PreTrainedModel, batches: Sequence[Tensor], *, bfloat16: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the inputs of each `down` projection and ||g_t||^2, g_t being the gradient of the loss by its output.

    For each key of neurons, on the CPU: (n, N) bfloat16 inputs of all n tokens, and (n,) float32. The loss is the
    mean next-token cross-entropy of a window in nats. Batches are (B, T) token ids. With `bfloat16`, matrices are
    multiplied in autocast, with fallback to float32 if a loss is not finite.
    """
    device = device_of(model)
    layers = decoder_layers(model)
    hosts = {u.key: layers[u.layer].get_submodule(u.reads) for u in units_of(model) if u.kind == "neurons" and u.reads}
    recorded: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in hosts}  # one pair per batch

    def record(key: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Record a batch when the backward pass reaches the projection."""
        x = inputs[0].detach().flatten(0, -2).bfloat16().cpu()

        def record_gradient(gradient: Tensor) -> None:
            energy = gradient.flatten(0, -2).float().square().sum(1).cpu()
            recorded[key].append((x, energy))

        output.register_hook(record_gradient)

    casts = CastWeights(model)
    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
        hooks.callback(require_activation_gradients(model).remove)
        for key, host in hosts.items():
            hooks.callback(host.register_forward_hook(partial(record, key)).remove)
        for ids in batches:
            ids = ids.to(device).clone()  # a normal tensor, even if the batch was created in inference mode
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), casts.applied():
                losses = next_token_losses(model, ids)
            if bfloat16 and not losses.isfinite().all():
                log.warning("A loss is not finite in bfloat16. Errors of blocks are measured in float32 instead.")
                bfloat16 = False  # for the following batches too
                losses = next_token_losses(model, ids)
            losses.sum().backward()
    by_key = {}
    for key, pairs in recorded.items():
        inputs, energies = zip(*pairs, strict=True)
        by_key[key] = torch.cat(inputs), torch.cat(energies)
    return by_key


@torch.no_grad()
def errors_by_width(weight: Tensor, gram: Tensor, x: Tensor, energy: Tensor, *, ridge: float) -> Tensor:
    """Return E(K) at K = 0, N / LEVELS, ..., N kept neurons, (LEVELS + 1,) float64 on the CPU; the last one is 0.

    All widths share one Cholesky factor: G + lambda I = L L^T, and the leading part of L is the factor of the leading
    part of G + lambda I. With P = W L and R the N - K removed neurons, the error of token t is r_t = P_R (L^-1 x_t)_R,
    so

        E(K) = sum over i, j in R of (P^T P)_ij (L^-1 S L^-T)_ij,    S = mean over tokens of x_t x_t^T ||g_t||^2.

    W is `weight` (H, N), G is `gram` (N, N), x (n, N), and ||g_t||^2 is `energy` (n,). In all of them the neuron that
    is removed first comes last.
    """
    N = weight.shape[1]
    S = torch.zeros(N, N, device=weight.device)
    scaled = x.float() * (energy.float() / max(1, len(x))).sqrt()[:, None]
    with fast_products(x):  # rounds `scaled` to bfloat16, which changes errors by about 1e-4 of their size
        add_gram(S, scaled)
    fill_gram(S)
    require_finite("activation or gradient came up while errors were measured", S)
    G = gram.double()
    # The least lambda exceeds the rounding errors of a float32 Gram matrix, as in `least_squares.ridge_correction`.
    damping = max(ridge, torch.finfo(torch.float32).eps * N) * G.diagonal().mean().clamp_min(1e-12)
    L = torch.linalg.cholesky(G + damping * torch.eye(N, device=G.device)).float()
    half_whitened = torch.linalg.solve_triangular(L, S, upper=False)  # L^-1 S
    whitened = torch.linalg.solve_triangular(L, half_whitened.T, upper=False)  # L^-1 S L^-T, as S is symmetric
    P = weight.float() @ L
    products = (P.T @ P).mul_(whitened)
    widths = [level * N // LEVELS for level in range(LEVELS + 1)]
    return torch.stack([products[K:, K:].sum(dtype=torch.float64) for K in widths]).cpu()


def block_errors(
    model: PreTrainedModel,
    scores: Mapping[str, Tensor],
    statistics: CorpusStatistics,
    batches: Sequence[Tensor],
    *,
    ridge: float = 0.01,
    bfloat16: bool = False,
) -> Tensor:
    """Return E(K) of each block at K = 0, N / LEVELS, ..., N: (blocks, LEVELS + 1) float64 on the CPU.

    The neurons with the smallest `scores`, (N,) by key, are removed first. Batches are (B, T) token ids for the
    forward and backward pass. The errors of a block without an FFN are zeros.
    """
    errors = []
    tokens = tokens_with_gradients(model, batches, bfloat16=bfloat16)
    for u in (u for u in units_of(model) if u.kind == "neurons"):
        if not u.reads:
            errors.append(torch.zeros(LEVELS + 1, dtype=torch.float64))
            continue
        key, layer = u.key, decoder_layers(model)[u.layer]
        weight = output_weight(u, layer, device_of(layer))
        gram = statistics.channels[key].total.gram
        assert gram is not None, "errors are measured behind least squares, which needs Gram matrices"
        order = scores[key].argsort(descending=True, stable=True).to(weight.device)
        gram, x, energy = (tensor.to(weight.device) for tensor in (gram, *tokens[key]))
        errors.append(errors_by_width(weight[:, order], gram[order][:, order], x[:, order], energy, ridge=ridge))
    return torch.stack(errors)
