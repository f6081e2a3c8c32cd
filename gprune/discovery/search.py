"""Discover the structure of a type that has no record, on a tiny random copy of its class.

One column of an output projection is set to zero. Rows of parameters whose gradient becomes exactly zero belong to the
unit of that column, because nothing else uses them. One column is enough to find a neuron of an FFN. For attention, the
smallest group of columns for which rows of query, key and value vanish is a KV group.

`discover_record` implements the method. Each candidate is checked on the tiny copy: slicing and masking the same units
must give the same logits. A record has only candidates that pass this check.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from gprune.discovery.fit import check_fit, check_untied, record_error
from gprune.discovery.probe import (
    REMEDY,
    Probe,
    is_linear,
    logit_transform,
    norm_offset,
    owner_of,
    row_dim,
    separable_norms,
    why_it_stays,
)
from gprune.discovery.routers import NotFoundError, router_fields
from gprune.discovery.tiny import shrunk, stock_config, tiny_model
from gprune.discovery.units import attention_kinds, ffn_kind
from gprune.errors import UserError, first_line, quoting
from gprune.models.agreement import compare, random_masks
from gprune.models.blocks import Block, blocks_of, by_layer, kinds_of, output_of
from gprune.models.experts import is_of_experts, watch_experts
from gprune.models.families import FAMILIES, PRUNED, Family, attach_record, decoder_of
from gprune.models.losses import LogitTransform, head_input
from gprune.models.masks import masked
from gprune.models.parts import ATTENTION, FFN, is_inside
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.storage.files import Cache, key_of

log = logging.getLogger("gprune")
Kind = dict[str, Any]  # fields of a record for one kind of FFN or attention
RECORDS = Cache("structures")  # by class, content of the tiny configuration, and version of transformers
FORMAT = 11  # part of their keys; increase it when results of discovery change
# Both bounds were measured on all types in transformers: masks change logits by 0.07 or more of the largest logit, and
# masked and sliced models differ by at most 2e-5 of that change.
MIN_MASK_EFFECT = 1e-4  # relative to the largest logit; smaller changes may be rounding errors
MAX_SLICING_ERROR = 1e-3  # relative to the mask effect


def discover(config: PreTrainedConfig) -> Family:
    """Return the record of a configuration's type, from the cache or by discovery."""
    check_supported(config)
    dense_type = config.model_type.removeprefix(PRUNED)
    with quoting(f"Cannot configure a tiny copy of model type '{dense_type}': ", f". {REMEDY}."):
        tiny = shrunk(config)
    module = type(tiny).__module__
    if not module.startswith("transformers."):  # code of other packages may change between runs
        return discover_from_tiny(tiny)
    settings = json.dumps(tiny.to_dict(), sort_keys=True, default=str)
    kind = f"{module}.{type(tiny).__qualname__}"
    key = key_of(kind=kind, settings=settings, transformers=transformers.__version__, format=FORMAT)
    content = RECORDS.get(key, lambda: {"record": asdict(discover_from_tiny(tiny))})
    return Family(**content["record"])


def discover_from_tiny(tiny: PreTrainedConfig) -> Family:
    """Build a random model from a tiny configuration, and return the record of its type."""
    with quoting(f"Cannot make a tiny copy of model type '{tiny.model_type}': ", f". {REMEDY}."):
        model = tiny_model(tiny)
    failure = f"Cannot find the structure of model type '{tiny.model_type}': "
    with quoting(failure, f". {REMEDY}."), torch.enable_grad():
        record = discover_record(model)
    log.info("Found the structure of model type '%s' on a tiny copy", record.model_type)
    return record


def discover_record(model: PreTrainedModel) -> Family:
    """Return the record of a tiny random model. Raise UserError if no FFN can be pruned.

    1. Every weight that returns hidden states may be an output projection.
    2. Rows that vanish with one of its columns belong to a neuron. Rows that vanish with a group of columns belong to a
       KV group. Together with the norms around them they are a candidate (`candidates`).
    3. A candidate is accepted if the masked and the sliced model agree (`accept_candidates`).
    4. The record has all accepted candidates and the computation of logits, and is checked as a whole. FFNs next to a
       larger one of the same layer may not be prunable (`why_it_stays`). Refused FFNs, and experts that are not a
       candidate (`experts_without_units`), are in the record, so that plans name them.
    """
    probe = Probe(model)
    probe.check_forward()
    base = Family(
        probe.name, layers=probe.layers_path, decoder=probe.decoder_path, found=True,
        **dict.fromkeys((*FFN, *ATTENTION, "ffn_norm", "attention_norm")),  # fields of kinds
    )  # fmt: skip
    accepted, refused = accept_candidates(probe, base)
    refused += experts_without_units(probe, [*accepted["ffn"], *refused])
    base = replace(base, refused=tuple(refused))
    for scope, index, kind in non_largest_kinds(probe, accepted):
        if scope == "ffn" and (why := why_it_stays(probe, index, kind)) is not None:
            kind["stays"] = why
    record = build_record(probe, base, accepted)
    if not is_correct(probe, record):
        # Try again with only the largest FFN and attention of each layer.
        for _, _, kind in non_largest_kinds(probe, accepted):
            kind["stays"] = "slicing and masking disagree together with a larger one of its layer"
        record = build_record(probe, base, accepted)
        if not is_correct(probe, record):
            raise UserError(
                f"Cannot find the structure of model type '{probe.name}': slicing and masking all parts together give "
                f"different results. {REMEDY}."
            )
    check_untied(probe.model)
    for kind in accepted["ffn"]:
        if "experts" in kind:
            kind |= whole_expert_fields(probe, base, accepted, kind)
    return build_record(probe, base, accepted)


def accept_candidates(probe: Probe, base: Family) -> tuple[dict[str, list[Kind]], list[Kind]]:
    """Return the candidates for which the masked and the sliced model agree, by scope, and the refused FFNs.

    Candidates with the largest projection come first. Refused FFNs are in the form of `Family.refused`.
    """
    with separable_norms(probe.layers):
        largest_first = sorted(candidates(probe), key=lambda candidate: -candidate[2])
    accepted: dict[str, list[Kind]] = {"ffn": [], "attention": []}
    refused: dict[str, list[Kind]] = {"ffn": [], "attention": []}
    for scope, kind, _ in largest_first:
        alone = {"ffn": [], "attention": []} | {scope: [kind]}
        if not is_correct(probe, with_kinds(base, alone)):
            refused[scope].append(refused_kind(kind, "slicing and masking disagree"))
        elif scope == "ffn" and (why := why_it_stays_next_to(probe, kind, refused["ffn"])) is not None:
            refused[scope].append(refused_kind(kind, why))
        else:
            drop_needless_attributes(probe, base, kind, alone)
            accepted[scope].append(kind)
    if not accepted["ffn"]:
        reasons = {output_of(kind): kind["stays"] for kind in [*refused["ffn"], *refused["attention"]]}
        why = ", ".join(f"{path} cannot be pruned ({reason})" for path, reason in reasons.items())
        raise UserError(
            f"Cannot find the structure of model type '{probe.name}': no FFN whose neurons can be removed. A tiny copy "
            f"has {len(probe.layers)} layers in '{probe.layers_path}', but {why or 'they have no FFN'}. {REMEDY}."
        )
    return accepted, refused["ffn"]


def why_it_stays_next_to(probe: Probe, kind: Kind, larger: Sequence[Kind]) -> str | None:
    """Return why an FFN next to a larger, refused one is not pruned; None if it can be, or no layer has a larger one.

    In Gemma 3n, for example, a low-rank residual layer is not taken for the FFN, which is refused.
    """
    others = [other for other in larger if output_of(other) != output_of(kind)]
    for index, layer in enumerate(probe.layers):
        if kinds_of(layer, [kind]) and kinds_of(layer, others):
            return why_it_stays(probe, index, kind)
    return None


def refused_kind(kind: Kind, why: str) -> Kind:
    """Return the fields of a kind that `Family.refused` has, with the reason."""
    output_field = next(name for name in ("experts", "down", "output") if name in kind)
    return {output_field: kind[output_field], "classes": kind["classes"], "stays": why}


def experts_without_units(probe: Probe, ffns: Sequence[Kind]) -> list[Kind]:
    """Return experts that are in no FFN, in the form of `Family.refused`.

    They are modules with stacked weights (E, n, H) or (E, H, n), and embedding tables (E, H), each of whose rows is an
    expert, as in Doge. `ffns` are the accepted and the refused FFNs.
    """
    known = {output_of(kind) for kind in ffns}
    found: dict[str, Kind] = {}
    for layer in probe.layers:
        for path, module in layer.named_modules():
            if any(is_inside(path, of_ffn) for of_ffn in known) or not has_expert_weights(module, probe.hidden_size):
                continue
            classes = {path: type(module).__name__}
            found[path] = {"experts": path, "classes": classes, "stays": "without units that can be removed"}
    return list(found.values())


def has_expert_weights(module: nn.Module, hidden_size: int) -> bool:
    """Return whether a module has a weight (E, n, H) or (E, H, n) of its own, or is an embedding table (E, H)."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim == hidden_size
    if isinstance(module, nn.Conv1d):
        return False
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    return any(len(shape) == 3 and hidden_size in shape[1:] and min(shape[1:]) > 1 for shape in shapes)


def non_largest_kinds(probe: Probe, kinds: Mapping[str, list[Kind]]) -> Iterator[tuple[str, int, Kind]]:
    """Yield (scope, layer index, kind) for each kind that shares some layer with a larger kind of its scope.

    Each kind is yielded once, with the first such layer. `kinds` has the accepted kinds by scope, largest first.
    """
    yielded: list[Kind] = []
    for index, layer in enumerate(probe.layers):
        for scope, kinds_of_scope in kinds.items():
            for kind, _ in kinds_of(layer, kinds_of_scope)[1:]:
                if not any(kind is other for other in yielded):  # `in` would compare contents
                    yielded.append(kind)
                    yield scope, index, kind


def build_record(probe: Probe, base: Family, kinds: Mapping[str, list[Kind]]) -> Family:
    """Return `base` with these kinds, the config keys of their sizes, norms, positions and logits.

    The config key of the width of each kind of FFN is also written into the kind.
    """
    for kind in kinds["ffn"]:
        kind.pop("width", None)
    keys = sizes_in_config(probe, with_kinds(base, kinds))
    for kind, width_key in zip(kinds["ffn"], keys.pop("widths"), strict=True):
        kind["width"] = width_key
    return replace(with_kinds(base, kinds), **model_wide_fields(probe, kinds), **keys)


def candidates(probe: Probe) -> Iterator[tuple[str, Kind, int]]:
    """Yield candidates of FFN and attention: scope, fields of a record, and number of weights of the projection.

    Output projections with the same path, class of the module around them, and shape are examined together.
    """
    # (path, class, shape) -> number of a layer -> the projection and its dimension of columns
    projections: dict[tuple[Any, ...], dict[int, tuple[Tensor, int]]] = {}
    for index, layer in enumerate(probe.layers):
        for path, weight, dim in output_projections(layer, probe.hidden_size):
            parent = layer.get_submodule(owner_of(owner_of(path)))
            similar = projections.setdefault((path, type(parent).__name__, weight.shape), {})
            similar[index] = weight, dim
    yielded: set[str] = set()
    for (path, _, _), by_index in projections.items():
        for scope, index, kind in kinds_at(probe, path, by_index):
            text = json.dumps(kind, sort_keys=True)
            if text not in yielded:
                yielded.add(text)
                weight, _ = by_index[index]
                yield scope, kind, weight.numel()


def output_projections(layer: nn.Module, hidden_size: int) -> Iterator[tuple[str, Tensor, int]]:
    """Yield weights of a layer that may be output projections: path, weight, dimension of columns.

    They are matrices of linear layers with `hidden_size` outputs, and stacked parameters (E, n, H) or (E, H, n).
    """
    for path, module in layer.named_modules():
        if is_linear(module):
            rows = row_dim(module)
            columns = 1 - rows
            if module.weight.shape[rows] == hidden_size and module.weight.shape[columns] > 1:
                yield f"{path}.weight", module.weight, columns
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] > 1 and hidden_size in parameter.shape[1:]:
                _E, first, second = parameter.shape
                if first != second:  # else it is unknown which dimension has the hidden states
                    columns = 2 if first == hidden_size else 1
                    yield f"{path}.{name}".lstrip("."), parameter, columns


def kinds_at(probe: Probe, path: str, projections: Mapping[int, tuple[Tensor, int]]) -> Iterator[tuple[str, int, Kind]]:
    """Yield kinds of FFN or attention with an output projection: scope, number of the layer, fields of a record.

    In an FFN each neuron has its own rows, so the number of vanishing rows is proportional to the number of columns.
    Other projections may be those of attention.
    """
    weight, dim = next(iter(projections.values()))
    size = weight.shape[dim]
    live = {index: probe.live(index, path, dim) for index in projections}  # excludes neurons with ReLU that never fire
    live_in_all = torch.stack(list(live.values())).all(0)
    # Not column 0: its rows come first in every order of gate and up.
    neuron = int(live_in_all[1:].int().argmax()) + 1
    half = slice(1, 1 + size // 2)
    rows_of_neuron = probe.vanishing(projections, torch.arange(neuron, neuron + 1), path)
    rows_of_half = probe.vanishing(projections, torch.arange(half.start, half.stop), path)
    maybe_attention = {}
    for index, rows in rows_of_neuron.items():
        live_neurons = int(live[index][half].sum())
        expected = {key: len(indices) * live_neurons for key, indices in rows.items()}
        is_proportional = expected == {key: len(indices) for key, indices in rows_of_half[index].items()}
        kind = ffn_kind(probe, index, path, size, neuron, rows) if rows and is_proportional else None
        if kind is not None:
            yield "ffn", index, kind
        elif weight.dim() == 2:
            maybe_attention[index] = projections[index]
    if maybe_attention:
        for index, kind in attention_kinds(probe, path, maybe_attention, size):
            yield "attention", index, kind


def with_kinds(base: Family, kinds: Mapping[str, list[Kind]]) -> Family:
    """Return a record with these kinds of FFN and attention."""
    return replace(base, kinds=copy.deepcopy((kinds["ffn"], kinds["attention"])))


def drop_needless_attributes(probe: Probe, base: Family, kind: Kind, kinds: Mapping[str, list[Kind]]) -> None:
    """Remove attributes of a kind in place if slicing stays correct without updating them.

    `kinds`, by scope, contains only `kind`.
    """
    for path in list(kind["attributes"]):
        meaning = kind["attributes"].pop(path)
        if not is_correct(probe, with_kinds(base, kinds)):
            kind["attributes"][path] = meaning


def model_wide_fields(probe: Probe, kinds: Mapping[str, list[Kind]]) -> dict[str, Any]:
    """Return the model-wide fields of a record: norm_offset, learned_positions, and how logits are scaled or capped."""
    fields: dict[str, Any] = logit_transform(probe)
    for path in (kind["ffn_norm"] for kind in kinds["ffn"]):
        norm = _first_norm(probe, path)
        if norm is not None:
            fields["norm_offset"] = norm_offset(norm)
            break
    fields["learned_positions"] = False
    limit = getattr(probe.config, "max_position_embeddings", None)
    if type(limit) is int:
        tables = [module.num_embeddings for module in probe.decoder.modules() if isinstance(module, nn.Embedding)]
        # The table of OPT has two more rows than positions.
        fields["learned_positions"] = any(limit <= rows <= limit + 2 for rows in tables)
    return fields


def _first_norm(probe: Probe, path: str | None) -> nn.Module | None:
    """Return the module at a path in the first layer that has it, or None if there is none or it has no weight."""
    if not path:
        return None
    for layer in probe.layers:
        module = dict(layer.named_modules()).get(path)
        if module is not None:
            return module if isinstance(getattr(module, "weight", None), Tensor) else None
    return None


def sizes_in_config(probe: Probe, record: Family) -> dict[str, Any]:
    """Return config keys of numbers of units, which are needed to export stock folders, and attach the record.

    `widths` has the key for each kind of FFN; `width`, for the whole model, is empty.
    """
    attach_record(probe.model, record)
    blocks = blocks_of(probe.model)
    config_values = {name: value for name, value in probe.config.to_dict().items() if type(value) is int}

    def matching_key(counts: set[int], words: tuple[str, ...]) -> str | None:
        """Return the first key with one of the words in its name, if its value is the only count."""
        for name, value in config_values.items():
            if {value} == counts and any(word in name for word in words):
                return name
        return None

    ffn_kinds = record.kinds[0]
    neurons: list[set[int]] = [set() for _ in ffn_kinds]  # numbers of neurons of each kind
    for layer_blocks, layer in zip(by_layer(blocks), probe.layers, strict=True):
        pruned = [kind for kind, stays in kinds_of(layer, ffn_kinds) if stays is None]
        for block, kind in zip(layer_blocks, pruned, strict=False):
            neurons[ffn_kinds.index(kind)].add(block.neurons)
    widths = [matching_key(counts, ("inter", "ffn", "inner", "d_ff")) or "" for counts in neurons]
    kv_groups = {block.kv_groups for block in blocks if block.kv_groups}
    return {"width": "", "widths": widths, "kv_heads": matching_key(kv_groups, ("kv", "key_value", "multi_query"))}


def check_supported(config: PreTrainedConfig) -> None:
    """Raise UserError unless a configuration is of a decoder that predicts next tokens."""
    named = f"Model type '{config.model_type.removeprefix(PRUNED)}'"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{named} must be a decoder; got an encoder-decoder.")
    stock_class = type(stock_config(config))
    if stock_class not in MODEL_FOR_CAUSAL_LM_MAPPING and stock_class not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"{named} needs a class in transformers that predicts next tokens (AutoModelForCausalLM). Convert the "
            "checkpoint to such a class (docs/extend.md, 'A model family'), or choose a type in docs/architectures.md."
        )


def masked_equals_sliced(probe: Probe, *, scope: str = "attention+ffn") -> bool:
    """Return whether random masks change the logits of a probe's model, by hooks and by slicing in the same way."""
    masks = random_masks(probe.model, scope=scope)
    with masked(probe.model, masks):
        masked_logits = probe.logits()
    return agree(masked_logits, probe.logits(model=slice_model(probe.model, masks)), dense=probe.dense)


def agree(masked_logits: Tensor, sliced_logits: Tensor, *, dense: Tensor) -> bool:
    """Return whether masks change the dense logits, and slicing gives the masked logits within `MAX_SLICING_ERROR`."""
    effect = compare(masked_logits, dense)
    slicing_error = compare(masked_logits, sliced_logits).largest
    return effect.largest > MIN_MASK_EFFECT * effect.peak and slicing_error <= MAX_SLICING_ERROR * effect.largest


def is_correct(probe: Probe, record: Family) -> bool:
    """Return whether a record is correct, and attach it to the probe's model.

    A record is correct if the masked and the sliced model agree and watchers of experts get the correct tokens. Any
    exception, such as a failed slicing, means that it is not.
    """
    attach_record(probe.model, record)
    try:
        return masked_equals_sliced(probe) and watchers_get_tokens(probe)
    except Exception as error:
        log.debug("%s: %s", record, first_line(error))
        return False


def whole_expert_fields(probe: Probe, base: Family, kinds: Mapping[str, list[Kind]], kind: Kind) -> Kind:
    """Return the fields of a kind of experts for removing whole experts, or the reason why that is impossible.

    Half of the experts are removed, by masks and by slicing, which must give the same logits.
    """
    attach_record(probe.model, with_kinds(base, kinds))
    try:
        fields = router_fields(probe, kind)
        trial = {"ffn": [kind | fields if other is kind else other for other in kinds["ffn"]]}
        attach_record(probe.model, with_kinds(base, dict(kinds) | trial))
        can_be_removed = masked_equals_sliced(probe, scope="attention+ffn+experts")
    except NotFoundError as error:
        return {"whole_experts": str(error)}
    except Exception as error:
        log.debug("%s: %s", kind, first_line(error))
        return {"whole_experts": f"a tiny copy fails, {first_line(error)}"}
    return fields if can_be_removed else {"whole_experts": "slicing and masking disagree"}


def watchers_get_tokens(probe: Probe) -> bool:
    """Return whether watchers of experts are called with the correct tokens; True without experts.

    A watcher sets activations to zero from a given token on. The logits of this or a later token must change, and those
    of earlier tokens must not.
    """
    experts = [u for u in units_of(probe.model) if u.kind == "neurons" and is_of_experts(probe.layers[u.layer], u)]
    if not experts:
        return True
    first_zeroed = probe.ids.numel() * 3 // 4  # any position with tokens on both sides

    def zero_later_tokens(x: Tensor, _expert: int, tokens: Tensor) -> Tensor:
        """Watcher that sets activations to zero from token `first_zeroed` on."""
        return x * (tokens < first_zeroed)[:, None]

    with ExitStack() as watches:
        for u in experts:
            watches.callback(watch_experts(probe.layers[u.layer], u, zero_later_tokens).remove)
        difference = (probe.logits() - probe.dense).abs().flatten(0, 1).amax(-1)  # (B x T,)
        is_changed = difference > MIN_MASK_EFFECT * probe.dense.abs().max()
    return bool(is_changed[first_zeroed:].any() and not is_changed[:first_zeroed].any())


def check_by_copy(config: PreTrainedConfig) -> None:
    """Check the record of a user for a type. Raise UserError if it is wrong, with the wrong field if known.

    Nothing is checked for classes of which no tiny copy can be made.
    """
    name = config.model_type.removeprefix(PRUNED)
    try:
        model = tiny_model(shrunk(config))
        probe = Probe(model)
        probe.check_forward()
    except Exception:  # no tiny copy of this class: only shapes are checked
        return
    attach_record(model, FAMILIES[name])
    check_fit(model)
    try:
        is_sliced_correctly = masked_equals_sliced(probe)
    except Exception as error:
        raise record_error(name, f"a tiny copy cannot be sliced: {first_line(error)}") from error
    if not is_sliced_correctly:
        problem = "the masked and the sliced tiny copy do not compute the same; a parameter may be missing"
        raise record_error(name, problem)
    with torch.no_grad():
        hidden = head_input(model, decoder_of(model)(input_ids=probe.ids, use_cache=False))
        logits = LogitTransform.of(model)(model.get_output_embeddings()(hidden))
    if (logits - probe.dense).abs().max() > 1e-3 * probe.dense.abs().max():  # more than rounding errors
        fields = "logits_scaling, logits_multiplier, softcap or before_head"
        raise record_error(name, f"logits are not head times hidden states; it needs {fields}")
    for block in blocks_of(model)[:1]:  # by a record of a user, all layers have the same norms
        check_norms(name, block)


def check_norms(name: str, block: Block) -> None:
    """Raise UserError if the record of a block is wrong about the norm before its FFN."""
    if block.ffn_norm is not None and isinstance(getattr(block.ffn_norm, "weight", None), nn.Parameter):
        offset = norm_offset(block.ffn_norm)
        if offset != block.family.norm_offset:
            raise record_error(name, f"it needs norm_offset={offset}: the norms multiply by {offset} + weight")
