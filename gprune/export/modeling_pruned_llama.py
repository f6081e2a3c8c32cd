"""Llama whose layers differ in width: fewer FFN neurons here, fewer key/value groups there.

This one file needs transformers alone. gprune copies it beside the weights it exports, where
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds it; all arithmetic is that of the
Llama in transformers. The table `per_layer_config` of config.json holds what a layer has different from the
global values: `intermediate_size`, `num_attention_heads`, `num_key_value_heads`, and whether its output
projections carry a bias (`o_proj_bias`, `down_proj_bias`).
"""

import copy

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)


class PrunedLlamaConfig(LlamaConfig):
    """LlamaConfig with `per_layer_config`, and biases of o_proj and down_proj that are flags of their own."""

    model_type = "pruned_llama"

    # attention_bias and mlp_bias speak of q/k/v and gate/up only: a bias that makes up for removed units then
    # needs no zero biases next to it.
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate(self):
        """Replaces a check that reads global head counts, which have no meaning when layers differ."""
        for index, layer in enumerate(layer_configs(self)):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index}: num_attention_heads ({layer.num_attention_heads}) is no multiple of "
                    f"num_key_value_heads ({layer.num_key_value_heads})."
                )

    def to_dict(self):
        """Adds what older transformers read: without `rope_theta` they silently use 10000."""
        output = super().to_dict()
        rope = output.get("rope_parameters")
        if rope:
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            output["rope_theta"] = rope["rope_theta"]
            output["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
        # Written whole each time: saving a model by itself records only the class that is being saved.
        module = __name__.rsplit(".", 1)[-1]
        output["auto_map"] = {
            "AutoConfig": f"{module}.PrunedLlamaConfig",
            "AutoModel": f"{module}.PrunedLlamaModel",
            "AutoModelForCausalLM": f"{module}.PrunedLlamaForCausalLM",
        }
        return output


def layer_configs(config):
    """One config per layer, with the layer's own values in place of the global ones."""
    table = getattr(config, "per_layer_config", None) or {}
    if not isinstance(table, dict):  # transformers >= 5.15 resolves the table itself
        return [copy.copy(table[index]) for index in range(config.num_hidden_layers)]
    table = {int(index): values for index, values in table.items()}
    layers = [copy.copy(config) for _ in range(config.num_hidden_layers)]
    for index, layer in enumerate(layers):
        for name, value in table.get(index, {}).items():
            setattr(layer, name, value)
    return layers


def build_layer(layer_config, index, config):
    """A stock decoder layer in this layer's widths."""
    layer = LlamaDecoderLayer(layer_config, index)
    for linear, has_bias in (
        (layer.self_attn.o_proj, layer_config.o_proj_bias),
        (layer.mlp.down_proj, layer_config.down_proj_bias),
    ):
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0])) if has_bias else None
    # The model's own config, not a copy: switching the attention implementation must reach every layer.
    layer.self_attn.config = layer.mlp.config = config
    return layer


class PrunedLlamaModel(LlamaModel):
    config_class = PrunedLlamaConfig

    def __init__(self, config):
        layers = layer_configs(config)
        shared = copy.copy(layers[0])  # embeddings, norm and rotary embedding: nothing that differs by layer
        shared.num_hidden_layers = 0
        super().__init__(shared)
        config._attn_implementation = shared._attn_implementation
        self.config = config
        self.layers = nn.ModuleList(build_layer(layer, index, config) for index, layer in enumerate(layers))
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = PrunedLlamaConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's would build layers of equal width
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# So that save_pretrained copies this file along, whichever way the class was imported.
PrunedLlamaConfig.register_for_auto_class("AutoConfig")
PrunedLlamaModel.register_for_auto_class("AutoModel")
PrunedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
