"""From documents to windows: tokenise, join, cut into `seq_len` tokens.

Two ways to choose windows: a seeded sample spread over the whole corpus, or the first ones in document order (the usual
way to evaluate on WikiText)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gprune.errors import UserError


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one corpus.

    Attributes:
        corpus: name of the corpus.
        split: "train", "development" or "test".
        tokens: (n, seq_len) int64.
        content_hash: 16 hex digits of the SHA-256 over shape and tokens; the key under which results are stored.
    """

    corpus: str
    split: str
    tokens: Tensor
    content_hash: str = field(init=False)

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 2, self.tokens.shape
        assert self.tokens.dtype == torch.int64, self.tokens.dtype
        # The shape counts: the same tokens cut otherwise are other windows, with other statistics.
        content = f"{tuple(self.tokens.shape)};".encode() + self.tokens.numpy().astype("<i8").tobytes()
        digest = hashlib.sha256(content).hexdigest()
        object.__setattr__(self, "content_hash", digest[:16])

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()


def make_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    corpus: str,
    split: str,
    num_samples: int | None,
    seq_len: int,
    seed: int,
    join: str = "\n\n",
    shuffle: bool = True,
    flags: tuple[str, str] = ("--corpora.num_samples", "--corpora.seq_len"),
) -> Windows:
    """Windows without overlap from the documents joined by `join`; no BOS or EOS is added.

    Only as much text is tokenised as the windows need.

    Args:
        num_samples: number of windows; None takes all there are.
        seq_len: tokens per window.
        seed: of the sample; without effect when `shuffle` is off.
        join: text between two documents.
        shuffle: True cuts long documents into pieces of about two windows and shuffles the pieces, so that a
            few windows come from many documents; False takes the first windows in document order.
        flags: what the caller's users set `num_samples` and `seq_len` with, for the error.

    Raises:
        UserError: when there is too little text.
    """
    assert num_samples is None or num_samples > 0, num_samples
    assert seq_len > 0, seq_len
    pieces = list(texts)
    if shuffle:
        # About 4 characters make a token, so 8 x seq_len characters make about two windows.
        pieces = [piece for text in texts for piece in _cut(text, limit=8 * seq_len)]
        order = np.random.default_rng(seed).permutation(len(pieces))
        pieces = [pieces[i] for i in order]
    needed = None if num_samples is None else num_samples * seq_len
    tokens = _first_tokens(pieces, tokenizer, join, needed)
    there = len(tokens) // seq_len
    wanted = num_samples or max(there, 1)
    if there < wanted:
        raise UserError(
            f"Corpus '{corpus}' ({split}) has {there} windows of {seq_len} tokens, but {wanted} were asked "
            f"for. Lower {flags[0]} or {flags[1]}, or name a larger corpus."
        )
    return Windows(corpus, split, torch.tensor(tokens[: wanted * seq_len]).view(wanted, seq_len))


def _cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at a line end, else a space, in the piece's second half."""
    start = 0
    while len(text) - start > limit:
        ends = (text.rfind(mark, start + limit // 2, start + limit) for mark in ("\n", " "))
        end = next((end for end in ends if end >= 0), None)
        yield text[start : start + limit if end is None else end]
        start = start + limit if end is None else end + 1
    yield text[start:]


def _first_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, join: str, needed: int | None) -> list[int]:
    """Tokens of the joined texts, at least `needed` where there is that much; None tokenises everything.

    The joined string is tokenised as one, since pieces tokenised apart would differ around each `join`.
    """
    sizes = np.cumsum([len(text) + len(join) for text in texts])
    characters = math.inf if needed is None else 5.0 * needed
    while True:
        count = int(np.searchsorted(sizes, characters)) + 1
        text = join.join(texts[:count])
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # The last tokens before a cut may depend on what follows: only those well before it count.
        if count >= len(texts) or (needed is not None and len(tokens) >= needed + 16):
            return tokens
        characters *= 2
