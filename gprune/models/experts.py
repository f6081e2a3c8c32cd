"""Hooks on inputs of the down projections of experts.

transformers computes all experts of a block in one call, in which hooks are not possible. While experts have a watcher,
this call is replaced by one that computes expert by expert. Removing the last watcher restores the original call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gprune.models.modeling_pruned import LayerConfig, find

Watcher = Callable[[Tensor, int, Tensor], Tensor | None]


@dataclass
class Watch:
    """Handle of a watcher; `remove` removes it, as for hooks."""

    experts: nn.Module
    watcher: Watcher

    def remove(self) -> None:
        """Remove the watcher. A second call is a no-op."""
        own = self.experts.__dict__
        if self.watcher in own.get("watchers", ()):
            own["watchers"].remove(self.watcher)
            if not own["watchers"]:
                del own["watchers"], own["forward"]
                own |= own.pop("before")


def watch_experts(experts: nn.Module, watcher: Watcher, down: tuple[str, int] = ("down_proj", 2)) -> Watch:
    """Call `watcher(x, expert, tokens)` before each expert's down projection, which then reads the returned tensor.

    x (n, N) are the activations of the n tokens that are routed to expert number `expert`; `tokens` (n,) int64 are
    their positions in the flattened batch. If a watcher returns None, x is not changed. Watchers are called in the
    order of their registration. A forward method of the instance, such as accelerate's, is replaced too, so offloaded
    weights must be in memory (`gprune.models.offload.resident`).

    Args:
        experts: the module of the experts.
        watcher: the function.
        down: path of the stacked down projections in `experts`, and the dimension of neurons.
    """
    own = experts.__dict__
    if "watchers" not in own:
        before = {"forward": own["forward"]} if "forward" in own else {}
        run = _run if plain(experts) else partial(_run_as_stored, down[0])

        def forward(*inputs: Any, **named: Any) -> Tensor:
            return run(experts, *inputs, **named)

        own |= {"watchers": [], "before": before, "forward": forward}
    own["watchers"].append(watcher)
    return Watch(experts, watcher)


def plain(experts: nn.Module) -> bool:
    """Return whether experts compute act(gate x) * up x without biases, with gate above up, as `_run` does."""
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    same = all(getattr(experts, name, None) is value for name, value in wanted.items())
    gate = getattr(type(experts), "_apply_gate", None)
    return same and hasattr(experts, "act_fn") and getattr(gate, "__name__", "") == "_default_apply_gate"


def _run(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward pass, expert by expert: hidden (n, H), top_k_index and top_k_weights (n, k) -> (n, H)."""
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


def _run_as_stored(down: str, experts: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """Forward pass of the class itself, with products with down projections intercepted."""
    module, name = find(experts, down)
    config = getattr(experts, "config", None)
    if config is not None:  # use the class's loop instead of grouped kernels
        experts.__dict__["config"] = LayerConfig(config, {"_experts_implementation": "eager"})
    try:
        with _Products(getattr(module, name), experts.__dict__["watchers"]):
            return type(experts).forward(experts, *inputs, **named)
    finally:
        if config is not None:
            experts.__dict__["config"] = config


PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}
TAKEN = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
VIEWS = {Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.permute, Tensor.T.__get__, Tensor.mT.__get__}
VIEWS |= {Tensor.to, Tensor.contiguous, Tensor.type, Tensor.float}


class _Products(TorchFunctionMode):
    """Intercepts products of activations with stacked down projections, however they are written in Python.

    The tokens of an expert are known from the last selection of rows before the product. A class either selects rows
    for each expert, or selects the rows of all experts in order and then splits them.
    """

    def __init__(self, down: Tensor, watchers: list[Watcher]):
        super().__init__()
        self.watchers = watchers
        self.experts: dict[int, int | None] = {id(down): None}  # down projection of one expert, or of all (None), by id
        self.count = len(down)
        self.kept: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
        self.rows: Tensor | None = None
        self.next = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS and len(args) > 1 and id(args[1]) in self.experts:
            args = (self._seen(args[0], self.experts[id(args[1])]), *args[1:])
        result = func(*args, **kwargs)
        if func in TAKEN and args:
            self._taken(args, kwargs, result)
        elif func in VIEWS and id(args[0]) in self.experts:
            self._keep(result, self.experts[id(args[0])])
        return result

    def _keep(self, tensor: Tensor, expert: int | None) -> None:
        self.experts[id(tensor)] = expert
        self.kept.append(tensor)

    def _taken(self, args: Any, kwargs: Any, result: Tensor) -> None:
        index = args[-1] if len(args) > 1 else kwargs.get("index")
        if id(args[0]) in self.experts:
            if (isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)) and not isinstance(
                index, bool
            ):
                self._keep(result, int(index))
            return
        index = index[0] if isinstance(index, tuple) and index else index
        if isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1 and args[0].dim() == 2:
            self.rows, self.next = index, 0

    def _seen(self, x: Tensor, expert: int | None) -> Tensor:
        with torch._C.DisableTorchFunction():
            if expert is None:  # all experts at once, with all tokens each
                tokens = torch.arange(x.shape[1], device=x.device)
                return torch.stack([self._watched(x[e], e, tokens) for e in range(self.count)])
            n, start = len(x), self.next
            if self.rows is None:
                tokens = torch.arange(n, device=x.device)
            else:
                tokens, self.next = self.rows[start : start + n], start + n
            return self._watched(x, expert, tokens) if n else x

    def _watched(self, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        for watcher in self.watchers:
            seen = watcher(x, expert, tokens)
            x = x if seen is None else seen
        return x
