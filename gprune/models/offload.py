"""Models whose weights do not all lie where they compute: transformers and accelerate put some on the CPU or the disk.

Such a parameter is an empty tensor on the meta device, and a hook of accelerate fetches it before its module computes
and drops it afterwards. Everything here asks that hook; nothing else in gprune knows of it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.storage.cache import cache_dir
from gprune.storage.files import locked

UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def stored(module: nn.Module, name: str) -> Tensor | None:
    """The parameter `name` of a module, None if it has none: fetched to the CPU where it is offloaded, and gathered
    from all processes, which then all have to ask, where it is sharded.

    What is on the meta device without a hook, as in a model without weights, stays there.
    """
    parameter = getattr(module, name)
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if parameter is None or not parameter.is_meta:
        return parameter
    weights = [hook.weights_map for hook in _hooks(module) if hook.weights_map is not None]
    return weights[0][name] if weights else parameter


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on one module that move weights."""
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", [hook]) if hasattr(h, "weights_map")]


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether some parameters are fetched each time that they are needed."""
    return getattr(model, "hf_device_map", None) is not None and any(p.is_meta for p in model.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Where a module, or the first of a model's, computes; for weights without a hook, where they are."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            found = [hook.execution_device for hook in _hooks(part) if hook.execution_device is not None]
            return torch.device(found[0]) if found and parameter.is_meta else parameter.device
    return torch.device("cpu")


class StoredWeights(Mapping[str, Tensor]):
    """The state of a module by name, each tensor fetched when it is asked for.

    What is fetched is copied: as safetensors gives it, it holds the whole file mapped for as long as it is there.
    """

    def __init__(self, module: nn.Module):
        self.module, self.names = module, list(module.state_dict())

    def __getitem__(self, name: str) -> Tensor:
        path, _, own = name.rpartition(".")
        module = self.module.get_submodule(path)
        value = stored(module, own)
        return value if value is getattr(module, own) else value.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class InFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file whose names begin with `prefix` and a dot, by the rest of their names."""

    def __init__(self, path: Path, prefix: str):
        self.path, self.prefix = path, prefix + "." if prefix else ""

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.prefix + name).clone()  # as in `StoredWeights`

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.path, "pt") as file:
            names = list(file.keys())
        return (name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def lend(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let what is on the meta device in a module be fetched from `weights`, as accelerate would say it.

    `stored` reads it, and so does `save_pretrained` of a model with an `hf_device_map`. No hook runs: the module is
    not made to compute.
    """
    module._hf_hook = SimpleNamespace(weights_map=weights, execution_device="cpu", offload=True)


def lend_all(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Let a model without weights of its own fetch them from another of the same names, which may be offloaded."""
    model.hf_device_map = {"": "disk"}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            lend(module, StoredWeights(source.get_submodule(path)))


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """All weights of a module where it computes, for as long as the context lasts; leaving puts every one back.

    Without it, accelerate fetches each weight again for every batch.
    """
    hooks: list[Any] = []
    fetched: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for part in module.modules():
            for hook in _hooks(part):
                if hook.offload:
                    for name, empty in part.named_parameters(recurse=False):
                        value = hook.weights_map[name].to(hook.execution_device, copy=True)  # as in `StoredWeights`
                        fetched.append((part, name, empty))
                        part._parameters[name] = nn.Parameter(value, requires_grad=False)
                    hook.offload = False
                    hooks.append(hook)
        yield
    finally:
        for part, name, empty in fetched:
            part._parameters[name] = empty
        for hook in hooks:
            hook.offload = True


def scratch_folder() -> tuple[Path, ExitStack]:
    """A folder of our own below the cache, and what removes it; those that killed processes left are removed now.

    The folder is locked for as long as it is there, so that one which can be locked belongs to nobody.
    """
    root = cache_dir() / "offload"
    root.mkdir(exist_ok=True)
    for left in root.iterdir():
        with suppress(OSError), locked(left):
            shutil.rmtree(left, ignore_errors=True)
    stack = ExitStack()
    folder = Path(tempfile.mkdtemp(dir=root))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    stack.enter_context(locked(folder))
    return folder, stack


def keep_until_gone(model: nn.Module, stack: ExitStack) -> None:
    """Close a stack, such as that of a folder that the model reads from, once nobody has the model any more."""
    weakref.finalize(model, stack.close)


def bytes_of(size: str) -> int:
    """'2GiB', '500MB' or '1.5 TiB' as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)", size.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 1e15:
        raise UserError(f"--model.max_memory: expected sizes such as 2GiB or 500MB, got '{size}'.")
    return int(float(match[1]) * UNITS[match[2].lower()])


def memory_limits(sizes: Mapping[str, str]) -> dict[str | int, int]:
    """`--model.max_memory` as transformers takes it: bytes by `cpu` or device number."""
    for device in sizes:
        if device != "cpu" and not re.fullmatch(r"[0-9]{1,4}", str(device)):
            raise UserError(f"--model.max_memory: expected cpu or a device number such as 0, got '{device}'.")
    return {device if device == "cpu" else int(device): bytes_of(str(size)) for device, size in sizes.items()}
