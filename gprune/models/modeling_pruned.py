"""Models of transformers with layers of different widths: fewer FFN neurons or key/value groups in some layers.

This file needs only transformers, and supports every family. gprune copies it into exported folders for
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. `PrunedLlamaForCausalLM` is the
`LlamaForCausalLM` of transformers, constructed from its config and then sliced to the sizes of each layer. Classes
exist for all other names too. All computations are those of transformers. Additional keys in config.json:

per_layer_config  values of layers that differ from the global ones: widths, numbers of heads, and `added_biases`, the
                  projections to which recovery has added a bias
pruned_layout     `layers`: path of the layers in the decoder
                  `sizes`: parameter of a layer -> [dim, {config key: n}]; its size along dim is the sum of n x value
                  `attributes`: attribute with a size in stock modules -> {config key: n}, the same sum
                  `own`: for discovered types, instead of `sizes` and `attributes`: number of a layer -> its `sizes`
                  (parameter -> [dim, size]), `attributes` (path -> value), `values` (config key -> value) and
                  `added_biases`
"""

import copy
from operator import attrgetter

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

PREFIX = "pruned_"
AUTO = {  # Auto classes, and their tables: type -> stock class
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": getattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {}),
}


class PrunedConfig:
    """Mixin for stock config classes."""

    def validate(self):
        """Skip checks of global numbers of heads, which do not apply if layers differ."""

    def to_dict(self):
        """Add keys for older versions of transformers, and the name of this file."""
        output = super().to_dict()
        output |= rope_of_older(output)
        # Complete, because saving a model records only the class of that model.
        module, family = __name__.rsplit(".", 1)[-1], self.model_type.removeprefix(PREFIX)
        output["auto_map"] = {"AutoConfig": f"{module}.{type(self).__name__}"}
        for auto, names in AUTO.items():
            if isinstance(names.get(family), str):
                output["auto_map"][auto] = f"{module}.{pruned_name(names[family], type(self).__name__)}"
        return output


def pruned_name(stock, config):
    """Return the name of the pruned class of a stock model class, for a pruned config class.

    Some types use the model class of another type with their own config class.
    """
    known = getattr(transformers, stock, None)
    own = getattr(getattr(known, "config_class", None), "__name__", None)
    return f"Pruned{stock}" if own is None or f"Pruned{own}" == config else f"Pruned{stock}Of{config}"


def rope_of_older(settings):
    """Return the rope settings of transformers before version 5, which silently use 10000 without `rope_theta`."""
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


class PrunedModel:
    """Mixin for stock model classes: constructs the dense model, and slices it to the sizes of each layer."""

    def __init__(self, config):
        dense = copy.copy(config)
        for place in ("_heterogeneity_spec", "per_layer_config"):  # the table in new and old versions of transformers
            dense.__dict__.pop(place, None)
        super().__init__(dense)
        for choice in ("_attn_implementation", "_experts_implementation"):
            if hasattr(dense, choice):
                setattr(config, choice, getattr(dense, choice))
        # Modules refer to the model's config, not a copy, so that a changed attention implementation applies to all
        # layers. Rotary embeddings keep the dense config, which has a single number of heads.
        for module in self.modules():
            if getattr(module, "config", None) is dense and "RotaryEmbedding" not in type(module).__name__:
                module.config = config
        layout = config.pruned_layout
        if "own" in layout:
            text = config.get_text_config(decoder=True)
            for index, layer in enumerate(attrgetter(layout["layers"])(self)):
                cut_to(layer, text, layout["own"][str(index)])
        else:
            decoder, place = self.get_decoder(), layout["layers"]
            layers = getattr(decoder if hasattr(decoder, place) else self.base_model, place)  # base_model: before 5
            for layer, own in zip(layers, layer_configs(config), strict=True):
                cut(layer, config, own)
        if not experts_aligned(self):
            config._experts_implementation = "eager"

    @classmethod
    def is_custom_code(cls):
        """Return False, so that the stock class initialises everything.

        For custom code transformers would skip modules without parameters, such as those with computed buffers.
        """
        return False

    @classmethod
    def _can_set_experts_implementation(cls):
        """Return the answer of the stock class, because transformers looks for a decorator in the file of a class."""
        return next(
            c for c in cls.__mro__ if c.__module__.startswith("transformers.")
        )._can_set_experts_implementation()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Raise ValueError for missing weights, for which transformers only warns and uses random values."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"Cannot load {cls.__name__}: the folder has no weights for {len(missing)} parameters, such as "
                f"'{missing[0]}' (transformers {transformers.__version__}). Use a newer version, or a complete folder."
            )
        return (model, info) if output_loading_info else model


def experts_aligned(model):
    """Return whether widths of experts are multiples of 8, because grouped kernels need rows of 16 bytes."""
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    stacked = (p for p in model.parameters() if p.dim() == 3 and id(p) not in convolutions)
    return all(parameter.shape[-1] % 8 == 0 for parameter in stacked)


def layer_configs(config):
    """Return one config per layer, with the values of the layer."""
    table = getattr(config, "per_layer_config", None) or {}
    if not isinstance(table, dict):  # transformers >= 5.15 resolves the table itself
        return [copy.copy(table[index]) for index in range(config.num_hidden_layers)]
    table = {int(index): values for index, values in table.items()}
    layers = [copy.copy(config) for _ in range(config.num_hidden_layers)]
    for index, layer in enumerate(layers):
        for name, value in table.get(index, {}).items():
            setattr(layer, name, value)
    return layers


def cut(layer, config, own):
    """Slice a dense layer to the sizes in its config."""
    layout = config.pruned_layout
    for path, (dim, terms) in layout["sizes"].items():
        module, name = find_parent(layer, path)
        parameter = getattr(module, name, None)
        if parameter is not None:  # some layers lack parameters, such as dense layers between layers with experts
            smaller = parameter.detach().narrow(dim, 0, size(terms, own)).clone()
            setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
            update_linear_sizes(module)
    for path in own.added_biases:
        linear = attrgetter(path)(layer)
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    keys = {key for _, terms in layout["sizes"].values() for key in terms}
    set_layer_sizes(layer, config, {key: getattr(own, key, None) for key in keys}, layout["attributes"])


def cut_to(layer, config, own):
    """Slice a dense layer to explicit sizes."""
    for path, (dim, length) in own["sizes"].items():
        module, name = find_parent(layer, path)
        parameter = getattr(module, name)
        smaller = parameter.detach().narrow(dim, 0, length).clone()
        setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
        update_linear_sizes(module)
    for path in own["added_biases"]:
        linear = attrgetter(path)(layer)
        rows = linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
        linear.bias = nn.Parameter(linear.weight.new_zeros(rows))
    for path, value in own["attributes"].items():
        module, name = find_parent(layer, path)
        setattr(module, name, value)
    set_layer_sizes(layer, config, own["values"], {})


def size(terms, own):
    """Return the sum of n x value over {config key: n}."""
    return sum(times * getattr(own, key) for key, times in terms.items())


def find_parent(layer, path):
    """Return the module of a dotted path, or None, and the last name of the path."""
    *modules, name = path.split(".")
    for part in modules:
        layer = getattr(layer, part, None)
    return layer, name


def update_linear_sizes(module):
    """Set the size attributes of a linear layer from its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


def set_layer_sizes(layer, config, values, attributes):
    """Set the sizes of a layer, `values` by config key, in attributes and in the config of its modules."""
    own = LayerConfig(config, values)
    for path, terms in attributes.items():
        module, name = find_parent(layer, path)
        if hasattr(module, name):
            setattr(module, name, size(terms, own))
    for module in layer.modules():
        if getattr(module, "config", None) is config or isinstance(getattr(module, "config", None), LayerConfig):
            module.config = own


class LayerConfig:
    """Config of one layer: its own sizes, and other values from the model's current config."""

    def __init__(self, config, values):
        self.__dict__.update(model=config, values=values)

    def __getattr__(self, name):
        if name.startswith("__") or "values" not in self.__dict__:  # during copying
            raise AttributeError(name)
        values = self.__dict__["values"]
        return values[name] if name in values else getattr(self.__dict__["model"], name)


def __getattr__(name):
    """Make the pruned class of a stock class of transformers, on first access of its name."""
    stock_name, _, of_config = name.removeprefix("Pruned").partition("OfPruned")
    stock = getattr(transformers, stock_name, None) if name.startswith("Pruned") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    body = {"__module__": __name__, "__doc__": f"{stock.__name__} with layers of different width."}
    if issubclass(stock, transformers.PretrainedConfig):
        made = type(name, (PrunedConfig, stock), body | {"model_type": PREFIX + stock.model_type})
        auto = "AutoConfig"
    else:
        config = f"Pruned{of_config or stock.config_class.__name__}"
        config_class = globals().get(config) or __getattr__(config)
        made = type(name, (PrunedModel, stock), body | {"config_class": config_class})
        names = (auto for auto, known in AUTO.items() if stock.__name__ in known.values())
        auto = next(names, "AutoModelForCausalLM")
    made.register_for_auto_class(auto)  # so that save_pretrained copies this file
    globals()[name] = made
    return made
