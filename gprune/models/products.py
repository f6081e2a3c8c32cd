"""Choose the fastest matrix products of this hardware: in bfloat16 for training, in float32 for all else.

Autocast casts a float32 weight to bfloat16 for every matrix product. For frozen weights the result is always the same,
so a cached copy (`CastWeights`) saves the cast without changing a bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gprune.models.copies import is_sharded

# Parts of oneDNN's names of instruction sets, such as AVX512_CORE_AMX, from which on it has AMX, and so on.
WITH_AMX = ("AMX",)
WITH_AVX512_BF16 = ("BF16", "FP16", "AMX", "AVX10")
WITH_AVX512 = ("AVX512", "AVX10")
PRODUCT_MODULES = (nn.Linear, Conv1D)  # modules whose weights are only used in matrix products, which autocast casts


def multiplies_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Return whether matrix products in bfloat16 are faster than in float32 on this hardware, and the reason.

    They are on NVIDIA's GPUs if all visible ones have compute capability 8 or above, on all GPUs of AMD, and on a
    planned GPU that this machine does not have. They are on CPUs with AMX, and on AMD's CPUs with AVX512-BF16 (Zen 5:
    4.4 times as fast as MKL's float32, 2.0 times as fast as oneDNN's). On Intel's CPUs AVX512-BF16 alone is not enough:
    on Sapphire Rapids without AMX (`ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`) products of SmolLM2's sizes take 1.4 to 1.9
    times as long in bfloat16 as in float32.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return True, "assumed for the planned GPU"
        if torch.version.hip:
            return True, "an AMD GPU"
        lowest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        return lowest >= (8, 0), f"a GPU of compute capability {lowest[0]}.{lowest[1]}"
    if device.type != "cpu":
        return False, f"{device.type} without AMX"
    if _cpu_has("amx_bf16"):
        name, instruction_sets = "a processor with AMX", WITH_AMX
    elif _cpu_has("avx512_bf16") and _is_amd():
        name, instruction_sets = "an AMD processor with AVX512-BF16", WITH_AVX512_BF16
    else:
        return False, "a processor with neither AMX nor AMD's AVX512-BF16"
    if not _onednn_may_use(instruction_sets):
        return False, f"ONEDNN_MAX_CPU_ISA={_onednn_limit()}"
    return True, name


def float32_by_onednn(device: torch.device) -> bool:
    """Return whether oneDNN multiplies float32 faster than MKL, PyTorch's default, in the same precision.

    MKL does not use AVX-512 on AMD's CPUs: on Zen 5, oneDNN is 2.2 times as fast. PyTorch calls oneDNN for float32 with
    `torch.set_float32_matmul_precision("medium")`, which permits products in bfloat16. Without AMX, oneDNN still
    computes in float32. As later versions may not, the precision of a product is checked here.
    """
    is_candidate = device.type == "cpu" and _cpu_has("avx512_f") and not _cpu_has("amx_bf16") and _is_amd()
    return is_candidate and _onednn_may_use(WITH_AVX512) and _onednn_keeps_float32()


@cache
def _onednn_keeps_float32() -> bool:
    """Return whether products in the matmul precision "medium" have the precision of float32."""
    factor = torch.full((256, 256), 1 + 2.0**-12)  # 1 in bfloat16
    with _medium_precision():
        product = factor @ torch.ones(256, 256)
    return bool(((product / 256 - factor).abs() < 2.0**-16).all())


def _cpu_has(instruction_set: str) -> bool:
    """Return whether the CPU has an instruction set, and torch has the library that uses it (oneDNN)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(instruction_set))
    functions = {"amx_bf16": "amx_tile", "avx512_bf16": "avx512_bf16", "avx512_f": "avx512"}  # of torch 2.6
    function = getattr(torch.cpu, f"_is_{functions[instruction_set]}_supported", bool)  # bool() is False
    return bool(function())


def _is_amd() -> bool:
    """Return whether the CPU is made by AMD."""
    if hasattr(torch.cpu, "get_capabilities") and (name := torch.cpu.get_capabilities().get("cpu_name")):
        return "AMD" in name
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


def _onednn_limit() -> str:
    """Return the highest instruction set that the user lets oneDNN use, or an empty string."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()  # new and old versions


def _onednn_may_use(instruction_sets: tuple[str, ...]) -> bool:
    """Return whether oneDNN's limit has one of these parts of names, or there is no limit."""
    limit = _onednn_limit()
    return limit in ("", "ALL", "DEFAULT") or any(name in limit for name in instruction_sets)


def has_fast_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `fast_products` has an effect for matrices of this dtype on this device."""
    return dtype == torch.bfloat16 and device.type == "cpu" and _cpu_has("amx_bf16") and _onednn_may_use(WITH_AMX)


@contextmanager
def fast_products(operand: Tensor) -> Iterator[None]:
    """Multiply float32 matrices in bfloat16 while the context lasts, if `operand` is bfloat16 and on a CPU with AMX.

    Use it for products of `operand.float()`. Products of two bfloat16 numbers are exact in float32, and sums are
    float32 too, so the result has the precision of a float32 product, in a third of the time. Other factors are rounded
    to bfloat16.
    """
    if not has_fast_products(operand.dtype, operand.device):
        yield
        return
    with _medium_precision():
        yield


@contextmanager
def _medium_precision() -> Iterator[None]:
    """Context with the matmul precision "medium", PyTorch's name for products in bfloat16 where that is faster."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


class CastWeights:
    """Copies of a model's frozen weights, made at the first use under autocast.

    Embeddings and norms have no copy, because autocast computes them in float32; a head that is tied to the embeddings
    has one. Trained, offloaded and sharded weights have no copy.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id: the weight, its version, and its copy

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the copies while the context lasts. A no-op without autocast.

        The backward pass may run after the context, because it uses tensors of the forward pass.
        """
        with ExitStack() as restored:
            for module in self.model.modules():
                if type(module) not in PRODUCT_MODULES:
                    continue
                for name, weight in module._parameters.items():
                    if weight is not None and (copy := self._copy(weight)) is not None:
                        restored.callback(module._parameters.__setitem__, name, weight)
                        module._parameters[name] = copy
            yield

    def _copy(self, weight: Tensor) -> Tensor | None:
        """Return the copy of a weight, or None if autocast does not cast it or it may change.

        A copy is made at the first call, and again if the weight has changed since.
        """
        if weight.requires_grad or weight.is_meta or is_sharded(weight) or weight.dtype != torch.float32:
            return None
        device_type = weight.device.type
        if not torch.is_autocast_enabled(device_type):
            return None
        if id(weight) in self._copies:
            source, version, copy = self._copies[id(weight)]
            # Ids are reused, so the tensor itself is compared too.
            if source is weight and version == weight._version and copy.device == weight.device:
                return copy
        copy = nn.Parameter(weight.detach().to(torch.get_autocast_dtype(device_type)), requires_grad=False)
        self._copies[id(weight)] = (weight, weight._version, copy)
        return copy
