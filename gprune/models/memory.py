"""What a model holds while it computes, worked out from shapes: bytes beside its weights.

The formulas are those of a decoder with two norms, attention and a gated FFN, which most have. Letters: w bytes of a
number of the model, n tokens of a batch, L blocks of N neurons, C attention channels, H hidden size, V words.
`tests/pipeline/test_memory.py` holds them against tensors without values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gprune.models.blocks import Block
from gprune.models.losses import CHUNK


@dataclass(frozen=True)
class Shapes:
    """A model and the batch that goes through it."""

    blocks: Sequence[Block]  # without weights, perhaps
    hidden: int  # H
    words: int  # V
    outside: int  # parameters of embeddings, head and last norm
    width: int  # w
    windows: int  # on one device
    length: int  # tokens of a window
    kept: tuple[float, float] = (1.0, 1.0)  # shares of each block's neurons and KV groups, where it is pruned

    @property
    def tokens(self) -> int:
        """Tokens on one device at once."""
        return self.windows * self.length

    @property
    def sizes(self) -> list[tuple[float, float]]:
        """(N, C) of each block, of what a token goes through at once."""
        ffn, attention = self.kept
        return [(ffn * b.neurons, attention * b.output.in_features) for b in self.blocks]

    def parameters(self, scope: Literal["ffn", "all"]) -> float:
        """Of all blocks, as far as they are kept."""
        kinds = [("ffn", self.kept[0]), ("attention", self.kept[1])][: 1 + (scope == "all")]
        numbers = (
            k * p.out_features * p.in_features for b in self.blocks for kind, k in kinds for p in b.parts_of(kind)
        )
        return sum(numbers)

    def at(self, width: int, kept: tuple[float, float] = (1.0, 1.0)) -> Shapes:
        """The same in another dtype, pruned."""
        return replace(self, width=width, kept=kept)

    def passing(self) -> int:
        """A pass without gradients: w n (4 H + 3 N), the three results of the FFN and what is around it."""
        N = max(n for n, _ in self.sizes)
        return round(self.width * self.tokens * (4 * self.hidden + 3 * N))

    def saved(self, learns: Literal["nothing", "ffn", "all"] = "nothing") -> int:
        """For a backward pass: L n (8 H + 4 w (N + C)) through a frozen model with gates.

        Where weights learn (the FFN's, or all), what enters them is kept too: w H, or w 4 H, more.
        """
        inputs = {"nothing": 0, "ffn": 1, "all": 4}[learns]
        each = (8 * self.hidden + self.width * (4 * (N + C) + inputs * self.hidden) for N, C in self.sizes)
        return round(self.tokens * sum(each))

    def learning(
        self, learns: Literal["nothing", "ffn", "all"] = "nothing", *, kl: bool = False, checkpointing: bool = False
    ) -> int:
        """`saved`, the loss over a chunk of tokens, and the hidden states that enter and leave the decoder.

        With checkpointing what enters each block is saved, and all that is for one block at a time.
        """
        saved, n, w = self.saved(learns), self.tokens, self.width
        if checkpointing:
            saved = saved // len(self.blocks) + len(self.blocks) * w * n * self.hidden
        return saved + self.loss(kl=kl) + (5 + kl) * w * n * self.hidden

    def loss(self, *, kl: bool = False) -> int:
        """Logits of a chunk of tokens, in the dtype and in float32, and their softmax: r V (w + 4 or 8).

        KL has the teacher's too, and what both are multiplied to: 28 r V.
        """
        return min(CHUNK, self.tokens) * self.words * (28 if kl else self.width + (4 if self.width == 4 else 8))

    def scoring(self) -> int:
        """Perplexity: a pass, or the logits of a window in the dtype and of a chunk of it in float32."""
        logits = self.length * self.words * self.width + self.loss() - min(CHUNK, self.tokens) * self.words * self.width
        return max(self.passing(), self.width * self.tokens * self.hidden + logits)

    def collecting(self) -> int:
        """What watches a pass: sums of all channels in float64, and a copy of one projection's inputs in float32."""
        sums = round(32 * sum(N * b.experts + C for b, (N, C) in zip(self.blocks, self.sizes, strict=True)))
        N, w, n = max(n for n, _ in self.sizes), self.width, self.tokens
        watched = n * (w * (4 * self.hidden + N) + (4 if w == 4 else 8) * N)
        return sums + max(self.passing(), round(watched))
