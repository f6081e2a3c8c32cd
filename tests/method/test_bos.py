"""Tokenizers that add BOS: every window of a run begins with BOS, in every role."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from gprune.cli import main
from gprune.evaluation.perplexity import perplexity
from gprune.method.inputs import prepare_text
from gprune.models.loading import load_model
from gprune.runs.trainer import matmul_precision
from tests import tiny_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bos")
    world = tiny_run.make_world(folder)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    token = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[token])
    tokenizer.save_pretrained(world.model)
    with tiny_run.isolated(folder / "cache"):
        yield world


def test_every_window_begins_with_bos_and_no_loss_includes_bos(world, tmp_path):
    """Records and model card state that windows begin with BOS."""
    result = world.run(tmp_path, "--recovery=[least_squares,distill]", "--distill.tokens=192")
    model, tokenizer = load_model(str(world.model))
    text = prepare_text(result.config, tokenizer, 128)
    roles = [[*text.train.values()], text.learn, text.fresh, text.development, text.test]
    assert [len(corpora) for corpora in roles] == [3, 2, 3, 3, 3]
    for windows in itertools.chain(*roles):
        assert windows.bos
        assert windows.tokens.shape[1] == 32
        assert bool((windows.tokens[:, 0] == 1).all())  # the id of BOS
        assert not bool((windows.tokens[:, 1:] == 1).any())
    # Only text tokens are predicted, the first one from BOS. The expected loss is computed here from the logits.
    (record,) = [r for r in result.records if r["stage"] == "dense" and r["corpus"] == str(world.corpora["alpha"])]
    (windows,) = [w for w in text.test if w.corpus == record["corpus"]]
    with torch.no_grad():
        log_probabilities = model(windows.tokens).logits[:, :-1].double().log_softmax(-1)
    expected = -log_probabilities.gather(-1, windows.tokens[:, 1:, None]).mean()
    assert record["nll"] == pytest.approx(float(expected), rel=1e-5)
    with matmul_precision("highest", fastest_on=model.device):  # as in a run, so that all bits are the same
        assert record["nll"] == perplexity(model, windows).nll
    assert all(r["bos"] is True for r in result.records)
    assert "with BOS" in (result.path / "model/README.md").read_text()


@pytest.mark.slow
def test_runs_with_and_without_bos_share_no_text_and_no_statistics(world, tmp_path):
    """All runs use one cache. For this tokenizer, `auto` and `always` give identical results."""
    flags = ("--gprune=false", "--export=none")
    runs = {bos: world.run(tmp_path, *flags, f"--corpora.bos={bos}", name=bos) for bos in ("auto", "never", "always")}
    text_hashes, nll, statistics = {}, {}, {}
    for bos, run in runs.items():
        manifest = json.loads((run.path / "manifest.json").read_text())
        text_hashes[bos] = manifest["settings"]["inputs"]["text"]
        nll[bos] = [r["nll"] for r in run.records]
        statistics[bos] = run.statistics[str(world.corpora["alpha"])].channels["neurons.0"].total.mean_sq
    assert text_hashes["auto"] == text_hashes["always"]
    assert not set(text_hashes["auto"].values()) & set(text_hashes["never"].values())
    assert nll["auto"] == nll["always"]
    assert not set(nll["auto"]) & set(nll["never"])
    assert {r["bos"] for r in runs["never"].records} == {False}
    assert torch.equal(statistics["auto"], statistics["always"])
    assert not torch.allclose(statistics["auto"], statistics["never"])


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(world, tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_run.save_tiny_model(folder, vocab_size=100)
    assert main(world.args(tmp_path / "runs", f"--model.name={folder}")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must be less than 100, the number of embeddings" in line
