"""SLEB (Song et al. 2024): whole blocks, one after another, by the loss without the block.

    python -m experiments.peers.sleb --clone SLEB --windows FILE --output FOLDER

The peer's function `sleb` searches, with its barriers of one block at both ends, and writes the order of removal to a
file, which the driver reads. Two things are replaced: CUDA by the CPU, and its blocks that can be skipped, which
support only transformers before 4.48. The search needs a forward pass per candidate and round (253 for 11 of 30
blocks), so only `--use` windows are used, by default 12, four of each corpus.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from . import common

PEER = common.Peer("sleb", "jiwonsong-dev/SLEB", "d07129af60520e751087b8abb04a268a3c7ec861", "MIT", "2402.09025")


class SkippableBlock(nn.Module):
    """A block that can be skipped, with the two methods that the peer calls."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.off = layer, False

    def turn_off(self) -> None:
        """Skip the block."""
        self.off = True

    def turn_on(self) -> None:
        """Compute the block."""
        self.off = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the block's output, or its input if the block is skipped."""
        return hidden_states if self.off else self.layer(hidden_states, *args, **kwargs)


def prune(args: argparse.Namespace) -> None:
    """Prune, and write the model folder."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows[: args.use]
    sys.path.insert(0, str(work.clone))
    for name in ("fire", "datasets", "accelerate"):  # needed only for the peer's command line and text
        common.stub_module(name, __getattr__=lambda name: MagicMock())
    peer = common.import_with("sleb", work.clone / "sleb.py", {"'cuda:0'": "'cpu'"})
    blocks, number = list(model.model.layers), common.blocks_for(model, work.parameters)
    model.name, model.seqlen = "llama", windows[0].shape[1]  # the peer selects functions by the name
    model.model.layers = nn.ModuleList(map(SkippableBlock, blocks))
    peer.get_llm = lambda name: model
    peer.block_replace = lambda model: model
    peer.get_trainloaders = lambda *a, **k: SimpleNamespace(input_ids=torch.cat(windows, 1))
    with work.timed(), tempfile.TemporaryDirectory() as folder:
        peer.sleb("llama", len(blocks), number, nsamples=len(windows), result_folder=folder, eval_ppl=False)
        order = re.search(r"Block Removal Order: \[(.*)\]", (Path(folder) / "sleb_results.txt").read_text())[1]
    removed = [int(index) for index in order.split(",")]
    model.model.layers = nn.ModuleList(blocks)
    common.keep_blocks(model, [i for i in range(len(blocks)) if i not in removed])
    work.record.calibration_tokens = sum(window.numel() for window in windows)
    work.save(model, notes=[f"blocks removed, in order: {removed}"])


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    flags = common.parser(PEER, __doc__)
    flags.add_argument("--use", type=int, default=12, help="number of windows")
    common.run(prune, flags, args)


if __name__ == "__main__":
    main()
