"""What statistics are of, by name."""

from __future__ import annotations

KINDS = (("ffn", "down"), ("attention", "output"))  # of channels, and the part whose inputs they are
EXTRAS = ("gram", "saliency")  # collected only if something needs them
