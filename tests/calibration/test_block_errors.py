"""Errors of blocks by width, weighted by squared gradients, compared with computations token by token in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gprune.calibration import block_errors as errors_module
from gprune.calibration.block_errors import LEVELS, block_errors, errors_by_width, tokens_with_gradients
from gprune.importance.scores import fractional_ranks, score_units
from gprune.models.families import decoder_layers
from gprune.models.units import units_of
from gprune.sparsity.allocation import ALLOCATION, allocate
from gprune.sparsity.budget import budget_of
from gprune.sparsity.price import price_of
from tests.calibration.test_collector import batches
from tests.world import by_key, collect, hooks_of, make_tiny_llama


@pytest.fixture(scope="module")
def measured():
    """A tiny model, tokens, statistics with Gram matrices, and `act_norm` scores."""
    model = make_tiny_llama()
    tokens = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1))
    statistics = collect(model, batches(tokens, 6), gram=True)
    return model, tokens, statistics, score_units("act_norm", model, statistics)


def reference(weight, x, energy, ridge, floor):
    """Errors of the first K neurons, by width K, token by token in float64.

    Args:
        floor: minimum of the damping, as a share of the trace of the Gram matrix.
    """
    N, gram, errors = x.shape[1], x.T @ x, []
    damping = max(max(ridge, floor * N) * float(gram.diagonal().mean()), 1e-15)
    for level in range(LEVELS + 1):
        K = level * N // LEVELS
        inverse = torch.linalg.pinv(gram[:K, :K] + damping * torch.eye(K, dtype=torch.float64), hermitian=True)
        solved = weight[:, :K] + (weight[:, K:] @ gram[K:, :K]) @ inverse
        residual = x @ weight.T - x[:, :K] @ solved.T
        errors.append(float((residual.square().sum(1) * energy).mean()))
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize(
    "case", ["regular", "idle neurons", "all idle", "fewer tokens than neurons", "equal neurons", "one token"]
)
def test_errors_also_of_singular_gram_matrices_equal_damped_least_squares_token_by_token(case, ridge):
    generator = torch.Generator().manual_seed(0)
    tokens = {"fewer tokens than neurons": 7, "one token": 1}.get(case, 100)
    weight, x = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((5, 32), (tokens, 32)))
    energy = torch.rand(tokens, generator=generator, dtype=torch.float64)
    if case == "idle neurons":
        x[:, ::3] = 0
    if case == "all idle":
        x[:] = 0
    if case == "equal neurons":
        x[:, 1::2] = x[:, ::2]
    errors = errors_by_width(weight, (x.T @ x).float(), x, energy, ridge=ridge)
    expected = reference(weight, x, energy, ridge, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-6 * float(expected[0]))


def test_errors_in_bfloat16_are_close_to_float32_which_is_used_if_a_loss_overflows(measured, monkeypatch, caplog):
    model, tokens, statistics, scores = measured
    exact = block_errors(model, scores, statistics, tokens.split(2))
    errors = block_errors(model, scores, statistics, tokens.split(2), bfloat16=True)
    assert hooks_of(model) == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(errors, exact)
    torch.testing.assert_close(errors, exact, rtol=0.05, atol=0)
    losses = errors_module.next_token_losses

    def overflowing(*args):
        return losses(*args) * (torch.inf if torch.is_autocast_enabled("cpu") else 1)

    monkeypatch.setattr(errors_module, "next_token_losses", overflowing)
    assert torch.equal(block_errors(model, scores, statistics, tokens.split(2), bfloat16=True), exact)
    assert caplog.text.count("not finite in bfloat16") == 1


def test_energies_are_squared_gradients_of_each_windows_loss(measured):
    model, tokens, *_ = measured
    inputs_and_energies = tokens_with_gradients(model, tokens.split(2))
    assert hooks_of(model) == 0
    # The reference adds zeros to the output of each FFN and takes their gradient.
    exact = make_tiny_llama().double()
    added = [torch.zeros(6, 32, 32, dtype=torch.float64, requires_grad=True) for _ in exact.model.layers]
    inputs = []
    for layer, shift in zip(exact.model.layers, added, strict=True):
        layer.mlp.down_proj.register_forward_hook(lambda _m, i, o, shift=shift: (inputs.append(i[0]), o + shift)[1])
    logits = exact(input_ids=tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").div(31).backward()
    for (x, energy), shift, entered in zip(inputs_and_energies.values(), added, inputs, strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.double(), entered.flatten(0, 1).detach(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(energy.double(), shift.grad.flatten(0, 1).square().sum(1), rtol=1e-3, atol=1e-12)


def convex_errors(steps: torch.Tensor) -> torch.Tensor:
    """Errors by width, (blocks, LEVELS + 1), from the decrease of the error by each step of the width."""
    return torch.cat([steps.flip(1).cumsum(1).flip(1), torch.zeros(len(steps), 1, dtype=torch.float64)], 1)


def test_idle_neurons_with_few_tokens_still_give_masks_that_meet_the_budget():
    """All neurons of block 0 are idle and a third of block 1, and Gram matrices of so few tokens are singular."""
    model, tokens = make_tiny_llama(), torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(1))
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.model.layers[1].mlp.up_proj.weight.data[::3] = 0
    statistics = collect(model, batches(tokens, 2), gram=True)
    scores = score_units("act_norm", model, statistics)
    errors = block_errors(model, scores, statistics, [tokens], ridge=0.0)
    assert errors.isfinite().all()
    assert (errors[0] == 0).all()
    assert errors[1, 0] > errors[1, LEVELS // 2] >= 0
    statistics = replace(statistics, errors=errors)
    budget = budget_of(units_of(model), 1 / 3, scope="ffn")
    masks = allocate("reconstruction", scores, statistics, decoder_layers(model), budget, strength=1.0)
    widths = [int(keep.sum()) for keep in masks.ffn]
    assert sum(widths) == 2 * 48
    assert widths[0] == 1  # a block without error is pruned first
    assert masks.ffn[1][1::3].all()  # block 1 loses only idle neurons


def reconstruction_shares(errors, costs, protected, target, strength) -> list[float]:
    """S_b of each block by plain loops, from convex errors (blocks, LEVELS + 1) and the costs of a neuron."""
    N = 48
    share = target / sum(cost * N for cost in costs)
    open_blocks = [b for b in range(len(costs)) if b not in protected]
    prices = []
    for b in open_blocks:
        logs = [math.log(errors[b][level] - errors[b][level + 1]) for level in range(LEVELS)]
        for neuron in range(N):  # in order of width
            log_slope = np.interp((neuron + 0.5) / N, [(level + 0.5) / LEVELS for level in range(LEVELS)], logs)
            prices.append((math.exp(log_slope) / costs[b], b))
    cheapest, total = dict.fromkeys(open_blocks, 0), 0.0
    for _, b in sorted(prices):
        if total + costs[b] / 2 >= target:
            break
        cheapest[b] += 1
        total += costs[b]
    mean = target / sum(costs[b] * N for b in open_blocks)
    return [share if b in protected else mean + strength * (cheapest[b] / N - mean) for b in range(len(costs))]


@pytest.mark.parametrize("protected", [[], [0]])
@pytest.mark.parametrize("strength", [0.0, 0.3, None, 1.0])
def test_reconstruction_equals_its_formula_in_plain_loops(strength, protected, measured):
    """Neurons of the blocks cost 3, 1 and 2. The default strength is 0.75."""
    model, _, statistics, scores = measured
    units, costs = units_of(model), [3, 1, 2]
    steps = torch.rand(3, LEVELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = convex_errors((0.1 + steps).sort(1, descending=True).values)
    price, _ = price_of(by_key(costs, [1] * 3) | {f"layer.{b}": 999 for b in range(3)}, units)
    budget = budget_of(units, 0.4, scope="ffn", protect=protected, price=price)
    options = {} if strength is None else {"strength": strength}
    statistics = replace(statistics, errors=errors)
    margins = ALLOCATION["reconstruction"](scores, statistics, decoder_layers(model), budget, **options)
    strength = 0.75 if strength is None else strength
    expected = reconstruction_shares(errors.tolist(), costs, protected, budget.target, strength)
    for key, share in by_key(expected).items():
        torch.testing.assert_close(margins[key], fractional_ranks(scores[key]) - share, rtol=0, atol=1e-12)


def test_errors_are_those_of_removing_the_lowest_scores_first(measured):
    model, tokens, statistics, scores = measured
    given = {key: -s for key, s in scores.items()}  # not in the order of the errors
    errors = block_errors(model, given, statistics, tokens.split(2), ridge=0.01)
    inputs = tokens_with_gradients(model, tokens.split(2))
    for b, (layer, errors_of_block) in enumerate(zip(model.model.layers, errors, strict=True)):
        of_block = given[f"neurons.{b}"].tolist()
        kept_longest_first = [i for _, i in sorted((-score, i) for i, score in enumerate(of_block))]
        x, energy = (tensor.double() for tensor in inputs[f"neurons.{b}"])
        weight = layer.mlp.down_proj.weight.double()
        expected = reference(weight[:, kept_longest_first], x[:, kept_longest_first], energy, 0.01, 0.0)
        torch.testing.assert_close(errors_of_block, expected, rtol=0.03, atol=1e-12)
