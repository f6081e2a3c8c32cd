"""Budgets, and masks that meet them within one step."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.models.units import units_of
from gprune.sparsity.budget import Budget, budget_of, default_width_multiple
from gprune.sparsity.cut import cut_margin, keep_masks, slots_of, uniform_masks
from gprune.units.structure import Units
from tests.world import by_key, make_tiny_llama, units_without_model


def units_with(neuron, neurons, group=None, groups=None, *, whole=900, experts=(), protected=()) -> dict[str, Any]:
    """Arguments of `budget_of`, from the costs of a neuron and of a KV group, and their numbers. With `group`,
    attention is in scope.

    Args:
        neuron: cost of a neuron in each block.
        neurons: number of neurons of each block.
        group: cost of a KV group in each block.
        groups: number of KV groups of each block.
        whole: cost of each whole block.
        experts: number of experts of each block; empty: 1 each.
        protected: indices of protected blocks.
    """
    depth, units = len(neuron), []
    lists = neurons, groups or [1] * depth, neuron, group or [1] * depth, experts or [1] * depth
    for b, (n, g, cost, of_group, E) in enumerate(zip(*lists, strict=True)):
        units += units_without_model(b, n, g, neuron=cost, group=of_group, whole=whole, experts=E)
    return {"units": units, "scope": "attention+ffn" if group else "ffn", "protect": sorted(protected)}


def sets_of(arguments: dict[str, Any], kind: str, *, open_only: bool = False) -> list[Units]:
    """The units of a kind in the arguments of `budget_of`; with `open_only` without those of protected blocks."""
    hidden = arguments["protect"] if open_only else ()
    return [u for u in arguments["units"] if u.kind == kind and u.layer not in hidden]


def removing(units: dict[str, Any], target: int, width_multiple: int = 1, **options) -> Budget:
    return replace(budget_of(**units, width_multiple=width_multiple, **options), target=target)


FFN_OF_7B = 3 * 4096 * 11008 * 32  # parameters

# --- budgets


@pytest.mark.parametrize(
    ("neurons", "sparsity", "target"),
    [(30, 0.1, 3), (30, 0.101, 4), (10, 0.7, 7), (1000, 0.29, 290), (3, 0.333, 1), (100, 1e-9, 1), (1100, 0.07, 77),
     (FFN_OF_7B, 0.3, math.ceil(Fraction(3, 10) * FFN_OF_7B))],
)  # fmt: skip
def test_the_target_is_the_exact_ceiling_of_the_share(neurons, sparsity, target):
    assert budget_of(**units_with([1], [neurons]), setting=sparsity).target == target


PROTECTED = {"protected": (0, 2)}


@pytest.mark.parametrize(
    ("units", "width_multiple", "removable_of_total"),
    [
        (units_with([2, 2], [10, 10]), 1, (36, 40)),
        (units_with([2, 2], [10, 10]), 4, (24, 40)),
        (units_with([2], [10], [30], [2]), 1, (48, 80)),
        (units_with([2] * 3, [10] * 3, **PROTECTED), 1, (18, 60)),
        (units_with([2] * 3, [10] * 3, [5] * 3, [2] * 3, **PROTECTED), 1, (23, 90)),
    ],
)
def test_impossible_budgets_are_refused_with_the_maximum(units, width_multiple, removable_of_total):
    removable, total = removable_of_total
    maximum = removable / total
    assert budget_of(**units, setting=maximum - 1e-6, width_multiple=width_multiple).target == removable
    protected = len(units["protect"])
    kept = f"{width_multiple} neurons and a KV group, and {protected} layers keep everything"
    message = f"^--sparsity.target must be at most {maximum:.4f}, because .* keeps {kept}; got 0.99"
    with pytest.raises(UserError, match=message):
        budget_of(**units, setting=0.99, width_multiple=width_multiple)


def test_a_width_multiple_above_the_narrowest_block_is_refused():
    with pytest.raises(UserError, match=r"--sparsity\.width_multiple must be 1 to 10 neurons; got"):
        budget_of(**units_with([1, 1], [30, 10]), setting=0.1, width_multiple=11)


@pytest.mark.parametrize(
    ("neurons", "experts", "multiple"),
    [
        ([1536, 1536], (), 32), ([512, 0, 4096], (), 32), ([511, 4096], (), 1), ([10], (), 1), ([1], (), 1),
        ([1408, 1408], (64, 64), 8), ([128, 10944], (8, 1), 8), ([127], (8,), 1), ([2], (4,), 1),
    ],
)  # fmt: skip
def test_the_default_width_multiple_follows_from_the_narrowest_block_and_is_never_refused(neurons, experts, multiple):
    """A width of 0 is that of a block without an FFN."""
    units = units_with([3] * len(neurons), neurons, experts=experts)
    assert default_width_multiple(units["units"]) == multiple
    if neurons != [1]:  # the last neuron cannot be removed
        assert budget_of(**units, setting=0.5, width_multiple=multiple).width_multiple == multiple


@pytest.mark.parametrize("index", [3, -4, 99])
def test_protecting_a_missing_block_is_refused(index, tiny_model):
    with pytest.raises(UserError, match=rf"--sparsity\.protect must name layers from -3 to 2, .*; got {index}"):
        budget_of(units_of(tiny_model), protect=[0, index])


def test_protected_blocks_can_be_negative_indices(tiny_model):
    units = units_of(tiny_model)
    assert budget_of(units, protect=[0, -1, 2, -3]).protected == {0, 2}
    assert budget_of(units, scope="ffn").protected == frozenset()


# --- masks

sparsities = st.one_of(st.sampled_from([0.333, 0.47, 0.1, 0.9]), st.floats(0.001, 0.97))


def draw_margins(data, lengths: list[int]) -> list[torch.Tensor]:
    """Margins with many ties, equal margins, or margins over a wide range."""
    kind = data.draw(st.sampled_from(["ties", "equal", "spread"]))
    values = {
        "ties": st.integers(-3, 3).map(float), "equal": st.just(0.5), "spread": st.floats(-9, 9, width=32)
    }[kind]  # fmt: skip
    return [torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64) for n in lengths]


@st.composite
def problems(draw):
    """Draw blocks of at most 30 neurons, a width multiple and a sparsity."""
    width_multiple = draw(st.sampled_from((1, 2, 3, 4, 8)))
    depth = draw(st.integers(1, 4))
    lists = lambda numbers: st.lists(numbers, min_size=depth, max_size=depth)  # noqa: E731
    neurons = draw(lists(st.integers(width_multiple, 30)))
    group = draw(lists(st.integers(1, 60))) if draw(st.booleans()) else None
    protected = draw(st.just(frozenset()) | st.frozensets(st.integers(0, depth - 1), max_size=depth - 1))
    neuron, groups = draw(lists(st.integers(1, 9))), draw(lists(st.integers(1, 4)))
    return units_with(neuron, neurons, group, groups, protected=protected), width_multiple, draw(sparsities)


def neuron_costs(units: dict[str, Any]) -> list[int]:
    """Costs of a neuron of each block."""
    return [u.parameters for u in sets_of(units, "neurons")]


def removable_neurons(units: dict[str, Any], width_multiple: int) -> int:
    return sum(u.parameters * (u.count - width_multiple) for u in sets_of(units, "neurons", open_only=True))


def solve(problem, data):
    """Masks for a problem with drawn margins, the margins of neurons and groups, and the budget.

    Problems without a solution are discarded, after a check that they have none.
    """
    units, width_multiple, sparsity = problem
    try:
        budget = budget_of(**units, setting=sparsity, width_multiple=width_multiple)
    except UserError:
        groups = sum(u.parameters * (u.count - 1) for u in sets_of(units, "kv_groups", open_only=True))
        groups *= "attention" in units["scope"]
        assert Fraction(str(sparsity)) * removing(units, 0).total > removable_neurons(units, width_multiple) + groups
        assume(False)
    neuron = draw_margins(data, [u.count for u in sets_of(units, "neurons")])
    group = None
    if "kv_groups" in budget.finer:
        group = draw_margins(data, [u.count for u in sets_of(units, "kv_groups")])
    return keep_masks(budget, by_key(neuron, group)), neuron, group, budget


def reference_masks(units, neuron, group, target, width_multiple) -> Masks:
    """Masks by the documented rule (see `keep_masks`), one step at a time, on Python lists."""
    ordered = [sorted(range(len(m)), key=lambda i, m=m: (float(m[i]), i)) for m in neuron]
    steps = []  # (margin, kind, block, position, members, cost)
    open_blocks = [u.layer for u in sets_of(units, "neurons", open_only=True)]
    for b in open_blocks:
        order = ordered[b]
        removable = order[: len(order) - width_multiple]
        remainder = len(removable) % width_multiple  # the first step makes the width a multiple
        members_of_steps = [removable[:remainder]] if remainder else []
        for first in range(remainder, len(removable), width_multiple):
            members_of_steps.append(removable[first : first + width_multiple])
        for position, members in enumerate(members_of_steps):
            steps.append(
                (float(neuron[b][members[-1]]), 1, b, position, members, neuron_costs(units)[b] * len(members))
            )
    groups = []
    if group is not None:
        for b in open_blocks:
            m = group[b]
            order = sorted(range(len(m)), key=lambda i, m=m: (float(m[i]), i))[:-1]
            cost = sets_of(units, "kv_groups")[b].parameters
            groups += [(float(m[i]), 0, b, position, [i], cost) for position, i in enumerate(order)]
    removed_groups, removed = [], 0
    for unit in sorted([*steps, *groups], key=lambda u: u[:4]):
        if removed < target:
            removed += unit[5]
            if unit[1] == 0:
                removed_groups.append(unit)
    cost_of_neurons = removable_neurons(units, width_multiple)
    total = sum(unit[5] for unit in removed_groups)
    while removed_groups and total > target and cost_of_neurons >= target - (total - removed_groups[-1][5]):
        total -= removed_groups.pop()[5]  # restore the last group if neurons can replace it
    masks = Masks.of_blocks(
        *([torch.ones(u.count, dtype=torch.bool) for u in sets_of(units, kind)] for kind in ("neurons", "kv_groups"))
    )
    for unit in removed_groups:
        masks.attention[unit[2]][unit[4]] = False
    for unit in sorted(steps, key=lambda u: u[:4]):
        if total < target:
            total += unit[5]
            masks.ffn[unit[2]][unit[4]] = False
    return masks


@settings(max_examples=80)
@given(problem=problems(), data=st.data())
def test_masks_equal_the_documented_rule_and_exceed_the_budget_by_less_than_a_step(problem, data):
    units, width_multiple, _ = problem
    masks, neuron, group, budget = solve(problem, data)
    assert masks == reference_masks(units, neuron, group, budget.target, width_multiple)
    group_costs = [u.parameters for u in sets_of(units, "kv_groups")]
    pairs = [*zip(neuron_costs(units), masks.ffn, strict=True), *zip(group_costs, masks.attention, strict=True)]
    removed = sum(cost * int((~mask).sum()) for cost, mask in pairs)
    assert budget.removed_by(masks) == removed
    step = width_multiple * max(neuron_costs(units))
    if "kv_groups" in budget.finer and removable_neurons(units, width_multiple) < max(group_costs):
        step = max(step, *group_costs)  # too few neurons to replace a group
    assert 0 <= removed - budget.target < step


ZEROS, RISING = torch.zeros, lambda n: torch.arange(float(n))
EXAMPLE = ([torch.tensor([0.9, 0.1, 0.5, 0.2, 0.7]), torch.tensor([0.3, 0.8, 0.4, 0.6])], [ZEROS(1)] * 2)


@pytest.mark.parametrize(
    ("units", "target", "width_multiple", "margins", "removed", "removed_groups"),
    [
        # The example in the docstring of `Cut`
        (units_with([3, 3], [5, 4]), 8, 2, EXAMPLE, [[1], [0, 2]], [[], []]),
        (units_with([1, 1], [9, 5]), 0, 1, ([ZEROS(9), ZEROS(5)], [ZEROS(1)] * 2), [[], []], [[], []]),
        # A block whose width is the multiple is not pruned.
        (units_with([1, 1], [4, 8]), 3, 4, ([ZEROS(4), RISING(8)], [ZEROS(1)] * 2), [[], [0, 1, 2, 3]], [[], []]),
        # Removable are one neuron of cost 1 and two groups of cost 100. A target of 150 needs both groups.
        (units_with([1], [2], [100], [3]), 150, 1, ([ZEROS(2)], [RISING(3)]), [[]], [[0, 1]]),
        # Both groups come first, but one and a neuron are enough. Ties are resolved by block: block 1 keeps its group.
        (units_with([1, 1], [30, 40], [30, 30], [2, 2]), 31, 1, ([RISING(30), 99 + RISING(40)], [ZEROS(2) - 1] * 2),
         [[0], []], [[0], []]),
    ],
)  # fmt: skip
def test_masks_equal_examples_computed_by_hand(units, target, width_multiple, margins, removed, removed_groups):
    masks = keep_masks(removing(units, target, width_multiple), by_key(*margins))
    assert [(~m).nonzero()[:, 0].tolist() for m in masks.ffn] == removed
    assert [(~m).nonzero()[:, 0].tolist() for m in masks.attention] == removed_groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_do_not_depend_on_the_dtype_or_gradient_of_margins(dtype):
    margin = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype).requires_grad_()
    assert keep_masks(removing(units_with([1], [4]), 2), by_key([margin])).ffn[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("keep", "margins", "experts", "expected"),
    [
        ([[1, 0, 0], [1, 1]], [[3.0, -1.0, 0.5], [0.1, 0.2]], None, 0.5),
        ([[1, 1, 1], [1, 1]], [[3.0, -1.0, 0.5], [0.1, 0.2]], None, 0.0),
        # Two experts lose one neuron each: slot 0, whose margin is the mean of their smallest margins.
        ([[0, 1, 1, 1, 0, 1]], [[-1.0, 0.0, 2.0, 1.0, 0.5, 3.0]], [2], -0.25),
    ],
)
def test_cut_margin_is_the_highest_margin_of_removed_neurons_and_0_without_any(keep, margins, experts, expected):
    experts = experts or [1] * len(margins)
    neurons = [len(m) // e for m, e in zip(margins, experts, strict=True)]
    budget = budget_of(**units_with([1] * len(neurons), neurons, experts=experts))
    masks = [torch.tensor(k).bool() for k in keep]
    slots = slots_of(budget, by_key([torch.tensor(m) for m in margins]), by_key(masks))
    assert cut_margin(slots, budget.finer) == expected


def equal_widths_budget(scope: str, sparsity: float, width_multiple: int) -> Budget:
    units = units_of(make_tiny_llama(num_key_value_heads=4))
    return budget_of(units, sparsity, width_multiple, scope=scope, uniform=True)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("sparsity", [0.02, 0.3, 0.8])
def test_equal_widths_are_the_widest_that_meet_the_budget(sparsity, multiple, attention):
    generator = torch.Generator().manual_seed(0)
    neurons = [torch.rand(48, generator=generator) for _ in range(3)]
    groups = [torch.rand(4, generator=generator) for _ in range(3)]
    budget = equal_widths_budget("attention+ffn" if attention else "ffn", sparsity, multiple)
    target, masks = budget.target, keep_masks(budget, by_key(neurons, groups))
    (width,), (kept_groups,) = ({int(m.sum()) for m in part} for part in (masks.ffn, masks.attention))
    assert width == 48 or width % multiple == 0
    assert budget.removed_by(masks) >= target
    if width < 48:  # one step wider would not meet the budget
        step = width % multiple or multiple
        assert budget.removed_by(masks) - step * 3 * budget.price["neurons.0"][1] < target
    assert kept_groups == 4 or attention
    # The units with the largest margins are kept.
    for margin, mask in zip([*neurons, *groups], [*masks.ffn, *masks.attention], strict=True):
        assert mask.all() or margin[~mask].max() < margin[mask].min()


@pytest.mark.parametrize("sparsity", [0.01, 0.02, 0.1, 0.6])
@pytest.mark.parametrize("removed_first", ["neurons", "groups"])
def test_equal_widths_exceed_the_budget_by_less_than_a_step(sparsity, removed_first):
    """A KV group of each block costs more than a small target, so that neurons are removed instead."""
    neurons, groups = [torch.arange(48.0)] * 3, [torch.arange(4.0)] * 3
    lowest_margins = {"neurons": neurons, "groups": groups}[removed_first]
    lowest_margins[:] = [m - 100 for m in lowest_margins]
    budget = equal_widths_budget("attention+ffn", sparsity, 1)
    masks = keep_masks(budget, by_key(neurons, groups))
    assert 0 <= budget.removed_by(masks) - budget.target < 3 * budget.price["neurons.0"][1]


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("removed", [(), (2,), (3, 0)])
def test_after_removing_whole_blocks_masks_equal_those_of_the_shallower_model(removed, multiple, uniform, experts):
    """Masks of the other blocks are those of a model without the removed blocks."""
    generator = torch.Generator().manual_seed(len(removed))
    kept = [b for b in range(4) if b not in removed]
    protected = {1} if len(removed) == 2 and not uniform else set()

    def units_for(depth: int, protected: set[int]) -> dict[str, Any]:
        # 48 neurons of cost 6 and 4 KV groups of cost 90 per block
        lists = ([number] * depth for number in (6, 48, 90, 4))
        return units_with(*lists, experts=(experts,) * depth, whole=700, protected=protected)

    margins = [[torch.rand(n, generator=generator) for _ in range(4)] for n in (48 * experts, 4)]
    units = units_for(4, protected)
    units["scope"] += "+blocks"
    budget = budget_of(**units, setting=0.62, width_multiple=multiple, uniform=uniform, block_share=0.85)
    budget = budget.without(removed)
    assert (budget.target, budget.removed) == (1736, removed)  # 62 % of 4 x 700
    masks, step = keep_masks(budget, by_key(*margins)), multiple * 6 * (len(kept) if uniform else 1)
    assert masks.blocks == [b in kept for b in range(4)]
    assert 0 <= budget.removed_by(masks) - budget.target < step
    shallow_units = units_for(len(kept), set(map(kept.index, protected)))
    shallow_margins = ([kind[b] for b in kept] for kind in margins)
    rest = removing(shallow_units, budget.target - 700 * len(removed), multiple, uniform=uniform)
    expected = keep_masks(rest, by_key(*shallow_margins))
    assert Masks.of_blocks([masks.ffn[b] for b in kept], [masks.attention[b] for b in kept]) == expected
    # With another target, as many blocks are removed, in the chosen order, as fit into their share of it.
    for sparsity in (0.1, 0.3, 0.5):
        other = budget.at(sparsity)
        assert other.removed == removed[: int(0.85 * sparsity * 4)]
        assert (
            0
            <= other.removed_by(keep_masks(other, by_key(*margins))) - other.target
            < multiple * 6 * (4 if uniform else 1)
        )


def test_equal_widths_are_at_most_the_narrowest_width_of_a_pruned_model():
    """In a model that was pruned before, the common width is at most that of the narrowest block."""
    margins = by_key([torch.arange(10.0), torch.arange(7.0)])
    masks = keep_masks(removing(units_with([6, 6], [10, 7]), 1, uniform=True), margins)
    assert [int(m.sum()) for m in masks.ffn] == [7, 7]


@pytest.mark.parametrize("block_share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("protected", [(), (1,)])
def test_every_budget_of_a_quality_target_can_be_removed_and_leaves_a_layer(block_share, protected):
    """Four layers of 48 neurons of cost 6; a whole layer costs 700."""
    units = units_with([6] * 4, [48] * 4, whole=700, protected=protected)
    units["scope"] += "+blocks"
    largest = budget_of(**units, setting="+5%", block_share=block_share).without((3, 0, 2, 1))
    for target in (*range(1, largest.target, 13), largest.target):
        budget = largest.removing(target)
        masks = uniform_masks(budget)
        assert target - 700 < budget.target <= target
        assert 0 <= budget.removed_by(masks) - budget.target < 6
        assert any(masks.blocks)


UNEQUAL = {  # neurons and KV groups of each block, whether KV groups are in scope, the smallest valid target
    "neurons": ([100, 200], [2, 2], False, 0.3334),  # 100 of 300
    "KV groups": ([100, 100], [2, 4], True, 0.125),  # 80 of 640
    "both": ([100, 200], [2, 4], True, 0.3334),  # 280 of 840
}


@pytest.mark.parametrize(("neurons", "groups", "attention", "smallest"), UNEQUAL.values(), ids=UNEQUAL)
def test_equal_widths_of_unequal_blocks_need_a_target_that_the_common_width_does_not_exceed(
    neurons, groups, attention, smallest
):
    """A neuron costs 1 or, with KV groups in scope, 2; a KV group costs 40."""
    units = units_with([1 + attention] * 2, neurons, [40] * 2 if attention else None, groups)
    margins = [[torch.arange(float(n)) for n in kind] for kind in (neurons, groups)]
    message = f"^--sparsity.target must be at least {smallest:.4f}, because --sparsity.uniform_width .*; got 0.05.$"
    with pytest.raises(UserError, match=message):
        budget_of(**units, setting=0.05, uniform=True)
    for sparsity in (smallest, 0.5, 0.7):
        budget = budget_of(**units, setting=sparsity, uniform=True)
        masks = keep_masks(budget, by_key(*margins))
        assert 0 <= budget.removed_by(masks) - budget.target < sum(neuron_costs(units))
        assert len({int(keep.sum()) for keep in masks.ffn}) == 1
    # A search for a quality asks for smaller targets too.
    smallest_budget = budget_of(**units, setting="+5%", uniform=True).removing(1)
    removed = smallest_budget.removed_by(keep_masks(smallest_budget, by_key(*margins)))
    assert smallest_budget.target == removed < 0.334 * smallest_budget.total


def test_equal_groups_are_kept_if_the_narrowest_ffns_make_up_exactly_the_rest():
    """Blocks of different widths would keep 5 groups, so 2 each; with 3 each, one neuron each reaches the target."""
    units = units_with([1, 1], [5, 5], group=[6, 6], groups=[4, 4])
    budget = removing(units, 20, uniform=True)
    margins = [torch.arange(5.0) + 10] * 2, [torch.arange(4.0)] * 2  # groups are removed first
    masks = keep_masks(budget, by_key(*margins))
    assert [int(m.sum()) for m in [*masks.ffn, *masks.attention]] == [1, 1, 3, 3]
    assert budget.removed_by(masks) == 20
