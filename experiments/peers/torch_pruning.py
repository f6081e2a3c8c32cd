"""Torch-Pruning (DepGraph, Fang et al. 2023): FFN neurons by group Taylor importance.

    python -m experiments.peers.torch_pruning --clone Torch-Pruning --windows FILE --output FOLDER

The peer builds the dependency graph, computes scores of the groups of gate, up and down, and slices them, without
patches. The gradient is that of the mean loss over all windows. The peer's `examples/LLMs/prune_llm.py` also prunes the
hidden size and heads, by magnitude. Here only the FFN is pruned, by a half in each block.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable

from . import common

PEER = common.Peer(
    "torch_pruning", "VainF/Torch-Pruning", "e80127d7c6935c319a7dd6719b8a72e3c1fcbff9", "MIT", "2301.12900"
)


def prune(args: argparse.Namespace) -> None:
    """Prune, and write the model folder."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows
    sys.path.insert(0, str(work.clone))
    tp = importlib.import_module("torch_pruning")
    width = common.width_for(model, work.parameters)
    ratio = 1 - width / model.config.intermediate_size
    gates = [layer.mlp.gate_proj for layer in model.model.layers]
    importance = {"taylor": tp.importance.GroupTaylorImportance, "magnitude": tp.importance.GroupMagnitudeImportance}
    with work.timed():
        model.requires_grad_(True)
        if args.importance == "taylor":
            common.accumulate_gradients(model, windows)
        pruner = tp.pruner.BasePruner(
            model, example_inputs=windows[0][:, :8], importance=importance[args.importance](), pruning_ratio=0.0,
            pruning_ratio_dict=dict.fromkeys(gates, ratio), ignored_layers=[model.lm_head, model.model.embed_tokens],
            output_transform=lambda output: output.logits,
        )  # fmt: skip
        pruner.step()
    work.save_narrowed(model, width)


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    flags = common.parser(PEER, __doc__)
    flags.add_argument("--importance", choices=("taylor", "magnitude"), default="taylor")
    common.run(prune, flags, args)


if __name__ == "__main__":
    main()
