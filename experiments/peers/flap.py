"""FLAP (An et al. 2024): attention groups and FFN neurons by fluctuation, with biases that compensate.

    python -m experiments.peers.flap --clone FLAP --windows FILE --output CUT
    python -m experiments.peers save --cut CUT --output FOLDER

The peer's `prune_flap` scores, chooses over all blocks and both kinds of units (its defaults WIFV and AL-AM), slices
and computes biases. Its numbers for LLaMA-7B are replaced: 128 channels of a head by those of a KV group, 512 / 3
by the cost of a group in neurons, 2,048 samples by the number of windows, half precision by float32. Its slicing of
attention expects as many key as query heads, so it gets a stand-in for the three projections, and `save` slices them.

Blocks end up unequally wide, which no class of transformers can express: the driver writes what was kept and the
peer's weights and biases, and `save` makes a folder in gprune's format of it. Where no group of a block stays, one
group is stored with zeros, and not counted.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import common

PEER = common.Peer("flap", "CASIA-IVA-Lab/FLAP", "3bb57db3449dd2fa04a5c2192de80e87e33be2b1", "Apache-2.0", "2312.11983")
INPUTS = ("q_proj", "k_proj", "v_proj")


def prune(args: argparse.Namespace) -> None:
    """Prune, and write what was cut."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows
    config, attention = model.config, model.model.layers[0].self_attn
    groups = config.num_key_value_heads
    channels = attention.o_proj.in_features // groups
    group = sum(getattr(attention, n).weight.numel() for n in (*INPUTS, "o_proj")) // groups
    neuron = common.neuron_size(model)
    common.stand_in("lib", __path__=[str(work.clone / "lib")])
    common.stand_in("lib.data", get_loaders=lambda *a, **k: ([(window, None) for window in windows], None))
    replaced = {"128": str(channels), "2048": "windows", "torch.half": "torch.float32", "512.0 / 3": "unit_cost"}
    names = {"windows": len(windows), "unit_cost": group / neuron}
    flap = common.import_with("lib.prune", work.clone / "lib/prune.py", replaced, **names)
    theirs, cut, removed = flap.compress, {}, 0

    def compress(layer: nn.Module, attn: Tensor | None, mlp: Tensor | None, *rest: object, **more: object) -> None:
        """The peer's slicing and biases, and a note of what stays."""
        nonlocal removed
        index = list(model.model.layers).index(layer)
        if mlp is not None:
            theirs(layer, None, mlp, *rest, **more)
            cut[f"ffn.{index}"], linear, name = mlp, layer.mlp.down_proj, "mlp.down_proj"
        else:
            inputs = {n: copy.deepcopy(layer.self_attn.q_proj) for n in INPUTS}
            stand_in = SimpleNamespace(self_attn=SimpleNamespace(**inputs, o_proj=layer.self_attn.o_proj))
            theirs(stand_in, attn, None, *rest, **more)
            linear, name = layer.self_attn.o_proj, "self_attn.o_proj"
            if not attn.any():
                attn = torch.arange(groups) == 0
                linear.weight = nn.Parameter(torch.zeros(config.hidden_size, channels), requires_grad=False)
                for n in INPUTS:
                    whole = getattr(layer.self_attn, n).weight
                    cut[f"model.layers.{index}.self_attn.{n}.weight"] = torch.zeros_like(whole[: len(whole) // groups])
                removed += group
            cut[f"attention.{index}"] = attn
        cut[f"model.layers.{index}.{name}.weight"] = linear.weight.data.contiguous()
        cut[f"model.layers.{index}.{name}.bias"] = linear.bias.data.float()

    flap.compress = compress
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
    prunable = config.num_hidden_layers * (groups * group + config.intermediate_size * neuron)
    ratio = (work.record.parameters_before - work.parameters) / prunable
    model.seqlen = windows[0].shape[1]
    settings = SimpleNamespace(
        nsamples=len(windows), seed=0, metrics=args.metrics, structure="AL-AM", pruning_ratio=ratio, unstr=False
    )
    with work.timed():
        hooks = fill_arguments(model, windows)
        flap.prune_flap(settings, model, None, torch.device("cpu"))
        for hook in hooks:
            hook.remove()
    kept = [(int(cut[f"attention.{i}"].sum()), int(cut[f"ffn.{i}"].sum())) for i in range(config.num_hidden_layers)]
    widths = {"kv_groups": [a for a, _ in kept], "neurons": [f for _, f in kept]}
    stays = work.record.parameters_before - prunable + sum(a * group + f * neuron for a, f in kept)
    stays += 2 * config.num_hidden_layers * config.hidden_size  # biases
    work.record.parameters_stored, work.record.parameters_after = stays, stays - removed
    partial = work.output.with_name(work.output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(cut, partial / common.CUT, metadata={"model": str(work.source.resolve())})
    work.finish(partial, [f"widths: {widths}"])


def fill_arguments(model: nn.Module, windows: list[Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """Let each block add what today's blocks get from the model and the peer does not pass on: rotary embeddings, and
    the mask of its own kind of attention."""
    _, settings = common.entering(model, windows[:1])

    def filled(module: nn.Module, inputs: tuple, given: dict[str, object]) -> tuple[tuple, dict[str, object]]:
        return inputs, settings[list(model.model.layers).index(module)]

    return [layer.register_forward_pre_hook(filled, with_kwargs=True) for layer in model.model.layers]


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    flags = common.parser(PEER, __doc__)
    flags.add_argument("--metrics", choices=("IFV", "WIFV"), default="WIFV")
    common.run(prune, flags, args)


if __name__ == "__main__":
    main()
