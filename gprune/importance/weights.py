"""Read the weights of a block's channels for a metric."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gprune.models.blocks import Block, ExpertPart, Part


@dataclass(frozen=True)
class UnitWeights:
    """Weights of C channels with H hidden dimensions, float32.

    For neurons `inputs` are the rows of gate and up, or of up only without a gate. For attention they are the value
    rows, repeated for the query heads that share them, because a channel of the output projection's input is a weighted
    mean over tokens of the value row's output.
    """

    inputs: tuple[Tensor, ...]  # each (C, H)
    output: Tensor  # (H, C)

    def of_expert(self, index: int, experts: int) -> UnitWeights:
        """Return the weights of one expert, C / experts channels."""
        per_expert = self.output.shape[1] // experts
        channels = slice(per_expert * index, per_expert * (index + 1))
        inputs = tuple(rows[channels] for rows in self.inputs)
        return replace(self, inputs=inputs, output=self.output[:, channels])


def ffn_weights(block: Block, device: torch.device | str = "cpu") -> UnitWeights:
    """Return weights of the experts x neurons channels of a block's FFN, on a device."""
    parts = [part for part in (block.gate, block.up) if part is not None]
    return UnitWeights(tuple(_weight(part, device) for part in parts), _weight(block.down, device))


def attention_weights(block: Block) -> UnitWeights:
    """Return weights of the query heads x head_dim channels of a block's attention."""
    rows = block.per_query_head(_weight(block.value))
    return UnitWeights((rows,), _weight(block.output))


def _weight(part: Part | ExpertPart, device: torch.device | str = "cpu") -> Tensor:
    return part.weight.detach().float().to(device)
