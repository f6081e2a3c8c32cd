"""ShortGPT (Men et al. 2024): whole blocks by block influence.

    python -m experiments.peers.shortgpt --clone ShortGPT --windows FILE --output FOLDER

The authors have not published code. This driver uses the implementation in sramshetty/ShortGPT. Its `ShortLlama` sums
the block influence, 1 - cosine similarity of a block's input and output, over tokens and windows, and selects the
blocks. Its forward pass requires Meta's `llama` package and CUDA, so hidden states are computed with transformers here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import nn

from . import common

PEER = common.Peer("shortgpt", "sramshetty/ShortGPT", "78d9615fdcae6d90368832bd0a86c49c323549b9", "MIT", "2403.03853")


def prune(args: argparse.Namespace) -> None:
    """Prune, and write the model folder."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows
    sys.path.insert(0, str(work.clone / "short_gpt"))
    common.stub_module("llama", Llama=object, Transformer=nn.Module)
    short = importlib.import_module("short_llama").ShortLlama
    blocks = model.config.num_hidden_layers
    state = SimpleNamespace(importances=[0] * blocks, n_prune_layers=common.blocks_for(model, work.parameters))
    state.llama = SimpleNamespace(model=SimpleNamespace(layers=list(range(blocks))))
    layers, states = model.model.layers, []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, inputs, output: states.append(output)))
    with work.timed(), torch.no_grad():
        for window in windows:
            states.clear()
            model.model(window, use_cache=False)
            short.compute_bi(state, states, angular=False)
        removed = short.remove_layers(state)
    for hook in hooks:
        hook.remove()
    common.keep_blocks(model, state.llama.model.layers)
    work.save(model, notes=[f"blocks removed, in order: {removed}"])


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    common.run(prune, common.parser(PEER, __doc__), args)


if __name__ == "__main__":
    main()
