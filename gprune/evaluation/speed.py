"""Latency table: the time of a model on this machine as a function of its widths, measured once per workload.

A workload is a batch of prompts and a number of generated tokens: seconds = prefill + tokens x decoding step. Whole
models are timed, because the weights of a single layer would stay in the processor's cache.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer
from transformers import GenerationConfig, PreTrainedModel

from gprune.models.blocks import Block, blocks_of, by_layer, decoder_layers
from gprune.models.copies import copy_without_hooks
from gprune.models.masks import Masks
from gprune.models.offload import device_of
from gprune.models.surgery import slice_model, widths
from gprune.sparsity.cost import BlockCosts, ModelCosts
from gprune.sparsity.cut import keep_top_neurons
from gprune.storage.files import Cache, key_of, read_json

log = logging.getLogger("gprune")
CACHE = Cache("speed")
DECODING_STEPS = 8  # number of decoding steps that are timed
MIN_ROUNDS, MAX_ROUNDS = 2, 12  # numbers of rounds of a measurement
MAX_SECONDS = 25.0  # after this time no round begins, except the first ones
MULTIPLES = (1, 8, 16, 32, 64, 128)  # candidates of `best_multiple`
TOLERATED_LOSS = 0.05  # share of a block's time that `best_multiple` ignores
BUSY = 0.1  # a warning is logged if repeats of a measurement differ by more
PICOSECONDS = 1e12  # per second
# A latency table. `neurons` and `groups`: pairs (width of every block, seconds of a layer), the other width being full.
# `multiples`: such pairs for odd multiples of each of `MULTIPLES`. `rest`: seconds of everything outside of the layers.
# `spread`: relative spread of repeated measurements, for information.
Table = dict[str, Any]
Times = tuple[list[float], list[float], list[float]]  # per model: seconds to the first token, per step, in total


def speed_key(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, workload: Mapping[str, int]) -> str:
    """Return the cache key of a table: a hash of machine, threads, version of torch, shapes, dtype and workload."""
    gpu = device.type == "cuda" and torch.cuda.get_device_name(device)
    machine = [platform.node(), platform.processor(), os.cpu_count(), torch.get_num_threads(), torch.__version__]
    machine += [gpu, torch.get_float32_matmul_precision()]
    shapes = {name: list(parameter.shape) for name, parameter in dense.named_parameters()}
    return key_of(machine=machine, shapes=shapes, dtype=str(dtype), setting=dict(workload), multiples=MULTIPLES)


def speed_table(
    dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, workload: Mapping[str, int], *, measure: bool,
    again: bool = False, run_table: Path | None = None,
) -> Table | None:  # fmt: skip
    """Return the latency table of this machine: that of a resumed run, a cached one, or a new measurement.

    The result is None if there is no stored table and `measure` is false. With `measure` and `again` a cached table is
    measured once more. `run_table`, the file of a resumed run, has priority if its key is that of `speed_key`.
    """
    key = speed_key(dense, device, dtype, workload)
    if run_table is not None:
        content = read_json(run_table)
        if content and content["key"] == key:
            return content["table"]
    table = None if measure and again else CACHE.read(key)
    if measure and table is None:
        log.info("Measuring the latency table of this machine. It is cached; --speed.measure true measures it again")
        table = measure_table(dense, device, dtype, workload)
        CACHE.write(key, table)
    return table


def costs_from_table(table: Table, blocks: Sequence[Block]) -> ModelCosts:
    """Convert a latency table to costs of the model in integer picoseconds.

    The cost of keeping 0, 1, ..., n units of a block is interpolated linearly between measured widths. Models are timed
    as a whole. If several blocks become narrower at once, the saved time is divided between them in proportion to their
    parameters.
    """
    layers = by_layer(blocks)
    neurons = [(b.neurons, b.unit_cost("ffn")) for b in blocks]
    groups = [(b.kv_groups, b.unit_cost("attention")) for b in blocks]
    neuron_costs = _unit_costs(table["neurons"], neurons, len(layers))
    group_costs = _unit_costs(table["groups"], groups, len(layers))
    all_units = [neurons[-1] + groups[-1] for neurons, groups in zip(neuron_costs, group_costs, strict=True)]
    # Mean time of a layer besides its units, such as norms. It is saved only if the whole layer is removed.
    _, seconds_per_layer = table["neurons"][-1]
    fixed = max(0, round(PICOSECONDS * seconds_per_layer) - sum(all_units) // len(layers))
    whole = [cost + (fixed if b.order == 0 else 0) for b, cost in zip(blocks, all_units, strict=True)]
    costs = [BlockCosts(*of_block) for of_block in zip(neuron_costs, group_costs, whole, strict=True)]
    return costs, round(PICOSECONDS * table["rest"])


def _unit_costs(points: Sequence[tuple[int, float]], blocks: Sequence[tuple[int, int]], layers: int) -> list[list[int]]:
    """Return for each block the picoseconds of keeping 0, 1, ..., all of its units, compared with keeping none.

    `points` are (width, seconds of a layer), and `blocks` (number of units, parameters of a unit).
    """
    widths, seconds = map(np.array, zip(*points, strict=True))
    total = sum(parameters for units, parameters in blocks if units) or 1
    # Mean number of units that blocks had in each measurement, weighted by the parameters of a unit. Equal to `widths`
    # if all blocks are equally wide.
    timed = np.array([sum(p * min(units, width) for units, p in blocks) / total for width in widths.tolist()])
    increasing = np.maximum.accumulate(seconds)  # only because of noise a wider block can seem faster
    # Seconds of a layer if every block had as many units as each width. Where only some blocks became narrower, the
    # measured difference comes from these alone.
    grown, grown_timed = np.diff(widths), np.diff(timed)
    ratio = np.divide(grown, grown_timed, out=np.ones(len(grown)), where=grown_timed > 0)
    equally_wide = increasing + np.append(0.0, np.cumsum(np.diff(increasing) * (ratio - 1)))
    costs = []
    for units, parameters in blocks:
        share = parameters * layers / total  # of the block in the seconds of a layer
        interpolated = np.interp(range(units + 1), widths, equally_wide)
        costs.append([round(PICOSECONDS * share * (value - interpolated[0])) for value in interpolated])
    return costs


def best_multiple(table: Table) -> int:
    """Return the smallest of `MULTIPLES` at which this machine loses at most `TOLERATED_LOSS` of speed, and log it.

    The cost of a neuron is the time of its block beyond that of a block with one neuron, divided by the neurons. The
    loss of a multiple is the extra cost compared with the best multiple, as a share of the time of the block.
    """
    _, seconds_of_one = table["neurons"][0]
    lowest_cost = min((seconds - seconds_of_one) / neurons for neurons, seconds in table["multiples"])
    losses = {}
    for neurons, seconds in table["multiples"]:
        multiple = max(multiple for multiple in MULTIPLES if neurons % multiple == 0)
        losses[multiple] = ((seconds - seconds_of_one) / neurons - lowest_cost) * neurons / seconds
    best = min(multiple for multiple, loss in losses.items() if loss <= TOLERATED_LOSS)
    shares = ", ".join(f"{multiple}: {loss:.1%}" for multiple, loss in losses.items())
    log.info("Widths in multiples of %d lose %.1f %% of the speed (loss: %s)", best, 100 * losses[best], shares)
    return best


@torch.no_grad()
def random_model(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with the shapes of `dense` and random weights."""
    model = copy.deepcopy(dense).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(torch.randn(tensor.shape).mul(0.02))
    return model


@torch.no_grad()
def measure_table(
    dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, workload: Mapping[str, int]
) -> Table:
    """Measure the latency table (`Table`) with random weights.

    Widths of FFNs are 1 and the quarters of the widest block's N neurons, with all KV groups. Numbers of KV groups are
    1 and the quarters of the largest number G, with all neurons. All models are timed in alternation.
    """
    model = random_model(dense, device, dtype)
    model_widths = widths(model)
    N, G = max(model_widths["neurons"]), max(model_widths["kv_groups"])
    narrowest = min(filter(None, model_widths["neurons"]))  # 0 is the width of a block without an FFN
    quarters = range(1, 5)
    neurons = sorted({1, *(max(1, N * quarter // 4) for quarter in quarters)})
    groups = sorted({1, *(max(1, G * quarter // 4) for quarter in quarters)})
    # About 3/4 of the narrowest block: an odd multiple of each candidate, so not a multiple of a larger candidate.
    odd_multiples = [m * (2 * round(3 * narrowest / m / 8 - 0.5) + 1) for m in MULTIPLES]
    sizes = {  # (neurons, KV groups) of every block
        "neurons": [(n, G) for n in neurons],
        "groups": [(N, g) for g in groups],
        "multiples": [(n, G) for n in odd_multiples if 0 < n <= narrowest],
    }
    models = {size: narrow_model(model, *size) for sizes_of_kind in sizes.values() for size in sizes_of_kind}
    depth = len(decoder_layers(model))
    without_layers = narrow_model(model, N, G)
    del decoder_layers(without_layers)[:]
    (_, _, (*seconds, rest)), spread = time_generation([*models.values(), without_layers], **workload)
    # Clamped, because noise can make the difference zero or negative.
    layer_seconds = {size: max((total - rest) / depth, 1e-12) for size, total in zip(models, seconds, strict=True)}
    return {
        "neurons": [[n, layer_seconds[n, g]] for n, g in sizes["neurons"]],
        "groups": [[g, layer_seconds[n, g]] for n, g in sizes["groups"]],
        "multiples": [[n, layer_seconds[n, g]] for n, g in sizes["multiples"]],
        "rest": rest,
        "spread": spread,
    }


def narrow_model(model: PreTrainedModel, neurons: int, groups: int) -> PreTrainedModel:
    """Return a model with smaller blocks for timing, which shares memory with the given model.

    Its weights are arbitrary numbers from the memory of the given model.
    """
    blocks = blocks_of(model)
    ffn = [keep_top_neurons(b, torch.zeros(b.all_neurons), min(neurons, b.neurons)) for b in blocks]
    attention = [torch.arange(b.kv_groups) < groups for b in blocks]
    narrow = slice_model(copy_sharing_weights(model), Masks(ffn, attention), inplace=True)
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


@torch.no_grad()
def time_generation(
    models: Sequence[PreTrainedModel], *, batch: int, prompt: int, generate: int
) -> tuple[Times, float]:
    """Time greedy `model.generate` of `generate` tokens. Return the minimum over rounds, and the median spread.

    Each round times every model once, so that background load affects all of them equally. The time of a decoding step
    is the mean of the first `DECODING_STEPS` steps.
    """
    models = [copy_sharing_weights(model) for model in models]
    ids = torch.ones(batch, prompt, dtype=torch.long, device=device_of(models[0]))
    lengths = (1, 1 + DECODING_STEPS) if generate else (1,)

    def time_once(model: PreTrainedModel, tokens: int) -> float:
        """Return the median seconds of generating a number of tokens, over at least 0.05 seconds of calls."""
        names = {"generate": model.generate, "ids": ids, "mask": torch.ones_like(ids), "tokens": tokens}
        statement, threads = "generate(ids, attention_mask=mask, max_new_tokens=tokens)", torch.get_num_threads()
        return Timer(statement, globals=names, num_threads=threads).blocked_autorange(min_run_time=0.05).median

    rounds: list[list[list[float]]] = []
    start = time.monotonic()
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and time.monotonic() - start < MAX_SECONDS):
        rounds.append([[time_once(model, tokens) for tokens in lengths] for model in models])
    repeats = torch.tensor(rounds, dtype=torch.float64)  # (rounds, models, lengths)
    fastest = repeats.amin(0)
    first_seconds = fastest[:, 0]
    step_seconds = (fastest[:, -1] - first_seconds).clamp(min=0) / DECODING_STEPS
    spread = float((repeats.amax(0) / fastest - 1).median())
    if spread > BUSY:
        log.warning("Repeated measurements of speed differ by %.0f %%. The machine is busy.", 100 * spread)
    return (first_seconds.tolist(), step_seconds.tolist(), (first_seconds + generate * step_seconds).tolist()), spread
