"""Keep masks: which units of a model stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gprune.models.blocks import Block


@dataclass(frozen=True)
class Masks:
    """Keep masks, True = keep, one tensor per block."""

    ffn: list[Tensor]  # (neurons,) bool; (experts x neurons,), as many kept in every expert, where there are experts
    attention: list[Tensor]  # (kv_groups,) bool; all True when attention is out of scope

    @property
    def blocks(self) -> list[bool]:
        """Whether each block stays. A block that keeps no neuron and no KV group goes as a whole, norms included, as do
        all other blocks of its layer; one that has neither stays."""
        pairs = zip(self.ffn, self.attention, strict=True)
        return torch.stack([f.any() | a.any() | (len(f) + len(a) == 0) for f, a in pairs]).tolist()

    def channels(self, block: Block) -> dict[str, Tensor]:
        """Kept columns of a block's down and output projection: (experts x neurons,) and (heads x head_dim,) bool."""
        groups = self.attention[block.index].repeat_interleave(block.channels_per_group)
        return {"ffn": self.ffn[block.index], "attention": groups}

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors, as saved in safetensors."""
        return {f"{kind}.{i}": m for kind in ("ffn", "attention") for i, m in enumerate(getattr(self, kind))}

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> Masks:
        """Masks from what `tensors` gave."""
        depth = len(flat) // 2
        return cls(*([flat[f"{kind}.{i}"].bool() for i in range(depth)] for kind in ("ffn", "attention")))

    def __eq__(self, other: object) -> bool:
        mine, theirs = self.tensors(), other.tensors() if isinstance(other, Masks) else {}
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None
