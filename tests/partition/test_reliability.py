"""Which modules switch to the activation-free metric, in hand-made cases, and ranks inside modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gprune.partition.modules import (
    ModuleReliability,
    assess_reliability,
    module_means,
    switched_share,
    within_module_ranks,
)
from tests import tiny_run

LABELS = torch.arange(40) % 4  # four modules of ten neurons
DRIFT, SCORE = [0.1, 0.2, 0.3, 0.4], [0.8, 0.7, 0.6, 0.1]  # the last module is sensitive and weak
LAST, NONE, ALL = [False] * 3 + [True], [False] * 4, [True] * 4


def per_neuron(per_module: list[float]) -> torch.Tensor:
    """Repeat the value of each module for all of its neurons."""
    return torch.tensor(per_module, dtype=torch.float64)[LABELS]


def test_module_means_are_those_of_their_members():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    expected = [values.double().numpy()[labels.numpy() == k].mean() for k in range(4)]
    np.testing.assert_allclose(module_means(values, labels).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("drift", "score", "floor", "options", "switched"),
    [
        pytest.param(DRIFT, SCORE, [0.0] * 4, {}, LAST, id="sensitive and weak"),
        pytest.param(DRIFT, [0.1, 0.2, 0.3, 0.9], [0.0] * 4, {}, NONE, id="as sensitive but strong"),
        pytest.param(DRIFT[::-1], [0.9, 0.8, 0.7, 0.1], [0.0] * 4, {}, NONE, id="as weak but steady"),
        pytest.param([0.0] * 4, SCORE, [0.0] * 4, {}, NONE, id="no drift at all"),
        pytest.param(DRIFT, SCORE, [0.1, 0.1, 0.1, 0.45], {}, NONE, id="drift that sampling explains"),
        pytest.param(DRIFT, SCORE, [0.1, 0.1, 0.1, 0.35], {}, LAST, id="drift beyond sampling"),
        pytest.param(
            DRIFT, DRIFT[::-1], [0.0] * 4, {"sensitivity_quantile": 0.5}, [False, False, True, True], id="wider",
        ),
        pytest.param(DRIFT, SCORE, [0.0] * 4, {"sensitivity_quantile": 0.0, "score_quantile": 1.0}, ALL, id="widest"),
        pytest.param(DRIFT, SCORE, [0.0] * 4, {"sensitivity_quantile": 1.0, "score_quantile": 1.0}, LAST, id="first"),
        pytest.param(DRIFT, SCORE, [0.0] * 4, {"sensitivity_quantile": 0.0, "score_quantile": 0.0}, LAST, id="weakest"),
        pytest.param(DRIFT, SCORE, [0.0] * 4, {"switch": "off"}, NONE, id="off"),
        pytest.param(DRIFT, SCORE, [1.0] * 4, {"switch": "everywhere"}, ALL, id="everywhere"),
    ],
)  # fmt: skip
def test_only_sensitive_and_weak_modules_switch_unless_all_or_none_are_to_switch(
    drift, score, floor, options, switched
):
    (block,) = assess_reliability([LABELS], [per_neuron(score)], [per_neuron(drift)], [per_neuron(floor)], **options)
    assert block.switched.tolist() == switched
    # The compared values are part of the result.
    assert block.size.tolist() == [10] * 4
    for values, recorded in ((score, block.score), (drift, block.sensitivity), (floor, block.noise_floor)):
        np.testing.assert_allclose(recorded.numpy(), values)


def test_sensitivity_is_standardized_per_block_and_quantiles_are_over_the_model():
    # All modules of block 1 drift ten times as much. After standardization, both blocks have one sensitive module.
    drifts = [per_neuron([0.01, 0.02, 0.03, 0.04]), per_neuron([0.1, 0.2, 0.3, 0.4])]
    scores = [per_neuron([0.6, 0.6, 0.6, 0.1]), per_neuron([0.7, 0.7, 0.7, 0.2])]
    floors = [torch.zeros(40)] * 2
    blocks = assess_reliability([LABELS, LABELS], scores, drifts, floors)
    assert [r.switched.tolist() for r in blocks] == [[False, False, False, True]] * 2
    # Block 1 has high scores only. The quantile of scores is that of the model, not of each block.
    scores[1] = per_neuron([0.95, 0.95, 0.95, 0.9])
    blocks = assess_reliability([LABELS, LABELS], scores, drifts, floors)
    assert [r.switched.tolist() for r in blocks] == [[False, False, False, True], [False] * 4]


def test_switched_share_counts_neurons_not_modules():
    def block(sizes: list[int], switched: list[bool]) -> ModuleReliability:
        zeros = torch.zeros(len(sizes))
        return ModuleReliability(torch.tensor(sizes), zeros, zeros, zeros, torch.tensor(switched))

    blocks = [block([10, 30], [True, False]), block([50, 10], [False, False])]
    assert switched_share(blocks) == pytest.approx(0.1)
    assert switched_share([block([10, 30], [False, False])]) == 0


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
def test_ranks_inside_modules_use_the_fallback_scores_in_switched_modules(data, K, extra):
    N = K + extra
    labels = list(range(K)) + data.draw(st.lists(st.integers(0, K - 1), min_size=extra, max_size=extra))
    numbers = st.lists(st.integers(-3, 3).map(float), min_size=N, max_size=N)  # many ties
    scores, fallback = data.draw(numbers), data.draw(numbers)
    switched = data.draw(st.lists(st.booleans(), min_size=K, max_size=K))
    p = within_module_ranks(*map(torch.tensor, (scores, fallback, labels, switched)))
    assert p.dtype == torch.float64
    assert p.tolist() == pytest.approx(reference_ranks(scores, fallback, labels, switched), rel=1e-14)
    for k in range(K):  # each rank occurs once
        n = labels.count(k)
        inside = sorted((p[torch.tensor(labels) == k] * n - 0.5).tolist())
        np.testing.assert_allclose(inside, np.arange(n), atol=1e-9)


@pytest.mark.parametrize("metric", ["magnitude", "wanda_sp"])
def test_the_log_says_that_a_switch_to_the_base_metric_changes_nothing(metric, world, tmp_path, capsys):
    flags = (f"--importance={metric}", "--sparsity.allocation=uniform", "--recovery=none", "--export=none")
    with tiny_run.isolated(tmp_path / "cache"):
        assert tiny_run.main(world.args(tmp_path, *flags)) == 0
    words = "switch to magnitude, which is --importance, so the switch changes nothing"
    assert (words in capsys.readouterr().out) == (metric == "magnitude")
