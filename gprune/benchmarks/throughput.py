"""The task `speed`: prefill, decoding and the time to the first token of models that take turns."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from gprune.benchmarks.settings import SPEED
from gprune.benchmarks.speed import STEPS, machine_of, seconds
from gprune.errors import UserError
from gprune.models.offload import device_of
from gprune.storage.files import key_of


def throughput(models: Sequence[PreTrainedModel], *, batches: Sequence[int], prompt: int) -> list[list[dict[str, Any]]]:
    """Records of each model, one for each batch: what `benchmarks.speed.seconds` measures of all of them in turns.

    `first_token` is in seconds; `prefill` in tokens of the prompts, and `decode` in new tokens per second, of a batch
    together. `decode` is None where its steps cannot be told from the prefill before them. What was measured in the
    same rounds has the same `rounds`, and may be divided by each other.

    Raises:
        UserError: for more tokens than the models have positions.
    """
    most = min(getattr(model.config, "max_position_embeddings", math.inf) for model in models)
    if prompt + STEPS > most:
        raise UserError(f"--speed_prompt: expected at most {most - STEPS:,} tokens, got {prompt:,}.")
    machine, records = machine_of(device_of(models[0])), [[] for _ in models]
    for batch in dict.fromkeys(batches):
        taken, spread = seconds(models, batch=batch, prompt=prompt, generate=STEPS)
        shared = {
            "task": SPEED, "kind": SPEED, "split": "none", "batch": batch, "prompt": prompt, "spread": spread,
            "standard_protocol": False, "note": f"prompts of {prompt} tokens, {machine}",
            "content_hash": key_of(machine=[machine, platform.node()], batch=batch, prompt=prompt)[:16],
            "rounds": key_of(seconds=[list(of) for of in taken])[:16],
        }  # fmt: skip
        for own, model, of in zip(records, models, taken, strict=True):
            rates = {"prefill": batch * prompt / of.first, "decode": batch / of.step if of.step else None}
            own.append(shared | rates | {"first_token": of.first, "dtype": str(model.dtype).removeprefix("torch.")})
    return records
