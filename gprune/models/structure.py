"""Check the record of a model: paths and sizes on the model without weights, and for records of users also norms and
logits on a tiny random copy."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.errors import UserError, first_line, nearest
from gprune.models.blocks import Block, blocks_of, check_untied
from gprune.models.families import BUILT_IN, FAMILIES, PRUNED, Family
from gprune.models.lookup import decoder_of, family_of
from gprune.models.losses import LogitTransform
from gprune.models.modeling_pruned import find_parent

REMEDY = (
    "Correct the record (docs/extend.md, 'A model family'), or remove it, so that gprune finds the structure itself"
)


def check_structure(model: PreTrainedModel) -> None:
    """Raise UserError unless the record of a model fits all its layers. The model may have no weights."""
    name, record = model.config.model_type, family_of(model)
    try:
        layers = [block.layer for block in blocks_of(model)]
    except AttributeError as error:
        raise _wrong(name, f"its decoder has no layers '{record.layers}'") from error
    for layer in layers[:1] if not record.kinds else []:
        _check_paths(name, record, layer)
    for block in blocks_of(model):
        why = _unfit(block)
        if why and BUILT_IN.get(record.model_type) is record:
            raise UserError(f"--model.name: layer {block.layer_index} of this '{name}' model cannot be pruned: {why}.")
        if why and not record.found:
            raise _wrong(name, f"layer {block.layer_index}: {why}")
        if why:
            raise UserError(
                f"Model type '{name}' cannot be pruned: the structure of a tiny copy does not fit layer "
                f"{block.layer_index} of this model: {why}. Write a record in a file that --import names "
                "(docs/extend.md, 'A model family')."
            )
    check_untied(model)
    if not any(block.neurons for block in blocks_of(model)):
        raise UserError(f"Model type '{name}' cannot be pruned: no layer has the FFN that was found on a tiny copy.")


def check_by_copy(config: PreTrainedConfig) -> None:
    """Check a record of a user on a tiny random copy. Raise UserError that names the wrong field."""
    name = config.model_type.removeprefix(PRUNED)
    if name not in FAMILIES or BUILT_IN.get(name) is FAMILIES[name]:
        return
    from gprune.models.discovery.agreement import agreement
    from gprune.models.discovery.probe import Probe
    from gprune.models.tiny import shrunk, stock_config, tiny_model

    try:
        model = tiny_model(shrunk(stock_config(config)))
        probe = Probe(model)
        probe.check_forward()
    except Exception:  # no tiny copy of this class: only shapes are checked
        return
    check_structure(model)
    record = family_of(model)
    try:
        same = agreement(probe, record).holds
    except Exception as error:
        raise _wrong(name, f"a tiny copy cannot be sliced: {first_line(error)}") from error
    if not same:
        raise _wrong(name, "the masked and the sliced tiny copy do not compute the same; a parameter may be missing")
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=probe.ids, use_cache=False).last_hidden_state
        ours = LogitTransform.of(model)(model.get_output_embeddings()(hidden))
    if (ours - probe.dense).abs().max() > 1e-3 * probe.dense.abs().max():
        raise _wrong(
            name, "logits are not head times hidden states; it needs logits_scaling, logits_multiplier or softcap"
        )
    for block in blocks_of(model)[:1]:
        _check_norms(name, probe, block)


def _check_norms(name: str, probe: object, block: Block) -> None:
    """Raise UserError if the record of a block is wrong about the norm before or after its FFN."""
    from gprune.models.discovery.surroundings import joins_residual, norm_offset

    if block.down is not None and not block.has_experts:
        direct = joins_residual(probe, block.layer_index, block.family.down)
        if direct != block.joins_residual("down"):
            said = "needs after_ffn" if not direct else "has after_ffn, but nothing follows the FFN"
            raise _wrong(name, f"it {said}: a norm between the output of the FFN and the residual")
    if block.ffn_norm is not None and isinstance(getattr(block.ffn_norm, "weight", None), nn.Parameter):
        offset = norm_offset(block.ffn_norm)
        if offset != block.family.norm_offset:
            raise _wrong(name, f"it needs norm_offset={offset}: the norms multiply by {offset} + weight")


def _wrong(name: str, why: str) -> UserError:
    return UserError(f"Cannot use the Family record of model type '{name}': {why}. {REMEDY}.")


def _check_paths(name: str, record: Family, layer: nn.Module) -> None:
    """Raise UserError for a path in a record of a user that the first layer does not have."""
    known = [path for path, _ in layer.named_modules() if path]
    fields = ["query", "key", "value", "output", "query_norm", "key_norm", "ffn_norm", "attention_norm"]
    fields += ["after_ffn", "after_attention"]
    module, own = find_parent(layer, record.experts or "")
    if not hasattr(module, own):
        fields += ["gate", "up", "down"]
    for field in fields:
        path = getattr(record, field)
        if path is not None and path not in known:
            close = nearest(path, known)
            meant = f"; did you mean '{close}'?" if close else f"; it has {', '.join(known)}"
            raise _wrong(name, f"{field}='{path}' is not a module of {type(layer).__name__}{meant}")


def _unfit(block: Block) -> str | None:
    """Return why the sizes of a block do not fit its record, or None if they do."""
    if block.output is not None:
        columns, rows = block.output.in_features, block.value.out_features
        if not block.kv_groups or rows % block.head_dim or columns % block.head_dim or columns % block.kv_groups:
            return f"{columns} attention channels and {rows} value rows do not divide into heads of {block.head_dim}"
    for place in block.slices:
        parameter = block.parameter(place)
        if parameter.shape[place.dim] != len(place.units):
            return f"'{place.path}' has {parameter.shape[place.dim]} rows, where {len(place.units)} belong to its units"
    return None
