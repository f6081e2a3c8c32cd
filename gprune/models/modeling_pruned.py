"""Models of transformers whose layers differ in width: fewer FFN neurons here, fewer key/value groups there.

This one file needs transformers alone, and serves every family. gprune copies it beside the weights it exports, where
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds it. `PrunedLlamaForCausalLM` is the
`LlamaForCausalLM` of transformers, built as its config says and then cut down to size; so is `Pruned` before any
other name. All arithmetic stays that of transformers. What config.json says beyond the stock config:

per_layer_config  what a layer has different from the global values: widths, head counts, and `added_biases`, the
                  projections that got a bias to make up for what went
pruned_layout     `layers`: where the decoder holds them
                  `sizes`: parameter of a layer -> [dim, {config key: n}]: along dim it has the sum of n x value
                  `attributes`: what stock code reads sizes from -> {config key: n}, the same sum
                  `own`: of a type without a table of config keys, in place of both: number of a layer -> its `sizes`
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
AUTO = {  # the Auto classes that load a folder, and their tables: type -> stock class
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": getattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {}),
}


class PrunedConfig:
    """Mixed into a stock config class."""

    def validate(self):
        """Leaves out checks of the global head counts, which have no meaning when layers differ."""

    def to_dict(self):
        """Adds what older transformers read, and where this file lies."""
        output = super().to_dict()
        output |= rope_of_older(output)
        # Written whole each time: saving a model by itself records only the class that is being saved.
        module, family = __name__.rsplit(".", 1)[-1], self.model_type.removeprefix(PREFIX)
        output["auto_map"] = {"AutoConfig": f"{module}.{type(self).__name__}"}
        for auto, names in AUTO.items():
            if isinstance(names.get(family), str):
                output["auto_map"][auto] = f"{module}.{pruned_name(names[family], type(self).__name__)}"
        return output


def pruned_name(stock, config):
    """The name of the pruned class of a stock model class that is built from a pruned config class; some types share
    the model class of another type and have a config class of their own."""
    known = getattr(transformers, stock, None)
    own = getattr(getattr(known, "config_class", None), "__name__", None)
    return f"Pruned{stock}" if own is None or f"Pruned{own}" == config else f"Pruned{stock}Of{config}"


def rope_of_older(settings):
    """What transformers before 5 read in place of `rope_parameters`: without `rope_theta` they silently use 10000."""
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


class PrunedModel:
    """Mixed into a stock model class: builds the dense model, on the meta device when weights are loaded, and cuts."""

    def __init__(self, config):
        dense = copy.copy(config)
        for place in ("_heterogeneity_spec", "per_layer_config"):  # where transformers keep the table, new and old
            dense.__dict__.pop(place, None)
        super().__init__(dense)
        for choice in ("_attn_implementation", "_experts_implementation"):
            if hasattr(dense, choice):
                setattr(config, choice, getattr(dense, choice))
        # The model's own config, not a copy: switching the attention implementation must reach every layer. Rotary
        # embeddings keep the dense one, which has one number of heads.
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
            layers = getattr(decoder if hasattr(decoder, place) else self.base_model, place)  # the latter before 5
            for layer, own in zip(layers, layer_configs(config), strict=True):
                cut(layer, config, own)
        if not experts_aligned(self):
            config._experts_implementation = "eager"

    @classmethod
    def is_custom_code(cls):
        """False: weights are initialised by the stock class. transformers would leave out what custom code computes for
        modules without parameters of their own, such as buffers of layers that the decoder fills."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls):
        """What the stock class answers: transformers looks for a decorator in the source file of a class."""
        return next(
            c for c in cls.__mro__ if c.__module__.startswith("transformers.")
        )._can_set_experts_implementation()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Refuses what transformers only warns of: weights that the folder has under other names would be random."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"no weights in the folder for {len(missing)} parameters of {cls.__name__}, such as '{missing[0]}', as "
                f"transformers {transformers.__version__} names them; expected a newer transformers, or a whole folder."
            )
        return (model, info) if output_loading_info else model


def experts_aligned(model):
    """Whether the experts' widths suit grouped kernels, which want rows of 16 bytes: multiples of 8 do in any dtype."""
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    stacked = (p for p in model.parameters() if p.dim() == 3 and id(p) not in convolutions)
    return all(parameter.shape[-1] % 8 == 0 for parameter in stacked)


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


def cut(layer, config, own):
    """Give a dense layer the sizes that its own config asks for."""
    layout = config.pruned_layout
    for path, (dim, terms) in layout["sizes"].items():
        module, name = find(layer, path)
        parameter = getattr(module, name, None)
        if parameter is not None:  # not every layer has every parameter: dense ones between experts
            smaller = parameter.detach().narrow(dim, 0, size(terms, own)).clone()
            setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
            tell_sizes(module)
    for path in own.added_biases:
        linear = attrgetter(path)(layer)
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    keys = {key for _, terms in layout["sizes"].values() for key in terms}
    tell_layer(layer, config, {key: getattr(own, key, None) for key in keys}, layout["attributes"])


def cut_to(layer, config, own):
    """Give a dense layer the sizes that are written out for it."""
    for path, (dim, length) in own["sizes"].items():
        module, name = find(layer, path)
        parameter = getattr(module, name)
        smaller = parameter.detach().narrow(dim, 0, length).clone()
        setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
        tell_sizes(module)
    for path in own["added_biases"]:
        linear = attrgetter(path)(layer)
        rows = linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
        linear.bias = nn.Parameter(linear.weight.new_zeros(rows))
    for path, value in own["attributes"].items():
        module, name = find(layer, path)
        setattr(module, name, value)
    tell_layer(layer, config, own["values"], {})


def size(terms, own):
    """Sum of n x value over {config key: n}."""
    return sum(times * getattr(own, key) for key, times in terms.items())


def find(layer, path):
    """The module that holds what a dotted path names, or None, and the name in it."""
    *modules, name = path.split(".")
    for part in modules:
        layer = getattr(layer, part, None)
    return layer, name


def tell_sizes(module):
    """Let a linear layer say what its weight is."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


def tell_layer(layer, config, values, attributes):
    """Let stock code find a layer's own sizes, `values` by config key: in its attributes, and in the config that its
    modules read."""
    own = LayerConfig(config, values)
    for path, terms in attributes.items():
        module, name = find(layer, path)
        if hasattr(module, name):
            setattr(module, name, size(terms, own))
    for module in layer.modules():
        if getattr(module, "config", None) is config or isinstance(getattr(module, "config", None), LayerConfig):
            module.config = own


class LayerConfig:
    """The model's config as one layer sees it: its own sizes, all else as the model's config has it at the moment."""

    def __init__(self, config, values):
        self.__dict__.update(model=config, values=values)

    def __getattr__(self, name):
        if name.startswith("__") or "values" not in self.__dict__:  # while a copy is being made
            raise AttributeError(name)
        values = self.__dict__["values"]
        return values[name] if name in values else getattr(self.__dict__["model"], name)


def __getattr__(name):
    """The pruned class of any stock class that transformers knows by the rest of its name, made when asked for."""
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
    made.register_for_auto_class(auto)  # so that save_pretrained copies this file along
    globals()[name] = made
    return made
