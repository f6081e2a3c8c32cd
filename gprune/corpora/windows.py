"""From documents to windows: join, tokenise, and cut into windows of `seq_len` tokens.

Windows are a seeded sample spread over the whole corpus, or the first ones in document order (the usual way to evaluate
on WikiText).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gprune.errors import UserError

JOIN = "\n\n"  # between documents
Bos = Literal["auto", "always", "never"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one corpus."""

    corpus: str
    split: str  # "train", "development" or "test"
    tokens: Tensor  # (n, seq_len) int64
    bos: bool = False  # whether the first token of each window is the beginning-of-sequence token
    content_hash: str = field(init=False)  # 16 hex digits of the SHA-256 over shape and tokens; a key of caches

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 2, self.tokens.shape
        assert self.tokens.dtype == torch.int64, self.tokens.dtype
        # The shape counts: the same tokens cut otherwise are other windows, with other statistics.
        content = f"{tuple(self.tokens.shape)};".encode() + self.tokens.numpy().astype("<i8").tobytes()
        object.__setattr__(self, "content_hash", hashlib.sha256(content).hexdigest()[:16])


@dataclass(frozen=True)
class Sample:
    """How many windows of a corpus are taken, and which.

    Shuffled, long documents are cut into pieces of about two windows and the pieces are drawn, so that a few windows
    come from many documents; else the first windows in document order are taken.
    """

    num_samples: int | None  # None takes all of them
    seq_len: int
    seed: int = 0
    shuffle: bool = True
    bos: int | None = None  # a token that opens each window, in the place of its first token of text
    flags: tuple[str, str] = ("--corpora.num_samples", "--corpora.seq_len")  # for errors


def make_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sample: Sample, *, corpus: str, split: str
) -> Windows:
    """Windows without overlap from the joined documents; only as much text is tokenised as they need.

    Between documents stands a blank line, as inside them. An end-of-sequence token would have to be predicted where
    nothing in the text says that a sampled piece ends. Raises UserError for too little text.
    """
    pieces, seq_len = list(texts), sample.seq_len - (sample.bos is not None)
    if sample.shuffle:
        # About 4 characters make a token, so 8 x seq_len characters make about two windows.
        pieces = [piece for text in texts for piece in cut(text, limit=8 * seq_len)]
        order = np.random.default_rng(sample.seed).permutation(len(pieces))
        pieces = [pieces[i] for i in order]
    needed = None if sample.num_samples is None else sample.num_samples * seq_len
    tokens = _first_tokens(pieces, tokenizer, needed)
    available = len(tokens) // seq_len
    wanted = sample.num_samples or max(available, 1)
    if available < wanted:
        raise UserError(
            f"Corpus '{corpus}' ({split}) has {available} windows of {sample.seq_len} tokens, but {wanted} were asked "
            f"for. Lower {' or '.join(sample.flags)}, or name a larger corpus."
        )
    windows = torch.tensor(tokens[: wanted * seq_len]).view(wanted, seq_len)
    if sample.bos is not None:
        windows = torch.cat([torch.full((wanted, 1), sample.bos), windows], 1)
    return Windows(corpus, split, windows, bos=sample.bos is not None)


def opening(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> int | None:
    """The token that opens every window, or None; `auto`: BOS where the tokenizer puts it before a text by itself.

    Raises:
        UserError: for `always` with a tokenizer that has none.
    """
    token = tokenizer.bos_token_id
    if bos == "always" and token is None:
        raise UserError("--corpora.bos always: the model's tokenizer has no BOS token; expected auto or never.")
    if bos == "auto":
        plain, own = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        return token if token is not None and own[:1] == [token] and plain[:1] != [token] else None
    return token if bos == "always" else None


def check_tokens(windows: Windows, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise UserError for a token that a model with so many embeddings has no place for."""
    if (highest := int(windows.tokens.max())) >= embeddings:
        raise UserError(
            f"--model.name: the tokenizer makes token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) of "
            f"'{windows.corpus}', and the model has {embeddings:,} embeddings; it is another model's tokenizer."
        )


def cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at the last line end, else space, of the piece's second half."""
    start = 0
    while len(text) - start > limit:
        ends = (text.rfind(mark, start + limit // 2, start + limit) for mark in ("\n", " "))
        end = next((end for end in ends if end >= 0), None)
        yield text[start : start + limit if end is None else end]
        start = start + limit if end is None else end + 1
    yield text[start:]


def _first_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> list[int]:
    """Tokens of the joined texts: at least `needed` if the texts have that many, or all of them for None.

    The joined string is tokenised as one: pieces tokenised apart would differ around each `JOIN`.
    """
    sizes = np.cumsum([len(text) + len(JOIN) for text in texts])
    characters = math.inf if needed is None else 5.0 * needed
    while True:
        count = int(np.searchsorted(sizes, characters)) + 1
        text = JOIN.join(texts[:count])
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # The last tokens before a cut may depend on what follows: only those well before it count.
        if count >= len(texts) or (needed is not None and len(tokens) >= needed + 16):
            return tokens
        characters *= 2
