"""A view of a model's units by block, for tests that read or change single projections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.models.experts import is_of_experts
from gprune.models.families import decoder_layers
from gprune.models.modeling_pruned import find_parent
from gprune.models.offload import load_parameter
from gprune.models.units import set_output, units_of
from gprune.units.structure import Slice, Units


@dataclass(frozen=True)
class Part:
    """A weight matrix (out, in) of a block, alone, fused with others, or of all experts."""

    layer: nn.Module
    units: Units
    slice: Slice
    rows: Tensor | None = None  # of a fused tensor
    is_output: bool = False  # whether it reads the units

    @property
    def host(self) -> nn.Module:
        return find_parent(self.layer, self.slice.path)[0]

    @property
    def weight(self) -> Tensor:
        weight, dim = load_parameter(*find_parent(self.layer, self.slice.path)), self.slice.dim
        dim -= weight.dim() - 2
        weight = weight if dim == self.is_output else weight.transpose(-1, -2)  # (out, in)
        weight = weight if self.rows is None else weight[..., self.rows.to(weight.device), :]
        if weight.dim() == 2:
            return weight
        return rearrange(weight, "e h n -> h (e n)" if self.is_output else "e n h -> (e n) h")

    @property
    def bias(self) -> Tensor | None:
        bias = load_parameter(self.host, "bias") if hasattr(self.host, "bias") else None
        return bias if bias is None or self.rows is None else bias[self.rows.to(bias.device)]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def set(self, weight: Tensor, added_bias: Tensor | None) -> None:
        set_output(self.units, self.layer, weight, added_bias)


@dataclass(frozen=True)
class Block:
    """An FFN and an attention of a decoder layer, or one of them."""

    layer: nn.Module
    of_ffn: Units
    of_attention: Units

    @property
    def index(self) -> int:
        return self.of_ffn.number

    @property
    def layer_index(self) -> int:
        return self.of_ffn.layer

    @cached_property
    def parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for u, output in ((self.of_ffn, "down"), (self.of_attention, "output")):
            if not u.reads:
                continue
            rows = [name for s in u.inputs for name, _ in s.parts if name == "row"]
            names = iter(["gate", "up"] if len(rows) == 2 else ["up"])
            dims = 3 if self.has_experts and u is self.of_ffn else 2  # of a weight
            for s in u.slices[:-1]:
                is_weight = load_parameter(*find_parent(self.layer, s.path)).dim() == dims
                for name, indices in s.parts if is_weight else ():
                    if name != "norm" and (u is self.of_ffn or name != "row"):
                        own = next(names) if name == "row" else name
                        parts[own] = Part(self.layer, u, s, indices if len(s.parts) > 1 else None)
            parts[output] = Part(self.layer, u, u.slices[-1], is_output=True)
        return parts

    def __getattr__(self, name: str) -> Part | None:
        if name in ("gate", "up", "down", "query", "key", "value", "output"):
            return self.parts.get(name)
        raise AttributeError(name)

    @property
    def ffn(self) -> str:
        """Path of the down projection or of the experts."""
        return self.of_ffn.reads

    @property
    def has_experts(self) -> bool:
        return is_of_experts(self.layer, self.of_ffn)

    @property
    def experts(self) -> int:
        return self.of_ffn.rows

    @property
    def neurons(self) -> int:
        return self.of_ffn.count

    @property
    def all_neurons(self) -> int:
        return self.of_ffn.size

    @property
    def kv_groups(self) -> int:
        return self.of_attention.count

    @property
    def channels(self) -> int:
        return len(self.of_attention.slices[-1].unit) if self.of_attention.reads else 0

    @property
    def channels_per_group(self) -> int:
        return self.channels // max(1, self.kv_groups)

    @property
    def heads(self) -> int:
        return self.of_attention.settings.get("num_attention_heads", 0) * self.kv_groups

    @property
    def head_dim(self) -> int:
        return self.channels // max(1, self.heads)


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """Return the blocks of a model, in order."""
    units = {u.key: u for u in units_of(model)}
    layers, neurons = decoder_layers(model), [u for u in units.values() if u.kind == "neurons"]
    return [Block(layers[u.layer], u, units[f"kv_groups.{u.number}"]) for u in neurons]


def by_layer(blocks: list[Block]) -> list[list[Block]]:
    """Group blocks by layer, in order."""
    return [list(group) for _, group in groupby(blocks, key=lambda block: block.layer_index)]
