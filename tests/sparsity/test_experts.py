"""The budget with whole experts: which are removed, and what is left for neurons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gprune.errors import UserError
from gprune.importance.scores import Scores
from gprune.sparsity.budget import Budget, budget_of
from gprune.sparsity.cut import keep_masks
from tests.world import units_without_model

E, N = 8, 16  # experts, and neurons of each
NEURON, ROUTER = 3, 5  # cost of a neuron of one expert, and of a row of the router
EXPERT = N * NEURON + ROUTER


def budget(
    target: float | str = 0.5, *, scope: str = "ffn+experts", blocks: int = 2, dense: int = 0, groups: int = 1,
    least: int = 2, share: float = 1.0, equal: bool = True, protect: tuple[int, ...] = (), multiple: int = 1,
    block_share: float = 0.25,
) -> Budget:  # fmt: skip
    """Return a budget for layers with experts, and behind them `dense` layers with an FFN of 2 N neurons.

    Args:
        groups, least: groups of experts of each router, and the number of experts that each group needs.
        share, equal: largest share of the target that experts may have; whether all layers lose equally many.
    """
    mixture = {"neuron": E * NEURON, "group": 7, "whole": E * EXPERT + 20, "expert": EXPERT, "experts": E}
    plain = {"neuron": NEURON, "group": 7, "whole": 2 * N * NEURON + 20}
    all_units = [u for b in range(blocks) for u in units_without_model(b, N, 2, **mixture)]
    all_units += [u for b in range(blocks, blocks + dense) for u in units_without_model(b, 2 * N, 2, **plain)]
    all_units = [replace(u, least=groups * least, step=groups) if u.kind == "experts" else u for u in all_units]
    options = {"scope": scope, "expert_share": share, "uniform_experts": equal, "block_share": block_share}
    return budget_of(all_units, target, width_multiple=multiple, protect=protect, outside=1000, **options)


def scores(*of_blocks: list[float]) -> Scores:
    return Scores({}, {}, {f"experts.{b}": torch.tensor(scores).double() for b, scores in enumerate(of_blocks)})


def random_margins(of_budget: Budget, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {u.key: torch.rand(u.size, generator=generator).double() for u in of_budget.of_kind("neurons")}


def kept(mask: Tensor) -> list[int]:
    """Number of kept neurons of each expert."""
    return mask.view(E, -1).sum(1).tolist()


DOWN, UP = [8.0, 7, 6, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6, 7, 8]


def test_experts_alone_are_rounded_up_to_the_same_number_in_every_layer():
    alone = budget(0.3, scope="experts").ranked_by(scores(DOWN, UP))
    assert alone.total == 2 * E * EXPERT
    assert alone.removed_experts == {0: [5, 6, 7], 1: [0, 1, 2]}  # 0.3 of 8 is 2.4
    assert alone.target + alone.overshoot == 2 * 3 * EXPERT
    assert alone.overshoot == 2 * 3 * EXPERT - -(-3 * alone.total // 10)
    masks = keep_masks(alone, random_margins(alone))
    assert [kept(mask) for mask in masks.ffn] == [[N] * 5 + [0] * 3, [0] * 3 + [N] * 5]
    assert alone.removed_by(masks) == alone.target + alone.overshoot


def test_what_experts_leave_of_the_target_is_removed_as_neurons_of_the_others():
    both = budget(0.4).ranked_by(scores(DOWN, UP))
    assert both.removed_experts == {0: [5, 6, 7], 1: [0, 1, 2]}  # 0.4 of 8 is 3.2
    margins = random_margins(both)
    masks = keep_masks(both, margins)
    assert both.target <= both.removed_by(masks) < both.target + 5 * NEURON
    for mask, removed in zip(masks.ffn, ([5, 6, 7], [0, 1, 2]), strict=True):
        of_kept = {count for expert, count in enumerate(kept(mask)) if expert not in removed}
        assert [kept(mask)[expert] for expert in removed] == [0, 0, 0]
        assert len(of_kept) == 1
        assert of_kept <= set(range(N - 3, N + 1))  # each expert loses its weakest neurons
    block = 0 if kept(masks.ffn[0])[0] < N else 1
    expert = 0 if block == 0 else 7
    of_expert = slice(expert * N, (expert + 1) * N)
    mask, margin = masks.ffn[block][of_expert], margins[f"neurons.{block}"][of_expert]
    assert margin[~mask].max() < margin[mask].min()


def test_a_share_limits_experts_unless_other_units_cannot_make_up_the_rest():
    assert budget(0.5, share=0.5).removed_experts == {0: [0, 1], 1: [0, 1]}
    assert budget(0.5, share=0.01).removed_experts == {}
    # An expert keeps one of its 16 neurons, so neurons alone are at most 15 x 3 of its cost of 53, less than 0.9.
    most = budget(0.9, share=0.01)
    assert most.removed_experts
    assert most.removed_by(keep_masks(most, random_margins(most))) >= most.target


def test_with_groups_each_group_loses_its_weakest_expert():
    grouped = budget(0.5, scope="experts", groups=2).ranked_by(scores(DOWN, [1.0, 9, 9, 9, 2, 9, 9, 0]))
    assert grouped.removed_experts == {0: [2, 3, 6, 7], 1: [0, 1, 4, 7]}
    with pytest.raises(
        UserError,
        match=r"at most 0\.5000, because each router needs 4 of 8 experts, 2 in each of 2 groups, .* got 0\.6",
    ):
        budget(0.6, scope="experts", groups=2)


@pytest.mark.parametrize("scope", ["experts", "ffn+experts"])
def test_a_target_below_top_k_is_refused_with_the_limit(scope):
    with pytest.raises(UserError, match=r"--sparsity\.target must be at most 0\.\d+, because each router needs 2 of 8"):
        budget(0.99, scope=scope)
    least = budget(0.75, scope="experts")
    assert least.removed_experts == {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3, 4, 5]}
    assert least.removable == least.target + least.overshoot


def test_a_global_ranking_compares_scores_relative_to_their_layer():
    ranked = budget(0.25, scope="experts", equal=False)
    ranked = ranked.ranked_by(scores([100.0] * 7 + [1], [0.1, 0.2, 0.3, 1, 1, 1, 1, 1]))
    assert ranked.removed_experts == {0: [7], 1: [0, 1, 2]}
    assert ranked.target + ranked.overshoot == 4 * EXPERT
    few = budget(0.75, scope="experts", equal=False).ranked_by(scores([1.0] * 8, [0.5] * 8))
    assert {b: len(experts) for b, experts in few.removed_experts.items()} == {0: 6, 1: 6}  # never below top-k


def test_a_global_ranking_of_negative_scores_removes_the_lowest():
    ranked = budget(0.25, scope="experts", equal=False)
    ranked = ranked.ranked_by(scores([-1.0, -1, -1, -1, -1, -1, -1, -9], [-2.0, -2, -2, -2, -2, -8, -8, -8]))
    assert ranked.removed_experts == {0: [7], 1: [5, 6, 7]}


def test_dense_layers_and_protected_ones_keep_what_they_have():
    mixed = budget(0.2, scope="experts", dense=1)
    assert mixed.total == 2 * E * EXPERT
    assert 2 not in mixed.removed_experts
    masks = keep_masks(mixed, random_margins(mixed))
    assert masks.ffn[2].all()
    protected = budget(0.3, scope="experts", blocks=3, protect=(1,))
    assert sorted(protected.removed_experts) == [0, 2]
    assert {len(experts) for experts in protected.removed_experts.values()} == {4}  # 0.3 x 24 = 7.2 of two layers


def test_whole_blocks_come_first_and_lose_no_single_experts():
    blocks = budget(0.5, scope="ffn+experts+blocks", blocks=4, block_share=0.5).without([2])
    assert blocks.removed == (2,)
    assert sorted(blocks.removed_experts) == [0, 1, 3]
    masks = keep_masks(blocks, random_margins(blocks))
    assert not masks.ffn[2].any()
    assert blocks.target <= blocks.removed_by(masks) < blocks.target + E * NEURON


def test_other_targets_of_the_same_run_use_the_scores_and_are_rounded_up_to_whole_experts():
    alone = budget(0.3, scope="experts").ranked_by(scores(DOWN, UP))
    for other in (alone.at(0.6), alone.removing(2 * 4 * EXPERT + 1), alone.ranked_by(scores(DOWN, UP)).at(0.6)):
        assert other.removed_experts == {0: [3, 4, 5, 6, 7], 1: [0, 1, 2, 3, 4]}
        assert other.target + other.overshoot == 2 * 5 * EXPERT
    searched = budget("+5%", scope="experts")
    assert searched.target == 2 * 6 * EXPERT  # the largest possible budget


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_exact_for_any_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    any_budget = budget(0.5, blocks=1)
    removed = torch.rand(E, generator=generator).argsort() < 3
    width = int(torch.randint(1, N, (1,), generator=generator))
    keep = (torch.rand(E, N, generator=generator).argsort(1) < width) & ~removed[:, None]
    masks = keep_masks(any_budget, random_margins(any_budget))
    masks["neurons.0"] = keep.flatten()
    assert any_budget.removed_by(masks) == 3 * EXPERT + 5 * (N - width) * NEURON
