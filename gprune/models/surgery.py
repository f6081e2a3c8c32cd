"""Remove masked units from the weights of a model, in the stock modules of transformers and without patching them.

Removing a neuron removes its rows of gate and up and its column of down. Removing a KV group removes its key and value
head, the query heads that share it, their columns of the output projection, and their weights in a norm over all heads.
The ratio of query to key/value heads does not change. Stock attention code infers the number of heads from shapes, or
reads it from attributes, which the family's record names and which are updated. The model's config keeps the dense
sizes. The true sizes are read from the weights (`gprune.models.blocks.blocks_of`), and `gprune.export` writes them for
other programs. Before `save_pretrained`, convert the result with `gprune.export.hf.portable`.

Experts of one block are pruned to equal widths, each with its own neurons, because their tensors are stacked. A layer
whose masks keep nothing is removed from the decoder with its norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.errors import UserError
from gprune.models.blocks import Block, Slice, blocks_of, by_layer, decoder_layers, layer_values
from gprune.models.copies import copy_without_hooks
from gprune.models.loading import skeleton
from gprune.models.lookup import decoder_of, family_of, remember
from gprune.models.masks import Masks
from gprune.models.modeling_pruned import experts_aligned, find_parent, set_layer_sizes, update_linear_sizes
from gprune.models.offload import attach_all_weights, attach_weights, load_parameter


@torch.no_grad()
def prune(model: PreTrainedModel, masks: Masks, *, inplace: bool = False) -> PreTrainedModel:
    """Slice the weights of every block down to the kept units.

    Biases are sliced with their rows; biases of the down and output projection do not change. Parameters keep dtype,
    device and `requires_grad`, and the model keeps its class. Arguments are those of `gprune.apply_masks`. Unless
    `inplace`, peak memory is the dense model plus the pruned one.

    Raises:
        UserError: if a mask has a wrong length or dtype, or a block keeps units of one scope only.
    """
    check_masks(model, masks)
    was_aligned = experts_aligned(model)
    if not inplace:
        # The copy shares weights that will be replaced by smaller ones.
        shared = [block.parameter(place) for block in blocks_of(model) for place in block.slices]
        model = copy_without_hooks(model, {id(parameter): parameter for parameter in shared})
    layers, stays = by_layer(blocks_of(model)), masks.blocks
    for blocks in layers:
        if stays[blocks[0].index]:
            _slice_layer(blocks, model.config.get_text_config(decoder=True), masks)
    if not all(stays):
        _drop_layers(model, [stays[blocks[0].index] for blocks in layers])
    if not experts_aligned(model):
        model.config._experts_implementation = "eager"  # grouped kernels do not support these widths
    elif not was_aligned:  # reset the value of an earlier pruning
        model.config._experts_implementation = model.get_correct_experts_implementation(None)
    return model


@torch.no_grad()
def prune_to_files(
    model: PreTrainedModel, masks: Masks, folder: Path, revise: Callable[[Block, Block], None] | None = None
) -> PreTrainedModel:
    """Prune an offloaded model layer by layer, with one layer in memory, and write each layer to a file.

    Args:
        model: the offloaded model.
        masks: the masks.
        folder: folder of the files, which must exist as long as the result is in use.
        revise: called with the dense and the sliced block before it is written; changes the sliced block in place.

    Returns:
        The pruned model on the meta device. `gprune.models.offload.load_parameter` reads parameters of blocks from the
        files, and other parameters from `model`. The model can be saved, but not run.
    """
    check_masks(model, masks)
    small = skeleton(copy.deepcopy(model.config), type(model)).eval().requires_grad_(False)
    for name, parameter in small.named_parameters():
        parameter.data = parameter.data.to(model.get_parameter(name).dtype)
    small.generation_config = model.generation_config
    prune(small, masks, inplace=True)
    attach_all_weights(small, model)
    folder.mkdir(parents=True, exist_ok=True)
    stays = masks.blocks
    kept = [blocks for blocks in by_layer(blocks_of(model)) if stays[blocks[0].index]]
    for index, (dense, blocks) in enumerate(zip(kept, by_layer(blocks_of(small)), strict=True)):
        _write_layer(dense, blocks, masks, folder / f"{index}.safetensors", revise)
    return small


def _write_layer(
    dense: Sequence[Block], blocks: Sequence[Block], masks: Masks, path: Path,
    revise: Callable[[Block, Block], None] | None,
) -> None:  # fmt: skip
    """Load and slice the weights of a layer, revise its blocks, write them, and free the weights."""
    places = {place.path: (block, place) for block in dense for place in block.slices}
    whole, layer = dense[0].layer, blocks[0].layer
    for name, _ in list(whole.named_parameters()):
        owner, _, own = name.rpartition(".")
        value = load_parameter(whole.get_submodule(owner), own).detach()
        value = _slice_parameter(*places[name], masks, value) if name in places else value.clone()
        setattr(layer.get_submodule(owner), own, nn.Parameter(value.cpu().contiguous(), requires_grad=False))
    for pair in zip(dense, blocks, strict=True) if revise is not None else ():
        revise(*pair)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    save_file(weights, path)
    layer.to("meta")
    attach_weights(layer, OffloadedWeightsLoader(index={name: {"safetensors_file": path} for name in weights}))


def _drop_layers(model: PreTrainedModel, stays: list[bool]) -> None:
    """Remove layers from the decoder, and their entries from the config."""
    config, layers = model.config.get_text_config(decoder=True), decoder_layers(model)
    before = skeleton(copy.deepcopy(model.config), type(model))
    kept = [index for index, keep in enumerate(stays) if keep]
    remaining = nn.ModuleList(layers[index] for index in kept)
    holder, name = find_parent(decoder_of(model), family_of(model).layers)
    setattr(holder, name, remaining)
    content = config.to_dict()  # plain lists and dicts, unlike some attributes
    table = content.get("per_layer_config")
    if (step := content.get("decoder_sparse_step", 1)) > 1:  # layer numbers determine which layers have experts
        dense = [i for i in range(len(stays)) if (i + 1) % step or i in content["mlp_only_layers"]]
        content["mlp_only_layers"], config.decoder_sparse_step = dense, 1
    config.num_hidden_layers = len(remaining)
    for name, value in content.items():
        if name.endswith("_only_layers") and value:  # a list of layer numbers
            setattr(config, name, [new for new, old in enumerate(kept) if old in value])
        elif "layer" in name and isinstance(value, list) and len(value) == len(stays):  # an entry for each layer
            setattr(config, name, [value[index] for index in kept])
    if table:  # pruned before: renumber values of layers
        values = {int(index): value for index, value in table.items()}
        config.per_layer_config = {str(new): values[old] for new, old in enumerate(kept) if old in values}
    layout = getattr(model.config, "pruned_layout", None)
    if layout and "own" in layout:  # sizes of layers of a discovered type
        own = {str(new): layout["own"][str(old)] for new, old in enumerate(kept)}
        model.config.pruned_layout = {**layout, "own": own}
    after = skeleton(copy.deepcopy(model.config), type(model))
    for one in (before, after):  # avoids another discovery for the changed number of layers
        remember(one, family_of(model))
    _check_numbering(before, after, kept)
    for index, (layer, built) in enumerate(zip(remaining, decoder_layers(after), strict=True)):
        made = dict(built.named_modules())
        for path, module in layer.named_modules():
            if hasattr(module, "layer_idx"):  # index of the layer in the KV cache
                module.layer_idx = getattr(made.get(path), "layer_idx", index)


def _check_numbering(before: PreTrainedModel, after: PreTrainedModel, kept: list[int]) -> None:
    """Raise UserError unless every kept layer is constructed identically under its new number.

    Some models use layer numbers in computations; GPT-2 can divide attention by them. Such a model would compute
    something else after saving and loading.

    Args:
        before: model without weights, with all layers.
        after: model without weights, with kept layers only.
        kept: previous numbers of kept layers.
    """
    for new, old in enumerate(kept):
        was, now = (_built(decoder_layers(model)[index]) for model, index in ((before, old), (after, new)))
        if was != now:
            name = next(name for name in was | now if was.get(name) != now.get(name))
            raise UserError(
                f"Model type '{before.config.model_type}' cannot lose whole blocks, because it computes from layer "
                f"numbers: {name} of layer {old} is {was.get(name)}, but {now.get(name)} as layer {new}. Use "
                "--sparsity.scope without blocks, and another --sparsity.allocation than depth."
            )


def _built(layer: nn.Module) -> dict[str, object]:
    """Return shapes and plain attributes of a layer, except its number."""
    made: dict[str, object] = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | tuple) and name != "layer_idx":
                made[f"{path}.{name}".removeprefix(".")] = value
    return made


def check_masks(model: PreTrainedModel, masks: Masks) -> None:
    """Raise UserError unless masks are bool, fit the widths, and keep all or no blocks of each layer."""
    blocks = blocks_of(model)
    sizes = {"ffn": [b.experts * b.neurons for b in blocks], "attention": [b.kv_groups for b in blocks]}
    for scope, expected in sizes.items():
        own = getattr(masks, scope)
        if [mask.shape for mask in own] != [(size,) for size in expected] or any(m.dtype != torch.bool for m in own):
            got = ", ".join(f"{mask.dtype} {tuple(mask.shape)}" for mask in own)
            raise UserError(f"Masks.{scope} must be torch.bool of lengths {expected}; got {got}.")
    if not any(masks.blocks):
        raise UserError(f"Masks must keep at least 1 of {len(blocks)} blocks; got 0.")
    for block, ffn, attention in zip(blocks, masks.ffn, masks.attention, strict=True):
        if len(ffn) and len(attention) and ffn.any() != attention.any():
            raise UserError(f"Masks of block {block.index} must keep units of both scopes, or of neither.")
        counts = set(ffn.view(block.experts, -1).sum(1).tolist())
        if len(counts) > 1:
            raise UserError(f"Masks.ffn[{block.index}] must keep equally many neurons of every expert; got {counts}.")
    stays = masks.blocks
    for own in by_layer(blocks):
        if len({stays[block.index] for block in own}) > 1:
            numbers = f"{own[0].index} to {own[-1].index}, of layer {own[0].layer_index}"
            raise UserError(f"Masks of blocks {numbers}, must keep units of all of these blocks, or of none.")


def widths(model: PreTrainedModel) -> dict[str, list[int]]:
    """`{"neurons": [...], "kv_groups": [...]}`, one entry per block, from shapes of the weights."""
    blocks = blocks_of(model)
    return {"neurons": [b.neurons for b in blocks], "kv_groups": [b.kv_groups for b in blocks]}


def _slice_layer(blocks: Sequence[Block], config: PreTrainedConfig, masks: Masks) -> None:
    """Slice the blocks of a layer in place, and update size attributes of its modules."""
    for block in blocks:
        for place in block.slices:
            path, _, name = place.path.rpartition(".")
            module, parameter = block.module(path), block.parameter(place)
            smaller = _slice_parameter(block, place, masks, load_parameter(module, name).detach())
            setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
            update_linear_sizes(module)
    blocks = [replace(block) for block in blocks]  # resets cached properties
    values = layer_values(blocks)
    for block in reversed(blocks):  # the first block has precedence
        set_layer_sizes(block.layer, config, values | block.config_values, block.attributes)


def _slice_parameter(block: Block, place: Slice, masks: Masks, parameter: Tensor) -> Tensor:
    """Return the kept part of a parameter as a new tensor."""
    keep = getattr(masks, place.kind)[block.index]
    if place.kind == "ffn" and block.has_experts:
        kept = rearrange(keep, "(e n) -> e n", e=block.experts)[:, place.units]
        return torch.stack([_take(p, place.dim - 1, k) for p, k in zip(parameter, kept, strict=True)])
    return _take(parameter, place.dim, keep[place.units])


def _take(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """Return kept indices along `dim` as a new contiguous tensor. `index_select` copies even if all are kept."""
    return tensor.index_select(dim, keep.nonzero().squeeze(1).to(tensor.device))
