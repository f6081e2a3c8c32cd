"""Statistics of the inputs of output projections. This file does not import PyTorch, because checks of flags use it."""

EXTRAS = ("gram", "routing", "saliency")  # kinds of statistics that are collected only if something needs them
