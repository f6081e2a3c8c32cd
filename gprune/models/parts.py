"""Parts of a decoder layer: logical weight matrices, independently of how they are stored.

A weight may be stored alone, in one matrix with others (fused), transposed, or in one tensor for all experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gprune.models.families import Family
from gprune.models.modeling_pruned import find
from gprune.models.offload import stored

FFN, ATTENTION = ("gate", "up", "down"), ("query", "key", "value", "output")
PARTS = {"ffn": FFN, "attention": ATTENTION}


@dataclass(frozen=True)
class Part:
    """One logical weight matrix of a block. Rows compute outputs; columns read inputs."""

    host: nn.Module  # the linear layer
    rows: Tensor | None = None  # (out,) int64: rows of the part in a fused host; None: all rows
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """Weight (out, in) in the model's dtype: a view if the part is stored alone, loaded if it is offloaded."""
        weight = stored(self.host, "weight")
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else weight[self.rows.to(weight.device)]

    @property
    def bias(self) -> Tensor | None:
        """Bias (out,), or None."""
        bias = stored(self.host, "bias")
        return bias if bias is None or self.rows is None else bias[self.rows.to(bias.device)]

    @property
    def in_features(self) -> int:
        """Number of columns of the weight (out, in)."""
        return self.host.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """Number of rows of the weight (out, in), of this part only if it is fused."""
        return self.host.weight.shape[1 if self.transposed else 0] if self.rows is None else len(self.rows)

    def set(self, weight: Tensor, added_bias: Tensor | None) -> None:
        """Write the weight of a part that is stored alone, and add to its bias, which is created if missing."""
        self.host.weight.copy_(weight.T if self.transposed else weight)
        if added_bias is not None:
            added = added_bias.to(self.host.weight)
            added = added if self.host.bias is None else added + self.host.bias
            self.host.bias = nn.Parameter(added, requires_grad=False)


@dataclass(frozen=True)
class ExpertPart:
    """One logical weight matrix of all E experts, stacked in a tensor.

    By default the tensor is (E, 2N, H) for gate and up, and (E, H, N) for down.
    """

    host: nn.Module
    name: str  # `gate`, `up` or `down`
    tensor: str = "gate_up_proj"  # path of the tensor in the host
    dim: int = 1  # dimension of neurons in the tensor
    layout: str = "gate | up"  # order of parts along this dimension
    bias: None = None

    def _stored(self) -> Tensor:
        """Return the tensor as (E, n, H) for gate and up, or (E, H, N) for down."""
        module, name = find(self.host, self.tensor)
        tensor = stored(module, name)
        return tensor if self.dim == (2 if self.name == "down" else 1) else tensor.transpose(1, 2)

    @property
    def weight(self) -> Tensor:
        """Rows of gate or up, (E x N, H), or columns of down, (H, E x N), with experts concatenated."""
        if self.name == "down":
            return rearrange(self._stored(), "e h n -> h (e n)")
        if self.layout == "gate | up":
            gate, up = self._stored().chunk(2, dim=1)
            return rearrange(up if self.name == "up" else gate, "e n h -> (e n) h")
        whole = self._stored()
        rows = part_rows(self.layout, dict.fromkeys(names_in(self.layout), self.neurons), self.neurons)[self.name]
        return rearrange(whole[:, rows.to(whole.device)], "e n h -> (e n) h")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the tensor as (E, n, H) for gate and up, or (E, H, N) for down."""
        module, name = find(self.host, self.tensor)
        E, a, b = getattr(module, name).shape
        return (E, a, b) if self.dim == (2 if self.name == "down" else 1) else (E, b, a)

    @property
    def neurons(self) -> int:
        """Number of neurons of an expert."""
        return self.shape[2] if self.name == "down" else self.shape[1] // len(names_in(self.layout))

    @property
    def in_features(self) -> int:
        """Number of columns; summed over experts for `down`."""
        E, _H, N = self.shape
        return E * N if self.name == "down" else N

    @property
    def out_features(self) -> int:
        """Number of rows; summed over experts except for `down`."""
        return self.shape[1] if self.name == "down" else self.shape[0] * self.neurons

    def set(self, weight: Tensor, added_bias: None) -> None:
        """Write the columns of `down`, (H, E x N)."""
        assert added_bias is None, "experts have no bias"
        module, name = find(self.host, self.tensor)
        whole = rearrange(weight, "h (e n) -> e h n", e=self.shape[0])
        getattr(module, name).copy_(whole if self.dim == 2 else whole.transpose(1, 2))


def names_in(layout: str) -> list[str]:
    """Return the parts in a layout such as `gate | up` or `query key value`, in order."""
    return layout.replace("|", " ").split()


def part_rows(layout: str, sizes: Mapping[str, int], units: int) -> dict[str, Tensor]:
    """Return rows of each part in a fused tensor, in the order of units.

    Args:
        layout: `gate | up`: all rows of gate, then all of up; `gate up`: unit by unit, gate before up.
        sizes: number of rows of each part.
        units: number of neurons or KV groups.
    """
    rows, start = {}, 0
    for segment in layout.split("|"):
        names = segment.split()
        per_unit = [sizes[name] // units for name in names]
        table = torch.arange(start, start + units * sum(per_unit)).view(units, -1).split(per_unit, dim=1)
        rows |= {name: own.flatten() for name, own in zip(names, table, strict=True)}
        start += units * sum(per_unit)
    return rows


def layouts(family: Family) -> dict[str, str]:
    """Return the order of parts in each fused module, from the record or implied by its paths."""
    found = dict(family.layout)
    if family.gate is not None and family.gate == family.up:
        found.setdefault(family.up, "gate | up")
    if family.query is not None and family.query == family.key:
        found.setdefault(family.query, "query | key | value")
    return found


def parts_of(layer: nn.Module, family: Family, head_dim: int) -> dict[str, Part | ExpertPart]:
    """Return the parts of a decoder layer, by name."""
    orders = layouts(family)

    def part(name: str, rows: Tensor | None = None) -> Part:
        host = attrgetter(getattr(family, name))(layer)
        return Part(host, rows, isinstance(host, Conv1D))

    def fused(path: str, sizes: Mapping[str, int], units: int) -> dict[str, Part]:
        return {name: part(name, rows) for name, rows in part_rows(orders[path], sizes, units).items()}

    parts: dict[str, Part | ExpertPart] = {}
    experts, name = find(layer, family.experts or "")
    if hasattr(experts, name):  # the layer has experts; others of the model may be dense
        host = getattr(experts, name)
        for tensor, (dim, layout) in family.expert_rows.items():
            if not tensor.endswith("bias"):
                parts |= {part: ExpertPart(host, part, tensor, dim, layout) for part in names_in(layout)}
        parts = {name: parts[name] for name in FFN if name in parts}
        parts["down"] = ExpertPart(host, "down", *family.expert_down)
    elif family.down is not None:
        down = part("down")
        if family.up in orders:
            N = down.in_features
            parts |= fused(family.up, dict.fromkeys(names_in(orders[family.up]), N), N)
        parts |= {n: part(n) for n in FFN if getattr(family, n) is not None and n not in parts}
        parts = {name: parts[name] for name in FFN if name in parts}
    if family.output is not None:
        output = part("output")
        if family.value in orders:
            names, query = names_in(orders[family.value]), output.in_features
            total = part("value").out_features - (query if "query" in names else 0)
            own = total // (len(names) - ("query" in names))
            sizes = {name: query if name == "query" else own for name in names}
            parts |= fused(family.value, sizes, own // head_dim)
        parts |= {name: part(name) for name in ATTENTION if name not in parts}
    return {name: parts[name] for name in (*FFN, *ATTENTION) if name in parts}
