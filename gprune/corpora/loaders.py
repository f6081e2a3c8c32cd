"""Data loaders for windows: one per corpus, seeded, and sharded so that every window is seen exactly once.

`DistributedSampler` would repeat some windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gprune.corpora.windows import Windows
from gprune.errors import UserError


class TokenDataset(Dataset):
    """Windows of several corpora, concatenated. The batch sampler requests an item with a pair (index, weight)."""

    def __init__(self, windows: Sequence[Windows]):
        self.tokens = torch.cat([w.tokens for w in windows])
        self.corpora = [w.corpus for w in windows]
        # Halves are contiguous, not alternating: neighbouring windows often come from one piece of text, and halves
        # that share pieces would agree better than two independent samples.
        self.half = [int(2 * i >= len(w.tokens)) for w in windows for i in range(len(w.tokens))]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: tuple[int, float]) -> dict[str, Tensor | int]:
        """Return a window."""
        index, weight = item
        return {
            "input_ids": self.tokens[index],
            "index": index,
            "half": self.half[index],
            "weight": torch.tensor(weight),
        }


@dataclass(eq=False)
class ShardedBatchSampler(Sampler[list[tuple[int, float]]]):
    """Batches of (index, weight). Global batches do not depend on the number of processes.

    Rank r gets `batch[r::world_size]` of each global batch. With `whole` it gets every `world_size`-th batch instead,
    so that a batch has the same windows, and the same bits, for every number of processes. A rank without a share gets
    the first window of the batch with weight 0. So all ranks take the same number of steps (otherwise collectives would
    hang), and weighted sums count every window once.
    """

    num_windows: int
    batch_size: int  # windows in a global batch; with `whole`, in the batch of one rank
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    shuffle: bool = False  # whether the order is random, by `seed` and `epoch`
    whole: bool = False
    seed: int = 0
    epoch: int = field(default=0, init=False)
    served: int = field(default=0, init=False)  # batches yielded in this epoch
    skip: int = field(default=0, init=False)  # batches to skip in the next epoch: those before the checkpoint

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The order depends on (seed, epoch) alone, so a resumed run has the same order."""
        self.epoch = epoch

    @property
    def sampler(self) -> ShardedBatchSampler:
        """This object. Lightning calls `set_epoch` on `batch_sampler.sampler`, not on the batch sampler itself."""
        return self

    def __len__(self) -> int:
        batches = math.ceil(self.num_windows / self.batch_size)
        return math.ceil(batches / self.world_size) if self.whole else batches

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        """Yield the share of this rank of each global batch: pairs (index, weight)."""
        order = np.arange(self.num_windows)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_windows)
        self.served = self.skip
        self.skip = 0
        while self.served < len(self):
            batch_index = self.served * self.world_size + self.rank if self.whole else self.served
            batch = order[batch_index * self.batch_size : (batch_index + 1) * self.batch_size].tolist()
            share = batch if self.whole else batch[self.rank :: self.world_size]
            self.served += 1
            if share:
                yield [(index, 1.0) for index in share]
            else:  # with `whole` the batch of this rank may be empty too
                padding = batch[0] if batch else int(order[0])
                yield [(padding, 0.0)]


class ResumableLoader(DataLoader):
    """Single-process loader with a state, so that a Lightning checkpoint can resume inside an epoch."""

    def state_dict(self) -> dict[str, int]:
        return {"served": self.batch_sampler.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.skip = state["served"]


class CorpusDataModule(LightningDataModule):
    """One shuffled loader over all training windows, and one loader per validation corpus and per test corpus.

    The data module shards itself, so use it with `Trainer(use_distributed_sampler=False)`.

    Args:
        train: training windows of all corpora.
        validation: development windows, for the perplexity that stages log.
        test: calibration windows.
        batch_size: windows per training or test step, over all processes.
        validation_batch_size: windows per validation step of one process; by default `batch_size`.
        seed: random seed of the order of training windows.

    Raises:
        UserError: if a corpus has no windows.
    """

    def __init__(
        self, *, train: Sequence[Windows] = (), validation: Sequence[Windows] = (), test: Sequence[Windows] = (),
        batch_size: int, validation_batch_size: int | None = None, seed: int,
    ):  # fmt: skip
        super().__init__()
        self.train = tuple(train)
        self.validation = tuple(validation)
        self.test = tuple(test)
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size or batch_size
        self.seed = seed
        if not self.validation:  # undo the override, because Lightning warns about an empty list of loaders
            self.val_dataloader = super().val_dataloader
        for windows in (*self.train, *self.validation, *self.test):
            if not len(windows.tokens):
                raise UserError(f"Corpus '{windows.corpus}' must have at least one window; got none.")

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader([windows], whole=True) for windows in self.validation]

    def test_dataloader(self) -> list[DataLoader]:
        return [self._loader([windows]) for windows in self.test]

    def _loader(self, windows: Sequence[Windows], *, shuffle: bool = False, whole: bool = False) -> DataLoader:
        """Return a loader over windows. With `whole`, for validation, batches are divided among ranks as a whole."""
        dataset = TokenDataset(windows)
        rank, world_size = 0, 1
        if self.trainer:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        batch_size = self.validation_batch_size if whole else self.batch_size
        sampler = ShardedBatchSampler(
            len(dataset), batch_size, rank=rank, world_size=world_size, shuffle=shuffle, whole=whole, seed=self.seed
        )
        if whole:
            # Iterating draws a random number. With a separate generator, validation does not change the global random
            # state.
            return DataLoader(dataset, batch_sampler=sampler, num_workers=0, generator=torch.Generator())
        return ResumableLoader(dataset, batch_sampler=sampler, num_workers=0)
