"""When modules switch to the activation-free metric, on cases made by hand; ranks inside modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gprune.partition.reliability import (
    ModuleReliability,
    assess_reliability,
    module_means,
    switched_share,
    within_module_ranks,
)

FOUR = torch.arange(40) % 4  # four modules of ten


def spread(per_module: list[float], labels: torch.Tensor = FOUR) -> torch.Tensor:
    """One value per module, given to all of its neurons."""
    return torch.tensor(per_module, dtype=torch.float64)[labels]


def assess(drift, score, floor=(0.0, 0.0, 0.0, 0.0), **settings_) -> list[bool]:
    records = assess_reliability([FOUR], [spread(score)], [spread(drift)], [spread(floor)], **settings_)
    return records[0].switched.tolist()


def test_module_means():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    expected = [values.double().numpy()[labels.numpy() == k].mean() for k in range(4)]
    np.testing.assert_allclose(module_means(values, labels).numpy(), expected, rtol=1e-12)


def test_only_the_sensitive_and_weak_module_switches():
    # sensitivities 0.1 .. 0.4; the upper quartile keeps the last
    assert assess([0.1, 0.2, 0.3, 0.4], [0.8, 0.7, 0.6, 0.1]) == [False, False, False, True]
    # as sensitive but strong: no
    assert assess([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.9]) == [False] * 4
    # as weak but steady: no
    assert assess([0.4, 0.3, 0.2, 0.1], [0.9, 0.8, 0.7, 0.1]) == [False] * 4


def test_drift_that_sampling_explains_does_not_count():
    assert assess([0.1, 0.2, 0.3, 0.4], [0.8, 0.7, 0.6, 0.1], floor=[0.1, 0.1, 0.1, 0.45]) == [False] * 4
    assert assess([0.1, 0.2, 0.3, 0.4], [0.8, 0.7, 0.6, 0.1], floor=[0.1, 0.1, 0.1, 0.35]) == [False] * 3 + [True]


def test_quantiles_widen_and_narrow_the_switch():
    drift, score = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]
    assert assess(drift, score, sensitivity_quantile=0.5, score_quantile=0.5) == [False, False, True, True]
    assert assess(drift, score, sensitivity_quantile=0.0, score_quantile=1.0) == [True] * 4
    assert assess(drift, score, sensitivity_quantile=1.0, score_quantile=1.0) == [False, False, False, True]
    assert assess(drift, score, sensitivity_quantile=0.0, score_quantile=0.0) == [False, False, False, True]


def test_the_switch_can_be_turned_off():
    assert assess([0.1, 0.2, 0.3, 0.4], [0.8, 0.7, 0.6, 0.1], switch="off") == [False] * 4


def test_everywhere_is_every_module():
    assert assess([0.1, 0.2, 0.3, 0.4], [0.8, 0.7, 0.6, 0.1], floor=[1.0] * 4, switch="everywhere") == [True] * 4


def test_no_drift_at_all_switches_nothing():
    assert assess([0.0] * 4, [0.1, 0.2, 0.3, 0.4]) == [False] * 4


def test_sensitivity_is_standardised_inside_each_block_and_quantiles_span_the_model():
    # The second block drifts ten times as much throughout; after standardising, both have one sensitive module.
    drifts = [spread([0.01, 0.02, 0.03, 0.04]), spread([0.1, 0.2, 0.3, 0.4])]
    scores = [spread([0.6, 0.6, 0.6, 0.1]), spread([0.7, 0.7, 0.7, 0.2])]
    floors = [torch.zeros(40)] * 2
    records = assess_reliability([FOUR, FOUR], scores, drifts, floors)
    assert [r.switched.tolist() for r in records] == [[False, False, False, True]] * 2
    # One block whose scores are low throughout: the score's quantile is taken over the model, not the block.
    scores[1] = spread([0.95, 0.95, 0.95, 0.9])
    records = assess_reliability([FOUR, FOUR], scores, drifts, floors)
    assert [r.switched.tolist() for r in records] == [[False, False, False, True], [False] * 4]


def test_records_carry_what_was_compared():
    (record,) = assess_reliability(
        [FOUR], [spread([0.8, 0.7, 0.6, 0.1])], [spread([0.1, 0.2, 0.3, 0.4])], [spread([0.01, 0.02, 0.03, 0.04])]
    )
    assert record.size.tolist() == [10] * 4
    np.testing.assert_allclose(record.score.numpy(), [0.8, 0.7, 0.6, 0.1])
    np.testing.assert_allclose(record.sensitivity.numpy(), [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(record.noise.numpy(), [0.01, 0.02, 0.03, 0.04])


def test_a_floor_that_has_been_subtracted_is_recorded_and_not_compared_with():
    drift, floor = [spread([0.1, 0.2, 0.3, 0.4])], [spread([0.5] * 4)]
    (record,) = assess_reliability([FOUR], [spread([0.8, 0.7, 0.6, 0.1])], drift, floor, noise_gone=True)
    assert record.switched.tolist() == [False, False, False, True]
    np.testing.assert_allclose(record.noise.numpy(), [0.5] * 4)


def test_switched_share_counts_neurons_not_modules():
    def record(sizes: list[int], switched: list[bool]) -> ModuleReliability:
        zeros = torch.zeros(len(sizes))
        return ModuleReliability(torch.tensor(sizes), zeros, zeros, zeros, torch.tensor(switched))

    records = [record([10, 30], [True, False]), record([50, 10], [False, False])]
    assert switched_share(records) == pytest.approx(0.1)
    assert switched_share([record([10, 30], [False, False])]) == 0


def reference_ranks(scores, fallback, labels, switched) -> list[float]:
    """Sort the members of each module by (score, index)."""
    p = [0.0] * len(scores)
    for k in set(labels):
        values = fallback if switched[k] else scores
        members = sorted((i for i, y in enumerate(labels) if y == k), key=lambda i: (values[i], i))
        for rank, i in enumerate(members):
            p[i] = (rank + 0.5) / len(members)
    return p


@settings(max_examples=60)
@given(data=st.data(), K=st.integers(1, 4), extra=st.integers(0, 30))
def test_within_module_ranks(data, K, extra):
    N = K + extra
    labels = list(range(K)) + data.draw(st.lists(st.integers(0, K - 1), min_size=extra, max_size=extra))
    numbers = st.lists(st.integers(-3, 3).map(float), min_size=N, max_size=N)  # many ties
    scores, fallback = data.draw(numbers), data.draw(numbers)
    switched = data.draw(st.lists(st.booleans(), min_size=K, max_size=K))
    p = within_module_ranks(*map(torch.tensor, (scores, fallback, labels, switched)))
    assert p.dtype == torch.float64
    assert p.tolist() == pytest.approx(reference_ranks(scores, fallback, labels, switched), rel=1e-14)
    for k in range(K):  # every rank once
        n = labels.count(k)
        inside = sorted((p[torch.tensor(labels) == k] * n - 0.5).tolist())
        np.testing.assert_allclose(inside, np.arange(n), atol=1e-9)
