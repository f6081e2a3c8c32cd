"""Parts of a decoder layer: logical weight matrices, independently of how they are stored.

A weight may be stored alone, in one matrix with others (fused), transposed, or in one tensor for all experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gprune.models.families import Family
from gprune.models.modeling_pruned import find_parent
from gprune.models.offload import load_parameter

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
        weight = load_parameter(self.host, "weight")
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else weight[self.rows.to(weight.device)]

    @property
    def bias(self) -> Tensor | None:
        """Bias (out,), or None."""
        bias = load_parameter(self.host, "bias")
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
            bias = added_bias.to(self.host.weight)
            if self.host.bias is not None:
                bias = bias + self.host.bias
            self.host.bias = nn.Parameter(bias, requires_grad=False)


@dataclass(frozen=True)
class ExpertPart:
    """One logical weight matrix of all E experts, stacked in a tensor.

    By default the tensor is (E, 2N, H) for gate and up, and (E, H, N) for down.
    """

    host: nn.Module  # the module of the experts
    name: str  # `gate`, `up` or `down`
    tensor: str = "gate_up_proj"  # path of the tensor in the host
    dim: int = 1  # dimension of neurons in the tensor
    layout: str = "gate | up"  # order of parts along this dimension
    bias: None = None  # biases of experts are sliced, but belong to no part

    @property
    def _is_transposed(self) -> bool:
        """Whether the last two dimensions of the tensor are exchanged, compared with the default."""
        default_dim = 2 if self.name == "down" else 1
        return self.dim != default_dim

    def _stacked_weight(self) -> Tensor:
        """Return the tensor, loaded if offloaded: (E, H, N) for down, (E, n, H) otherwise, n = 2N for gate and up."""
        module, name = find_parent(self.host, self.tensor)
        tensor = load_parameter(module, name)
        return tensor.transpose(1, 2) if self._is_transposed else tensor

    @property
    def weight(self) -> Tensor:
        """Rows of gate or up, (E x N, H), or columns of down, (H, E x N), with experts concatenated."""
        if self.name == "down":
            return rearrange(self._stacked_weight(), "e h n -> h (e n)")
        if self.layout == "gate | up":
            gate, up = self._stacked_weight().chunk(2, dim=1)  # views
            return rearrange(up if self.name == "up" else gate, "e n h -> (e n) h")
        weight = self._stacked_weight()
        sizes = dict.fromkeys(names_in(self.layout), self.neurons)
        rows = part_row_indices(self.layout, sizes, self.neurons)[self.name]
        return rearrange(weight[:, rows.to(weight.device)], "e n h -> (e n) h")

    def of_expert(self, expert: int) -> Tensor:
        """Columns of down of one expert, (H, N): a view."""
        return self._stacked_weight()[expert]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the tensor as (E, n, H) for gate and up, or (E, H, N) for down."""
        E, first, second = attribute_at(self.host, self.tensor).shape
        return (E, second, first) if self._is_transposed else (E, first, second)

    @property
    def neurons(self) -> int:
        """Number of neurons of an expert."""
        return self.shape[2] if self.name == "down" else self.shape[1] // len(names_in(self.layout))

    @property
    def in_features(self) -> int:
        """Number of columns; summed over experts for `down`."""
        E, _, columns = self.shape
        return E * columns if self.name == "down" else columns

    @property
    def out_features(self) -> int:
        """Number of rows; summed over experts except for `down`."""
        return self.shape[1] if self.name == "down" else self.shape[0] * self.neurons

    def set(self, weight: Tensor, added_bias: None) -> None:
        """Write the columns of `down`, (H, E x N)."""
        assert added_bias is None, "experts have no bias"
        stacked = rearrange(weight, "h (e n) -> e h n", e=self.shape[0])
        attribute_at(self.host, self.tensor).copy_(stacked.transpose(1, 2) if self._is_transposed else stacked)


def names_in(layout: str) -> list[str]:
    """Return the parts in a layout such as `gate | up` or `query key value`, in order."""
    return layout.replace("|", " ").split()


def part_row_indices(layout: str, sizes: Mapping[str, int], units: int) -> dict[str, Tensor]:
    """Return the row indices of each part in a fused weight, int64, ordered by unit.

    `sizes` has the number of rows of each part, which are equally many for each of the `units` units.
    """
    indices: dict[str, Tensor] = {}
    start = 0
    for segment in layout.split("|"):
        names = segment.split()
        rows_per_unit = [sizes[name] // units for name in names]
        end = start + units * sum(rows_per_unit)
        rows_by_unit = torch.arange(start, end).view(units, -1)  # one row per unit
        for name, rows_of_part in zip(names, rows_by_unit.split(rows_per_unit, dim=1), strict=True):
            indices[name] = rows_of_part.flatten()
        start = end
    return indices


def layouts(family: Family) -> dict[str, str]:
    """Return the order of parts in each fused module, by path, from the record or implied by its paths.

    The form of an order is that of `part_row_indices`.
    """
    orders = dict(family.layout)
    if family.gate is not None and family.gate == family.up:
        orders.setdefault(family.up, "gate | up")
    if family.query is not None and family.query == family.key:
        orders.setdefault(family.query, "query | key | value")
    return orders


def parts_of(layer: nn.Module, family: Family, head_dim: int) -> dict[str, Part | ExpertPart]:
    """Return the parts of a decoder layer by name, in the order of `PARTS`."""
    orders = layouts(family)
    parts: dict[str, Part | ExpertPart] = {}
    experts = attribute_at(layer, family.experts) if family.experts else None
    if experts is not None:  # others of the model may be dense
        parts |= _expert_parts(experts, family)
    elif family.down is not None:
        parts["down"] = _part(layer, family, "down")
        if family.up in orders:
            neurons = parts["down"].in_features
            sizes = dict.fromkeys(names_in(orders[family.up]), neurons)
            parts |= _fused_parts(layer, family, orders[family.up], sizes, neurons)
        for name in FFN:
            if getattr(family, name) is not None and name not in parts:
                parts[name] = _part(layer, family, name)
    if family.output is not None:
        if family.value in orders:
            names = names_in(orders[family.value])
            query_rows = _part(layer, family, "output").in_features
            total_rows = _part(layer, family, "value").out_features  # of the whole fused module
            if "query" in names:
                key_value_rows = (total_rows - query_rows) // (len(names) - 1)
            else:
                key_value_rows = total_rows // len(names)
            sizes = {name: query_rows if name == "query" else key_value_rows for name in names}
            parts |= _fused_parts(layer, family, orders[family.value], sizes, key_value_rows // head_dim)
        for name in ATTENTION:
            if name not in parts:
                parts[name] = _part(layer, family, name)
    return {name: parts[name] for name in (*FFN, *ATTENTION) if name in parts}


def _part(layer: nn.Module, family: Family, name: str, rows: Tensor | None = None) -> Part:
    """Return the part `name` of a layer. `rows` are its rows in a fused module; None: all rows."""
    host = attrgetter(getattr(family, name))(layer)
    return Part(host, rows, isinstance(host, Conv1D))


def _fused_parts(layer: nn.Module, family: Family, order: str, sizes: Mapping[str, int], units: int) -> dict[str, Part]:
    """Return the parts of a fused module by name. `order`, `sizes` and `units` are as for `part_row_indices`."""
    return {name: _part(layer, family, name, rows) for name, rows in part_row_indices(order, sizes, units).items()}


def _expert_parts(experts: nn.Module, family: Family) -> dict[str, ExpertPart]:
    """Return the parts of experts by name."""
    parts = {"down": ExpertPart(experts, "down", *family.expert_down)}
    for tensor, (dim, layout) in family.expert_rows.items():
        if not tensor.endswith("bias"):
            parts |= {name: ExpertPart(experts, name, tensor, dim, layout) for name in names_in(layout)}
    return parts


def attribute_at(module: nn.Module, path: str) -> Any:
    """Return the submodule, tensor or other attribute at a dotted path, or None; for an empty path the module."""
    if not path:
        return module
    parent, name = find_parent(module, path)
    return getattr(parent, name, None)


def is_inside(path: str, other: str) -> bool:
    """Return whether the module at a path is the module at another path, or in it."""
    return path == other or path.startswith(f"{other}.")


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with one weight per channel."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
