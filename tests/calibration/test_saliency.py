"""Taylor saliency: values computed by hand, and no side effects of collecting it on the model or other statistics.

`tests/importance/test_metrics.py` compares the metrics that use saliency with gradients per window.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.architectures import example
from gprune.calibration.collector import Collector
from gprune.calibration.saliency import StreamingGradients, channel_saliency, salient_parts, weight_saliency
from gprune.calibration.statistics import kind_of, pool_statistics
from gprune.errors import UserError
from gprune.models.families import decoder_layers
from tests.calibration.test_collector import batches, projection_inputs
from tests.world import collect, hooks_of, make_tiny_llama, units_of_kind

BOTH = ("ffn", "attention")


def saliency_tensors(statistics) -> dict[str, torch.Tensor]:
    return {name: t for name, t in statistics.tensors().items() if kind_of(name) == "saliency"}


def test_weight_saliency_equals_values_computed_by_hand():
    metric = StreamingGradients((2, 3))
    # One token per window: its weight gradient is the outer product of output gradient and input.
    x = torch.tensor([[[1.0, 0, 2]], [[0, 1.0, 0]], [[1.0, 1, 1]]])
    d = torch.tensor([[[1.0, -1]], [[2.0, 0]], [[100.0, 100]]])
    metric.update(x, d, [0, 1, None])  # the last window does not count
    count, gradient = metric.compute()
    assert count.tolist() == [1, 1]
    assert gradient.tolist() == [[[1, 0, 2], [-1, 0, -2]], [[0, 2, 0], [0, 0, 0]]]
    w = torch.tensor([[1.0, 2, -1], [4.0, 5, 1]])
    first, second, whole = weight_saliency(w, count, gradient, columns=False)
    assert first.tolist() == [3, 6]  # w * g = [[1, 0, -2], [-4, 0, -2]]
    assert second.tolist() == [4, 0]
    assert whole.tolist() == [3.5, 3]  # w * mean g = [[.5, 2, -1], [-2, 0, -1]]
    by_column = weight_saliency(w, count, gradient, columns=True)[2]
    assert by_column.tolist() == [2.5, 2, 2]
    assert by_column.dtype == torch.float64


def test_saliency_of_a_half_without_windows_is_zero():
    metric = StreamingGradients((2, 3))
    metric.update(torch.ones(1, 4, 3), torch.ones(1, 4, 2), [0])
    first, second, whole = weight_saliency(torch.ones(2, 3), *metric.compute(), columns=False)
    assert torch.equal(second, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(first, whole)


def test_pooled_saliency_is_the_mean_over_corpora(tiny_model, token_batch):
    other = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(2))
    parts = [collect(tiny_model, batches(tokens, 3), saliency=BOTH) for tokens in (token_batch, other, token_batch[:2])]
    pooled = saliency_tensors(pool_statistics(iter(parts)))
    of_corpora = [saliency_tensors(part) for part in parts]
    assert pooled.keys() == of_corpora[0].keys()
    for name, value in pooled.items():
        mean = np.mean([tensors[name].numpy() for tensors in of_corpora], axis=0)
        np.testing.assert_allclose(value.numpy(), mean, rtol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "dtype"), [({"head_dim": 12}, torch.float32), ({"tie_word_embeddings": False}, torch.bfloat16)]
)
def test_collecting_saliency_does_not_change_other_statistics(overrides, dtype, token_batch):
    model, text = make_tiny_llama(**overrides).to(dtype), list(batches(token_batch[:, :29], 4))
    plain = collect(model, text, gram=True).tensors()
    both = collect(model, text, gram=True, saliency=BOTH).tensors()
    assert all(bool(torch.isfinite(value).all()) for value in both.values())
    for saliency in (("ffn",), ("attention",)):
        alone = collect(model, text, gram=True, saliency=saliency).tensors()
        assert all(torch.equal(alone[name], value) for name, value in plain.items())
        assert all(torch.equal(both[name], value) for name, value in alone.items())
        assert all(kind_of(name) == "saliency" for name in alone.keys() - plain.keys())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_saliency_does_not_depend_on_the_callers_gradient_mode(tiny_model, token_batch, mode):
    expected = collect(tiny_model, batches(token_batch, 4), saliency=BOTH).tensors()
    with Collector(tiny_model, saliency=BOTH) as collector, mode():
        for batch in batches(token_batch.clone(), 4):  # cloned here, so inference tensors in inference mode
            collector.observe(batch["input_ids"], batch["index"] % 2)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    tensors = collector.compute().tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_collecting_saliency_leaves_the_model_unchanged(tiny_model, token_batch):
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    logits = tiny_model(token_batch).logits
    with Collector(tiny_model, saliency=BOTH) as collector:
        collector.observe(token_batch, torch.zeros(6, dtype=torch.long))
        assert not any(p.requires_grad for p in tiny_model.parameters())
        assert all(p.grad is None for p in tiny_model.parameters())
    assert hooks_of(tiny_model) == 0
    assert not tiny_model.training
    assert not any(p.requires_grad or p.grad is not None for p in tiny_model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters())
    logits_after = tiny_model(token_batch).logits
    assert not logits_after.requires_grad  # the embedding's output no longer requires a gradient
    assert torch.equal(logits_after, logits)


def test_an_exception_in_the_backward_pass_leaves_no_hooks_and_no_gradients(tiny_model, token_batch):
    class StopError(RuntimeError):
        pass

    def stop(*_):
        raise StopError

    layer = tiny_model.model.layers[1]
    handle = layer.register_forward_hook(lambda _m, _i, output: output.register_hook(stop) and None)
    with pytest.raises(StopError):
        collect(tiny_model, batches(token_batch, 3), gram=True, saliency=BOTH)
    handle.remove()
    assert hooks_of(tiny_model) == 0
    assert not any(p.requires_grad or p.grad is not None for p in tiny_model.parameters())
    assert not tiny_model(token_batch).logits.requires_grad


def test_a_non_finite_gradient_raises_a_user_error(token_batch):
    model = make_tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight.data *= 1e38  # the logits overflow, the inputs of the projections do not
    assert all(np.isfinite(x).all() for x in projection_inputs(model, token_batch)["neurons"])
    assert collect(model, batches(token_batch, 6)).channels["neurons.0"].total.count == 192
    with pytest.raises(UserError, match=r"non-finite gradient.*--model\.dtype float32"):
        collect(model, batches(token_batch, 6), saliency=BOTH)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "deepseek_v3"])
def test_saliency_counts_every_row_of_a_head(model_type):
    """One type has a gate per query row, the other has key heads larger than value heads.

    Every row counts for a channel, so that the saliency of all channels sums to that of all weights.
    """
    model = example(model_type)
    u = next(u for u in units_of_kind(model, "kv_groups") if u.count)
    layer = decoder_layers(model)[u.layer]
    generator, total, gradients = torch.Generator().manual_seed(0), torch.zeros(()), []
    for part in salient_parts(u, layer):
        weight = part.weight(layer)
        gradient = torch.randn(weight.shape, generator=generator)
        sums = torch.ones(2), torch.stack([gradient, gradient])  # of a single window
        gradients.append(SimpleNamespace(compute=lambda sums=sums: sums))
        total = total + (weight * gradient).abs().double().sum()
    whole = channel_saliency(u, layer, gradients)[2]
    assert whole.shape == (layer.get_submodule(u.reads).in_features,)
    torch.testing.assert_close(whole.sum(), total, rtol=1e-6, atol=0)
    rows = {name: len(indices) for s in u.slices[:-1] for name, indices in s.parts}
    assert rows["query"] > len(whole) or rows["key"] > rows["value"]
