"""Streaming statistics against raw activations, recorded by hooks of the tests and summed by NumPy in float64."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch

from gprune.calibration import EXTRAS
from gprune.calibration.moments import StreamingCosineChange, StreamingMoments
from gprune.calibration.statistics import CorpusStatistics, Moments, kind_of, pool_statistics
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.stages.calibration import CalibrationStage
from gprune.units.structure import of_kind
from tests.world import by_key, collect, hooks_of, make_tiny_llama

KINDS = {"neurons": lambda layer: layer.mlp.down_proj, "kv_groups": lambda layer: layer.self_attn.o_proj}


def projection_inputs(model, tokens: torch.Tensor) -> dict[str, list[np.ndarray]]:
    """Inputs of the projections by kind: per block (windows, T, C) in float64."""
    inputs: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    handles = [
        part(layer).register_forward_hook(lambda _m, x, _y, kind=kind: inputs[kind].append(x[0].double().numpy()))
        for kind, part in KINDS.items()
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return inputs


def cosine_distances(model, tokens: torch.Tensor) -> np.ndarray:
    """1 - cosine similarity of each decoder layer's input and output, (blocks, windows, T) in float64."""
    distances = []

    def hook(_module, args, kwargs, output):
        before, after = (t.double().numpy() for t in (args[0] if args else kwargs["hidden_states"], output))
        distances.append(1 - (before * after).sum(-1) / np.sqrt((before**2).sum(-1) * (after**2).sum(-1)))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return np.stack(distances)


def batches(tokens: torch.Tensor, size: int, start: int = 0):
    """Yield batches of `size` windows, whose indices in the corpus begin at `start`."""
    for first in range(0, len(tokens), size):
        part = tokens[first : first + size]
        yield {"input_ids": part, "index": start + first + torch.arange(len(part))}


def assert_moments(moments: Moments, x: np.ndarray, rtol: float = 1e-6) -> None:
    """Compare moments with x (windows, T, C). Signed sums cancel, so their errors are relative to sums of absolutes."""
    x = x.reshape(-1, x.shape[-1])
    assert float(moments.count) == len(x)
    scale = np.abs(x).sum(0)
    assert (np.abs(moments.sum.numpy() - x.sum(0)) <= rtol * scale).all()
    np.testing.assert_allclose(moments.sum_sq.numpy(), (x**2).sum(0), rtol=rtol)
    np.testing.assert_allclose(moments.variance.numpy(), x.var(0), rtol=1e-5, atol=1e-6 * (x**2).mean())


@pytest.mark.parametrize("size", [1, 4, 6])
def test_moments_and_gram_matrices_equal_those_of_raw_activations(size, tiny_model, token_batch):
    """Of the windows of each half, in batches of any size. A window of weight 0 does not count."""
    raw, half = projection_inputs(tiny_model, token_batch), torch.tensor([0, 0, 0, 1, 0, 1])
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    parts = zip(token_batch.split(size), half.split(size), weight.split(size), strict=True)
    text = [dict(zip(("input_ids", "half", "weight"), part, strict=True)) for part in parts]
    statistics, counted = collect(tiny_model, text, gram=True), weight.bool()
    for kind in KINDS:
        for channel, x in zip(of_kind(statistics.channels, kind), raw[kind], strict=True):
            for h in (0, 1):
                assert_moments(channel.halves[h], x[(half == h) & counted])
            assert_moments(channel.total, x[counted])
            assert channel.total.sum.dtype == torch.float64
            flat = x[counted].reshape(-1, x.shape[-1])
            gram = flat.T @ flat
            np.testing.assert_allclose(channel.gram.numpy(), gram, rtol=0, atol=2e-6 * np.abs(gram).max())
    # Neurons are distinguished from attention channels, and blocks from each other.
    assert {key: len(c.total.sum) for key, c in statistics.channels.items()} == by_key([48] * 3, [32] * 3)
    first, second, _ = of_kind(statistics.channels, "neurons")
    assert not torch.allclose(first.total.sum, second.total.sum)


def test_pooled_statistics_equal_those_of_concatenated_corpora(tiny_model, token_batch):
    other = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(2))
    pool = pool_statistics(collect(tiny_model, batches(tokens, 3), gram=True) for tokens in (token_batch, other))
    raw = projection_inputs(tiny_model, torch.cat([token_batch, other]))["neurons"]
    for channel, x in zip(of_kind(pool.channels, "neurons"), raw, strict=True):
        for h in (0, 1):  # the first corpus has an even number of windows, so windows of the second alternate as well
            assert_moments(channel.halves[h], x[h::2])
        flat = x.reshape(-1, x.shape[-1])
        np.testing.assert_allclose(channel.gram.numpy(), flat.T @ flat, rtol=0, atol=1e-5 * (flat**2).sum(0).max())


def test_pooled_statistics_have_only_extras_that_all_corpora_have(tiny_model, token_batch):
    extras = ({"gram": True, "saliency": ("ffn", "attention")}, {"saliency": ("ffn",)})
    pool = pool_statistics([collect(tiny_model, batches(token_batch, 6), **extra) for extra in extras])
    assert all(channel.gram is None for channel in pool.channels.values())
    assert {key for key, channel in pool.channels.items() if channel.saliency} == {f"neurons.{b}" for b in range(3)}


def test_influence_is_the_mean_cosine_distance_of_raw_hidden_states(tiny_model, token_batch):
    statistics = collect(tiny_model, batches(token_batch, 4))
    expected = cosine_distances(tiny_model, token_batch)
    np.testing.assert_allclose(statistics.influence.numpy(), expected.mean((1, 2)), rtol=1e-6)
    assert statistics.influence.dtype == torch.float64
    assert len(set(statistics.influence.tolist())) == 3


def test_influence_is_2_for_reversed_and_1_for_zero_hidden_states_per_token():
    change, x = StreamingCosineChange(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    change.update(x, -3 * x, torch.ones(2))
    assert float(change.compute()) == pytest.approx(2 * 10, rel=1e-6)
    change.update(torch.zeros(1, 5, 8), x[:1], torch.ones(1))
    assert float(change.compute()) == pytest.approx(2 * 10 + 5, rel=1e-6)


def test_collecting_does_not_run_the_language_model_head(tiny_model, token_batch):
    tiny_model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the language-model head was run"))
    collect(tiny_model, batches(token_batch, 6))


@pytest.mark.parametrize(("gram", "saliency"), [(False, ()), (True, ("ffn",)), (False, ("ffn", "attention"))])
def test_statistics_round_trip_through_tensors_in_any_order(gram, saliency):
    model = make_tiny_llama(num_hidden_layers=11)  # more than ten layers, since "10" sorts before "2"
    flat = collect(model, batches(torch.arange(3, 19).view(2, 8), 2), gram=gram, saliency=saliency).tensors()
    # One tensor of influences. For neurons and channels of each of eleven blocks: count, sum and sum of squares of two
    # halves, and optionally a Gram matrix, or three tensors of saliency.
    assert len(flat) == 1 + 2 * 11 * (2 * 3 + gram) + len(saliency) * 11 * 3
    statistics = CorpusStatistics.from_tensors({name: flat[name].clone() for name in sorted(flat)})
    tensors = statistics.tensors()
    assert flat.keys() == tensors.keys()
    assert all(torch.equal(flat[name], tensors[name]) for name in flat)
    channels = statistics.channels["kv_groups.1"]
    for part in (channels.total, channels.half(1)):
        assert (part.saliency is not None) == ("attention" in saliency)


def test_each_tensor_has_one_kind_and_moments_combine_with_separately_collected_extras(tiny_model, token_batch):
    extras = {"gram": True, "saliency": ("ffn", "attention")}
    full = collect(tiny_model, batches(token_batch, 6), **extras).tensors()
    by_kind = {kind: {n: t for n, t in full.items() if kind_of(n) == kind} for kind in ("moments", *EXTRAS)}
    assert sum(map(len, by_kind.values())) == len(full)
    plain = collect(tiny_model, batches(token_batch, 6)).tensors()
    assert by_kind["moments"].keys() == plain.keys()  # as cached by a pass without extras
    for extra in extras:
        alone = collect(tiny_model, batches(token_batch, 6), **{extra: extras[extra]}).tensors()
        together = CorpusStatistics.from_tensors(by_kind["moments"] | by_kind[extra]).tensors()
        assert together.keys() == alone.keys()
        assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_non_finite_activation_raises_a_user_error(tiny_model, token_batch, bad):
    tiny_model.model.layers[1].mlp.up_proj.weight.data[7, 3] = bad
    with pytest.raises(UserError, match=r"non-finite activation.*--model\.dtype float32"):
        collect(tiny_model, batches(token_batch, 6))


def test_bfloat16_activations_are_summed_in_higher_precision():
    # 4096 tokens of 1 + 2^-7, which is exact in bfloat16. A bfloat16 sum would stop growing at 256.
    x = torch.full((2, 2048, 3), 1 + 2**-7, dtype=torch.bfloat16)
    metric = StreamingMoments(3)
    metric.update(x, torch.tensor([0, 1]), torch.ones(2))
    sums = metric.compute()
    assert torch.equal(sums["sum"], torch.full((2, 3), 2048 * (1 + 2**-7), dtype=torch.float64))
    assert torch.equal(sums["count"], torch.tensor([2048.0, 2048.0], dtype=torch.float64))


def test_a_stage_that_fails_leaves_no_hooks(tiny_model, token_batch):
    class BrokenError(Exception):
        pass

    def broken(*_):
        raise BrokenError

    stage = CalibrationStage(tiny_model, ["a"])
    windows = Windows("a", "train", token_batch, False)
    data = CorpusDataModule(test=[windows], batch_size=4, seed=0)
    handle = tiny_model.model.norm.register_forward_hook(broken)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(BrokenError):
        trainer.test(stage, data, verbose=False)
    handle.remove()
    assert hooks_of(tiny_model) == 0
