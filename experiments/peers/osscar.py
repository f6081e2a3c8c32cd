"""OSSCAR (Meng et al. 2024): FFN neurons greedily by the error of the block's output, with compensation.

    python -m experiments.peers.osscar --clone OSSCAR --windows FILE --output FOLDER

The peer's class `OSSCAR_prune` collects X X^T of the inputs of an output projection, and computes kept neurons and new
weights from it, with the settings of its README (update_iter 10, lambda2 0.01). The peer's loop over blocks supports
only OPT. The driver's loop is the same for any decoder with gated FFNs: block by block on the pruned model's hidden
states. One use of CUDA is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from . import common

PEER = common.Peer("osscar", "mazumder-lab/OSSCAR", "0bd78871ac3730dbd31154620f0a2b759081d76f", "none", "2403.12983")


def prune(args: argparse.Namespace) -> None:
    """Prune, and write the model folder."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows
    common.import_with("prune_algo", work.clone / "prune_algo.py", {})
    osscar = common.import_with("osscar_prune", work.clone / "osscar_prune.py", {"'cuda'": "'cpu'"})
    width, kept = common.width_for(model, work.parameters), []
    removed = 1 - (width + 0.5) / model.config.intermediate_size  # so that the peer's int(n * (1 - removed)) is `width`
    with work.timed(), torch.no_grad():
        states, settings = common.first_block_inputs(model, windows)
        for layer, kwargs in zip(model.model.layers, settings, strict=True):
            down = layer.mlp.down_proj
            pruner = osscar.OSSCAR_prune(
                down, "OSSCAR_prune", len(windows), windows[0].shape[1], args.update_iter, lambda2=args.lambda2,
                layername="mlp.down_proj",
            )  # fmt: skip
            hook = down.register_forward_hook(lambda _, inp, out, pruner=pruner: pruner.add_batch(inp[0], out))
            for state in states:
                layer(state, **kwargs)
            hook.remove()
            pruner.prune(sp_fc=removed, sp_out=0.0)
            pruner.free()
            kept.append(down.weight.abs().sum(0).nonzero().squeeze(1))
            states = [layer(state, **kwargs) for state in states]
    common.keep_neurons(model, kept)
    work.save(model)


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    flags = common.parser(PEER, __doc__, mixed=False)
    flags.add_argument("--update_iter", type=int, default=10, help="neurons removed per step")
    flags.add_argument("--lambda2", type=float, default=1e-2, help="ridge relative to the mean of the diagonal")
    common.run(prune, flags, args)


if __name__ == "__main__":
    main()
