"""What the rows of a list will cost: tokens, and hours at this machine's speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gprune.config import RunConfig
from gprune.models.blocks import blocks_of
from gprune.models.loading import load_model
from gprune.models.losses import next_token_loss
from gprune.models.offload import device_of
from gprune.pipeline.plan import check
from gprune.sparsity.gates import gated
from gprune.studies.listing import Row


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def token_hours(pending: Sequence[Row]) -> str:
    """Tokens that are still to be computed, at most, and how long they take here, by the first row's model."""
    plans = [check(row.config) for row in pending]
    forward, backward = sum(p.forward_tokens for p in plans), sum(p.forward_backward_tokens for p in plans)
    here = of_backward = hours = ""
    cfg = pending[0].config
    if not (cfg.model.shard or cfg.model.max_memory):  # else one process says nothing of it, or takes minutes
        forward_speed, backward_speed = speeds(cfg, plans[0].device)
        here, of_backward = f" ({forward_speed:.0f}/s here)", f" ({backward_speed:.0f}/s)"
        hours = f": {(forward / forward_speed + backward / backward_speed) / 3600:.1f} hours"
    tasks = ", tasks not counted" if any(row.wanted_tasks for row in pending) else ""
    return (
        f"{len(pending)} configurations: at most {forward:,} tokens forward{here} and {backward:,} forward and "
        f"backward{of_backward}, shared passes counted for each{tasks}{hours}"
    )


def speeds(cfg: RunConfig, device: torch.device) -> tuple[float, float]:
    """Tokens per second forward, and forward and backward, of one batch through the dense model."""
    m = cfg.model
    model, _ = load_model(
        m.name, dtype=getattr(torch, m.dtype), device_map=m.device_map, trust_remote_code=m.trust_remote_code
    )
    model = model if m.device_map else model.to(device)
    shape = cfg.corpora.batch_size, cfg.corpora.seq_len
    ids = torch.randint(model.config.vocab_size, shape, device=device_of(model))
    with torch.no_grad():
        next_token_loss(model, ids[:, :64])  # warm
        forward = seconds(lambda: next_token_loss(model, ids).item())  # the number: a GPU is done
    gates = [torch.ones(b.experts * b.neurons, requires_grad=True, device=device_of(b.layer)) for b in blocks_of(model)]
    with gated(model, gates):
        backward = seconds(lambda: (next_token_loss(model, ids).backward(), gates[0].grad.sum().item()))
    return ids.numel() / forward, ids.numel() / backward
