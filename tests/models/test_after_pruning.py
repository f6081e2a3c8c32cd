"""Taylor saliency of the channels of discovered types."""

from __future__ import annotations

import pytest
import torch

from experiments.architectures import example
from gprune.calibration.saliency import channel_saliency
from gprune.models.blocks import blocks_of

IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))


class FixedGradients:
    """`StreamingGradients` with the gradient of a single window."""

    def __init__(self, gradient: torch.Tensor):
        self.gradient = gradient

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([1.0, 1.0]), torch.stack([self.gradient, self.gradient])


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "deepseek_v3"])
def test_saliency_counts_every_row_of_a_head(model_type):
    """One type has a gate per query row, the other has key heads larger than value heads.

    Every row counts for a channel, so that the saliency of all channels sums to that of all weights.
    """
    (block, *_) = [block for block in blocks_of(example(model_type)) if block.output is not None]
    generator, total = torch.Generator().manual_seed(0), torch.zeros(())
    metrics = {}
    for name in ("query", "key", "value", "output"):
        weight = block.parts[name].weight
        gradient = torch.randn(weight.shape, generator=generator)
        metrics[name] = FixedGradients(gradient)
        total = total + (weight * gradient).abs().double().sum()
    whole = channel_saliency(block, "attention", metrics)[2]
    assert whole.shape == (block.channels,)
    torch.testing.assert_close(whole.sum(), total, rtol=1e-6, atol=0)
    assert block.query.out_features > block.channels or block.key.out_features > block.value.out_features
