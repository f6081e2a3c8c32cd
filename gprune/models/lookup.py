"""Find the record of a model's type, which is in `gprune.models.families` or discovered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from gprune.errors import UserError
from gprune.models.families import FAMILIES, PRUNED, Family

RECORD = "_gprune_record"  # attribute of a model that caches its record, also for copies
# Records that this process has discovered or loaded, by class of the config and its content as JSON.
_known: dict[tuple[type, str], Family] = {}


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class of a configuration: for causal language models, or else for images and text."""
    has_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if has_images and not is_causal(config) else AutoModelForCausalLM


def is_causal(config: PreTrainedConfig) -> bool:
    """Return whether AutoModelForCausalLM supports a configuration, natively or by remote code."""
    has_remote_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return has_remote_class or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def family_of(model: PreTrainedModel) -> Family:
    """Return the record of a model's type, and register it for the model if it was discovered.

    For exports of gprune this is the record of the dense type.
    """
    name = model.config.model_type.removeprefix(PRUNED)
    if name in FAMILIES:
        return FAMILIES[name]
    if RECORD not in model.__dict__:
        remember(model, family_of_config(model.config))
    return model.__dict__[RECORD]


def family_of_config(config: PreTrainedConfig) -> Family:
    """Return the record of a configuration's type."""
    name = config.model_type.removeprefix(PRUNED)
    refuse_quantised(config)
    if name in FAMILIES:
        return FAMILIES[name]
    key = type(config), json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _known:
        # Imported late, because discovery uses this module.
        _known[key] = import_module("gprune.models.discovery.record").discover(config)
    return _known[key]


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


def remember(model: PreTrainedModel, record: Family) -> None:
    """Set the record that `family_of` returns for this model and its copies."""
    model.__dict__[RECORD] = record


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the decoder of a model, which maps token ids to the hidden states for the head."""
    record = model.__dict__.get(RECORD)
    if record is not None and record.decoder is not None:
        return attrgetter(record.decoder)(model)
    return model.get_decoder()
