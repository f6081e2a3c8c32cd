"""Keep masks -> smaller weights: real pruning, on the stock modules of transformers, without patching them.

A removed neuron takes its gate row, up row and down column with it. A removed KV group takes its key and value head,
the query heads that share it, their columns of the output projection, and their weights in a norm over all heads. Since
whole groups go, the ratio of query to key/value heads does not change. Stock attention code infers the number of heads
from the shapes, or reads it from attributes that the family's record names, which are set. The model's config keeps the
dense numbers: the weights tell the true widths (`gprune.models.blocks.blocks_of`), and `gprune.export` writes them for
other programs. `save_pretrained` can be called on what `gprune.export.hf.portable` makes of the result.

Experts of one block end up equally wide, each with its own neurons, so that their tensors stay stacked. A layer whose
masks keep nothing goes as a whole, norms included: the decoder has a layer fewer.
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
from gprune.models.modeling_pruned import experts_aligned, find, tell_layer, tell_sizes
from gprune.models.offload import lend, lend_all, stored


@torch.no_grad()
def prune(model: PreTrainedModel, masks: Masks, *, inplace: bool = False) -> PreTrainedModel:
    """Slice the weights of every block down to the kept units.

    Biases go with their rows; a bias of the down or output projection stays whole. Parameters keep dtype,
    device and `requires_grad`, and the model its class. Arguments as for `gprune.apply_masks`; unless `inplace`, memory
    peaks at the dense model plus the smaller one, never two dense ones.

    Raises:
        UserError: a mask of the wrong length or dtype, or one that keeps nothing where the other keeps something.
    """
    check_masks(model, masks)
    was_aligned = experts_aligned(model)
    if not inplace:
        # The copy shares the weights that are sliced anyway, until their smaller version replaces them.
        shared = [block.parameter(place) for block in blocks_of(model) for place in block.slices]
        model = copy_without_hooks(model, {id(parameter): parameter for parameter in shared})
    layers, stays = by_layer(blocks_of(model)), masks.blocks
    for blocks in layers:
        if stays[blocks[0].index]:
            _slice_layer(blocks, model.config.get_text_config(decoder=True), masks)
    if not all(stays):
        _drop_layers(model, [stays[blocks[0].index] for blocks in layers])
    if not experts_aligned(model):
        model.config._experts_implementation = "eager"  # grouped kernels would refuse these widths
    elif not was_aligned:  # an earlier pruning has set it
        model.config._experts_implementation = model.get_correct_experts_implementation(None)
    return model


@torch.no_grad()
def prune_to_files(
    model: PreTrainedModel, masks: Masks, folder: Path, revise: Callable[[Block, Block], None] | None = None
) -> PreTrainedModel:
    """`prune` for an offloaded model: layer by layer, each into a file of its own, with one layer in memory.

    Args:
        folder: where the files go; they stay for as long as the result is read.
        revise: changes a sliced block, given the dense one and it, before it is written.

    Returns:
        The pruned model with every parameter on the meta device: `gprune.models.offload.stored` fetches parameters of
        blocks from the files and the others from `model`. To be saved and loaded again, not to be run.
    """
    check_masks(model, masks)
    small = skeleton(copy.deepcopy(model.config), type(model)).eval().requires_grad_(False)
    for name, parameter in small.named_parameters():
        parameter.data = parameter.data.to(model.get_parameter(name).dtype)
    small.generation_config = model.generation_config
    prune(small, masks, inplace=True)
    lend_all(small, model)
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
    """Fill the blocks of a layer without weights, revise and write them, and leave them without weights again."""
    places = {place.path: (block, place) for block in dense for place in block.slices}
    whole, layer = dense[0].layer, blocks[0].layer
    for name, _ in list(whole.named_parameters()):
        owner, _, own = name.rpartition(".")
        value = stored(whole.get_submodule(owner), own).detach()
        value = _sliced(*places[name], masks, value) if name in places else value.clone()
        setattr(layer.get_submodule(owner), own, nn.Parameter(value.cpu().contiguous(), requires_grad=False))
    for pair in zip(dense, blocks, strict=True) if revise is not None else ():
        revise(*pair)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    save_file(weights, path)
    layer.to("meta")
    lend(layer, OffloadedWeightsLoader(index={name: {"safetensors_file": path} for name in weights}))


def _drop_layers(model: PreTrainedModel, stays: list[bool]) -> None:
    """Take the layers out of the decoder that do not stay, and their entries out of the config."""
    config, layers = model.config.get_text_config(decoder=True), decoder_layers(model)
    before = skeleton(copy.deepcopy(model.config), type(model))
    kept = [index for index, keep in enumerate(stays) if keep]
    remaining = nn.ModuleList(layers[index] for index in kept)
    holder, name = find(decoder_of(model), family_of(model).layers)
    setattr(holder, name, remaining)
    content = config.to_dict()  # plain here, whatever transformers makes of the attributes
    table = content.get("per_layer_config")
    if (step := content.get("decoder_sparse_step", 1)) > 1:  # which layers have experts follows from their numbers
        dense = [i for i in range(len(stays)) if (i + 1) % step or i in content["mlp_only_layers"]]
        content["mlp_only_layers"], config.decoder_sparse_step = dense, 1
    config.num_hidden_layers = len(remaining)
    for name, value in content.items():
        if name.endswith("_only_layers") and value:  # numbers of layers
            setattr(config, name, [new for new, old in enumerate(kept) if old in value])
        elif "layer" in name and isinstance(value, list) and len(value) == len(stays):  # an entry for each layer
            setattr(config, name, [value[index] for index in kept])
    if table:  # pruned before: each layer's own values move along
        values = {int(index): value for index, value in table.items()}
        config.per_layer_config = {str(new): values[old] for new, old in enumerate(kept) if old in values}
    layout = getattr(model.config, "pruned_layout", None)
    if layout and "own" in layout:  # the sizes of each layer of a pruned type without a record
        own = {str(new): layout["own"][str(old)] for new, old in enumerate(kept)}
        model.config.pruned_layout = {**layout, "own": own}
    after = skeleton(copy.deepcopy(model.config), type(model))
    for one in (before, after):  # a type without a record is not looked at again with another number of layers
        remember(one, family_of(model))
    _check_numbering(before, after, kept)
    for index, (layer, built) in enumerate(zip(remaining, decoder_layers(after), strict=True)):
        made = dict(built.named_modules())
        for path, module in layer.named_modules():
            if hasattr(module, "layer_idx"):  # where the KV cache keeps a layer's states
                module.layer_idx = getattr(made.get(path), "layer_idx", index)


def _check_numbering(before: PreTrainedModel, after: PreTrainedModel, kept: list[int]) -> None:
    """Raise UserError unless every layer that stays is built the same under its new number.

    Some models compute from the numbers of layers: GPT-2 may divide attention by them. Loaded again, such a model
    would compute something else.

    Args:
        before: without weights, from the config that has all layers.
        after: from the config without the others.
        kept: the former numbers of layers that stay.
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
    """What a layer's constructor has made: shapes, and plain attributes except the number of the layer."""
    made: dict[str, object] = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | tuple) and name != "layer_idx":
                made[f"{path}.{name}".removeprefix(".")] = value
    return made


def check_masks(model: PreTrainedModel, masks: Masks) -> None:
    """Raise UserError unless masks are bool, fit the widths, and keep some units of all blocks of a layer or none."""
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
    """`{"neurons": [...], "kv_groups": [...]}`, one entry per block, read off the weights."""
    blocks = blocks_of(model)
    return {"neurons": [b.neurons for b in blocks], "kv_groups": [b.kv_groups for b in blocks]}


def _slice_layer(blocks: Sequence[Block], config: PreTrainedConfig, masks: Masks) -> None:
    """Make the blocks of a layer smaller, in place, and tell its modules their new sizes."""
    for block in blocks:
        for place in block.slices:
            path, _, name = place.path.rpartition(".")
            module, parameter = block.module(path), block.parameter(place)
            smaller = _sliced(block, place, masks, stored(module, name).detach())
            setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
            tell_sizes(module)
    blocks = [replace(block) for block in blocks]  # as their weights are now
    values = layer_values(blocks)
    for block in reversed(blocks):  # `attributes` of each are multiples of its own sizes; those of the first one stay
        tell_layer(block.layer, config, values | block.config_values, block.attributes)


def _sliced(block: Block, place: Slice, masks: Masks, parameter: Tensor) -> Tensor:
    """The part of one parameter of a block that the masks keep, as a new tensor."""
    keep = getattr(masks, place.kind)[block.index]
    if place.kind == "ffn" and block.has_experts:
        kept = rearrange(keep, "(e n) -> e n", e=block.experts)[:, place.units]
        return torch.stack([_take(p, place.dim - 1, k) for p, k in zip(parameter, kept, strict=True)])
    return _take(parameter, place.dim, keep[place.units])


def _take(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """A new contiguous tensor; `index_select` copies even when everything is kept."""
    return tensor.index_select(dim, keep.nonzero().squeeze(1).to(tensor.device))
