"""LLM-Pruner (Ma et al. 2023): FFN neurons by first-order Taylor importance.

    python -m experiments.peers.llm_pruner --clone LLM-Pruner --windows FILE --output FOLDER

The peer's importance and its copy of Torch-Pruning compute scores and slice. As in its `llama3.py`, the model is that
of transformers, and pruning is block-wise with `param_first`. The peer's default is ten examples of 64 tokens, and
layers 3 to 30 including attention. Here, all windows are used (see `--examples` and `--length`), and the FFN of each
block loses a half.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable

from torch import nn

from . import common

PEER = common.Peer(
    "llm_pruner", "horseee/LLM-Pruner", "128a07d977f9b205d60ab14cfbc6a78f8a8e39d2", "Apache-2.0", "2305.11627"
)


def prune(args: argparse.Namespace) -> None:
    """Prune, and write the model folder."""
    work = common.Work(PEER, args)
    model, windows = work.model, [w[:, : args.length] for w in work.calibration.windows[: args.examples]]
    work.record.calibration_tokens = sum(window.numel() for window in windows)
    # Stubs avoid the packages' imports of models with remote code and their tokenizers, which are not needed.
    for package in ("LLMPruner", "LLMPruner.pruner"):
        common.stub_module(package, __path__=[str(work.clone / package.replace(".", "/"))])
    tp = importlib.import_module("LLMPruner.torch_pruning")
    pruners = importlib.import_module("LLMPruner.pruner.hf_llama_pruner")
    width = common.width_for(model, work.parameters)
    ratio = 1 - width / model.config.intermediate_size
    norms: set[type[nn.Module]] = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    with work.timed():
        model.requires_grad_(True)
        pruner = tp.pruner.MetaPruner(
            model, windows[0][:, :8], importance=pruners.TaylorImportance(group_reduction="sum", taylor="param_first"),
            global_pruning=False, iterative_steps=1, ch_sparsity=ratio, ignored_layers=[], channel_groups={},
            consecutive_groups={}, customized_pruners=dict.fromkeys(norms, pruners.hf_rmsnorm_pruner),
            root_module_types=None, root_instances=[layer.mlp.gate_proj for layer in model.model.layers],
        )  # fmt: skip
        common.accumulate_gradients(model, windows)
        pruner.step()
    work.save_narrowed(model, width)


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    flags = common.parser(PEER, __doc__)
    flags.add_argument("--examples", type=int, help="number of windows; default: all")
    flags.add_argument("--length", type=int, help="tokens per window; default: all")
    common.run(prune, flags, args)


if __name__ == "__main__":
    main()
