"""Read the weights of a block's channels, which a metric judges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gprune.models.blocks import Block, ExpertPart, Part


@dataclass(frozen=True)
class UnitWeights:
    """The weights of C channels with H hidden dimensions, float32.

    For neurons `inputs` are the rows of gate and up, or of up alone where there is no gate. For attention they are the
    value rows, repeated for the query heads that share them: a channel that enters the output projection is a weighted
    mean over tokens of that value row's output.
    """

    inputs: tuple[Tensor, ...]  # each (C, H)
    output: Tensor  # (H, C)

    def of_expert(self, index: int, experts: int) -> UnitWeights:
        """The channels of one expert, (C / experts,)."""
        own = slice(*(self.output.shape[1] // experts * i for i in (index, index + 1)))
        return replace(self, inputs=tuple(rows[own] for rows in self.inputs), output=self.output[:, own])


def ffn_weights(block: Block, device: torch.device | str = "cpu") -> UnitWeights:
    """The (experts x neurons,) channels of one block's FFN, its weights on a device."""
    parts = [part for part in (block.gate, block.up) if part is not None]
    return UnitWeights(tuple(_weight(part, device) for part in parts), _weight(block.down, device))


def attention_weights(block: Block) -> UnitWeights:
    """The (query heads x head_dim,) channels of one block's attention."""
    rows = block.per_query_head(_weight(block.value))
    return UnitWeights((rows,), _weight(block.output))


def _weight(part: Part | ExpertPart, device: torch.device | str = "cpu") -> Tensor:
    return part.weight.detach().float().to(device)
