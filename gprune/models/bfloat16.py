"""Detect fast bfloat16 matrix products, and use them for float32 products of bfloat16 numbers, which are exact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def multiplies_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Return whether matrix products in bfloat16 are faster than in float32 on this hardware, and the reason.

    They are on GPUs if all visible GPUs have compute capability 8 or above, and on CPUs with AMX. AVX512-BF16 alone is
    not enough: on Sapphire Rapids without AMX (`ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`) products of SmolLM2's sizes take
    1.4 to 1.9 times as long in bfloat16 as in float32.
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
    if not _has_amx():
        return False, "a processor without AMX"
    # Limits of oneDNN's instruction set, in new and old versions.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit not in ("", "ALL", "DEFAULT") and "AMX" not in limit:
        return False, f"ONEDNN_MAX_CPU_ISA={limit}"
    return True, "a processor with AMX"


def _has_amx() -> bool:
    """Return whether the CPU has AMX for bfloat16, and torch has the library that uses it (oneDNN)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # torch 2.6


def has_fast_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `fast_products` has an effect for matrices of this dtype on this device."""
    return dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bfloat16(device)[0]


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
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # PyTorch's name for products in bfloat16
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
