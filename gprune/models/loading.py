"""Find, check, load and register models, copy their processors, and compute fingerprints of their content."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from gprune.checks import memory_limits
from gprune.console import quieted
from gprune.errors import UserError, first_line, quoting
from gprune.models import modeling_pruned
from gprune.models.copies import auto_class, turn_off_rescaling
from gprune.models.embedded import EMBEDDED_MODELS, check_model_name, embedded_model_dir
from gprune.models.families import FAMILIES, PRUNED, refuse_quantised
from gprune.models.offload import StoredWeights, offload_folder
from gprune.storage.files import as_bytes
from gprune.storage.paths import expanded

SUBJECT = "The model made elsewhere"  # beginning of errors of `check_elsewhere` and `load_elsewhere`
log = logging.getLogger("gprune")
# Files of a processor, which prepares images and text. A processor has at least one of the first three.
PROCESSOR_CONFIGS = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
PROCESSOR_FILES = (*PROCESSOR_CONFIGS, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)  # others are saved with the tokenizer
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Since 5.25, transformers replaces layers by kernels of the hub, which may have other bits and no backward pass.
WITHOUT_KERNELS = {"use_kernels": False}


def register(*model_types: str) -> None:
    """Register exports in transformers' Auto classes, so that they load without remote code. Idempotent.

    Args:
        model_types: types of the dense models, such as "gemma3_text". Types with a record (`FAMILIES`) are always
            registered. Others are not, because importing the classes of all types takes too long.

    Raises:
        UserError: if transformers has no class for a type that predicts next tokens.
    """
    for model_type in (*FAMILIES, *model_types):
        register_type(model_type.removeprefix(PRUNED))


def register_type(model_type: str) -> None:
    """Register exports of one model type in transformers' Auto classes."""
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    takes_images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if model_type not in CONFIG_MAPPING or not (is_causal or takes_images):
        raise UserError(
            f"Cannot register exports of model type '{model_type}': transformers has no class of this type that "
            "predicts next tokens. Convert the checkpoint to such a class (docs/extend.md, 'A model type')."
        )
    config_class, base_class, model_class = pruned_classes(model_type)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    if base_class is not None:
        AutoModel.register(config_class, base_class, exist_ok=True)
    auto_model = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
    auto_model.register(config_class, model_class, exist_ok=True)


def pruned_classes(
    model_type: str,
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel] | None, type[PreTrainedModel] | None]:
    """Return the pruned classes of a dense model type: config, base model (without a head), and language model.

    The language model is the one for text only if transformers has it, and otherwise the one for images and text. A
    model class is None if transformers does not list exactly one class for the type.
    """
    config_name = f"Pruned{CONFIG_MAPPING[model_type].__name__}"

    def pruned_class(stock_name: str | tuple[str, ...] | None) -> type[PreTrainedModel] | None:
        if not isinstance(stock_name, str):  # a tuple: transformers chooses by other values of the config
            return None
        return getattr(modeling_pruned, modeling_pruned.pruned_name(stock_name, config_name))

    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    with_head = causal or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    base = MODEL_MAPPING_NAMES.get(model_type)
    return getattr(modeling_pruned, config_name), pruned_class(base), pruned_class(with_head)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Return a SHA-256 (16 hex digits) of a model's configuration and state dictionary (names, shapes, dtypes, bytes).

    For models with code of their own it includes the class, whose module name contains a hash of the code. Models with
    equal fingerprints have equal statistics; the fingerprint is part of cache keys.
    """
    settings = model.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version"):  # where a model is stored and what wrote it do not matter
        settings.pop(key, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if type(model).__module__.startswith("transformers_modules."):
        digest.update(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    weights = StoredWeights(model)  # loaded one at a time if offloaded
    for name in sorted(model.state_dict()):
        parameter = weights[name]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(as_bytes(parameter))
    return digest.hexdigest()[:16]


def locate_model(name: str) -> str:
    """Return the folder or hub id of a model. An embedded model is made at first use, in a folder of the cache."""
    check_model_name(name)
    if name in EMBEDDED_MODELS:
        return str(embedded_model_dir(name))
    path = expanded(name)
    return str(path) if path.is_dir() else name


def read_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the configuration of a model by embedded name, folder or hub id. Register the types of exports first."""
    location = locate_model(name)
    register()  # for records that were added after the import
    remedy = ". Use a causal language model; without network, an embedded model or a local folder."
    with quoting(f"--model.name: Cannot read the configuration of '{name}': ", remedy):
        model_type = PreTrainedConfig.get_config_dict(location)[0].get("model_type")
        if isinstance(model_type, str) and model_type.startswith(PRUNED):
            dense_type = model_type.removeprefix(PRUNED)
            if dense_type in CONFIG_MAPPING:
                register_type(dense_type)
        return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)


def load_model(
    name: str, *, trust_remote_code: bool = False, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model by embedded name, folder or hub id, and its tokenizer. Options are those of `load_weights`."""
    model = load_without_tokenizer(name, trust_remote_code=trust_remote_code, **options)
    return model, load_tokenizer(name, trust_remote_code=trust_remote_code)


def load_without_tokenizer(name: str, **options: Any) -> PreTrainedModel:
    """Load a model by embedded name, folder or hub id. Options are those of `load_weights`."""
    location = locate_model(name)
    with quoting(f"--model.name: '{name}' cannot be loaded: "):
        return load_weights(location, **options)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model by embedded name, folder or hub id."""
    location = locate_model(name)
    with quoting(f"--model.name: '{name}' cannot be loaded: "):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        tokenizer("a")  # fails if its settings have wrong types
    return tokenizer


def load_weights(
    location: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device_map: str | None = None,
    max_memory: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a frozen causal language model from a folder or the hub, in eval mode.

    `dtype` may be a name such as bfloat16, or `auto` for that of the files. The model's structure is not known yet:
    `gprune.discovery.family_of(model)` finds it.

    Offloaded weights are read from the files of the model. If weights need conversion, converted files are written to
    the cache, and removed with the model.
    """
    config = read_config(str(location), trust_remote_code=trust_remote_code)
    refuse_quantised(config)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True} | WITHOUT_KERNELS
    with ExitStack() as cleanup:
        if device_map is not None:
            limits = None if max_memory is None else memory_limits(max_memory)
            folder = cleanup.enter_context(offload_folder())
            options |= {"device_map": device_map, "max_memory": limits, "offload_folder": folder}
        if not has_usable_generation_config(location):
            options["generation_config"] = GenerationConfig.from_model_config(config)
        with quieted("accelerate.big_modeling"):  # warns of offloaded parameters, which are intended
            model, report = auto_class(config).from_pretrained(location, **options)
        check_complete(report, location)
        check_weight_dtypes(model, location)
        turn_off_rescaling(model)
        # Loading has succeeded, so the offload folder is removed with the model, and not at the end of this block.
        weakref.finalize(model, cleanup.pop_all().close)
    return model.eval().requires_grad_(False)


def has_usable_generation_config(location: str | Path) -> bool:
    """Return whether generation_config.json is valid, missing or not JSON, and otherwise log a warning.

    In the latter two cases transformers makes the configuration from config.json.
    """
    try:
        GenerationConfig.from_pretrained(location)
    except OSError:  # missing or not JSON: transformers uses config.json
        pass
    except Exception as error:  # of any class, because values may have any type
        log.warning("'%s': generation_config.json is ignored: %s", location, first_line(error))
        return False
    return True


def check_weight_dtypes(model: PreTrainedModel, location: str | Path) -> None:
    """Raise UserError unless all parameters are float32, bfloat16 or float16 and no quantizer is attached.

    Quantization scales cannot be sliced with neurons.
    """
    other_dtypes = {parameter.dtype for parameter in model.parameters()}.difference(WEIGHT_DTYPES)
    has_quantizer = getattr(model, "hf_quantizer", None) is not None
    needed = f"--model.name must have weights in float32, bfloat16 or float16; got '{location}', which"
    if other_dtypes == {torch.float64} and not has_quantizer:
        raise UserError(f"{needed} has weights in float64. Convert them to float32.")
    if other_dtypes or has_quantizer:
        raise UserError(f"{needed} is quantised. Prune the original weights, and quantise the result.")


def check_complete(report: Mapping[str, Collection[str]], location: str | Path) -> None:
    """Raise UserError if weights are missing, and warn of unexpected weights."""
    missing = sorted(report["missing_keys"])
    if missing:
        remedy = "Check num_hidden_layers and tie_word_embeddings in config.json"
        lacks = f"it has no weights for {len(missing)} parameters, such as {missing[0]}"
        raise UserError(f"--model.name: Cannot load '{location}': {lacks}. {remedy}.")
    unknown = sorted(report["unexpected_keys"])
    if unknown:
        warning = (
            "'%s' has %d weights that do not belong to the model of its config.json, such as %s. They are ignored."
        )
        log.warning(warning, location, len(unknown), unknown[0])


def has_processor(folder: Path) -> bool:
    """Return whether a model folder has the files of a processor."""
    return any((folder / name).is_file() for name in PROCESSOR_CONFIGS)


def copy_processor(location: str, model: PreTrainedModel, folder: Path) -> None:
    """Copy the files of the dense model's processor without changes, if the model takes images.

    The processor is not loaded, because some processors need packages that pruning does not need. Files on the hub are
    read from its cache, or downloaded. If none is found there, a warning is logged.
    """
    if not location or "image" not in model.input_modalities:
        return
    for name in PROCESSOR_FILES:
        try:
            file = cached_file(location, name)
        except OSError:  # the file does not exist, or the hub cannot be reached
            continue
        shutil.copyfile(file, folder / name)
    if not has_processor(folder) and not Path(location).is_dir():
        log.warning(
            "The processor of '%s' is not saved with the model, because none of its files was found: %s. AutoProcessor "
            "needs one of them. Copy it into the model's folder.",
            location,
            ", ".join(PROCESSOR_CONFIGS),
        )


register()  # so that exports load after importing this module


def check_elsewhere(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Check that a model loads exactly as it was saved, with a tokenizer. Return the model without weights.

    Only headers of weight files are read. A model on the hub is downloaded.
    """
    code_option = {"trust_remote_code": trust_remote_code}
    with _errors_name_model(name):
        location = locate_model(name)
        if (expanded(name) / "manifest.json").is_file():
            raise UserError(f"{SUBJECT} must be a model folder, such as {name}/model; got the run '{name}'.")
        check_remote_code(name, location, trusted=trust_remote_code)
        config = read_config(name, **code_option)
        if getattr(config, "quantization_config", None):
            floats = "float32, bfloat16 or float16"
            raise UserError(f"{SUBJECT} must have weights in {floats}; got '{name}', which is quantised.")
        options: dict[str, Any] = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
        with quieted("transformers"):  # its table of missing weights, which are reported below
            model, report = auto_class(config).from_pretrained(location, **code_option, **options, **WITHOUT_KERNELS)
        check_complete(report | {"unexpected_keys": ()}, location)  # unexpected weights are an error here, see below
        if mismatched := sorted(report["mismatched_keys"]):
            weight, stored_shape, config_shape = mismatched[0]
            raise UserError(
                f"{SUBJECT}: Cannot load '{location}': {len(mismatched)} weights have other shapes than in "
                f"config.json, such as {weight}: {tuple(stored_shape)} instead of {tuple(config_shape)}."
            )
        if unknown := sorted(report["unexpected_keys"]):
            raise UserError(
                f"{SUBJECT}: Cannot load '{location}': {len(unknown)} weights have no place in the model of "
                f"config.json, such as {unknown[0]}. Without them it would be another model. Save it with its own code "
                "(auto_map)."
            )
        tokenizer = AutoTokenizer.from_pretrained(location, **code_option)
        if type(tokenizer("a")["input_ids"]) is not list:
            raise UserError(f"{SUBJECT} must have a usable tokenizer; got '{name}'.")
    return model


def check_remote_code(name: str, location: str, *, trusted: bool) -> None:
    """Raise UserError if a model needs Python code of its own that the user does not trust."""
    try:
        content = PreTrainedConfig.get_config_dict(location)[0]
    except Exception:  # of any class; reading the configuration later reports the error
        return
    dense_type = str(content.get("model_type")).removeprefix(PRUNED)  # gprune has the code of its own exports
    needs_code = content.get("auto_map") and dense_type not in CONFIG_MAPPING
    if needs_code and not trusted:
        flag = "--model.trust_remote_code=true"
        remedy = "Read that code, then add the flag (after -- if you run a list)"
        raise UserError(f"{SUBJECT}: '{name}' needs {flag}, because it has Python code of its own. {remedy}.")


def load_elsewhere(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen causal language model and its tokenizer like `load_model`, even if gprune cannot prune it."""
    with _errors_name_model(name):
        return load_model(name, **options)


@contextmanager
def _errors_name_model(name: str) -> Iterator[None]:
    """Convert exceptions to UserErrors that begin with `SUBJECT` instead of `--model.name`."""
    try:
        with quoting(f"{SUBJECT}: '{name}' cannot be loaded: "):
            yield
    except UserError as error:
        raise UserError(str(error).replace("--model.name", SUBJECT, 1)) from error
