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

from gprune.models.modeling_pruned import LayerConfig, find_parent

Watcher = Callable[[Tensor, int, Tensor], Tensor | None]  # see `watch_experts`


@dataclass
class Watch:
    """Handle of a watcher; `remove` removes it, as for hooks."""

    experts: nn.Module
    watcher: Watcher

    def remove(self) -> None:
        """Remove the watcher. A second call is a no-op."""
        attributes = self.experts.__dict__
        if self.watcher in attributes.get("watchers", ()):
            attributes["watchers"].remove(self.watcher)
            if not attributes["watchers"]:
                del attributes["watchers"], attributes["forward"]
                attributes |= attributes.pop("before")  # the instance's previous forward method, if it had one


def watch_experts(experts: nn.Module, watcher: Watcher, down: tuple[str, int] = ("down_proj", 2)) -> Watch:
    """Call `watcher(x, expert, tokens)` before each expert's down projection, which then reads the returned tensor.

    x (n, N) are the activations of the n tokens that are routed to expert number `expert`; `tokens` (n,) int64 are
    their positions in the flattened batch. If a watcher returns None, x is not changed. Watchers are called in the
    order of their registration. A forward method of the instance, such as accelerate's, is replaced too, so offloaded
    weights must be in memory (`gprune.models.offload.resident`).
    """
    attributes = experts.__dict__  # a forward method in it hides that of the class
    if "watchers" not in attributes:
        # Restored when the last watcher is removed.
        before = {"forward": attributes["forward"]} if "forward" in attributes else {}
        is_standard = has_standard_forward(experts)
        watched_forward = _forward_standard if is_standard else partial(_forward_of_class, down[0])

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return watched_forward(experts, *args, **kwargs)

        attributes |= {"watchers": [], "before": before, "forward": forward}
    attributes["watchers"].append(watcher)
    return Watch(experts, watcher)


def has_standard_forward(experts: nn.Module) -> bool:
    """Return whether experts are of the standard form in transformers, by flags that the class has in this case.

    Standard experts compute act(gate x) * up x without biases, with all rows of gate before those of up. This is what
    `_forward_standard` computes.
    """
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    flags_match = all(getattr(experts, name, None) is value for name, value in flags.items())
    apply_gate = getattr(type(experts), "_apply_gate", None)
    is_default_gate = getattr(apply_gate, "__name__", "") == "_default_apply_gate"
    return flags_match and hasattr(experts, "act_fn") and is_default_gate


def _forward_standard(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward pass, expert by expert: hidden (n, H), top_k_index and top_k_weights (n, k) -> (n, H)."""
    output = torch.zeros_like(hidden)
    for expert in range(len(experts.down_proj)):
        tokens, choices = (top_k_index == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        gate, up = F.linear(hidden[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        x = _call_watchers(experts.__dict__["watchers"], experts.act_fn(gate) * up, expert, tokens)
        y = F.linear(x, experts.down_proj[expert]) * top_k_weights[tokens, choices, None]
        output = output.index_add(0, tokens, y.to(output.dtype))
    return output


def _call_watchers(watchers: list[Watcher], x: Tensor, expert: int, tokens: Tensor) -> Tensor:
    """Call watchers in order, each with the result of the one before. Return the activations (n, N) to use."""
    for watcher in watchers:
        new_x = watcher(x, expert, tokens)
        if new_x is not None:
            x = new_x
    return x


def _forward_of_class(down: str, experts: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Forward pass of the class itself, with products with down projections intercepted."""
    module, name = find_parent(experts, down)
    config = getattr(experts, "config", None)
    if config is not None:  # use the class's loop instead of grouped kernels
        experts.__dict__["config"] = LayerConfig(config, {"_experts_implementation": "eager"})
    try:
        with _DownProjectionWatch(getattr(module, name), experts.__dict__["watchers"]):
            return type(experts).forward(experts, *args, **kwargs)
    finally:
        if config is not None:
            experts.__dict__["config"] = config


# Functions of PyTorch that `_DownProjectionWatch` recognises.
PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}
ROW_SELECTIONS = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
# Functions whose result is the same weight in another form.
ALIASES = {Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.permute, Tensor.T.__get__, Tensor.mT.__get__}
ALIASES |= {Tensor.to, Tensor.contiguous, Tensor.type, Tensor.float}


class _DownProjectionWatch(TorchFunctionMode):
    """Calls watchers at products of activations with stacked down projections, however they are written in Python.

    The tokens of an expert are known from the last selection of rows before the product. A class either selects rows
    for each expert, or selects the rows of all experts in order and then splits them.
    """

    def __init__(self, down: Tensor, watchers: list[Watcher]):
        super().__init__()
        self.watchers = watchers
        self.number_of_experts = len(down)
        # id of a tensor with down projections -> its expert, or None if it has those of all experts
        self.expert_by_id: dict[int, int | None] = {id(down): None}
        self.aliases: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
        self.selected_rows: Tensor | None = None  # (m,) int64: tokens of the last selection of rows
        self.next_row = 0  # number of these rows that previous products have used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute `func(*args, **kwargs)`. Before a product with a down projection, call the watchers."""
        kwargs = kwargs or {}
        if func in PRODUCTS and len(args) > 1 and id(args[1]) in self.expert_by_id:
            x, weight, *rest = args
            args = (self._watched_activations(x, self.expert_by_id[id(weight)]), weight, *rest)
        result = func(*args, **kwargs)
        if func in ROW_SELECTIONS and args:
            self._track_selection(args, kwargs, result)
        elif func in ALIASES and id(args[0]) in self.expert_by_id:
            self._track_alias(result, self.expert_by_id[id(args[0])])
        return result

    def _track_alias(self, tensor: Tensor, expert: int | None) -> None:
        """Remember that a tensor has the down projection of an expert, or of all experts (None)."""
        self.expert_by_id[id(tensor)] = expert
        self.aliases.append(tensor)

    def _track_selection(self, args: Any, kwargs: Any, result: Tensor) -> None:
        """Remember an expert's down projection that is selected from the stack, or the tokens of selected rows."""
        source = args[0]
        index = args[-1] if len(args) > 1 else kwargs.get("index")
        if id(source) in self.expert_by_id:
            is_number = isinstance(index, int) and not isinstance(index, bool)
            is_scalar = isinstance(index, Tensor) and index.dim() == 0
            if is_number or is_scalar:
                self._track_alias(result, int(index))
            return
        rows = index[0] if isinstance(index, tuple) and index else index
        if isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.dim() == 1 and source.dim() == 2:
            self.selected_rows = rows
            self.next_row = 0

    def _watched_activations(self, x: Tensor, expert: int | None) -> Tensor:
        """Return the activations that the product should read, from (n, N) of one expert, or (E, n, N) of all."""
        with torch._C.DisableTorchFunction():  # operations of watchers are not tracked
            if expert is None:  # each expert computes all tokens
                tokens = torch.arange(x.shape[1], device=x.device)
                activations = [_call_watchers(self.watchers, x[e], e, tokens) for e in range(self.number_of_experts)]
                return torch.stack(activations)
            if self.selected_rows is None:  # this expert computes all tokens
                tokens = torch.arange(len(x), device=x.device)
            else:
                end = self.next_row + len(x)
                tokens = self.selected_rows[self.next_row : end]
                self.next_row = end
            return _call_watchers(self.watchers, x, expert, tokens) if len(x) else x
