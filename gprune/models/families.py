"""Model families are data: one record per `config.model_type`, and nothing else in gprune knows a family's name.

A record says where the prunable weights of a decoder layer lie and how they are stored. Widths and head counts are
read off the shapes of the weights, so a model that is pruned already can be pruned again. To add a family, add its
record to `FAMILIES`; `tests/models/test_families.py` then covers it by itself, on a tiny model built from the
configuration class that transformers has for it.

Rows of a linear layer give its outputs, columns take its inputs. Parts that name the same module are fused in it: its
rows belong to gate, then up (or to query, then key, then value).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PRUNED = "pruned_"  # our own export writes this before the family's name as its model_type


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts: paths relative to the decoder layer, by default Llama's; None: no such part."""

    model_type: str
    layers: str = "layers"  # of the decoder
    # FFN. A path through `experts` stands for the stacked tensors gate_up_proj (E, 2N, H) and down_proj (E, H, N).
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str | None = "mlp.down_proj"  # None: no FFN that can be pruned
    experts: str | None = None  # layers without experts have gate, up and down
    # Attention
    query: str | None = "self_attn.q_proj"
    key: str | None = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    output: str | None = "self_attn.o_proj"  # None: no attention whose KV groups can be pruned
    query_norm: str | None = None  # a norm over all heads at once, which shrinks with them;
    key_norm: str | None = None  # not a norm over each head by itself, which keeps its size
    # Norms: before the projections, and between an output projection and the residual
    ffn_norm: str | None = "post_attention_layernorm"
    attention_norm: str | None = "input_layernorm"
    after_ffn: str | None = None
    after_attention: str | None = None
    norm_offset: float = 0.0  # the norm multiplies by this + weight
    # Configuration
    width: str = "intermediate_size"  # the key that says how wide the FFN, or an expert, is
    kv_heads: str | None = "num_key_value_heads"  # None: one key/value head per query head
    learned_positions: bool = False  # no text may be longer than max_position_embeddings
    logits_scaling: str | None = None  # the key of what the logits are divided by
    softcap: str | None = None  # the key of the limit c in c tanh(logits / c)
    # What discovery finds and no record in this file needs (`gprune.models.discovery`)
    decoder: str | None = None  # a path in the model; None: what `get_decoder` returns
    head_dim: str | None = None  # the layer's attribute with the size of a value head; None: the config has it
    layout: Mapping[str, str] = field(default_factory=dict)  # fused module -> order of parts: "gate | up" or "gate up"
    expert_rows: Mapping[str, tuple[int, str]] = field(default_factory=lambda: {"gate_up_proj": (1, "gate | up")})
    expert_down: tuple[str, int] = ("down_proj", 2)  # stacked tensor, and the dimension of neurons
    extras: Mapping[str, tuple[int, str]] = field(
        default_factory=dict
    )  # other parameters -> dim and `ffn`, `attention`
    # Kinds of FFN and of attention, largest first, as fields of a record: a layer has each whose modules it has.
    kinds: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    stays: str | None = None  # of a kind: why it is not pruned beside a larger one of its layer
    found: bool = False  # discovered; a saved folder then names every size, and not the keys of a config
    plain_head: bool = True  # logits are those of head times hidden states, divided or capped
    logits_multiplier: str | None = None  # the key of what the logits are multiplied by
    # Attributes in which stock code keeps sizes: path -> `heads`, `kv_groups`, `channels` (heads x head_dim), `neurons`
    attributes: Mapping[str, str] = field(default_factory=dict)
    # Families with the same arithmetic whose config allows shapes that this one refuses -> settings it then needs
    same_as: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        # LlamaConfig wants hidden_size to be a multiple of the heads.
        Family("llama", same_as={"mistral": {"sliding_window": None}}),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("smollm3"),
    )
}
BUILT_IN: Mapping[str, Family] = MappingProxyType(dict(FAMILIES))  # before anybody adds a record
