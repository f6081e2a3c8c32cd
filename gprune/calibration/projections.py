"""What a calibration pass watches and collects, by name; without PyTorch, for flags are checked by these names."""

from __future__ import annotations

OUTPUT_PROJECTIONS = {"ffn": "down", "attention": "output"}  # the part of a block whose inputs are watched, by scope
EXTRAS = ("gram", "saliency")  # collected only if something needs them
