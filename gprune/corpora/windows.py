"""Windows of tokens: join the documents of a corpus, tokenise them, and cut the tokens into windows of `seq_len`.

Windows are a seeded random sample of the whole corpus, or the first windows in document order (the usual evaluation on
WikiText).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gprune.corpora.documents import Conversation
from gprune.corpora.load import cut_text
from gprune.errors import UserError, quoting

log = logging.getLogger("gprune")

JOIN = "\n\n"  # between documents
CHARACTERS_PER_TOKEN = 5.0  # first guess of how much text the needed tokens take; doubled until it is enough
COUNTED_CHARACTERS = 1_000_000  # of a corpus whose tokens are counted; the rest is estimated
SPARE_TOKENS = 16  # tokenised beyond the needed ones: the last tokens before a cut may depend on the text after it
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
        # The shape is hashed too: the same tokens in windows of another length have other statistics.
        content = f"{tuple(self.tokens.shape)};".encode() + self.tokens.numpy().astype("<i8").tobytes()
        object.__setattr__(self, "content_hash", hashlib.sha256(content).hexdigest()[:16])


@dataclass(frozen=True)
class Sample:
    """Number and choice of the windows of a corpus.

    With `shuffle`, long documents are cut into pieces of about two windows and the pieces are shuffled, so that a few
    windows cover many documents. Otherwise the first windows in document order are used.
    """

    num_samples: int | None  # None: all windows
    seq_len: int
    seed: int = 0
    shuffle: bool = True
    bos: int | None = None  # first token of each window; the window then has one token of text less
    flags: tuple[str, str] = ("--corpora.num_samples", "--corpora.seq_len")  # named in errors
    per_window: float = 1  # what the first flag counts for each window of a corpus
    repeat: float = 1  # how often at most the windows of a corpus with too little text are used
    least_tokens: int = 0  # of text, below which a corpus is refused instead of repeated
    at_least: int | None = None  # smallest number of windows of a corpus with too little text; None: `num_samples`


def make_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sample: Sample, *, corpus: str, split: str
) -> Windows:
    """Cut joined documents into windows without overlap. Only as much text is tokenised as the windows need.

    A `Conversation` becomes text by the tokenizer's chat template. Documents are joined by a blank line. An
    end-of-sequence token would have to be predicted, though the end of a sampled piece is random.
    """
    texts = pieces = as_text(texts, tokenizer)
    seq_len = sample.seq_len - (sample.bos is not None)  # tokens of text in a window
    if sample.shuffle:
        # About 4 characters make a token, so 8 x seq_len characters make about two windows.
        pieces = [piece for text in texts for piece in cut_text(text, limit=8 * seq_len)]
        order = np.random.default_rng(sample.seed).permutation(len(pieces))
        pieces = [pieces[i] for i in order]
    needed = None if sample.num_samples is None else sample.num_samples * seq_len
    tokens = _first_tokens(pieces, tokenizer, needed)
    if not tokens and any(map(str.strip, pieces)):
        raise UserError(
            f"Corpus '{corpus}' ({split}) must have text that the model's tokenizer can read; got no token from "
            f"{type(tokenizer).__name__}. Check the tokenizer files of the model."
        )
    available = len(tokens) // seq_len
    num_windows = sample.num_samples or max(available, 1)  # at least 1, so that too little text is an error
    if sample.at_least is not None:
        num_windows = max(sample.at_least, min(available, num_windows))
    repeats = sample.repeat > 1 and 0 < available < num_windows
    if repeats and available * seq_len < (least := min(sample.least_tokens, num_windows * seq_len)):
        raise UserError(
            f"Corpus '{corpus}' ({split}) must have {least:,} tokens to train on; got {available * seq_len:,}. "
            "Use more text, or --recovery least_squares, which does not train."
        )
    if available < num_windows and not repeats:
        needed = f"{num_windows} windows of {sample.seq_len} tokens ({num_windows * sample.seq_len:,} tokens)"
        raise UserError(
            f"Corpus '{corpus}' ({split}) must have {needed}; got {available} ({len(tokens):,}). "
            f"{_what_fits(sample, len(tokens), num_windows)}."
        )
    windows = torch.tensor(tokens[: min(available, num_windows) * seq_len]).view(-1, seq_len)
    if repeats:
        wanted, num_windows = num_windows, int(min(num_windows, available * sample.repeat))
        log.info(
            f"Corpus '{corpus}' has {available * seq_len:,} tokens to train on, and {wanted * seq_len:,} are asked "
            f"for: each is used {num_windows / available:.2g} times, {num_windows * seq_len:,} in all"
        )
        windows = windows[torch.arange(num_windows) % available]
    if sample.bos is not None:
        windows = torch.cat([torch.full((num_windows, 1), sample.bos), windows], 1)
    return Windows(corpus, split, windows, bos=sample.bos is not None)


def count_tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the number of tokens of documents as text, estimated with "about" if there are many characters."""
    text = JOIN.join(as_text(documents, tokenizer))
    counted = text[:COUNTED_CHARACTERS]
    tokens = len(tokenizer(counted, add_special_tokens=False, verbose=False)["input_ids"])
    return f"{tokens:,}" if counted == text else f"about {tokens * len(text) // len(counted):,}"


def as_text(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return documents, in which conversations are rendered by the tokenizer's chat template."""
    return [chat_text(text, tokenizer) if isinstance(text, Conversation) else text for text in documents]


def chat_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render messages by the tokenizer's chat template. Raise UserError if there is none, or it refuses them."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{conversation.location}: The tokenizer of the model must have a chat template for 'messages'; it has "
            "none. Use an instruction-tuned model, or rows with a string 'text'."
        )
    with quoting(f"{conversation.location}: Cannot apply the chat template of the model: "):
        return tokenizer.apply_chat_template(json.loads(conversation), tokenize=False)


def _what_fits(sample: Sample, tokens: int, windows: int) -> str:
    """Return settings with which a corpus of so many tokens of text has enough windows, as a sentence."""
    number, length = sample.flags
    bos = sample.bos is not None
    fits = []
    if available := tokens // (sample.seq_len - bos):
        fits.append(f"{number} {math.floor(available * sample.per_window)}")
    if number == "--distill.tokens":  # of training, whose number of tokens does not depend on the length
        fits.append("--distill.repeat true")
    elif (shorter := (tokens // windows + bos) // 8 * 8) >= 8:
        fits.append(f"{length} {shorter}")
    return f"Use {', '.join([*fits, 'or more text'])}" if fits else "Use more text"


def leading_token(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> int | None:
    """Return the token that is put before the text of every window, or None."""
    token = tokenizer.bos_token_id
    if bos == "always" and token is None:
        raise UserError("--corpora.bos must be auto or never if the tokenizer has no BOS token; got always.")
    if bos == "auto":
        without_special = tokenizer("a", add_special_tokens=False)["input_ids"]
        with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
        adds_bos = token is not None and with_special[:1] == [token] and without_special[:1] != [token]
        return token if adds_bos else None
    return token if bos == "always" else None


def check_tokens(windows: Windows, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise UserError if a token is outside the embedding matrix of a model."""
    if (highest := int(windows.tokens.max())) >= embeddings:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"--model.name: Token {highest} ({token!r}) of corpus '{windows.corpus}' must be less than {embeddings:,}, "
            "the number of embeddings. The tokenizer belongs to another model."
        )


def _first_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> list[int]:
    """Tokenise the joined texts until there are `needed` tokens, or all of them if `needed` is None.

    The joined string is tokenised in one call, because separate calls would give other tokens around each `JOIN`.
    """
    ends = np.cumsum([len(text) + len(JOIN) for text in texts])  # end of each text in the joined string
    characters = math.inf if needed is None else CHARACTERS_PER_TOKEN * needed
    while True:
        number_of_texts = int(np.searchsorted(ends, characters)) + 1
        joined = JOIN.join(texts[:number_of_texts])
        tokens = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
        if number_of_texts >= len(texts) or (needed is not None and len(tokens) >= needed + SPARE_TOKENS):
            return tokens
        characters *= 2
