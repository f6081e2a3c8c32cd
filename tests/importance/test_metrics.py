"""Each metric against its formula in NumPy on raw activations, gradients and weights, for neurons and KV groups.

Activations are recorded by hooks of the tests and summed in float64. Gradients are from autograd on an unfrozen float64
copy of the model.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gprune
from gprune.calibration.statistics import CorpusStatistics
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.importance.scores import score_units
from gprune.units.structure import of_kind
from tests.calibration.test_collector import KINDS, batches, projection_inputs
from tests.world import BUILT_IN_METRICS, collect, make_tiny_llama

BUILT_IN = BUILT_IN_METRICS
BOTH = ("ffn", "attention")
NEURONS = {f"neurons.{b}" for b in range(3)}
# Grouped-query, multi-query and multi-head attention; a head size other than hidden size / heads.
SHAPES = [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 12}]


def with_random_norms(**overrides):
    """A tiny model whose norms scale hidden dimensions differently, like those of trained models."""
    model = make_tiny_llama(**overrides)
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm):
            module.weight.data = 0.5 + torch.rand(module.weight.shape, generator=generator)
    return model


def all_statistics(model, tokens: torch.Tensor, size: int = 6) -> CorpusStatistics:
    """Statistics with the extras of all metrics."""
    return collect(model, batches(tokens, size), saliency=BOTH)


def scores_of(name: str, model, statistics: CorpusStatistics, **options) -> list[torch.Tensor]:
    """Scores of the neurons of each block, and then of the KV groups of each block."""
    return list(score_units(name, model, statistics, scope=KINDS, **options).values())


def norms(m: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((m**2).sum(axis))


# Scores of channels from activations x (n, C), the output projection W (H, C), and rows (C, H) that compute a channel
FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray, list[np.ndarray]], np.ndarray]] = {
    "wanda_sp": lambda x, W, rows: np.sqrt((x**2).mean(0)) * np.abs(W).sum(0),
    "wifv": lambda x, W, rows: ((x - x.mean(0)) ** 2).mean(0) * (W**2).sum(0),
    "ifv": lambda x, W, rows: ((x - x.mean(0)) ** 2).mean(0),
    "wifn": lambda x, W, rows: (np.sqrt((x**2).mean(0)) * np.abs(W).mean(0)) ** 2,
    "act_norm": lambda x, W, rows: np.sqrt((x**2).mean(0)),
    "magnitude": lambda x, W, rows: norms(W, 0) * np.prod([norms(part, 1) for part in rows], axis=0),
    "magnitude_down": lambda x, W, rows: norms(W, 0),
}
REFERENCES = [*FORMULAS, "taylor"]


def reference_scores(model, tokens: torch.Tensor, name: str) -> list[np.ndarray]:
    """Scores in float64 of the neurons of each block, and then of the KV groups, which have the sum of their channels.

    Taylor saliency is the sum of |weight x mean gradient| over all weights of a unit. All windows are equally long, so
    the gradient of the mean loss is the mean gradient.
    """
    inputs, config = projection_inputs(model, tokens), model.config
    groups, d = config.num_key_value_heads, config.head_dim
    heads = config.num_attention_heads // groups
    value_rows = [(c // d // heads) * d + c % d for c in range(groups * heads * d)]  # the row that computes a channel
    double = copy.deepcopy(model).double()
    if name == "taylor":
        double.requires_grad_(True)(tokens, labels=tokens).loss.backward()

    def weights_of(module) -> list[np.ndarray]:
        found = [p for part, p in module.named_parameters() if part.endswith("proj.weight")]
        return [np.abs(p.detach() * p.grad).numpy() if name == "taylor" else p.numpy() for p in found]

    scores: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for index, layer in enumerate(double.model.layers):
        gate, up, down = weights_of(layer.mlp)
        query, key, value, output = weights_of(layer.self_attn)
        x, y = (inputs[kind][index].reshape(-1, inputs[kind][index].shape[-1]) for kind in KINDS)
        if name == "taylor":
            scores["neurons"].append(gate.sum(1) + up.sum(1) + down.sum(0))
            scores["kv_groups"].append(sum(w.reshape(groups, -1).sum(1) for w in (query, key, value, output.T.copy())))
        else:
            scores["neurons"].append(FORMULAS[name](x, down, [gate, up]))
            channels = FORMULAS[name](y, output, [value[value_rows]])
            scores["kv_groups"].append(channels.reshape(groups, -1).sum(1))
    return [*scores["neurons"], *scores["kv_groups"]]


# Relative tolerances. Gradients have the precision of a float32 backward pass.
RTOL = dict.fromkeys(REFERENCES, 2e-6) | {"taylor": 1e-5}


class Cached:
    """Cached models by shape, statistics by batch size, and reference scores. Tests must not change them."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens
        self.model = functools.cache(lambda shape: with_random_norms(**SHAPES[shape]))
        self.statistics = functools.cache(lambda shape, size: all_statistics(self.model(shape), self.tokens, size))

    def expected(self, name: str, shape: int, half: int | None = None) -> list[np.ndarray]:
        """Reference scores from all windows, or from those of one half."""
        return reference_scores(self.model(shape), self.tokens[slice(half, None, None if half is None else 2)], name)

    def scores_of(self, name: str, shape: int, size: int, *, half: int | None = None) -> list[torch.Tensor]:
        """Scores of neurons and KV groups from statistics of all windows, or of those of one half."""
        statistics = self.statistics(shape, size)
        if half is not None:
            halves = {key: SimpleNamespace(total=c.half(half)) for key, c in statistics.channels.items()}
            statistics = SimpleNamespace(channels=halves)
        return scores_of(name, self.model(shape), statistics)


@pytest.fixture(scope="module")
def shared() -> Cached:
    return Cached(torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1)))


def assert_scores(name: str, scores: list[torch.Tensor], expected: list[np.ndarray]) -> None:
    for of_block, expected_of_block in zip(scores, expected, strict=True):
        assert of_block.dtype == torch.float64
        np.testing.assert_allclose(of_block.numpy(), expected_of_block, rtol=RTOL[name], err_msg=name)


def test_every_built_in_metric_has_a_reference():
    assert set(BUILT_IN) == {*REFERENCES, "random"}


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("name", REFERENCES)
def test_metrics_equal_their_formula(name, shape, shared):
    scores = shared.scores_of(name, shape, 4)
    assert [len(s) for s in scores] == [48] * 3 + [shared.model(shape).config.num_key_value_heads] * 3
    assert_scores(name, scores, shared.expected(name, shape))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("half", [0, 1])
def test_scores_of_a_half_equal_the_formula_on_its_windows(name, half, shared):
    assert_scores(name, shared.scores_of(name, 0, 6, half=half), shared.expected(name, 0, half))


@pytest.mark.parametrize("name", BUILT_IN)
def test_metrics_are_documented_and_name_a_corpus_dependent_metric_for_drift(name, shared):
    function = IMPORTANCE[name]
    assert inspect.getdoc(function).startswith("s_")
    substitute = IMPORTANCE[function.drift]
    assert not substitute.activation_free  # its ranks would not depend on the corpus
    assert substitute.needs <= function.needs  # other statistics are not collected
    first_half, second_half = (shared.scores_of(function.drift, 0, 6, half=half) for half in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(first_half, second_half, strict=True))
    if not function.activation_free:
        assert function.drift == name


def test_kv_groups_out_of_scope_score_zero_and_neuron_scores_do_not_change(tiny_model, token_batch):
    statistics = collect(tiny_model, batches(token_batch, 6), saliency=("ffn",))
    full = all_statistics(tiny_model, token_batch)
    for name in BUILT_IN:
        scores, both = score_units(name, tiny_model, statistics), score_units(name, tiny_model, full, scope=KINDS)
        nothing = torch.zeros(2, dtype=torch.float64)
        assert all(torch.equal(s, both[key] if key in NEURONS else nothing) for key, s in scores.items()), name
        assert (scores.keys(), scores.channels) == (both.keys(), {}), name


@pytest.mark.parametrize("name", BUILT_IN)
def test_metrics_read_only_the_statistics_that_they_declare(name, shared):
    """Only the extras in `needs` are collected. Without the other extras, scores have the same bits."""
    needs = IMPORTANCE[name].needs
    assert not (needs and IMPORTANCE[name].activation_free)
    assert gprune.RunConfig(importance=name, gprune=False, recovery="none").needs == needs
    saliency = BOTH if "saliency" in needs else ()
    statistics = collect(shared.model(0), batches(shared.tokens, 6), saliency=saliency)
    pairs = zip(scores_of(name, shared.model(0), statistics), shared.scores_of(name, 0, 6), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_random_scores_are_seeded_differ_between_blocks_and_keep_the_global_random_state(tiny_model, token_batch):
    statistics = collect(tiny_model, batches(token_batch, 6))

    def draw(seed: int) -> list[torch.Tensor]:
        return of_kind(score_units("random", tiny_model, statistics, seed=seed), "neurons")

    assert all(torch.equal(a, b) for a, b in zip(draw(3), draw(3), strict=True))
    of_two_seeds = [*draw(3), *draw(4)]
    assert len({tuple(s.tolist()) for s in of_two_seeds}) == 6  # three blocks each
    state = torch.random.get_rng_state()
    draw(5)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global random state is unchanged


@pytest.mark.usefixtures("scratch_registry")
def test_a_registered_metric_has_default_attributes_and_is_refused_as_reliability_metric():
    """The reliability metric must be activation-free, which a registered metric is not by default."""
    gprune.metric("mean_square")(lambda weights, moments, generator: (moments.sum_sq / moments.count).float())
    registered = IMPORTANCE["mean_square"]
    assert registered.activation_free is False
    assert registered.needs == frozenset()
    assert registered.drift == "mean_square"
    assert gprune.RunConfig(importance="mean_square").importance == "mean_square"
    with pytest.raises(UserError, match=r"--reliability\.metric.*magnitude.*got 'mean_square'"):
        gprune.config.ReliabilityConfig(metric="mean_square").check()


@pytest.mark.usefixtures("scratch_registry")
def test_a_run_needs_the_extras_of_its_metrics():
    gprune.metric("mine", needs=("saliency",))(lambda w, m, g: m.saliency)
    gprune.metric("instead", activation_free=True, needs=("saliency",))(lambda w, m, g: m.saliency)
    config = functools.partial(gprune.RunConfig, recovery="none")
    assert config(importance="mine").needs == {"saliency"}
    reliability = gprune.config.ReliabilityConfig(metric="instead")
    assert config(reliability=reliability).needs == {"saliency"}
    assert config(reliability=reliability, gprune=False).needs == frozenset()


@pytest.mark.usefixtures("scratch_registry")
def test_a_metric_that_modifies_weights_is_refused_by_name(tiny_model, token_batch):
    gprune.metric("mine")(lambda w, m, g: w.output.abs_().sum(0))
    with pytest.raises(UserError, match=r"^Importance metric 'mine' must not change its inputs[^\n]*$"):
        score_units("mine", tiny_model, collect(tiny_model, batches(token_batch, 6)))


@pytest.mark.usefixtures("scratch_registry")
def test_a_metric_with_an_unknown_need_is_not_registered():
    with pytest.raises(ValueError, match=r"metric 'mine' must be among saliency; got \['gram'\]"):
        gprune.metric("mine", needs=("gram", "saliency"))
    assert "mine" not in IMPORTANCE
