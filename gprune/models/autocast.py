"""Cache of frozen weights in the dtype of autocast.

Autocast casts a float32 weight to bfloat16 for every matrix product. For frozen weights the result is always the same,
so a cached copy saves the cast without changing a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gprune.models.offload import is_sharded

PRODUCTS = (nn.Linear, Conv1D)  # modules whose weights are only used in matrix products, which autocast casts


class CastWeights:
    """Copies of a model's frozen weights, made at the first use under autocast.

    Embeddings and norms have no copy, because autocast computes them in float32; a head that is tied to the embeddings
    has one. Trained, offloaded and sharded weights have no copy.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id: the weight, its version, and its copy

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the copies while the context lasts. A no-op without autocast.

        The backward pass may run after the context, because it uses tensors of the forward pass.
        """
        replaced: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for module in self.model.modules():
                if type(module) not in PRODUCTS:
                    continue
                for name, weight in module._parameters.items():
                    if weight is not None and (copy := self._copy(weight)) is not None:
                        replaced.append((module, name, weight))
                        module._parameters[name] = copy
            yield
        finally:
            for module, name, weight in replaced:
                module._parameters[name] = weight

    def _copy(self, weight: Tensor) -> Tensor | None:
        """Return the copy of a weight, or None if autocast does not cast it or it may change.

        A copy is made at the first call, and again if the weight has changed since.
        """
        if weight.requires_grad or weight.is_meta or is_sharded(weight) or weight.dtype != torch.float32:
            return None
        device_type = weight.device.type
        if not torch.is_autocast_enabled(device_type):
            return None
        if id(weight) in self._copies:
            source, version, copy = self._copies[id(weight)]
            # Ids are reused, so the tensor itself is compared too.
            if source is weight and version == weight._version and copy.device == weight.device:
                return copy
        copy = nn.Parameter(weight.detach().to(torch.get_autocast_dtype(device_type)), requires_grad=False)
        self._copies[id(weight)] = (weight, weight._version, copy)
        return copy


def count_cast_weights(model: nn.Module) -> int:
    """Return how many numbers `CastWeights` copies if all weights are frozen and in float32.

    Shared weights are counted once.
    """
    weights: dict[int, Tensor] = {}  # by id
    for module in model.modules():
        if type(module) in PRODUCTS:
            weights |= {id(weight): weight for weight in module._parameters.values() if weight is not None}
    return sum(weight.numel() for weight in weights.values())
