"""Keep masks: which units of a model are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gprune.models.blocks import Block


@dataclass(frozen=True)
class Masks:
    """Keep masks, True = keep, one tensor per block."""

    ffn: list[Tensor]  # (neurons,) bool, or (experts x neurons,) with equally many kept in every expert
    attention: list[Tensor]  # (kv_groups,) bool; all True when attention is out of scope

    @property
    def blocks(self) -> list[bool]:
        """Whether each block is kept. A block that keeps no units is removed with its norms, as are all other blocks of
        its layer. A block that has no units is kept."""
        is_kept = []
        for ffn, attention in zip(self.ffn, self.attention, strict=True):
            has_no_units = len(ffn) + len(attention) == 0
            is_kept.append(ffn.any() | attention.any() | has_no_units)
        return torch.stack(is_kept).tolist()  # one transfer if masks are on a GPU

    def channels(self, block: Block) -> dict[str, Tensor]:
        """Return which columns are kept, bool.

        `ffn`: (experts x neurons,) of `down`; `attention`: (heads x head_dim,) of the output projection.
        """
        groups = self.attention[block.index].repeat_interleave(block.channels_per_group)
        return {"ffn": self.ffn[block.index], "attention": groups}

    def tensors(self) -> dict[str, Tensor]:
        """Return masks by the names `ffn.0`, `attention.0` and so on, as in safetensors files."""
        ffn = {f"ffn.{index}": mask for index, mask in enumerate(self.ffn)}
        attention = {f"attention.{index}": mask for index, mask in enumerate(self.attention)}
        return ffn | attention

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Masks:
        """Return masks from the result of `tensors`."""
        number_of_blocks = len(tensors) // 2
        ffn = [tensors[f"ffn.{index}"].bool() for index in range(number_of_blocks)]
        attention = [tensors[f"attention.{index}"].bool() for index in range(number_of_blocks)]
        return cls(ffn, attention)

    def __eq__(self, other: object) -> bool:
        """Return whether two masks keep the same units."""
        if not isinstance(other, Masks):
            return False
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None
