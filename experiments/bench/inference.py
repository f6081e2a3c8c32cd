"""Benchmark of dense and pruned models: prefill, decoding with a KV cache, peak memory, file size."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .measure import MIB, Table, flops, in_turn, peak_above
from .models import Settings, pair_of, tokens

GOAL = 0.9  # speed-up relative to its bound, for prefill with the largest batch


def inference(settings: Settings, clock: Callable[[], float] = time.perf_counter) -> list[Table]:
    """Measure tokens/s and peak memory of both models, and the speed-up relative to its bound."""
    pair = pair_of(settings)
    models = pair.models
    weights = {key: model.get_memory_footprint(return_buffers=False) for key, model in models.items()}
    speed, memory = [], [["weights", *(weights[key] / MIB for key in models), weights["pruned"] / weights["dense"]]]
    for kind, make, count in (("prefill", prefill, settings.seq_len), ("decode", decode, settings.new_tokens)):
        for batch in settings.batch_sizes:
            name = f"{kind}, batch {batch}"
            calls = {key: make(model, settings, batch) for key, model in models.items()}
            timing = in_turn(calls, settings.repeats, settings.device, clock=clock)
            rates = [batch * count / timing.median(key) for key in models]
            bound, up = flops(calls["dense"]) / flops(calls["pruned"]), timing.ratio("dense", "pruned")
            goal = GOAL if kind == "prefill" and batch == max(settings.batch_sizes) else None
            row = [name, *rates, up, timing.range("dense", "pruned"), bound, up / bound, goal]
            speed.append([*row, None if goal is None else up / bound >= goal])
            peaks = [weights[key] + peak_above(calls[key], settings.device) for key in models]
            memory.append([f"peak, {name}", *(p / MIB for p in peaks), peaks[1] / peaks[0]])
    sizes = [file_bytes(model) for model in models.values()]
    memory.append(["file", *(s / MIB for s in sizes), sizes[1] / sizes[0]])
    protocol = settings.protocol(models["dense"], pair.how)
    shape = f"Prefill of {settings.seq_len} tokens, all logits; {settings.new_tokens} new tokens after as many."
    return [
        Table(
            "Inference, speed", f"{protocol} {shape}",
            ["", "dense, tokens/s", "pruned, tokens/s", "speed-up", "rounds", "FLOP bound", "reached", "goal", "met"],
            speed,
        ),
        Table(
            "Inference, memory", f"{protocol} A peak is the weights and what the call takes above them.",
            ["", "dense, MiB", "pruned, MiB", "pruned / dense"], memory,
        ),
    ]  # fmt: skip


def prefill(model: PreTrainedModel, settings: Settings, batch: int) -> Callable[[], Tensor]:
    """Return a function that computes the logits of all positions, (batch, seq_len, vocabulary)."""
    ids = tokens(model, batch, settings.seq_len, settings.seed)

    @torch.inference_mode()
    def call() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return call


def decode(model: PreTrainedModel, settings: Settings, batch: int) -> Callable[[], Tensor]:
    """Return a function that decodes `new_tokens` tokens one by one, after a prompt of `seq_len` in the KV cache."""
    ids = tokens(model, batch, settings.seq_len + settings.new_tokens, settings.seed)
    cache = DynamicCache()
    # The argument was renamed in transformers 5.2x.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.inference_mode():
        model(input_ids=ids[:, : settings.seq_len], use_cache=True, logits_to_keep=1, **{name: cache})

    @torch.inference_mode()
    def call() -> Tensor:
        for at in range(settings.seq_len, ids.shape[1]):
            logits = model(input_ids=ids[:, at : at + 1], use_cache=True, **{name: cache}).logits
        cache.crop(-settings.new_tokens)  # so that the next call starts after the prompt
        return logits

    return call


def file_bytes(model: PreTrainedModel) -> int:
    """Size of the model as a safetensors file in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        return path.stat().st_size
