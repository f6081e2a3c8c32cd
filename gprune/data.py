"""From documents to batches: tokenise, cut into windows of `seq_len`, one loader per corpus, seeded.

Two ways to choose windows: a seeded sample spread over the whole corpus, or the first ones in document order
(the usual way to evaluate on WikiText). Batches are sharded exactly: every window is seen once, whatever the
number of processes, where `DistributedSampler` would repeat some.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
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


class TokenDataset(Dataset):
    """All windows of several corpora, one after the other. Indexed by (index, weight)."""

    def __init__(self, windows: Sequence[Windows]):
        self.tokens = torch.cat([w.tokens for w in windows])
        self.corpus = [i for i, w in enumerate(windows) for _ in w.tokens]
        # Not in turn: neighbouring windows often come from one piece of text, and halves that share their pieces would
        # agree better than two samples of the corpus do.
        self.half = [int(2 * i >= len(w.tokens)) for w in windows for i in range(len(w.tokens))]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: tuple[int, float]) -> dict[str, Tensor | int]:
        """One window.

        Returns:
            `input_ids` (seq_len,) int64, `index` in the concatenation, number of the `corpus`, which `half` of it, 0 or
            1, and `weight` () float32, 0 for padding.
        """
        index, weight = item
        return {
            "input_ids": self.tokens[index], "index": index, "corpus": self.corpus[index], "half": self.half[index],
            "weight": torch.tensor(weight),
        }  # fmt: skip


class ShardedBatchSampler(Sampler[list[tuple[int, float]]]):
    """Batches of (index, weight); the same global batches whatever the number of processes.

    Rank r takes `batch[r::world_size]` of each global batch. A rank that would get nothing gets the batch's
    first window with weight 0, so that all ranks take the same number of steps (collectives would hang
    otherwise) and weighted sums count every window once.
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ):
        assert batch_size > 0, batch_size
        assert 0 <= rank < world_size, (rank, world_size)
        self.num_windows, self.batch_size = num_windows, batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The order is a function of (seed, epoch) alone, so a resumed run sees the same one."""
        self.epoch = epoch

    @property
    def sampler(self) -> ShardedBatchSampler:
        """Lightning calls `set_epoch` on `batch_sampler.sampler`, never on the batch sampler itself."""
        return self

    def __len__(self) -> int:
        return math.ceil(self.num_windows / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        order = np.arange(self.num_windows)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_windows)
        for start in range(0, self.num_windows, self.batch_size):
            batch = order[start : start + self.batch_size].tolist()
            share = batch[self.rank :: self.world_size]
            yield [(index, 1.0) for index in share] or [(batch[0], 0.0)]


class CorpusDataModule(LightningDataModule):
    """One shuffled loader over all training windows; for validation and test one per corpus, in order.

    Use it with `Trainer(use_distributed_sampler=False)`: it shards by itself.
    """

    def __init__(
        self,
        *,
        train: Sequence[Windows] = (),
        val: Sequence[Windows] = (),
        test: Sequence[Windows] = (),
        batch_size: int,
        seed: int,
    ):
        super().__init__()
        self.train, self.val, self.test = tuple(train), tuple(val), tuple(test)
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader([windows], shuffle=False) for windows in self.val]

    def test_dataloader(self) -> list[DataLoader]:
        return [self._loader([windows], shuffle=False) for windows in self.test]

    def _loader(self, windows: Sequence[Windows], *, shuffle: bool) -> DataLoader:
        dataset = TokenDataset(windows)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = ShardedBatchSampler(
            len(dataset), self.batch_size, rank=rank, world_size=world_size, shuffle=shuffle, seed=self.seed
        )
        return DataLoader(dataset, batch_sampler=sampler, num_workers=0)
