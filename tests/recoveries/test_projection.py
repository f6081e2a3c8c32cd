"""Recovery of projections, compared with NumPy: least squares with ridge, and biases from mean activations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gprune.calibration.moments import add_gram, fill_gram
from gprune.calibration.statistics import ChannelStatistics, Moments
from gprune.errors import UserError
from gprune.method.recover import fit_once
from gprune.models.surgery import kept_layers, slice_model
from gprune.recoveries import RECOVERY, Material, recovery
from gprune.recoveries.contract import Projection
from tests.calibration.test_collector import batches, projection_inputs
from tests.world import collect, some_masks

H, C, TOKENS = 10, 24, 400  # outputs, channels, tokens
BY_PROJECTION = [name for name in RECOVERY if isinstance(RECOVERY[name], Projection)]


def statistics_of(x: np.ndarray) -> ChannelStatistics:
    """Statistics of activations x (tokens, C), computed without the collector."""

    def moments(part: np.ndarray) -> Moments:
        sums = (part.sum(0), (part**2).sum(0))
        return Moments(torch.tensor(float(len(part)), dtype=torch.float64), *map(torch.from_numpy, sums))

    return ChannelStatistics((moments(x[::2]), moments(x[1::2])), torch.from_numpy(x.T @ x).float())


@pytest.fixture
def problem():
    """Activations (TOKENS, C) in float64, a weight (H, C), and the keep mask of its columns."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, C)) @ rng.normal(size=(C, C)) + 0.5  # correlated, with means
    weight = torch.from_numpy(rng.normal(size=(H, C))).float()
    keep = torch.from_numpy(rng.random(C) < 0.6)
    return x, weight, keep


def solve(method: str, weight: torch.Tensor, keep: torch.Tensor, x: np.ndarray, **settings):
    return RECOVERY[method].solve(weight, keep, statistics_of(x).total, **settings)


def ridge_reference(x: np.ndarray, weight: np.ndarray, keep: np.ndarray, ridge: float) -> np.ndarray:
    """argmin_V ||X W^T - X_K V^T||^2 + lambda ||V - W_K||^2, as lstsq of the stacked rows [X_K; sqrt(lambda) I]."""
    damping = ridge * (x[:, keep] ** 2).sum(0).mean()  # mean diagonal of the Gram matrix of kept channels
    A = np.vstack([x[:, keep], np.sqrt(damping) * np.eye(keep.sum())])
    b = np.vstack([x @ weight.T, np.sqrt(damping) * weight[:, keep].T])
    return np.linalg.lstsq(A, b, rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-4, 0.3, 1e9])
def test_least_squares_equals_ridge_regression_in_numpy(problem, ridge):
    x, weight, keep = problem
    new, bias = solve("least_squares", weight, keep, x, ridge=ridge)
    expected = ridge_reference(x, weight.double().numpy(), keep.numpy(), ridge)
    assert bias is None
    assert new.dtype == weight.dtype
    np.testing.assert_allclose(new.numpy(), expected, atol=1e-3 * np.abs(expected).max())


def test_kept_channels_without_activations_keep_their_weights(problem):
    x, weight, keep = problem
    x[:, keep.nonzero()[:3, 0]] = 0.0
    new, _ = solve("least_squares", weight, keep, x)
    assert bool(torch.isfinite(new).all())
    torch.testing.assert_close(new[:, :3], weight[:, keep][:, :3])
    new, _ = solve("least_squares", weight, keep, np.zeros_like(x))
    torch.testing.assert_close(new, weight[:, keep])


@pytest.mark.parametrize("tokens", [2, 6, 10])
def test_least_squares_without_ridge_fits_fewer_tokens_than_channels(problem, tokens):
    """Without ridge, the float32 Gram matrix of few tokens is singular and may have slightly negative eigenvalues."""
    x, weight, keep = problem
    x = x[:tokens]
    new, _ = solve("least_squares", weight, keep, x, ridge=0.0)
    dense = x @ weight.double().numpy().T
    np.testing.assert_allclose(x[:, keep] @ new.double().numpy().T, dense, atol=0.01 * np.abs(dense).max())


@pytest.mark.parametrize(("channels", "tokens"), [(768, 256), (768, 2048)])
def test_least_squares_without_ridge_is_stable_with_a_massive_activation(channels, tokens):
    """Language models have channels whose activations are a few hundred times as large as those of other channels.

    The Gram matrix holds products of activations. So the float32 rounding error of the entries of a massive channel can
    exceed the entries of small channels.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator)
    x[:, 0] *= 300
    gram = torch.zeros(channels, channels)
    add_gram(gram, x)
    fill_gram(gram)
    statistics = replace(statistics_of(x.double().numpy()).total, gram_source=gram)
    weight, keep = torch.randn(8, channels, generator=generator), torch.arange(channels) < channels - 5
    new, _ = RECOVERY["least_squares"].solve(weight, keep, statistics, ridge=0.0)
    assert bool(torch.isfinite(new).all())
    remaining_error = (x @ weight.T - x[:, keep] @ new.T).norm() / (x[:, ~keep] @ weight[:, ~keep].T).norm()
    assert float(remaining_error) < 1  # better than slicing without recovery


@pytest.mark.parametrize("method", BY_PROJECTION)
def test_recoveries_keep_the_dtype_and_change_nothing_if_all_channels_are_kept(problem, method):
    x, weight, keep = problem
    new, bias = solve(method, weight, torch.ones(C, dtype=torch.bool), x)
    assert torch.equal(new, weight)
    assert bias is None or not bool(bias.any())
    new, bias = solve(method, weight.bfloat16(), keep, x)
    assert (new.dtype, new.shape) == (torch.bfloat16, (H, int(keep.sum())))
    assert bias is None or (bias.dtype, bias.shape) == (torch.bfloat16, (H,))


def test_bias_recovery_adds_the_mean_output_of_removed_channels(problem):
    x, weight, keep = problem
    new, bias = solve("bias", weight, keep, x)
    assert torch.equal(new, weight[:, keep])
    removed = ~keep.numpy()
    expected = weight.double().numpy()[:, removed] @ x.mean(0)[removed]
    np.testing.assert_allclose(bias.numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_least_squares_recovers_down_and_output_projections_of_a_model(tiny_model, token_batch):
    """Compared with ridge regression on raw activations. The masks remove neurons and whole KV groups."""
    masks = some_masks(tiny_model, attention=True)
    material = Material(tiny_model, masks, statistics=collect(tiny_model, batches(token_batch, 6), gram=True))
    raw, small = projection_inputs(tiny_model, token_batch), slice_model(tiny_model, masks)
    revise = RECOVERY["least_squares"].revise(material)
    for layers in kept_layers(tiny_model, small, masks):
        revise(*layers)
    for kind, path, channels in (("neurons", "mlp.down_proj", 1), ("kv_groups", "self_attn.o_proj", 16)):
        for b, x in enumerate(raw[kind]):
            keep = masks[f"{kind}.{b}"].repeat_interleave(channels)
            dense, recovered = (m.model.layers[b].get_submodule(path).weight.numpy() for m in (tiny_model, small))
            expected = ridge_reference(x.reshape(-1, len(keep)), dense.astype(float), keep.numpy(), material.ridge)
            np.testing.assert_allclose(recovered, expected, atol=1e-4 * np.abs(expected).max())


# --- the contract of recoveries


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(RECOVERY, "_entries", dict(RECOVERY._entries))


@pytest.mark.usefixtures("scratch_registry")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda w, k, m, r: w, r"must return a weight and a bias, which may be None; got Tensor"),
        (lambda w, k, m, r: (w[:, k], w[0]), r"a bias \(10,\) .* of floats; got \(24,\)"),
    ],
)
def test_an_invalid_result_of_a_registered_recovery_is_refused(problem, broken, message):
    x, weight, keep = problem
    recovery("broken")(broken)
    with pytest.raises(UserError, match=rf"^Recovery 'broken'.* {message}"):
        solve("broken", weight, keep, x)


def test_a_recovery_with_unknown_needs_is_refused():
    with pytest.raises(
        ValueError, match=r"needs of recovery 'mine' must be among moments, gram, text; got \['grams'\]"
    ):
        recovery("mine", needs=("grams",))


def test_a_recovery_of_experts_must_not_return_a_bias(problem):
    x, weight, keep = problem
    sums = statistics_of(x).total
    experts = Moments(sums.count.expand(2), sums.sum, sums.sum_sq)  # two experts with half of the columns each

    def slice_with_bias(weight, keep, moments, ridge):
        return weight[:, keep], torch.zeros(len(weight))

    def slice_only(weight, keep, moments, ridge):
        return weight[:, keep], None

    with_bias = Projection(slice_with_bias, needs=("moments",), experts=True)
    with_bias.name = "shifted"
    with pytest.raises(UserError, match="Recovery 'shifted' must return None as the bias of experts"):
        with_bias.solve(weight, keep, experts, experts=2)
    without_bias = Projection(slice_only, needs=("moments",), experts=True)
    assert torch.equal(without_bias.solve(weight, keep, experts, experts=2)[0], weight[:, keep])


def test_unknown_arguments_of_material_fit_are_refused():
    run = SimpleNamespace(cfg=SimpleNamespace(corpora=None, trainer=None))
    fit = fit_once(run)
    with pytest.raises(UserError, match=r"^Arguments of material\.fit must be among batch_size, .*; got max_epochs\."):
        fit("Healing", None, max_epochs=3)
