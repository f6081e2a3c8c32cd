"""Allocations against formulas in NumPy, the budget that all of them meet, and removal of whole blocks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from experiments.architectures import example
from gprune.calibration.block_errors import block_errors
from gprune.errors import UserError
from gprune.importance.scores import Scores, score_units
from gprune.models.families import decoder_layers
from gprune.models.masks import Masks, bypassed
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.sparsity.allocation import ALLOCATION, allocate, allocation
from gprune.sparsity.budget import Budget, budget_of
from gprune.sparsity.cut import keep_masks
from gprune.sparsity.whole_blocks import check_attention_remains, choose_layers
from gprune.units.structure import of_kind
from tests import tiny_run
from tests.calibration.test_collector import batches, projection_inputs
from tests.world import by_key, collect, make_tiny_llama, masks_without

BUILT_IN = [name for name in ALLOCATION if not ALLOCATION[name].modules]


def make_model_with_outliers(**overrides):
    """A model whose block b has 2b large columns in its down and output projections."""
    model = make_tiny_llama(**overrides)
    for index, layer in enumerate(model.model.layers):
        for linear in (layer.mlp.down_proj, layer.self_attn.o_proj):
            linear.weight.data[:, : 2 * index] *= 12
    return model


@pytest.fixture(scope="module")
def with_outliers():
    """A model with outliers, tokens, statistics and wanda_sp scores."""
    model = make_model_with_outliers()
    tokens = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1))
    return model, tokens, *measured(model, tokens)


def measured(model, tokens):
    """Statistics with all extras that allocations may read, and wanda_sp scores."""
    statistics = collect(model, batches(tokens, 6), gram=True)
    scores = score_units("wanda_sp", model, statistics, scope=("neurons", "kv_groups"))
    return replace(statistics, errors=block_errors(model, scores, statistics, tokens.split(2))), scores


def half_budget(model) -> Budget:
    return budget_of(units_of(model), 0.5, scope="attention+ffn")


def margins_of(name: str, with_outliers, scores: Scores | None = None, **options):
    """Margins of neurons and of KV groups of each block by an allocation, with `half_budget`."""
    model, _, statistics, default = with_outliers
    scores = default if scores is None else scores
    margins = ALLOCATION[name](scores, statistics, decoder_layers(model), half_budget(model), **options)
    return of_kind(margins, "neurons"), of_kind(margins, "kv_groups")


def assert_equal_margins(mine: list[torch.Tensor], theirs: list[np.ndarray], rtol: float = 1e-12) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float64
        np.testing.assert_allclose(a.numpy(), b, rtol=rtol, atol=1e-14)


def ranks(s: torch.Tensor) -> np.ndarray:
    return (rankdata(s.numpy()) - 0.5) / len(s)


def test_uniform_margins_are_ranks_inside_the_block(with_outliers):
    scores = with_outliers[3]
    neurons, groups = margins_of("uniform", with_outliers)
    assert_equal_margins(neurons, [ranks(s) for s in of_kind(scores, "neurons")])
    assert_equal_margins(groups, [ranks(s) for s in of_kind(scores, "kv_groups")])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_uniform_removes_equally_many_neurons_from_a_block_with_dead_neurons(share, with_outliers):
    """Equal scores have different ranks, so that any share of them can be removed."""
    model, _, statistics, scores = with_outliers
    dead = copy.deepcopy(scores)
    dead["neurons.0"][5:25] = 0.0
    budget = budget_of(units_of(model), share, scope="ffn")
    masks = allocate("uniform", dead, statistics, decoder_layers(model), budget)
    removed = [int((~m).sum()) for m in masks.ffn]
    assert max(removed) - min(removed) <= 1
    assert not masks.ffn[0][5 : 5 + min(removed[0], 20)].any()


def test_global_margins_are_z_scores_inside_the_block_averaged_over_channels_of_groups(with_outliers):
    scores = with_outliers[3]
    channels = of_kind(scores.channels, "kv_groups")
    assert [len(c) for c in channels] == [32] * 3
    z = [(c.numpy() - c.numpy().mean()) / c.numpy().std() for c in [*of_kind(scores, "neurons"), *channels]]
    neurons, groups = margins_of("global", with_outliers)
    assert_equal_margins(neurons, z[:3])
    # A KV group has two heads of eight channels.
    assert_equal_margins(groups, [np.array([c[:16].mean(), c[16:].mean()]) for c in z[3:]])


def test_global_standardizes_scores_of_groups_if_the_metric_scores_groups(with_outliers):
    groups = [torch.tensor([3.0, 1.0]).double(), torch.tensor([0.0, 5.0]).double(), torch.tensor([2.0, 2.0]).double()]
    scores = Scores(with_outliers[3] | {f"kv_groups.{b}": of_block for b, of_block in enumerate(groups)})
    _, margins = margins_of("global", with_outliers, scores)
    assert_equal_margins(margins, [np.array([1.0, -1.0]), np.array([-1.0, 1.0]), np.zeros(2)])


@pytest.mark.parametrize("value", [0.1, 1e-200, 1e200])
def test_global_margins_of_constant_scores_are_zero(value, with_outliers):
    scores = copy.deepcopy(with_outliers[3])
    scores["neurons.1"].fill_(value)
    scores.channels["kv_groups.2"].fill_(value)
    neurons, groups = margins_of("global", with_outliers, scores)
    assert bool((neurons[1] == 0).all())
    assert bool((groups[2] == 0).all())
    assert bool((neurons[0] != 0).any())


def outlier_share(model, tokens, multiple: float) -> dict[str, np.ndarray]:
    """D of each kind and block from raw activations: the share of |W_ij| rms_j above `multiple` times their mean."""
    raw, shares_of_kind = projection_inputs(model, tokens), {}
    for kind, part in (("neurons", lambda x: x.mlp.down_proj), ("kv_groups", lambda x: x.self_attn.o_proj)):
        shares = []
        for index, layer in enumerate(model.model.layers):
            x = raw[kind][index].reshape(-1, raw[kind][index].shape[-1])
            A = np.abs(part(layer).weight.double().numpy()) * np.sqrt((x**2).mean(0))
            shares.append((multiple * A.mean() < A).mean())
        shares_of_kind[kind] = np.array(shares)
    return shares_of_kind


@pytest.mark.parametrize("options", [{}, {"multiple": 3.0, "spread": 0.2}], ids=["the paper's", "others"])
def test_owl_margins_are_ranks_minus_a_sparsity_that_falls_with_the_share_of_outliers(options, with_outliers):
    model, tokens, _, scores = with_outliers
    multiple, spread = options.get("multiple", 5.0), options.get("spread", 0.08)
    shares = outlier_share(model, tokens, multiple)
    margins_of_kinds = margins_of("owl", with_outliers, **options)
    for kind, margins in zip(("neurons", "kv_groups"), margins_of_kinds, strict=True):
        D = shares[kind]
        assert len(set(D)) == 3  # by construction of the model
        scaled = 2 * spread * (D - D.min()) / (D.max() - D.min())
        sparsities = 0.5 - (scaled - scaled.mean())  # their mean is the target, 0.5
        pairs = zip(of_kind(scores, kind), sparsities, strict=True)
        assert_equal_margins(margins, [ranks(s) - sparsity for s, sparsity in pairs])


@pytest.mark.parametrize("options", [{"multiple": 1e9}, {"spread": 0.0}], ids=["no outlier at all", "no spread"])
def test_owl_without_differences_between_blocks_equals_uniform(options, with_outliers):
    budget = budget_of(units_of(with_outliers[0]), 0.4, scope="attention+ffn")
    owl, uniform = (
        keep_masks(budget, by_key(*margins_of(name, with_outliers, **rule_options)))
        for name, rule_options in (("owl", options), ("uniform", {}))
    )
    assert owl == uniform


@pytest.mark.parametrize("name", BUILT_IN)
def test_margins_are_finite_for_a_dead_block(name, token_batch):
    model = make_model_with_outliers()
    model.model.layers[1].mlp.gate_proj.weight.data.zero_()
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()
    statistics, scores = measured(model, token_batch)
    assert bool((scores["neurons.1"] == 0).all())
    margins = ALLOCATION[name](scores, statistics, decoder_layers(model), half_budget(model))
    assert all(bool(torch.isfinite(m).all()) for m in margins.values())
    assert {key: len(m) for key, m in margins.items()} == by_key([48] * 3, [2] * 3)


@pytest.mark.parametrize("name", [*BUILT_IN, "mine"])
def test_after_removing_whole_blocks_allocations_meet_the_rest_of_the_budget(name, with_outliers, monkeypatch):
    """Margins are those of the model without the removed block, which has the most outliers."""
    monkeypatch.setattr(ALLOCATION, "_entries", dict(ALLOCATION._entries))
    allocation("mine")(lambda scores, statistics, blocks, budget: scores)
    model, _, statistics, scores = with_outliers
    budget = budget_of(units_of(model), 0.6, scope="attention+ffn+blocks", block_share=0.9).without([2])
    masks = allocate(name, scores, statistics, decoder_layers(model), budget)
    keep = [[torch.full((n,), b != 2) for b in range(3)] for n in (48, 2)]
    shallow = slice_model(model, Masks.of_blocks(*keep))
    others = [key for key in scores if not key.endswith(".2")]
    scores_of_others = Scores(*({key: v[key] for key in others if key in v} for v in (scores, scores.channels)))
    statistics_of_others = replace(
        statistics, channels={key: statistics.channels[key] for key in others}, turned=statistics.turned[:2],
        errors=statistics.errors[:2],
    )  # fmt: skip
    units = {u.key: u for u in units_of(model)}
    target = budget.target - units["layer.2"].parameters
    rest = budget_of(units_of(shallow), scope="attention+ffn").removing(target)
    expected = allocate(name, scores_of_others, statistics_of_others, decoder_layers(shallow), rest)
    assert masks.blocks == [True, True, False]
    assert Masks.of_blocks(masks.ffn[:2], masks.attention[:2]) == expected
    removed = model.num_parameters() - slice_model(model, masks).num_parameters()
    assert removed == budget.removed_by(masks)
    assert 0 <= removed - budget.target < units["neurons.0"].parameters


# --- registered allocations


# --- whole blocks


def with_influence(statistics, influence: list[float]):
    """The statistics with other influences of blocks."""
    tokens = float(statistics.channels["neurons.0"].total.count)
    return replace(statistics, turned=torch.tensor(influence, dtype=torch.float64) * tokens)


@pytest.fixture(scope="module")
def uneven():
    """A model of four blocks with different costs, its statistics and scores. The order by influence is 2, 0, 3, 1."""
    model = make_tiny_llama(num_hidden_layers=4, attention_bias=True, mlp_bias=True)
    keep = [torch.arange(48) < n for n in (48, 20, 48, 7)]
    model = slice_model(model, Masks.of_blocks(keep, [torch.arange(2) < n for n in (2, 2, 1, 2)]))
    tokens = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
    statistics = with_influence(collect(model, batches(tokens, 4)), [0.2, 0.9, 0.1, 0.5])
    return model, statistics, score_units("wanda_sp", model, statistics)


@pytest.mark.parametrize(("share", "protect"), [(0.9, []), (0.6, [-1]), (0.1, [])])
def test_blocks_are_removed_greedily_by_the_loss_without_them(share, protect, uneven):
    """Blocks are removed as long as one fits into their share of the target. The reference removes decoder layers."""
    model, ids = uneven[0], torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(4))
    units = units_of(model)
    costs = [u.parameters for u in units if u.kind == "layer"]
    budget = budget_of(units, 0.45, block_share=share, scope="ffn+blocks" if share else "ffn", protect=protect)

    def loss(lm) -> float:
        return float(lm(ids, labels=ids).loss)

    def bypassing(removed: list[int]) -> float:
        with bypassed(model, removed):
            return loss(model)

    expected, remaining = [], share * 0.45 * sum(costs)
    while candidates := [b for b in range(4 - len(protect)) if b not in expected and costs[b] <= remaining]:
        expected.append(min(candidates, key=lambda b: loss(slice_model(model, masks_without(model, *expected, b)))))
        remaining -= costs[expected[-1]]
    assert choose_layers(budget, bypassing) == expected
    assert bool(expected) == (share > 0.1)  # no block fits into a tenth of the target


REFUSED = pytest.raises(UserError, match="must name a layer with attention")


@pytest.mark.parametrize(
    ("attention_layers", "target", "protect", "outcome"),
    [
        ([2], 0.02, [], nullcontext()), ([2], 0.5, [], REFUSED), ([2], 0.5, [2], nullcontext()),
        ([1, 2], 0.5, [], nullcontext()), ([1, 2], 0.7, [], REFUSED),
    ],
)  # fmt: skip
def test_a_budget_for_whole_layers_that_fits_all_attention_layers_is_refused(
    attention_layers, target, protect, outcome, tmp_path
):
    with tiny_run.isolated(tmp_path):
        model = example("qwen3_next")
    kinds = ["full_attention" if layer in attention_layers else "linear_attention" for layer in range(3)]
    model.config.layer_types = kinds
    budget = budget_of(units_of(model), target, block_share=1.0, scope="ffn+blocks", protect=protect)
    with outcome:
        check_attention_remains(SimpleNamespace(skeleton=model, budget=budget))
