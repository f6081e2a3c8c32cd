"""Perplexity against a float64 cross-entropy in NumPy, and confidence intervals of ratios, gaps and means."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.evaluation.intervals import (
    geometric_mean,
    mean_per_token,
    mean_perplexity,
    paired_difference,
    paired_gap,
    paired_ratio,
)  # fmt: skip
from gprune.evaluation.perplexity import Forecast, perplexity
from tests.world import make_tiny, make_tiny_llama


def nll_in_float64(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Cross-entropy (B, T) in nats."""
    z = logits.double().numpy()
    top = z.max(-1, keepdims=True)
    log_z = top[..., 0] + np.log(np.exp(z - top).sum(-1))
    return log_z - np.take_along_axis(z, targets.numpy()[..., None], -1)[..., 0]


def windows_of(tokens: torch.Tensor) -> Windows:
    return Windows("demo", "test", tokens)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_perplexity_is_exp_of_the_float64_cross_entropy(tiny_model, token_batch, batch_size):
    nll = nll_in_float64(tiny_model(token_batch).logits[:, :-1], token_batch[:, 1:])
    result = perplexity(tiny_model, windows_of(token_batch), batch_size=batch_size)
    assert result.tokens == 6 * 31
    assert result.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    np.testing.assert_allclose(result.window_nll, nll.sum(1), rtol=1e-6)


def test_extreme_logits_do_not_underflow_to_infinity(token_batch):
    model = make_tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight.data *= 15
    logits, targets = model(token_batch).logits[:, :-1], token_batch[:, 1:]
    nll = nll_in_float64(logits, targets)
    assert nll.max() > 100
    assert nll.mean() < 700
    result = perplexity(model, windows_of(token_batch))
    assert result.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-3)


def test_bfloat16_logits_are_not_summed_in_bfloat16(token_batch):
    model = make_tiny_llama().bfloat16()
    nll = nll_in_float64(model(token_batch).logits[:, :-1].float(), token_batch[:, 1:])
    assert perplexity(model, windows_of(token_batch)).nll == pytest.approx(nll.mean(), rel=5e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])  # plain logits, soft-capped logits, scaled logits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_and_agreement_with_the_dense_model_equal_float64(family, dtype):
    """Seven windows, in batches of another size than the dense model's. The distance to itself is zero."""
    generator = torch.Generator().manual_seed(4)
    windows = windows_of(torch.randint(3, 128, (7, 32), generator=generator))
    dense, other = (make_tiny(family).to(dtype) for _ in range(2))
    for layer in other.get_decoder().layers:
        layer.mlp.down_proj.weight.data *= 1 + torch.rand(layer.mlp.down_proj.weight.shape, generator=generator)
    if family == "llama":
        for model in (dense, other):
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 128, dtype=dtype), requires_grad=False)
    log_q, log_p = (m(windows.tokens).logits[:, :-1].double().log_softmax(-1) for m in (dense, other))
    kl, same = (log_q.exp() * (log_q - log_p)).sum(-1), log_q.argmax(-1) == log_p.argmax(-1)
    # The first evaluation with `forecasts` fills the list. Later evaluations are compared with it.
    forecasts: list[Forecast] = []
    of_dense = perplexity(dense, windows, batch_size=3, forecasts=forecasts)
    assert of_dense == perplexity(dense, windows, batch_size=3)
    assert of_dense.kl is None
    assert all((f.rest is None) == (family == "gemma2") for f in forecasts)
    of_other = perplexity(other, windows, batch_size=2, forecasts=forecasts)
    without_distance = replace(of_other, kl=None, window_kl=None, agreement=None, window_agreement=None)
    assert without_distance == perplexity(other, windows, batch_size=2)
    # In bfloat16 the reference has rounded logits, but the expectation under the dense model uses unrounded ones.
    rtol = 1e-4 if dtype == torch.float32 or family == "gemma2" else 1e-2
    np.testing.assert_allclose(of_other.window_kl, kl.sum(1), rtol=rtol)
    assert of_other.window_agreement == same.sum(1).tolist()
    means = kl.mean().item(), same.double().mean().item()
    assert (of_other.kl, of_other.agreement) == pytest.approx(means, rel=rtol)
    assert of_other.kl > 1e-3
    to_itself = perplexity(dense, windows, batch_size=3, forecasts=forecasts)
    assert (to_itself.kl, to_itself.agreement) == (pytest.approx(0, abs=1e-9), 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_raises_a_user_error(tiny_model, token_batch, bad):
    tiny_model.model.norm.weight.data[3] = bad
    with pytest.raises(UserError, match="non-finite loss"):
        perplexity(tiny_model, windows_of(token_batch))


def test_a_perplexity_that_overflows_float64_raises_a_user_error(token_batch):
    model = make_tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight.data *= 1e4  # thousands of nats per token: exp overflows
    with pytest.raises(UserError, match=r"must be at most 700 nats per token; got \d+"):
        perplexity(model, windows_of(token_batch))


def test_geometric_mean_of_known_values_without_overflow():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4)
    assert geometric_mean([7.0]) == pytest.approx(7)
    assert math.isnan(geometric_mean([]))
    assert geometric_mean([1e200, 1e200]) == pytest.approx(1e200)  # no intermediate overflow


def test_the_interval_of_a_gap_equals_that_of_two_independent_ratios():
    generator = np.random.default_rng(0)
    dense = {c: generator.normal(90, 9, 300).tolist() for c in "abcd"}
    pruned = {c: (np.array(v) + generator.normal(12 if c in "ab" else 6, 5, 300)).tolist() for c, v in dense.items()}
    seen = {c: c == "d" for c in dense}
    gap, low, high = paired_gap(pruned, dense, seen, 31)
    ratios = {c: math.exp((np.mean(pruned[c]) - np.mean(dense[c])) / 31) for c in dense}
    expected = geometric_mean(ratios[c] for c in "abc") / ratios["d"]
    assert gap == pytest.approx(expected, rel=1e-12)
    differences = {c: (np.array(pruned[c]) - np.array(dense[c])) / 31 for c in dense}
    variance = {c: d.var(ddof=1) / len(d) for c, d in differences.items()}
    spread = 1.96 * math.sqrt((variance["a"] + variance["b"] + variance["c"]) / 9 + variance["d"])
    assert math.log(high / low) / 2 == pytest.approx(spread, rel=0.05)
    assert all(math.isnan(paired_gap(pruned, dense, dict.fromkeys(dense, same), 31)[0]) for same in (True, False))


def test_paired_ratio_is_the_ratio_of_geometric_means_and_is_deterministic():
    rng = np.random.default_rng(0)
    a, b = ({c: rng.uniform(50, 150, n).tolist() for c, n in (("x", 12), ("y", 5))} for _ in range(2))

    def geometric(nll):
        return geometric_mean(math.exp(np.mean(v) / 31) for v in nll.values())

    ratio, low, high = paired_ratio(a, b, 31)
    assert ratio == pytest.approx(geometric(a) / geometric(b), rel=1e-12)
    assert low < ratio < high
    assert paired_ratio(a, b, 31) == (ratio, low, high)
    assert paired_ratio(a, a, 31) == (1.0, 1.0, 1.0)
    # Swapping the models inverts the ratio.
    assert paired_ratio(b, a, 31)[0] == pytest.approx(1 / ratio, rel=1e-12)


def test_the_interval_of_a_ratio_uses_paired_windows():
    # Windows differ a lot, but the models differ by nearly the same amount on each, so a paired interval is narrow.
    rng = np.random.default_rng(1)
    base = rng.uniform(50, 500, 40)
    a, b = {"x": (base + 3.1 + 0.05 * rng.normal(size=40)).tolist()}, {"x": base.tolist()}
    ratio, low, high = paired_ratio(a, b, 31)
    assert ratio == pytest.approx(math.exp(0.1), rel=2e-3)
    assert high - low < 0.003


def test_perplexity_shared_by_several_ranks_has_the_bits_of_one_process(tiny_model, monkeypatch):
    """Seven windows in batches of two: the first of three ranks has two batches, the last one of a single window."""
    windows = Windows("text", "test", torch.randint(3, 128, (7, 16), generator=torch.Generator().manual_seed(2)))
    dense: list[Forecast] = []
    perplexity(make_tiny_llama(initializer_range=0.2), windows, forecasts=dense)
    expected = perplexity(tiny_model, windows, batch_size=2, forecasts=dense)
    windows_of_rank = ([0, 1, 6], [2, 3], [4, 5])
    distributed, sent, passes = torch.distributed, {}, []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    tiny_model.lm_head.register_forward_hook(lambda *_: passes.append(distributed.get_rank()))

    def fake_gather(parts, own):
        sent[distributed.get_rank()] = own
        parts[:] = [sent.get(rank, [torch.zeros(2, 3), torch.zeros(1, 3)]) for rank in range(3)]

    monkeypatch.setattr(distributed, "all_gather_object", fake_gather)
    for rank in (2, 1, 0):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        forecasts = [dense[i] for i in windows_of_rank[rank]]
        result = perplexity(tiny_model, windows, batch_size=2, shared=True, forecasts=forecasts)
    assert [[len(nll) for nll in sent[rank]] for rank in range(3)] == [[2, 1], [2], [2]]
    assert result == expected
    assert sorted(passes) == [0] * 3 + [1] * 3 + [2] * 3  # one per window; the last of ranks 1 and 2 is padding
    assert perplexity(tiny_model, windows, batch_size=2, forecasts=dense) == expected  # without `shared`, no gather


def test_the_standard_error_of_a_paired_difference_is_that_of_the_pairs():
    rng = np.random.default_rng(2)
    a = rng.random(400) < 0.5
    b = np.where(rng.random(400) < 0.05, ~a, a)  # mostly the same answers
    difference, error = paired_difference(a.tolist(), b.tolist())
    assert difference == pytest.approx(a.mean() - b.mean(), abs=1e-14)
    assert error == pytest.approx((a.astype(int) - b.astype(int)).std(ddof=1) / 20, rel=1e-12)
    assert error < 0.5 * a.std() / 20  # the pairs agree mostly, so the error is below that of two independent samples
    assert paired_difference([True], [False]) == (1.0, None)


def test_the_interval_of_one_corpus_is_students_t_interval():
    values = np.random.default_rng(3).normal(100, 20, 30)
    expected = stats.t.interval(0.95, 29, loc=values.mean() / 31, scale=stats.sem(values) / 31)
    interval = mean_perplexity({"x": values.tolist()}, 31)
    np.testing.assert_allclose(np.log(interval), [values.mean() / 31, *expected], rtol=1e-12)


def test_the_interval_of_two_corpora_is_welchs_interval():
    rng = np.random.default_rng(4)
    a, b = rng.normal(100, 20, 7), rng.normal(90, 5, 12)
    welch = stats.ttest_ind(a / 31, b / 31, equal_var=False).confidence_interval(0.95)
    zero = {"a": [0.0] * 7, "b": [0.0] * 12}
    _, low, high = paired_gap({"a": a.tolist(), "b": b.tolist()}, zero, {"a": False, "b": True}, 31)
    np.testing.assert_allclose(np.log([low, high]), [welch.low, welch.high], rtol=1e-9)


def test_a_single_window_of_a_corpus_gives_no_interval():
    """Its variance cannot be estimated. Equal windows have a variance of 0."""
    assert mean_perplexity({"x": [31.0], "y": [31.0]}, 31) == (math.exp(1), None, None)
    assert mean_perplexity({"x": [31.0], "y": [20.0, 42.0]}, 31) == (math.exp(1), None, None)
    assert paired_ratio({"x": [31.0]}, {"x": [0.0]}, 31) == (math.exp(1), None, None)
    assert mean_per_token({"x": [31.0]}, 31) == (1.0, None, None)
    assert mean_perplexity({"x": [31.0, 31.0]}, 31) == (math.exp(1),) * 3


def test_intervals_of_kl_and_agreement_stay_in_their_range():
    kl = {"x": [10.0, 70.0], "y": [31.0, 31.0]}
    mean, low, high = mean_per_token(kl, 31)
    assert (low, mean) == (0.0, pytest.approx(71 / 62))
    assert high == pytest.approx(2 * mean - mean_per_token(kl, 31, smallest=-math.inf)[1])  # the end is not moved
    assert mean_per_token({"x": [1.0, 31.0]}, 31, largest=1.0)[1:] == (0.0, 1.0)
    negative = {"x": [-62.0, -62.0, -31.0]}
    assert mean_perplexity(negative, 31)[1] < math.exp(-5 / 3)  # a ratio of perplexities may be below 1


def test_an_interval_beyond_the_largest_float_ends_at_a_number_that_records_can_store():
    nll = {"x": [250.0 * 31, 350.0 * 31]}
    value, low, high = mean_perplexity(nll, 31)
    assert (value, high) == (pytest.approx(math.exp(300)), 1e300)
    assert low == pytest.approx(0)
    zero = {"x": [0.0, 0.0], "y": [0.0, 0.0]}
    assert paired_gap(nll | {"y": [0.0, 0.0]}, zero, {"x": False, "y": True}, 31)[2] == 1e300
