"""Model families are data: where the prunable weights of a block are, by `config.model_type`.

A family is one frozen record of sub-module names. Everything else in gprune speaks of a `Block`: the FFN
weights and the attention weights of one decoder layer, with widths read off the weights themselves, so that
a model that is pruned already can be pruned again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gprune import assets
from gprune.errors import UserError


@dataclass(frozen=True)
class Family:
    """Sub-module names inside one decoder layer, relative to the layer."""

    model_type: str
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    ffn_norm: str = "post_attention_layernorm"
    attention_norm: str = "input_layernorm"
    activation: str = "mlp.act_fn"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("pruned_llama"),  # what our own export writes: pruning twice is pruning
    )
}


@dataclass(frozen=True)
class Block:
    """One decoder layer. Weights are views into the model, in the model's dtype.

    A *neuron* j is row j of gate and up and column j of down; a *KV group* g is key/value head g with the
    query heads that share it, i.e. `channels_per_group` consecutive columns of the output projection.
    """

    index: int
    layer: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    ffn_norm: nn.Module
    attention_norm: nn.Module
    activation: nn.Module
    head_dim: int

    @property
    def neurons(self) -> int:
        return self.down.in_features

    @property
    def kv_groups(self) -> int:
        return self.key.out_features // self.head_dim

    @property
    def channels_per_group(self) -> int:
        """Columns of the output projection (= query heads x head_dim) that belong to one KV group."""
        return self.output.in_features // self.kv_groups

    @property
    def cost(self) -> int:
        """Parameters that go when the whole block goes."""
        return sum(parameter.numel() for parameter in self.layer.parameters())

    @property
    def neuron_cost(self) -> int:
        """Parameters that go when one neuron goes."""
        rows = (self.gate, self.up)
        return sum(m.in_features + (m.bias is not None) for m in rows) + self.down.out_features

    @property
    def group_cost(self) -> int:
        """Parameters that go when one KV group goes."""
        per_head = [m.in_features + (m.bias is not None) for m in (self.key, self.value)]
        query = self.query.in_features + (self.query.bias is not None)
        return self.head_dim * sum(per_head) + self.channels_per_group * (query + self.output.out_features)


def family_of(model_type: str) -> Family:
    """The record for `model_type`.

    Raises:
        UserError: naming the `model_type`, the families there are and the record it would need.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"Model family '{model_type}' is not supported. Available: {', '.join(FAMILIES)}. "
            f"To add it, put a gprune.architectures.Family record with its sub-module names into FAMILIES."
        )
    return FAMILIES[model_type]


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """The blocks of a supported model, first layer first."""
    family = family_of(model.config.model_type)
    config = model.config  # lazily: reading a global head count is an error where layers differ in heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = []
    for index, layer in enumerate(model.get_decoder().layers):
        parts = {
            place.name: attrgetter(getattr(family, place.name))(layer)
            for place in fields(family)
            if place.name != "model_type"
        }
        blocks.append(Block(index=index, layer=layer, head_dim=head_dim, **parts))
    return blocks


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 (16 hex digits) over names, shapes, dtypes and bytes of all parameters, and the configuration.

    Two models with the same fingerprint give the same statistics; caches are keyed by it.
    """
    settings = model.config.to_diff_dict()
    for place in ("_name_or_path", "transformers_version"):  # where a model lies does not change what it computes
        settings.pop(place, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(as_bytes(parameter))
    return digest.hexdigest()[:16]


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, of any dtype, without a copy where it is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def locate_model(name: str) -> str:
    """An embedded name becomes the folder it is cached in; a folder or a hub id stays what it is.

    Raises:
        UserError: for a folder without `config.json`, or a name that is neither embedded, a folder nor `owner/name`.
    """
    if name in assets.EMBEDDED_MODELS:
        return str(assets.embedded_model_dir(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"--model.name: folder '{name}' holds no config.json; expected a Hugging Face model folder."
            )
        return str(path)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"--model.name: '{name}' is neither an embedded model ({', '.join(assets.EMBEDDED_MODELS)}), "
            f"nor a model folder, nor a hub id 'owner/name'."
        )
    return name


def check_family(name: str, *, trust_remote_code: bool = False) -> str:
    """Read the configuration alone, refuse what is not supported, and return the `model_type`.

    Raises:
        UserError: for an unsupported family, or a configuration that cannot be had.
    """
    location = locate_model(name)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model.name: no usable configuration for '{name}': {str(error).splitlines()[0]} "
            f"Expected a Hugging Face causal language model; without network use an embedded model or a local folder."
        ) from error
    return family_of(config.model_type).model_type


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen causal language model and its tokenizer.

    Args:
        name: embedded name, local folder or hub id.
        dtype: dtype of the weights.
        device_map: handed to transformers as it is.
        trust_remote_code: run code that comes with the model; off unless asked for.

    Returns:
        The model in eval mode without gradients, and the tokenizer.

    Raises:
        UserError: before any weight is read, for an unsupported family; later, for weights that cannot be read.
    """
    check_family(name, trust_remote_code=trust_remote_code)
    location = locate_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # safetensors, tokenizers and the hub each raise their own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model.name: '{name}' cannot be loaded: {first}") from error
    return model.eval().requires_grad_(False), tokenizer
