"""Latency table: seconds of a model on this machine by its widths, measured once per model and linear between.

What is timed is the greedy generation of a few tokens after a prompt. Whole models are timed, because the weights of a
single layer would stay in the processor's cache.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from gprune.errors import UserError
from gprune.models.copies import copy_without_hooks
from gprune.models.families import decoder_layers
from gprune.models.masks import Masks
from gprune.models.offload import device_of
from gprune.models.surgery import slice_model, widths
from gprune.models.units import units_of
from gprune.sparsity.price import REST, Price, price_of
from gprune.storage.files import Cache, key_of
from gprune.units.structure import Units, unit_key

log = logging.getLogger("gprune")
PROMPT, GENERATE = 128, 32  # tokens
ROUNDS = 8
TOLERANCE = 0.1  # share by which a speed-up may exceed that of the parameters
PICOSECONDS = 1e12  # per second
KINDS = {"neurons": "neurons", "groups": "kv_groups"}  # entry of a table -> kind of units
# `neurons` and `groups`: pairs (width of every block, seconds of a layer), the other width being full. `rest`: seconds
# of everything outside of the layers.
Table = dict[str, Any]


def latency_table(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, attention: bool) -> Table:
    """Return the latency table of this machine, measured unless it is cached.

    An implausible table is measured once more. Raises UserError if it is implausible again.
    """
    gpu = device.type == "cuda" and torch.cuda.get_device_name(device)
    machine = [platform.node(), platform.processor(), os.cpu_count(), torch.get_num_threads(), torch.__version__]
    machine += [gpu, torch.get_float32_matmul_precision()]
    shapes = {name: list(parameter.shape) for name, parameter in dense.named_parameters()}
    timed = [PROMPT, GENERATE, attention]
    key = key_of(machine=machine, shapes=shapes, dtype=str(dtype), timed=timed)

    def measure() -> Table:
        for again in ("", " again"):
            log.info("Measuring the latency table of this machine%s, for the folder 'speed' of the cache", again)
            table = measure_table(dense, device, dtype, attention)
            if not (reason := why_implausible(table, units_of(dense))):
                return table
            log.warning("The latency table cannot be used: %s", reason)
        raise UserError(
            f"The latency table of this machine cannot be used, measured twice: {reason}. Run again while the machine "
            "is idle, or give --sparsity.target in parameters such as 30%."
        )

    return Cache("speed").get(key, measure)


def why_implausible(table: Table, units: Sequence[Units]) -> str:
    """Return why a latency table cannot be used, or an empty string.

    Seconds have to rise with the width. And a narrower model must not be faster than its layers have fewer parameters:
    then the wide one was measured under load.
    """
    dense = sum(u.parameters for u in units if u.kind == "layer")
    for entry, kind in KINDS.items():
        of_kind = [u for u in units if u.kind == kind]
        _, most_seconds = table[entry][-1]
        previous_width, previous_seconds = 0, 0.0
        for width, seconds in table[entry]:
            times = f"layers with {width:,} {entry} take {1000 * seconds:.3g} ms"
            if seconds <= previous_seconds:
                return f"{times}, and with {previous_width:,} {1000 * previous_seconds:.3g} ms"
            speedup = most_seconds / seconds
            bound = dense / (dense - sum(u.parameters * max(0, u.count - width) for u in of_kind))
            if speedup > (1 + TOLERANCE) * bound:
                return f"{times}, {speedup:.2f} times as fast as all of them, with {bound:.2f} times fewer parameters"
            previous_width, previous_seconds = width, seconds
    return ""


def costs_from_table(table: Table, units: Sequence[Units]) -> tuple[Price, int]:
    """Convert a latency table to the price of the model in integer picoseconds, and the cost of the rest.

    The cost of keeping 0, 1, ..., n units is interpolated linearly between measured widths. Models are timed as a
    whole. If several blocks become narrower at once, the saved time is divided between them in proportion to their
    parameters.
    """
    layers, costs = [u for u in units if u.kind == "layer"], {REST: round(PICOSECONDS * table["rest"])}
    for entry, kind in KINDS.items():
        of_kind = [u for u in units if u.kind == kind]
        pairs = [(u.count, u.parameters if u.count else 0) for u in of_kind]
        costs |= dict(zip((u.key for u in of_kind), _unit_costs(table[entry], pairs, len(layers)), strict=True))
    # Mean time of a layer besides its units, such as norms. It is saved only if the whole layer is removed.
    _, seconds_per_layer = table["neurons"][-1]
    of_layers = dict.fromkeys((layer.key for layer in layers), 0)
    for u in units:
        of_layers[unit_key("layer", u.layer)] += costs[u.key][-1] if u.key in costs else 0
    fixed = max(0, round(PICOSECONDS * seconds_per_layer) - sum(of_layers.values()) // len(layers))
    return price_of(costs | {key: fixed + cost for key, cost in of_layers.items()}, units)


def _unit_costs(points: Sequence[tuple[int, float]], blocks: Sequence[tuple[int, int]], layers: int) -> list[list[int]]:
    """Return for each block the picoseconds of keeping 0, 1, ..., all of its units, compared with keeping none.

    `points` are (width, seconds of a layer), and `blocks` (number of units, parameters of a unit).
    """
    widths, seconds = map(np.array, zip(*points, strict=True))
    total = sum(parameters for units, parameters in blocks if units) or 1
    # Mean number of units that blocks had in each measurement, weighted by the parameters of a unit. Equal to `widths`
    # if all blocks are equally wide.
    timed = np.array([sum(p * min(units, width) for units, p in blocks) / total for width in widths.tolist()])
    # Seconds of a layer if every block had as many units as each width. Where only some blocks became narrower, the
    # measured difference comes from these alone.
    grown, grown_timed = np.diff(widths), np.diff(timed)
    ratio = np.divide(grown, grown_timed, out=np.ones(len(grown)), where=grown_timed > 0)
    equally_wide = seconds + np.append(0.0, np.cumsum(np.diff(seconds) * (ratio - 1)))
    costs = []
    for units, parameters in blocks:
        share = parameters * layers / total  # of the block in the seconds of a layer
        interpolated = np.interp(range(units + 1), widths, equally_wide)
        costs.append([round(PICOSECONDS * share * (value - interpolated[0])) for value in interpolated])
    return costs


@torch.no_grad()
def random_model(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with the shapes of `dense` and random weights."""
    model = copy.deepcopy(dense).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(torch.randn(tensor.shape).mul(0.02))
    return model


@torch.no_grad()
def measure_table(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, attention: bool) -> Table:
    """Measure the latency table with random weights.

    Widths of FFNs are 1 and the quarters of the widest block's N neurons, with all KV groups. With `attention`, numbers
    of KV groups are 1 and the quarters of the largest number G, with all neurons. All models are timed in alternation.
    """
    model = random_model(dense, device, dtype)
    model_widths = widths(model)
    N, G = max(model_widths["neurons"]), max(model_widths["kv_groups"])
    neurons, groups = ([1, *(most * quarter // 4 for quarter in range(1, 5))] for most in (N, G))
    sizes = {  # (neurons, KV groups) of every block
        "neurons": [(n, G) for n in sorted({*neurons} - {0})],
        "groups": [(N, g) for g in (sorted({*groups} - {0}) if attention else [G])],
    }
    models = {size: narrow_model(model, *size) for sizes_of_kind in sizes.values() for size in sizes_of_kind}
    without_layers = narrow_model(model, N, G)
    del decoder_layers(without_layers)[:]
    *seconds, rest = time_generation([*models.values(), without_layers])
    depth = len(decoder_layers(model))
    layer_seconds = {size: (total - rest) / depth for size, total in zip(models, seconds, strict=True)}
    return {
        "neurons": [[n, layer_seconds[n, g]] for n, g in sizes["neurons"]],
        "groups": [[g, layer_seconds[n, g]] for n, g in sizes["groups"]],
        "rest": rest,
    }


def narrow_model(model: PreTrainedModel, neurons: int, groups: int) -> PreTrainedModel:
    """Return a model with smaller blocks for timing, which shares memory with the given model.

    Its weights are arbitrary numbers from the memory of the given model.
    """
    most = {"neurons": neurons, "kv_groups": groups}
    units = [u for u in units_of(model) if u.kind in most]
    masks = Masks({u.key: (torch.arange(u.count) < most[u.kind]).repeat(u.rows) for u in units})
    narrow = slice_model(copy_sharing_weights(model), masks, inplace=True)
    for parameter, wide_parameter in zip(narrow.parameters(), model.parameters(), strict=True):
        memory = wide_parameter.data.flatten()
        parameter.data = memory[: parameter.numel()].view(parameter.shape)
    return narrow


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with the same tensors, without hooks, and with a generation config that does not stop early."""
    copied = copy_without_hooks(model, {id(p): p for p in model.parameters()})
    copied.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return copied.eval()


def describe_device(device: torch.device) -> str:
    """Return the name of the GPU, or the number of threads on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


class Clock(list[float]):
    """A streamer for `generate` that collects the times at which it gets the prompt and each token."""

    def put(self, _: torch.Tensor) -> None:
        """Append the time."""
        self.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


@torch.no_grad()
def time_generation(models: Sequence[PreTrainedModel]) -> list[float]:
    """Return for each model the seconds of generating `GENERATE` tokens: the sum of each token's smallest time.

    Each of `ROUNDS` rounds times every model once, so that background load affects all of them equally.
    """
    models = [copy_sharing_weights(model) for model in models]
    ids = torch.ones(1, PROMPT, dtype=torch.long, device=device_of(models[0]))

    def times_of_tokens(model: PreTrainedModel) -> np.ndarray:
        clock = Clock()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GENERATE, streamer=clock)
        return np.diff(clock)

    rounds = [[times_of_tokens(model) for model in models] for _ in range(ROUNDS)]
    return np.min(rounds, axis=0).sum(axis=-1).tolist()
