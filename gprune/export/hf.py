"""A pruned model as a Hugging Face folder that loads in one line, with or without gprune.

Where all blocks have the same shape, and the family's stock config can say it, the folder is a stock model and needs
nobody's code. Else it holds safetensors, a config.json with the table `per_layer_config`, and the modelling file
`modeling_pruned.py`, one for all families, so `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`
works wherever transformers does; after `gprune.register()` it works without remote code. An export counts only after
`check_reload`: a fresh process must get the logits of the model in memory out of it.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from gprune.checks import memory_limits, require
from gprune.errors import UserError
from gprune.export.reload import aligned
from gprune.models import modeling_pruned
from gprune.models.blocks import blocks_of, by_layer, decoder_layers, layer_values
from gprune.models.loading import pruned_classes, register_type, skeleton
from gprune.models.lookup import family_of, remember
from gprune.models.masks import Masks
from gprune.models.offload import device_of, is_offloaded, lend_all
from gprune.models.surgery import prune
from gprune.storage.files import replacing
from gprune.storage.reading import expanded

log = logging.getLogger("gprune")

# Keys of a config that the exported class sets anew, or that mean nothing to it (a de-quantised GGUF's quantiser).
NOT_CARRIED = {
    *("model_type", "architectures", "auto_map", "quantization_config"),
    *("per_layer_config", "pruned_layout", "added_biases"),
    *("rope_theta", "rope_scaling", "transformers_version", "_name_or_path"),
}
KNOWN_CODE = re.compile(r"transformers\..*|.*\bmodeling_pruned")  # modules of models that our classes stand for
SHARD = 5 * 10**9  # bytes; larger models are written in several files
CARD = "Pruned by gprune. Where layers differ in width, config.json has a table `per_layer_config`.\n"  # a run has more


def stock_values(model: PreTrainedModel) -> dict[str, Any]:
    """What the config of the dense stock model says, with the size of a head and the dtype spelled out."""
    (first, *_) = blocks_of(model)
    carried = {key: value for key, value in model.config.to_dict().items() if key not in NOT_CARRIED}
    if first.family.found:
        return carried | {"dtype": model.dtype}
    return carried | {"head_dim": first.head_dim, "dtype": model.dtype}


def stock_skeleton(model: PreTrainedModel) -> PreTrainedModel | None:
    """A stock model in the shapes of `model`, without weights; None where blocks differ or no config can say how."""
    blocks = blocks_of(model)
    family, sizes = blocks[0].family, blocks[0].config_values
    if family.found:
        return _found_stock_skeleton(model)
    if any(block.config_values != sizes for block in blocks) or not modeling_pruned.experts_aligned(model):
        return None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for model_type, settings in {family.model_type: {}, **family.same_as}.items():
        with suppress(ValueError, StrictDataclassError):  # a config may refuse these sizes
            stock = skeleton(CONFIG_MAPPING[model_type](**stock_values(model) | sizes | settings))
            if {name: tensor.shape for name, tensor in stock.state_dict().items()} == shapes:
                return stock
    return None


def pruned_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The pruned class of the model's family in the shapes of `model`, without weights."""
    blocks, values = blocks_of(model), stock_values(model)
    family = blocks[0].family
    if family.found:
        return _found_skeleton(model)
    dense = blocks_of(skeleton(CONFIG_MAPPING[family.model_type](**values)))
    layout: dict[str, Any] = {"layers": family.layers, "sizes": {}, "attributes": {}}
    table = {}
    for block, stock in zip(blocks, dense, strict=True):
        layout["sizes"] |= {place.path: [place.dim, block.config_terms(place.sizes)] for place in block.slices}
        layout["attributes"] |= block.attributes
        added = [part for part in ("down", "output") if block.parts[part].bias is not None]
        biases = [getattr(family, part) for part in added if stock.parts[part].bias is None]
        own = block.config_values | {"added_biases": biases}
        table[str(block.layer_index)] = {key: value for key, value in own.items() if value != values.get(key, [])}
    config_class, _, model_class = pruned_classes(family.model_type)
    own = {"pruned_layout": layout, "per_layer_config": {index: own for index, own in table.items() if own}}
    return skeleton(config_class(**values, added_biases=[], **own), model_class)


def _dense_skeleton(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    """The stock model of a discovered type that a pruned one came from, without weights."""
    record = family_of(model)
    values = stock_values(model)
    text = values if model.config.get_text_config(decoder=True) is model.config else _text_values(model, values)
    text.update(settings)
    config = CONFIG_MAPPING[record.model_type](**values)
    config._attn_implementation = model.config._attn_implementation
    stock = skeleton(config)
    remember(stock, record)
    return stock


def _text_values(model: PreTrainedModel, values: dict[str, Any]) -> dict[str, Any]:
    """The part of a composite configuration's values that describes the text model."""
    text = model.config.get_text_config(decoder=True)
    return next(values[name] for name in model.config.sub_configs if getattr(model.config, name, None) is text)


def _found_stock_skeleton(model: PreTrainedModel) -> PreTrainedModel | None:
    """A stock model of a discovered type in the shapes of `model`, if the config has a key for each size; else None."""
    blocks, shapes = blocks_of(model), {name: tensor.shape for name, tensor in model.state_dict().items()}
    pairs = {(k, size) for block in blocks for k, size in block.config_values.items() if hasattr(model.config, k)}
    if len(sizes := dict(pairs)) < len(pairs) or not modeling_pruned.experts_aligned(model):
        return None  # the former: a key with several values
    with suppress(Exception):  # of any type: a class may refuse these sizes
        stock = _dense_skeleton(model, sizes)
        if {name: tensor.shape for name, tensor in stock.state_dict().items()} == shapes:
            heads = [(block.heads, block.kv_groups) for block in blocks]
            if [(block.heads, block.kv_groups) for block in blocks_of(stock)] == heads:
                return stock
    return None


def _found_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The pruned class of a discovered type in the shapes of `model`, without weights; every size is written out."""
    blocks, record, own = blocks_of(model), family_of(model), {}
    stock = _dense_skeleton(model, {})
    of_stock = blocks_of(stock)
    for index, of_layer in enumerate(by_layer(blocks)):
        sizes: dict[str, list[int]] = {}
        attributes: dict[str, int] = {}
        biases: list[str] = []
        for block in of_layer:
            sizes |= {place.path: [place.dim, block.parameter(place).shape[place.dim]] for place in block.slices}
            attributes |= {path: modeling_pruned.size(terms, block.sizes) for path, terms in block.attributes.items()}
            added = [part for part in ("down", "output") if part in block.parts and block.parts[part].bias is not None]
            dense = of_stock[block.index].parts
            biases += [getattr(block.family, part) for part in added if dense[part].bias is None]
        values = layer_values(of_layer)
        own[str(index)] = {"sizes": sizes, "attributes": attributes, "values": values, "added_biases": biases}
    path = next(path for path, module in stock.named_modules() if module is decoder_layers(stock))
    config_class, _, model_class = pruned_classes(record.model_type)
    made = skeleton(config_class(**stock_values(model), pruned_layout={"layers": path, "own": own}), model_class)
    remember(made, record)
    return made


def to_exportable(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The same network as the class that is saved, a stock one where that can be; weights are shared, not copied.

    Args:
        model: of a supported family, pruned or not, once or twice. An offloaded one gives a model that is only saved.
        dtype: of the weights, which are copied where they have another one; None or that of an offloaded model.
    """
    register_type(family_of(model).model_type)  # whose record came after the import, or was discovered
    exportable = stock_skeleton(model) or pruned_skeleton(model)
    exportable.load_state_dict(model.state_dict(), strict=True, assign=True)
    exportable.tie_weights()
    for name, parameter in model.named_parameters():
        exportable.get_parameter(name).requires_grad_(parameter.requires_grad)
    for path, module in list(exportable.named_modules()):  # what no file holds
        own = model.get_submodule(path)
        if "RotaryEmbedding" in type(module).__name__:
            exportable.set_submodule(path, own)  # with frequencies that follow the length of the text
        else:
            module._buffers.update(own._buffers)
    for choice in ("_attn_implementation", "_experts_implementation"):
        setattr(exportable.config, choice, getattr(model.config, choice))
    cast(exportable, dtype)
    exportable.generation_config = copy.deepcopy(model.generation_config)
    if is_offloaded(model):
        lend_all(exportable, model)
    return exportable.train(model.training)


def cast(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Give all parameters a dtype, as loading a folder of that dtype does; buffers keep theirs. None: each its own."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)


def portable(model: PreTrainedModel) -> PreTrainedModel:
    """The model as `gprune.load_run` gives it: `save_pretrained`, also after training, writes a folder that loads.

    Returned as it is, to be saved by `save_pruned`: a model on several devices or offloaded, which needs its hooks; one
    whose code is not that of transformers; one with weights that no config describes, such as adapters.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) == 1 and not is_offloaded(model) and KNOWN_CODE.fullmatch(type(model).__module__):
        with suppress(RuntimeError):  # load_state_dict's, of weights that have no place
            return to_exportable(model)
    return model


def apply_masks(model: PreTrainedModel, masks: Masks, *, inplace: bool = False) -> PreTrainedModel:
    """The model without what the masks remove, really smaller; `save_pretrained` of it writes a folder that loads.

    Args:
        model: of a supported family; a pruned one may be pruned again.
        masks: per block (neurons,) and (kv_groups,) bool, True = keep, as long as the model's present widths.
        inplace: slice `model` itself, to save memory: the result shares its weights. Otherwise it is left as it was.

    Raises:
        ValueError: a mask of the wrong length or dtype, or one that keeps nothing where the other keeps something.
    """
    require(model, PreTrainedModel, "The model of apply_masks must be a model of transformers")
    require(masks, Masks, "The masks of apply_masks must be Masks, such as those of a run's result")
    return portable(prune(model, masks, inplace=inplace))


def save_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write config, modelling file, weights, generation config, tokenizer and a short README.md, all or nothing.

    Args:
        model, dtype: as for `to_exportable`.
        overwrite: replace a model folder; the old one stays until the new one is complete.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: folder taken, not writable or full; family that has no such export.
    """
    folder = expanded(folder).resolve()
    before, card = sorted(folder.glob("*")) if overwrite else [], folder / "README.md"
    if folder.exists() and not (before and card.is_file() and b"gprune" in card.read_bytes()):
        why = "has no README.md that mentions gprune, so it is not overwritten" if overwrite else "exists already"
        raise UserError(f"Cannot write the model: '{folder}' {why}. Move it away.")
    exportable = to_exportable(model, dtype)
    with replacing(folder) as new:
        new.mkdir()
        with warnings.catch_warnings(action="ignore"):  # that shards must fit in memory, which is seen to
            exportable.save_pretrained(new, max_shard_size=shard_size(exportable))
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config |= modeling_pruned.rope_of_older(config)  # stock configs of today do not write it
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "README.md").write_text(CARD, encoding="utf-8")
        if others := [p.name for p in before if not (p.match("model*.safetensors*") or (new / p.name).exists())]:
            raise UserError(f"Cannot overwrite '{folder}': it contains {others[0]}, which would be lost. Move it away.")
    log.info("wrote %s", folder)
    return folder


def shard_size(model: PreTrainedModel) -> int:
    """Bytes of a shard of weights: `SHARD`, or about a block of an offloaded model, as it has little in memory."""
    if not is_offloaded(model):
        return SHARD
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(model)]
    return min(SHARD, max(*layers, *(p.numel() * p.element_size() for p in model.parameters())))


def reloaded_logits(
    folder: str | Path,
    input_ids: Tensor,
    *,
    device: str = "cpu",
    max_memory: Mapping[str, str] | None = None,
    **load: Any,
) -> Tensor:
    """Logits of a folder's model, computed in a fresh process on `device`, without gprune and without network.

    Args:
        input_ids: (B, T) int64.
        max_memory: as for `gprune.models.loading.load_weights`.
        load: for `from_pretrained`.

    Returns:
        (B, T, vocabulary) logits on the CPU, in the dtype of the weights.

    Raises:
        UserError: with the last line of what the process wrote to stderr.
    """
    limits = None if max_memory is None else list(memory_limits(max_memory).items())
    with tempfile.TemporaryDirectory(prefix="gprune-reload-") as scratch:
        tokens, logits = f"{scratch}/tokens", f"{scratch}/logits"
        save_file({"input_ids": input_ids.detach().cpu().contiguous()}, tokens)
        load |= {"max_memory": limits, "offload_folder": f"{scratch}/offload"}
        settings = {"folder": str(folder), "tokens": tokens, "logits": logits, "device": device, "load": load}
        asked = json.dumps(settings | {"threads": torch.get_num_threads()})
        # A cache of its own for the copied modelling file: two checks at once must not share one.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        command = [sys.executable, "-P", str(Path(__file__).with_name("reload.py"))]  # none of our folders on its path
        done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"Cannot load '{folder}' in a fresh process: {last.removesuffix('.')}.")
        return load_file(logits)["logits"]


def max_logit_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| in float32; NaN if either holds one. Shapes must agree."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return (a.detach().float().cpu() - b.detach().float().cpu()).abs().max().item()


@torch.no_grad()
def check_reload(
    model: PreTrainedModel, folder: str | Path, input_ids: Tensor, *, dtype: torch.dtype | None = None, **placement: Any
) -> float:
    """Compare the logits of the saved model in memory with those that a fresh process computes from the folder.

    A folder that fails, or is left before it was compared, is removed.

    Args:
        input_ids: (B, T) int64.
        dtype: that the weights were saved in; the model computes in it too, and gets its own back.
        placement: `device_map` and `max_memory`, where the model was loaded with them.

    Returns:
        max |difference of logits|: 0.0.

    Raises:
        UserError: when they are not the same bits, or when the folder does not load.
    """
    training, weights = model.training, [(p, p.data) for p in model.parameters()]
    device, attention = str(device_of(model)), model.config._attn_implementation
    try:
        cast(model, dtype)
        aligned(model)  # as the fresh process has it; for this pass alone, since it copies what the dense model shares
        expected = model.eval()(input_ids.to(device), use_cache=False).logits
        for p, data in weights:
            p.data = data
        got = reloaded_logits(folder, input_ids, device=device, attn_implementation=attention, **placement)
        difference = max_logit_difference(expected, got)
        if difference != 0:  # also true of NaN
            raise UserError(
                f"Cannot export to '{folder}': logits of the reloaded model differ from the pruned model's by up to "
                f"{difference}. The folder was removed. Check the disk and export again."
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        model.train(training)
    return difference
