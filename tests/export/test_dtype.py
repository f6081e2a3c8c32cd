"""`--export.dtype`: dtype of the written weights. The results of the run do not depend on it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gprune.config import RunConfig, config_from_mapping, parse
from gprune.errors import UserError
from gprune.export import hf
from gprune.models.surgery import prune
from gprune.pipeline.plan import check
from gprune.runs.results import load_run
from tests import tiny_run
from tests.tiny_families import make_tiny, some_masks


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_export_in_bfloat16_reloads_with_the_same_bits_and_leaves_the_model_in_memory_unchanged(
    family, tmp_path, token_batch, monkeypatch
):
    tiny_run.quick(monkeypatch)
    model = make_tiny(family)
    small = prune(model, some_masks(model, attention=False))
    dtypes_and_addresses = {name: (p.dtype, p.data_ptr()) for name, p in small.named_parameters()}
    folder = hf.save_pruned(small, None, tmp_path / "model", dtype=torch.bfloat16)
    assert hf.check_reload(small, folder, token_batch, dtype=torch.bfloat16) == 0.0
    assert {t.dtype for f in folder.glob("*.safetensors") for t in load_file(f).values()} == {torch.bfloat16}
    assert {name: (p.dtype, p.data_ptr()) for name, p in small.named_parameters()} == dtypes_and_addresses


@pytest.mark.slow
def test_a_float32_run_exports_in_the_dtype_of_the_checkpoint_unless_export_dtype_is_given(
    tmp_path, monkeypatch, capsys
):
    tiny_run.quick(monkeypatch)
    world = tiny_run.make_world(tmp_path)
    AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.bfloat16).save_pretrained(world.model)
    flags = ("--gprune=false", "--evaluation.controls=[]")
    with tiny_run.isolated(tmp_path / "cache"):
        result = world.run(tmp_path / "runs", *flags)
        assert f"{result.path / 'model'}, in bfloat16." in capsys.readouterr().out
        metrics = (result.path / "metrics.json").read_bytes()
        for dtype, more_flags in (("bfloat16", ()), ("float32", ("--export.dtype=float32",)), ("float32", ())):
            # The third run has the default flags again. It finds the exported model and does not write it again.
            result = world.run(tmp_path / "runs", *flags, *more_flags)
            assert str(result.model.dtype) == f"torch.{dtype}"
            assert {r["dtype"] for r in result.records} == {"float32"}
            card = (result.path / "model/README.md").read_text()
            assert f"Weights in {dtype}; pruned and measured in float32." in card
            assert json.loads((result.path / "model/config.json").read_text())["dtype"] == dtype
            assert (result.path / "metrics.json").read_bytes() == metrics
        assert load_run(world.run(tmp_path / "runs", *flags, "--model.dtype=bfloat16", name="other").path).records


def test_export_accepts_a_format_or_a_group_and_does_not_affect_result_settings(tmp_path):
    short, long = parse(["--export", "gguf"]), parse(["--export.format=gguf", "--export.dtype=bfloat16"])
    assert short.export.format == long.export.format == RunConfig(export="gguf").export.format == "gguf"
    assert short.settings() == long.settings() == RunConfig().settings()
    (tmp_path / "a.yaml").write_text("export: none\n")
    from_file, from_mapping = parse(["--config", f"{tmp_path}/a.yaml"]), config_from_mapping({"export": "none"})
    assert from_file.export.format == from_mapping.export.format == "none"


def test_an_unknown_export_format_and_a_cast_with_device_map_are_refused():
    with pytest.raises(UserError, match=r"--export.format must be 'hf', 'gguf' or 'none'; got 'onnx'\."):
        parse(["--export", "onnx"])
    with pytest.raises(UserError, match=r"--model.dtype \(float32\) with --model.device_map"):
        check(parse(["--model.name=tiny-random", "--model.device_map=auto", "--export.dtype=float16"]))
