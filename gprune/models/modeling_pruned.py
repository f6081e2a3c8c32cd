"""Models of transformers with layers of different widths: fewer FFN neurons or key/value groups in some layers.

This file needs only transformers, and supports every family. gprune copies it into exported folders for
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. `PrunedLlamaForCausalLM` is the
`LlamaForCausalLM` of transformers, constructed from its config and then sliced to the sizes of each layer. Classes
exist for all other names too. All computations are those of transformers. Additional keys in config.json:

pruned_layout     `layers`: path of the layers in the model
                  `own`: number of a layer -> its `sizes` (parameter or buffer -> [dim, size]), `attributes` with sizes
                  in stock modules (path -> value), `values` (config key -> value), `added_biases`, the projections to
                  which recovery has added a bias, and, if whole experts were removed, `experts` (parameter -> number)
per_layer_config  for types with a record of gprune, the values of layers that differ from the global ones, for readers
                  of config.json; for other types the dense model's own table, or none
added_biases      an empty list; only beside a table of ours

Folders of earlier versions have no `own` for types with a record. Their `layers` is a path in the decoder, and `sizes`
(parameter -> [dim, {config key: n}]) and `attributes` (path -> {config key: n}) are sums of n x value of the table.
"""

import copy
from operator import attrgetter

import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

PREFIX = "pruned_"
AUTO_TABLES = {  # Auto class -> its table, type -> name of the stock class
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": getattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {}),
}


class PrunedConfig:
    """Mixin for stock config classes."""

    def validate(self):
        """Skip checks of global numbers of heads, which do not apply if layers differ."""

    def to_dict(self):
        """Add keys for older versions of transformers, and an `auto_map` with the name of this file."""
        output = super().to_dict()
        output |= legacy_rope_settings(output)
        module = __name__.rsplit(".", 1)[-1]
        family = self.model_type.removeprefix(PREFIX)
        config_name = type(self).__name__
        # Lists all Auto classes, because saving a model records only the class of that model.
        output["auto_map"] = {"AutoConfig": f"{module}.{config_name}"}
        for auto_name, stock_names in AUTO_TABLES.items():
            stock_name = stock_names.get(family)
            if isinstance(stock_name, str):
                output["auto_map"][auto_name] = f"{module}.{pruned_name(stock_name, config_name)}"
        return output


def pruned_name(stock_name, config_name):
    """Return the name of the pruned class of a stock model class, for a pruned config class.

    Some types use the model class of another type with their own config class. Then the name contains both, as in
    `PrunedAForCausalLMOfPrunedBConfig`.
    """
    stock = getattr(transformers, stock_name, None)
    stock_config = getattr(getattr(stock, "config_class", None), "__name__", None)
    if stock_config is None or f"Pruned{stock_config}" == config_name:
        return f"Pruned{stock_name}"
    return f"Pruned{stock_name}Of{config_name}"


def legacy_rope_settings(settings):
    """Return `rope_theta` and `rope_scaling` as transformers before version 5 reads them.

    These versions do not read `rope_parameters`, and would silently use the theta of the type's default config, such as
    10000. `settings` is the content of a config.json of version 5. The result is empty if it has no single theta.
    """
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_default = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_default else scaling}


class PrunedModel:
    """Mixin for stock model classes: constructs the dense model, and slices it to the sizes of each layer."""

    def __init__(self, config):
        """Construct the dense model of a pruned config, and slice its layers."""
        dense_config = copy.copy(config)
        # `added_biases` marks a table of ours. Another `per_layer_config` is the dense model's, such as Gemma 4's head
        # sizes, and is needed to construct the dense model.
        if "added_biases" in config.__dict__:
            for attribute in ("_heterogeneity_spec", "per_layer_config"):  # the table in new and old transformers
                dense_config.__dict__.pop(attribute, None)
        super().__init__(dense_config)
        # Without `_internal` the value would be set for the text and the vision model too.
        for attribute in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if hasattr(dense_config, attribute):
                setattr(config, attribute, getattr(dense_config, attribute))
        # Modules refer to the model's config, not a copy, so that a changed attention implementation applies to all
        # layers. Rotary embeddings keep the dense config, which has a single number of heads.
        for module in self.modules():
            if getattr(module, "config", None) is dense_config and "RotaryEmbedding" not in type(module).__name__:
                module.config = config
        text_config = config.get_text_config(decoder=True)
        for layer, own in zip(layers_of(self, config), sizes_by_layer(config), strict=True):
            slice_to_sizes(layer, text_config, own)
        if not experts_aligned(self):
            config._experts_implementation = "eager"  # grouped kernels do not support these widths

    @classmethod
    def is_custom_code(cls):
        """Return False, so that the stock class initialises everything.

        For custom code transformers would skip modules without parameters, such as those with computed buffers.
        """
        return False

    @classmethod
    def _can_set_experts_implementation(cls):
        """Return the answer of the stock class, because transformers looks for a decorator in the file of a class."""
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        return stock._can_set_experts_implementation()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Load a model. Raise ValueError if weights are missing; transformers only warns and uses random values."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"Cannot load {cls.__name__}: the folder has no weights for {len(missing)} parameters, such as "
                f"'{missing[0]}' (transformers {transformers.__version__}). Use a newer version, or a complete folder."
            )
        return (model, info) if output_loading_info else model


def experts_aligned(model):
    """Return whether all stacked weights of experts have rows of a multiple of 8 elements; True without experts.

    Grouped kernels need rows of a multiple of 16 bytes, which are 8 elements of two bytes.
    """
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    stacked = (weight for weight in model.parameters() if weight.dim() == 3 and id(weight) not in convolutions)
    return all(weight.shape[-1] % 8 == 0 for weight in stacked)


def layer_configs(config):
    """Return one config per layer, with the values of the layer."""
    table = getattr(config, "per_layer_config", None) or {}
    if not isinstance(table, dict):  # transformers >= 5.15 resolves the table itself
        return [copy.copy(table[index]) for index in range(config.num_hidden_layers)]
    values_by_layer = {int(index): values for index, values in table.items()}
    configs = [copy.copy(config) for _ in range(config.num_hidden_layers)]
    for index, layer_config in enumerate(configs):
        for key, value in values_by_layer.get(index, {}).items():
            setattr(layer_config, key, value)
    return configs


def layers_of(model, config):
    """Return the layers of a model, which may be a decoder without a head."""
    path = config.pruned_layout["layers"]
    if "own" in config.pruned_layout:
        is_decoder = not hasattr(model, model.base_model_prefix)
        return attrgetter(path.removeprefix(f"{model.base_model_prefix}.") if is_decoder else path)(model)
    decoder = model.get_decoder()
    return getattr(decoder if hasattr(decoder, path) else model.base_model, path)  # the latter before transformers 5


def sizes_by_layer(config):
    """Return `own` of each layer. That of folders of earlier versions is computed from their table."""
    layout = config.pruned_layout
    if "own" in layout:
        return [layout["own"][str(index)] for index in range(len(layout["own"]))]
    keys = {key for _, terms in layout["sizes"].values() for key in terms}
    return [
        {
            "sizes": {path: (dim, weighted_sum(terms, own)) for path, (dim, terms) in layout["sizes"].items()},
            "attributes": {path: weighted_sum(terms, own) for path, terms in layout["attributes"].items()},
            "values": {key: getattr(own, key, None) for key in keys},
            "added_biases": own.added_biases,
        }
        for own in layer_configs(config)
    ]


def slice_to_sizes(layer, config, own):
    """Slice a dense layer in place to explicit sizes, `own` of its layout, and add biases that recovery has added."""
    of_experts = {path: (0, number) for path, number in own.get("experts", {}).items()}
    for path, (dim, length) in (*of_experts.items(), *own["sizes"].items()):
        module, name = find_parent(layer, path)
        # Some layers lack parameters, such as dense layers between layers with experts.
        if getattr(module, name, None) is not None:
            narrow_parameter(module, name, dim, length)
    for path in own["added_biases"]:
        linear = attrgetter(path)(layer)
        rows = linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
        linear.bias = nn.Parameter(linear.weight.new_zeros(rows))
    set_layer_sizes(layer, config, own["values"], own["attributes"])


def narrow_parameter(module, name, dim, length):
    """Replace a parameter or buffer by its first `length` indices along `dim`, and update sizes of the module."""
    parameter = getattr(module, name)
    smaller = parameter.detach().narrow(dim, 0, length).clone()
    if name in module._buffers:
        module._buffers[name] = smaller
    else:
        setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
    update_linear_sizes(module)


def weighted_sum(terms, values):
    """Return the sum of n x value over `terms`, {config key: n}. `values` has the config keys as attributes."""
    return sum(n * getattr(values, key) for key, n in terms.items())


def find_parent(layer, path):
    """Return the module, or None, that contains the attribute at a dotted path, and the name of the attribute."""
    *parents, name = path.split(".")
    module = layer
    for parent in parents:
        module = getattr(module, parent, None)
    return module, name


def update_linear_sizes(module):
    """Set the size attributes of a linear layer from its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


def set_layer_sizes(layer, config, values, attributes):
    """Set the sizes of a layer in attributes of its modules (path -> value), and in their config (key -> value)."""
    for path, value in attributes.items():
        module, name = find_parent(layer, path)
        if hasattr(module, name):
            setattr(module, name, value)
    layer_config = LayerConfig(config, values)
    for module in layer.modules():
        module_config = getattr(module, "config", None)
        if module_config is config or isinstance(module_config, LayerConfig):
            module.config = layer_config


class LayerConfig:
    """Config of one layer: its own sizes, and other values from the model's current config."""

    def __init__(self, config, values):
        self.__dict__.update(model=config, values=values)

    def __getattr__(self, name):
        """Return the value of the layer, or else of the model's config."""
        if name.startswith("__") or "values" not in self.__dict__:  # during copying
            raise AttributeError(name)
        values = self.__dict__["values"]
        return values[name] if name in values else getattr(self.__dict__["model"], name)


def __getattr__(name):
    """Create the pruned class of a stock class of transformers, on first access of its name.

    Names are those of `pruned_name`.
    """
    stock_name, _, explicit_config = name.removeprefix("Pruned").partition("OfPruned")
    stock = getattr(transformers, stock_name, None) if name.startswith("Pruned") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    body = {"__module__": __name__, "__doc__": f"{stock.__name__} with layers of different width."}
    if issubclass(stock, transformers.PretrainedConfig):
        pruned_class = type(name, (PrunedConfig, stock), body | {"model_type": PREFIX + stock.model_type})
        auto_name = "AutoConfig"
    else:
        config_name = f"Pruned{explicit_config or stock.config_class.__name__}"
        config_class = globals().get(config_name) or __getattr__(config_name)
        pruned_class = type(name, (PrunedModel, stock), body | {"config_class": config_class})
        matching = (auto for auto, stock_names in AUTO_TABLES.items() if stock.__name__ in stock_names.values())
        auto_name = next(matching, "AutoModelForCausalLM")
    pruned_class.register_for_auto_class(auto_name)  # so that save_pretrained copies this file
    globals()[name] = pruned_class
    return pruned_class
