"""Find what depends on the number of experts: rows of the router, its biases, and attributes.

Two models without weights are compared, which differ in one number of the configuration. What has another shape in the
smaller one has an index per expert. So the configuration of a model with fewer experts gives exactly these shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.discovery.probe import Probe, first_layer_with, is_linear
from gprune.models.copies import skeleton
from gprune.models.families import Place, decoder_layers, record_of
from gprune.models.paths import is_inside
from gprune.models.units import places_in, units_at

Values = dict[str, Any]  # by path in a layer


class NotFoundError(Exception):
    """Whole experts cannot be removed; the message is the reason."""


def with_router(probe: Probe, place: Place) -> Place:
    """Return a place of experts with the tensors, attributes and setting that depend on their number.

    Raises:
        NotFoundError: if no number of the configuration is the number of experts, or something else depends on it.
    """
    layer = probe.layers[first_layer_with(probe, place)]
    experts = units_at(layer, place, probe.model.config).rows
    before = _layers_of(probe, copy.deepcopy(probe.model.config))
    for key, config in _smaller_configs(probe, experts):
        try:
            after = _layers_of(probe, config)
        except Exception:  # a class may reject the number
            continue
        found = [
            _per_expert(layer, smaller, place, experts)
            for index, (layer, smaller) in enumerate(zip(before, after, strict=True))
            if places_in(probe.layers[index], [place])
        ]  # fmt: skip
        if not found or not found[0][0]:
            continue
        if any(fields != found[0] for fields in found):
            raise NotFoundError("its routers differ between layers")
        per_expert, counts = found[0]
        attributes = {**place.attributes, **dict.fromkeys(counts, "experts")}
        settings = {**place.settings}
        if type(getattr(probe.config, key)) is int:
            settings[key] = "experts"
        return replace(place, per_expert=per_expert, attributes=attributes, settings=settings)
    raise NotFoundError("no number in its configuration is the number of experts alone")


def _smaller_configs(probe: Probe, experts: int) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield (key, configuration of half as many experts) for each key that may be the number of experts."""
    for key, value in probe.config.to_dict().items():
        numbers = value if isinstance(value, list) else [value]
        if "expert" not in key or experts not in numbers:
            continue
        config = copy.deepcopy(probe.model.config)
        smaller = [experts // 2 if number == experts else number for number in numbers]
        setattr(config.get_text_config(decoder=True), key, smaller if isinstance(value, list) else smaller[0])
        yield key, config


def _layers_of(probe: Probe, config: PreTrainedConfig) -> list[tuple[Values, Values]]:
    """Return the shapes of tensors and the whole numbers in attributes of each layer of a model without weights."""
    model: PreTrainedModel = skeleton(config, type(probe.model), record=record_of(probe.model))
    return [(_shapes(layer), _counts(layer)) for layer in decoder_layers(model)]


def _shapes(layer: nn.Module) -> Values:
    """Return the shapes of parameters and buffers."""
    tensors: list[tuple[str, Tensor]] = [*layer.named_parameters(), *layer.named_buffers()]
    return {path: tuple(tensor.shape) for path, tensor in tensors}


def _counts(layer: nn.Module) -> Values:
    """Return whole numbers in attributes of modules, without those of linear layers, which follow from weights."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in layer.named_modules() for name, value in vars(module).items()
        if type(value) is int and not (is_linear(module) and name in ("in_features", "out_features", "nx", "nf"))
    }  # fmt: skip


def _per_expert(
    layer: tuple[Values, Values], smaller: tuple[Values, Values], place: Place, experts: int
) -> tuple[dict[str, int], list[str]]:
    """Return the tensors of a layer that depend on the number of experts, with their dimension, and the attributes.

    Tensors with neurons are left out: they are those of the place, and have experts in their first dimension. Both
    results are empty if no tensor is outside of the experts, as those of a router are.
    """
    (shapes, counts), (smaller_shapes, smaller_counts) = layer, smaller
    removed, per_expert = experts - experts // 2, {}
    for path, shape in shapes.items():
        other = smaller_shapes.get(path)
        if other == shape:
            continue
        differing = [dim for dim, sizes in enumerate(zip(shape, other or (), strict=False)) if len(set(sizes)) > 1]
        if other is None or len(other) != len(shape) or len(differing) != 1:
            raise NotFoundError(f"the shape of '{path}' depends on the number of experts in an unknown way")
        (dim,) = differing
        if shape[dim] - other[dim] != removed:
            raise NotFoundError(f"'{path}' has not one row per expert")
        if path not in place.slices:
            per_expert[path] = dim
        elif dim != 0:
            raise NotFoundError(f"'{path}' has experts in another dimension than the first")
    changed = [path for path, value in counts.items() if smaller_counts.get(path) != value]
    if any(counts[path] != experts or smaller_counts.get(path) != experts // 2 for path in changed):
        raise NotFoundError("an attribute depends on the number of experts in an unknown way")
    is_router = any(not is_inside(path, place.reads) for path in per_expert)
    return (per_expert, changed) if is_router else ({}, [])
