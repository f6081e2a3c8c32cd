"""The parts of a decoder layer: logical weight matrices, however they are stored.

A weight may lie alone, in one matrix with others (fused), transposed, or in one tensor with those of all experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from einops import rearrange
from torch import Tensor, nn

from gprune.models.families import Family
from gprune.models.modeling_pruned import find
from gprune.models.offload import stored

FFN, ATTENTION = ("gate", "up", "down"), ("query", "key", "value", "output")
PARTS = {"ffn": FFN, "attention": ATTENTION}


@dataclass(frozen=True)
class Part:
    """One logical weight matrix of a block: rows give outputs, columns take inputs."""

    host: nn.Module  # the linear layer, or the experts
    rows: Tensor | None = None  # (out,) int64: the part's rows in a fused host; None: all rows
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """(out, in), in the model's dtype; a view where the part is stored alone, fetched where it is offloaded."""
        weight = stored(self.host, "weight")
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else weight[self.rows.to(weight.device)]

    @property
    def bias(self) -> Tensor | None:
        """(out,)"""
        bias = stored(self.host, "bias")
        return bias if bias is None or self.rows is None else bias[self.rows.to(bias.device)]

    @property
    def in_features(self) -> int:
        """Columns of the weight as (out, in)."""
        return self.host.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """Rows of the weight as (out, in); of this part alone, where parts are stored together."""
        return self.host.weight.shape[1 if self.transposed else 0] if self.rows is None else len(self.rows)

    def set(self, weight: Tensor, added_bias: Tensor | None) -> None:
        """Write the weight of a part stored alone, and add to its bias, which is created if there is none."""
        self.host.weight.copy_(weight.T if self.transposed else weight)
        if added_bias is not None:
            added = added_bias.to(self.host.weight)
            added = added if self.host.bias is None else added + self.host.bias
            self.host.bias = nn.Parameter(added, requires_grad=False)


@dataclass(frozen=True)
class ExpertPart:
    """One weight matrix of all E experts, stacked: (E, N, H) for gate and up, (E, H, N) for down."""

    host: nn.Module
    name: str  # of `gate`, `up`, `down`
    bias: None = None

    @property
    def weight(self) -> Tensor:
        """Rows of gate and up (E x N, H), columns of down (H, E x N): expert by expert."""
        if self.name == "down":
            return rearrange(stored(self.host, "down_proj"), "e h n -> h (e n)")
        gate, up = stored(self.host, "gate_up_proj").chunk(2, dim=1)
        return rearrange(up if self.name == "up" else gate, "e n h -> (e n) h")

    @property
    def in_features(self) -> int:
        """Columns, those of all experts side by side in `down`."""
        E, _, N = self.host.down_proj.shape
        return E * N if self.name == "down" else self.host.down_proj.shape[1]

    @property
    def out_features(self) -> int:
        """Rows, those of all experts below each other but in `down`."""
        E, H, N = self.host.down_proj.shape
        return H if self.name == "down" else E * N

    def set(self, weight: Tensor, added_bias: None) -> None:
        """Write the columns of down, (H, E x N)."""
        assert added_bias is None, "experts have no bias"
        self.host.down_proj.copy_(rearrange(weight, "h (e n) -> e h n", e=len(self.host.down_proj)))


def parts_of(layer: nn.Module, family: Family, head_dim: int) -> dict[str, Part | ExpertPart]:
    """The parts that a decoder layer has, by name."""

    def part(name: str, rows: Tensor | None = None) -> Part:
        return Part(attrgetter(getattr(family, name))(layer), rows, family.transposed)

    experts, name = find(layer, family.experts or "")
    if hasattr(experts, name):  # not a dense layer, such as those between layers with experts
        parts = {part: ExpertPart(getattr(experts, name), part) for part in FFN}
    else:
        parts = {name: part(name) for name in FFN if getattr(family, name) is not None}
        if family.gate == family.up:
            N = parts["down"].in_features
            parts |= {"gate": part("gate", torch.arange(N)), "up": part("up", torch.arange(N, 2 * N))}
    parts |= {name: part(name) for name in ATTENTION}
    if family.query == family.key:
        total, query = parts["query"].out_features, parts["output"].in_features
        rows = _fused_rows(total, query, head_dim, interleaved=family.interleaved)
        parts |= {name: part(name, rows[name]) for name in rows}
    return parts


def _fused_rows(total: int, query: int, head_dim: int, *, interleaved: bool) -> dict[str, Tensor]:
    """Rows of query, key and value, each in the order of heads, in a projection of `total` rows.

    They lie as all query rows, all key rows, all value rows; interleaved, as those of the first head, then the second.
    """
    key = (total - query) // 2
    heads = key // head_dim if interleaved else 1
    split = torch.arange(total).view(heads, -1).split([query // heads, key // heads, key // heads], dim=1)
    return {name: rows.flatten() for name, rows in zip(ATTENTION, split, strict=False)}
