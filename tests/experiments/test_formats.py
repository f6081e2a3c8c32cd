"""Programs that load exported models: older transformers, a simulated vLLM, and the table of formats and programs."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from experiments.formats import __main__ as formats
from experiments.formats import models
from experiments.formats.packages import OLDER
from gprune.export import hf
from gprune.models.surgery import slice_model
from tests.export.test_gguf import byte_tokenizer
from tests.export.test_hf import LLAMA3_ROPE, make_pruned
from tests.world import make_tiny_llama, masks_keeping

INSTALLED = importlib.metadata.version("transformers")


# Exports for older transformers


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 777.0}, LLAMA3_ROPE], ids=["plain", "llama3"])
def test_a_standard_export_has_the_rotary_settings_in_the_fields_of_older_transformers(rope, tmp_path, token_batch):
    model = slice_model(make_tiny_llama(rope_parameters=rope), masks_keeping([20] * 3, [2] * 3))
    folder = hf.save_pruned(model, None, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config["model_type"] == "llama"
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else scaling)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.config.rope_parameters == rope  # this version of transformers ignores the additional fields
    assert torch.equal(loaded(token_batch).logits, model(token_batch).logits)


def test_a_weight_under_another_name_is_an_error_and_not_a_random_weight(tmp_path):
    """Older transformers have other names for some weights. They warn and continue with random weights."""
    folder = hf.save_pruned(make_pruned(), None, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down.weight"] = weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 parameters, .*layers\.1\.mlp\.down_proj\.weight'"):
        AutoModelForCausalLM.from_pretrained(folder)


# The models


def tiny():
    """Return a random Llama over bytes, its tokenizer, and token ids."""
    settings = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "vocab_size": 288}
    ids = torch.randint(256, (1, 48), generator=torch.Generator().manual_seed(0))
    return make_tiny_llama(**settings), byte_tokenizer(), ids


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return the work folder with its three models."""
    folder = tmp_path_factory.mktemp("formats")
    models.make(folder, tiny)
    return folder


def test_the_reference_for_vllm_has_the_predictions_and_the_perplexity_of_the_saved_model(work):
    content = json.loads((work / "ffn+kv/reference.json").read_text())
    ids = torch.tensor([content["ids"]])
    with torch.no_grad():
        output = AutoModelForCausalLM.from_pretrained(work / "ffn+kv/hf")(ids, labels=ids)
    assert content["top1"] == output.logits[0, :-1].argmax(-1).tolist()
    mean_log_probability = sum(content["logprobs"]) / len(content["logprobs"])
    assert -mean_log_probability == pytest.approx(output.loss.item(), rel=1e-5)


# The table


def table(work, capsys, *arguments):
    """Run the command. Return its exit code, and the cells of each row whose format is `hf`."""
    code = formats.main(["--work", str(work), *arguments])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| hf")]
    return code, rows


@pytest.mark.slow
def test_a_consumer_with_the_same_logits_is_a_row_with_result_ok(work, capsys):
    code, (row,) = table(work, capsys, "--only", f"hf ffn+kv transformers {INSTALLED}")
    assert code == 0
    assert row[3:6] == ["0.0e+00 logit", "0.0e+00", "1.0000"]
    assert row[-2:] == ["`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`", "ok"]


def test_a_consumer_that_is_not_installed_or_has_other_logits_is_named_in_its_row(work, tmp_path, capsys, monkeypatch):
    """Consumers are installed in `packages` of the work folder, which does not exist here, or given by `--vllm`."""
    for consumer in (OLDER[0], "vLLM"):
        code, rows = table(work, capsys, "--only", consumer, "--vllm", str(tmp_path / "no_python"))
        assert code == 0
        assert [row[-1] for row in rows] == ["not installed"] * len(models.MODELS)
    logits = load_file(work / "ffn/reference.safetensors")["logits"]
    too_large = "FAILS: Logits must be within 1e-04; got a difference of 1.0e-03."
    for added, result, expected_code in ((1e-5, "ok", 0), (1e-3, too_large, 1)):
        monkeypatch.setattr(hf, "reloaded_logits", lambda folder, ids, added=added: (logits + added)[None])
        code, (row,) = table(work, capsys, "--only", f"hf ffn transformers {INSTALLED}")
        assert (code, row[-1]) == (expected_code, result)
