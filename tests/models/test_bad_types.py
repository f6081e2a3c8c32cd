"""Types and checkpoints that cannot be pruned are refused in one line with the reason, before weights are loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING

from experiments.architectures import default_config
from gprune.discovery import check_structure
from gprune.discovery.search import discover
from gprune.discovery.tiny import shrunk
from gprune.errors import UserError
from gprune.models.families import FAMILIES
from tests import tiny_run
from tests.tiny_families import tiny_of

CODE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from tests.tiny_families import tiny_of

class OwnConfig(PretrainedConfig):
    model_type = "own_type"

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.post_init()
"""


@pytest.fixture
def folder(tmp_path):
    return tiny_run.save_tiny_model(tmp_path / "model")


def error_line(folder, tmp_path, capsys, *more: str) -> str:
    """The error line of the command line for a model folder. Nothing else about the model is on stderr."""
    tiny_run.write_corpus(tmp_path / "alpha.txt", seed=1)
    args = [f"--model.name={folder}", f"--run.dir={tmp_path / 'runs'}", "--logging.mode=disabled", *more]
    with tiny_run.isolated(tmp_path / "cache"):
        assert tiny_run.main(args) == 2
    assert not (tmp_path / "runs").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "odel type" in line or "--model" in line]
    return line


@pytest.mark.parametrize("model_type", ["llama", "gemma"])  # with a record, and discovered
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "bitnet"])
def test_a_quantized_checkpoint_is_refused(method, model_type, folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type, "architectures": ["x"]}
    options = {"gptq": {"bits": 4}, "awq": {"bits": 4}, "bitsandbytes": {"load_in_4bit": True}, "bitnet": {}}[method]
    config["quantization_config"] = {"quant_method": method, **options}
    (folder / "config.json").write_text(json.dumps(config))
    assert f"got a quantised checkpoint ({method})" in error_line(folder, tmp_path, capsys)


def test_a_type_that_exists_only_in_custom_code_is_refused(folder, tmp_path, capsys):
    auto_map = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_type", "auto_map": auto_map}))
    (folder / "code.py").write_text(CODE)
    line = error_line(folder, tmp_path, capsys, "--model.trust_remote_code=true")
    assert "Model type 'own_type' needs a class in transformers that predicts next tokens" in line
    assert "docs/extend.md" in line


def test_a_record_for_a_type_that_transformers_does_not_know_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FAMILIES, "own_type", replace(FAMILIES["llama"], model_type="own_type"))
    line = error_line(folder, tmp_path, capsys)
    assert "Cannot register exports of model type 'own_type': transformers has no class of this type" in line


def test_a_type_whose_tiny_copy_does_not_run_is_refused():
    with pytest.raises(UserError, match=r"'xlstm': a tiny copy does not run: .*docs/extend\.md"):
        discover(default_config("xlstm"))


def test_projections_that_do_not_divide_into_heads_are_refused():
    """The record is found on a tiny copy. `check_structure` compares it with the shapes of the given model."""
    model = tiny_of(shrunk(CONFIG_MAPPING["gemma"]()))
    check_structure(model)
    model.model.layers[1].self_attn.v_proj.weight.data = model.model.layers[1].self_attn.v_proj.weight.data[:-3]
    with pytest.raises(UserError, match=r"does not fit layer 1 of this model: .* do not divide into heads of 8"):
        check_structure(model)


def test_experts_shared_between_layers_are_refused():
    model = tiny_of(shrunk(CONFIG_MAPPING["gpt_oss"]()))
    first, second = (layer.mlp.experts for layer in model.model.layers[:2])
    second.down_proj = first.down_proj
    with pytest.raises(UserError, match=r"'mlp\.experts\.down_proj' of layer 1 and '.*' of layer 0 are one tensor"):
        check_structure(model)


def test_checkpointing_of_a_type_that_does_not_support_it_is_refused(tmp_path, capsys):
    shrunk(default_config("gpt_neox_japanese")).save_pretrained(tmp_path / "model")  # only config.json
    flags = "--recovery=distill", "--distill.checkpointing=true"
    line = error_line(tmp_path / "model", tmp_path, capsys, *flags)
    assert "--distill.checkpointing must be false" in line
    assert "'gpt_neox_japanese'; got true" in line
