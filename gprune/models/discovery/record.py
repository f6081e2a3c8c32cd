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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from gprune.errors import UserError, quoting
from gprune.models import cached_records
from gprune.models.blocks import blocks_of, by_layer, check_untied, kinds_of, output_of
from gprune.models.discovery.agreement import agrees
from gprune.models.discovery.attention import attention_kinds
from gprune.models.discovery.ffn import ffn_kind
from gprune.models.discovery.probe import REMEDY, Probe, is_linear, owner_of, row_dim, separable_norms
from gprune.models.discovery.surroundings import logit_transform, norm_offset, why_it_stays
from gprune.models.families import Family
from gprune.models.lookup import remember
from gprune.models.modeling_pruned import PREFIX
from gprune.models.tiny import shrunk, stock_config, tiny_model

log = logging.getLogger("gprune")
Kind = dict[str, Any]  # fields of a record for one kind of FFN or attention


def discover(config: PreTrainedConfig) -> Family:
    """Return the record of a configuration's type, from the cache or by discovery.

    Raises:
        UserError: if discovery fails.
    """
    check_supported(config)
    with quoting(f"Cannot configure a tiny copy of model type '{name_of(config)}': ", f". {REMEDY}."):
        tiny = shrunk(stock_config(config))
    if (record := cached_records.read_record(tiny)) is None:
        record = discovered(tiny)
        cached_records.write_record(tiny, record)
        log.info("Found the structure of model type '%s' on a tiny copy", record.model_type)
    return record


def discovered(tiny: PreTrainedConfig) -> Family:
    """Return the record of a tiny configuration's type; UserError as for `discover`."""
    with quoting(f"Cannot make a tiny copy of model type '{tiny.model_type}': ", f". {REMEDY}."):
        model = tiny_model(tiny)
    doing = f"Cannot find the structure of model type '{tiny.model_type}': "
    with quoting(doing, f". {REMEDY}."), torch.enable_grad():
        return discover_record(model)


def discover_record(model: PreTrainedModel) -> Family:
    """Return the record of a tiny random model. Raise UserError if no FFN can be pruned.

    1. Every weight that returns hidden states may be an output projection.
    2. Rows that vanish with one of its columns belong to a neuron. Rows that vanish with a group of columns belong to a
       KV group. Together with the norms around them they are a candidate (`candidates`).
    3. A candidate is accepted if the masked and the sliced model agree.
    4. The record has all accepted candidates and the computation of logits, and is checked as a whole. FFNs next to a
       larger one of the same layer may not be prunable (`why_it_stays`).
    """
    probe = Probe(model)
    probe.check_forward()
    base = Family(
        probe.name, layers=probe.layers_path, decoder=probe.decoder_path, found=True,
        **dict.fromkeys((*PATHS, "ffn_norm", "attention_norm")),
    )  # fmt: skip
    with separable_norms(probe.layers):
        proposed = sorted(candidates(probe), key=lambda row: -row[2])
    kept: dict[str, list[Kind]] = {"ffn": [], "attention": []}
    refused = []
    for scope, kind, _ in proposed:
        alone = {"ffn": [], "attention": []} | {scope: [kind]}
        if agrees(probe, with_kinds(base, alone)):
            drop_needless_attributes(probe, base, kind, alone)
            kept[scope].append(kind)
        else:
            refused.append(output_of(kind))
    if not kept["ffn"]:
        why = f"slicing and masking {', '.join(refused)} give different results" if refused else "they have no FFN"
        raise UserError(
            f"Cannot find the structure of model type '{probe.name}': no FFN whose neurons can be removed. A tiny copy "
            f"has {len(probe.layers)} layers in '{probe.layers_path}', but {why}. {REMEDY}."
        )
    for scope, index, kind in beside_larger_ones(probe, kept):
        if scope == "ffn" and (why := why_it_stays(probe, index, kind)) is not None:
            kind["stays"] = why
    record = whole_record(probe, base, kept)
    if not agrees(probe, record):
        for _, _, kind in beside_larger_ones(probe, kept):
            kind["stays"] = "slicing and masking disagree together with a larger one of its layer"
        record = whole_record(probe, base, kept)
        if not agrees(probe, record):
            raise UserError(
                f"Cannot find the structure of model type '{probe.name}': slicing and masking all parts together give "
                f"different results. {REMEDY}."
            )
    check_untied(probe.model)
    return record


def beside_larger_ones(probe: Probe, kept: Mapping[str, list[Kind]]) -> Iterator[tuple[str, int, Kind]]:
    """Yield (scope, number of a layer, kind) for kinds that are not the largest in some layer, each once."""
    seen: list[Kind] = []
    for index, layer in enumerate(probe.layers):
        for scope, kinds in kept.items():
            for kind, _ in kinds_of(layer, kinds)[1:]:
                if not any(kind is other for other in seen):
                    seen.append(kind)
                    yield scope, index, kind


def whole_record(probe: Probe, base: Family, kept: Mapping[str, list[Kind]]) -> Family:
    """Return the record with these kinds, config keys of sizes, norms, positions and logits."""
    for kind in kept["ffn"]:
        kind.pop("width", None)
    sizes = sizes_in_config(probe, with_kinds(base, kept))
    for kind, key in zip(kept["ffn"], sizes.pop("widths"), strict=True):
        kind |= {"width": key}
    return replace(with_kinds(base, kept), **around(probe, kept), **sizes)


PATHS = ("gate", "up", "down", "query", "key", "value", "output")  # fields of a record that differ between kinds


def candidates(probe: Probe) -> Iterator[tuple[str, Kind, int]]:
    """Yield candidates of FFN and attention: scope, fields of a record, and size of the projection."""
    alike: dict[tuple[Any, ...], dict[int, tuple[Tensor, int]]] = {}  # layers by output projection
    for index, layer in enumerate(probe.layers):
        for path, weight, dim in output_projections(layer, probe.hidden_size):
            owner = type(layer.get_submodule(owner_of(owner_of(path)))).__name__
            alike.setdefault((path, owner, weight.shape), {})[index] = (weight, dim)
    seen: set[str] = set()
    for (path, _, _), places in alike.items():
        for scope, index, kind in kinds_at(probe, path, places):
            if (text := json.dumps(kind, sort_keys=True)) not in seen:
                seen.add(text)
                yield scope, kind, places[index][0].numel()


def output_projections(layer: nn.Module, hidden_size: int) -> Iterator[tuple[str, Tensor, int]]:
    """Yield possible output projections of a layer: path, weight, dimension of columns."""
    for path, module in layer.named_modules():
        if is_linear(module):
            rows = row_dim(module)
            if module.weight.shape[rows] == hidden_size and module.weight.shape[1 - rows] > 1:
                yield f"{path}.weight", module.weight, 1 - rows
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] > 1 and hidden_size in parameter.shape[1:]:
                _E, a, b = parameter.shape
                if a != b:
                    yield f"{path}.{name}".lstrip("."), parameter, 2 if a == hidden_size else 1


def kinds_at(probe: Probe, path: str, places: Mapping[int, tuple[Tensor, int]]) -> Iterator[tuple[str, int, Kind]]:
    """Yield kinds of FFN or attention with an output projection: scope, number of the layer, fields of a record."""
    weight, dim = next(iter(places.values()))
    size = weight.shape[dim]
    live = {index: probe.live(index, path, dim) for index in places}  # excludes neurons with ReLU that never fire
    in_all = torch.stack(list(live.values())).all(0)
    neuron = int(in_all[1:].int().argmax()) + 1
    one, half = (
        probe.vanishing(places, torch.arange(*ends), path) for ends in ((neuron, neuron + 1), (1, 1 + size // 2))
    )
    rest = {}
    for index, rows in one.items():
        # In an FFN each neuron has its own rows, so the number of vanishing rows is proportional to columns.
        neurons = int(live[index][1 : 1 + size // 2].sum())
        of_neurons = rows and {key: len(r) * neurons for key, r in rows.items()} == {
            key: len(r) for key, r in half[index].items()
        }
        if of_neurons and (kind := ffn_kind(probe, index, path, size, neuron, rows)) is not None:
            yield "ffn", index, kind
        elif weight.dim() == 2:
            rest[index] = places[index]
    if rest:
        for index, kind in attention_kinds(probe, path, rest, size):
            yield "attention", index, kind


def with_kinds(base: Family, kinds: Mapping[str, list[Kind]]) -> Family:
    """Return a record with these kinds of FFN and attention."""
    return replace(base, kinds=cached_records.frozen((kinds["ffn"], kinds["attention"])))


def drop_needless_attributes(probe: Probe, base: Family, kind: Kind, kinds: Mapping[str, list[Kind]]) -> None:
    """Remove attributes with sizes that do not affect the result."""
    for path in list(kind["attributes"]):
        meaning = kind["attributes"].pop(path)
        if not agrees(probe, with_kinds(base, kinds)):
            kind["attributes"][path] = meaning


def around(probe: Probe, kinds: Mapping[str, list[Kind]]) -> dict[str, Any]:
    """Return fields of a record for norms, positions and logits."""
    found: dict[str, Any] = logit_transform(probe)
    for path in (kind["ffn_norm"] for kind in kinds["ffn"]):
        layer = next((layer for layer in probe.layers if path and dict(layer.named_modules()).get(path)), None)
        if layer is not None and isinstance(getattr(layer.get_submodule(path), "weight", None), Tensor):
            found["norm_offset"] = norm_offset(layer.get_submodule(path))
            break
    limit = getattr(probe.config, "max_position_embeddings", None)
    tables = [m.num_embeddings for m in probe.decoder.modules() if isinstance(m, nn.Embedding) and type(limit) is int]
    return found | {"learned_positions": any(limit <= rows <= limit + 2 for rows in tables)}


def sizes_in_config(probe: Probe, record: Family) -> dict[str, Any]:
    """Return config keys of numbers of units, which are needed to export stock folders.

    `widths` has the key of each kind of FFN.
    """
    remember(probe.model, record)
    blocks = blocks_of(probe.model)
    sizes = {n: v for n, v in probe.config.to_dict().items() if type(v) is int}

    def key(counts: set[int], words: tuple[str, ...]) -> str | None:
        return next((n for n, v in sizes.items() if {v} == counts and any(word in n for word in words)), None)

    counts: list[set[int]] = [set() for _ in record.kinds[0]]
    for own, layer in zip(by_layer(blocks), probe.layers, strict=True):
        pruned = [kind for kind, stays in kinds_of(layer, record.kinds[0]) if stays is None]
        for block, kind in zip(own, pruned, strict=False):
            counts[record.kinds[0].index(kind)].add(block.neurons)
    widths = [key(of_kind, ("inter", "ffn", "inner", "d_ff")) or "" for of_kind in counts]
    groups = {block.kv_groups for block in blocks if block.kv_groups}
    return {"width": "", "widths": widths, "kv_heads": key(groups, ("kv", "key_value", "multi_query"))}


def name_of(config: PreTrainedConfig) -> str:
    """Return the type of a configuration; for exports of gprune, the type of the stock class."""
    return config.model_type.removeprefix(PREFIX)


def check_supported(config: PreTrainedConfig) -> None:
    """Raise UserError unless a configuration is of an unquantised decoder that predicts next tokens."""
    named = f"Model type '{name_of(config)}'"
    if (method := getattr(config, "quantization_config", None)) is not None:
        method = (method if isinstance(method, Mapping) else vars(method)).get("quant_method")
        raise UserError(
            f"{named} must have weights in float32, bfloat16 or float16; got a quantised checkpoint "
            f"({getattr(method, 'value', method)}). Prune the original weights, and quantise the result."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{named} must be a decoder; got an encoder-decoder.")
    stock = type(stock_config(config))
    if stock not in MODEL_FOR_CAUSAL_LM_MAPPING and stock not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"{named} needs a class in transformers that predicts next tokens (AutoModelForCausalLM). {REMEDY}."
        )
