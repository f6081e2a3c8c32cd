"""Budgets, keep masks, gates, and masks on a running model."""

from __future__ import annotations

import copy
import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.masks import Masks
from gprune.sparsity.budget import Budget, UnitCosts, unit_costs
from gprune.sparsity.cut import cut_margin, keep_masks, margins
from gprune.sparsity.gates import gated, masked, soft_gate, straight_through
from tests.conftest import make_tiny_llama


def costs_of(neuron, neurons, group=None, groups=None) -> UnitCosts:
    attention = group is not None
    group, groups = group or [1] * len(neuron), groups or [1] * len(neuron)
    return UnitCosts(neuron=neuron, group=group, neurons=neurons, groups=groups, attention=attention)


# --- the budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neurons", "sparsity", "target"),
    [(30, 0.1, 3), (30, 0.101, 4), (10, 0.7, 7), (1000, 0.29, 290), (3, 0.333, 1), (100, 1e-9, 1), (1100, 0.07, 77)],
)
def test_the_target_is_counted_exactly(neurons, sparsity, target):
    assert Budget.of(costs_of([1], [neurons]), sparsity).target == target


def test_the_target_of_a_large_model_is_exact():
    total = 3 * 4096 * 11008 * 32
    assert Budget.of(costs_of([3 * 4096] * 32, [11008] * 32), 0.3).target == math.ceil(Fraction(3, 10) * total)


@pytest.mark.parametrize("sparsity", [0, 1, -1, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_the_unit_interval_is_refused(sparsity):
    with pytest.raises(UserError, match=r"--sparsity\.target: .*inside \(0, 1\), got"):
        Budget.of(costs_of([1], [30]), sparsity)


def test_impossible_budgets_say_what_is_possible():
    costs = costs_of([2, 2], [10, 10])
    assert Budget.of(costs, 0.9).target == 36
    with pytest.raises(UserError, match=r"0\.91 cannot be reached: every block keeps 1 neuron, .*0\.9000"):
        Budget.of(costs, 0.91)
    with pytest.raises(UserError, match=r"keeps 4 neurons, .*0\.6000"):
        Budget.of(costs, 0.7, 4)
    with pytest.raises(UserError, match="1 neuron and one KV group"):
        Budget.of(costs_of([2], [10], [30], [2]), 0.7)
    assert Budget.of(costs_of([2], [10], [30], [2]), 0.6).target == 48


@pytest.mark.parametrize("width_multiple", [0, -1, 11])
def test_width_multiples_that_do_not_fit_are_refused(width_multiple):
    with pytest.raises(UserError, match=r"--sparsity\.width_multiple: expected 1 to 10"):
        Budget.of(costs_of([1, 1], [30, 10]), 0.1, width_multiple)


@pytest.mark.parametrize("attention", [False, True])
def test_a_budget_that_protection_makes_impossible_says_so(attention):
    costs = costs_of([2, 2, 2], [10, 10, 10], *([[5, 5, 5], [2, 2, 2]] if attention else []))
    costs = dataclasses.replace(costs, protected=frozenset({0, 2}))
    most = (18 + 5 * attention, 60 + 30 * attention)
    assert Budget.of(costs, most[0] / most[1] - 1e-6).target == most[0]
    with pytest.raises(UserError) as caught:
        Budget.of(costs, 0.4)
    line = str(caught.value)
    assert "\n" not in line
    assert "--sparsity.target: 0.4 cannot be reached" in line
    assert "2 keep everything" in line
    assert f"at most {most[0] / most[1]:.4f}" in line


@pytest.mark.parametrize("index", [3, -4, 99])
def test_protecting_a_block_that_there_is_not_is_refused(index, tiny_model):
    with pytest.raises(UserError, match=rf"--sparsity\.protect: expected blocks from -3 to 2, got {index}; .* has 3"):
        unit_costs(blocks_of(tiny_model), scope="ffn", protect=[0, index])


def test_protected_blocks_may_be_counted_from_the_end(tiny_model):
    blocks = blocks_of(tiny_model)
    assert unit_costs(blocks, scope="ffn", protect=[0, -1, 2, -3]).protected == {0, 2}
    assert unit_costs(blocks, scope="ffn").protected == frozenset()


def test_costs_of_a_model_are_its_parameters(tiny_model):
    costs = unit_costs(blocks_of(tiny_model), scope="ffn")
    layer = tiny_model.model.layers[0]
    ffn = sum(p.numel() for layer in tiny_model.model.layers for p in layer.mlp.parameters())
    attention = sum(p.numel() for layer in tiny_model.model.layers for p in layer.self_attn.parameters())
    assert costs.total == ffn
    assert unit_costs(blocks_of(tiny_model), scope="attention+ffn").total == ffn + attention
    assert costs.neuron[0] * 48 == sum(p.numel() for p in layer.mlp.parameters())
    masks = Masks([torch.arange(48) < 40] * 3, [torch.tensor([True, False])] * 3)
    assert costs.removed(masks) == ffn * 8 // 48 + attention // 2


# --- keep masks -------------------------------------------------------------------------------------------------

sparsities = st.one_of(st.sampled_from([0.333, 0.47, 0.1, 0.9]), st.floats(0.001, 0.97))


def draw_margins(data, lengths: list[int]) -> list[torch.Tensor]:
    """Margins with many ties, all equal, or spread out."""
    kind = data.draw(st.sampled_from(["ties", "equal", "spread"]))
    values = {
        "ties": st.integers(-3, 3).map(float), "equal": st.just(0.5), "spread": st.floats(-9, 9, width=32)
    }[kind]  # fmt: skip
    return [torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64) for n in lengths]


@st.composite
def problems(draw, width_multiples=(1, 4, 8), scopes=(False, True), smallest=1, largest=30):
    width_multiple = draw(st.sampled_from(width_multiples))
    depth = draw(st.integers(1, 4))
    lists = lambda numbers: st.lists(numbers, min_size=depth, max_size=depth)  # noqa: E731
    neurons = draw(lists(st.integers(max(width_multiple, smallest), largest)))
    attention = draw(st.sampled_from(scopes))
    costs = UnitCosts(
        neuron=draw(lists(st.integers(1, 9))), group=draw(lists(st.integers(1, 60))), neurons=neurons,
        groups=draw(lists(st.integers(1, 4))), attention=attention,
        protected=draw(st.just(frozenset()) | st.frozensets(st.integers(0, depth - 1), max_size=depth - 1)),
    )  # fmt: skip
    return costs, width_multiple, draw(sparsities)


def removable_neurons(costs: UnitCosts, width_multiple: int) -> int:
    open_blocks = [b for b in range(len(costs.neuron)) if b not in costs.protected]
    return sum(costs.neuron[b] * (costs.neurons[b] - width_multiple) for b in open_blocks)


def solve(problem, data):
    costs, width_multiple, sparsity = problem
    try:
        budget = Budget.of(costs, sparsity, width_multiple)
    except UserError:
        open_blocks = [b for b in range(len(costs.neuron)) if b not in costs.protected]
        groups = sum(costs.group[b] * (costs.groups[b] - 1) for b in open_blocks) * costs.attention
        assert Fraction(str(sparsity)) * costs.total > removable_neurons(costs, width_multiple) + groups
        assume(False)
    neuron = draw_margins(data, costs.neurons)
    group = draw_margins(data, costs.groups) if costs.attention else None
    return keep_masks(budget, neuron, group), neuron, group, budget.target


@settings(max_examples=120)
@given(problem=problems(), data=st.data())
def test_masks_meet_the_budget(problem, data):
    costs, width_multiple, _ = problem
    masks, _, _, target = solve(problem, data)
    removed = costs.removed(masks)
    by_hand = sum(c * (~m).sum().item() for c, m in zip(costs.neuron, masks.ffn, strict=True)) + sum(
        c * (~m).sum().item() for c, m in zip(costs.group, masks.attention, strict=True)
    )
    assert removed == by_hand
    assert removed >= target
    step = width_multiple * max(costs.neuron)
    if costs.attention and removable_neurons(costs, width_multiple) < max(costs.group):
        step = max(step, *costs.group)  # neurons too few to stand in for a group
    assert removed - target < step


@settings(max_examples=80)
@given(problem=problems(), data=st.data())
def test_every_block_keeps_something_and_widths_are_on_the_grid(problem, data):
    costs, width_multiple, _ = problem
    masks, _, _, _ = solve(problem, data)
    for mask, n in zip(masks.ffn, costs.neurons, strict=True):
        kept = int(mask.sum())
        assert mask.dtype == torch.bool
        assert len(mask) == n
        assert kept >= width_multiple
        assert kept % width_multiple == 0 or kept == n  # a block that loses nothing keeps an odd width
    for mask, n in zip(masks.attention, costs.groups, strict=True):
        assert int(mask.sum()) >= 1
        assert len(mask) == n
        if not costs.attention:
            assert bool(mask.all())
    for b in costs.protected:
        assert bool(masks.ffn[b].all())
        assert bool(masks.attention[b].all())


@settings(max_examples=80)
@given(problem=problems(), data=st.data())
def test_inside_a_block_the_smaller_margin_goes_first(problem, data):
    masks, neuron, group, _ = solve(problem, data)
    for mask, margin in zip([*masks.ffn, *masks.attention], [*neuron, *(group or [])], strict=False):
        order = sorted(range(len(mask)), key=lambda i, m=margin: (float(m[i]), i))
        kept = [bool(mask[i]) for i in order]
        assert kept == sorted(kept)  # removed ones first: by margin, then index


@settings(max_examples=80)
@given(problem=problems(width_multiples=(1,), scopes=(False,)), data=st.data())
def test_in_the_whole_model_no_removed_neuron_has_a_larger_margin_than_a_kept_one(problem, data):
    masks, neuron, _, _ = solve(problem, data)
    free = [
        (m, keep) for b, (m, keep) in enumerate(zip(neuron, masks.ffn, strict=True)) if b not in problem[0].protected
    ]
    removed = [float(m[~keep].max()) for m, keep in free if not keep.all()]
    # the best neuron of each block has to stay, so it says nothing
    kept = [sorted(m[keep].tolist())[0] for m, keep in free if int(keep.sum()) > 1]
    if removed and kept:
        assert max(removed) <= min(kept)


def reference_masks(costs, neuron, group, target, width_multiple) -> Masks:
    """The rule as it is written down, one step at a time, on Python lists."""
    ordered = [sorted(range(len(m)), key=lambda i, m=m: (float(m[i]), i)) for m in neuron]
    steps = []  # (margin, kind, block, position, members, cost)
    open_blocks = [b for b in range(len(neuron)) if b not in costs.protected]
    for b in open_blocks:
        order = ordered[b]
        removable = order[: len(order) - width_multiple]
        odd = len(removable) % width_multiple
        cuts = [removable[:odd]] * (odd > 0)
        cuts += [removable[i : i + width_multiple] for i in range(odd, len(removable), width_multiple)]
        for position, members in enumerate(cuts):
            steps.append((float(neuron[b][members[-1]]), 1, b, position, members, costs.neuron[b] * len(members)))
    groups = []
    if costs.attention:
        for b in open_blocks:
            m = group[b]
            order = sorted(range(len(m)), key=lambda i, m=m: (float(m[i]), i))[:-1]
            groups += [(float(m[i]), 0, b, position, [i], costs.group[b]) for position, i in enumerate(order)]
    taken, removed = [], 0
    for unit in sorted([*steps, *groups], key=lambda u: u[:4]):
        if removed < target:
            removed += unit[5]
            if unit[1] == 0:
                taken.append(unit)
    at_most = removable_neurons(costs, width_multiple)
    total = sum(unit[5] for unit in taken)
    while taken and total > target and at_most >= target - (total - taken[-1][5]):
        total -= taken.pop()[5]  # the last in order, if neurons can fill the gap
    masks = Masks(
        [torch.ones(n, dtype=torch.bool) for n in costs.neurons],
        [torch.ones(n, dtype=torch.bool) for n in costs.groups],
    )
    for unit in taken:
        masks.attention[unit[2]][unit[4]] = False
    for unit in sorted(steps, key=lambda u: u[:4]):
        if total < target:
            total += unit[5]
            masks.ffn[unit[2]][unit[4]] = False
    return masks


@settings(max_examples=120)
@given(problem=problems(width_multiples=(1, 2, 3), largest=9), data=st.data())
def test_small_cases_against_the_rule_step_by_step(problem, data):
    costs, width_multiple, _ = problem
    masks, neuron, group, target = solve(problem, data)
    assert masks == reference_masks(costs, neuron, group, target, width_multiple)


def test_a_block_as_wide_as_the_width_multiple_stays_whole():
    costs = costs_of([1, 1], [8, 32])
    masks = keep_masks(Budget.of(costs, 0.4, 8), [torch.zeros(8), torch.arange(32.0)])
    assert [int(m.sum()) for m in masks.ffn] == [8, 16]


def test_groups_go_where_neurons_cannot_fill_the_gap():
    # One removable neuron of cost 1 and two removable groups of cost 100: 150 needs both groups.
    costs = costs_of([1], [2], [100], [3])
    masks = keep_masks(Budget(costs, 150), [torch.zeros(2)], [torch.zeros(3)])
    assert costs.removed(masks) >= 150
    assert int(masks.attention[0].sum()) == 1


def test_of_tied_groups_the_last_in_order_is_left_in():
    costs = costs_of([1, 1], [40, 40], [30, 30], [2, 2])
    # both removable groups come first and together overshoot 50; ties go by block, so block 1 keeps its own
    masks = keep_masks(Budget(costs, 50), [torch.ones(40), torch.ones(40)], [torch.zeros(2), torch.zeros(2)])
    assert [m.tolist() for m in masks.attention] == [[False, True], [True, True]]
    assert costs.removed(masks) == 50


def test_no_target_removes_nothing(tiny_model):
    costs = unit_costs(blocks_of(tiny_model), scope="ffn")
    masks = keep_masks(Budget(costs, 0), [torch.rand(48)] * 3)
    assert all(bool(m.all()) for m in masks.ffn)


def test_masks_do_not_depend_on_the_dtype_or_gradient_of_margins():
    margin = [torch.tensor([0.5, -1.0, 2.0, 0.0])]
    costs = costs_of([1], [4])
    expected = keep_masks(Budget(costs, 2), margin)
    assert expected.ffn[0].tolist() == [True, False, True, False]
    for dtype in (torch.float64, torch.bfloat16):
        assert keep_masks(Budget(costs, 2), [margin[0].to(dtype).requires_grad_()]) == expected


def test_cut_margin():
    masks = Masks([torch.tensor([True, False, False]), torch.tensor([True, True])], [])
    values = [torch.tensor([3.0, -1.0, 0.5]), torch.tensor([0.1, 0.2])]
    assert cut_margin(masks, values) == 0.5
    assert cut_margin(Masks([torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)], []), values) == 0.0


def test_of_experts_the_slots_are_cut():
    """Two experts lose one neuron each: slot 0, whose margin is the mean of their smallest."""
    masks = Masks([torch.tensor([False, True, True, True, False, True])], [])
    values = [torch.tensor([-1.0, 0.0, 2.0, 1.0, 0.5, 3.0])]
    assert cut_margin(masks, values, [2]) == -0.25
    assert cut_margin(masks, values) == 0.5


def test_margins_against_numpy():
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    thresholds, labels = torch.tensor([0.3, -2.0]), torch.tensor([1, 0, 1])
    expected = np.log(p.numpy() / (1 - p.numpy())) - thresholds.double().numpy()[labels.numpy()]
    np.testing.assert_allclose(margins(torch.logit(p), thresholds, labels).numpy(), expected, rtol=1e-12)
    assert margins(torch.logit(p), thresholds, labels).dtype == torch.float64


# --- Masks ------------------------------------------------------------------------------------------------------


def some_masks(seed: int = 0, depth: int = 3) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks(
        [torch.rand(48, generator=generator) < 0.6 for _ in range(depth)],
        [torch.tensor([True, b % 2 == 0]) for b in range(depth)],
    )


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_masks_round_trip(depth):
    masks = some_masks(depth=depth)
    flat = masks.tensors()
    assert len(flat) == 2 * depth
    assert Masks.from_tensors({name: flat[name] for name in sorted(flat)}) == masks
    assert Masks.from_tensors({name: mask.to(torch.uint8) for name, mask in flat.items()}) == masks


def test_a_block_goes_when_its_masks_keep_neither_neuron_nor_group():
    yes, no = torch.tensor([False, True]), torch.zeros(2, dtype=torch.bool)
    assert Masks([yes, no, yes, no], [yes, yes, no, no]).blocks == [True, True, True, False]


def test_masks_are_equal_when_every_bit_is():
    masks = some_masks()
    assert masks == some_masks()
    assert masks != some_masks(seed=1)
    assert masks != some_masks(depth=2)
    assert masks != "masks"
    other = some_masks()
    other.attention[1][0] = False
    assert masks != other
    shorter = some_masks()
    shorter.attention.pop()
    assert masks != shorter
    with pytest.raises(TypeError):
        hash(masks)


# --- gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_gate_against_numpy(dtype):
    labels = torch.tensor([0] * 5 + [1] * 50)
    sizes = torch.bincount(labels)
    p = torch.cat([(torch.arange(n) + 0.5) / n for n in (5, 50)]).to(dtype)
    t = torch.tensor([-0.4, 0.7], dtype=dtype)
    cut = 1 / (1 + np.exp(-t.double().numpy()))
    temperature = np.array([0.2, 0.05])  # 1/5, and the floor for 1/50
    y = labels.numpy()
    expected = 1 / (1 + np.exp(-(p.double().numpy() - cut[y]) / temperature[y]))
    gate = soft_gate(p, t, labels, sizes)
    assert gate.dtype == dtype
    np.testing.assert_allclose(gate.numpy(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)


def test_soft_gate_falls_with_its_own_threshold_only():
    labels = torch.tensor([0, 0, 1, 1])
    t = torch.tensor([0.1, -0.3], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.25, 0.75, 0.25, 0.75], dtype=torch.float64)
    soft_gate(p, t, labels, torch.tensor([2, 2]))[:2].sum().backward()
    assert t.grad[0] < 0
    assert t.grad[1] == 0
    assert torch.autograd.gradcheck(lambda t: soft_gate(p, t, labels, torch.tensor([2, 2])), (t,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_straight_through_has_hard_values_and_soft_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (8 * torch.randn(2000, generator=generator)).to(dtype).requires_grad_()
    hard = torch.rand(2000, generator=generator) < 0.5
    slope = torch.randn(2000, generator=generator).to(dtype)
    gate = straight_through(hard, torch.sigmoid(x))
    assert torch.equal(gate.detach(), hard.to(dtype))  # exactly 0 or 1
    (gate * slope).sum().backward()
    mine, x.grad = x.grad, None
    (torch.sigmoid(x) * slope).sum().backward()
    assert torch.equal(mine, x.grad)


# --- masks on a running model -----------------------------------------------------------------------------------


def zeroed(model, masks: Masks):
    """A copy whose removed units have zero columns in the output projections."""
    model = copy.deepcopy(model)
    for layer, neurons, groups in zip(model.model.layers, masks.ffn, masks.attention, strict=True):
        layer.mlp.down_proj.weight.data[:, ~neurons] = 0
        channels = layer.self_attn.o_proj.in_features // len(groups)
        for g in (~groups).nonzero()[:, 0].tolist():
            layer.self_attn.o_proj.weight.data[:, g * channels : (g + 1) * channels] = 0
    return model


def hooks_of(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 4}, {"mlp_bias": True, "attention_bias": True}])
def test_masked_equals_zeroed_weights(overrides, token_batch):
    model = make_tiny_llama(**overrides)
    groups = model.config.num_key_value_heads
    masks = Masks(some_masks().ffn, [torch.arange(groups) != b for b in range(3)])
    dense = model(token_batch).logits
    with masked(model, masks) as same:
        assert same is model
        logits = model(token_batch).logits
    torch.testing.assert_close(logits, zeroed(model, masks)(token_batch).logits, atol=1e-5, rtol=0)
    assert (logits - dense).abs().max() > 0.1


def test_masks_that_keep_everything_change_nothing(tiny_model, token_batch):
    everything = Masks([torch.ones(48, dtype=torch.bool)] * 3, [torch.ones(2, dtype=torch.bool)] * 3)
    dense = tiny_model(token_batch).logits
    with masked(tiny_model, everything):
        assert torch.equal(tiny_model(token_batch).logits, dense)


def without_blocks(masks: Masks, *gone: int) -> Masks:
    """The masks, but for these blocks, which go whole."""
    none = {"ffn": torch.zeros(48, dtype=torch.bool), "attention": torch.zeros(2, dtype=torch.bool)}
    kept = ([none[k] if b in gone else m for b, m in enumerate(getattr(masks, k))] for k in ("ffn", "attention"))
    return Masks(*kept)


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("narrow", [False, True])
def test_masked_equals_a_model_without_the_layer(gone, narrow, token_batch):
    model = make_tiny_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.bias", "down_proj.bias")):  # a layer without units would still add these
            parameter.data.fill_(0.5)
    everything = Masks([torch.ones(48, dtype=torch.bool)] * 3, [torch.ones(2, dtype=torch.bool)] * 3)
    masks = without_blocks(some_masks() if narrow else everything, *gone)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = model(token_batch).logits
    reference = zeroed(model, masks)
    for index in reversed(gone):
        del reference.model.layers[index]
    expected = reference(token_batch, use_cache=False).logits
    with masked(model, masks):
        logits = model(token_batch).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (logits - dense).abs().max() > 0.1
    assert hooks_of(model) == 0
    assert torch.equal(model(token_batch).logits, dense)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_hooks_of_gone_blocks_are_removed_after_a_pass_that_fails(tiny_model):
    with pytest.raises(IndexError), masked(tiny_model, without_blocks(some_masks(), 1)):
        tiny_model(torch.full((1, 4), 999))
    assert hooks_of(tiny_model) == 0


def test_attention_gates_alone(tiny_model, token_batch):
    masks = Masks([torch.ones(48, dtype=torch.bool)] * 3, [torch.tensor([False, True])] * 3)
    with gated(tiny_model, None, masks.attention):
        logits = tiny_model(token_batch).logits
    torch.testing.assert_close(logits, zeroed(tiny_model, masks)(token_batch).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("failing", [False, True])
def test_leaving_restores_the_model_bit_for_bit(tiny_model, token_batch, failing):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    dense = tiny_model(token_batch).logits
    try:
        with masked(tiny_model, some_masks()):
            assert hooks_of(tiny_model) == 6
            tiny_model(token_batch)
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert hooks_of(tiny_model) == 0
    assert torch.equal(tiny_model(token_batch).logits, dense)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())


def test_a_model_that_cannot_be_watched_is_left_without_hooks(tiny_model):
    broken = tiny_model.model.layers[2].mlp.down_proj
    tiny_model.model.layers[2].mlp.down_proj = None
    with pytest.raises(AttributeError), gated(tiny_model, some_masks().ffn):
        pass
    tiny_model.model.layers[2].mlp.down_proj = broken
    assert hooks_of(tiny_model) == 0


def test_gates_are_read_at_every_pass_and_carry_gradients(tiny_model, token_batch):
    gates = [torch.ones(48) for _ in range(3)]
    dense = tiny_model(token_batch).logits
    masks = some_masks()
    masks.attention[:] = [torch.ones(2, dtype=torch.bool)] * 3
    with gated(tiny_model, gates):
        assert torch.equal(tiny_model(token_batch).logits, dense)
        gates[:] = [m.float().requires_grad_() for m in masks.ffn]
        logits = tiny_model(token_batch).logits
        logits.square().mean().backward()
    torch.testing.assert_close(logits, zeroed(tiny_model, masks)(token_batch).logits, atol=1e-5, rtol=0)
    assert all(bool((g.grad != 0).all()) for g in gates)  # removed units have gradients too
    assert all(p.grad is None for p in tiny_model.parameters())


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("sparsity", [0.02, 0.3, 0.5, 0.8])
def test_equal_widths_are_the_widest_that_meet_the_budget(sparsity, multiple, attention):
    costs = dataclasses.replace(
        unit_costs(blocks_of(make_tiny_llama(num_key_value_heads=4)), scope="attention+ffn" if attention else "ffn"),
        uniform=True,
    )
    generator = torch.Generator().manual_seed(0)
    neurons = [torch.rand(48, generator=generator) for _ in range(3)]
    groups = [torch.rand(4, generator=generator) for _ in range(3)]
    budget = Budget.of(costs, sparsity, multiple)
    target, masks = budget.target, keep_masks(budget, neurons, groups)
    (width,), (kept,) = ({int(m.sum()) for m in part} for part in (masks.ffn, masks.attention))
    assert width == 48 or width % multiple == 0
    assert costs.removed(masks) >= target
    if width < 48:  # one step wider would not do
        step = width % multiple or multiple
        assert costs.removed(masks) - step * sum(costs.neuron) < target
    assert kept == 4 or attention
    for margin, mask in zip([*neurons, *groups], [*masks.ffn, *masks.attention], strict=True):
        assert mask.all() or margin[~mask].max() < margin[mask].min()


@pytest.mark.parametrize("sparsity", [0.01, 0.02, 0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("low", ["neurons", "groups"])
def test_equal_widths_go_beyond_the_budget_by_less_than_a_step_wherever_margins_lie(sparsity, low):
    """One common KV group less is more than a small target: it stays, and neurons make up for it."""
    costs = dataclasses.replace(
        unit_costs(blocks_of(make_tiny_llama(num_key_value_heads=4)), scope="attention+ffn"), uniform=True
    )
    neurons, groups = [torch.arange(48.0)] * 3, [torch.arange(4.0)] * 3
    shift = {"neurons": neurons, "groups": groups}[low]
    shift[:] = [m - 100 for m in shift]
    budget = Budget.of(costs, sparsity, 1)
    masks = keep_masks(budget, neurons, groups)
    assert 0 <= costs.removed(masks) - budget.target < sum(costs.neuron)


def test_equal_widths_after_blocks_that_differ():
    """Pruned before: the common width is no wider than the narrowest block, whatever little is asked."""
    costs = UnitCosts([6, 6], [8, 8], [10, 7], [2, 2], attention=False, uniform=True)
    masks = keep_masks(Budget(costs, 1), [torch.arange(10.0), torch.arange(7.0)])
    assert [int(m.sum()) for m in masks.ffn] == [7, 7]
