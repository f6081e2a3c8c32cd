"""Simulate several devices on the CPU, and count how often the host waits for a device.

    with simulate_devices() as devices:
        model = place_on_devices(make_tiny("llama"), 2)      # accelerate's own dispatch over lazy:0 and lazy:1
        collect(model, batches)
    assert devices.waits <= 40, devices.by_place

A `SimulatedTensor` reports the device `lazy:N` and computes on the CPU. As with CUDA, an operation on tensors of
different devices fails; allowed are 0-dimensional tensors of the CPU, an index on the CPU, and copies. Counted are host
synchronisations: the host reads a value (`.item()`, `bool()`, `.cpu()`, `nonzero`, `x[mask]`, ...), or copies a tensor
of the CPU to a device without `non_blocking`. They are counted by the place in the code of gprune.

The devices have the type `lazy`, for which this build of torch has no backend: so nothing is registered in the process,
and autograd runs such tensors in the calling thread. `PrivateUse1` in Python has only one device, and has to be
registered before the first backward pass of a process. A `TorchDispatchMode` executes all operations; outside of it an
operation on these tensors is an error.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import gprune
from gprune.models.families import decoder_layers

TYPE = "lazy"
PACKAGE = str(Path(gprune.__file__).parent)
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Operations for which CUDA has to wait: the host needs their result, or the size of their result.
SYNCHRONISING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.bincount.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.linalg_cholesky_ex.default, aten.is_nonzero.default,
    aten._linalg_svd.default, aten.linalg_qr.default, aten._linalg_eigh.default,
}  # fmt: skip


class SimulatedTensor(Tensor):
    """A tensor of a simulated device. Its values are in `inner`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> SimulatedTensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip

    def __init__(self, inner: Tensor, device: torch.device):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on {TYPE} outside of `simulate_devices()`")

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)
        self.__dict__.update(new.__dict__)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.inner}, device='{self.device}')"


class Devices(TorchDispatchMode):
    """Execute operations on simulated devices, and count host synchronisations."""

    def __init__(self) -> None:
        super().__init__()
        self.by_place: Counter[str] = Counter()

    @property
    def waits(self) -> int:
        """Number of host synchronisations, without those that Lightning caused."""
        return sum(count for place, count in self.by_place.items() if not place.startswith("lightning"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        simulated: dict[int, SimulatedTensor] = {}
        places: list[torch.device] = []
        others: list[Tensor] = []

        def unwrap(x: Tensor) -> Tensor:
            if isinstance(x, SimulatedTensor):
                simulated[id(x.inner)] = x
                places.append(x.device)
                return x.inner
            others.append(x)
            return x

        args, kwargs = (tree_map_only(Tensor, unwrap, value) for value in (args, kwargs or {}))
        requested = kwargs.get("device")
        if not places and (requested is None or torch.device(requested).type != TYPE):
            return func(*args, **kwargs)
        device = places[0] if requested is None else torch.device(requested)
        if func in COPIES:
            device = self._device_of_copy(func, places, others, device, non_blocking=bool(kwargs.get("non_blocking")))
        else:
            self._check_devices(func, places, others)
        if requested is not None:
            kwargs["device"] = torch.device("cpu")
        if func in SYNCHRONISING or (func in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])):
            self._count_wait(str(func).removeprefix("aten."))
        if func is aten.histc.default:  # the CPU has no histc for integers
            return SimulatedTensor(func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype), device)
        out = func(*args, **kwargs)
        if device.type == "cpu" or func is aten._local_scalar_dense.default:
            return out
        return tree_map_only(
            Tensor, lambda x: simulated[id(x)] if id(x) in simulated else SimulatedTensor(x, device), out
        )

    def _check_devices(self, func: Any, places: Sequence[torch.device], others: Sequence[Tensor]) -> None:
        """Raise RuntimeError if the tensors of an operation are on different devices, as CUDA does.

        Args:
            places: devices of the simulated tensors.
            others: tensors of the CPU.
        """
        cpu_tensors = [t for t in others if t.dim() > 0]
        if func in INDEXED and all(t.dtype in (torch.bool, torch.long) for t in cpu_tensors):
            if cpu_tensors:
                self._count_wait(f"{func} by an index of the CPU")
            cpu_tensors = []
        found_devices = {*places, *(t.device for t in cpu_tensors)}
        if len(found_devices) > 1:
            names = " and ".join(sorted(map(str, found_devices)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {names}")

    def _device_of_copy(
        self, func: Any, places: Sequence[torch.device], others: Sequence[Tensor], device: torch.device, *,
        non_blocking: bool,
    ) -> torch.device:  # fmt: skip
        """Return the device of a copy. Copies between host and device wait, unless they are non-blocking."""
        if func is aten.copy_.default and others:
            self._count_wait("copy_")
            return places[0]
        if func is aten._to_copy.default:
            source = places[0].type if places else "cpu"
            if source != device.type and not (non_blocking and source == "cpu"):
                self._count_wait("to cpu" if device.type == "cpu" else "from cpu")
        return device

    def _count_wait(self, operation: str) -> None:
        """Count a synchronisation at the innermost function of Lightning or gprune that is being executed."""
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if "/lightning/" in name:
                self.by_place[f"lightning {frame.f_code.co_name}: {operation}"] += 1
                return
            if name.startswith(PACKAGE):
                self.by_place[f"{name.removeprefix(PACKAGE)[1:]} {frame.f_code.co_name}: {operation}"] += 1
                return
            frame = frame.f_back
        self.by_place[f"outside: {operation}"] += 1


@contextmanager
def simulate_devices() -> Iterator[Devices]:
    """Provide the devices `lazy:0`, `lazy:1`, ... inside the context. Lightning's `cpu` is `lazy:0` there."""
    is_autocast_enabled, attention = torch.is_autocast_enabled, F.scaled_dot_product_attention

    def fused_attention(query, key, value, attn_mask=None, *, is_causal=False, enable_gqa=False, **options):
        """Compute attention without a (tokens, tokens) matrix, as on a GPU."""
        mask = attn_mask
        if not isinstance(query, SimulatedTensor):
            return attention(query, key, value, mask, is_causal=is_causal, enable_gqa=enable_gqa, **options)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=is_causal, attn_mask=mask, **options
        )[0]

    with pytest.MonkeyPatch.context() as patch, Devices() as mode:
        patch.setattr(torch, TYPE, torch.cpu, raising=False)
        patch.setattr(F, "scaled_dot_product_attention", fused_attention)
        # Torch checks autocast only for devices that have a backend.
        patch.setattr(torch, "is_autocast_enabled", lambda *types: types != (TYPE,) and is_autocast_enabled(*types))
        # In inference mode torch does not allow writes to a view of a wrapper tensor.
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
        optimizers = sys.modules["torch.optim.optimizer"]  # torch.optim deletes this name
        patch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [TYPE, "cpu"])
        patch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
        patch.setattr(
            _AcceleratorConnector, "_choose_strategy", lambda self: SingleDeviceStrategy(torch.device(TYPE, 0))
        )
        # As with CUDA, `module.to` keeps the Parameter objects, so other references to them move too.
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so the mode sees the copy of `torch.tensor(x, device=...)`
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def place_on_devices(model: nn.Module, devices: int) -> nn.Module:
    """Place a model on one simulated device, or distribute its layers with accelerate as `device_map auto` does.

    The last device gets the last layers, the final norm, and an untied output projection.
    """
    if devices == 1:
        return model.to(f"{TYPE}:0")
    layers = len(decoder_layers(model))
    (path,) = [name for name, module in model.named_modules() if module is decoder_layers(model)]
    device_map = {f"{path}.{i}": f"{TYPE}:{i * devices // layers}" for i in range(layers)}

    def is_placed(name: str) -> bool:
        return any(name == placed or name.startswith(placed + ".") for placed in device_map)

    for name, module in model.named_modules():
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if name and name != path and has_parameters and not is_placed(name):
            is_embedding = module is model.get_input_embeddings() or "wpe" in name or "embed_positions" in name
            device_map[name] = f"{TYPE}:{0 if is_embedding else devices - 1}"
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:  # tied
        (head,) = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        device_map[head] = f"{TYPE}:0"
    for name in {buffer.rpartition(".")[0] for buffer, _ in model.named_buffers()}:  # such as rotary frequencies
        if name and not is_placed(name):
            device_map[name] = f"{TYPE}:0"
    model = dispatch_model(model, device_map, main_device=f"{TYPE}:0")
    model.hf_device_map = device_map
    return model
