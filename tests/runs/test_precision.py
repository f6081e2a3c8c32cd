"""The resolution of `--trainer.precision auto`, on simulated hardware."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.models import products
from gprune.models.products import multiplies_bfloat16
from gprune.runs import trainer
from gprune.runs.trainer import resolve_precision
from gprune.stages import threshold_learning
from gprune.stages.base import require_finite_loss
from gprune.studies.listing import Row
from tests import tiny_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAST, SLOW = (True, "a processor of a test"), (False, "a processor of a test")


@pytest.fixture
def hardware(monkeypatch):
    """Return a function that simulates hardware: whether it multiplies bfloat16, and its name."""

    def set_hardware(fast_and_name):
        monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda device: fast_and_name)

    return set_hardware


@pytest.mark.parametrize(
    ("capabilities", "fast", "capability"),
    [([(8, 0)], True, "8.0"), ([(9, 0), (7, 5)], False, "7.5"), ([(7, 0)], False, "7.0")],
)
def test_gpus_multiply_bfloat16_from_capability_8_on_and_the_weakest_decides(
    capabilities, fast, capability, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.version, "hip", None)
    assert multiplies_bfloat16(CUDA) == (fast, f"a GPU of compute capability {capability}")


AMX, AMD = (True, "a processor with AMX"), (True, "an AMD processor with AVX512-BF16")
NEITHER = (False, "a processor with neither AMX nor AMD's AVX512-BF16")


@pytest.mark.parametrize(
    ("instruction_sets", "amd", "limit", "expected"),
    [
        (["amx_bf16", "avx512_bf16"], False, None, AMX),
        (["amx_bf16"], False, "default", AMX),
        (["amx_bf16"], False, "AVX512_CORE_AMX", AMX),
        (["amx_bf16"], False, "AVX512_CORE_BF16", (False, "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16")),
        (["avx512_bf16"], False, None, NEITHER),  # slower on Intel's processors
        (["avx512_bf16"], True, None, AMD),
        (["avx512_bf16"], True, "AVX512_CORE_BF16", AMD),
        (["avx512_bf16"], True, "avx512_core", (False, "ONEDNN_MAX_CPU_ISA=AVX512_CORE")),
        (["avx512_f"], True, None, NEITHER),
        ([], False, None, NEITHER),
    ],
)
def test_processors_multiply_bfloat16_with_amx_or_amds_avx512_bf16(instruction_sets, amd, limit, expected, monkeypatch):
    monkeypatch.setattr(products, "_cpu_has", lambda name: name in instruction_sets)
    monkeypatch.setattr(products, "_is_amd", lambda: amd)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert multiplies_bfloat16(CPU) == expected


def test_instruction_sets_and_manufacturer_are_read_with_old_and_new_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    has_amx = {"amx_bf16": True, "cpu_name": "AMD EPYC"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has_amx, raising=False)
    assert (products._cpu_has("amx_bf16"), products._cpu_has("avx512_f"), products._is_amd()) == (True, False, True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.6
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(products.Path, "read_text", lambda self: "vendor_id : GenuineIntel")
    assert (products._cpu_has("amx_bf16"), products._cpu_has("avx512_f"), products._is_amd()) == (False, True, False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products._cpu_has("avx512_f")


@pytest.mark.parametrize(
    ("simulated", "settings", "chosen", "why"),
    [
        (FAST, {}, "bf16-mixed", "a processor of a test"), (SLOW, {}, "32-true", "a processor of a test"),
        (FAST, {"trainer": {"precision": "32-true"}}, "32-true", "--trainer.precision"),
        (FAST, {"model": {"dtype": "float16"}, "gprune": False}, "32-true", "--model.dtype float16"),
    ],
)  # fmt: skip
def test_auto_becomes_the_precision_of_the_hardware_and_keeps_the_run_name(simulated, settings, chosen, why, hardware):
    hardware(simulated)
    requested = RunConfig(**settings)
    cfg, reason = resolve_precision(requested, CPU)
    assert (cfg.trainer.precision, cfg.folder) == (chosen, requested.folder)
    assert why in reason
    assert cfg.settings()["trainer"]["precision"] == chosen


def test_short_names_of_precisions_are_accepted():
    for given, becomes in (("bf16", "bf16-mixed"), ("32", "32-true"), (32, "32-true")):
        assert RunConfig(trainer={"precision": given}).trainer.precision == becomes


def test_the_precision_of_rows_in_a_list_does_not_depend_on_the_hardware():
    """The default of rows is 32-true, and `auto` is refused."""
    assert Row("one", 0, {}).config.trainer.precision == "32-true"
    assert Row("one", 0, {"trainer.precision": "bf16"}).config.trainer.precision == "bf16-mixed"
    with pytest.raises(UserError, match=r"Row 'one': --trainer.precision must be 32-true or bf16-mixed in a list"):
        _ = Row("one", 0, {"trainer.precision": "auto"}).config


@pytest.mark.parametrize(
    ("simulated", "other_lacks_bfloat16", "resumed_precision", "chosen"),
    [(FAST, False, None, "bf16-mixed"), (FAST, True, None, "32-true"), (SLOW, False, "bf16-mixed", "bf16-mixed")],
)
def test_processes_use_the_precision_of_the_slowest_hardware_or_of_the_resumed_run(
    simulated, other_lacks_bfloat16, resumed_precision, chosen, hardware, monkeypatch
):
    """The process group is simulated: another process may lack bfloat16, and rank 0 may resume a run."""
    hardware(simulated)

    def simulated_processes(trainer):
        assert trainer.num_nodes == 2
        strategy = SimpleNamespace(reduce_boolean_decision=lambda mine, all: mine or other_lacks_bfloat16)
        return SimpleNamespace(strategy=strategy, broadcast=lambda mine: resumed_precision)

    monkeypatch.setattr(trainer, "launch_processes", simulated_processes)
    cfg = RunConfig(trainer={"num_nodes": 2, "strategy": "ddp"})
    assert resolve_precision(cfg, CPU, together=True)[0].trainer.precision == chosen


def test_a_resumed_run_keeps_its_precision_on_other_hardware(world, tmp_path, hardware, capsys):
    flags = ["--trainer.precision=auto", "--export=none", "--evaluation.before_recovery=false", "--evaluation.curve=[]"]
    with tiny_run.isolated(tmp_path / "cache"):
        hardware(FAST)
        first = world.run(tmp_path / "runs", *flags)
        assert "Precision of training: bf16-mixed (a processor of a test)" in capsys.readouterr().out
        manifest = json.loads((first.path / "manifest.json").read_text())
        assert manifest["settings"]["trainer"]["precision"] == "bf16-mixed"
        assert manifest["precision"] == {"asked": "auto", "because": "a processor of a test"}
        assert {r["precision"] for r in first.records} == {"bf16-mixed"}
        assert first.config.trainer.precision == "bf16-mixed"
        (first.path / "metrics.json").unlink()  # like a killed run
        hardware(SLOW)
        resumed = world.run(tmp_path / "runs", *flags)
        assert "Precision of training: bf16-mixed (the resumed run has this precision)" in capsys.readouterr().out
    assert [r["nll"] for r in resumed.records] == [r["nll"] for r in first.records]
    assert resumed.masks == first.masks


def test_threshold_learning_that_overflows_in_a_later_step_continues_in_float32(world, tmp_path, monkeypatch, capsys):
    losses, calls = threshold_learning.next_token_losses, []

    def overflowing(*args, **kwargs):
        calls.append(torch.is_autocast_enabled("cpu"))
        return losses(*args, **kwargs) * (torch.inf if calls[-1] and len(calls) > 2 else 1)

    monkeypatch.setattr(threshold_learning, "next_token_losses", overflowing)
    flags = ["--trainer.precision=bf16-mixed", "--sparsity.epochs=3", "--recovery=none", "--export=none"]
    with tiny_run.isolated(tmp_path / "cache"):
        result = world.run(tmp_path / "runs", *flags)
    assert calls[:4] == [True, True, True, False]  # the third loss is computed again
    assert not any(calls[3:])
    printed = "".join(capsys.readouterr())
    assert printed.count("is not finite in bfloat16. Falling back to float32.") == 1
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert list(manifest["fallbacks"].values()) == ["32-true, because a loss was not finite in bf16-mixed"]


def test_a_loss_that_is_never_finite_ends_with_the_flag_of_its_precision():
    for autocast, flag in ((True, "--trainer.precision 32-true"), (False, "--model.dtype float32")):
        with pytest.raises(UserError, match=f"The loss of x must be a finite number; got inf.*or use {flag}"):
            require_finite_loss(math.inf, "The loss of x", autocast=autocast)
