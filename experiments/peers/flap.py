"""FLAP (An et al. 2024): KV groups and FFN neurons by fluctuation, with compensating biases.

    python -m experiments.peers.flap --clone FLAP --windows FILE --output CUT
    python -m experiments.peers save --cut CUT --output FOLDER

The peer's `prune_flap` computes scores, selects units over all blocks and both kinds of units (by its defaults WIFV
and AL-AM), slices them, and computes biases. Its constants for LLaMA-7B are replaced: 128 channels of a head by those
of a KV group, 512 / 3 by the cost of a group in neurons, 2,048 samples by the number of windows, half precision by
float32. Its slicing of attention requires as many key heads as query heads. Therefore it gets stubs of the three
projections, and `save` slices the real ones.

Blocks have unequal widths, which no class of transformers supports. Therefore the driver writes the masks, and the
peer's weights and biases, and `save` makes a folder in gprune's format from them. If a block loses all groups, one
group of zeros is stored, which is not counted.
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
    """Prune, and write masks, weights and biases."""
    work = common.Work(PEER, args)
    model, windows = work.model, work.calibration.windows
    config, attention = model.config, model.model.layers[0].self_attn
    groups = config.num_key_value_heads
    channels = attention.o_proj.in_features // groups
    group = sum(getattr(attention, n).weight.numel() for n in (*INPUTS, "o_proj")) // groups
    neuron = common.neuron_size(model)
    common.stub_module("lib", __path__=[str(work.clone / "lib")])
    common.stub_module("lib.data", get_loaders=lambda *a, **k: ([(window, None) for window in windows], None))
    replaced = {"128": str(channels), "2048": "windows", "torch.half": "torch.float32", "512.0 / 3": "unit_cost"}
    names = {"windows": len(windows), "unit_cost": group / neuron}
    flap = common.import_with("lib.prune", work.clone / "lib/prune.py", replaced, **names)
    peer_compress, output, removed = flap.compress, {}, 0

    def compress(layer: nn.Module, attn: Tensor | None, mlp: Tensor | None, *rest: object, **more: object) -> None:
        """Call the peer's slicing, and record masks, weights and biases."""
        nonlocal removed
        index = list(model.model.layers).index(layer)
        if mlp is not None:
            peer_compress(layer, None, mlp, *rest, **more)
            output[f"neurons.{index}"], linear, name = mlp, layer.mlp.down_proj, "mlp.down_proj"
        else:
            inputs = {n: copy.deepcopy(layer.self_attn.q_proj) for n in INPUTS}
            stub = SimpleNamespace(self_attn=SimpleNamespace(**inputs, o_proj=layer.self_attn.o_proj))
            peer_compress(stub, attn, None, *rest, **more)
            linear, name = layer.self_attn.o_proj, "self_attn.o_proj"
            if not attn.any():
                attn = torch.arange(groups) == 0
                linear.weight = nn.Parameter(torch.zeros(config.hidden_size, channels), requires_grad=False)
                for n in INPUTS:
                    whole = getattr(layer.self_attn, n).weight
                    output[f"model.layers.{index}.self_attn.{n}.weight"] = torch.zeros_like(
                        whole[: len(whole) // groups]
                    )
                removed += group
            output[f"kv_groups.{index}"] = attn
        output[f"model.layers.{index}.{name}.weight"] = linear.weight.data.contiguous()
        output[f"model.layers.{index}.{name}.bias"] = linear.bias.data.float()

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
    kept = [
        (int(output[f"kv_groups.{i}"].sum()), int(output[f"neurons.{i}"].sum()))
        for i in range(config.num_hidden_layers)
    ]
    widths = {"kv_groups": [a for a, _ in kept], "neurons": [f for _, f in kept]}
    parameters = work.record.parameters_before - prunable + sum(a * group + f * neuron for a, f in kept)
    parameters += 2 * config.num_hidden_layers * config.hidden_size  # biases
    work.record.parameters_stored, work.record.parameters_after = parameters, parameters - removed
    partial = work.output.with_name(work.output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(output, partial / common.CUT, metadata={"model": str(work.source.resolve())})
    work.finish(partial, [f"widths: {widths}"])


def fill_arguments(model: nn.Module, windows: list[Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """Add arguments of blocks that the peer does not pass: rotary embeddings, and the mask of the block's attention."""
    _, settings = common.first_block_inputs(model, windows[:1])

    def with_arguments(module: nn.Module, inputs: tuple, given: dict[str, object]) -> tuple[tuple, dict[str, object]]:
        return inputs, settings[list(model.model.layers).index(module)]

    return [layer.register_forward_pre_hook(with_arguments, with_kwargs=True) for layer in model.model.layers]


def main(args: Iterable[str] | None = None) -> None:
    """Run the driver."""
    flags = common.parser(PEER, __doc__)
    flags.add_argument("--metrics", choices=("IFV", "WIFV"), default="WIFV")
    common.run(prune, flags, args)


if __name__ == "__main__":
    main()
