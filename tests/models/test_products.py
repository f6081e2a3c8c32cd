"""The fastest matrix products of the hardware: bfloat16 numbers by AMX, and float32 by oneDNN on AMD's processors."""

from __future__ import annotations

import pytest
import torch

from gprune.calibration.moments import StreamingMoments
from gprune.models import products
from gprune.models.products import fast_products, float32_by_onednn, has_fast_products
from gprune.runs.trainer import matmul_precision

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_matrices_of_streaming_moments_have_float32_precision_for_any_dtype(dtype):
    x = numbers(3, 500, 200).to(dtype)
    sums = StreamingMoments(200, gram=True)
    sums.update(x, torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 0.0, 1.0]))
    counted = x[[0, 2]].flatten(0, 1).double()
    exact, gram = counted.T @ counted, sums.compute()["gram"]
    scale = exact.diagonal().sqrt()
    assert ((gram - exact) / scale[:, None] / scale).abs().max() <= 1e-5


@pytest.fixture
def processor(monkeypatch):
    """Return a function that simulates a CPU with some instruction sets, and its manufacturer."""

    def set_processor(*instruction_sets: str, amd: bool = False) -> None:
        monkeypatch.setattr(products, "_cpu_has", lambda name: name in instruction_sets)
        monkeypatch.setattr(products, "_is_amd", lambda: amd)

    return set_processor


def test_fast_products_are_used_only_for_bfloat16_on_a_cpu_with_amx(processor, monkeypatch):
    precisions = []
    for instruction_sets in (["amx_bf16"], []):
        processor(*instruction_sets)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with fast_products(torch.zeros(1, dtype=dtype)):
                precisions.append(torch.get_float32_matmul_precision())
            assert torch.get_float32_matmul_precision() == "highest"
    assert precisions == ["medium"] + ["highest"] * 5  # only the first is bfloat16 with AMX
    processor("amx_bf16")
    assert has_fast_products(torch.bfloat16, CPU)
    assert not has_fast_products(torch.bfloat16, CUDA)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert not has_fast_products(torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("instruction_sets", "amd", "limit", "expected"),
    [
        (["avx512_f"], True, "", True),
        (["avx512_f", "avx512_bf16"], True, "AVX512_CORE", True),
        (["avx512_f"], True, "AVX2", False),
        (["avx512_f"], False, "", False),  # on Intel's processors MKL uses AVX-512
        (["avx512_f", "amx_bf16"], True, "", False),  # with AMX, oneDNN would round to bfloat16
        ([], True, "", False),
    ],
)
def test_float32_is_multiplied_by_onednn_on_amd_with_avx512(
    instruction_sets, amd, limit, expected, processor, monkeypatch
):
    processor(*instruction_sets, amd=amd)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(products, "_onednn_keeps_float32", lambda: True)
    assert float32_by_onednn(CPU) == expected
    assert not float32_by_onednn(CUDA)
    with matmul_precision("highest", fastest_on=CPU):
        assert torch.get_float32_matmul_precision() == ("medium" if expected else "highest")
    with matmul_precision("highest"), matmul_precision("high", fastest_on=CPU):
        assert torch.get_float32_matmul_precision() == "high"
    monkeypatch.setattr(products, "_onednn_keeps_float32", lambda: False)
    assert not float32_by_onednn(CPU)


def test_the_check_of_onednn_recognizes_products_in_bfloat16(monkeypatch):
    """On this machine the check agrees with the error of a product, and factors in bfloat16 fail it."""
    x, y = numbers(300, 200), numbers(200, 200)
    exact = x.double() @ y.double()
    with products._medium_precision():
        error = ((x @ y).double() - exact).norm() / exact.norm()
    assert products._onednn_keeps_float32.__wrapped__() == (error < 1e-5)
    multiply = torch.matmul
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: multiply(a.bfloat16().float(), b))
    assert not products._onednn_keeps_float32.__wrapped__()


@pytest.mark.skipif(not float32_by_onednn(CPU), reason="needs an AMD processor with AVX-512")
def test_products_by_onednn_have_float32_precision():
    for m, k, n in ((512, 576, 1536), (37, 1001, 53), (1, 576, 576), (2000, 64, 3)):
        x, y = torch.randn(m, k), torch.randn(k, n)
        exact = x.double() @ y.double()
        with matmul_precision("highest", fastest_on=CPU):
            error = ((x @ y).double() - exact).norm() / exact.norm()
        assert error < 1e-6


def test_the_matmul_precision_is_restored_after_an_exception(processor):
    processor("amx_bf16")
    with pytest.raises(ValueError, match="inside"), fast_products(torch.zeros(1, dtype=torch.bfloat16)):
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "highest"
