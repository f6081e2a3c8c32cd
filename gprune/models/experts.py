"""Watch what enters the down projections of experts.

transformers computes all of a block's experts in one call, which no hook can look into. While experts are watched, that
call is replaced by one that computes expert by expert; the original is put back with the last watcher's removal.
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
        """Take the watcher off; doing so twice is harmless."""
        own = self.experts.__dict__
        if self.watcher in own.get("watchers", ()):
            own["watchers"].remove(self.watcher)
            if not own["watchers"]:
                del own["watchers"], own["forward"]
                own |= own.pop("before")


def watch_experts(experts: nn.Module, watcher: Watcher) -> Watch:
    """Call `watcher(x, expert, tokens)` before each expert's down projection, which then gets what it returns.

    x (n, N) are the activations of the n tokens that are routed to expert number `expert`; `tokens` (n,) int64 are
    their places in the flattened batch. A watcher that returns None leaves x as it is. Watchers are called in the order
    in which they were added. An instance's own forward, such as accelerate's, is replaced too: the weights that it
    would fetch have to be there (`gprune.models.offload.resident`).
    """
    own = experts.__dict__
    if "watchers" not in own:
        before = {"forward": own["forward"]} if "forward" in own else {}
        own |= {"watchers": [], "before": before, "forward": lambda *inputs: _run(experts, *inputs)}
    own["watchers"].append(watcher)
    return Watch(experts, watcher)


def _run(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass expert by expert: hidden (n, H), top_k_index and top_k_weights (n, k) -> (n, H)."""
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
