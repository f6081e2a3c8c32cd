"""The parts of a decoder layer: logical weight matrices, however they are stored.

A weight may lie alone, in one matrix with others (fused), transposed, or in one tensor with those of all experts.
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
    """One weight matrix of all E experts, stacked in one tensor; by default (E, N, H) for gate and up, (E, H, N) for
    down."""

    host: nn.Module
    name: str  # of `gate`, `up`, `down`
    tensor: str = "gate_up_proj"  # that holds the part, a path in the host
    dim: int = 1  # of neurons in that tensor
    layout: str = "gate | up"  # order of the parts along that dimension
    bias: None = None

    def _stored(self) -> Tensor:
        """The tensor that holds the part, with neurons in its second dimension where it holds rows: (E, n, H)."""
        module, name = find(self.host, self.tensor)
        tensor = stored(module, name)
        return tensor if self.dim == (2 if self.name == "down" else 1) else tensor.transpose(1, 2)

    @property
    def weight(self) -> Tensor:
        """Rows of gate and up (E x N, H), columns of down (H, E x N): expert by expert."""
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
        """Experts, size of the hidden states or neurons, as the tensor of the part has them: (E, n, H) or (E, H, N)."""
        module, name = find(self.host, self.tensor)
        E, a, b = getattr(module, name).shape
        return (E, a, b) if self.dim == (2 if self.name == "down" else 1) else (E, b, a)

    @property
    def neurons(self) -> int:
        """Neurons of an expert."""
        return self.shape[2] if self.name == "down" else self.shape[1] // len(names_in(self.layout))

    @property
    def in_features(self) -> int:
        """Columns, those of all experts side by side in `down`."""
        E, _H, N = self.shape
        return E * N if self.name == "down" else N

    @property
    def out_features(self) -> int:
        """Rows, those of all experts below each other but in `down`."""
        return self.shape[1] if self.name == "down" else self.shape[0] * self.neurons

    def set(self, weight: Tensor, added_bias: None) -> None:
        """Write the columns of down, (H, E x N)."""
        assert added_bias is None, "experts have no bias"
        module, name = find(self.host, self.tensor)
        whole = rearrange(weight, "h (e n) -> e h n", e=self.shape[0])
        getattr(module, name).copy_(whole if self.dim == 2 else whole.transpose(1, 2))


def names_in(layout: str) -> list[str]:
    """The parts that a layout such as `gate | up` or `query key value` names, in order."""
    return layout.replace("|", " ").split()


def part_rows(layout: str, sizes: Mapping[str, int], units: int) -> dict[str, Tensor]:
    """Rows of each part in a tensor that holds several, in the order of units.

    Args:
        layout: `gate | up`: all rows of gate, then all of up; `gate up`: unit by unit, gate before up.
        sizes: rows of each part.
        units: neurons or KV groups.
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
    """The order of parts in each module of a layer that holds several: of the record, or what its paths imply."""
    found = dict(family.layout)
    if family.gate is not None and family.gate == family.up:
        found.setdefault(family.up, "gate | up")
    if family.query is not None and family.query == family.key:
        found.setdefault(family.query, "query | key | value")
    return found


def parts_of(layer: nn.Module, family: Family, head_dim: int) -> dict[str, Part | ExpertPart]:
    """The parts that a decoder layer has, by name."""
    orders = layouts(family)

    def part(name: str, rows: Tensor | None = None) -> Part:
        host = attrgetter(getattr(family, name))(layer)
        return Part(host, rows, isinstance(host, Conv1D))

    def fused(path: str, sizes: Mapping[str, int], units: int) -> dict[str, Part]:
        return {name: part(name, rows) for name, rows in part_rows(orders[path], sizes, units).items()}

    parts: dict[str, Part | ExpertPart] = {}
    experts, name = find(layer, family.experts or "")
    if hasattr(experts, name):  # not a dense layer, such as those between layers with experts
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
