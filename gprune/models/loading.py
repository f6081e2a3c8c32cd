"""Find a model by name, refuse it before anything is loaded, load it frozen, and tell models apart by content."""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from gprune.checks import memory_limits
from gprune.console import quieted
from gprune.errors import UserError, first_line, quoting
from gprune.models import embedded as assets
from gprune.models import modeling_pruned
from gprune.models.families import FAMILIES, PRUNED
from gprune.models.folders import check_folder, check_sizes, check_stored
from gprune.models.lookup import auto_of, family_of_config
from gprune.models.names import check_model_name
from gprune.models.offload import StoredWeights, offload_folder
from gprune.storage.files import as_bytes
from gprune.storage.reading import expanded

log = logging.getLogger("gprune")


def register() -> None:
    """Let transformers' Auto classes load our exports without remote code. Calling it again changes nothing."""
    for family in FAMILIES:
        register_type(family)


def register_type(model_type: str) -> None:
    """Let transformers' Auto classes load exports of one type."""
    config, base, complete = pruned_classes(model_type)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    if base is not None:
        AutoModel.register(config, base, exist_ok=True)
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    (AutoModelForCausalLM if causal else AutoModelForImageTextToText).register(config, complete, exist_ok=True)


def pruned_classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """The pruned config, base model and causal language model of a family."""
    base = MODEL_MAPPING_NAMES.get(family)
    complete = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    config = f"Pruned{CONFIG_MAPPING[family].__name__}"
    names = [modeling_pruned.pruned_name(name, config) if isinstance(name, str) else None for name in (base, complete)]
    return tuple(None if name is None else getattr(modeling_pruned, name) for name in (config, *names))


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 (16 hex digits) over names, shapes, dtypes and bytes of all parameters, the configuration, and the class
    where a model brings its own code (transformers puts a hash of that into the module's name).

    Two models with the same fingerprint give the same statistics; caches are keyed by it.
    """
    settings = model.config.to_diff_dict()
    for place in ("_name_or_path", "transformers_version"):  # where a model lies does not change what it computes
        settings.pop(place, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if type(model).__module__.startswith("transformers_modules."):
        digest.update(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    weights = StoredWeights(model)  # one at a time where they are offloaded
    for name in sorted(model.state_dict()):
        parameter = weights[name]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(as_bytes(parameter))
    return digest.hexdigest()[:16]


def locate_model(name: str) -> str:
    """The folder or hub id of a model: an embedded name becomes the folder in the cache."""
    if name in assets.EMBEDDED_MODELS:
        return str(assets.embedded_model_dir(name))
    path = expanded(name)
    check_model_name(name)
    return str(path) if path.is_dir() else name


def read_config(name: str, *, trust_remote_code: bool = False, prunable: bool = True) -> PreTrainedConfig:
    """Read a model's configuration alone; a UserError for sizes out of range and, unless `prunable` is false, for a
    family that is not supported."""
    location = locate_model(name)
    register()  # for a family whose record came after the import
    remedy = ". Use a causal language model; without network, an embedded model or a local folder."
    with quoting(f"--model.name: Cannot read the configuration of '{name}': ", remedy):
        check_folder(location)
        check_sizes(PreTrainedConfig.get_config_dict(location)[0], name)
        named = PreTrainedConfig.get_config_dict(location)[0].get("model_type")
        if isinstance(named, str) and named.startswith(PRUNED) and named.removeprefix(PRUNED) in CONFIG_MAPPING:
            register_type(named.removeprefix(PRUNED))
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        if prunable:
            family_of_config(config)
    return config


def skeleton(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of this config without weights, on the meta device; `model_class`: not the config's own class."""
    with quoting("--model.name: Cannot build a model from its configuration: "), torch.device("meta"):
        if model_class is not None:
            return model_class(config)
        return auto_of(config).from_config(config, trust_remote_code=trust_remote_code)


def load_model(
    name: str, *, trust_remote_code: bool = False, **settings: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by embedded name, folder or hub id, as `load_weights` loads it with these settings, and its tokenizer.

    Raises:
        UserError: before any weight is read, for an unsupported family; later, for weights that cannot be read.
    """
    location = locate_model(name)
    with quoting(f"--model.name: '{name}' cannot be loaded: "):
        model = load_weights(location, trust_remote_code=trust_remote_code, **settings)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        tokenizer("a")  # its settings may be of other types
        return model, tokenizer


def load_weights(
    location: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device_map: str | None = None,
    max_memory: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    prunable: bool = True,
) -> PreTrainedModel:
    """A frozen causal language model from a folder or the hub, in eval mode.

    Offloaded weights are read from the model's own files. Those that are stored in another form than the one they
    compute in are written below the cache, and removed with the model.

    Args:
        device_map: handed to transformers as it is.
        max_memory: sizes by `cpu` or device number; weights beyond them stay on disk.
        prunable: whether gprune has to know the model's structure.

    Raises:
        UserError: where weights of the model are missing, which transformers would draw at random, or quantised.
    """
    config = read_config(str(location), trust_remote_code=trust_remote_code, prunable=prunable)
    check_stored(skeleton(config, trust_remote_code=trust_remote_code), location)
    settings = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    with ExitStack() as removal:
        if device_map is not None:
            limits = None if max_memory is None else memory_limits(max_memory)
            folder = removal.enter_context(offload_folder())
            settings |= {"device_map": device_map, "max_memory": limits, "offload_folder": folder}
        if not usable_generation_config(location):
            settings["generation_config"] = GenerationConfig.from_model_config(config)
        with quieted("accelerate.big_modeling"):  # it warns that parameters are offloaded, which was asked for
            model, report = auto_of(config).from_pretrained(location, **settings)
        check_complete(report, location)
        check_not_quantised(model, location)
        weakref.finalize(model, removal.pop_all().close)
    return model.eval().requires_grad_(False)


def usable_generation_config(location: str | Path) -> bool:
    """Whether transformers takes generation_config.json as it is, or there is none; else one warning."""
    try:
        GenerationConfig.from_pretrained(location)
    except OSError:  # there is none, or no JSON in it: transformers makes one of config.json
        pass
    except Exception as error:  # of any type, for values of any type
        log.warning("'%s': generation_config.json is left out: %s", location, first_line(error))
        return False
    return True


def check_not_quantised(model: PreTrainedModel, location: str | Path) -> None:
    """Raise UserError for weights that stay quantised in memory: a neuron would go, and its scales would stay."""
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.bfloat16, torch.float16}
    if getattr(model, "hf_quantizer", None) is not None or dtypes:
        remedy = "Prune the original weights, and quantise the result"
        raise UserError(
            f"--model.name must have weights in float32, bfloat16 or float16; got '{location}', which is quantised. "
            f"{remedy}."
        )


def check_complete(report: Mapping[str, Collection[str]], location: str | Path) -> None:
    """Raise UserError if weights are missing in transformers' report of a load, and warn of those without a place."""
    if missing := sorted(report["missing_keys"]):
        remedy = "Check num_hidden_layers and tie_word_embeddings in config.json"
        lacks = f"it has no weights for {len(missing)} parameters, such as {missing[0]}"
        raise UserError(f"--model.name: Cannot load '{location}': {lacks}. {remedy}.")
    if unknown := sorted(report["unexpected_keys"]):
        said = "'%s' has %d weights that its config.json has no place for, such as %s; left out."
        log.warning(said, location, len(unknown), unknown[0])


register()  # whoever loads models here may load exports
