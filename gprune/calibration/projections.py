"""Names of what calibration observes and collects. Without PyTorch, because flags are checked by these names."""

from __future__ import annotations

OUTPUT_PROJECTIONS = {"ffn": "down", "attention": "output"}  # the part of a block whose inputs are watched, by scope
EXTRAS = ("gram", "saliency")  # collected only if something needs them
