"""Experts seen from inside: transformers computes all of a block's experts in one call, and what enters their down
projections shows nowhere. Here the call is taken apart while somebody watches, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Watcher = Callable[[Tensor, int, Tensor], Tensor | None]


@dataclass
class Watch:
    """A watcher that is on; `remove` takes it off, like the handle of a hook."""

    experts: nn.Module
    watcher: Watcher

    def remove(self) -> None:
        watchers: list[Watcher] = self.experts.__dict__.get("watchers", [])
        if self.watcher in watchers:
            watchers.remove(self.watcher)
        if not watchers:
            _close(self.experts)


def watch_experts(experts: nn.Module, watcher: Watcher) -> Watch:
    """Call `watcher(x, expert, tokens)` with what enters each expert's down projection; what it returns goes on.

    x (n, N) are the activations of the n tokens that are routed to expert number `expert`; `tokens` (n,) int64 are
    their places in the flattened batch. None returned lets x through. Watchers are called in the order they came.
    """
    if "watchers" not in experts.__dict__:
        experts.__dict__["watchers"] = []
        # In place of the class's own forward, which may compute all experts at once, and of one that accelerate has put
        # on the instance; it comes back when this goes. What such a one fetches has to be there meanwhile.
        experts.__dict__["forward_before"] = experts.__dict__.get("forward")
        experts.__dict__["forward"] = lambda *inputs: _run(experts, *inputs)
    experts.__dict__["watchers"].append(watcher)
    return Watch(experts, watcher)


def _close(experts: nn.Module) -> None:
    """Put back what was there before the first watcher."""
    experts.__dict__.pop("watchers", None)
    before = experts.__dict__.pop("forward_before", None)
    experts.__dict__.pop("forward", None)
    if before is not None:
        experts.__dict__["forward"] = before


def _run(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden (n, H), routed to the experts of top_k_index (n, k) with weights (n, k) -> (n, H)."""
    out = torch.zeros_like(hidden)
    for expert in range(len(experts.down_proj)):
        tokens, place = (top_k_index == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        gate, up = F.linear(hidden[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        x = experts.act_fn(gate) * up
        for watcher in experts.__dict__["watchers"]:
            seen = watcher(x, expert, tokens)
            x = x if seen is None else seen
        y = F.linear(x, experts.down_proj[expert]) * top_k_weights[tokens, place, None]
        out = out.index_add(0, tokens, y.to(out.dtype))
    return out
