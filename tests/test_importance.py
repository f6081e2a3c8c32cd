"""Every metric against a formula written in NumPy on raw float64 activations, for neurons and for KV groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gprune
from gprune.architectures import blocks_of
from gprune.drift import fractional_ranks
from gprune.errors import UserError
from gprune.importance import IMPORTANCE, score_units
from gprune.statistics import collect
from tests.conftest import make_tiny_llama
from tests.test_statistics import batches, recorded

BUILT_IN = [name for name in IMPORTANCE if IMPORTANCE[name].__module__ == "gprune.importance"]


def numpy_weights(model, index: int) -> dict[str, np.ndarray]:
    layer = model.model.layers[index]
    parts = {
        "gate": layer.mlp.gate_proj, "up": layer.mlp.up_proj, "down": layer.mlp.down_proj,
        "value": layer.self_attn.v_proj, "output": layer.self_attn.o_proj,
    }  # fmt: skip
    return {name: linear.weight.double().numpy() for name, linear in parts.items()}


def norm(v: np.ndarray) -> float:
    return float(np.sqrt((v * v).sum()))


# One channel: its activations over all tokens x (n,), its output column w (H,), the rows that feed it.
REFERENCES = {
    "wanda_sp": lambda x, w, rows: np.sqrt((x**2).mean()) * np.abs(w).sum(),
    "wifv": lambda x, w, rows: ((x - x.mean()) ** 2).mean() * (w**2).sum(),
    "act_norm": lambda x, w, rows: np.sqrt((x**2).mean()),
    "magnitude": lambda x, w, rows: norm(w) * np.prod([norm(row) for row in rows]),
}


def reference_scores(model, tokens, name: str, half: int | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    raw, formula = recorded(model, tokens), REFERENCES[name]
    windows = slice(None) if half is None else slice(half, None, 2)
    config = model.config
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    ffn, attention = [], []
    for index in range(config.num_hidden_layers):
        w = numpy_weights(model, index)
        x = raw["ffn"][index][windows].reshape(-1, config.intermediate_size)
        ffn.append(np.array([formula(x[:, j], w["down"][:, j], [w["gate"][j], w["up"][j]]) for j in range(x.shape[1])]))
        x = raw["attention"][index][windows].reshape(-1, config.num_attention_heads * config.head_dim)
        groups = np.zeros(config.num_key_value_heads)
        for channel in range(x.shape[1]):
            head, within = divmod(channel, config.head_dim)
            group = head // heads_per_group
            row = w["value"][group * config.head_dim + within]
            groups[group] += formula(x[:, channel], w["output"][:, channel], [row])
        attention.append(groups)
    return ffn, attention


def test_every_built_in_metric_has_a_reference():
    assert set(BUILT_IN) == {*REFERENCES, "random"}


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 12}])
@pytest.mark.parametrize("name", REFERENCES)
def test_metrics_equal_the_formula(name, overrides, token_batch):
    model = make_tiny_llama(**overrides)
    scores = score_units(name, blocks_of(model), collect(model, batches(token_batch, 4)))
    ffn, attention = reference_scores(model, token_batch, name)
    for mine, theirs in zip([*scores.ffn, *scores.attention], [*ffn, *attention], strict=True):
        assert mine.dtype == torch.float64
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=2e-6)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("half", [0, 1])
def test_a_half_scores_from_its_own_windows(name, half, tiny_model, token_batch):
    scores = score_units(name, blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6)), half=half)
    ffn, attention = reference_scores(tiny_model, token_batch, name, half=half)
    for mine, theirs in zip([*scores.ffn, *scores.attention], [*ffn, *attention], strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=2e-6)


def test_a_value_row_feeds_the_query_heads_of_its_own_group(tiny_model, token_batch):
    # The mapping that the reference above assumes, asked of the model itself.
    tiny_model.model.layers[1].self_attn.v_proj.weight.data[8:16] = 0.0
    alive = np.abs(recorded(tiny_model, token_batch)["attention"][1]).max((0, 1)) > 0
    np.testing.assert_array_equal(alive, np.arange(32) < 16)
    scores = score_units("wanda_sp", blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6)))
    assert scores.attention[1][1] == 0
    assert scores.attention[1][0] > 0
    assert (
        score_units("magnitude", blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6))).attention[1][1]
        == 0
    )


def test_magnitude_survives_a_rescaling_that_leaves_the_model_alone(tiny_model, token_batch):
    statistics = collect(tiny_model, batches(token_batch, 6))
    before = score_units("magnitude", blocks_of(tiny_model), statistics)
    mlp = tiny_model.model.layers[0].mlp
    mlp.up_proj.weight.data[5] *= 16
    mlp.down_proj.weight.data[:, 5] /= 16
    after = score_units("magnitude", blocks_of(tiny_model), statistics)
    torch.testing.assert_close(after.ffn[0], before.ffn[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_dead_neurons_and_constant_scores_are_finite(name, tiny_model, token_batch):
    mlp = tiny_model.model.layers[0].mlp
    mlp.gate_proj.weight.data[3] = 0.0
    tiny_model.model.layers[1].mlp.gate_proj.weight.data.zero_()  # a whole dead block
    mlp.down_proj.weight.data[:, 4] = 0.0
    scores = score_units(name, blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6)))
    assert all(bool(torch.isfinite(s).all()) for s in [*scores.ffn, *scores.attention])
    if name != "random":
        assert scores.ffn[0][3] == 0 == scores.ffn[0].min()
        assert torch.equal(fractional_ranks(scores.ffn[1]), torch.full((48,), 0.5, dtype=torch.float64))
    if name not in ("random", "act_norm"):
        assert scores.ffn[0][4] == 0


def test_activation_free_metrics_ignore_activations_and_the_others_do_not(tiny_model, token_batch):
    one, two = (collect(tiny_model, batches(tokens, 3)) for tokens in (token_batch[:3], token_batch[3:]))
    for name in BUILT_IN:
        a, b = (score_units(name, blocks_of(tiny_model), s) for s in (one, two))
        equal = [torch.equal(x, y) for x, y in zip([*a.ffn, *a.attention], [*b.ffn, *b.attention], strict=True)]
        assert all(equal) if IMPORTANCE[name].activation_free else not any(equal), name


def test_random_is_seeded_and_differs_between_blocks_and_scopes(tiny_model, token_batch):
    blocks, statistics = blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6))

    def draw(seed: int) -> list[torch.Tensor]:
        return score_units("random", blocks, statistics, seed=seed).ffn

    assert all(torch.equal(a, b) for a, b in zip(draw(3), draw(3), strict=True))
    streams = [*draw(3), *draw(4)]
    assert len({tuple(s.tolist()) for s in streams}) == 6
    state = torch.random.get_rng_state()
    draw(5)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global stream is left alone


@pytest.fixture
def scratch_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(IMPORTANCE, "_entries", dict(IMPORTANCE._entries))


@pytest.mark.usefixtures("scratch_registry")
def test_a_users_own_metric(tiny_model, token_batch):
    @gprune.metric("mean_abs")
    def mean_abs(weights, moments, generator):
        return (moments.sum_abs / moments.count).float()

    raw = recorded(tiny_model, token_batch)
    scores = score_units("mean_abs", blocks_of(tiny_model), collect(tiny_model, batches(token_batch, 6)))
    for index in range(3):
        np.testing.assert_allclose(scores.ffn[index].numpy(), np.abs(raw["ffn"][index]).mean((0, 1)), rtol=1e-6)
        per_channel = np.abs(raw["attention"][index]).mean((0, 1))
        np.testing.assert_allclose(scores.attention[index].numpy(), per_channel.reshape(2, 16).sum(1), rtol=1e-6)
    assert scores.ffn[0].dtype == torch.float64
    assert IMPORTANCE["mean_abs"].activation_free is False
    assert gprune.RunConfig(importance="mean_abs").importance == "mean_abs"
    with pytest.raises(UserError, match=r"--reliability\.metric.*magnitude.*got 'mean_abs'"):
        gprune.config.ReliabilityConfig(metric="mean_abs")


def test_an_unknown_metric_lists_what_there_is(tiny_model):
    with pytest.raises(UserError, match=r"Unknown importance metric 'wanda'.*Available: wanda_sp, wifv, act_norm"):
        score_units("wanda", blocks_of(tiny_model), None)
