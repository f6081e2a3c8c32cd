"""Distillation: its loss, what learns and what does not, and the plain model that comes out."""

from __future__ import annotations

import json
from dataclasses import asdict

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from gprune.config import DistillConfig, RunConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.surgery import prune
from gprune.pipeline.plan import check
from gprune.recovery import RECOVERY, Recovery, recovery_of
from gprune.stages.distillation import Distillation, DistillationStage
from tests import tiny_run
from tests.stages.test_thresholds import sampled_tokens
from tests.tiny_families import make_tiny, some_masks

TARGETS = ("vectors", "mlp", "all", "lora")


def divergence(dense, pruned, tokens: torch.Tensor) -> float:
    """KL(dense || pruned) of the next token in nats, by stock logits in float64."""
    with torch.no_grad():
        logs = [m(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (dense, pruned)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def fitted(stage: DistillationStage, tokens: torch.Tensor, *, epochs: int = 1, batch_size: int = 4) -> L.Trainer:
    data = CorpusDataModule(train=[Windows("demo", "train", tokens)], batch_size=batch_size, seed=0)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(stage, data)
    return trainer


@pytest.fixture
def problem(tiny_model):
    return tiny_model, prune(tiny_model, some_masks(tiny_model, attention=True)), sampled_tokens(tiny_model)


@pytest.mark.parametrize("targets", TARGETS)
def test_it_ends_nearer_to_the_dense_model_as_a_plain_one(targets, problem):
    dense, pruned, tokens = problem
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    plain = {name: t.clone() for name, t in pruned.state_dict().items()}
    start = divergence(dense, pruned, tokens)
    stage = DistillationStage(dense, pruned, Distillation(targets, learning_rate=0.02))
    assert divergence(dense, stage.student, tokens) == pytest.approx(start, rel=1e-5)  # nothing is learned yet
    fitted(stage, tokens, epochs=8)
    with torch.no_grad():
        learned = stage.student(tokens).logits
        small = stage.finished()
        torch.testing.assert_close(small(tokens).logits, learned, atol=2e-4, rtol=1e-4)  # folded, or merged
    assert divergence(dense, small, tokens) < 0.8 * start
    # the dense model is what it was; the student is a plain frozen model of the same shapes
    assert all(torch.equal(before[name], t) for name, t in dense.state_dict().items())
    assert {name: t.shape for name, t in small.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    assert not any(p.requires_grad for p in small.parameters())
    assert not any(m._forward_pre_hooks for m in small.modules())  # private, but nothing else tells of hooks
    # what does not learn stays bit for bit
    same = {name for name, t in small.state_dict().items() if torch.equal(t, plain[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= same
    assert all((".self_attn." in name and "norm" not in name) <= (name in same) for name in plain) == (targets == "mlp")


@pytest.mark.parametrize(("kl", "weight"), [(1.0, 0.0), (1.0, 0.5), (0.0, 2.0)])
def test_the_loss_is_the_divergence_and_the_cross_entropy(kl, weight, problem):
    dense, pruned, tokens = problem
    stage = DistillationStage(dense, pruned, Distillation(learning_rate=1e-9, kl=kl, cross_entropy=weight))
    trainer = fitted(stage, tokens, batch_size=len(tokens))
    with torch.no_grad():
        expected = kl * divergence(dense, pruned, tokens) + weight * float(pruned(tokens, labels=tokens).loss)
    assert float(trainer.callback_metrics["distill/loss"]) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_holds_what_learns_and_gives_it_back(problem):
    dense, pruned, tokens = problem
    stage = DistillationStage(dense, pruned, Distillation("vectors", learning_rate=0.01))
    fitted(stage, tokens)
    state = {name: t.clone() for name, t in stage.state_dict().items()}
    gains = 2 * 3
    assert len(state) == gains + 2 * 3  # norms before attention and FFN; scales of both projections
    again = DistillationStage(dense, prune(dense, some_masks(dense, attention=True)), Distillation("vectors"))
    again.load_state_dict(state)
    assert torch.equal(again.finished()(tokens).logits, stage.finished()(tokens).logits)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt2", "vectors"), ("gpt2", "lora"), ("mixtral", "mlp"), ("mixtral", "lora"), ("gemma3_text", "all")],
)
def test_other_families_learn_too(family, targets):
    dense = make_tiny(family)
    pruned, tokens = prune(dense, some_masks(dense, attention=False)), sampled_tokens(dense)
    start = divergence(dense, pruned, tokens)
    stage = DistillationStage(dense, pruned, Distillation(targets, learning_rate=0.01))
    fitted(stage, tokens, epochs=4)
    assert divergence(dense, stage.finished(), tokens) < start


@pytest.mark.parametrize("targets", TARGETS)
def test_it_learns_in_float32_what_is_stored_in_bfloat16(targets, problem):
    dense, pruned, tokens = (part.bfloat16() if isinstance(part, torch.nn.Module) else part for part in problem)
    plain = {name: t.clone() for name, t in pruned.state_dict().items()}
    stage = DistillationStage(dense, pruned, Distillation(targets, learning_rate=1e-3))
    fitted(stage, tokens)
    assert {parameter.dtype for parameter in stage.learned.values()} == {torch.float32}
    # less than bfloat16 tells apart beside 1, and yet not lost
    assert all(torch.frac(p.float() * 256).any() for p in stage.learned.values() if p.abs().max() > 0.5)
    small = stage.finished()
    assert {t.dtype for t in small.state_dict().values()} == {torch.bfloat16}
    assert any(not torch.equal(plain[name], t) for name, t in small.state_dict().items())


def test_experts_have_no_scales():
    dense = make_tiny("mixtral")
    with pytest.raises(UserError, match=r"--distill\.targets vectors: experts have no scales"):
        DistillationStage(dense, prune(dense, some_masks(dense, attention=False)), Distillation("vectors"))


# Chains


def test_a_chain_has_the_contract_of_one_recovery():
    chain, links = recovery_of("least_squares+distill"), [RECOVERY["least_squares"], RECOVERY["distill"]]
    assert isinstance(chain, Recovery)
    assert (chain.needs, chain.learns) == (links[0].needs, True)
    assert chain.tokens(100, 40, attention=False) == (40, 40)
    assert recovery_of("least_squares_sequential+distill").tokens(100, 40, attention=True) == (440, 40)
    assert recovery_of("none") is RECOVERY["none"]


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        (["distill", "least_squares"], "'least_squares' goes block by block, which only the first can"),
        (["bias", "least_squares"], "'least_squares' goes block by block"),
        (["distill", "distill"], "each once"),
        (["none", "distill"], "none alone"),
        (["least_squares", "heal"], "Unknown recovery 'heal'"),
    ],
)
def test_chains_that_cannot_be_are_one_line(chain, why):
    with pytest.raises(UserError, match=why):
        RunConfig(recovery=chain)


def test_the_stage_and_its_flags_have_the_same_defaults():
    flags = asdict(DistillConfig())
    assert flags.pop("tokens") > 0
    assert asdict(Distillation()) == flags


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"--distill\.kl, --distill\.cross_entropy: expected one of them above 0"):
        DistillConfig(kl=0)


@pytest.mark.parametrize("where", ["shard", "placed"])
def test_it_needs_the_model_on_one_device(where, tiny_model):
    with pytest.raises(UserError, match=r"^--recovery distill: .* --model\.(shard|device_map).*least_squares"):
        recovery_of("least_squares+distill").refuse(blocks_of(tiny_model), **{where: True})


def test_too_few_tokens_are_refused_before_anything_is_loaded():
    cfg = RunConfig(recovery=["least_squares", "distill"])
    cfg.distill.tokens = 100
    with pytest.raises(UserError, match=r"--distill\.tokens: expected .* \(768 tokens\), got 100"):
        cfg.validate()


# The whole run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    world = tiny_run.make_world(folder)
    with tiny_run.isolated(folder / "cache"):
        yield world


FLAGS = ("--recovery=[least_squares,distill]", "--distill.tokens=576", "--distill.learning_rate=0.003")


def test_a_run_distils_every_row_and_takes_up_what_was_learned(world, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    result = world.run(tmp_path, *FLAGS)
    rows = {(r["stage"], r["recovery"]) for r in result.records}
    chain = "least_squares+distill"
    assert {row for row in rows if row[1] == chain} == {(s, chain) for s in ("base", "base_averaged", "gprune")}
    assert all((r["distill"] is not None) == (r["recovery"] == chain) for r in result.records)
    plan = check(result.config)
    assert " and 3 models recovered by learning" in plan.describe()
    assert result.summary["forward_backward_tokens"] == plan.forward_backward_tokens
    assert result.summary["forward_tokens"] <= plan.forward_tokens
    # all of the text counts as used
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert sum(name.endswith(" recovered") for name in manifest["settings"]["inputs"]["text"]) == 3
    saved = AutoModelForCausalLM.from_pretrained(result.path / "model", dtype="auto", trust_remote_code=False)
    # taken up, nothing is learned again
    monkeypatch.setattr(DistillationStage, "training_step", lambda *_: pytest.fail("learned again"))
    (result.path / "metrics.json").unlink()
    again = world.run(tmp_path, *FLAGS)
    assert [r["nll"] for r in again.records] == [r["nll"] for r in result.records]
    ids = torch.arange(3, 35)[None]
    assert torch.equal(again.model(ids).logits, saved(ids).logits)


def test_the_loss_that_is_not_finite_is_one_line(world, tmp_path, monkeypatch, capsys):
    tiny_run.quick(monkeypatch)
    assert tiny_run.main(world.args(tmp_path, *FLAGS, "--distill.learning_rate=1e30")) == 2
    assert "The loss of distillation is nan" in capsys.readouterr().err
