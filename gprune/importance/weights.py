"""The weights of the channels that a metric judges, read off a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from gprune.models.blocks import Block, ExpertPart, Part
from gprune.models.offload import stored


@dataclass(frozen=True)
class UnitWeights:
    """The weights of C channels with H hidden dimensions, float32.

    For neurons `inputs` are the gate and up rows, or those of up where there is no gate; for attention the value rows,
    repeated for the query heads that share them (a channel of `o_proj` is a weighted mean over tokens of that value
    row's output).
    """

    inputs: tuple[Tensor, ...]  # each (C, H)
    output: Tensor  # (H, C)
    scale: Tensor | None = None  # (H,), of the normalisation before the inputs; None: 1
    activation: Callable[[Tensor], Tensor] | None = None  # after the first input; None where nothing stands between
    per_unit: int = 1  # channels per unit, consecutive: 1 for neurons
    means: tuple[Tensor, ...] | None = None  # (C,) each: of the inputs, from biases; None: 0

    def of_expert(self, index: int, experts: int) -> UnitWeights:
        """The channels of one expert, (C / experts,)."""
        own = slice(*(self.output.shape[1] // experts * i for i in (index, index + 1)))
        means = None if self.means is None else tuple(m[own] for m in self.means)
        return replace(self, inputs=tuple(r[own] for r in self.inputs), output=self.output[:, own], means=means)


def ffn_weights(block: Block) -> UnitWeights:
    """(experts x neurons,) channels of one block's FFN."""
    rows = [part for part in (block.gate, block.up) if part is not None]
    scale, shift = _norm(block.ffn_norm, block.family.norm_offset)
    return UnitWeights(
        tuple(_weight(part) for part in rows),
        _weight(block.down),
        scale,
        activation=block.activation,
        means=tuple(_means(part, shift) for part in rows),
    )


def attention_weights(block: Block) -> UnitWeights:
    """(query heads x head_dim,) channels of one block's attention."""
    scale, shift = _norm(block.attention_norm, block.family.norm_offset)
    heads = block.channels_per_group // block.head_dim

    def shared(per_group: Tensor) -> Tensor:
        by_group = rearrange(per_group, "(g d) ... -> g d ...", d=block.head_dim)
        return repeat(by_group, "g d ... -> (g q d) ...", q=heads)

    return UnitWeights(
        (shared(_weight(block.value)),),
        _weight(block.output),
        scale,
        per_unit=block.channels_per_group,
        means=(shared(_means(block.value, shift)),),
    )


def _weight(part: Part | ExpertPart) -> Tensor:
    return part.weight.detach().float().cpu()


def _norm(norm: nn.Module | None, offset: float) -> tuple[Tensor | None, Tensor | None]:
    """What the norm before a projection multiplies by and adds, (H,) each; None: nothing."""
    if norm is None or norm.weight is None:
        return None, None
    bias = stored(norm, "bias") if hasattr(norm, "bias") else None
    scale = stored(norm, "weight").detach().float().cpu() + offset
    return scale, None if bias is None else bias.detach().float().cpu()


def _means(part: Part | ExpertPart, shift: Tensor | None) -> Tensor:
    """The output of each row for what the norm gives on average, (C,)."""
    own = torch.zeros(part.out_features) if part.bias is None else part.bias.detach().float().cpu()
    return own if shift is None else own + _weight(part) @ shift
