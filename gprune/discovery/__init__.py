"""Find the structure of a model of any type.

`family_of` is the door: other packages use only the functions of this file. A few types have their record in
`models.families`. For other types the structure is found once on a tiny random copy, and cached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel

from gprune.discovery.fit import check_fit
from gprune.models.families import FAMILIES, PRUNED, RECORD, Family, attach_record, refuse_quantised
from gprune.models.masks import Masks
from gprune.models.masks import masked as masked_with_record
from gprune.models.units import UNITS

# Records that this process has discovered or read from the cache, by class of the config and its content as JSON.
_known: dict[tuple[type, str], Family] = {}


def family_of(subject: PreTrainedModel | PreTrainedConfig) -> Family:
    """Return the record of a model or configuration, and attach it to the model, from where `record_of` reads it.

    For exports of gprune this is the record of the dense type. A model keeps a record that was found before. Raise
    UserError if the type cannot be pruned.
    """
    if not isinstance(subject, PreTrainedModel):
        refuse_quantised(subject)  # not for models, whose weights may have been de-quantised
        return FAMILIES.get(subject.model_type.removeprefix(PRUNED)) or _discovered(subject)
    by_hand = FAMILIES.get(subject.config.model_type.removeprefix(PRUNED))
    record = by_hand or subject.__dict__.get(RECORD) or _discovered(subject.config)
    attach_record(subject, record)
    return record


def _discovered(config: PreTrainedConfig) -> Family:
    """Return the record of a configuration, discovered once per process."""
    key = type(config), json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _known or config.model_type.removeprefix(PRUNED) in UNITS:  # a function may change
        from gprune.discovery.search import discover  # only types without a record need it

        _known[key] = discover(config)
    return _known[key]


def check_structure(model: PreTrainedModel) -> None:
    """Find the record of a model, which may have no weights, and raise UserError unless it fits the model."""
    family_of(model)
    check_fit(model)


def tiny_copy(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a tiny random model of a configuration's type, with as many layers."""
    from gprune.discovery.tiny import shrunk, tiny_model

    model = tiny_model(shrunk(config, all_layers=True))
    attach_record(model, family_of(config))
    return model


@contextmanager
def masked(model: PreTrainedModel, masks: Masks) -> Iterator[PreTrainedModel]:
    """Let a model of transformers compute as if it were pruned while the context lasts. Its weights do not change.

    Args:
        model: a model of a supported type.
        masks: one keep mask per block and scope, such as those of a run's result. Their sizes are not checked.

    Raises:
        UserError: if the model's type is not supported.
    """
    family_of(model)
    with masked_with_record(model, masks):
        yield model
