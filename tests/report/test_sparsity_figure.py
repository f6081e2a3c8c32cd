"""The figure of removed neurons for a model whose layers differ."""

from __future__ import annotations

import torch

from gprune.models.masks import Masks
from gprune.report.figures import sparsity_figure


def test_a_block_without_an_ffn_has_a_bar_of_height_0():
    """The points are the removed shares of the modules. The block without an FFN has no modules."""
    ffn = [torch.tensor([True, False, False, True]), torch.zeros(0, dtype=torch.bool)]
    masks = Masks(ffn, [torch.zeros(0, dtype=torch.bool)] * 2)
    labels = [torch.tensor([0, 0, 1, 1]), torch.zeros(0, dtype=torch.int64)]
    (axes,) = sparsity_figure(masks, labels).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.0]
    (points,) = axes.collections
    assert points.get_offsets().tolist() == [[0, 0.5], [0, 0.5]]
