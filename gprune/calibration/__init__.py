"""Statistics of the inputs of output projections. This file does not import PyTorch, because checks of flags use it."""

OUTPUT_PROJECTIONS = {"ffn": "down", "attention": "output"}  # the part of a block whose inputs are observed, by scope
EXTRAS = ("gram", "routing", "saliency")  # kinds of statistics that are collected only if something needs them
