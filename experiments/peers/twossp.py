"""2SSP (Sandri et al. 2025): FFN neurons by the norm of their activations, then attention modules by perplexity.

    python -m experiments.peers.twossp --clone 2SSP --windows FILE --output FOLDER

The peer's `two_stage_2ssp` does both stages, and determines the number of removed attention modules by a formula
(`--attention` sets another number). No weights are changed. Three things are replaced. The peer's masked attention
modules return three values and the number 0, for Llama in transformers before 4.48; here they return a tensor of zeros
and None. The second stage runs on the CPU instead of CUDA. lm_eval, which is needed only for evaluation, is not
imported.

The peer rounds the width of the FFN, so the result may have fewer parameters than `--parameters`, by up to half a
neuron per block.

A model saved by the peer does not load correctly: whole projections are missing, and transformers initializes them at
random. Since no class of transformers has layers without attention, the folder has zeros for the query, key, value and
output projections. Their gradients are zero, so they remain zero in training. `parameters_after` does not count them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from unittest.mock import MagicMock

import torch
from torch import nn

from . import common

PEER = common.Peer("twossp", "FabrizioSandri/2SSP", "88ab66024881d55bf22332293e1b431015bb9d59", "GPL-3.0", "2501.17771")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def zero_attention(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
    """Forward of a removed attention module."""
    return torch.zeros_like(hidden_states), None


def mask(model: nn.Module, attnMask: list[int], mlpMask: list[int]) -> None:  # parameter names of the peer
    """Replace attention modules with a 1 in the mask by zeros. No FFN is masked as a whole."""
    for layer, is_masked in zip(model.model.layers, attnMask, strict=True):
        if is_masked:
            layer.self_attn.forward = zero_attention


def unmask(model: nn.Module, attnMask: list[int], mlpMask: list[int]) -> None:
    """Undo `mask`."""
    for layer, is_masked in zip(model.model.layers, attnMask, strict=True):
        if is_masked:
            del layer.self_attn.forward


def prune(args: argparse.Namespace) -> None:
    """Prune, and write the model folder."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows
    common.stub_module("src", __path__=[str(work.clone / "src")])
    common.stub_module("lm_eval", __getattr__=lambda name: MagicMock())
    evaluation = common.import_with("src.evaluation", work.clone / "src/evaluation.py", {"'cuda'": "'cpu'"})
    utilities = common.import_with("src.utilities", work.clone / "src/utilities.py", {})
    pruning = common.import_with("src.pruning", work.clone / "src/pruning.py", {})
    utilities.evaluate_perplexity = evaluation.evaluate_perplexity
    for module in (utilities, pruning):
        module.maskModel, module.unmaskModel = mask, unmask
    blocks, model_type = common.count(model.model.layers), model.config.model_type
    shapes = [{n: getattr(layer.self_attn, n).weight.shape for n in PROJECTIONS} for layer in model.model.layers]
    rate = (common.count(model) - work.parameters) / blocks
    with work.timed():
        model.config.model_type = "llama"  # Gemma's FFN has the same names
        small = pruning.two_stage_2ssp(
            model, windows, rate, num_attn_submodules_to_prune=args.attention, num_calibration_second_stage=args.second
        )
        model.config.model_type = model_type
    if small is False:
        raise common.stop("--parameters cannot be reached by 2SSP with so many attention modules.")
    common.set_width(model, model.config.intermediate_size)
    removed_modules, removed = [], 0
    for index, (layer, shape) in enumerate(zip(model.model.layers, shapes, strict=True)):
        if not hasattr(layer.self_attn, "o_proj"):
            removed_modules.append(index)
            del layer.self_attn.forward
            for name in PROJECTIONS:
                linear = nn.Linear(*reversed(shape[name]), bias=False)
                linear.weight = nn.Parameter(torch.zeros(shape[name]), requires_grad=False)
                setattr(layer.self_attn, name, linear)
                removed += linear.weight.numel()
    work.save(model, removed=removed, notes=[f"attention modules removed, stored as zeros: {removed_modules}"])


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    flags = common.parser(PEER, __doc__)
    flags.add_argument("--attention", type=int, help="attention modules to remove; default: the peer's formula")
    flags.add_argument(
        "--second", type=int, default=4, help="windows of the second stage: 2,048 tokens, as the peer's default"
    )
    common.run(prune, flags, args)


if __name__ == "__main__":
    main()
