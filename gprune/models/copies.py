"""Models from a configuration and copies of models: without weights, without hooks, or sharded over processes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from gprune.errors import quoting
from gprune.models.families import Family, attach_record, decoder_layers, decoder_of
from gprune.models.offload import load_parameter

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed.device_mesh import DeviceMesh


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class of a configuration: for causal language models, or else for images and text."""
    has_remote_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_causal = has_remote_class or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    has_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if has_images and not is_causal else AutoModelForCausalLM


def skeleton(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None, *, record: Family | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Return a model without weights, on the meta device, and attach its `record`, if given.

    `model_class` overrides the class of the config.
    """
    with quoting("--model.name: Cannot build a model from its configuration: "), torch.device("meta"):
        if model_class is not None:
            model = model_class(config)
        else:
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    if record is not None:
        attach_record(model, record)
    return model


def copy_without_hooks(model: PreTrainedModel, memo: dict[int, object]) -> PreTrainedModel:
    """Return a deep copy of a model without its hooks; `memo` as for `copy.deepcopy`."""
    for module in model.modules():  # the copy gets new, empty dictionaries of hooks
        memo[id(module._forward_hooks)] = OrderedDict()
        memo[id(module._forward_pre_hooks)] = OrderedDict()
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():  # so that transformers installs its own hooks on the copy
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return copied


def with_sharded_layers(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Return a copy of a model with decoder layers sharded over the processes of a mesh by `fully_shard`.

    A layer is gathered while it computes, forward and backward. Other weights share their values with the model.
    """
    from torch.distributed.fsdp import fully_shard  # not every build of torch has it

    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():  # other objects, because `fully_shard` moves their values to its device
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    copied = copy_without_hooks(model, memo)
    for layer in decoder_layers(copied):  # each one is a root module, which by default stays gathered
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    share_hooks(decoder_of(copied), decoder_of(model))
    return copied


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process has a part.

    DTensors are recognised by a method, because some builds of torch lack `torch.distributed.tensor`.
    """
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all values of a sharded tensor, gathered from all processes; other tensors are returned unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def has_own_head(model: PreTrainedModel) -> bool:
    """Return whether the head has other weights than the input embedding; False if it has no weight.

    The config is not asked, because transformers does not tie weights that differ in the checkpoint, whatever
    `tie_word_embeddings` says. Offloaded weights are loaded.
    """
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return False
    weight, embeddings = load_parameter(head, "weight"), load_parameter(model.get_input_embeddings(), "weight")
    if weight is embeddings:
        return False
    if weight.is_meta or embeddings.is_meta:  # without weights, where tied ones are one object
        return True
    return not torch.equal(weight.cpu(), embeddings.cpu())  # equal weights on two devices are tied when reloaded


def share_hooks(copied: nn.Module, module: nn.Module) -> None:
    """Share forward pre-hooks of a module, such as those that count tokens, with its copy."""
    for attribute in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(copied, attribute, getattr(module, attribute))


@torch.no_grad()
def turn_off_rescaling(model: PreTrainedModel) -> None:
    """Make a model compute with the weights of its files, in place. A no-op for types other than RWKV.

    Against overflow in float16, the first evaluation of RWKV divides weights of layer i by 2^(i // rescale_every) in
    place. Then weights depend on whether the model has run, and on the number of their layer, which sliced, saved or
    removed layers do not keep. Logits do not change, except for the epsilon of norms.
    """
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            was_training, module.training = module.training, True
            module._rescale_layers()  # multiplies by powers of 2, which is exact
            module.training = was_training
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0
