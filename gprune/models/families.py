"""Records of model families, one per `config.model_type`. No other code in gprune depends on a family's name.

A record describes where the prunable weights of a decoder layer are and how they are stored. Widths and numbers of
heads are read from the shapes of weights, so a pruned model can be pruned again. To add a family, add its record to
`FAMILIES`. `tests/models/test_agree.py` then tests it on a tiny model of its configuration class in transformers.
`gprune.discovery.family_of` finds the record of a model of any type and attaches it; `record_of` reads it.

Rows of a linear layer compute its outputs; columns read its inputs. Parts with the same path are fused in one module,
whose rows belong to gate, then up (or to query, then key, then value).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from gprune.errors import UserError

if TYPE_CHECKING:  # flags are checked without PyTorch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

PRUNED = "pruned_"  # prefix of the model_type of our exports
RECORD = "_gprune_record"  # attribute of a model with its record, also of copies


@dataclass(frozen=True)
class Family:
    """Paths of a family's parts, relative to the decoder layer, by default those of Llama. None: no such part."""

    model_type: str
    layers: str = "layers"  # path of the layers in the decoder
    # FFN. `experts` is the module with the stacked tensors gate_up_proj (E, 2N, H) and down_proj (E, H, N).
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str | None = "mlp.down_proj"  # None: no prunable FFN
    experts: str | None = None  # layers without this module use gate, up and down
    # Attention
    query: str | None = "self_attn.q_proj"
    key: str | None = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    output: str | None = "self_attn.o_proj"  # None: no prunable attention
    # Norms over all heads, which are sliced with them. A norm per head keeps its size and is not named here.
    query_norm: str | None = None
    key_norm: str | None = None
    # Norms before the projections
    ffn_norm: str | None = "post_attention_layernorm"
    attention_norm: str | None = "input_layernorm"
    norm_offset: float = 0.0  # the norm multiplies by this + weight
    # Configuration
    width: str = "intermediate_size"  # key of the width of the FFN or of an expert
    kv_heads: str | None = "num_key_value_heads"  # key; None: one key/value head per query head
    learned_positions: bool = False  # whether text must not be longer than max_position_embeddings
    logits_scaling: str | None = None  # key of the divisor of logits, or "a/b" for the ratio of two keys
    softcap: str | None = None  # key of the limit c in c tanh(logits / c)
    # Fields of discovered records (`gprune.discovery`)
    decoder: str | None = None  # path of the decoder in the model; None: the result of `get_decoder`
    head_dim: str | None = None  # attribute of the layer with the size of a value head; None: from the config
    layout: Mapping[str, str] = field(default_factory=dict)  # fused module -> order of parts: "gate | up" or "gate up"
    expert_rows: Mapping[str, tuple[int, str]] = field(default_factory=lambda: {"gate_up_proj": (1, "gate | up")})
    expert_down: tuple[str, int] = ("down_proj", 2)  # stacked tensor, dimension of neurons
    # Other tensors with an index per expert, such as rows of the router: path -> dimension. Indices after the last
    # expert belong to none. Without them experts cannot be removed as a whole; `whole_experts` may have the reason.
    per_expert: Mapping[str, int] = field(default_factory=dict)
    expert_count: str = ""  # key of the number of experts; empty: not a whole number, or unknown
    whole_experts: str = ""
    # Other parameters -> dimension of units, `ffn` or `attention`.
    extras: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    # Kinds of FFN and of attention, largest first, as fields that replace those of the record. A layer has the kinds
    # whose modules it has. By default every layer has one FFN and one attention, by the fields of the record.
    kinds: tuple[tuple[Mapping[str, Any], ...], ...] = (({},), ({},))
    stays: str | None = None  # only for kinds: the reason not to prune it next to a larger one
    # FFNs and experts that cannot be pruned in any layer: `down` or `experts`, `classes` (as in `kinds`) and `stays`.
    refused: tuple[Mapping[str, Any], ...] = ()
    found: bool = False  # whether discovered
    before_head: str | None = None  # path of a module in the model through which hidden states pass before the head
    plain_head: bool = True  # whether logits are head times hidden states, scaled or capped
    logits_multiplier: str | None = None  # key of the factor of logits
    # Attributes of stock modules with sizes: path -> `heads`, `kv_groups`, `channels` (heads x head_dim), `neurons`,
    # `experts`
    attributes: Mapping[str, str] = field(default_factory=dict)
    # Other families with the same computation, whose config allows more shapes -> settings for which they compute it
    same_as: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        # LlamaConfig requires that hidden_size is a multiple of the number of heads.
        Family("llama", same_as={"mistral": {"sliding_window": None}}),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("smollm3"),
    )
}
BUILT_IN: tuple[Family, ...] = tuple(FAMILIES.values())  # records of gprune, without those of users


def attach_record(model: PreTrainedModel, record: Family) -> None:
    """Set the record that `record_of` returns for a model and its copies."""
    model.__dict__[RECORD] = record


def record_of(model: PreTrainedModel) -> Family:
    """Return the record of a model: the attached one, or else that of its type, which for exports is the dense type."""
    name = model.config.model_type.removeprefix(PRUNED)
    record = model.__dict__.get(RECORD) or FAMILIES.get(name)
    if record is None:
        raise UserError(
            f"Model type '{name}' needs gprune.discovery.family_of(model) first, which finds and attaches its record."
        )
    return record


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the decoder of a model, which maps token ids to the hidden states for the head."""
    path = record_of(model).decoder
    return model.get_decoder() if path is None else attrgetter(path)(model)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model."""
    return attrgetter(record_of(model).layers)(decoder_of(model))


def refuse_quantised(config: PreTrainedConfig) -> None:
    """Raise UserError if a configuration is of a quantised checkpoint, whose scales cannot be sliced with neurons."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    settings = quantization if isinstance(quantization, Mapping) else vars(quantization)
    method = settings.get("quant_method")
    method_name = getattr(method, "value", method)  # a member of an enum, or a string
    raise UserError(
        f"Model type '{config.model_type.removeprefix(PRUNED)}' must have weights in float32, bfloat16 or float16; got "
        f"a quantised checkpoint ({method_name}). Prune the original weights, and quantise the result."
    )
