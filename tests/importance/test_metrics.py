"""Each metric against its formula in NumPy on raw activations, gradients and weights, for neurons and KV groups.

Activations are recorded by hooks of the tests and summed in float64. Gradients are from autograd on an unfrozen float64
copy of the model, with one backward pass per window.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gprune
from gprune.calibration.statistics import CorpusStatistics
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.importance.scores import fractional_ranks, score_units
from gprune.models.blocks import blocks_of
from tests import registries
from tests.calibration.test_collector import batches, projection_inputs
from tests.tiny_llama import collect, make_tiny_llama

BUILT_IN = registries.BUILT_IN_METRICS
BOTH = ("ffn", "attention")
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
    scores = score_units(name, blocks_of(model), statistics, **options)
    return [*scores.ffn, *scores.attention]


def window_gradients(model, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Gradients of each window's mean cross-entropy by parameter name, (windows, *shape) in float64."""
    unfrozen = copy.deepcopy(model).double().requires_grad_(True)
    gradients = {name: [] for name, _ in unfrozen.named_parameters()}
    for window in tokens:
        unfrozen.zero_grad()
        F.cross_entropy(unfrozen(window[None]).logits[0, :-1], window[1:]).backward()
        for name, parameter in unfrozen.named_parameters():
            gradients[name].append(parameter.grad.numpy().copy())
    return {name: np.stack(of_windows) for name, of_windows in gradients.items()}


@dataclass
class BlockInputs:
    """Inputs of a reference formula for the neurons or the KV groups of one block, as NumPy arrays in float64."""

    x: np.ndarray  # (n, C) activations of all tokens
    W: np.ndarray  # (H, C)
    rows: list[np.ndarray]  # (C, H) each: row c computes channel c
    units: list[list[tuple[str, int, list[int]]]]  # per unit: (projection, axis, its rows or columns)
    weights: dict[str, np.ndarray]
    window_gradients: Callable[[], dict[str, np.ndarray]]  # by projection, (windows, *shape); computed on first use

    @cached_property
    def vectors(self) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Per unit its weight vectors w (k,) with the windows' gradients g (windows, k)."""
        g = self.window_gradients()
        return [
            [
                (np.take(self.weights[part], i, axis), np.take(g[part], i, axis + 1))
                for part, axis, indices in unit
                for i in indices
            ]
            for unit in self.units
        ]


def reference_inputs(model, tokens: torch.Tensor, half: int | None = None) -> dict[str, list[BlockInputs]]:
    """Inputs of the reference formulas by kind and block, from all windows or those of one half."""
    tokens_of_half = tokens[slice(None) if half is None else slice(half, None, 2)]
    activations, config = projection_inputs(model, tokens_of_half), model.config
    heads = config.num_attention_heads // config.num_key_value_heads  # query heads per group
    d = config.head_dim
    gradients: dict[str, np.ndarray] = {}

    def lazy_gradients(prefix: str, names: dict[str, str]) -> Callable[[], dict[str, np.ndarray]]:
        """A function that computes gradients on first use, because most formulas do not need them."""

        def gradients_by_projection() -> dict[str, np.ndarray]:
            if not gradients:
                gradients.update(window_gradients(model, tokens_of_half))
            return {part: gradients[f"{prefix}.{name}.weight"] for part, name in names.items()}

        return gradients_by_projection

    def linear(module, names: dict[str, str]) -> dict[str, np.ndarray]:
        return {part: getattr(module, name).weight.double().numpy() for part, name in names.items()}

    inputs = {"ffn": [], "attention": []}
    for index, layer in enumerate(model.model.layers):
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        w = linear(layer.mlp, names)
        inputs["ffn"].append(
            BlockInputs(
                x=activations["ffn"][index].reshape(-1, config.intermediate_size),
                W=w["down"],
                rows=[w["gate"], w["up"]],
                units=[[("gate", 0, [j]), ("up", 0, [j]), ("down", 1, [j])] for j in range(config.intermediate_size)],
                weights=w,
                window_gradients=lazy_gradients(f"model.layers.{index}.mlp", names),
            )
        )
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
        w = linear(layer.self_attn, names)
        # The row of the value projection that computes each channel.
        value_rows = [(c // d // heads) * d + c % d for c in range(config.num_attention_heads * d)]
        units = []
        for g in range(config.num_key_value_heads):
            of_group = list(range(g * d, (g + 1) * d))
            of_heads = list(range(g * heads * d, (g + 1) * heads * d))
            units.append(
                [("query", 0, of_heads), ("key", 0, of_group), ("value", 0, of_group), ("output", 1, of_heads)]
            )
        inputs["attention"].append(
            BlockInputs(
                x=activations["attention"][index].reshape(-1, config.num_attention_heads * d),
                W=w["output"],
                rows=[w["value"][value_rows]],
                units=units,
                weights=w,
                window_gradients=lazy_gradients(f"model.layers.{index}.self_attn", names),
            )
        )
    return inputs


def norms(m: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((m**2).sum(axis))


def per_vector(r: BlockInputs, term: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    """Per unit, the sum of term(w, g) over its rows and columns. Shared key and value rows count once."""
    return np.array([sum(term(w, g) for w, g in unit) for unit in r.vectors])


# Per channel (C,) or per unit.
REFERENCES: dict[str, Callable[[BlockInputs], np.ndarray]] = {
    "wanda_sp": lambda r: np.sqrt((r.x**2).mean(0)) * np.abs(r.W).sum(0),
    "wifv": lambda r: ((r.x - r.x.mean(0)) ** 2).mean(0) * (r.W**2).sum(0),
    "ifv": lambda r: ((r.x - r.x.mean(0)) ** 2).mean(0),
    "wifn": lambda r: (np.sqrt((r.x**2).mean(0)) * np.abs(r.W).mean(0)) ** 2,
    "act_norm": lambda r: np.sqrt((r.x**2).mean(0)),
    "taylor": lambda r: per_vector(r, lambda w, g: np.abs(w * g.mean(0)).sum()),
    "magnitude": lambda r: norms(r.W, 0) * np.prod([norms(rows, 1) for rows in r.rows], axis=0),
    "magnitude_down": lambda r: norms(r.W, 0),
}
# Relative tolerances. Gradients have the precision of a float32 backward pass.
RTOL = dict.fromkeys(REFERENCES, 2e-6) | {"taylor": 1e-5}


class Cached:
    """Cached models by shape, statistics by batch size, and inputs of references. Tests must not change them."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens
        self.model = functools.cache(lambda shape: with_random_norms(**SHAPES[shape]))
        self.statistics = functools.cache(lambda shape, size: all_statistics(self.model(shape), self.tokens, size))
        self.raw = functools.cache(lambda shape, half: reference_inputs(self.model(shape), self.tokens, half))

    def scores_of(self, name: str, shape: int, size: int, *, half: int | None = None) -> list[torch.Tensor]:
        """Scores of neurons and KV groups from statistics of all windows, or of those of one half."""
        statistics = self.statistics(shape, size)
        if half is not None:
            halves = {k: [SimpleNamespace(total=c.half(half)) for c in getattr(statistics, k)] for k in BOTH}
            statistics = SimpleNamespace(**halves)
        return scores_of(name, self.model(shape), statistics)


@pytest.fixture(scope="module")
def shared() -> Cached:
    return Cached(torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1)))


def reference_scores(raw: dict[str, list[BlockInputs]], name: str) -> list[np.ndarray]:
    """Scores by the formula: neurons of each block, and then KV groups, which have the sum of their channels."""
    per_block = []
    for kind in BOTH:
        for block in raw[kind]:
            scores = REFERENCES[name](block)  # per channel or per unit
            per_block.append(scores.reshape(len(block.units), -1).sum(1))
    return per_block


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
    assert_scores(name, scores, reference_scores(shared.raw(shape, None), name))


def test_wifn_and_wanda_sp_rank_neurons_equally(shared):
    """A mean instead of a sum, and a square, preserve the order of non-negative scores."""
    wifn, wanda_sp = (shared.scores_of(name, 0, 4)[:3] for name in ("wifn", "wanda_sp"))  # neurons of three blocks
    assert all(torch.equal(a.argsort(), b.argsort()) for a, b in zip(wifn, wanda_sp, strict=True))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("half", [0, 1])
def test_scores_of_a_half_equal_the_formula_on_its_windows(name, half, shared):
    assert_scores(name, shared.scores_of(name, 0, 6, half=half), reference_scores(shared.raw(0, half), name))


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
        scores = score_units(name, blocks_of(tiny_model), statistics, attention=False)
        both = score_units(name, blocks_of(tiny_model), full)
        assert all(torch.equal(a, b) for a, b in zip(scores.ffn, both.ffn, strict=True)), name
        nothing = torch.zeros(2, dtype=torch.float64)
        assert all(torch.equal(s, nothing) for s in [*scores.attention, *scores.channels]), name


# Metrics whose scores do not depend on the gate row, and metrics that do not depend on the output column.
GATE_BLIND = {"magnitude_down", "random"}
DOWN_BLIND = {"act_norm", "ifv", "random"}


def ranked(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ranks of finite scores in each block."""
    for s in scores:
        assert bool(torch.isfinite(s).all())
    ranks = [fractional_ranks(s) for s in scores]
    assert all(float(r.min()) > 0 and float(r.max()) < 1 for r in ranks)
    return ranks


@pytest.mark.parametrize("name", BUILT_IN)
def test_dead_neurons_score_zero_by_metrics_that_depend_on_the_dead_weights(name, tiny_model, token_batch):
    mlp = tiny_model.model.layers[0].mlp
    mlp.gate_proj.weight.data[3] = 0.0
    mlp.down_proj.weight.data[:, 4] = 0.0
    tiny_model.model.layers[1].mlp.gate_proj.weight.data.zero_()  # a whole dead block
    scores = scores_of(name, tiny_model, all_statistics(tiny_model, token_batch))
    ranks = ranked(scores)
    assert (float(scores[0][3]) == 0) == (name not in GATE_BLIND)
    assert (float(scores[0][4]) == 0) == (name not in DOWN_BLIND)
    assert float(scores[0][[i for i in range(48) if i not in (3, 4)]].min()) > 0
    if name not in GATE_BLIND:
        assert scores[0].argmin() in (3, 4)
        # All neurons of the dead block have the same score.
        assert torch.equal(ranks[1], torch.full((48,), 0.5, dtype=torch.float64))


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
    blocks, statistics = blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6))

    def draw(seed: int) -> list[torch.Tensor]:
        return score_units("random", blocks, statistics, seed=seed).ffn

    assert all(torch.equal(a, b) for a, b in zip(draw(3), draw(3), strict=True))
    of_two_seeds = [*draw(3), *draw(4)]
    assert len({tuple(s.tolist()) for s in of_two_seeds}) == 6  # three blocks each
    state = torch.random.get_rng_state()
    draw(5)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global random state is unchanged


@pytest.mark.usefixtures("scratch_registry")
def test_a_registered_metric_scores_neurons_channels_and_kv_groups(tiny_model, token_batch):
    @gprune.metric("mean_square")
    def mean_square(weights, moments, generator):
        return (moments.sum_sq / moments.count).float()

    raw = projection_inputs(tiny_model, token_batch)
    scores = score_units("mean_square", blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6)))
    for index in range(3):
        neurons, channels = ((raw[kind][index] ** 2).mean((0, 1)) for kind in BOTH)
        np.testing.assert_allclose(scores.ffn[index].numpy(), neurons, rtol=1e-6)
        np.testing.assert_allclose(scores.channels[index].numpy(), channels, rtol=1e-6)
        np.testing.assert_allclose(scores.attention[index].numpy(), channels.reshape(2, 16).sum(1), rtol=1e-6)
    assert scores.ffn[0].dtype == torch.float64


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
        score_units("mine", blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6)))


@pytest.mark.usefixtures("scratch_registry")
def test_a_metric_with_an_unknown_need_is_not_registered():
    with pytest.raises(ValueError, match=r"metric 'mine' must be among saliency; got \['gram'\]"):
        gprune.metric("mine", needs=("gram", "saliency"))
    assert "mine" not in IMPORTANCE
