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
        pairs = zip(self.ffn, self.attention, strict=True)
        return torch.stack([f.any() | a.any() | (len(f) + len(a) == 0) for f, a in pairs]).tolist()

    def channels(self, block: Block) -> dict[str, Tensor]:
        """Return kept columns, bool: (experts x neurons,) of `down`, (heads x head_dim,) of the output projection."""
        groups = self.attention[block.index].repeat_interleave(block.channels_per_group)
        return {"ffn": self.ffn[block.index], "attention": groups}

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors by flat names, as in safetensors files."""
        return {f"{kind}.{i}": m for kind in ("ffn", "attention") for i, m in enumerate(getattr(self, kind))}

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> Masks:
        """Return masks from the result of `tensors`."""
        depth = len(flat) // 2
        return cls(*([flat[f"{kind}.{i}"].bool() for i in range(depth)] for kind in ("ffn", "attention")))

    def __eq__(self, other: object) -> bool:
        mine, theirs = self.tensors(), other.tensors() if isinstance(other, Masks) else {}
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None
