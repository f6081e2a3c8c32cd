"""Llama with an FFN width of its own in each layer, as DeciLM (`model_type: nemotron-nas`) describes it.

This file needs only transformers. gprune copies it into exported folders, for programs that read the config by
`AutoConfig` (vLLM, SGLang), and for `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. Engines
with a class `DeciLMForCausalLM` of their own use that class, and only the config of this file.
"""

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

MULTIPLE = 256  # widths that `ffn_mult` describes are multiples of it


class Settings(dict):
    """A dict whose values are attributes too: engines read attributes, and json writes a dict."""

    def __getattr__(self, name):
        """Return a value by its key."""
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def ffn_width(ffn, hidden_size):
    """Return the FFN width of a layer from its settings `ffn`."""
    if "intermediate_size" in ffn:
        return ffn["intermediate_size"]
    width = int(2 * ffn["ffn_mult"] * hidden_size / 3)
    return -(-width // MULTIPLE) * MULTIPLE


class DeciLMConfig(LlamaConfig):
    """Config of Llama with `block_configs`, a list with the settings of each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), num_attention_heads=32, num_key_value_heads=None, **settings):
        """Take `block_configs` from config.json, where they are plain dicts."""
        # Llama's check that the number of heads divides the hidden size does not apply, because `head_dim` is explicit.
        # One head passes it.
        super().__init__(num_attention_heads=1, num_key_value_heads=1, **settings)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.block_configs = [
            Settings({part: Settings(values) for part, values in block.items()}) for block in block_configs
        ]

    def validate(self):
        """Skip Llama's check in `save_pretrained` too."""


class DeciLMForCausalLM(LlamaForCausalLM):
    """The `LlamaForCausalLM` of transformers, with FFNs of different widths."""

    config_class = DeciLMConfig

    def __init__(self, config):
        """Construct Llama, and replace the FFN of every layer."""
        super().__init__(config)
        widest = config.intermediate_size
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            config.intermediate_size = ffn_width(block["ffn"], config.hidden_size)
            layer.mlp = LlamaMLP(config)
        config.intermediate_size = widest
        self.post_init()
