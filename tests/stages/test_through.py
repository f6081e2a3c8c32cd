"""Learning around the recovered model: corrections on a running model, against one whose weights were changed; and the
fit, against models that were really sliced and recovered."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor

from gprune.calibration.collector import collect
from gprune.config import RunConfig, SparsityConfig
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.evaluation.perplexity import perplexity
from gprune.models.blocks import blocks_of
from gprune.models.masks import Masks
from gprune.models.surgery import prune
from gprune.pipeline.plan import check_blocks
from gprune.pipeline.recover import by_projection
from gprune.pipeline.sparsity import make_corrections
from gprune.sparsity.budget import check_budget
from gprune.sparsity.gates import corrected, gated, masked
from gprune.stages.callbacks import ApplyMasks, PerplexityCurve
from gprune.stages.thresholds import ThresholdLearning
from tests.conftest import make_tiny_llama
from tests.stages.test_thresholds import data_of, hooks_of, make_stage, sampled_tokens, trainer_of
from tests.tiny_families import make_tiny, some_masks

# Fused and transposed weights, biases, norms behind projections, attention and FFN side by side.
FAMILIES = ["llama", "gpt2", "phi3", "opt", "gemma2", "gpt_neox"]


# --- gates.corrected --------------------------------------------------------------------------------------------


def random_corrections(model, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """C (H, channels) of every block's down and output projection, as large as a tenth of their weights."""
    generator = torch.Generator().manual_seed(seed)

    def of(part) -> Tensor:
        return 0.1 * part.weight.std() * torch.randn(part.weight.shape, generator=generator)

    return [of(b.down) for b in blocks_of(model)], [of(b.output) for b in blocks_of(model)]


@torch.no_grad()
def changed(model, ffn: list[Tensor | None], attention: list[Tensor | None]):
    """A copy whose down and output projections are W + C."""
    other = copy.deepcopy(model)
    for block, c, d in zip(blocks_of(other), ffn, attention, strict=True):
        for part, added in ((block.down, c), (block.output, d)):
            if added is not None:
                part.set(part.weight + added, None)
    return other


@torch.no_grad()
def logits(model, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def agree(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_corrections_are_weights_that_were_changed(family, token_batch):
    model = make_tiny(family)
    before, dense = copy.deepcopy(model.state_dict()), logits(model, token_batch)
    C = random_corrections(model)
    other = changed(model, *C)
    assert (logits(other, token_batch) - dense).abs().max() > 0.01 * dense.abs().max()
    with corrected(model, *C) as inside:
        assert inside is model
        agree(logits(model, token_batch), logits(other, token_batch))
    masks = some_masks(model, attention=True)
    for open_first in (True, False):  # whichever hook came first, C sees the gated input: W x_K + C x_K
        outer, inner = (masked(model, masks), corrected(model, *C))[:: 1 if open_first else -1]
        with outer, inner, masked(other, masks):
            agree(logits(model, token_batch), logits(other, token_batch))
    assert hooks_of(model) == 0
    assert torch.equal(logits(model, token_batch), dense)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_corrections_are_read_at_each_forward_pass(family, token_batch):
    model = make_tiny(family)
    dense, (ffn, attention) = logits(model, token_batch), random_corrections(model)
    one = logits(changed(model, [None, ffn[1], None], [None] * 3), token_batch)
    outputs = logits(changed(model, [None] * 3, attention), token_batch)
    now: list[Tensor | None] = [None] * 3
    with corrected(model, now):
        assert torch.equal(logits(model, token_batch), dense)
        now[1] = ffn[1]
        agree(logits(model, token_batch), one)
        now[:] = [None] * 3
        assert torch.equal(logits(model, token_batch), dense)
    with corrected(model, None, attention):
        agree(logits(model, token_batch), outputs)


def test_an_exception_takes_corrections_off(tiny_model, token_batch):
    dense = logits(tiny_model, token_batch)

    def fail():
        assert hooks_of(tiny_model) == 6
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), corrected(tiny_model, *random_corrections(tiny_model)):
        fail()
    assert hooks_of(tiny_model) == 0
    assert torch.equal(logits(tiny_model, token_batch), dense)


def test_gradients_of_gates_go_through_corrections(tiny_model, token_batch):
    C = random_corrections(tiny_model)
    other = changed(tiny_model, *C)
    found = []
    for lm, added in ((tiny_model, C), (other, (None, None))):
        gates = [torch.full((48,), 0.7, requires_grad=True) for _ in range(3)]
        with gated(lm, gates), corrected(lm, *added):
            lm(token_batch, labels=token_batch).loss.backward()
        found.append(torch.cat([g.grad for g in gates]))
    assert found[1].abs().max() > 1e-4
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max()


# --- a fit ------------------------------------------------------------------------------------------------------


class Problem:
    """A model, statistics of its own text with Gram matrices, and what pipeline functions want to know."""

    cfg = SimpleNamespace(corpora=SimpleNamespace(recover=["demo"]), ridge=0.01)

    def __init__(self):
        self.model = make_tiny_llama()
        self.tokens = sampled_tokens(self.model)
        batch = {"input_ids": sampled_tokens(self.model, windows=12, seed=1), "index": torch.arange(12)}
        self.statistics = {"demo": collect(self.model, [batch], gram=True)}
        self.recover = make_corrections(self.cfg, self.model, self.statistics)

    def stage(self, **options) -> ThresholdLearning:
        return make_stage(self.model, **{"recover": self.recover, **options})

    @torch.no_grad()
    def sliced(self, masks: Masks):
        """The model as `prune(cfg)` leaves it under --recovery least_squares."""
        small = prune(self.model, masks)
        mend = by_projection(self.cfg, masks, self.statistics, "least_squares")
        for dense, block in zip(blocks_of(self.model), blocks_of(small), strict=True):
            mend(dense, block)
        return small


@pytest.fixture
def problem() -> Problem:
    return Problem()


def batch_of(tokens: Tensor) -> dict[str, Tensor]:
    n = len(tokens)
    return {"input_ids": tokens, "weight": torch.ones(n), "corpus": torch.zeros(n, dtype=torch.long)}


def loss_of(model, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


class Steps(L.Callback):
    """Takes training steps by hand when a fit begins, without an optimizer between them."""

    def __init__(self, *batches: Tensor):
        self.batches, self.losses = batches, []

    def on_train_start(self, trainer, pl_module):
        self.losses = [pl_module.training_step(batch_of(b), i).item() for i, b in enumerate(self.batches)]


@pytest.mark.parametrize("scope", ["ffn", "attention+ffn"])
def test_the_loss_is_that_of_the_sliced_and_recovered_model(scope, problem):
    """Float32 solving on both sides: to rounding; and lower than without recovery."""
    stage, steps = problem.stage(scope=scope), Steps(problem.tokens)
    masks = stage.masks()
    expected = loss_of(problem.sliced(masks), problem.tokens)
    trainer_of(ApplyMasks(), steps).fit(stage, data_of(problem.tokens))
    assert steps.losses == [pytest.approx(expected, rel=2e-5)]
    assert loss_of(prune(problem.model, masks), problem.tokens) > expected * 1.01


def test_the_divergence_is_from_the_dense_model_at_every_step(problem):
    """With corrections left from the step before, too: the teacher has none of them, and they are back for the rest."""
    stage, steps = problem.stage(loss="kl"), Steps(problem.tokens[:4], problem.tokens[4:])
    small = problem.sliced(stage.masks())
    trainer_of(ApplyMasks(), steps).fit(stage, data_of(problem.tokens))
    with torch.no_grad():
        log_q, log_p = (m(problem.tokens).logits[:, :-1].double().log_softmax(-1) for m in (problem.model, small))
    by_window = (log_q.exp() * (log_q - log_p)).sum(-1).mean(1)
    assert by_window.min() > 1e-3
    assert steps.losses == [pytest.approx(float(by_window[:4].mean()), rel=1e-3),
                            pytest.approx(float(by_window[4:].mean()), rel=1e-3)]  # fmt: skip


@pytest.mark.parametrize("scope", ["ffn", "attention+ffn"])
def test_the_dense_model_inside_and_corrections_back_behind(scope, problem):
    stage = problem.stage(scope=scope)
    dense = logits(problem.model, problem.tokens)
    stage.refresh_corrections(stage.refresh_gates())
    kept = [list(added) for added in stage.corrections]
    assert all(c is not None for c in kept[0])
    assert any(c is not None for c in kept[1]) == (scope != "ffn")
    with gated(problem.model, stage.ffn_gates, stage.attention_gates), corrected(problem.model, *stage.corrections):
        recovered = logits(problem.model, problem.tokens)
        agree(recovered, logits(problem.sliced(stage.masks()), problem.tokens))
        with stage._dense():
            assert torch.equal(logits(problem.model, problem.tokens), dense)
        with pytest.raises(RuntimeError, match="stop"), stage._dense():
            raise RuntimeError("stop")
        for mine, old in zip(stage.corrections, kept, strict=True):
            assert all(a is b for a, b in zip(mine, old, strict=True))
        stage.refresh_gates()
        assert torch.equal(logits(problem.model, problem.tokens), recovered)


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3]), (3, [0, 3]), (4, [0])])
def test_corrections_are_solved_every_few_steps_for_the_masks_of_that_step(every, steps, problem):
    """In each of two epochs of four steps."""
    at, solved = [], []

    def recover(masks):
        solved.append((at[-1], masks == stage.masks()))
        return problem.recover(masks)

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            at.append((trainer.current_epoch, batch_idx))

    stage = problem.stage(recover=recover, recover_every=every, lr=0.3)
    trainer_of(ApplyMasks(), Watch(), epochs=2).fit(stage, data_of(problem.tokens, batch_size=2))
    assert solved == [((epoch, step), True) for epoch in (0, 1) for step in steps]


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_nothing_is_left_on_the_model_after_a_fit(loss, problem):
    model = problem.model
    before, dense = copy.deepcopy(model.state_dict()), logits(model, problem.tokens)
    stage = problem.stage(loss=loss, scope="attention+ffn")
    first = stage.masks()
    trainer_of(ApplyMasks(), epochs=4).fit(stage, data_of(problem.tokens))
    assert stage.masks() != first
    assert hooks_of(model) == 0
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(logits(model, problem.tokens), dense)
    # and it was good for the recovered model on its text
    assert loss_of(problem.sliced(stage.masks()), problem.tokens) < loss_of(problem.sliced(first), problem.tokens)


@pytest.mark.parametrize("hook", ["on_train_start", "on_before_backward", "on_train_epoch_end"])
def test_an_exception_inside_a_fit_leaves_nothing_either(hook, problem):
    dense, seen = logits(problem.model, problem.tokens), []

    def fail(*_args):
        seen.append(hooks_of(problem.model))
        raise RuntimeError("stop")

    failing = type("Failing", (L.Callback,), {hook: fail})()
    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(ApplyMasks(), failing).fit(problem.stage(), data_of(problem.tokens))
    assert seen == [3 + 6]  # gates and corrections were on
    assert hooks_of(problem.model) == 0
    assert torch.equal(logits(problem.model, problem.tokens), dense)


def test_offsets_have_a_learning_rate_of_their_own(problem):
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    rates = {}
    for rate in (None, 0.02):
        stage = make_stage(problem.model, learn="both", lr=0.1, offset_learning_rate=rate)
        before = [t.detach().clone() for t in stage.ffn_thresholds]
        trainer_of(ApplyMasks()).fit(stage, data_of(problem.tokens, batch_size=8))
        moved = torch.cat([(t.detach() - b) for t, b in zip(stage.ffn_thresholds, before, strict=True)])
        # all are shifted alike after the step: the distance between those that went up and those that went down
        rates[rate] = (float(torch.cat(stage.offsets).detach().abs().max()), float(moved.max() - moved.min()))
    assert rates[None] == (pytest.approx(0.1, rel=1e-3), pytest.approx(0.2, rel=1e-3))
    assert rates[0.02] == (pytest.approx(0.02, rel=1e-3), pytest.approx(0.2, rel=1e-3))


def test_curves_are_those_of_recovered_models(problem):
    """At the target, at another budget and at every epoch, against slicing; at 0 the dense model's."""
    windows = Windows("held out", "development", sampled_tokens(problem.model, windows=4, seed=9))
    stage = problem.stage()
    start = perplexity(problem.sliced(stage.masks()), windows).perplexity
    targets = {0.5: stage.target, 0.3: check_budget(stage.costs, 0.3)}
    curve = PerplexityCurve([windows], targets=targets)
    trainer_of(ApplyMasks(), curve, epochs=2).fit(stage, data_of(problem.tokens))
    values = {sparsity: point["held out"] for sparsity, point in curve.by_sparsity.items()}
    assert set(values) == {0.0, 0.3, 0.5}
    assert values[0.0] == perplexity(problem.model, windows).perplexity
    for sparsity, target in targets.items():
        small = problem.sliced(stage.masks(target=target))
        assert values[sparsity] == pytest.approx(perplexity(small, windows).perplexity, rel=1e-4)
        plain = perplexity(prune(problem.model, stage.masks(target=target)), windows).perplexity
        assert abs(plain / values[sparsity] - 1) > 0.01
    by_epoch = [point["held out"] for point in curve.by_epoch]
    assert len(by_epoch) == 3
    assert by_epoch[0] == pytest.approx(start, rel=1e-4)
    assert by_epoch[-1] == pytest.approx(values[0.5], rel=1e-4)
    assert hooks_of(problem.model) == 0


def test_without_recovery_the_curve_is_the_masked_models(problem):
    windows = Windows("held out", "development", sampled_tokens(problem.model, windows=4, seed=9))
    stage = make_stage(problem.model)
    curve = PerplexityCurve([windows], targets={0.5: stage.target})
    trainer_of(ApplyMasks(), curve).fit(stage, data_of(problem.tokens))
    with masked(problem.model, stage.masks()):
        assert curve.by_sparsity[0.5] == {"held out": perplexity(problem.model, windows).perplexity}


# --- the flag ---------------------------------------------------------------------------------------------------


def test_experts_and_sharded_models_are_refused():
    through = SparsityConfig(through="least_squares")
    model = make_tiny("mixtral")
    with pytest.raises(UserError, match=r"--sparsity\.through least_squares: expected a model without experts"):
        check_blocks(RunConfig(sparsity=through, recovery="least_squares"), blocks_of(model), model.config)
    check_blocks(RunConfig(sparsity=SparsityConfig()), blocks_of(model), model.config)
    cfg = RunConfig(sparsity=through, recovery="least_squares")
    cfg.model.shard = True
    with pytest.raises(UserError, match=r"each process holds whole, got --model\.shard true"):
        check_blocks(cfg, blocks_of(make_tiny_llama()), make_tiny_llama().config)


@pytest.mark.parametrize(
    ("settings", "needs", "calibrates"),
    [
        ({"through": "least_squares"}, {"gram"}, True), ({"through": "none"}, set(), False),
        ({"through": "least_squares", "allocation": "uniform"}, set(), False),  # nothing is learned
    ],
)  # fmt: skip
def test_only_learning_needs_gram_matrices_and_the_text_for_them(settings, needs, calibrates):
    # sequential recovery by itself reads its text alone
    cfg = RunConfig(sparsity=SparsityConfig(**settings), recovery="least_squares_sequential")
    cfg.corpora.recover = ["stories"]
    assert cfg.needs == needs
    assert ("stories" in cfg.calibration) == calibrates
    assert "stories" in cfg.used


@pytest.mark.parametrize("recovery", ["none", "bias"])
def test_learning_through_what_does_not_follow_is_refused(recovery):
    with pytest.raises(UserError, match=rf"--sparsity\.through least_squares: .* got --recovery {recovery}; add"):
        RunConfig(sparsity=SparsityConfig(through="least_squares"), recovery=recovery)
