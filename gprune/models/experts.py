"""Watch what enters the down projections of experts.

transformers computes all of a block's experts in one call, which no hook can look into. While experts are watched, that
call is replaced by one that computes expert by expert; the original is put back with the last watcher's removal.
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


def watch_experts(experts: nn.Module, watcher: Watcher, down: tuple[str, int] = ("down_proj", 2)) -> Watch:
    """Call `watcher(x, expert, tokens)` before each expert's down projection, which then gets what it returns.

    x (n, N) are the activations of the n tokens that are routed to expert number `expert`; `tokens` (n,) int64 are
    their places in the flattened batch. A watcher that returns None leaves x as it is. Watchers are called in the order
    in which they were added. An instance's own forward, such as accelerate's, is replaced too: the weights that it
    would fetch have to be there (`gprune.models.offload.resident`).

    Args:
        down: the stacked tensor of the down projections, a path in `experts`, and the dimension of neurons.
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
    """Whether experts are act(gate x) * up x without biases, gate above up: then `_run` computes what they compute."""
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    same = all(getattr(experts, name, None) is value for name, value in wanted.items())
    gate = getattr(type(experts), "_apply_gate", None)
    return same and hasattr(experts, "act_fn") and getattr(gate, "__name__", "") == "_default_apply_gate"


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


def _run_as_stored(down: str, experts: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """The forward pass of the class itself, in which products with the down projections are seen."""
    module, name = find(experts, down)
    config = getattr(experts, "config", None)
    if config is not None:  # the class's own loop, and no grouped kernel
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
    """Sees the products of activations with stacked down projections, whichever way they are written in Python.

    Which tokens an expert gets is read off the last selection of rows before the product: a loop selects the rows of
    each expert by themselves, or selects all of them, in the order of experts, and splits them.
    """

    def __init__(self, down: Tensor, watchers: list[Watcher]):
        super().__init__()
        self.watchers = watchers
        self.experts: dict[int, int | None] = {id(down): None}  # tensors that hold one expert's down projection, or all
        self.count = len(down)
        self.kept: list[Tensor] = []  # so that no other tensor gets the id of one that is gone
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
            if expert is None:  # all experts at once, each of them sees all tokens
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
