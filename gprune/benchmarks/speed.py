"""How long a model takes on this machine, by the widths of its blocks: a table, measured once for each setting.

A setting is a batch of prompts, and tokens that follow: seconds = prefill + tokens x a step of decoding. Layers are
timed one behind the other, as in the model: the weights of one alone would stay in the processor's cache.
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
SPEED_TABLE = "speed.json"  # in a run's folder
STEPS = 8  # of decoding that are timed
ROUNDS, LONG = (2, 12), 25.0  # least and most, and seconds after which none begins
NOISY = 0.1  # a difference of repeats above it is logged, and a table with it is measured again
DAY = 86_400.0  # seconds after which a table is measured again
MULTIPLES = (1, 8, 16, 32, 64, 128)  # that `best_multiple` chooses from
# Seconds of a block by `neurons`, by `groups`, by neurons on `multiples`, as pairs; of the `rest`; `spread` of repeats
Table = dict[str, Any]
Times = tuple[list[float], list[float], list[float]]  # of each model: seconds to the first token, of a step, of all


_checked: set[Path] = set()  # tables that this process has measured, or compared with the machine as it is now


def speed_key(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int]) -> str:
    """A key of everything that a table depends on: machine, threads, versions, shapes, dtype and setting."""
    machine = [platform.node(), platform.processor(), os.cpu_count(), torch.get_num_threads(), torch.__version__]
    machine += [device.type == "cuda" and torch.cuda.get_device_name(device), torch.get_float32_matmul_precision()]
    shapes = {name: list(parameter.shape) for name, parameter in dense.named_parameters()}
    return key_of(machine=machine, shapes=shapes, dtype=str(dtype), setting=dict(setting), multiples=MULTIPLES)


def speed_table(
    dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int], *, measure: bool,
    again: bool = False, own: Path | None = None,
) -> Table | None:  # fmt: skip
    """The table of this machine for a model without weights: the cache's, or measured; None if neither.

    Where a table is to be spent (`measure`), one in the cache is measured again if `outdated` finds a reason.

    Args:
        again: measure in any case.
        own: where `keep_table` keeps the table of a run; a run that has begun on this machine resumes with that table.
    """
    key = speed_key(dense, device, dtype, setting)
    if own is not None and (kept := read_json(own, check=_not_kept, sealed=True)) and kept["key"] == key:
        return kept["table"]
    path = cache_dir() / "speed" / f"{key}.json"
    if (table := read_json(path, check=MeasuredSpeed.problem, sealed=True)) is None and not measure:
        return None
    why = "once for these shapes and this setting"
    if table is not None and measure:
        why = outdated(table, path, dense, device, dtype, setting, again=again)
    if measure and why:
        log.info("Measuring how fast this machine is by widths, %s", why)
        write_json(path, table := measured(dense, device, dtype, setting))
        if table["spread"] > NOISY:
            log.warning("The table of speed is noisy (%.0f %%): the next run measures again.", 100 * table["spread"])
        _checked.add(path)
    return table


def outdated(
    table: Table, path: Path, dense: PreTrainedModel, device: torch.device, dtype: torch.dtype,
    setting: Mapping[str, int], *, again: bool,
) -> str | None:  # fmt: skip
    """Why a table of the cache is measured again, in words; None if it holds.

    Asked for, noisy, older than a day, or wrong about the dense model: one point is measured to compare.
    """
    if again:
        return "again, as --speed.measure asks"
    if path in _checked:
        return None
    if table["spread"] > NOISY:
        return f"again: repeats of the former table differed by {table['spread']:.0%}"
    if (age := time.time() - path.stat().st_mtime) > DAY:
        return f"again: the former table is {age / DAY:.0f} days old"
    log.info("Comparing the table of speed with one measurement of the dense model")
    taken = dense_seconds(dense, device, dtype, setting)
    ratio = taken / (len(decoder_layers(dense)) * table["neurons"][-1][1] + table["rest"])
    _checked.add(path)
    if abs(ratio - 1) > max(NOISY, 2 * table["spread"]):
        return f"again: the dense model takes {ratio:.2f} times as long as by the former table"
    return None


def keep_table(table: Table, key: str, file: Path) -> None:
    """Keep the table with which a run begins: when the run resumes, its budget is the same."""
    write_json(file, {"key": key, "table": table})


def _not_kept(content: Any) -> str | None:
    """Why the content of a file is not what `keep_table` writes; None if it is."""
    if not isinstance(content, dict) or not {"key", "table"} <= content.keys():
        return "not a table of speed"
    return MeasuredSpeed.problem(content["table"])


def price_by(table: Table, blocks: Sequence[Block]) -> Price:
    """Picoseconds of blocks by what they keep: linear between the measured widths.

    Where all points lie as near to one line as repeats to each other, it is that line: the points differ by noise.
    Blocks of one layer, whose widths were measured together, share its seconds in proportion to their parameters.
    """

    def saved(points: Sequence[tuple[int, float]], most: int, share: float = 1.0) -> list[int]:
        kept, taken = zip(*points, strict=True)
        line = np.polyval(np.polyfit(kept, taken, min(1, len(kept) - 1)), kept)
        if np.abs(taken / line - 1).max() <= table["spread"]:
            taken = line
        taken = np.interp(range(most + 1), kept, isotonic_regression(taken))  # narrower is no slower, but for noise
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
    """The smallest of `MULTIPLES` at which this machine loses nothing; says so.

    A width's neurons cost what its block takes beyond a block of one neuron. What each costs more than at the best
    multiple is lost, unless repeats of one measurement differ by as much. A noisy table hides no more than `NOISY`, and
    asks for no step above 16, which might make a target impossible.
    """
    one, points, noise = table["neurons"][0][1], table["multiples"], table["spread"]
    least = min((taken - one) / neurons for neurons, taken in points)
    lost = {max(m for m in MULTIPLES if n % m == 0): ((t - one) / n - least) * n / t for n, t in points}
    known = {multiple: share for multiple, share in lost.items() if noise <= NOISY or multiple <= 16}
    best = min((m for m, share in known.items() if share <= min(noise, NOISY)), default=min(known, key=known.get))
    shares = ", ".join(f"{multiple}: {share:.1%}" for multiple, share in lost.items())
    what = "lose nothing" if round(lost[best], 3) == 0 else f"lose {lost[best]:.1%}"
    log.info("Widths on multiples of %d %s here (lost: %s; repeats: %.1f %%)", best, what, shares, 100 * noise)
    return best


@torch.no_grad()
def random_model(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these shapes with random weights."""
    whole = copy.deepcopy(dense).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*whole.parameters(), *whole.buffers()):
        tensor.copy_(torch.randn(tensor.shape).mul(0.02))
    return whole


@torch.no_grad()
def dense_seconds(
    dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int]
) -> float:
    """Seconds of the dense model in a setting, measured in the fewest rounds."""
    (_, _, (taken,)), _ = seconds([random_model(dense, device, dtype)], long=0, **setting)
    return taken


@torch.no_grad()
def measured(dense: PreTrainedModel, device: torch.device, dtype: torch.dtype, setting: Mapping[str, int]) -> Table:
    """The table, measured on random weights."""
    whole = random_model(dense, device, dtype)
    (N, G), narrow = (max(of_blocks) for of_blocks in widths(whole).values()), min(widths(whole)["neurons"])
    neurons, groups = (sorted({1, *(max(1, n * part // 4) for part in range(1, 5))}) for n in (N, G))
    odd = (m * (2 * round(3 * narrow / m / 8 - 0.5) + 1) for m in MULTIPLES)  # odd multiples, near three quarters
    sizes = {"neurons": [(n, G) for n in neurons], "groups": [(N, g) for g in groups]}
    sizes["multiples"] = [(n, G) for n in odd if 0 < n <= narrow]
    models = {size: shrunk(whole, *size) for of in sizes.values() for size in of}
    depth, unpruned = len(decoder_layers(whole)), shrunk(whole, N, G)
    del decoder_layers(unpruned)[:]  # what is never pruned is left
    (_, _, (*taken, rest)), spread = seconds([*models.values(), unpruned], **setting)
    of_block = {size: max((t - rest) / depth, 1e-12) for size, t in zip(models, taken, strict=True)}
    table = {kind: [[size[kind == "groups"], of_block[size]] for size in of] for kind, of in sizes.items()}
    return table | {"rest": rest, "spread": spread}


def shrunk(whole: PreTrainedModel, neurons: int, groups: int) -> PreTrainedModel:
    """A model with narrower blocks in the memory of the whole one: what its weights are does not matter."""
    blocks = blocks_of(whole)
    ffn = [
        top_of_experts(torch.zeros(b.experts * b.neurons), min(neurons, b.neurons), experts=b.experts) for b in blocks
    ]
    small = prune(sharing(whole), Masks(ffn, [torch.arange(b.kv_groups) < groups for b in blocks]), inplace=True)
    for mine, own in zip(small.parameters(), whole.parameters(), strict=True):
        mine.data = own.data.flatten()[: mine.numel()].view(mine.shape)
    return small


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same tensors, without hooks, that writes as many tokens as it is asked for."""
    copied = copy_without_hooks(model, {id(p): p for p in model.parameters()})
    copied.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return copied.eval()


def machine_of(device: torch.device) -> str:
    """What computes, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


@torch.no_grad()
def seconds(
    models: Sequence[PreTrainedModel], *, batch: int, prompt: int, generate: int, long: float | None = None
) -> tuple[Times, float]:
    """`Times` of the models, and by how much repeats differ: the slowest over the fastest, less 1.

    As transformers generates, greedily: the fastest of several rounds, in each of which all models take turns, so that
    what else runs on the machine meets them alike. A step of decoding is the mean of the first ones.

    Args:
        long: seconds after which no round begins, but for the first two; `LONG` by default.
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
        log.warning("Repeats of a measured speed differ by %.0f %%: the machine is busy.", 100 * spread)
    return (first.tolist(), step.tolist(), (first + generate * step).tolist()), spread


def throughput(models: Sequence[PreTrainedModel], *, batches: Sequence[int], prompt: int) -> list[list[dict[str, Any]]]:
    """Records of the task `speed` of each model: `prefill`, whose seconds are those to the first token, and `decode`.

    Tokens per second are of a batch together. Numbers of the same `rounds`, in which models took turns, may be divided.

    Raises:
        UserError: for more tokens than the models have positions.
    """
    most = min(getattr(model.config, "max_position_embeddings", math.inf) for model in models) - STEPS
    if prompt > most:
        raise UserError(f"--speed_prompt: expected at most {most:,} tokens, got {prompt:,}.")
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
                if spent:  # steps that cannot be told from the prefill before them have no speed
                    records[i].append(shared | {"task": task, "tokens_per_second": tokens / spent, "seconds": spent})
    return records
