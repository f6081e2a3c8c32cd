"""Discover the structure of a type that has no record, on a tiny random copy of its class.

One column of an output projection is set to zero. Rows of parameters whose gradient becomes exactly zero belong to the
unit of that column, because nothing else uses them. One column is enough to find a neuron of an FFN. For attention, the
smallest group of columns for which rows of query, key and value vanish is a KV group.

`discover_record` implements the method. Each candidate is checked on the tiny copy: slicing and masking the same units
must give the same logits. A record has only candidates that pass this check.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
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

from gprune.discovery.fit import check_untied
from gprune.discovery.probe import (
    Probe,
    first_layer_with,
    is_linear,
    logit_transform,
    norm_before,
    norm_offset,
    row_dim,
    separable_norms,
    why_it_stays,
)
from gprune.discovery.routers import NotFoundError, with_router
from gprune.discovery.tiny import shrunk, stock_config, tiny_model
from gprune.discovery.units import attention_places, ffn_place
from gprune.errors import UserError, first_line, quoting
from gprune.models.agreement import compare, random_masks
from gprune.models.experts import is_of_experts, watch_experts
from gprune.models.families import PRUNED, Family, Place, attach_record
from gprune.models.masks import masked
from gprune.models.paths import is_inside, owner_of
from gprune.models.surgery import slice_model
from gprune.models.units import REMEDY, UNITS, places_in, units_at, units_of
from gprune.storage.files import Cache, key_of
from gprune.units.structure import Units

log = logging.getLogger("gprune")
RECORDS = Cache("structures")  # by class, content of the tiny configuration, and version of transformers
FORMAT = 12  # part of their keys; increase it when results of discovery change
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
    # Code of other packages and functions of users may change between runs.
    if not module.startswith("transformers.") or dense_type in UNITS:
        return discover_from_tiny(tiny)
    settings = json.dumps(tiny.to_dict(), sort_keys=True, default=str)
    kind = f"{module}.{type(tiny).__qualname__}"
    key = key_of(kind=kind, settings=settings, transformers=transformers.__version__, format=FORMAT)
    content = RECORDS.get(key, lambda: {"record": asdict(discover_from_tiny(tiny))})
    places = {name: tuple(Place(**place) for place in content["record"][name]) for name in ("places", "refused")}
    return Family(**content["record"] | places)


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
       KV group. They are a candidate (`candidates`).
    3. A candidate is accepted if the masked and the sliced model agree (`accept_candidates`).
    4. The record has all accepted candidates and the computation of logits, and is checked as a whole. FFNs next to a
       larger one of the same layer may not be prunable (`why_it_stays`). Refused FFNs, and experts that are not a
       candidate (`experts_without_units`), are in the record, so that plans name them.

    If a function of a user in `UNITS` returns neurons, it is checked instead of a search.
    """
    probe = Probe(model)
    probe.check_forward()
    base = Family(probe.name, layers=probe.layers_path, decoder=probe.decoder_path, found=True)
    function = UNITS.get(probe.name)
    of_user = [u for u in function(model) if u.kind == "neurons"] if function is not None else []
    if of_user:
        return checked_units_of_user(probe, base, of_user[0])
    accepted, refused = accept_candidates(probe, base)
    refused += experts_without_units(probe, [*accepted, *refused])
    base = replace(base, refused=tuple(refused))
    others = non_largest_places(probe, accepted)
    reasons = {id(p): why_it_stays(probe, index, p) for index, p in others if p.kind == "neurons"}
    places = [replace(place, stays=reasons.get(id(place), "")) for place in accepted]
    record = build_record(probe, base, places)
    if not is_correct(probe, record):
        # Try again with only the largest FFN and attention of each layer.
        ids = [id(place) for _, place in others]
        why = "slicing and masking disagree together with a larger one of its layer"
        places = [replace(place, stays=why if id(place) in ids else "") for place in accepted]
        record = build_record(probe, base, places)
        if not is_correct(probe, record):
            raise UserError(
                f"Cannot find the structure of model type '{probe.name}': slicing and masking all parts together give "
                f"different results. {REMEDY}."
            )
    check_untied(probe.model)
    for position, place in enumerate(record.places):
        if is_expert_place(probe, place):
            places = [*record.places]
            places[position] = removable_experts(probe, record, position)
            record = replace(record, places=tuple(places))
    return record


def checked_units_of_user(probe: Probe, base: Family, neurons: Units) -> Family:
    """Return the record of a type whose units a user's function returns, such as these. Raise UserError unless they are
    correct."""
    slices = {s.path: (s.dim, "row") for s in neurons.slices}
    classes = {neurons.reads: type(probe.layers[neurons.layer].get_submodule(neurons.reads)).__name__}
    record = replace(base, **model_wide_fields(probe, [Place("neurons", neurons.reads, slices, classes)]))
    failure = f"Cannot use the function in UNITS for model type '{probe.name}'"
    attach_record(probe.model, record)
    remedy = "Correct it (docs/extend.md, 'A model type'), or remove it, so that gprune finds the units itself."
    with quoting(f"{failure}: a tiny copy cannot be sliced: ", f". {remedy}"):
        is_sliced_correctly = masked_equals_sliced(probe)
    if not is_sliced_correctly:
        raise UserError(
            f"{failure}: the masked and the sliced tiny copy do not compute the same; a slice may be missing. {remedy}"
        )
    check_untied(probe.model)
    return record


def is_expert_place(probe: Probe, place: Place) -> bool:
    """Return whether a place has experts."""
    layer = probe.layers[first_layer_with(probe, place)]
    return not is_linear(layer.get_submodule(place.reads))


def accept_candidates(probe: Probe, base: Family) -> tuple[list[Place], list[Place]]:
    """Return the candidates for which the masked and the sliced model agree, and the refused FFNs, largest first.

    FFNs come before attentions.
    """
    with separable_norms(probe.layers):
        largest_first = sorted(candidates(probe), key=lambda candidate: -candidate[1])
    accepted: list[Place] = []
    refused: list[Place] = []
    for place, _ in largest_first:
        ffns = [other for other in refused if other.kind == "neurons"]
        if not is_correct(probe, replace(base, places=(place,))):
            refused.append(replace(place, stays="slicing and masking disagree"))
        elif place.kind == "neurons" and (why := why_it_stays_next_to(probe, place, ffns)):
            refused.append(replace(place, stays=why))
        else:
            accepted.append(without_needless_attributes(probe, base, place))
    accepted.sort(key=lambda place: place.kind != "neurons")
    if not accepted or accepted[0].kind != "neurons":
        refused.sort(key=lambda place: place.kind != "neurons")
        why = ", ".join(f"{path} cannot be pruned ({why})" for path, why in {p.reads: p.stays for p in refused}.items())
        raise UserError(
            f"Cannot find the structure of model type '{probe.name}': no FFN whose neurons can be removed. A tiny copy "
            f"has {len(probe.layers)} layers in '{probe.layers_path}', but {why or 'they have no FFN'}. {REMEDY}."
        )
    return accepted, [place for place in refused if place.kind == "neurons"]


def why_it_stays_next_to(probe: Probe, place: Place, larger: Sequence[Place]) -> str:
    """Return why an FFN next to a larger, refused one is not pruned; empty if it can be, or no layer has a larger one.

    In Gemma 3n, for example, a low-rank residual layer is not taken for the FFN, which is refused.
    """
    others = [other for other in larger if other.reads != place.reads]
    for index, layer in enumerate(probe.layers):
        if places_in(layer, [place]) and places_in(layer, others):
            return why_it_stays(probe, index, place)
    return ""


def experts_without_units(probe: Probe, ffns: Sequence[Place]) -> list[Place]:
    """Return experts that are in no FFN. `ffns` are the accepted and the refused FFNs.

    They are modules with stacked weights (E, n, H) or (E, H, n), and embedding tables (E, H), each of whose rows is an
    expert, as in Doge.
    """
    known = {place.reads for place in ffns if place.kind == "neurons"}
    found: dict[str, Place] = {}
    for layer in probe.layers:
        for path, module in layer.named_modules():
            if any(is_inside(path, of_ffn) for of_ffn in known) or not has_expert_weights(module, probe.hidden_size):
                continue
            why = "without units that can be removed"
            found[path] = Place("neurons", path, classes={path: type(module).__name__}, stays=why)
    return list(found.values())


def has_expert_weights(module: nn.Module, hidden_size: int) -> bool:
    """Return whether a module has a weight (E, n, H) or (E, H, n) of its own, or is an embedding table (E, H)."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim == hidden_size
    if isinstance(module, nn.Conv1d):
        return False
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    return any(len(shape) == 3 and hidden_size in shape[1:] and min(shape[1:]) > 1 for shape in shapes)


def non_largest_places(probe: Probe, places: Sequence[Place]) -> list[tuple[int, Place]]:
    """Return (layer index, place) for each place that shares some layer with a larger one of its kind.

    Each place is returned once, with the first such layer. `places` are the accepted ones, largest first.
    """
    found: dict[int, tuple[int, Place]] = {}
    for index, layer in enumerate(probe.layers):
        for kind in ("neurons", "kv_groups"):
            in_layer = {p.reads: p for p in reversed(places) if p.kind == kind and places_in(layer, [p])}
            for place in reversed([*in_layer.values()][:-1]):
                found.setdefault(id(place), (index, place))
    return list(found.values())


def build_record(probe: Probe, base: Family, places: Sequence[Place]) -> Family:
    """Return `base` with these places, the config keys of their sizes, norms, positions and logits."""
    attach_record(probe.model, replace(base, places=tuple(places)))
    groups = {u.count for u in units_of(probe.model) if u.kind == "kv_groups" and u.count}
    heads = {"num_attention_heads": "heads"} | named_setting(
        probe, groups, ("kv", "key_value", "multi_query"), "kv_groups"
    )
    with_settings = []
    for place in places:
        pruned = [
            layer for layer in probe.layers
            if any(replace(p, stays=place.stays) == place and not p.stays for p in places_in(layer, places))
        ]  # fmt: skip
        counts = {units_at(layer, place, probe.model.config).count for layer in pruned}
        widths = named_setting(probe, counts, ("inter", "ffn", "inner", "d_ff"), "neurons")
        with_settings.append(replace(place, settings=widths if place.kind == "neurons" else heads))
    return replace(base, places=tuple(with_settings), **model_wide_fields(probe, places))


def named_setting(probe: Probe, counts: set[int], words: tuple[str, ...], size: str) -> dict[str, str]:
    """Return {key: size} for the first key of the config with one of the words in its name, whose value is the only
    count; empty without one."""
    for name, value in probe.config.to_dict().items():
        if type(value) is int and {value} == counts and any(word in name for word in words):
            return {name: size}
    return {}


def candidates(probe: Probe) -> Iterator[tuple[Place, int]]:
    """Yield candidates of FFN and attention, and the number of weights of their projection.

    Output projections with the same path, class of the module around them, and shape are examined together.
    """
    # (path, class, shape) -> number of a layer -> the projection and its dimension of columns
    projections: dict[tuple[Any, ...], dict[int, tuple[Tensor, int]]] = {}
    for index, layer in enumerate(probe.layers):
        for path, weight, dim in output_projections(layer, probe.hidden_size):
            parent = layer.get_submodule(owner_of(owner_of(path)))
            similar = projections.setdefault((path, type(parent).__name__, weight.shape), {})
            similar[index] = weight, dim
    yielded: list[Place] = []
    for (path, _, _), by_index in projections.items():
        for index, place in places_at(probe, path, by_index):
            if place not in yielded:
                yielded.append(place)
                yield place, by_index[index][0].numel()


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


def places_at(probe: Probe, path: str, projections: dict[int, tuple[Tensor, int]]) -> Iterator[tuple[int, Place]]:
    """Yield FFNs or attentions with an output projection, each with the number of a layer.

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
        place = ffn_place(probe, index, path, size, neuron, rows) if rows and is_proportional else None
        if place is not None:
            yield index, place
        elif weight.dim() == 2:
            maybe_attention[index] = projections[index]
    if maybe_attention:
        yield from attention_places(probe, path, maybe_attention, size)


def without_needless_attributes(probe: Probe, base: Family, place: Place) -> Place:
    """Return a place without the attributes that slicing does not have to update."""
    for path in list(place.attributes):
        others = {other: size for other, size in place.attributes.items() if other != path}
        if is_correct(probe, replace(base, places=(replace(place, attributes=others),))):
            place = replace(place, attributes=others)
    return place


def model_wide_fields(probe: Probe, places: Sequence[Place]) -> dict[str, Any]:
    """Return the model-wide fields of a record: norm_offset, learned_positions, and how logits are scaled or capped."""
    fields: dict[str, Any] = logit_transform(probe)
    for place in places:
        norm = norm_of_ffn(probe, place) if place.kind == "neurons" else None
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


def norm_of_ffn(probe: Probe, place: Place) -> nn.Module | None:
    """Return the norm before an FFN in the first layer that has it, or None if there is none or it has no weight."""
    index = first_layer_with(probe, place)
    module = probe.layers[index].get_submodule(place.reads)
    path = norm_before(probe, index, owner_of(next(iter(place.slices))) if is_linear(module) else place.reads)
    norm = probe.layers[index].get_submodule(path) if path else None
    return norm if isinstance(getattr(norm, "weight", None), Tensor) else None


def check_supported(config: PreTrainedConfig) -> None:
    """Raise UserError unless a configuration is of a decoder that predicts next tokens."""
    named = f"Model type '{config.model_type.removeprefix(PRUNED)}'"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{named} must be a decoder; got an encoder-decoder.")
    stock_class = type(stock_config(config))
    if stock_class not in MODEL_FOR_CAUSAL_LM_MAPPING and stock_class not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"{named} needs a class in transformers that predicts next tokens (AutoModelForCausalLM). Convert the "
            "checkpoint to such a class (docs/extend.md, 'A model type'), or choose a type in docs/architectures.md."
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


def removable_experts(probe: Probe, record: Family, position: int) -> Place:
    """Return the place of experts number `position` with what depends on their number, or why they cannot be removed.

    Half of the experts are removed, by masks and by slicing, which must give the same logits.
    """
    place = record.places[position]
    attach_record(probe.model, record)
    try:
        removable = with_router(probe, place)
        places = [removable if other is place else other for other in record.places]
        attach_record(probe.model, replace(record, places=tuple(places)))
        can_be_removed = masked_equals_sliced(probe, scope="attention+ffn+experts")
    except NotFoundError as error:
        return replace(place, whole_experts=str(error))
    except Exception as error:
        log.debug("%s: %s", place, first_line(error))
        return replace(place, whole_experts=f"a tiny copy fails, {first_line(error)}")
    return removable if can_be_removed else replace(place, whole_experts="slicing and masking disagree")


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
