"""`--export.dtype`: dtype of the written weights. Results of a run depend on it only with a target in bytes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gprune.config import RunConfig, config_from_mapping, parse
from gprune.discovery import family_of
from gprune.discovery.tiny import shrunk
from gprune.export import hf
from gprune.method.plan import make_plan
from gprune.models.agreement import random_masks
from gprune.models.surgery import slice_model
from gprune.runs.results import load_run
from gprune.sparsity.cut import uniform_masks
from gprune.sparsity.target import HALF_BITS_PER_BYTE
from tests import tiny_run
from tests.world import make_tiny, some_masks, tiny_of


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_export_in_bfloat16_reloads_with_the_same_bits_and_leaves_the_model_in_memory_unchanged(
    family, tmp_path, token_batch
):
    model = make_tiny(family)
    small = slice_model(model, some_masks(model, attention=False))
    dtypes_and_addresses = {name: (p.dtype, p.data_ptr()) for name, p in small.named_parameters()}
    folder = hf.save_pruned(small, None, tmp_path / "model", dtype=torch.bfloat16)
    assert hf.check_reload(small, folder, token_batch, dtype=torch.bfloat16) == 0.0
    assert {t.dtype for f in folder.glob("*.safetensors") for t in load_file(f).values()} == {torch.bfloat16}
    assert {name: (p.dtype, p.data_ptr()) for name, p in small.named_parameters()} == dtypes_and_addresses


@pytest.mark.parametrize(
    ("model_type", "in_float32"), [("deepseek_v3", "mlp.gate.weight"), ("deepseek_v4", "input_layernorm.weight")]
)
def test_parameters_that_loading_keeps_in_float32_are_not_rounded(model_type, in_float32, tmp_path, token_batch):
    model = tiny_of(shrunk(CONFIG_MAPPING[model_type]()))
    small = slice_model(model, random_masks(model))
    folder = hf.save_pruned(small, None, tmp_path / "model", dtype=torch.bfloat16)
    assert hf.check_reload(small, folder, token_batch, dtype=torch.bfloat16) == 0.0
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16
    kept = [name for name in weights if name.endswith(in_float32)]
    assert kept
    assert all(torch.equal(weights[name], small.get_parameter(name)) for name in kept)


def test_some_parameters_are_kept_in_float32_in_exports_in_float16_only():
    model = tiny_of(shrunk(CONFIG_MAPPING["deepseek_v4"]()))
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        weights = dict(hf.to_exportable(model, dtype).named_parameters())
        kept = {p.dtype for name, p in weights.items() if name.endswith("self_attn.compressor.kv_proj.weight")}
        assert kept == {expected}


def test_a_byte_target_counts_parameters_that_are_kept_in_float32(tmp_path):
    model = tiny_of(shrunk(CONFIG_MAPPING["deepseek_v3"]()))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    flags = [f"--model.name={tmp_path / 'dense'}", "--model.dtype=bfloat16", "--recovery=none"]
    plan = make_plan(parse([*flags, "--sparsity.target=120KiB"]))
    masks = uniform_masks(plan.budget)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    family_of(dense)
    small = slice_model(dense, masks)
    folder = hf.save_pruned(small, None, tmp_path / "model", dtype=torch.bfloat16)
    parameters = dict(small.named_parameters())
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    written = sum(tensor.nbytes for file in files for name, tensor in file.items() if name in parameters)
    planned = plan.budget.model - plan.budget.removed_by(masks)
    assert planned == HALF_BITS_PER_BYTE * written <= HALF_BITS_PER_BYTE * 120 * 2**10


@pytest.mark.slow
def test_a_float32_run_exports_in_the_dtype_of_the_checkpoint_unless_export_dtype_is_given(tmp_path, capsys):
    world = tiny_run.make_world(tmp_path)
    AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.bfloat16).save_pretrained(world.model)
    flags = ("--gprune=false", "--evaluation.before_recovery=false")
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
