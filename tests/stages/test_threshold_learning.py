"""Threshold learning: its start, invariances, gradients, and absence of side effects."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch

from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.importance.scores import fractional_ranks
from gprune.models.losses import next_token_losses
from gprune.models.masks import Masks, gated, masked
from gprune.models.units import units_of
from gprune.partition.modules import ranks_in_modules, within_module_ranks
from gprune.sparsity.budget import Budget, budget_of
from gprune.sparsity.cut import keep_masks
from gprune.sparsity.price import COST, price_of
from gprune.sparsity.thresholds import ModuleSparsity, masks_from_thresholds, start_thresholds, unit_margins
from gprune.stages.threshold_learning import ThresholdLearning, soft_gate
from gprune.units.structure import of_kind
from tests.world import by_key, hooks_of, make_tiny, make_tiny_llama, units_without_model

K = 4


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_problem(neurons: list[int], groups: list[int], seed: int, pattern: str = ""):
    """Scores of neurons and of groups by key, and ranks in K modules, none of which is switched.

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
    pairs = zip(scores, labels, strict=True)
    of_neurons = [within_module_ranks(s, torch.zeros_like(s), y, not_switched) for s, y in pairs]
    p = by_key(of_neurons, [fractional_ranks(s) for s in group_scores])
    return by_key(scores, group_scores), ranks_in_modules(p, labels)


def base_masks(budget: Budget, scores) -> Masks:
    return keep_masks(budget, {key: fractional_ranks(s) for key, s in scores.items()})


@pytest.mark.parametrize("sparsity", [0.1, 0.333, 0.9])
@pytest.mark.parametrize(("attention", "width_multiple"), [(False, 1), (True, 1), (False, 4), (True, 8)])
@pytest.mark.parametrize("pattern", ["", "ties", "sorted"])
def test_initial_thresholds_reproduce_the_base_masks(pattern, attention, width_multiple, sparsity):
    neurons, groups = [50, 64, 33], [4, 2, 3]
    scores, ranks = random_problem(neurons, groups, seed=0, pattern=pattern)
    sizes = enumerate(zip(neurons, groups, strict=True))
    units = [u for b, (n, g) in sizes for u in units_without_model(b, n, g, neuron=7, group=90, whole=0)]
    scope = "attention+ffn" if attention else "ffn"
    # Each block keeps `width_multiple` neurons, so that a sparsity of 0.9 may be impossible.
    maximum = sum(7 * (n - width_multiple) for n in neurons) / budget_of(units, scope=scope).total
    budget = budget_of(units, min(sparsity, round(maximum - 0.01, 3)), width_multiple, scope=scope)
    base = base_masks(budget, scores)
    thresholds = start_thresholds(base, ranks)
    assert masks_from_thresholds(ranks, thresholds, budget) == base
    assert budget.removed_by(base) >= budget.target
    # The same holds in float32, the dtype of training.
    float32_thresholds = {key: t.float() for key, t in thresholds.items()}
    assert masks_from_thresholds(ranks, float32_thresholds, budget) == base


def test_initial_thresholds_of_fully_kept_or_removed_modules_are_finite():
    labels = torch.arange(40) % 4
    _, ranks = random_problem([40], [2], seed=0)
    ranks = ranks_in_modules(ranks.p, [labels])
    keep = torch.ones(40, dtype=torch.bool)
    keep[labels == 1] = False  # all ten neurons of module 1
    members = (labels == 2).nonzero()[:, 0]
    keep[members[:3]] = False  # three of ten
    start = start_thresholds(Masks.of_blocks([keep], [torch.tensor([True, False])]), ranks)
    ffn, attention = start["neurons.0"], start["kv_groups.0"]
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
    units = units_of(model)
    sizes = ([u.size for u in units if u.kind == kind] for kind in ("neurons", "kv_groups"))
    scores, ranks = random_problem(*sizes, seed)
    budget = budget_of(units, sparsity, width_multiple, scope=scope, uniform=uniform, block_share=0.9)
    budget = budget.without(removed_blocks)
    start = start_thresholds(base_masks(budget, scores), ranks)
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


def neurons_of(stage) -> list[torch.nn.Parameter]:
    """Thresholds of the neurons of each block."""
    return of_kind(stage.thresholds, "neurons")


def groups_of(stage) -> list[torch.nn.Parameter]:
    """Thresholds of the KV groups of each block."""
    return of_kind(stage.thresholds, "kv_groups")


def shifts(stage, before: list[torch.Tensor]) -> torch.Tensor:
    """Changes of the thresholds of neurons."""
    return torch.cat([t.detach() - b for t, b in zip(neurons_of(stage), before, strict=True)])


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
    start = [t.detach().clone() for t in neurons_of(stage)]
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
        assert torch.cat(list(stage.learned_offsets)).abs().max() == 0.5  # the limit of offsets
    else:
        assert shifts(stage, start).std() > 0.05
    if learn == "thresholds":
        assert stage.offsets == {}
    else:
        assert torch.cat(list(stage.learned_offsets)).std() > 0.05
    # The budget is met.
    masks = stage.masks()
    assert masks != first
    excess = stage.budget.removed_by(masks) - stage.budget.target
    assert 0 <= excess < width_multiple * stage.budget.price["neurons.0"][1]
    assert all(int(m.sum()) % width_multiple == 0 for m in masks.ffn)
    assert [b for b, stays in enumerate(masks.blocks) if not stays] == list(options.get("removed_blocks", ()))
    trainable = [scope != "ffn" and stays for stays in masks.blocks]
    assert [t.requires_grad for t in groups_of(stage)] == trainable
    # The loss on the training text decreases.
    assert pruned_loss(tiny_model, masks, tokens) < pruned_loss(tiny_model, first, tokens)
    # A checkpoint contains only trained parameters and gives the same masks.
    names = {f"learned_thresholds.{i}" for i in range(6)}  # of neurons and of KV groups
    names |= set() if learn == "thresholds" else {f"learned_offsets.{b}" for b in range(3)}
    assert set(stage.state_dict()) == names
    loaded = make_stage(tiny_model, scope=scope, width_multiple=width_multiple, **options)
    loaded.load_state_dict(stage.state_dict())
    assert loaded.masks() == masks


@pytest.mark.parametrize(("uniform", "scope"), [(False, "attention+ffn"), (True, "ffn"), (True, "attention+ffn")])
@pytest.mark.parametrize("learn", ["thresholds", "offsets", "both"])
def test_centring_subtracts_the_mean_gradient_over_units(learn, uniform, scope, tiny_model):
    """For equal widths, the mean is over the neurons of the block. Otherwise, it is over the units of the model."""
    stage = make_stage(tiny_model, learn=learn, uniform=uniform, scope=scope, centred=True)
    stage.refresh_gates()
    with gated(tiny_model, stage.gates):
        next_token_losses(tiny_model, sampled_tokens(tiny_model)).mean().backward()
    kinds = {
        "thresholds": [(t, torch.bincount(stage.ranks.labels[key]).double()) for key, t in stage.thresholds.items()],
        "offsets": [(o, torch.ones(48).double()) for o in stage.learned_offsets],
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
    sum(gate.sum() for gate in stage.gates.values()).backward()
    for key in stage.gates:
        p, y, m, t = stage.ranks.p[key], stage.ranks.labels[key], masks[key], stage.thresholds[key]
        # The cut of each block is at margin 0, where soft gates are steepest.
        thresholds = t.detach().double()[y]
        cut_margin = (torch.logit(p) - thresholds)[~m].max()
        expected = slopes(p, thresholds + cut_margin, 1 / 12)  # twelve neurons per module
        np.testing.assert_allclose(t.grad, torch.zeros(K).double().index_add(0, y, expected), rtol=1e-3)


def test_the_cut_of_experts_with_equal_widths_is_the_mean_over_experts():
    """Each expert loses its own lowest neurons, so the largest margin that is removed differs between experts."""
    stage = make_stage(make_tiny("mixtral"), uniform=True)
    stage.refresh_gates()
    sum(gate.sum() for gate in stage.gates.values()).backward()
    ranks, masks = stage.ranks, stage.masks()
    for key in stage.gates:
        p, y, sizes, keep, t = ranks.p[key], ranks.labels[key], ranks.sizes[key], masks[key], stage.thresholds[key]
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
            for t in stage.learned_thresholds:
                t += 2 * torch.randn(t.shape, generator=generator_of(seed)) + 3
        masks, before = stage.masks(), [t.detach().clone() for t in neurons_of(stage)]
        stage.recentre(masks)
        assert stage.masks() == masks
        assert shifts(stage, before).std() < 1e-5  # all change equally
        margins = unit_margins(stage.ranks, stage.thresholds)
        removed = torch.cat([margins[key][~masks[key]] for key in margins if key.startswith("neurons")])
        assert abs(float(removed.max())) < 1e-5


def test_recentring_uses_kv_groups_if_neurons_have_no_cost(tiny_model):
    """With the cost `kv_cache` no neuron is removed, so the cut is that of KV groups."""
    units = units_of(tiny_model)
    price, _ = price_of(COST["kv_cache"](tiny_model, units), units)
    template = make_stage(tiny_model, scope="attention+ffn")
    budget = budget_of(units, 0.3, scope="attention+ffn", price=price)
    stage = ThresholdLearning(tiny_model, template.ranks, template.thresholds, budget)
    with torch.no_grad():
        for t in stage.learned_thresholds:
            t += 3
    masks = stage.masks()
    assert all(keep.all() for keep in masks.ffn)
    assert sum(int((~keep).sum()) for keep in masks.attention) == 2
    stage.recentre(masks)
    assert stage.masks() == masks
    margins = unit_margins(stage.ranks, stage.thresholds)
    removed = torch.cat([margins[key][~masks[key]] for key in margins if key.startswith("kv_groups")])
    assert abs(float(removed.max())) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_those_of_hard_gates_times_the_slope_of_soft_gates(seed, tiny_model):
    """The reference is the chain rule: gradients of gates in a float64 model, times the slope of soft gates."""
    tokens = sampled_tokens(tiny_model, seed=seed)
    stage = make_stage(tiny_model, sparsity=0.3, scope="attention+ffn", seed=seed)
    stage.refresh_gates()
    with gated(tiny_model, stage.gates):
        next_token_losses(tiny_model, tokens).mean().backward()
    double, masks = make_tiny_llama().double(), stage.masks()
    reference_gates = {key: mask.double().requires_grad_() for key, mask in masks.items()}
    with gated(double, reference_gates):
        double(tokens, labels=tokens).loss.backward()
    assert stage.gates.keys() == reference_gates.keys() == by_key(range(3), range(3)).keys()
    for key, reference_gate in reference_gates.items():
        gate, p, t, y = stage.gates[key], stage.ranks.p[key], stage.thresholds[key], stage.ranks.labels[key]
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

UNITS = [u for b in range(2) for u in units_without_model(b, 12, 2, neuron=2, group=9, whole=100)]
BUDGET = budget_of(UNITS).removing(20)  # ten of 24 neurons


def random_numbers(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]


LABELS = [torch.arange(12) % 3, torch.arange(12) % 2]
RANKS = ranks_in_modules(by_key(random_numbers(12, 12), random_numbers(2, 2)), LABELS)
THRESHOLDS = by_key(random_numbers(3, 2), random_numbers(1, 1))
OFFSETS = by_key(random_numbers(12, 12))
OTHER_MASKS = Masks.of_blocks([torch.arange(12) < 7] * 2, [torch.ones(2, dtype=torch.bool)] * 2)


@pytest.mark.parametrize(
    ("sparsity", "kinds"),
    [
        (ModuleSparsity(THRESHOLDS), {"neurons", "kv_groups"}),
        (ModuleSparsity(THRESHOLDS, OFFSETS), {"neurons", "kv_groups", "offsets"}),
        (ModuleSparsity(None, fixed_masks=OTHER_MASKS), {"masks"}),
        (ModuleSparsity(THRESHOLDS, fixed_masks=OTHER_MASKS), {"neurons", "kv_groups", "masks"}),
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
    offsets = {key: 3 * numbers.flip(0) for key, numbers in OFFSETS.items()}
    shifted = ModuleSparsity(THRESHOLDS, offsets).masks(RANKS, BUDGET)
    assert shifted == ModuleSparsity(THRESHOLDS).masks(RANKS.with_offsets(offsets), BUDGET)
    assert shifted != ModuleSparsity(THRESHOLDS).masks(RANKS, BUDGET)
