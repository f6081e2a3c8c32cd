"""Measurements of the benchmark: time, memory and FLOPs of calls, and tables with the protocol.

Other processes on the machine slow down whatever runs at the same time. Therefore the compared calls run alternately in
several rounds, and ratios are medians over rounds of the ratio in a round.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """Seconds per call by name, with one entry per round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, over: str, under: str) -> list[float]:
        """Seconds of `over` divided by seconds of `under`, by round."""
        return [a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)]

    def ratio(self, over: str, under: str) -> float:
        """Median of `ratios`."""
        return statistics.median(self.ratios(over, under))

    def range(self, over: str, under: str) -> str:
        """Smallest and largest of `ratios`, as text."""
        ratios = self.ratios(over, under)
        return f"{show(min(ratios))} to {show(max(ratios))}"


def in_turn(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, *, at_least: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:  # fmt: skip
    """Time calls alternately, every second round in reverse order, after one warm-up call each.

    Args:
        calls: functions by name.
        repeats: rounds, at least 1.
        device: is synchronized before the clock is read.
        at_least: seconds for which a call is repeated in a round.
        clock: returns seconds; use `time.process_time` on a busy machine.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    def timed(call: Callable[[], object]) -> float:
        gc.collect()
        start, count = now(), 0
        while count == 0 or now() - start < at_least:
            call()
            count += 1
        return (now() - start) / count

    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            seconds[name].append(timed(calls[name]))
    return Timing(seconds)


def flops(call: Callable[[], object]) -> int:
    """FLOPs of a call by FlopCounterMode: matrix products and attention, 2 per multiply-add.

    FlopCounterMode does not count fused attention on the CPU. It is counted here as on a GPU: all T x T products.
    """

    def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[-2] * (width + value[-1])

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        call()
    return counter.get_total_flops()


def peak_above(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call in bytes minus the memory before it; at least one page.

    On a GPU, memory of PyTorch's allocator. On a CPU, resident memory of the process. On a CPU, the call must have run
    before, since mapped weights would count when they are first read.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return max(torch.cuda.max_memory_allocated(device) - before, 4096)
    if not STATUS.exists():
        return 4096  # unknown
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)  # freed memory that malloc keeps would hide the memory of the call
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 4096)


def resident(kind: str) -> int:
    """Resident memory of this process in bytes: current (VmRSS) or peak (VmHWM)."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


@dataclass(frozen=True)
class Table:
    """A table with the protocol of its measurements."""

    title: str
    protocol: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]  # str, bool, int, float, or None for an empty cell

    def __str__(self) -> str:
        rows = [[show(cell) for cell in row] for row in self.rows]
        alignment = ["left"] + ["right"] * (len(self.header) - 1)
        table = pandas.DataFrame(rows, columns=list(self.header)).to_markdown(
            index=False, disable_numparse=True, colalign=alignment
        )
        return f"**{self.title}.** {self.protocol}\n\n{table}\n"


def show(cell: Any) -> str:
    """Format a cell of a table. Numbers have four digits."""
    match cell:
        case None:
            return ""
        case bool():
            return "yes" if cell else "no"
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
        case _:
            return str(cell)


def machine(device: torch.device) -> str:
    """Describe processor, threads and torch version for a protocol."""
    threads = torch.get_num_threads()
    on = f"{processor()}, {threads} thread{'' if threads == 1 else 's'}"
    if device.type == "cuda":
        on = f"{torch.cuda.get_device_name(device)} ({on})"
    return f"{on}, torch {torch.__version__}"


def processor() -> str:
    """Name of the processor, and its extensions for bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    name = known.get("model name", platform.machine()).strip()
    flags = {*known.get("flags", "").split(), *known.get("Features", "").split()}
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if flag in flags]
    return f"{name} ({' '.join(extensions)})" if extensions else name
