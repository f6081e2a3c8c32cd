"""Latency table: the time of a model on this machine as a function of its widths, measured once per workload.

A workload is a batch of prompts and a number of generated tokens: seconds = prefill + tokens x decoding step. Whole
models are timed, because the weights of a single layer would stay in the processor's cache.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression
from torch.utils.benchmark import Timer
from transformers import GenerationConfig, PreTrainedModel

from gprune.benchmarks.settings import SPEED
from gprune.errors import UserError
from gprune.models.blocks import Block, blocks_of, by_layer, decoder_layers
from gprune.models.copies import copy_without_hooks
from gprune.models.masks import Masks
from gprune.models.offload import device_of
from gprune.models.surgery import prune, widths
from gprune.runs.schema import MeasuredSpeed
from gprune.sparsity.cost import Price
from gprune.sparsity.cut import top_of_experts
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_json, write_json

log = logging.getLogger("gprune")
SPEED_TABLE = "speed.json"  # file in a run's folder
STEPS = 8  # number of decoding steps that are timed
ROUNDS, LONG = (2, 12), 25.0  # smallest and largest number of rounds; seconds after which no round begins
NOISY = 0.1  # a table with a larger spread of repeats is measured again, and a warning is logged
DAY = 86_400.0  # seconds after which a table is measured again
MULTIPLES = (1, 8, 16, 32, 64, 128)  # candidates of `best_multiple`
# Seconds of a block as pairs (width, seconds) for `neurons`, `groups` and `multiples` of neurons; seconds of the `rest`
# of the model; `spread` of repeats.
Table = dict[str, Any]
Times = tuple[list[float], list[float], list[float]]  # per model: seconds to the first token, per step, in total


_checked: set[Path] = set()  # tables that this process has measured or verified


def speed_key(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int]) -> str:
    """Return the cache key of a table: machine, threads, versions, shapes, dtype and workload."""
    machine = [platform.node(), platform.processor(), os.cpu_count(), torch.get_num_threads(), torch.__version__]
    machine += [device.type == "cuda" and torch.cuda.get_device_name(device), torch.get_float32_matmul_precision()]
    shapes = {name: list(parameter.shape) for name, parameter in dense.named_parameters()}
    return key_of(machine=machine, shapes=shapes, dtype=str(dtype), setting=dict(setting), multiples=MULTIPLES)


def speed_table(
    dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int], *, measure: bool,
    again: bool = False, own: Path | None = None,
) -> Table | None:  # fmt: skip
    """Return the latency table of this machine, cached or measured; None if it is not cached and `measure` is false.

    Args:
        dense: the model without weights.
        device: the device.
        dtype: the dtype of the weights.
        setting: the workload.
        measure: whether to measure a table that is missing or, as `outdated` finds, no longer valid.
        again: whether to measure in any case.
        own: the table in a run's folder (`keep_table`); a resumed run uses it.
    """
    key = speed_key(dense, device, dtype, setting)
    if own is not None and (kept := read_json(own, check=_not_kept, sealed=True)) and kept["key"] == key:
        return kept["table"]
    path = cache_dir() / "speed" / f"{key}.json"
    if (table := read_json(path, check=MeasuredSpeed.problem, sealed=True)) is None and not measure:
        return None
    why = "once for these shapes and this workload"
    if table is not None and measure:
        why = outdated(table, path, dense, device, dtype, setting, again=again)
    if measure and why:
        log.info("Measuring the latency table of this machine, %s", why)
        write_json(path, table := measure_table(dense, device, dtype, setting))
        if table["spread"] > NOISY:
            log.warning("The latency table is noisy (%.0f %%). The next run measures it again.", 100 * table["spread"])
        _checked.add(path)
    return table


def outdated(
    table: Table, path: Path, dense: PreTrainedModel, device: torch.device, dtype: torch.dtype,
    setting: Mapping[str, int], *, again: bool,
) -> str | None:  # fmt: skip
    """Return why a cached table has to be measured again, or None if it is valid.

    Reasons are `again`, a noisy table, an age above a day, and a wrong prediction for the dense model, which is timed.
    """
    if again:
        return "again, because of --speed.measure"
    if path in _checked:
        return None
    if table["spread"] > NOISY:
        return f"again: repeats of the cached table differed by {table['spread']:.0%}"
    if (age := time.time() - path.stat().st_mtime) > DAY:
        return f"again: the cached table is {age / DAY:.0f} days old"
    log.info("Comparing the latency table with one measurement of the dense model")
    taken = dense_seconds(dense, device, dtype, setting)
    ratio = taken / (len(decoder_layers(dense)) * table["neurons"][-1][1] + table["rest"])
    _checked.add(path)
    if abs(ratio - 1) > max(NOISY, 2 * table["spread"]):
        return f"again: the dense model takes {ratio:.2f} times as long as in the cached table"
    return None


def keep_table(table: Table, key: str, file: Path) -> None:
    """Store the table of a run in its folder, so that a resumed run has the same budget."""
    write_json(file, {"key": key, "table": table})


def _not_kept(content: Any) -> str | None:
    """Return why the content of a file is not valid for `keep_table`, or None."""
    if not isinstance(content, dict) or not {"key", "table"} <= content.keys():
        return "not a latency table"
    return MeasuredSpeed.problem(content["table"])


def price_by(table: Table, blocks: Sequence[Block]) -> Price:
    """Return the price of units in picoseconds, by linear interpolation between measured widths.

    If all points are within the spread of repeats of a straight line, that line is used. Blocks of one layer, whose
    widths were measured together, share the seconds of the layer in proportion to their parameters.
    """

    def saved(points: Sequence[tuple[int, float]], most: int, share: float = 1.0) -> list[int]:
        kept, taken = zip(*points, strict=True)
        line = np.polyval(np.polyfit(kept, taken, min(1, len(kept) - 1)), kept)
        if np.abs(taken / line - 1).max() <= table["spread"]:
            taken = line
        taken = np.interp(range(most + 1), kept, isotonic_regression(taken))  # except for noise, narrower is faster
        return [round(1e12 * share * (seconds - taken[0])) for seconds in taken]

    shares = [[_share(b, own, kind) for own in by_layer(blocks) for b in own] for kind in ("ffn", "attention")]
    tables = [
        (saved(table["neurons"], b.neurons, of_ffn), saved(table["groups"], b.kv_groups, of_attention))
        for b, of_ffn, of_attention in zip(blocks, *shares, strict=True)
    ]
    units = [neurons[-1] + groups[-1] for neurons, groups in tables]
    of_layers = [sum(units[b.index] for b in own) for own in by_layer(blocks)]
    fixed = max(0, round(1e12 * table["neurons"][-1][1]) - max(of_layers))
    whole = [cost + fixed * (b.order == 0) for b, cost in zip(blocks, units, strict=True)]
    return Price(*zip(*tables, strict=True), whole, round(1e12 * table["rest"]))


def _share(block: Block, of_layer: Sequence[Block], kind: str) -> float:
    """A block's share of the parameters of all units of this kind in its layer; 1 where it is alone."""
    counts = [b.unit_cost(kind) * (b.neurons if kind == "ffn" else b.kv_groups) for b in of_layer]
    return counts[block.order] / (sum(counts) or 1) if len(counts) > 1 else 1.0


def best_multiple(table: Table) -> int:
    """Return the smallest of `MULTIPLES` at which this machine loses no speed, and log it.

    The cost of a neuron is the time of its block beyond that of a block with one neuron, divided by the neurons. The
    loss of a multiple is the extra cost compared with the best multiple; losses within measurement noise are ignored.
    With a noisy table at most `NOISY` is ignored, and multiples above 16, which could make a target impossible, are not
    considered.
    """
    one, points, noise = table["neurons"][0][1], table["multiples"], table["spread"]
    least = min((taken - one) / neurons for neurons, taken in points)
    lost = {max(m for m in MULTIPLES if n % m == 0): ((t - one) / n - least) * n / t for n, t in points}
    known = {multiple: share for multiple, share in lost.items() if noise <= NOISY or multiple <= 16}
    best = min((m for m, share in known.items() if share <= min(noise, NOISY)), default=min(known, key=known.get))
    shares = ", ".join(f"{multiple}: {share:.1%}" for multiple, share in lost.items())
    what = "lose no speed" if round(lost[best], 3) == 0 else f"lose {lost[best]:.1%} of the speed"
    log.info("Widths in multiples of %d %s (loss: %s; spread of repeats: %.1f %%)", best, what, shares, 100 * noise)
    return best


@torch.no_grad()
def random_model(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of the same shapes with random weights."""
    whole = copy.deepcopy(dense).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*whole.parameters(), *whole.buffers()):
        tensor.copy_(torch.randn(tensor.shape).mul(0.02))
    return whole


@torch.no_grad()
def dense_seconds(
    dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int]
) -> float:
    """Measure the seconds of the dense model for a workload in the smallest number of rounds."""
    (_, _, (taken,)), _ = seconds([random_model(dense, device, dtype)], long=0, **setting)
    return taken


@torch.no_grad()
def measure_table(
    dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int]
) -> Table:
    """Measure the latency table with random weights."""
    whole = random_model(dense, device, dtype)
    (N, G), narrow = (max(of_blocks) for of_blocks in widths(whole).values()), min(widths(whole)["neurons"])
    neurons, groups = (sorted({1, *(max(1, n * part // 4) for part in range(1, 5))}) for n in (N, G))
    odd = (m * (2 * round(3 * narrow / m / 8 - 0.5) + 1) for m in MULTIPLES)  # odd, about 3/4 of the width
    sizes = {"neurons": [(n, G) for n in neurons], "groups": [(N, g) for g in groups]}
    sizes["multiples"] = [(n, G) for n in odd if 0 < n <= narrow]
    models = {size: narrowed(whole, *size) for of in sizes.values() for size in of}
    depth, unpruned = len(decoder_layers(whole)), narrowed(whole, N, G)
    del decoder_layers(unpruned)[:]  # leaves the parts that are never pruned
    (_, _, (*taken, rest)), spread = seconds([*models.values(), unpruned], **setting)
    of_block = {size: max((t - rest) / depth, 1e-12) for size, t in zip(models, taken, strict=True)}
    table = {kind: [[size[kind == "groups"], of_block[size]] for size in of] for kind, of in sizes.items()}
    return table | {"rest": rest, "spread": spread}


def narrowed(whole: PreTrainedModel, neurons: int, groups: int) -> PreTrainedModel:
    """Return a model with narrower blocks that shares memory with the whole one; its weights are arbitrary."""
    blocks = blocks_of(whole)
    ffn = [
        top_of_experts(torch.zeros(b.experts * b.neurons), min(neurons, b.neurons), experts=b.experts) for b in blocks
    ]
    small = prune(sharing(whole), Masks(ffn, [torch.arange(b.kv_groups) < groups for b in blocks]), inplace=True)
    for mine, own in zip(small.parameters(), whole.parameters(), strict=True):
        mine.data = own.data.flatten()[: mine.numel()].view(mine.shape)
    return small


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with the same tensors, without hooks, and with a generation config that does not stop early."""
    copied = copy_without_hooks(model, {id(p): p for p in model.parameters()})
    copied.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return copied.eval()


def machine_of(device: torch.device) -> str:
    """Describe the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


@torch.no_grad()
def seconds(
    models: Sequence[PreTrainedModel], *, batch: int, prompt: int, generate: int, long: float | None = None
) -> tuple[Times, float]:
    """Time greedy generation with transformers; return `Times` and the spread of repeats (slowest / fastest - 1).

    The result is the fastest of several rounds. In each round all models are timed in alternation, so that other
    processes on the machine affect them equally. The time of a decoding step is the mean of the first `STEPS` steps.

    Args:
        models: the models.
        batch: number of prompts.
        prompt: tokens of each prompt.
        generate: number of generated tokens after the first one.
        long: seconds after which no round begins, except the first two. Default: `LONG`.
    """
    long = LONG if long is None else long
    models = [sharing(model) for model in models]
    ids = torch.ones(batch, prompt, dtype=torch.long, device=device_of(models[0]))
    rounds, began, lengths = [], time.monotonic(), (1, 1 + STEPS) if generate else (1,)

    def taken(model: PreTrainedModel, tokens: int) -> float:
        work = {"generate": model.generate, "ids": ids, "mask": torch.ones_like(ids), "tokens": tokens}
        statement, threads = "generate(ids, attention_mask=mask, max_new_tokens=tokens)", torch.get_num_threads()
        return Timer(statement, globals=work, num_threads=threads).blocked_autorange(min_run_time=0.05).median

    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.monotonic() - began < long):
        rounds.append([[taken(model, tokens) for tokens in lengths] for model in models])
    repeats = torch.tensor(rounds, dtype=torch.float64)  # (rounds, models, lengths)
    best = repeats.amin(0)
    first, step = best[:, 0], (best[:, -1] - best[:, 0]).clamp(min=0) / STEPS
    if (spread := float((repeats.amax(0) / best - 1).median())) > NOISY:
        log.warning("Repeated measurements of speed differ by %.0f %%. The machine is busy.", 100 * spread)
    return (first.tolist(), step.tolist(), (first + generate * step).tolist()), spread


def throughput(models: Sequence[PreTrainedModel], *, batches: Sequence[int], prompt: int) -> list[list[dict[str, Any]]]:
    """Measure the task `speed`: records `prefill` (seconds to the first token) and `decode` for each model.

    Tokens per second are for the whole batch. Only numbers with the same `rounds`, measured in alternation, can be
    compared.

    Raises:
        UserError: if prompts are longer than the models' positions.
    """
    most = min(getattr(model.config, "max_position_embeddings", math.inf) for model in models) - STEPS
    if prompt > most:
        raise UserError(f"--speed_prompt must be {most:,} tokens or less; got {prompt:,}.")
    machine, records = machine_of(device_of(models[0])), [[] for _ in models]
    for batch in dict.fromkeys(batches):
        (first, step, _), spread = seconds(models, batch=batch, prompt=prompt, generate=STEPS)
        shared = {
            "kind": SPEED, "split": "none", "batch": batch, "prompt": prompt, "spread": spread,
            "standard_protocol": False, "note": f"prompts of {prompt} tokens, {machine}",
            "rounds": key_of(first=first, step=step)[:16],
            "content_hash": key_of(machine=[machine, platform.node()], batch=batch, prompt=prompt)[:16],
        }  # fmt: skip
        for i, model in enumerate(models):
            shared["dtype"] = str(model.dtype).removeprefix("torch.")
            for task, tokens, spent in (("prefill", batch * prompt, first[i]), ("decode", batch, step[i])):
                if spent:  # 0 if decoding steps are too fast compared with prefill
                    records[i].append(shared | {"task": task, "tokens_per_second": tokens / spent, "seconds": spent})
    return records
