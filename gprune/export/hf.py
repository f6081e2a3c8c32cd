"""Save a pruned model as a Hugging Face folder that loads with or without gprune.

If all blocks have the same shape, and the family's stock config supports it, the folder is a stock model without custom
code. Otherwise it has safetensors, a config.json with the table `per_layer_config`, and the modelling file
`modeling_pruned.py`, the same for all families. Load it with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or after `gprune.register()` without remote
code.
`check_reload` compares logits of the folder in a fresh process with those of the model in memory.
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
from gprune.models.offload import attach_all_weights, device_of, is_offloaded
from gprune.models.surgery import prune
from gprune.storage.files import replacing
from gprune.storage.reading import expanded

log = logging.getLogger("gprune")

# Keys of a config that the exported class sets itself, or that do not apply to it (quantiser of a de-quantised GGUF).
NOT_CARRIED = {
    *("model_type", "architectures", "auto_map", "quantization_config"),
    *("per_layer_config", "pruned_layout", "added_biases"),
    *("rope_theta", "rope_scaling", "transformers_version", "_name_or_path"),
}
KNOWN_CODE = re.compile(r"transformers\..*|.*\bmodeling_pruned")  # modules of model classes that we can export
SHARD = 5 * 10**9  # largest file in bytes
CARD = "Pruned by gprune. Where layers differ in width, config.json has a table `per_layer_config`.\n"  # a run has more


def stock_values(model: PreTrainedModel) -> dict[str, Any]:
    """Return settings of the dense stock model, with explicit head size and dtype."""
    (first, *_) = blocks_of(model)
    carried = {key: value for key, value in model.config.to_dict().items() if key not in NOT_CARRIED}
    if first.family.found:
        return carried | {"dtype": model.dtype}
    return carried | {"head_dim": first.head_dim, "dtype": model.dtype}


def stock_skeleton(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a stock model with the shapes of `model`, without weights; None if no stock config has these shapes."""
    blocks = blocks_of(model)
    family, sizes = blocks[0].family, blocks[0].config_values
    if family.found:
        return _found_stock_skeleton(model)
    if any(block.config_values != sizes for block in blocks) or not modeling_pruned.experts_aligned(model):
        return None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for model_type, settings in {family.model_type: {}, **family.same_as}.items():
        with suppress(ValueError, StrictDataclassError):  # a config may reject these sizes
            stock = skeleton(CONFIG_MAPPING[model_type](**stock_values(model) | sizes | settings))
            if {name: tensor.shape for name, tensor in stock.state_dict().items()} == shapes:
                return stock
    return None


def pruned_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the family's pruned class with the shapes of `model`, without weights."""
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
    """Return the stock model of a discovered type, from which `model` was pruned, without weights."""
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
    """Return the settings of the text model in those of a composite configuration."""
    text = model.config.get_text_config(decoder=True)
    return next(values[name] for name in model.config.sub_configs if getattr(model.config, name, None) is text)


def _found_stock_skeleton(model: PreTrainedModel) -> PreTrainedModel | None:
    """`stock_skeleton` for discovered types: a stock model if the config has a key for each size, else None."""
    blocks, shapes = blocks_of(model), {name: tensor.shape for name, tensor in model.state_dict().items()}
    pairs = {(k, size) for block in blocks for k, size in block.config_values.items() if hasattr(model.config, k)}
    if len(sizes := dict(pairs)) < len(pairs) or not modeling_pruned.experts_aligned(model):
        return None  # the first condition: a key with several values
    with suppress(Exception):  # of any type: a class may reject these sizes
        stock = _dense_skeleton(model, sizes)
        if {name: tensor.shape for name, tensor in stock.state_dict().items()} == shapes:
            heads = [(block.heads, block.kv_groups) for block in blocks]
            if [(block.heads, block.kv_groups) for block in blocks_of(stock)] == heads:
                return stock
    return None


def _found_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """`pruned_skeleton` for discovered types, with every size written out."""
    blocks, record, own = blocks_of(model), family_of(model), {}
    stock = _dense_skeleton(model, {})
    of_stock = blocks_of(stock)
    for index, of_layer in enumerate(by_layer(blocks)):
        sizes: dict[str, list[int]] = {}
        attributes: dict[str, int] = {}
        biases: list[str] = []
        for block in of_layer:
            sizes |= {place.path: [place.dim, block.parameter(place).shape[place.dim]] for place in block.slices}
            for path, terms in block.attributes.items():
                attributes[path] = modeling_pruned.weighted_sum(terms, block.sizes)
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
    """Convert a model to the class that is saved, if possible a stock class. Weights are shared, not copied.

    Args:
        model: a model of a supported family, dense or pruned. If it is offloaded, the result can only be saved.
        dtype: dtype of weights; those of another dtype are copied. None: no change. An offloaded model needs None or
            its own dtype.
    """
    register_type(family_of(model).model_type)  # for records that were added after the import, or discovered
    exportable = stock_skeleton(model) or pruned_skeleton(model)
    exportable.load_state_dict(model.state_dict(), strict=True, assign=True)
    exportable.tie_weights()
    for name, parameter in model.named_parameters():
        exportable.get_parameter(name).requires_grad_(parameter.requires_grad)
    for path, module in list(exportable.named_modules()):  # state that is not saved
        own = model.get_submodule(path)
        if "RotaryEmbedding" in type(module).__name__:
            exportable.set_submodule(path, own)  # its frequencies may depend on the length of the text
        else:
            module._buffers.update(own._buffers)
    for choice in ("_attn_implementation", "_experts_implementation"):
        setattr(exportable.config, choice, getattr(model.config, choice))
    cast(exportable, dtype)
    exportable.generation_config = copy.deepcopy(model.generation_config)
    if is_offloaded(model):
        attach_all_weights(exportable, model)
    return exportable.train(model.training)


def cast(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Cast all parameters to a dtype, but not buffers, like loading with that dtype. None: no change."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)


def portable(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model so that `save_pretrained` writes a folder that loads, also after training.

    Some models are returned unchanged and must be saved by `save_pruned`: models on several devices or offloaded,
    because they need their hooks; models with code outside of transformers; and models with extra weights, such as
    adapters.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) == 1 and not is_offloaded(model) and KNOWN_CODE.fullmatch(type(model).__module__):
        with suppress(RuntimeError):  # from load_state_dict, for extra weights
            return to_exportable(model)
    return model


def apply_masks(model: PreTrainedModel, masks: Masks, *, inplace: bool = False) -> PreTrainedModel:
    """Remove masked units from a model, so that its weights become smaller. `save_pretrained` of the result works.

    Args:
        model: a model of a supported family, dense or pruned.
        masks: per block (neurons,) and (kv_groups,) bool, True = keep, for the current widths of the model.
        inplace: slice `model` itself, to save memory. Otherwise `model` is not changed.

    Returns:
        The pruned model.

    Raises:
        ValueError: if a mask has a wrong length or dtype, or a block keeps units of one scope only.
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
    """Write config, modelling file, weights, generation config, tokenizer and a short README.md; all or nothing.

    Args:
        model, dtype: as for `to_exportable`.
        tokenizer: the tokenizer; None for a folder without one.
        folder: the folder.
        overwrite: replace an existing model folder, after the new one is complete.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: if the folder exists, or cannot be written.
    """
    folder = expanded(folder).resolve()
    before, card = sorted(folder.glob("*")) if overwrite else [], folder / "README.md"
    if folder.exists() and not (before and card.is_file() and b"gprune" in card.read_bytes()):
        why = "has no README.md that mentions gprune, so it is not overwritten" if overwrite else "exists already"
        raise UserError(f"Cannot write the model: '{folder}' {why}. Move it away.")
    exportable = to_exportable(model, dtype)
    with replacing(folder) as new:
        new.mkdir()
        with warnings.catch_warnings(action="ignore"):  # that shards must fit in memory, which `shard_size` ensures
            exportable.save_pretrained(new, max_shard_size=shard_size(exportable))
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config |= modeling_pruned.legacy_rope_settings(config)  # current stock configs do not write it
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "README.md").write_text(CARD, encoding="utf-8")
        if others := [p.name for p in before if not (p.match("model*.safetensors*") or (new / p.name).exists())]:
            raise UserError(f"Cannot overwrite '{folder}': it contains {others[0]}, which would be lost. Move it away.")
    log.info("Saved the model to %s", folder)
    return folder


def shard_size(model: PreTrainedModel) -> int:
    """Return the size of a file of weights in bytes: `SHARD`, or for offloaded models about one layer."""
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
    """Compute logits of a saved model in a fresh process, without gprune and without network.

    Args:
        folder: the model folder.
        input_ids: (B, T) int64.
        device: device of the computation.
        max_memory: as for `gprune.models.loading.load_weights`.
        load: other arguments of `from_pretrained`.

    Returns:
        (B, T, vocabulary) logits on the CPU, in the dtype of the weights.

    Raises:
        UserError: with the last line of stderr, if the process fails.
    """
    limits = None if max_memory is None else list(memory_limits(max_memory).items())
    with tempfile.TemporaryDirectory(prefix="gprune-reload-") as scratch:
        tokens, logits = f"{scratch}/tokens", f"{scratch}/logits"
        save_file({"input_ids": input_ids.detach().cpu().contiguous()}, tokens)
        load |= {"max_memory": limits, "offload_folder": f"{scratch}/offload"}
        settings = {"folder": str(folder), "tokens": tokens, "logits": logits, "device": device, "load": load}
        asked = json.dumps(settings | {"threads": torch.get_num_threads()})
        # A separate cache for the copied modelling file, so that concurrent checks do not share one.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        # -P: without this folder on sys.path.
        command = [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("reload.py")),
        ]
        done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"Cannot load '{folder}' in a fresh process: {last.removesuffix('.')}.")
        return load_file(logits)["logits"]


def max_logit_difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| in float32; NaN if either has NaN. Shapes must be equal."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return (a.detach().float().cpu() - b.detach().float().cpu()).abs().max().item()


@torch.no_grad()
def check_reload(
    model: PreTrainedModel, folder: str | Path, input_ids: Tensor, *, dtype: torch.dtype | None = None, **placement: Any
) -> float:
    """Check that a fresh process computes the same logits from the folder as the model in memory.

    The folder is removed if the check fails or is interrupted.

    Args:
        model: the saved model.
        folder: its folder.
        input_ids: (B, T) int64.
        dtype: dtype of the saved weights. The model is cast to it for the check, and then restored.
        placement: `device_map` and `max_memory`, if the model was loaded with them.

    Returns:
        max |difference of logits|, which is 0.0.

    Raises:
        UserError: if logits are not bit-identical, or the folder does not load.
    """
    training, weights = model.training, [(p, p.data) for p in model.parameters()]
    device, attention = str(device_of(model)), model.config._attn_implementation
    try:
        cast(model, dtype)
        # As in the fresh process; only for this pass, because it copies weights shared with the dense model.
        aligned(model)
        expected = model.eval()(input_ids.to(device), use_cache=False).logits
        for p, data in weights:
            p.data = data
        got = reloaded_logits(folder, input_ids, device=device, attn_implementation=attention, **placement)
        difference = max_logit_difference(expected, got)
        if difference != 0:  # also true for NaN
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
