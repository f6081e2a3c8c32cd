"""Read and write weights that transformers and accelerate have offloaded to the CPU or the disk.

An offloaded parameter is an empty tensor on the meta device, and a hook of accelerate fetches it before its module
computes and drops it afterwards. This file asks that hook; nothing else in gprune knows of it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.storage.cache import cache_dir
from gprune.storage.files import scratch_folder


def load_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter `name` of a module, or None if it has none.

    An offloaded parameter is fetched to the CPU. A sharded one is gathered from all processes, which all have to ask.
    A parameter on the meta device without a hook is returned unchanged.
    """
    parameter = gathered(getattr(module, name))
    if parameter is None or not parameter.is_meta:
        return parameter
    weights = [hook.weights_map for hook in _hooks(module) if hook.weights_map is not None]
    return weights[0][name] if weights else parameter


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process has a part.

    DTensors are recognised by a method, because some builds of torch lack `torch.distributed.tensor`.
    """
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """Return the full tensor. For sharded tensors all processes must call this function."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def free_memory(device: torch.device) -> None:
    """Collect garbage, such as models in reference cycles of hooks, and empty CUDA's cache. A no-op on a CPU."""
    if device.type != "cpu":
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module that move weights."""
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", [hook]) if hasattr(h, "weights_map")]


def is_offloaded(model: PreTrainedModel) -> bool:
    """Return whether some parameters are loaded each time they are needed."""
    return getattr(model, "hf_device_map", None) is not None and any(p.is_meta for p in model.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: that of the hook or weights of its first part with weights."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            devices = [hook.execution_device for hook in _hooks(part) if hook.execution_device is not None]
            return torch.device(devices[0]) if devices and parameter.is_meta else parameter.device
    return torch.device("cpu")


@dataclass(frozen=True)
class StoredWeights:
    """The state of a module, whose tensors are loaded on access by name.

    Loaded tensors are copied, because a tensor from safetensors keeps the whole file mapped.
    """

    module: nn.Module

    def __getitem__(self, name: str) -> Tensor:
        path, _, own = name.rpartition(".")
        module = self.module.get_submodule(path)
        value = load_parameter(module, own)
        return value if value is getattr(module, own) else value.clone()


def attach_weights(model: nn.Module, weights: Mapping[str, Tensor] | StoredWeights) -> None:
    """Attach `weights`, by name, to the modules of a model or layer on the meta device.

    The weights are attached in accelerate's form, which `stored` reads, and `save_pretrained` if the model has an
    `hf_device_map`. No hooks run, so the modules cannot compute.
    """
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            own = PrefixedDataset(weights, f"{path}." if path else "")
            module._hf_hook = SimpleNamespace(weights_map=own, execution_device="cpu", offload=True)


def attach_all_weights(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Attach the weights of `source`, which may be offloaded, to a model without weights, by the same names."""
    model.hf_device_map = {"": "disk"}
    attach_weights(model, StoredWeights(source))


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Load all offloaded weights of a module to its device while the context lasts.

    Without it accelerate loads each weight again for every batch.
    """
    with ExitStack() as back:
        for part in module.modules():
            for hook in _hooks(part):
                if hook.offload:
                    for name, empty in part.named_parameters(recurse=False):
                        # A copy, as in `StoredWeights`.
                        value = hook.weights_map[name].to(hook.execution_device, copy=True)
                        back.callback(part._parameters.__setitem__, name, empty)
                        part._parameters[name] = nn.Parameter(value, requires_grad=False)
                    back.callback(setattr, hook, "offload", True)
                    hook.offload = False
        yield


def offload_folder() -> AbstractContextManager[Path]:
    """Return a new folder in the cache, which is removed at the end. Folders of killed processes are removed too."""
    return scratch_folder(cache_dir() / "offload" / "weights")
