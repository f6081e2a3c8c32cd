"""Remove masked units from the weights of a model, in the stock modules of transformers and without patching them.

Removing a neuron removes its rows of gate and up and its column of down. Removing a KV group removes its key and value
head, the query heads that share it, their columns of the output projection, and their weights in a norm over all heads.
The ratio of query to key/value heads does not change. Stock attention code infers the number of heads from shapes, or
reads it from attributes, which the family's record names and which are updated. The model's config keeps the dense
sizes. The true sizes are read from the weights (`gprune.models.units.units_of`), and `gprune.export` writes them for
other programs. Before `save_pretrained`, convert the result with `gprune.export.hf.to_portable`.

Experts of one block are pruned to equal widths, each with its own neurons, because their tensors are stacked. Experts
whose masks keep nothing are removed from the stack, with their rows of the router. A layer whose masks keep nothing is
removed from the decoder with its norms.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from gprune.errors import UserError
from gprune.models.copies import copy_without_hooks, skeleton, turn_off_rescaling
from gprune.models.experts import kept_experts
from gprune.models.families import decoder_layers, decoder_of, record_of, refuse_quantised
from gprune.models.masks import Masks
from gprune.models.modeling_pruned import experts_aligned, find_parent, set_layer_sizes, update_linear_sizes
from gprune.models.offload import StoredWeights, attach_all_weights, attach_weights, load_parameter
from gprune.models.paths import attribute_at
from gprune.models.units import sizes_of_layer, units_by_layer, units_of
from gprune.units.structure import KINDS, Slice, Units, unit_key

# Patterns of names of fields of a configuration: with layer numbers, and with one value per layer.
LAYER_NUMBERS = re.compile(r"(mlp_only|dense|moe|full_attn|attn).*(idxs|indices|layers)|hybrid_layer_ids")
PER_LAYER = re.compile(
    r".*layers?.*|.*types|.*windows?|.*pattern|.*sparsity.*|.*widths?|.*(intermediate|heads).*"
    r"|.*experts?.*|.*top_?k"  # of Hunyuan, whose config has a list of numbers of experts, and of experts per token
)


@torch.no_grad()
def slice_model(model: PreTrainedModel, masks: Masks, *, inplace: bool = False) -> PreTrainedModel:
    """Slice the weights of every block down to the kept units, and return the pruned model.

    Biases are sliced with their rows; biases of the down and output projection do not change. Parameters keep dtype,
    device and `requires_grad`, and the model keeps its class.

    Args:
        model: a supported model, dense or already pruned.
        masks: keep masks by key of units.
        inplace: whether to change `model` itself. Otherwise only its rescaling is turned off (`turn_off_rescaling`),
            and peak memory is the dense model plus the pruned one.

    Raises:
        UserError: if the masks do not fit the model (`check_masks`), or layers are removed and another layer would
            compute something else under its new number, or no layer with attention remains.
    """
    check_masks(model, masks)
    turn_off_rescaling(model)
    layer_is_kept = masks.layers(units_of(model))
    # Before anything is sliced, because it may refuse, and the model may be changed in place.
    renumbered = None if all(layer_is_kept) else _renumbered(model, layer_is_kept)
    was_aligned = experts_aligned(model)
    if not inplace:
        # The copy shares weights that will be replaced by smaller ones.
        layers = decoder_layers(model)
        shared = [attribute_at(layers[u.layer], s.path) for u in units_of(model) for s in u.slices]
        model = copy_without_hooks(model, {id(tensor): tensor for tensor in shared})
    text_config = model.config.get_text_config(decoder=True)
    for index, (units, is_kept) in enumerate(zip(units_by_layer(model), layer_is_kept, strict=True)):
        if is_kept:
            _slice_layer(decoder_layers(model)[index], units, text_config, masks)
    if renumbered is not None:
        _drop_layers(model, layer_is_kept, renumbered)
    if not experts_aligned(model):
        model.config._experts_implementation = "eager"  # grouped kernels do not support these widths
    elif not was_aligned:  # reset the value of an earlier pruning
        model.config._experts_implementation = model.get_correct_experts_implementation(None)
    return model


@torch.no_grad()
def slice_to_files(
    model: PreTrainedModel, masks: Masks, folder: Path, revise: Callable[..., None] | None = None
) -> PreTrainedModel:
    """Prune an offloaded model layer by layer, with one layer in memory, and write each layer to a file.

    Before a layer is written, `revise(dense_layer, layer, units)` may change its sliced weights.
    """
    check_masks(model, masks)
    pruned = skeleton(copy.deepcopy(model.config), type(model), record=record_of(model)).eval().requires_grad_(False)
    for name, parameter in pruned.named_parameters():
        parameter.data = parameter.data.to(model.get_parameter(name).dtype)
    pruned.generation_config = model.generation_config
    slice_model(pruned, masks, inplace=True)
    attach_all_weights(pruned, model)  # those of layers are replaced below
    folder.mkdir(parents=True, exist_ok=True)
    for index, (dense_layer, layer, units) in enumerate(kept_layers(model, pruned, masks)):
        _write_layer(dense_layer, layer, units, masks, folder / f"{index}.safetensors", revise)
    return pruned


def kept_layers(
    model: PreTrainedModel, pruned: PreTrainedModel, masks: Masks
) -> Iterator[tuple[nn.Module, nn.Module, list[Units]]]:
    """Yield each kept layer of a dense model, the same layer of its pruned model, and the dense units of the layer."""
    layer_is_kept, units = masks.layers(units_of(model)), units_by_layer(model)
    kept = [index for index, is_kept in enumerate(layer_is_kept) if is_kept]
    for index, layer in zip(kept, decoder_layers(pruned), strict=True):
        yield decoder_layers(model)[index], layer, units[index]


def _write_layer(
    dense_layer: nn.Module, pruned_layer: nn.Module, units: Sequence[Units], masks: Masks, path: Path,
    revise: Callable[..., None] | None,
) -> None:  # fmt: skip
    """Load and slice the weights of a layer, revise them, write them with saved buffers, and free them."""
    cuts = _cuts(units, masks)
    for path_in_layer, _ in list(dense_layer.named_parameters()):
        module_path, _, name = path_in_layer.rpartition(".")
        dense_weight = load_parameter(dense_layer.get_submodule(module_path), name).detach()
        weight = _sliced(dense_weight, cuts[path_in_layer]) if path_in_layer in cuts else dense_weight.clone()
        parameter = nn.Parameter(weight.cpu().contiguous(), requires_grad=False)
        setattr(pruned_layer.get_submodule(module_path), name, parameter)
    if revise is not None:
        revise(dense_layer, pruned_layer, units)
    weights = {name: parameter.detach() for name, parameter in pruned_layer.named_parameters()}
    saved_names = dense_layer.state_dict().keys()
    stored = StoredWeights(dense_layer)  # a buffer may be offloaded too
    for name, _ in dense_layer.named_buffers():
        if name in saved_names:
            weights[name] = _sliced(stored[name], cuts.get(name, ())).cpu().contiguous()
    save_file(weights, path)
    pruned_layer.to("meta")
    files = {name: {"safetensors_file": path} for name in weights}
    attach_weights(pruned_layer, OffloadedWeightsLoader(index=files))


def _renumbered(model: PreTrainedModel, layer_is_kept: list[bool]) -> PreTrainedModel:
    """Return a model without weights that has the kept layers only, under their new numbers. `model` is unchanged."""
    kept = [index for index, is_kept in enumerate(layer_is_kept) if is_kept]
    config = copy.deepcopy(model.config)
    _drop_layers_from_config(config, kept, len(layer_is_kept))
    has_attention = attention_by_layer(model.config)
    if any(has_attention) and not any(attention_by_layer(config)):
        layers = ", ".join(str(index) for index, has in enumerate(has_attention) if has)
        raise UserError(
            f"Masks of model type '{model.config.model_type}' must keep a layer with attention, because generation "
            f"counts tokens by its cache; got masks that remove all of them: {layers}."
        )
    record = record_of(model)
    model_before = skeleton(copy.deepcopy(model.config), type(model), record=record)
    model_after = skeleton(config, type(model), record=record)
    _check_numbering(model_before, model_after, kept)
    return model_after


def attention_by_layer(config: PreTrainedConfig) -> list[bool]:
    """Return for each layer of the cache in generation whether it stores keys and values of tokens.

    Layers with linear attention, Mamba or convolution, and those without attention, do not. The list is empty if
    transformers cannot make a cache for the configuration, such as that of BLT.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError):
        return []
    return [isinstance(layer, CacheLayerMixin) for layer in layers]


def _drop_layers(model: PreTrainedModel, layer_is_kept: list[bool], renumbered: PreTrainedModel) -> None:
    """Remove layers from the decoder, and their entries from the config."""
    kept = [index for index, is_kept in enumerate(layer_is_kept) if is_kept]
    layers = decoder_layers(model)
    remaining = nn.ModuleList(layers[index] for index in kept)
    holder, name = find_parent(decoder_of(model), record_of(model).layers)
    setattr(holder, name, remaining)
    _drop_layers_from_config(model.config, kept, len(layer_is_kept))
    for index, (layer, new_layer) in enumerate(zip(remaining, decoder_layers(renumbered), strict=True)):
        new_modules = dict(new_layer.named_modules())
        for path, module in layer.named_modules():
            if hasattr(module, "layer_idx"):  # index of the layer in the KV cache
                module.layer_idx = getattr(new_modules.get(path), "layer_idx", index)


def _drop_layers_from_config(config: PreTrainedConfig, kept: list[int], depth: int) -> None:
    """Remove entries of layers from a model's config, and renumber the others, in place."""
    text_config = config.get_text_config(decoder=True)
    content = text_config.to_dict()  # plain lists and dicts, unlike some attributes
    table = content.get("per_layer_config")
    step = content.get("decoder_sparse_step", 1)  # of Qwen MoE: only every `step`-th layer has experts
    if step > 1:  # layer numbers determine which layers have experts, so list the others instead
        without_experts = [i for i in range(depth) if (i + 1) % step or i in content["mlp_only_layers"]]
        content["mlp_only_layers"] = without_experts
        text_config.decoder_sparse_step = 1
    text_config.num_hidden_layers = len(kept)
    per_layer = per_layer_lists(content, depth)
    for name, values in per_layer.items():
        setattr(text_config, name, type(values)(values[index] for index in kept))
    for name, numbers in lists_of_layer_numbers(content, per_layer).items():
        setattr(text_config, name, [new for new, old in enumerate(kept) if old in numbers])
    if table:  # renumber values of layers
        values_by_layer = {int(index): values for index, values in table.items()}
        text_config.per_layer_config = {
            str(new): values_by_layer[old] for new, old in enumerate(kept) if old in values_by_layer
        }
    layout = getattr(config, "pruned_layout", None)
    if layout and "own" in layout:  # of an export of gprune: sizes of layers
        own = {str(new): layout["own"][str(old)] for new, old in enumerate(kept)}
        config.pruned_layout = {**layout, "own": own}


def per_layer_lists(content: Mapping[str, Any], depth: int) -> dict[str, list[Any]]:
    """Return the fields that match `PER_LAYER` and have one value for each of `depth` layers, such as `layer_types`.

    A list of all layer numbers, such as the `moe_layers` of a model whose layers all have experts, is not one of them.
    """
    return {
        name: value
        for name, value in content.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and PER_LAYER.fullmatch(name)
        and not (LAYER_NUMBERS.fullmatch(name) and list(value) == list(range(depth)))
    }  # fmt: skip


def lists_of_layer_numbers(content: Mapping[str, Any], per_layer: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the fields of a configuration with layer numbers, such as those of layers with attention.

    `per_layer` is the result of `per_layer_lists`, whose fields are excluded.
    """
    return {
        name: value
        for name, value in content.items()
        if name not in per_layer and LAYER_NUMBERS.fullmatch(name) and isinstance(value, list)
        and all(isinstance(number, int) for number in value)
    }  # fmt: skip


def _check_numbering(before: PreTrainedModel, after: PreTrainedModel, kept: list[int]) -> None:
    """Raise UserError unless every kept layer is constructed identically under its new number, and so is the rest.

    Some models use layer numbers in computations; GPT-2 can divide attention by them. Such a model would compute
    something else after saving and loading. Others have an embedding table for every layer in one weight, such as
    Gemma 3n, which would not fit.
    """
    remedy = "Use --sparsity.scope without blocks."
    for new, old in enumerate(kept):
        old_values = _shapes_and_attributes(decoder_layers(before)[old])
        new_values = _shapes_and_attributes(decoder_layers(after)[new])
        if old_values != new_values:
            all_names = old_values | new_values
            name = next(name for name in all_names if old_values.get(name) != new_values.get(name))
            raise UserError(
                f"Model type '{before.config.model_type}' cannot lose whole blocks, because it computes from layer "
                f"numbers: {name} of layer {old} is {old_values.get(name)}, but {new_values.get(name)} as layer {new}. "
                f"{remedy}"
            )
    shapes_before, shapes_after = _shapes_outside_layers(before), _shapes_outside_layers(after)
    for name, shape in shapes_before.items():
        if shape != shapes_after.get(name):
            raise UserError(
                f"Model type '{before.config.model_type}' cannot lose whole blocks, because a weight outside of them "
                f"depends on their number: {name} has shape {shape}, but {shapes_after.get(name)} without them. "
                f"{remedy}"
            )


def _shapes_outside_layers(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return shapes of the parameters that do not belong to a decoder layer, by name."""
    in_layers = {id(parameter) for parameter in decoder_layers(model).parameters()}
    return {name: tuple(p.shape) for name, p in model.named_parameters() if id(p) not in in_layers}


def _shapes_and_attributes(layer: nn.Module) -> dict[str, object]:
    """Return shapes of parameters and plain attributes of all modules of a layer, by path, except its number."""
    values: dict[str, object] = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | tuple) and name != "layer_idx":
                values[f"{path}.{name}".removeprefix(".")] = value
    return values


def check_masks(model: PreTrainedModel, masks: Masks) -> None:
    """Raise UserError unless the model is not quantised, and masks are bool, fit the units, and can be applied.

    The latter needs at least one block; units of both kinds or of neither in each block; equally many neurons of all
    kept experts of a block, and enough of these for its router; and all or none of the blocks of a layer.
    """
    refuse_quantised(model.config)
    units = {u.key: u for u in units_of(model)}
    sizes = {key: u.size for key, u in units.items() if u.kind in ("neurons", "kv_groups") or key in masks}
    if unknown := list(masks.keys() - sizes.keys()) + list(sizes.keys() - masks.keys()):
        raise UserError(f"Masks must have the keys {', '.join(sizes)}; got {', '.join(masks)} ('{unknown[0]}').")
    for key, size in sizes.items():
        mask = masks[key]
        if not isinstance(mask, Tensor):
            raise UserError(f"Masks['{key}'] must be a tensor; got {type(mask).__name__}. Use torch.tensor(mask).")
        if mask.shape != (size,) or mask.dtype != torch.bool:
            raise UserError(
                f"Masks['{key}'] must be torch.bool of length {size}; got {mask.dtype} {tuple(mask.shape)}."
            )
        if units[key].kind not in KINDS and not mask.all():
            raise UserError(
                f"Masks must keep all units of kind '{units[key].kind}', which can be masked, but not removed: modules "
                f"of transformers have no size for them; got masks that remove {int((~mask).sum())} of '{key}'."
            )
    if not any(masks.blocks):
        raise UserError(f"Masks must keep at least 1 of {len(masks.blocks)} blocks; got 0.")
    for number, (ffn, attention) in enumerate(zip(masks.ffn, masks.attention, strict=True)):
        if len(ffn) and len(attention) and ffn.any() != attention.any():
            raise UserError(f"Masks of block {number} must keep units of both scopes, or of neither.")
    for u in units.values():
        if u.kind == "experts":
            _check_experts(u, masks[unit_key("neurons", u.number)], model.config)
    for index, of_layer in enumerate(units_by_layer(model)):
        numbers = [u.number for u in of_layer if u.kind == "neurons"]
        if len({masks.blocks[number] for number in numbers}) > 1:
            raise UserError(
                f"Masks of blocks {numbers[0]} to {numbers[-1]}, of layer {index}, must keep units of all of these "
                "blocks, or of none."
            )


def _check_experts(experts: Units, keep: Tensor, config: PreTrainedConfig) -> None:
    """Raise UserError unless experts that keep neurons keep equally many, and suffice for their router."""
    number = experts.number
    counts = set(keep.view(experts.count, -1).sum(1).tolist())
    if len(counts - {0}) > 1:
        raise UserError(f"Masks['neurons.{number}'] must keep equally many neurons of every expert; got {counts}.")
    if len(counts) == 1:  # all experts are kept, or the whole block is removed
        return
    name = f"Experts of block {number} (model type '{config.model_type}')"
    if experts.stays:
        raise UserError(f"{name} cannot be removed as a whole: {experts.stays}.")
    groups, least = experts.step, experts.least // experts.step  # of each group
    kept_by_group = kept_experts(keep, experts.count).view(groups, -1).sum(1).tolist()
    if min(kept_by_group) < least or len(set(kept_by_group)) > 1:
        of_group = f" in each of {groups} groups, the same number" if groups > 1 else ""
        raise UserError(f"{name} must be at least {least}{of_group}; got {', '.join(map(str, kept_by_group))}.")


def widths(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return `{"neurons": [...], "kv_groups": [...]}` with one entry per block, from shapes of the weights.

    The width of a block with experts is that of each expert.
    """
    units = units_of(model)
    return {kind: [u.count for u in units if u.kind == kind] for kind in ("neurons", "kv_groups")}


Cut = tuple[
    Slice, Tensor
]  # a slice, and which of its units are kept: (count,), or (rows, count) if they are side by side


def _cuts(units: Sequence[Units], masks: Masks) -> dict[str, list[Cut]]:
    """Return the cuts of each tensor of a layer by path, from coarse to fine."""
    cuts: dict[str, list[Cut]] = {}
    for u in units:
        keep = masks.kept(u)
        if u.inside:  # a row for each kept expert
            by_expert = keep.view(u.rows, -1)
            keep = by_expert[by_expert.any(1)]
        for s in u.slices:
            cuts.setdefault(s.path, []).append((s, keep))
    return cuts


def _sliced(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Return the kept part of a tensor as a new tensor; the tensor itself without cuts."""
    for s, keep in cuts:
        if keep.dim() == 1:
            tensor = _select(tensor, s.dim, torch.where(s.unit < 0, True, keep[s.unit]))
        else:  # experts, each with its own neurons
            tensor = torch.stack([_select(t, s.dim - 1, k[s.unit]) for t, k in zip(tensor, keep, strict=True)])
    return tensor


def _slice_layer(layer: nn.Module, units: Sequence[Units], config: PreTrainedConfig, masks: Masks) -> None:
    """Slice a layer in place, and update sizes in its modules."""
    for path, cuts in _cuts(units, masks).items():
        module, name = find_parent(layer, path)
        dense = getattr(module, name)
        smaller = _sliced(load_parameter(module, name).detach(), cuts)
        if name in module._buffers:
            module._buffers[name] = smaller
        else:
            setattr(module, name, nn.Parameter(smaller, requires_grad=dense.requires_grad))
        update_linear_sizes(module)
    # Experts that are kept have equally many neurons.
    counts = {u.key: int(masks.kept(u).view(u.rows, -1).sum(1).max()) for u in units if u.size}
    set_layer_sizes(layer, config, *sizes_of_layer([replace(u, count=counts.get(u.key, 0)) for u in units]))


def _select(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """Return the part of a tensor at indices along `dim` where `keep` (bool) is True, as a new contiguous tensor.

    `index_select` copies even if all are kept.
    """
    return tensor.index_select(dim, keep.nonzero().squeeze(1).to(tensor.device))
