"""Find the record of a model's type: written by hand (`gprune.models.families`) or discovered."""

from __future__ import annotations

import json
from importlib import import_module
from operator import attrgetter

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from gprune.models.families import FAMILIES, PRUNED, Family

RECORD = "_gprune_record"  # attribute of a model, so that a second look-up is free and copies have it
_known: dict[tuple[type, str], Family] = {}  # records that this process has discovered or read


def auto_of(config: PreTrainedConfig) -> type:
    """The Auto class that loads models of a configuration: for text, or else for images and text."""
    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if with_images and not is_causal(config) else AutoModelForCausalLM


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether AutoModelForCausalLM knows a configuration's class, or its code comes with the checkpoint."""
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def family_of(model: PreTrainedModel) -> Family:
    """The record of a model's type. A model that gprune exported has the record of the type that was pruned.

    Raises:
        UserError: for a type that has no record and whose structure is not found.
    """
    name = model.config.model_type.removeprefix(PRUNED)
    if name in FAMILIES:
        return FAMILIES[name]
    if RECORD not in model.__dict__:
        remember(model, family_of_config(model.config))
    return model.__dict__[RECORD]


def family_of_config(config: PreTrainedConfig) -> Family:
    """The record of a configuration's type; UserError as for `family_of`."""
    name = config.model_type.removeprefix(PRUNED)
    if name in FAMILIES:
        return FAMILIES[name]
    key = type(config), json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _known:
        # By name: discovery builds models, whose records are looked up here.
        _known[key] = import_module("gprune.models.discovery.record").discover(config)
    return _known[key]


def remember(model: PreTrainedModel, record: Family) -> None:
    """Let `family_of` return this record for this model and its copies."""
    model.__dict__[RECORD] = record


def decoder_of(model: PreTrainedModel):
    """The decoder of a model: what turns token ids into the hidden states that the head reads."""
    record = model.__dict__.get(RECORD)
    if record is not None and record.decoder is not None:
        return attrgetter(record.decoder)(model)
    return model.get_decoder()
