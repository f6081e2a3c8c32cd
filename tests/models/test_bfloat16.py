"""Matrix products of bfloat16 numbers with the precision of float32, with and without AMX."""

from __future__ import annotations

import pytest
import torch

from gprune.calibration.moments import StreamingMoments, add_gram, fill_gram
from gprune.models import bfloat16
from gprune.models.bfloat16 import fast_products, has_fast_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _without_isa_limits(monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def numbers(*shape: int) -> torch.Tensor:
    """Numbers of different magnitudes and with outliers, similar to activations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    x[..., 3] *= 1000
    return x * torch.rand(shape[-1], generator=generator)


def test_gram_matrices_of_bfloat16_activations_have_float32_precision():
    x = numbers(2000, 200).bfloat16()
    exact, gram = x.double().T @ x.double(), torch.zeros(200, 200)
    with fast_products(x):
        add_gram(gram, x.float())
    fill_gram(gram)
    scale = exact.diagonal().sqrt()
    assert ((gram - exact) / scale[:, None] / scale).abs().max() <= 1e-5  # in bfloat16 it would be 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_matrices_of_streaming_moments_have_float32_precision_for_any_dtype(dtype):
    x = numbers(3, 500, 200).to(dtype)
    sums = StreamingMoments(200, gram=True)
    sums.update(x, torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 0.0, 1.0]))
    counted = x[[0, 2]].flatten(0, 1).double()
    exact, gram = counted.T @ counted, sums.compute()["gram"]
    scale = exact.diagonal().sqrt()
    assert ((gram - exact) / scale[:, None] / scale).abs().max() <= 1e-5


def test_fast_products_are_used_only_for_bfloat16_on_a_cpu_with_amx(monkeypatch):
    precisions = []
    for amx in (True, False):
        monkeypatch.setattr(bfloat16, "_has_amx", lambda amx=amx: amx)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with fast_products(torch.zeros(1, dtype=dtype)):
                precisions.append(torch.get_float32_matmul_precision())
            assert torch.get_float32_matmul_precision() == "highest"
    assert precisions == ["medium"] + ["highest"] * 5  # only the first is bfloat16 with AMX
    monkeypatch.setattr(bfloat16, "_has_amx", lambda: True)
    assert has_fast_products(torch.bfloat16, CPU)
    assert not has_fast_products(torch.bfloat16, CUDA)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert not has_fast_products(torch.bfloat16, CPU)


def test_the_matmul_precision_is_restored_after_an_exception(monkeypatch):
    monkeypatch.setattr(bfloat16, "_has_amx", lambda: True)
    with pytest.raises(ValueError, match="inside"), fast_products(torch.zeros(1, dtype=torch.bfloat16)):
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "highest"
