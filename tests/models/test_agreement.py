"""Numbers of a comparison of logits."""

from __future__ import annotations

import torch

from gprune.models.agreement import compare


def test_a_changed_window_does_not_change_the_difference_of_a_typical_token():
    """A near tie between experts, which rounding decides, changes one window. A wrong slice changes all."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(8, 16, 50, generator=generator)
    rounded = expected + 1e-6 * torch.randn(expected.shape, generator=generator)
    one_window = rounded.clone()
    one_window[2] += 0.5
    assert compare(expected, one_window).typical < 1e-5 < 0.1 < compare(expected, one_window).rms
    assert compare(expected, rounded + 0.5).typical > 0.4
