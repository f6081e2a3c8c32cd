"""Seconds and peak memory against tokens, corpora, neurons and blocks, doubled twice, on random Llamas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from gprune.calibration.collector import collect
from gprune.importance.weights import ffn_weights
from gprune.models.blocks import blocks_of

from .measure import MIB, Table, exponent, in_turn, peak_above, show
from .models import Settings, batches, random_llama, tokens
from .pipeline import fit_step, partitioned, random_ranks, threshold_stage

Step = Callable[[], float]  # takes it once, and returns the seconds
LINEAR = 1.1  # an exponent of 1, and a tenth for the noise of a fit through three points


@dataclass(frozen=True)
class Size:
    """Where each number starts, and stays while another one grows."""

    windows: int = 4
    corpora: int = 2
    neurons: int = 1024
    blocks: int = 2
    window: int = 128
    hidden: int = 256
    vocabulary: int = 4096


SMALL = Size(windows=2, corpora=1, neurons=64, blocks=1, window=16, hidden=32, vocabulary=64)
STEPS = {  # what each number reaches: fields of `Size`, but for tokens, which grow by windows
    "tokens": ("calibration", "learning step"),
    "corpora": ("calibration", "partition"),
    "neurons": ("calibration", "calibration with Gram", "partition", "learning step"),
    "blocks": ("calibration", "calibration with Gram", "partition", "learning step"),
}
QUADRATIC = {("neurons", "calibration with Gram")}  # a Gram matrix is neurons x neurons: never linear


def scaling(settings: Settings) -> list[Table]:
    """Growth of each step, as the exponent of a log-log fit: at most linear in everything."""
    base = SMALL if settings.small else Size()
    rows = []
    for axis, steps in STEPS.items():
        field = "windows" if axis == "tokens" else axis
        start = getattr(base, field)
        sizes = [start, 2 * start, 4 * start]
        points = [replace(base, **{field: size}) for size in sizes]
        models = {p: model_at(p, settings) for p in points}
        for step in steps:
            calls = {str(size): STEP[step](models[p], p, settings) for size, p in zip(sizes, points, strict=True)}
            timing = in_turn(calls, settings.repeats)
            seconds = [timing.median(name) for name in calls]
            peaks = [peak_above(call, settings.device) / MIB for call in calls.values()]
            times, memory = exponent(sizes, seconds), exponent(sizes, [max(p, 1.0) for p in peaks])
            linear = None if (axis, step) in QUADRATIC else times <= LINEAR and memory <= LINEAR
            counted = [size * base.window for size in sizes] if axis == "tokens" else sizes
            rows.append([axis, step, joined(counted), joined(seconds), times, joined(peaks), memory, linear])
    shape = ", ".join(f"{getattr(base, f)} {f}" for f in ("hidden", "neurons", "blocks", "corpora", "windows"))
    protocol = settings.protocol(name=f"Random Llamas ({shape} of {base.window} tokens unless said otherwise)")
    header = ["grows", "step", "sizes", "seconds", "exponent", "peak above model, MiB"]
    header += ["exponent of peak", "at most linear"]
    return [Table("Scaling", f"{protocol} Peaks below 1 MiB count as 1 in the fit.", header, rows)]


def joined(values: list[float]) -> str:
    return ", ".join(show(value) for value in values)


def model_at(size: Size, settings: Settings) -> PreTrainedModel:
    model = random_llama(
        hidden=size.hidden, neurons=size.neurons, blocks=size.blocks, vocabulary=size.vocabulary, seed=settings.seed
    )
    return model.to(settings.device, settings.dtype)


def calibration_at(model: PreTrainedModel, size: Size, settings: Settings, *, gram: bool = False) -> Step:
    data = batches(tokens(model, size.windows, size.window, settings.seed), 4)
    # In a list, since a run keeps the statistics of all corpora.
    return lambda: settings.watch.seconds(lambda: [collect(model, data, gram=gram) for _ in range(size.corpora)])


def partition_at(model: PreTrainedModel, size: Size, settings: Settings) -> Step:
    weights = [ffn_weights(block) for block in blocks_of(model)]
    ranks = [random_ranks(size.neurons, size.corpora, settings.seed + b) for b in range(size.blocks)]
    inputs = weights, ranks, settings.device, settings.refinement_steps
    return lambda: settings.watch.seconds(lambda: partitioned(*inputs))


def learning_at(model: PreTrainedModel, size: Size, settings: Settings) -> Step:
    stage = threshold_stage(model, settings)
    (batch,) = batches(tokens(model, size.windows, size.window, settings.seed), size.windows)
    return lambda: fit_step(stage, batch, settings.watch)


STEP = {
    "calibration": calibration_at,
    "calibration with Gram": lambda *args: calibration_at(*args, gram=True),
    "partition": partition_at,
    "learning step": learning_at,
}
