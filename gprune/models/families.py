"""Structure of model types: which tensors of a decoder layer belong to the units of an FFN or an attention.

`gprune.discovery.family_of` finds the record of a model of any type on a tiny copy, and attaches it; `record_of` reads
it. Records of a few types are written here, so that they need no tiny copy. No other code in gprune depends on a type's
name, except exports to formats of other programs. Widths and numbers of heads are read from the shapes of weights, so a
pruned model can be pruned again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from gprune.errors import UserError

if TYPE_CHECKING:  # flags are checked without PyTorch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

PRUNED = "pruned_"  # prefix of the model_type of our exports
RECORD = "_gprune_record"  # attribute of a model with its record, also of copies


@dataclass(frozen=True)
class Place:
    """An FFN, experts or an attention of a layer, of any width.

    The order of the rows of a tensor has a word for each part: `row`, for an attention `query`, `key` or `value`, and
    `norm` for the weight of a norm over all units. `row | row` has a row of every neuron, and then another one of every
    neuron; `row row` has both rows of a neuron next to each other.
    """

    kind: str  # `neurons` or `kv_groups`
    reads: str  # path in the layer of the output projection, or of the module of experts
    # Tensor -> dimension with rows of units, and their order. The last one is the weight that reads the units. Biases
    # of linear layers are left out.
    slices: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)  # module -> its class, in layers with this place
    head_dim: str = ""  # attribute of the layer with the size of a value head; empty: from the config
    # Attribute of a module, or key of the configuration -> size: `neurons`, `experts`, `heads`, `kv_groups`, `channels`
    # (heads x head_dim) or `kv_channels`
    attributes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    # Of experts: other tensors with an index per expert, such as rows of the router -> dimension. Indices after the
    # last expert belong to none. Without them experts cannot be removed; `whole_experts` may have the reason.
    per_expert: Mapping[str, int] = field(default_factory=dict)
    whole_experts: str = ""
    stays: str = ""  # why it is not pruned next to a larger one of its layer; the largest one is pruned


@dataclass(frozen=True)
class Family:
    """Structure of a model type."""

    model_type: str
    places: tuple[Place, ...] = ()  # largest first; a layer has those whose modules it has
    refused: tuple[Place, ...] = ()  # that cannot be pruned in any layer, with the reason
    layers: str = "layers"  # path of the layers in the decoder
    decoder: str | None = None  # path of the decoder in the model; None: the result of `get_decoder`
    norm_offset: float = 0.0  # norms multiply by this + weight
    learned_positions: bool = False  # whether text must not be longer than max_position_embeddings
    # How logits are computed from head times hidden states, by keys of the configuration
    plain_head: bool = True  # whether they are this product, scaled or capped
    logits_scaling: str | None = None  # divisor, or "a/b" for the ratio of two keys
    logits_multiplier: str | None = None
    softcap: str | None = None  # the limit c in c tanh(logits / c)
    before_head: str | None = None  # path of a module in the model through which hidden states pass before the head
    found: bool = False  # whether discovered


def _like_llama(model_type: str) -> Family:
    """Return the record of a type whose layers are those of Llama."""
    weights = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    q, k, v, o, gate, up, down = [
        f"{path}.weight" for path in (*weights, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    ffn = {gate: (0, "row"), up: (0, "row"), down: (1, "row")}
    attention = {q: (0, "query"), k: (0, "key"), v: (0, "value"), o: (1, "row")}
    settings = {"num_attention_heads": "heads", "num_key_value_heads": "kv_groups"}
    return Family(model_type, (
        Place("neurons", "mlp.down_proj", ffn, settings={"intermediate_size": "neurons"}),
        Place("kv_groups", "self_attn.o_proj", attention, settings=settings),
    ))  # fmt: skip


FAMILIES = {name: _like_llama(name) for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3")}


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
