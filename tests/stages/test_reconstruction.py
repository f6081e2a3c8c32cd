"""Reconstruction: block by block, what is left of a block learns to give what the dense block gives."""

from __future__ import annotations

import pytest
import torch

from gprune.config import ReconstructConfig
from gprune.corpora.windows import Windows
from gprune.models.blocks import blocks_of
from gprune.models.surgery import prune
from gprune.recovery import Material, recovery_of
from gprune.recovery.prefix import recover_sequentially
from gprune.stages.reconstruction import ReconstructedPrefix
from tests import tiny_run
from tests.stages.test_thresholds import sampled_tokens
from tests.tiny_families import make_tiny, some_masks


def stream_error(dense, pruned, tokens: torch.Tensor) -> list[float]:
    """Mean relative error of what leaves each block, by stock hidden states; the last block's is left out."""
    with torch.no_grad():
        states = [m(tokens, output_hidden_states=True).hidden_states[1:-1] for m in (dense, pruned)]
    return [float(((b - a).square().sum(-1) / a.square().sum(-1)).mean()) for a, b in zip(*states, strict=True)]


def problem(family: str, *, attention: bool):
    dense = make_tiny(family)
    masks = some_masks(dense, attention=attention)
    tokens = sampled_tokens(dense)
    half = len(tokens) // 2
    text = [Windows("one", "train", tokens[:half]), Windows("two", "train", tokens[half:])]
    return dense, masks, tokens, Material(dense, masks, text=text, batch_size=2)


@pytest.mark.parametrize("weigh", ["tokens", "corpora"])
@pytest.mark.parametrize(
    ("family", "attention"), [("llama", False), ("llama", True), ("gemma3_text", False), ("gpt2", True)]
)
def test_it_leaves_less_of_the_error_than_least_squares(family, attention, weigh):
    dense, masks, tokens, material = problem(family, attention=attention)
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    solved, learned = prune(dense, masks), prune(dense, masks)
    recover_sequentially(dense, solved, masks, tokens.split(2))
    settings = ReconstructConfig(passes=20, learning_rate=0.003, weigh=weigh)
    prefix = ReconstructedPrefix(material, settings)
    for old, new in zip(blocks_of(dense), blocks_of(learned), strict=True):
        prefix.recover(old, new)
    assert all(after < start for start, after in prefix.errors)
    assert all(b < a for a, b in zip(*(stream_error(dense, m, tokens) for m in (solved, learned)), strict=True))
    assert all(torch.equal(before[name], t) for name, t in dense.state_dict().items())
    # the rest of the pruned model is as least squares leaves it
    plain, found = prune(dense, masks).state_dict(), learned.state_dict()
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    assert changed
    assert all(".mlp." in name or attention for name in changed)
    assert not any(p.requires_grad for p in learned.parameters())


def test_a_run_counts_its_passes_and_names_it(tmp_path, tmp_path_factory, monkeypatch):
    tiny_run.quick(monkeypatch)
    folder = tmp_path_factory.mktemp("world")
    world = tiny_run.make_world(folder)
    with tiny_run.isolated(folder / "cache"):
        flags = ["--recovery=[reconstruct,distill]", "--distill.tokens=192", "--reconstruct.passes=2", "--gprune=false"]
        result = world.run(tmp_path, *flags, "--evaluation.controls=[]")
        text = 3 * 4 * 32
        assert result.summary["forward_backward_tokens"] == 192 + 2 * text
        assert {r["recovery"] for r in result.records} == {"none", "reconstruct+distill"}
        again = world.run(tmp_path, *flags, "--evaluation.controls=[]", name="again")
        assert [r["nll"] for r in again.records] == [r["nll"] for r in result.records]


def test_experts_and_sharded_models_are_refused_before_anything_is_loaded():
    link = recovery_of("reconstruct")
    with pytest.raises(Exception, match="does not see what enters each of the experts"):
        link.refuse(blocks_of(make_tiny("mixtral")))
    with pytest.raises(Exception, match=r"--model\.shard"):
        link.refuse(blocks_of(make_tiny("llama")), shard=True)
