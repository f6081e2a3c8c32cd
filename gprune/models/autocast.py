"""Copies of frozen weights in the dtype of autocast, kept from step to step.

Autocast casts a float32 weight to bfloat16 at every matrix product that reads it. For a frozen weight the result is the
same each time, so one copy saves the cast, and the bits of the product stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gprune.models.offload import is_sharded

PRODUCTS = (nn.Linear, Conv1D)  # modules whose weights only matrix products read, which autocast casts


class CastWeights:
    """Copies of a model's frozen weights, made at the first use under autocast.

    Embeddings and norms, which autocast computes in float32, stay as they are; a head that is tied to the embeddings
    gets a copy of its own. Weights that learn, are offloaded or sharded have no copy.

    Args:
        model: on its device, when the copies are first used; its modules keep their hooks.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id: the weight, its version, and its copy

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the modules compute with the copies while the context lasts; a no-op without autocast.

        The backward pass may run after the context: it uses the tensors of the forward pass.
        """
        replaced: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for module in self.model.modules():
                for name, weight in module._parameters.items() if type(module) in PRODUCTS else ():
                    if weight is not None and (copy := self._copy(weight)) is not None:
                        replaced.append((module, name, weight))
                        module._parameters[name] = copy
            yield
        finally:
            for module, name, weight in replaced:
                module._parameters[name] = weight

    def _copy(self, weight: Tensor) -> Tensor | None:
        """The copy of a weight; None if autocast would not cast the weight, or the weight may change."""
        kind, kept = weight.device.type, self._copies.get(id(weight))
        if weight.requires_grad or weight.is_meta or is_sharded(weight) or weight.dtype != torch.float32:
            return None
        if not torch.is_autocast_enabled(kind):
            return None
        if kept is None or kept[0] is not weight or kept[1] != weight._version or kept[2].device != weight.device:
            copy = nn.Parameter(weight.detach().to(torch.get_autocast_dtype(kind)), requires_grad=False)
            kept = self._copies[id(weight)] = (weight, weight._version, copy)
        return kept[2]


def cast_numbers(model: nn.Module) -> int:
    """How many numbers `CastWeights` would copy, if all weights were frozen and in float32."""
    weights = (
        weight for module in model.modules() if type(module) in PRODUCTS for weight in module._parameters.values()
    )
    return sum(weight.numel() for weight in {id(w): w for w in weights if w is not None}.values())
