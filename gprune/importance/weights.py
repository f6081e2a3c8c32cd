"""Read the weights of a block's channels, which a metric judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gprune.models.blocks import Block, ExpertPart, Part
from gprune.models.offload import stored


@dataclass(frozen=True)
class UnitWeights:
    """The weights of C channels with H hidden dimensions, float32.

    For neurons `inputs` are the rows of gate and up, or of up alone where there is no gate. For attention they are the
    value rows, repeated for the query heads that share them: a channel that enters the output projection is a weighted
    mean over tokens of that value row's output.
    """

    inputs: tuple[Tensor, ...]  # each (C, H)
    output: Tensor  # (H, C)
    scale: Tensor | None = None  # (H,), weight of the norm before the inputs; None: 1
    activation: Callable[[Tensor], Tensor] | None = None  # applied to the first input; None: the identity
    per_unit: int = 1  # consecutive channels per unit: 1 for neurons
    means: tuple[Tensor, ...] | None = None  # (C,) each: the mean output of the inputs, from biases; None: 0

    def of_expert(self, index: int, experts: int) -> UnitWeights:
        """The channels of one expert, (C / experts,)."""
        own = slice(*(self.output.shape[1] // experts * i for i in (index, index + 1)))
        means = None if self.means is None else tuple(m[own] for m in self.means)
        return replace(self, inputs=tuple(r[own] for r in self.inputs), output=self.output[:, own], means=means)


def ffn_weights(block: Block, device: torch.device | str = "cpu") -> UnitWeights:
    """The (experts x neurons,) channels of one block's FFN, its weights on a device."""
    parts = [part for part in (block.gate, block.up) if part is not None]
    scale, shift = _norm(block.ffn_norm, block.family.norm_offset)
    rows, means = tuple(_weight(part, device) for part in parts), tuple(_means(part, shift) for part in parts)
    return UnitWeights(rows, _weight(block.down, device), scale, block.activation, means=means)


def attention_weights(block: Block) -> UnitWeights:
    """The (query heads x head_dim,) channels of one block's attention."""
    scale, shift = _norm(block.attention_norm, block.family.norm_offset)
    rows, means = (block.per_query_head(v) for v in (_weight(block.value), _means(block.value, shift)))
    return UnitWeights((rows,), _weight(block.output), scale, per_unit=block.channels_per_group, means=(means,))


def _weight(part: Part | ExpertPart, device: torch.device | str = "cpu") -> Tensor:
    return part.weight.detach().float().to(device)


def _norm(norm: nn.Module | None, offset: float) -> tuple[Tensor | None, Tensor | None]:
    """The scale and the shift of the norm before a projection, (H,) each; None where it has none."""
    if norm is None or norm.weight is None:
        return None, None
    bias = stored(norm, "bias") if hasattr(norm, "bias") else None
    scale = stored(norm, "weight").detach().float().cpu() + offset
    return scale, None if bias is None else bias.detach().float().cpu()


def _means(part: Part | ExpertPart, shift: Tensor | None) -> Tensor:
    """The output of each row for the norm's mean output, (C,)."""
    own = torch.zeros(part.out_features) if part.bias is None else part.bias.detach().float().cpu()
    return own if shift is None else own + _weight(part) @ shift
