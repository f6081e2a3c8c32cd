"""Assignment refinement recovers planted modules from a poor start and is deterministic."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from gprune.partition.initial import minimum_size
from gprune.partition.objective import refinement_inputs
from gprune.stages.refinement import AssignmentRefinement
from tests.stages.test_threshold_learning import trainer_of


def planted_block(N: int, K: int, generator: torch.Generator, noise: float = 0.5):
    """Labels, embedding, drift and ranks of neurons around K centres, in random order."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    truth = (torch.arange(N) % K)[torch.randperm(N, generator=generator)]
    embedding = normal(K, 8)[truth] + noise * normal(N, 8)
    drift = torch.linspace(0.05, 0.25, K)[truth] + noise * 0.05 * normal(N)
    # Shifts on three corpora sum to 0 and are therefore in a plane. The centres are on a circle in this plane.
    angle = 2 * torch.pi * (torch.arange(K) + torch.rand(1, generator=generator)) / K
    plane = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[2.0], [6.0]]).sqrt()
    centres = 0.15 * torch.stack([angle.cos(), angle.sin()], 1) @ plane
    shifts = centres[truth].T + noise * 0.1 * normal(3, N)
    ranks = torch.rand(N, generator=generator) + shifts - shifts.mean(0)  # the mean rank does not depend on the module
    return truth, embedding, drift.abs(), ranks


def planted(sizes: list[int], modules: list[int], seed: int, wrong: float = 0.3):
    """Inputs, true labels, and initial labels of which a fraction `wrong` is replaced by other modules."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [planted_block(N, K, generator) for N, K in zip(sizes, modules, strict=True)]
    start = []
    for (truth, *_), K in zip(blocks, modules, strict=True):
        replaced = torch.randperm(len(truth), generator=generator)[: round(wrong * len(truth))]
        labels = truth.clone()
        labels[replaced] = (labels[replaced] + torch.randint(1, K, (len(replaced),), generator=generator)) % K
        start.append(labels)
    truths, *inputs = map(list, zip(*blocks, strict=True))
    return refinement_inputs(*inputs), truths, start


def refinement(inputs, start, kind=AssignmentRefinement, final_tau=0.2, **settings):
    return kind(inputs, start, final_tau=final_tau, **settings)


def refine(inputs, start, **options) -> AssignmentRefinement:
    stage = refinement(inputs, start, **options)
    trainer_of().fit(stage)
    return stage


def refine_and_log(inputs, start, **options) -> tuple[AssignmentRefinement, list[dict[str, float]]]:
    """The refined stage, and the terms of the objective that it logged in each step."""
    logged = []

    class Recorded(AssignmentRefinement):
        def log_dict(self, values):
            logged.append(values)
            super().log_dict(values)

    return refine(inputs, start, kind=Recorded, **options), logged


@pytest.mark.parametrize("seed", [0, 1])
def test_refinement_recovers_planted_modules(seed):
    inputs, truth, start = planted([240, 200], [4, 4], seed)
    agreement_at_start = [adjusted_rand_score(t, y) for t, y in zip(truth, start, strict=True)]
    assert max(agreement_at_start) < 0.6
    stage = refine(inputs, start)
    agreement = [adjusted_rand_score(t, y) for t, y in zip(truth, stage.labels(), strict=True)]
    assert min(agreement) >= 0.9, agreement


def test_consistency_alone_recovers_modules_with_common_rank_shifts():
    inputs, truth, start = planted([240], [4], seed=3)
    stage = refine(inputs, start, similarity_weight=0.0, drift_weight=0.0, consistency_weight=1.0)
    assert adjusted_rand_score(truth[0], stage.labels()[0]) >= 0.9


def test_refinement_is_deterministic_keeps_the_initial_labels_and_stores_only_logits():
    inputs, _, start = planted([120, 90], [3, 2], seed=0)
    torch.manual_seed(1)
    first, logged = refine_and_log(inputs, start, steps=30)
    torch.manual_seed(2)
    second, logged_again = refine_and_log(inputs, start, steps=30)
    assert torch.equal(first.logits, second.logits)
    assert logged == logged_again
    assert all(torch.equal(a, b) for a, b in zip(first.labels(), second.labels(), strict=True))
    # The initial labels are unchanged, and the state of the stage contains only logits.
    assert all(torch.equal(a, b) for a, b in zip(start, planted([120, 90], [3, 2], seed=0)[2], strict=True))
    assert list(first.state_dict()) == ["logits"]


def test_the_objective_decreases_and_all_steps_are_logged():
    inputs, _, start = planted([240, 200], [4, 4], seed=1)
    _, logged = refine_and_log(inputs, start, steps=80)
    assert len(logged) == 80
    assert logged[-1]["partition/total"] < logged[0]["partition/total"] - 0.1
    # With a fixed temperature the objective decreases in each step, except for fluctuations by Adam.
    _, logged = refine_and_log(inputs, start, steps=80, final_tau=1.0)
    totals = [terms["partition/total"] for terms in logged]
    assert all(b < a + 1e-3 for a, b in pairwise(totals))
    assert totals[-1] < totals[0] - 0.1


def test_the_temperature_decreases_geometrically_from_one_to_its_final_value():
    temperatures = []

    class Recorded(AssignmentRefinement):
        def training_step(self, batch, batch_idx):
            temperatures.append(self.tau)
            return super().training_step(batch, batch_idx)

    inputs, _, start = planted([100], [2], seed=0)
    trainer_of().fit(refinement(inputs, start, kind=Recorded, steps=11, final_tau=0.1))
    assert temperatures[0] == 1.0
    assert temperatures[-1] == pytest.approx(0.1)
    assert temperatures[5] == pytest.approx(0.1**0.5)  # geometric schedule


def test_a_block_with_fewer_modules_gets_no_additional_ones():
    inputs, _, start = planted([240, 150], [5, 2], seed=0)
    stage = refine(inputs, start)
    assert int(stage.labels()[1].max()) <= 1
    assert int(stage.logits[1, :150].argmax(-1).max()) <= 1
    assert len(stage.labels()[1]) == 150


def test_small_modules_are_merged_after_refinement():
    inputs, _, start = planted([160], [4], seed=0)
    start[0][:] = 0
    start[0][:3] = 1  # a module of three neurons
    (labels,) = refine(inputs, start, steps=2).labels()
    sizes = torch.bincount(labels)
    assert int(sizes.min()) >= minimum_size(160, 2)
