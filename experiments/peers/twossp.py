"""2SSP (Sandri et al. 2025): FFN neurons by the norm of their activations, then attention modules by perplexity.

    python -m experiments.peers.twossp --clone 2SSP --windows FILE --output FOLDER

The peer's `two_stage_2ssp` does both stages, and decides by its formula how many attention modules go (`--attention`
takes another number). No weight is changed. Patched: a masked attention module returns
three values and a plain 0 there, for transformers before 4.48 and for Llama; the driver lets it return a zero tensor
and None, as today's layers expect. The second stage computes on CUDA. What is needed for evaluation alone (lm_eval) is
not imported.

The peer rounds the width of the FFN, so up to half a neuron of every block may be missing from `--parameters`.

What it saves does not load: whole projections are missing, and transformers fills them at random. No class of
transformers has layers without attention, so the folder holds zeros in their place: output, query, key and value
projections, which also have no gradient, so they stay zero in training. `parameters_after` does not count them.
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


def nothing(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
    """The forward of an attention module that is gone."""
    return torch.zeros_like(hidden_states), None


def mask(model: nn.Module, attnMask: list[int], mlpMask: list[int]) -> None:  # names of the peer
    """Let attention modules with a 1 return zeros; no FFN is masked as a whole."""
    for layer, gone in zip(model.model.layers, attnMask, strict=True):
        if gone:
            layer.self_attn.forward = nothing


def unmask(model: nn.Module, attnMask: list[int], mlpMask: list[int]) -> None:
    """Undo `mask`."""
    for layer, gone in zip(model.model.layers, attnMask, strict=True):
        if gone:
            del layer.self_attn.forward


def prune(args: argparse.Namespace) -> None:
    """Prune, and write the folder."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows
    common.stand_in("src", __path__=[str(work.clone / "src")])
    common.stand_in("lm_eval", __getattr__=lambda name: MagicMock())
    evaluation = common.import_with("src.evaluation", work.clone / "src/evaluation.py", {"'cuda'": "'cpu'"})
    utilities = common.import_with("src.utilities", work.clone / "src/utilities.py", {})
    pruning = common.import_with("src.pruning", work.clone / "src/pruning.py", {})
    utilities.evaluate_perplexity = evaluation.evaluate_perplexity
    for module in (utilities, pruning):
        module.maskModel, module.unmaskModel = mask, unmask
    blocks, own = common.count(model.model.layers), model.config.model_type
    shapes = [{n: getattr(layer.self_attn, n).weight.shape for n in PROJECTIONS} for layer in model.model.layers]
    rate = (common.count(model) - work.parameters) / blocks
    with work.timed():
        model.config.model_type = "llama"  # Gemma's FFN has the same names
        small = pruning.two_stage_2ssp(
            model, windows, rate, num_attn_submodules_to_prune=args.attention, num_calibration_second_stage=args.second
        )
        model.config.model_type = own
    if small is False:
        raise common.stop("2SSP cannot reach the number of parameters with so many attention modules.")
    common.tell_width(model, model.config.intermediate_size)
    gone, removed = [], 0
    for index, (layer, shape) in enumerate(zip(model.model.layers, shapes, strict=True)):
        if not hasattr(layer.self_attn, "o_proj"):
            gone.append(index)
            del layer.self_attn.forward
            for name in PROJECTIONS:
                linear = nn.Linear(*reversed(shape[name]), bias=False)
                linear.weight = nn.Parameter(torch.zeros(shape[name]), requires_grad=False)
                setattr(layer.self_attn, name, linear)
                removed += linear.weight.numel()
    work.save(model, removed=removed, notes=[f"attention modules removed, stored as zeros: {gone}"])


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
