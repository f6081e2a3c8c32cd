"""Save a pruned model as a Hugging Face folder that loads with or without gprune.

If all blocks have the same shape, and the family's stock config supports it, the folder is a stock model without custom
code. Otherwise it has safetensors, a config.json with the sizes of every layer (`pruned_layout`), and the modelling
file `modeling_pruned.py`, the same for all families. Load it with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or after `gprune.register(TYPE)` without remote
code. If transformers has no causal class for the type, the class is `AutoModelForImageTextToText`. Folders of models
that take images have the files of the dense model's processor too, for `AutoProcessor`.
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gprune.checks import memory_limits, require
from gprune.discovery import family_of
from gprune.errors import UserError, first_line
from gprune.export.reload import align_weights
from gprune.models import modeling_pruned
from gprune.models.agreement import CHECK_TEXT, compare
from gprune.models.copies import has_own_head, skeleton, turn_off_rescaling
from gprune.models.families import decoder_layers, record_of
from gprune.models.loading import copy_processor, pruned_classes, register_type
from gprune.models.masks import Masks
from gprune.models.offload import attach_all_weights, device_of, is_offloaded
from gprune.models.paths import attribute_at
from gprune.models.surgery import slice_model
from gprune.models.units import sizes_of_layer, units_by_layer, units_of
from gprune.storage.files import replacing
from gprune.storage.paths import expanded

log = logging.getLogger("gprune")

# Type -> another one with the same computation, whose config allows more shapes -> settings for which it is the same.
# LlamaConfig requires that hidden_size is a multiple of the number of heads.
SAME_AS = {"llama": {"mistral": {"sliding_window": None}}}
# Keys of a config that the exported class sets itself, or that do not apply to it, such as the quantisation of a GGUF
# file whose weights were de-quantised.
EXCLUDED_KEYS = {
    *("model_type", "architectures", "auto_map", "quantization_config"),
    *("per_layer_config", "pruned_layout", "added_biases"),
    *("rope_theta", "rope_scaling", "transformers_version", "_name_or_path"),
}
KNOWN_CODE = re.compile(r"transformers\..*|.*\bmodeling_pruned")  # modules of model classes that we can export
MAX_FILE_BYTES = 5 * 10**9  # largest file of weights
# README.md of a folder that is saved without a run. A run writes a model card instead.
CARD = "Pruned by gprune. Where layers differ in width, config.json has their sizes (`pruned_layout`).\n"


def dense_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the model's config without gprune's keys, plus `dtype` and, for types in `FAMILIES`, `head_dim`.

    The config class of other types, which are discovered, may not have the key `head_dim`. `tie_word_embeddings` is
    False if the head has its own weights, even if the config says otherwise.
    """
    is_discovered = record_of(model).found
    # Exports of a discovered type have no table of ours, so this is a table of transformers, such as Gemma 4's head
    # sizes.
    excluded = EXCLUDED_KEYS - {"per_layer_config"} if is_discovered else EXCLUDED_KEYS
    settings = {key: value for key, value in model.config.to_dict().items() if key not in excluded}
    if not is_discovered:
        settings["head_dim"] = decoder_layers(model)[0].self_attn.head_dim
    parts = [part for part in (settings, text_settings(model, settings)) if part.get("tie_word_embeddings")]
    if parts and has_own_head(model):
        for part in parts:
            part["tie_word_embeddings"] = False
    return settings | {"dtype": model.dtype}


def text_settings(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the dictionary of the text model's settings in the settings of a configuration, composite or not."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        return settings
    return next(settings[name] for name in model.config.sub_configs if getattr(model.config, name, None) is text)


def stock_skeleton(
    model: PreTrainedModel, changes: Mapping[str, Any], *, model_type: str | None = None
) -> PreTrainedModel:
    """Return a stock model without weights, with the config of `model` and `changes` to it.

    `model_type` replaces the type, but not the record, which is that of `model`. Without changes each layer has the
    shapes that it has in the dense model.
    """
    record = record_of(model)
    settings = dense_settings(model)
    text_settings(model, settings).update(changes)  # in place, because a composite config contains them
    config = CONFIG_MAPPING[model_type or record.model_type](**settings)
    config._attn_implementation = implementation(model.config, "_attn_implementation")
    return skeleton(config, record=record)


def stock_export(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a stock model with the shapes of `model`, without weights; None if no stock config has these shapes.

    If the config of the type does not allow the shapes, another type with the same computation is tried (`SAME_AS`).
    """
    if not modeling_pruned.experts_aligned(model):
        return None
    units, record = units_of(model), record_of(model)
    text_config = model.config.get_text_config(decoder=True)
    keys_and_sizes = {
        (key, size * u.count)
        for u in units
        for key, size in u.settings.items()
        if not record.found or hasattr(text_config, key)  # keys of discovered types may be those of a nested config
    }
    keys = [key for key, _ in keys_and_sizes]
    # A key with several values keeps that of the configuration. Several shared experts, for example, are wider than the
    # size of one. Shapes are compared below.
    sizes = {key: size for key, size in keys_and_sizes if keys.count(key) == 1}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    counts = [(u.count, len(u.slices[-1].unit)) for u in units if u.kind == "kv_groups" and u.reads]
    for model_type, needed_settings in ({record.model_type: {}} | SAME_AS.get(record.model_type, {})).items():
        with suppress(Exception):  # a class may reject these sizes with an exception of any type
            stock = stock_skeleton(model, sizes | needed_settings, model_type=model_type)
            same_shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()} == shapes
            of_stock = [(u.count, len(u.slices[-1].unit)) for u in units_of(stock) if u.kind == "kv_groups" and u.reads]
            if same_shapes and of_stock == counts:
                return stock
    return None


def pruned_export(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the type's pruned class with the shapes of `model`, without weights.

    Its config has all sizes of every layer. For types in `FAMILIES` it also has the table `per_layer_config`: layer ->
    the settings in which the layer differs from the dense model.
    """
    record, settings = record_of(model), dense_settings(model)
    stock = stock_skeleton(model, {})
    own: dict[str, dict[str, Any]] = {}
    table: dict[str, dict[str, Any]] = {}
    for index, (units, stock_units) in enumerate(zip(units_by_layer(model), units_by_layer(stock), strict=True)):
        sizes, experts, biases = {}, {}, []
        dense_experts = {u.key: u.count for u in stock_units}
        for u in reversed(units):  # neurons before the experts that have them
            if u.kind == "experts" and u.count == dense_experts[u.key]:
                continue  # as in folders of earlier versions
            for s in u.slices:
                if s.path in sizes:
                    experts[s.path] = u.count
                else:
                    sizes[s.path] = [s.dim, len(s.unit)]
        layer, stock_layer = decoder_layers(model)[index], decoder_layers(stock)[index]
        projections = [u.reads for u in units if u.kind in ("neurons", "kv_groups") and u.reads]
        for path in reversed(projections):
            if attribute_at(layer, f"{path}.bias") is not None and attribute_at(stock_layer, f"{path}.bias") is None:
                biases.append(path)  # that recovery has added
        values, attributes = sizes_of_layer(units)
        own[str(index)] = {"sizes": sizes, "attributes": attributes, "values": values, "added_biases": biases}
        if experts:
            own[str(index)]["experts"] = experts
        different = {
            key: value for key, value in (values | {"added_biases": biases}).items() if value != settings.get(key, [])
        }  # fmt: skip
        if different:
            table[str(index)] = different
    path = next(path for path, module in stock.named_modules() if module is decoder_layers(stock))
    config_class, _, model_class = pruned_classes(record.model_type)
    keys = {} if record.found else {"per_layer_config": table, "added_biases": []}
    config = config_class(**settings, **keys, pruned_layout={"layers": path, "own": own})
    return skeleton(config, model_class, record=record)


def to_exportable(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Convert a model to the class that is saved, if possible a stock class, and to `dtype`, if given.

    Weights are shared, not copied, unless their dtype changes.
    """
    turn_off_rescaling(model)
    register_type(family_of(model).model_type)  # for records that were added after the import, or discovered
    exportable = stock_export(model) or pruned_export(model)
    exportable.load_state_dict(model.state_dict(), strict=True, assign=True)
    exportable.tie_weights()
    for name, parameter in model.named_parameters():
        exportable.get_parameter(name).requires_grad_(parameter.requires_grad)
    for path, module in list(exportable.named_modules()):  # share state that is not saved
        original = model.get_submodule(path)
        if "RotaryEmbedding" in type(module).__name__:
            exportable.set_submodule(path, original)  # its frequencies may depend on the length of the text
        else:
            module._buffers.update(original._buffers)
    for name in ("_attn_implementation", "_experts_implementation"):
        setattr(exportable.config, name, implementation(model.config, name))
    cast_parameters(exportable, dtype)
    exportable.generation_config = copy.deepcopy(model.generation_config)
    if is_offloaded(model):
        attach_all_weights(exportable, model)
    return exportable.train(model.training)


def implementation(config: PreTrainedConfig, name: str) -> Any:
    """Return the implementation that a config names, in the form that transformers accepts for its class."""
    sub_configs = {key: getattr(config, key, None) for key in config.sub_configs}
    nested = {key: implementation(sub, name) for key, sub in sub_configs.items() if isinstance(sub, PreTrainedConfig)}
    own = getattr(config, name)
    return {"": own, **nested} if nested else own


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Cast all parameters to a dtype in place, but not buffers, as loading with that dtype does. None: no change.

    The parameters `kept_in_float32` become float32 instead.
    """
    if dtype is None:
        return
    in_float32 = kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in in_float32 else dtype)


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Return names of parameters that the model's class keeps in float32 in a model of this dtype.

    Examples are routers of experts in bfloat16. The model may be without weights.
    """
    # transformers names them by patterns, and loads them with the same search.
    patterns = set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    searches = [re.compile(pattern.replace("*", ".*")).search for pattern in patterns]
    return {name for name, _ in model.named_parameters() if any(search(name) for search in searches)}


def to_portable(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model so that `save_pretrained` writes a folder that loads, also after training.

    Some models are returned unchanged: models on several devices or offloaded, which need their hooks, and are saved by
    `save_pruned`; models with code outside of transformers; and models with extra weights, such as adapters.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) == 1 and not is_offloaded(model) and KNOWN_CODE.fullmatch(type(model).__module__):
        with suppress(RuntimeError):  # from load_state_dict, for extra weights
            return to_exportable(model)
    return model


def apply_masks(model: PreTrainedModel, masks: Masks, *, inplace: bool = False) -> PreTrainedModel:
    """Remove masked units from a model, so that its weights become smaller. `save_pretrained` of the result works, with
    the exceptions of `to_portable`.

    Args:
        model: a model of a supported type, dense or pruned.
        masks: keep masks by key of units, for the current widths of the model.
        inplace: slice `model` itself, to save memory. Otherwise `model` is not changed, except that RWKV's rescaling of
            weights is turned off, which leaves its logits as they are.

    Returns:
        The pruned model.

    Raises:
        UserError: if an argument has a wrong type, the model's type is not supported, or the masks do not fit the
            model, as for `slice_model`.
    """
    require(model, PreTrainedModel, "The model of apply_masks must be a model of transformers")
    require(masks, Masks, "The masks of apply_masks must be Masks, such as those of a run's result")
    family_of(model)
    return to_portable(slice_model(model, masks, inplace=inplace))


def save_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write config, modelling file, weights, generation config, tokenizer and a short README.md; all or nothing.

    Weights are cast to `dtype`, if given. `overwrite` replaces an earlier folder of gprune.
    """
    folder = expanded(folder).resolve()
    existing = sorted(folder.glob("*")) if overwrite else []
    card = folder / "README.md"
    is_ours = existing and card.is_file() and b"gprune" in card.read_bytes()
    if folder.exists() and not is_ours:
        why = "has no README.md that mentions gprune, so it is not overwritten" if overwrite else "exists already"
        raise UserError(f"Cannot write the model: '{folder}' {why}. Move it away.")
    exportable = to_exportable(model, dtype)
    with replacing(folder) as new:
        new.mkdir()
        with warnings.catch_warnings(action="ignore"):  # about memory for shards, which `shard_size` keeps small
            exportable.save_pretrained(new, max_shard_size=shard_size(exportable))
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        # Stock configs of transformers 5 do not write these keys, which older versions read.
        config |= modeling_pruned.legacy_rope_settings(config)
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, new, exportable.config)
            copy_processor(tokenizer.name_or_path, exportable, new)
        (new / "README.md").write_text(CARD, encoding="utf-8")
        lost = [
            path.name for path in existing if not path.match("model*.safetensors*") and not (new / path.name).exists()
        ]
        if lost:
            raise UserError(f"Cannot overwrite '{folder}': it contains {lost[0]}, which would be lost. Move it away.")
    log.info("Saved the model to %s", folder)
    return folder


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, config: PreTrainedConfig) -> None:
    """Write a tokenizer into an exported folder with this config, and warn if `AutoTokenizer` gives other ids.

    `AutoTokenizer` chooses a class by the type of the model, which may be another one than that of the dense model.
    """
    tokenizer.save_pretrained(folder)
    expected = tokenizer(CHECK_TEXT).input_ids
    try:
        found = AutoTokenizer.from_pretrained(folder, config=config)(CHECK_TEXT).input_ids
        problem = None if found == expected else "gives other ids than the model's own tokenizer"
    except Exception as error:
        problem = f"cannot load the folder's tokenizer: {first_line(error)}"
    if problem is not None:
        source = tokenizer.name_or_path or type(tokenizer).__name__
        log.warning("AutoTokenizer %s. Load the tokenizer of '%s' for the exported model.", problem, source)


def shard_size(model: PreTrainedModel) -> int:
    """Return the largest size of a file of weights in bytes.

    It is `MAX_FILE_BYTES` or, for an offloaded model, that of the largest layer or parameter, so that little memory is
    needed.
    """
    if not is_offloaded(model):
        return MAX_FILE_BYTES
    layer_bytes = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    parameter_bytes = [p.nbytes for p in model.parameters()]
    return min(MAX_FILE_BYTES, max(layer_bytes + parameter_bytes))


def reloaded_logits(
    folder: str | Path,
    input_ids: Tensor,
    *,
    device: str = "cpu",
    max_memory: Mapping[str, str] | None = None,
    **load: Any,
) -> Tensor:
    """Return logits (B, T, vocabulary) of a saved model in a fresh process, without gprune and network.

    `max_memory` is as for `--model.max_memory`, and `load` has other arguments of `from_pretrained`.
    """
    limits = None if max_memory is None else list(memory_limits(max_memory).items())
    with tempfile.TemporaryDirectory(prefix="gprune-reload-") as scratch:
        tokens_file, logits_file = f"{scratch}/tokens", f"{scratch}/logits"
        save_file({"input_ids": input_ids.detach().cpu().contiguous()}, tokens_file)
        load |= {"max_memory": limits, "offload_folder": f"{scratch}/offload"}
        request = {
            "folder": str(folder),
            "tokens": tokens_file,
            "logits": logits_file,
            "device": device,
            "load": load,
            "threads": torch.get_num_threads(),
        }
        # A separate cache for the copied modelling file, so that concurrent checks do not share one.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        script = Path(__file__).with_name("reload.py")
        command = [sys.executable, "-P", str(script)]  # -P: do not add the folder of the script to sys.path
        process = subprocess.run(
            command, input=json.dumps(request), env=environment, capture_output=True, text=True, check=False
        )
        if process.returncode != 0:
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            raise UserError(f"Cannot load '{folder}' in a fresh process: {lines[-1].removesuffix('.')}.")
        return load_file(logits_file)["logits"]


@torch.no_grad()
def check_reload(
    model: PreTrainedModel, folder: str | Path, input_ids: Tensor, *, dtype: torch.dtype | None = None, **placement: Any
) -> float:
    """Check that a fresh process computes the same logits from the folder as the model in memory.

    The result is max |difference of logits| for ids (B, T), which is 0.0. Any other difference raises UserError. The
    folder is removed if the check fails or is interrupted. `dtype` is as for `save_pruned`, and `placement` as for
    `reloaded_logits`.
    """
    training = model.training
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    device, attention = str(device_of(model)), implementation(model.config, "_attn_implementation")
    try:
        try:
            cast_parameters(model, dtype)
            # As in the fresh process; only for this pass, because it copies weights shared with the dense model.
            align_weights(model)
            expected = model.eval()(input_ids.to(device), use_cache=False).logits
        finally:
            for parameter, data in weights:
                parameter.data = data
        logits = reloaded_logits(folder, input_ids, device=device, attn_implementation=attention, **placement)
        difference = compare(expected, logits).largest
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
