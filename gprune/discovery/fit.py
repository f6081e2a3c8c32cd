"""Check that the record of a model fits the model's paths and sizes. The model may have no weights."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.errors import UserError, closest_name
from gprune.models.blocks import Block, blocks_of
from gprune.models.families import BUILT_IN, Family, decoder_layers, record_of
from gprune.models.parts import attribute_at
from gprune.models.units import units_of, units_of_blocks


def check_fit(model: PreTrainedModel) -> None:
    """Raise UserError unless the record of a model fits all its layers. The model may have no weights.

    The error depends on the origin of the record: built in, of a user, or discovered.
    """
    name = model.config.model_type
    record = record_of(model)
    try:
        layers = [block.layer for block in blocks_of(model)]
    except AttributeError as error:
        raise record_error(name, f"its decoder has no layers '{record.layers}'") from error
    if layers and not record.found:
        _check_paths(name, record, layers[0])
    for block in blocks_of(model):
        mismatch = _size_mismatch(block, model.config)
        if mismatch is None:
            continue
        if record in BUILT_IN:
            raise UserError(
                f"--model.name: layer {block.layer_index} of this '{name}' model cannot be pruned: {mismatch}."
            )
        if not record.found:
            raise record_error(name, f"layer {block.layer_index}: {mismatch}")
        raise UserError(
            f"Model type '{name}' cannot be pruned: the structure of a tiny copy does not fit layer "
            f"{block.layer_index} of this model: {mismatch}. Write a record in a file that --import names "
            "(docs/extend.md, 'A model family')."
        )
    check_untied(model)
    if not any(block.neurons for block in blocks_of(model)):
        raise UserError(f"Model type '{name}' cannot be pruned: no layer has the FFN that was found on a tiny copy.")


def check_untied(model: PreTrainedModel) -> None:
    """Raise UserError if two layers share a tensor that units are sliced from."""
    owners: dict[int, str] = {}  # id of a parameter -> the first place where it is used
    layers = decoder_layers(model)
    for u in units_of(model):
        for s in u.slices:
            place = f"'{s.path}' of layer {u.layer}"
            first_place = owners.setdefault(id(attribute_at(layers[u.layer], s.path)), place)
            if first_place != place:
                raise UserError(
                    f"Model type '{model.config.model_type}' cannot be pruned: {place} and {first_place} are one "
                    "tensor, so removing a unit of one layer would remove weights of the other."
                )


def record_error(name: str, problem: str) -> UserError:
    """Return the error for a wrong record of a user."""
    return UserError(
        f"Cannot use the Family record of model type '{name}': {problem}. Correct the record (docs/extend.md, 'A model "
        "family'), or remove it, so that gprune finds the structure itself."
    )


def _check_paths(name: str, record: Family, layer: nn.Module) -> None:
    """Raise UserError if a record, which was not discovered, has a path that the first layer does not have."""
    known = [path for path, _ in layer.named_modules() if path]
    fields = ["query", "key", "value", "output", "query_norm", "key_norm", "ffn_norm", "attention_norm"]
    if not record.experts or attribute_at(layer, record.experts) is None:
        fields += ["gate", "up", "down"]
    for field in fields:
        path = getattr(record, field)
        if path is not None and path not in known:
            close = closest_name(path, known)
            hint = f"; did you mean '{close}'?" if close else f"; it has {', '.join(known)}"
            raise record_error(name, f"{field}='{path}' is not a module of {type(layer).__name__}{hint}")


def _size_mismatch(block: Block, config: PreTrainedConfig) -> str | None:
    """Return why the sizes of a block do not fit its record, or None if they do."""
    if block.output is not None:
        columns, rows = block.output.in_features, block.value.out_features
        if not block.kv_groups or rows % block.head_dim or columns % block.head_dim or columns % block.kv_groups:
            return f"{columns} attention channels and {rows} value rows do not divide into heads of {block.head_dim}"
    for u in units_of_blocks([block], config):
        for s in u.slices:
            size = attribute_at(block.layer, s.path).shape[s.dim]
            if size != len(s.unit) or (u.kind == "experts" and size < block.experts):
                return f"'{s.path}' has {size} rows, where {len(s.unit)} belong to its units"
    return None
