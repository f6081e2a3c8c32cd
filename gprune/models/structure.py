"""Check that the record of a model describes the model correctly.

Paths and sizes are checked on the model itself, which may have no weights. For records of users, norms and logits are
also checked on a tiny random copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.errors import UserError, closest_name, first_line
from gprune.models.blocks import Block, blocks_of, check_untied
from gprune.models.families import BUILT_IN, FAMILIES, PRUNED, Family
from gprune.models.lookup import decoder_of, family_of
from gprune.models.losses import LogitTransform, head_input
from gprune.models.modeling_pruned import find_parent

if TYPE_CHECKING:
    from gprune.models.discovery.probe import Probe

REMEDY = (
    "Correct the record (docs/extend.md, 'A model family'), or remove it, so that gprune finds the structure itself"
)


def check_structure(model: PreTrainedModel) -> None:
    """Raise UserError unless the record of a model fits all its layers. The model may have no weights.

    The error depends on the origin of the record: built in, of a user, or discovered.
    """
    name = model.config.model_type
    record = family_of(model)
    try:
        layers = [block.layer for block in blocks_of(model)]
    except AttributeError as error:
        raise _record_error(name, f"its decoder has no layers '{record.layers}'") from error
    if layers and not record.kinds:
        _check_paths(name, record, layers[0])
    for block in blocks_of(model):
        mismatch = _size_mismatch(block)
        if mismatch is None:
            continue
        if BUILT_IN.get(record.model_type) is record:
            raise UserError(
                f"--model.name: layer {block.layer_index} of this '{name}' model cannot be pruned: {mismatch}."
            )
        if not record.found:
            raise _record_error(name, f"layer {block.layer_index}: {mismatch}")
        raise UserError(
            f"Model type '{name}' cannot be pruned: the structure of a tiny copy does not fit layer "
            f"{block.layer_index} of this model: {mismatch}. Write a record in a file that --import names "
            "(docs/extend.md, 'A model family')."
        )
    check_untied(model)
    if not any(block.neurons for block in blocks_of(model)):
        raise UserError(f"Model type '{name}' cannot be pruned: no layer has the FFN that was found on a tiny copy.")


def why_not_measurable(model: PreTrainedModel) -> str | None:
    """Return why the perplexity of a model cannot be measured, such as "its config has no hidden_size", or None."""
    if not family_of(model).plain_head:
        return "its logits are not the product of hidden states and head"
    config = model.config.get_text_config(decoder=True)
    missing = [key for key in ("hidden_size", "vocab_size", "num_hidden_layers") if not hasattr(config, key)]
    return f"its config has no {missing[0]}" if missing else None


def check_by_copy(config: PreTrainedConfig) -> None:
    """Check a record of a user on a tiny random copy. Raise UserError if it is wrong, with the wrong field if known.

    A no-op for other records, and for classes of which no tiny copy can be made.
    """
    name = config.model_type.removeprefix(PRUNED)
    if name not in FAMILIES or BUILT_IN.get(name) is FAMILIES[name]:
        return
    # Imported late, because most models need no discovery.
    from gprune.models.discovery.agreement import compare_masked_and_sliced
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
        masked_equals_sliced = compare_masked_and_sliced(probe, record).holds
    except Exception as error:
        raise _record_error(name, f"a tiny copy cannot be sliced: {first_line(error)}") from error
    if not masked_equals_sliced:
        problem = "the masked and the sliced tiny copy do not compute the same; a parameter may be missing"
        raise _record_error(name, problem)
    with torch.no_grad():
        hidden = head_input(model, decoder_of(model)(input_ids=probe.ids, use_cache=False))
        logits = LogitTransform.of(model)(model.get_output_embeddings()(hidden))
    if (logits - probe.dense).abs().max() > 1e-3 * probe.dense.abs().max():  # more than rounding errors
        fields = "logits_scaling, logits_multiplier, softcap or before_head"
        raise _record_error(name, f"logits are not head times hidden states; it needs {fields}")
    for block in blocks_of(model)[:1]:  # by a record of a user, all layers have the same norms
        _check_norms(name, probe, block)


def _check_norms(name: str, probe: Probe, block: Block) -> None:
    """Raise UserError if the record of a block is wrong about the norm before or after its FFN."""
    from gprune.models.discovery.surroundings import joins_residual, norm_offset

    if block.down is not None and not block.has_experts:
        measured = joins_residual(probe, block.layer_index, block.family.down)
        recorded = block.joins_residual("down")
        if measured != recorded:
            problem = "has after_ffn, but nothing follows the FFN" if measured else "needs after_ffn"
            raise _record_error(name, f"it {problem}: a norm between the output of the FFN and the residual")
    if block.ffn_norm is not None and isinstance(getattr(block.ffn_norm, "weight", None), nn.Parameter):
        offset = norm_offset(block.ffn_norm)
        if offset != block.family.norm_offset:
            raise _record_error(name, f"it needs norm_offset={offset}: the norms multiply by {offset} + weight")


def _record_error(name: str, problem: str) -> UserError:
    """Return the error for a wrong record of a user."""
    return UserError(f"Cannot use the Family record of model type '{name}': {problem}. {REMEDY}.")


def _check_paths(name: str, record: Family, layer: nn.Module) -> None:
    """Raise UserError if a record of a user has a path that the first layer does not have."""
    known = [path for path, _ in layer.named_modules() if path]
    fields = ["query", "key", "value", "output", "query_norm", "key_norm", "ffn_norm", "attention_norm"]
    fields += ["after_ffn", "after_attention"]
    experts_parent, experts_name = find_parent(layer, record.experts or "")
    if not hasattr(experts_parent, experts_name):
        fields += ["gate", "up", "down"]
    for field in fields:
        path = getattr(record, field)
        if path is not None and path not in known:
            close = closest_name(path, known)
            hint = f"; did you mean '{close}'?" if close else f"; it has {', '.join(known)}"
            raise _record_error(name, f"{field}='{path}' is not a module of {type(layer).__name__}{hint}")


def _size_mismatch(block: Block) -> str | None:
    """Return why the sizes of a block do not fit its record, or None if they do."""
    if block.output is not None:
        columns, rows = block.output.in_features, block.value.out_features
        if not block.kv_groups or rows % block.head_dim or columns % block.head_dim or columns % block.kv_groups:
            return f"{columns} attention channels and {rows} value rows do not divide into heads of {block.head_dim}"
    for slice_ in block.slices:
        size = block.parameter(slice_).shape[slice_.dim]
        if size != len(slice_.units):
            return f"'{slice_.path}' has {size} rows, where {len(slice_.units)} belong to its units"
    return None
