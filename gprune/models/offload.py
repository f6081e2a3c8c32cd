"""Read and write weights that transformers and accelerate have offloaded to the CPU or the disk.

An offloaded parameter is an empty tensor on the meta device. A hook of accelerate loads its values before its module
computes, and frees them afterwards. The functions of this file get values and devices from that hook.
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
from accelerate.utils import PrefixedDataset, get_balanced_memory, infer_auto_device_map
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.storage.files import Cache, scratch_folder


def load_parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return the parameter `name` of a module with its values; None if it is None, such as a missing bias.

    An offloaded parameter is loaded to the CPU. A parameter on the meta device without a hook is returned unchanged.
    """
    parameter = getattr(module, name)
    if parameter is None or not parameter.is_meta:
        return parameter
    weight_maps = [hook.weights_map for hook in _offload_hooks(module) if hook.weights_map is not None]
    return weight_maps[0][name] if weight_maps else parameter


def free_memory(device: torch.device) -> None:
    """Collect garbage, such as models in reference cycles of hooks, and empty CUDA's cache. A no-op on a CPU."""
    if device.type != "cpu":
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _offload_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module that move weights."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # a hook may be a sequence of hooks
    return [hook for hook in hooks if hasattr(hook, "weights_map")]


def bytes_per_pass(model: PreTrainedModel, device_map: str, limits: dict[str | int, int] | None) -> int:
    """Return the bytes of weights that a forward pass of a model would load, if it is placed as by transformers.

    These are the weights on the disk and, with a GPU, in CPU memory. `model` is on the meta device, in its dtype.
    """
    if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):  # a device, which holds the whole model
        return 0
    if device_map != "sequential":
        low_zero, whole = device_map == "balanced_low_0", model._no_split_modules
        limits = get_balanced_memory(model, limits, no_split_module_classes=whole, low_zero=low_zero)
    places = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    loaded = {"disk"} if set(places.values()) <= {"cpu", "disk"} else {"cpu", "disk"}

    def place_of(name: str) -> str | int:
        return next(place for path, place in places.items() if not path or f"{name}.".startswith(f"{path}."))

    return sum(p.nbytes for name, p in model.named_parameters() if place_of(name) in loaded)


def is_offloaded(model: PreTrainedModel) -> bool:
    """Return whether some parameters are loaded each time they are needed."""
    return getattr(model, "hf_device_map", None) is not None and any(p.is_meta for p in model.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes, by its first parameter; the CPU without parameters.

    For an offloaded parameter this is the device of its hook.
    """
    for submodule in module.modules():
        parameter = next(submodule.parameters(recurse=False), None)
        if parameter is None:
            continue
        devices = [hook.execution_device for hook in _offload_hooks(submodule) if hook.execution_device is not None]
        return torch.device(devices[0]) if devices and parameter.is_meta else parameter.device
    return torch.device("cpu")


@dataclass(frozen=True)
class StoredWeights:
    """Parameters and buffers of a module by name in its state dictionary. Each one is loaded on access.

    Loaded tensors are copied, because a tensor from safetensors keeps the whole file mapped.
    """

    module: nn.Module

    def __getitem__(self, name: str) -> Tensor:
        """Return a parameter or buffer by its name."""
        path, _, attribute = name.rpartition(".")
        module = self.module.get_submodule(path)
        value = load_parameter(module, attribute)
        is_in_memory = value is getattr(module, attribute)
        return value if is_in_memory else value.clone()


def attach_weights(model: nn.Module, weights: Mapping[str, Tensor] | StoredWeights) -> None:
    """Attach `weights`, by name, to the modules of a model or layer on the meta device.

    Weights are parameters and saved buffers. They are attached in accelerate's form. `load_parameter` reads it, and so
    does `save_pretrained` if the model has an `hf_device_map`. No hooks run, so the modules cannot compute.
    """
    for path, module in model.named_modules():
        saved_buffers = module._buffers.keys() - module._non_persistent_buffers_set
        if any(getattr(module, name) is not None for name in (*module._parameters, *saved_buffers)):
            weights_of_module = PrefixedDataset(weights, f"{path}." if path else "")
            module._hf_hook = SimpleNamespace(weights_map=weights_of_module, execution_device="cpu", offload=True)


def attach_all_weights(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Attach the weights of `source`, which may be offloaded, to a model without weights, by the same names."""
    model.hf_device_map = {"": "disk"}
    attach_weights(model, StoredWeights(source))


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Load all offloaded weights of a module to its device while the context lasts, for functions that read them."""
    with ExitStack() as restored:
        for submodule in module.modules():
            for hook in _offload_hooks(submodule):
                if not hook.offload:
                    continue
                for name, empty in submodule.named_parameters(recurse=False):
                    # A copy, as in `StoredWeights`.
                    value = hook.weights_map[name].to(hook.execution_device, copy=True)
                    restored.callback(submodule._parameters.__setitem__, name, empty)
                    submodule._parameters[name] = nn.Parameter(value, requires_grad=False)
                restored.callback(setattr, hook, "offload", True)
                hook.offload = False  # so that the hook does not load and free the weights in each call
        yield


def offload_folder() -> AbstractContextManager[Path]:
    """Return a context manager with a new folder in the cache, which is removed at the end.

    Folders of killed processes are removed too.
    """
    return scratch_folder(Cache("offload").path("weights"))
