"""Threshold learning: its start, invariances, gradients, and absence of side effects."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch

from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.importance.scores import fractional_ranks
from gprune.models.blocks import blocks_of
from gprune.models.losses import next_token_losses
from gprune.models.masks import Masks, gated, masked
from gprune.partition.modules import ModuleRanks, within_module_ranks
from gprune.sparsity.budget import Budget, budget_of
from gprune.sparsity.cut import keep_masks
from gprune.sparsity.price import COST, price_of
from gprune.sparsity.thresholds import ModuleSparsity, masks_from_thresholds, start_thresholds
from gprune.stages.threshold_learning import ThresholdLearning, soft_gate
from tests.world import PlainBlock, hooks_of, make_tiny, make_tiny_llama

K = 4


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_problem(neurons: list[int], groups: list[int], seed: int, pattern: str = ""):
    """Scores of neurons and of groups, and ranks in K modules, none of which is switched.

    Args:
        pattern: of scores. "": independent random scores. "ties": many scores are equal. "sorted": scores of modules do
            not overlap, so that whole modules are removed.
    """
    generator = generator_of(seed)
    scores = [torch.rand(n, generator=generator, dtype=torch.float64) for n in neurons]
    labels = [(torch.arange(n) % K)[torch.randperm(n, generator=generator)] for n in neurons]
    if pattern == "ties":
        scores = [(s * 5).round() for s in scores]
    if pattern == "sorted":
        scores = [s + y for s, y in zip(scores, labels, strict=True)]
    group_scores = [torch.rand(n, generator=generator, dtype=torch.float64) for n in groups]
    not_switched = torch.zeros(K, dtype=torch.bool)
    ranks = ModuleRanks(
        ffn=[within_module_ranks(s, torch.zeros_like(s), y, not_switched) for s, y in zip(scores, labels, strict=True)],
        labels=labels,
        attention=[fractional_ranks(s) for s in group_scores],
    )
    return scores, group_scores, ranks


def base_masks(budget: Budget, scores, group_scores) -> Masks:
    return keep_masks(budget, [fractional_ranks(s) for s in scores], [fractional_ranks(s) for s in group_scores])


@pytest.mark.parametrize("sparsity", [0.1, 0.333, 0.9])
@pytest.mark.parametrize(("attention", "width_multiple"), [(False, 1), (True, 1), (False, 4), (True, 8)])
@pytest.mark.parametrize("pattern", ["", "ties", "sorted"])
def test_initial_thresholds_reproduce_the_base_masks(pattern, attention, width_multiple, sparsity):
    neurons, groups = [50, 64, 33], [4, 2, 3]
    scores, group_scores, ranks = random_problem(neurons, groups, seed=0, pattern=pattern)
    sizes = enumerate(zip(neurons, groups, strict=True))
    blocks = [PlainBlock(b, n, g, neuron=7, group=90, whole=0) for b, (n, g) in sizes]
    scope = "attention+ffn" if attention else "ffn"
    # Each block keeps `width_multiple` neurons, so that a sparsity of 0.9 may be impossible.
    maximum = sum(7 * (n - width_multiple) for n in neurons) / budget_of(blocks, scope=scope).total
    budget = budget_of(blocks, min(sparsity, round(maximum - 0.01, 3)), width_multiple, scope=scope)
    base = base_masks(budget, scores, group_scores)
    thresholds = start_thresholds(base, ranks)
    assert masks_from_thresholds(ranks, thresholds, budget) == base
    assert budget.removed_by(base) >= budget.target
    # The same holds in float32, the dtype of training.
    float32_thresholds = tuple([t.float() for t in per_block] for per_block in thresholds)
    assert masks_from_thresholds(ranks, float32_thresholds, budget) == base


def test_initial_thresholds_of_fully_kept_or_removed_modules_are_finite():
    labels = torch.arange(40) % 4
    _, _, ranks = random_problem([40], [2], seed=0)
    ranks = ModuleRanks(ranks.ffn, [labels], ranks.attention)
    keep = torch.ones(40, dtype=torch.bool)
    keep[labels == 1] = False  # all ten neurons of module 1
    members = (labels == 2).nonzero()[:, 0]
    keep[members[:3]] = False  # three of ten
    (ffn,), (attention,) = start_thresholds(Masks([keep], [torch.tensor([True, False])]), ranks)
    # The removed fractions of the four modules. Instead of 0 or all neurons, a quarter of a neuron is removed or kept.
    fractions = np.array([0.25 / 10, 9.75 / 10, 3 / 10, 0.25 / 10])
    np.testing.assert_allclose(ffn.numpy(), np.log(fractions / (1 - fractions)), rtol=1e-12)
    assert float(attention) == 0  # one of two groups
    assert bool(torch.isfinite(ffn).all())


# --- training on the tiny model


def make_stage(
    model, *, sparsity: float = 0.5, scope: str = "ffn", seed: int = 0, width_multiple: int = 1, lr: float = 0.1,
    uniform: bool = False, removed_blocks: tuple[int, ...] = (), **options,
) -> ThresholdLearning:  # fmt: skip
    """A stage for the tiny model with random scores.

    Args:
        removed_blocks: blocks that are removed as a whole.
        **options: arguments of `ThresholdLearning`.
    """
    blocks = blocks_of(model)
    scores, group_scores, ranks = random_problem([b.all_neurons for b in blocks], [b.kv_groups for b in blocks], seed)
    budget = budget_of(blocks, sparsity, width_multiple, scope=scope, uniform=uniform, block_share=0.9)
    budget = budget.without(removed_blocks)
    start = start_thresholds(base_masks(budget, scores, group_scores), ranks)
    options = {"centred": False, "offset_learning_rate": lr, "offset_limit": 9.0} | options
    return ThresholdLearning(model, ranks, start, budget, learning_rate=lr, **options)


def sampled_tokens(model, windows: int = 8, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Tokens sampled from the dense model, so that pruning increases the loss."""
    generator = generator_of(seed)
    tokens = torch.randint(3, 128, (windows, 1), generator=generator)
    with torch.no_grad():
        while tokens.shape[1] < length:
            p = (2 * model(tokens).logits[:, -1]).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], 1)
    return tokens


def data_of(tokens: torch.Tensor, batch_size: int = 4) -> CorpusDataModule:
    return CorpusDataModule(train=[Windows("demo", "train", tokens)], batch_size=batch_size, seed=0)


def trainer_of(*callbacks: L.Callback, epochs: int = 1, **options) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


@torch.no_grad()
def pruned_loss(model, masks: Masks, tokens: torch.Tensor) -> float:
    with masked(model, masks):
        return float(model(tokens, labels=tokens).loss)


def shifts(stage, before: list[torch.Tensor]) -> torch.Tensor:
    """Changes of the thresholds of neurons."""
    return torch.cat([t.detach() - b for t, b in zip(stage.ffn_thresholds, before, strict=True)])


@pytest.mark.parametrize(
    ("scope", "width_multiple", "options"),
    [
        ("ffn", 1, {}),
        ("attention+ffn", 8, {}),
        ("ffn", 1, {"learn": "offsets", "offset_limit": 0.5}),
        ("attention+ffn", 1, {"learn": "both", "loss": "kl"}),
        ("attention+ffn+blocks", 8, {"learn": "both", "removed_blocks": (1,), "sparsity": 0.6, "centred": True}),
    ],
)
def test_training_meets_the_budget_reduces_the_loss_leaves_the_model_unchanged_and_reloads(
    scope, width_multiple, options, tiny_model
):
    tokens, learn = sampled_tokens(tiny_model), options.get("learn", "thresholds")
    budget_options = {name: value for name, value in options.items() if name in ("removed_blocks", "sparsity")}
    stage = make_stage(tiny_model, scope=scope, width_multiple=width_multiple, **options)
    before = {name: t.clone() for name, t in tiny_model.state_dict().items()}
    start = [t.detach().clone() for t in stage.ffn_thresholds]
    first = stage.masks()
    # Offsets begin at 0, so that all kinds of training start with the same masks.
    assert first == make_stage(tiny_model, scope=scope, width_multiple=width_multiple, **budget_options).masks()
    trainer_of(epochs=6).fit(stage, data_of(tokens))
    # The model is unchanged bit for bit.
    assert all(torch.equal(before[name], t) for name, t in tiny_model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in tiny_model.parameters())
    assert hooks_of(tiny_model) == 0
    # Trained parameters have changed by different amounts. If only offsets are trained, thresholds change equally.
    if learn == "offsets":
        assert shifts(stage, start).std() < 1e-5
        assert torch.cat(stage.offsets).abs().max() == 0.5  # the limit of offsets
    else:
        assert shifts(stage, start).std() > 0.05
    if learn == "thresholds":
        assert stage.offsets is None
    else:
        assert torch.cat(stage.offsets).std() > 0.05
    # The budget is met.
    masks = stage.masks()
    assert masks != first
    excess = stage.budget.removed_by(masks) - stage.budget.target
    assert 0 <= excess < width_multiple * stage.budget.price["neurons.0"][1]
    assert all(int(m.sum()) % width_multiple == 0 for m in masks.ffn)
    assert [b for b, stays in enumerate(masks.blocks) if not stays] == list(options.get("removed_blocks", ()))
    trainable = [scope != "ffn" and stays for stays in masks.blocks]
    assert [t.requires_grad for t in stage.attention_thresholds] == trainable
    # The loss on the training text decreases.
    assert pruned_loss(tiny_model, masks, tokens) < pruned_loss(tiny_model, first, tokens)
    # A checkpoint contains only trained parameters and gives the same masks.
    kinds = ["ffn_thresholds", "attention_thresholds", *([] if learn == "thresholds" else ["ffn_offsets"])]
    assert set(stage.state_dict()) == {f"{kind}.{b}" for kind in kinds for b in range(3)}
    loaded = make_stage(tiny_model, scope=scope, width_multiple=width_multiple, **options)
    loaded.load_state_dict(stage.state_dict())
    assert loaded.masks() == masks


@pytest.mark.parametrize(("uniform", "scope"), [(False, "attention+ffn"), (True, "ffn"), (True, "attention+ffn")])
@pytest.mark.parametrize("learn", ["thresholds", "offsets", "both"])
def test_centring_subtracts_the_mean_gradient_over_units(learn, uniform, scope, tiny_model):
    """For equal widths, the mean is over the neurons of the block. Otherwise, it is over the units of the model."""
    stage = make_stage(tiny_model, learn=learn, uniform=uniform, scope=scope, centred=True)
    stage.refresh_gates()
    with gated(tiny_model, stage.ffn_gates, stage.attention_gates):
        next_token_losses(tiny_model, sampled_tokens(tiny_model)).mean().backward()
    sizes = [torch.bincount(y).double() for y in stage.ranks.labels]
    kinds = {
        "thresholds": [(t, n) for t, n in zip(stage.ffn_thresholds, sizes, strict=True)]
        + [(t, torch.tensor([2.0]).double()) for t in stage.attention_thresholds],
        "offsets": [(o, torch.ones(48).double()) for o in stage.ffn_offsets],
    }
    # (parameter, units, gradient before centring) of trained parameters
    trained = {
        name: [(p, n, p.grad.double().clone()) for p, n in parameters if p.grad is not None]
        for name, parameters in kinds.items()
    }
    stage.centre()
    for name, parameters in trained.items():
        assert bool(parameters) == (learn in (name, "both") or (name == "thresholds" and scope != "ffn"))
        for p, n, before in parameters:
            of_neurons = len(p) > 1  # KV groups of a block have a single threshold
            averaged = [(p, n, before)] if uniform and of_neurons else parameters
            mean = sum(gradient.sum() for *_, gradient in averaged) / sum(units.sum() for _, units, _ in averaged)
            assert abs(float(mean)) > 1e-6
            np.testing.assert_allclose(p.grad.double(), before - mean * n, rtol=1e-4, atol=1e-9)
            assert float(p.grad.abs().max()) > 1e-7


@pytest.mark.parametrize(
    "options", [{}, {"scope": "ffn+blocks", "removed_blocks": (1,)}], ids=["", "a block is removed"]
)
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_the_logged_loss_is_that_of_the_hard_masks(loss, options, tiny_model):
    """The reference is computed from the model's logits in float64."""
    tokens = sampled_tokens(tiny_model, windows=4)
    stage = make_stage(tiny_model, loss=loss, lr=1e-9, **options)
    assert stage.masks().blocks == [True, not options, True]
    trainer = trainer_of()
    trainer.fit(stage, data_of(tokens))
    with torch.no_grad():
        dense = tiny_model(tokens).logits[:, :-1].double().log_softmax(-1)
        with masked(tiny_model, stage.masks()):
            pruned = tiny_model(tokens).logits[:, :-1].double().log_softmax(-1)
    if loss == "kl":
        expected = (dense.exp() * (dense - pruned)).sum(-1).mean()
    else:
        expected = -pruned.gather(-1, tokens[:, 1:, None]).mean()
    assert float(expected) > 1e-3
    assert float(trainer.callback_metrics["learn/loss"]) == pytest.approx(float(expected), rel=1e-4)


def slopes(p: torch.Tensor, t: torch.Tensor, T: float | torch.Tensor) -> torch.Tensor:
    """d/dt sigmoid((p - sigmoid(t)) / T) of each unit."""
    cut = torch.sigmoid(t)
    soft = torch.sigmoid((p - cut) / T)
    return -(soft * (1 - soft) / T) * cut * (1 - cut)


def test_equal_widths_stay_equal_during_training_and_soft_gates_are_steepest_at_each_blocks_cut(tiny_model):
    tokens = sampled_tokens(tiny_model)
    stage = make_stage(tiny_model, uniform=True)
    first = stage.masks()
    trainer_of(epochs=4).fit(stage, data_of(tokens))
    masks = stage.masks()
    assert masks != first
    assert {int(m.sum()) for m in masks.ffn} == {int(first.ffn[0].sum())}
    stage.zero_grad()
    stage.refresh_gates()
    sum(gate.sum() for gate in stage.ffn_gates).backward()
    for p, y, m, t in zip(stage.ranks.ffn, stage.ranks.labels, masks.ffn, stage.ffn_thresholds, strict=True):
        # The cut of each block is at margin 0, where soft gates are steepest.
        thresholds = t.detach().double()[y]
        cut_margin = (torch.logit(p) - thresholds)[~m].max()
        expected = slopes(p, thresholds + cut_margin, 1 / 12)  # twelve neurons per module
        np.testing.assert_allclose(t.grad, torch.zeros(K).double().index_add(0, y, expected), rtol=1e-3)


def test_the_cut_of_experts_with_equal_widths_is_the_mean_over_experts():
    """Each expert loses its own lowest neurons, so the largest margin that is removed differs between experts."""
    stage = make_stage(make_tiny("mixtral"), uniform=True)
    stage.refresh_gates()
    sum(gate.sum() for gate in stage.ffn_gates).backward()
    ranks, thresholds = stage.ranks, stage.ffn_thresholds
    for p, y, sizes, keep, t in zip(ranks.ffn, ranks.labels, ranks.sizes, stage.masks().ffn, thresholds, strict=True):
        of_units = t.detach().double()[y]
        margins = torch.logit(p.double()) - of_units
        largest = margins.masked_fill(keep, -torch.inf).view(4, -1).amax(1)
        assert largest.max() - largest.mean() > 0.05  # the two definitions differ
        T = (1 / sizes.double()).clamp_min(0.05)[y]
        expected = slopes(p, of_units + largest.mean(), T)
        np.testing.assert_allclose(t.grad, torch.zeros(K).double().index_add(0, y, expected), rtol=1e-3)


def test_windows_of_weight_zero_do_not_affect_the_loss(tiny_model):
    tokens = sampled_tokens(tiny_model, windows=4)
    stage = make_stage(tiny_model)
    losses = {}

    class Probe(L.Callback):
        """Compute losses inside of `fit`, where the stage is set up."""

        def on_train_start(self, trainer, pl_module):
            weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
            losses["weighted"] = pl_module.training_step({"input_ids": tokens, "weight": weight}, 0).item()
            without = {"input_ids": tokens[[0, 2]], "weight": torch.ones(2)}
            losses["without"] = pl_module.training_step(without, 0).item()

    trainer_of(Probe()).fit(stage, data_of(tokens))
    assert losses["weighted"] == pytest.approx(losses["without"], rel=1e-6)


@pytest.mark.parametrize("place", ["on_train_start", "on_before_backward", "on_train_epoch_end", "forward pass"])
def test_an_exception_inside_fit_leaves_no_hooks(place, tiny_model, token_batch, monkeypatch):
    dense, tokens, hooks = tiny_model(token_batch).logits, sampled_tokens(tiny_model), []

    def fail(*_args, **_kwargs):
        hooks.append(hooks_of(tiny_model))
        raise RuntimeError("stop")

    callback = L.Callback()
    if place == "forward pass":
        monkeypatch.setattr("gprune.stages.threshold_learning.next_token_losses", fail)
    else:
        callback = type("Failing", (L.Callback,), {place: fail})()
    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(callback).fit(make_stage(tiny_model), data_of(tokens))
    assert hooks == [3 if place == "forward pass" else 0]  # gates, one per block, are attached only during a step
    assert hooks_of(tiny_model) == 0
    assert torch.equal(tiny_model(token_batch).logits, dense)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("scope", ["ffn", "attention+ffn"])
def test_recentring_moves_the_cut_to_margin_zero_without_changing_masks(scope, uniform, tiny_model):
    stage = make_stage(tiny_model, scope=scope, uniform=uniform)
    for seed in range(4):
        with torch.no_grad():
            for t in (*stage.ffn_thresholds, *stage.attention_thresholds):
                t += 2 * torch.randn(t.shape, generator=generator_of(seed)) + 3
        masks, before = stage.masks(), [t.detach().clone() for t in stage.ffn_thresholds]
        stage.recentre(masks)
        assert stage.masks() == masks
        assert shifts(stage, before).std() < 1e-5  # all change equally
        parts = zip(stage.ranks.ffn, stage.ffn_thresholds, stage.ranks.labels, masks.ffn, strict=True)
        removed = torch.cat([(torch.logit(p) - t.detach().double()[y])[~keep] for p, t, y, keep in parts])
        assert abs(float(removed.max())) < 1e-5


def test_recentring_uses_kv_groups_if_neurons_have_no_cost(tiny_model):
    """With the cost `kv_cache` no neuron is removed, so the cut is that of KV groups."""
    blocks = blocks_of(tiny_model)
    price, _ = price_of(COST["kv_cache"](tiny_model, blocks), blocks)
    template = make_stage(tiny_model, scope="attention+ffn")
    budget = budget_of(blocks, 0.3, scope="attention+ffn", price=price)
    stage = ThresholdLearning(tiny_model, template.ranks, template.thresholds, budget)
    with torch.no_grad():
        for t in (*stage.ffn_thresholds, *stage.attention_thresholds):
            t += 3
    masks = stage.masks()
    assert all(keep.all() for keep in masks.ffn)
    assert sum(int((~keep).sum()) for keep in masks.attention) == 2
    stage.recentre(masks)
    assert stage.masks() == masks
    parts = zip(stage.ranks.attention, stage.attention_thresholds, masks.attention, strict=True)
    removed = torch.cat([(torch.logit(p) - t.detach().double())[~keep] for p, t, keep in parts])
    assert abs(float(removed.max())) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_those_of_hard_gates_times_the_slope_of_soft_gates(seed, tiny_model):
    """The reference is the chain rule: gradients of gates in a float64 model, times the slope of soft gates."""
    tokens = sampled_tokens(tiny_model, seed=seed)
    stage = make_stage(tiny_model, sparsity=0.3, scope="attention+ffn", seed=seed)
    stage.refresh_gates()
    with gated(tiny_model, stage.ffn_gates, stage.attention_gates):
        next_token_losses(tiny_model, tokens).mean().backward()
    double, masks = make_tiny_llama().double(), stage.masks()
    ffn, attention = ([m.double().requires_grad_() for m in kind] for kind in (masks.ffn, masks.attention))
    with gated(double, ffn, attention):
        double(tokens, labels=tokens).loss.backward()
    gates, ranks = [*stage.ffn_gates, *stage.attention_gates], [*stage.ranks.ffn, *stage.ranks.attention]
    modules = [*stage.ranks.labels, *[torch.zeros(2, dtype=torch.long)] * 3]  # KV groups are one module
    thresholds = [*stage.ffn_thresholds, *stage.attention_thresholds]
    for gate, reference_gate, p, t, y in zip(gates, [*ffn, *attention], ranks, thresholds, modules, strict=True):
        assert torch.equal(gate.detach().double(), reference_gate.detach())  # hard gates
        temperature = max(0.05, len(t) / len(p))  # one over the number of units per module, at least 0.05
        slope = slopes(p, t.detach().double()[y], temperature)
        expected = torch.zeros(len(t)).double().index_add(0, y, reference_gate.grad * slope)
        np.testing.assert_allclose(t.grad, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


# --- soft gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_gate_equals_the_formula_in_numpy(dtype):
    labels = torch.tensor([0] * 5 + [1] * 50)
    sizes = torch.bincount(labels)
    p = torch.cat([(torch.arange(n) + 0.5) / n for n in (5, 50)]).to(dtype)
    t = torch.tensor([-0.4, 0.7], dtype=dtype)
    cut = 1 / (1 + np.exp(-t.double().numpy()))
    temperature = np.array([0.2, 0.05])  # 1/5, and the minimum instead of 1/50
    y = labels.numpy()
    expected = 1 / (1 + np.exp(-(p.double().numpy() - cut[y]) / temperature[y]))
    gate = soft_gate(p, t, labels, sizes)
    assert gate.dtype == dtype
    np.testing.assert_allclose(gate.numpy(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)


# --- what is stored of learning, and masks for other budgets

BLOCKS = [PlainBlock(b, 12, 2, neuron=2, group=9, whole=100) for b in range(2)]
BUDGET = budget_of(BLOCKS).removing(20)  # ten of 24 neurons


def random_numbers(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]


RANKS = ModuleRanks(random_numbers(12, 12), [torch.arange(12) % 3, torch.arange(12) % 2], random_numbers(2, 2))
THRESHOLDS = random_numbers(3, 2), random_numbers(1, 1)
OTHER_MASKS = Masks([torch.arange(12) < 7] * 2, [torch.ones(2, dtype=torch.bool)] * 2)


@pytest.mark.parametrize(
    ("sparsity", "kinds"),
    [
        (ModuleSparsity(THRESHOLDS), {"ffn", "attention"}),
        (ModuleSparsity(THRESHOLDS, random_numbers(12, 12)), {"ffn", "attention", "offsets"}),
        (ModuleSparsity(None, fixed_masks=OTHER_MASKS), {"masks"}),
        (ModuleSparsity(THRESHOLDS, fixed_masks=OTHER_MASKS), {"ffn", "attention", "masks"}),
    ],
    ids=["thresholds", "and offsets", "masks", "thresholds and masks"],
)
def test_stored_sparsity_of_modules_gives_the_same_masks(sparsity, kinds):
    tensors = sparsity.tensors()
    assert {name.partition(".")[0] for name in tensors} == kinds
    stored = ModuleSparsity.from_tensors({name: tensors[name] for name in sorted(tensors)})
    masks = stored.masks(RANKS, BUDGET)
    assert masks == sparsity.masks(RANKS, BUDGET)
    assert (masks == OTHER_MASKS) == ("masks" in kinds)
    assert sum(int((~mask).sum()) for mask in masks.ffn) == 10
    assert stored.tensors().keys() == tensors.keys()


def test_offsets_shift_ranks():
    offsets = [3 * numbers.flip(0) for numbers in random_numbers(12, 12)]
    shifted = ModuleSparsity(THRESHOLDS, offsets).masks(RANKS, BUDGET)
    assert shifted == ModuleSparsity(THRESHOLDS).masks(RANKS.with_offsets(offsets), BUDGET)
    assert shifted != ModuleSparsity(THRESHOLDS).masks(RANKS, BUDGET)
