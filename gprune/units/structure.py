"""Units: what can be removed from a model, one set of equal units at a time.

Masks, scores, margins, gates, thresholds, statistics and prices are dictionaries whose keys are those of units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

KINDS = ("layer", "experts", "kv_groups", "neurons")  # from coarse to fine; kinds of users come before neurons
KIND_OF_PART = {"ffn": "neurons", "attention": "kv_groups", "experts": "experts", "blocks": "layer"}  # part of a scope
T = TypeVar("T")


@dataclass(frozen=True)
class Slice:
    """A tensor that shrinks along `dim` when units are removed: its index i along `dim` belongs to unit `unit[i]`."""

    path: str  # of the parameter or buffer, relative to the layer
    dim: int
    unit: Tensor  # (size along dim,) int64; -1: the index belongs to no unit. Of experts side by side: of one expert
    # Name and indices of each part, by unit: `query`, `key`, `value`; `row` for others; `norm` for the weight of a norm
    # over all units, whose statistic changes. A fused tensor has several.
    parts: tuple[tuple[str, Tensor], ...] = ()

    @property
    def is_norm(self) -> bool:
        """Whether the tensor is the weight of a norm over all units."""
        return any(name == "norm" for name, _ in self.parts)


@dataclass(frozen=True)
class Units:
    """Equal units of one kind in one place of the model, such as the neurons of an FFN, or a layer as a single unit."""

    key: str
    kind: str
    layer: int
    count: int  # that can be removed (of one expert, if experts are side by side)
    parameters: int = 0  # of one unit, in all experts together; of a layer all its parameters
    # What shrinks. The last one is the weight that reads the units.
    slices: tuple[Slice, ...] = field(default=(), compare=False, repr=False)
    inputs: tuple[Slice, ...] = field(default=(), compare=False, repr=False)  # rows that metrics read
    reads: str = ""  # path of the linear layer, or of the module of experts, whose input channels belong to the units
    # Attributes of modules (path in the layer) and keys of the configuration -> their value per unit.
    attributes: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    settings: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    rows: int = 1  # experts side by side, which lose equally many neurons, each its own
    inside: str = ""  # key of the coarser units that contain these
    least: int = 1  # that stay: 1 neuron or KV group, the experts that a router needs, 0 layers
    step: int = 1  # removed together; for experts the number of groups of the router
    stays: str = ""  # why none may be removed: protected, or the router's reason

    @property
    def number(self) -> int:
        """Number of the block, or of the layer, in the key."""
        return parts_of_key(self.key)[1]

    @property
    def size(self) -> int:
        """Length of the masks of these units: `rows` x `count`."""
        return self.rows * self.count

    @cached_property
    def repeats(self) -> int | None:
        """Number of channels of each unit, if the channels of a unit are next to each other, in order; else None."""
        channels, unit = len(self.slices[-1].unit), self.slices[-1].unit
        repeats = channels // self.count
        is_regular = channels == self.count * repeats
        return repeats if is_regular and unit.equal(torch.arange(self.count).repeat_interleave(repeats)) else None

    def of_channels(self, values: Tensor) -> Tensor:
        """Repeat values of units, (..., count), for the channels that belong to them: (..., C)."""
        if self.repeats is None:
            return values[..., self.slices[-1].unit.to(values.device)]
        return values if self.repeats == 1 else values.repeat_interleave(self.repeats, -1)

    def summed(self, channels: Tensor) -> Tensor:
        """Return the sum over the channels of each unit, (C,) -> (count,)."""
        if self.repeats is None:
            return channels.new_zeros(self.count).index_add_(0, self.slices[-1].unit, channels)
        return channels.view(self.count, self.repeats).sum(1)


def unit_key(kind: str, number: int) -> str:
    """Return the key of the units of a kind in a block (or of a layer, by its number)."""
    return f"{kind}.{number}"


def parts_of_key(key: str) -> tuple[str, int]:
    """Return the kind and the number in a key: the inverse of `unit_key`."""
    kind, _, number = key.rpartition(".")
    return kind, int(number)


def kinds_of_units(units: Iterable[Units]) -> list[str]:
    """Return the kinds of units, from coarse to fine."""
    of_users = [u.kind for u in units if u.kind not in KINDS]
    return list(dict.fromkeys([*KINDS[:-1], *of_users, KINDS[-1]]))


def of_kind(values: Mapping[str, T], kind: str) -> list[T]:
    """Return the values of the units of a kind, in the order of blocks."""
    by_number = {parts_of_key(key)[1]: value for key, value in values.items() if key.startswith(f"{kind}.")}
    return [by_number[number] for number in sorted(by_number)]


def current_name(name: str) -> str:
    """Return the name of a tensor by the key of its units, from that of a file of an earlier version."""
    former, dot, rest = name.partition(".")
    return f"{KIND_OF_PART.get(former, former)}{dot}{rest}"
