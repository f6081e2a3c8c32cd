"""Hooks on experts: on inputs of their down projections, and on the choice of their router.

transformers computes all experts of a block in one call, in which hooks are not possible. While experts have a watcher,
this call is replaced by one that computes expert by expert. Removing the last watcher restores the original call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from gprune.models.modeling_pruned import LayerConfig, find_parent
from gprune.models.offload import load_parameter, resident
from gprune.models.paths import attribute_at, is_inside
from gprune.models.products import PRODUCT_MODULES
from gprune.units.structure import Units

Watcher = Callable[[Tensor, int, Tensor], Tensor | None]  # see `watch_experts`
# Fields of configurations with the number of experts to which each token is routed, and of groups of experts.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
EXPERT_GROUPS = ("n_group", "num_expert_group")


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


def is_of_experts(layer: nn.Module, u: Units) -> bool:
    """Return whether experts read these units, and not a linear layer."""
    return bool(u.reads) and not isinstance(layer.get_submodule(u.reads), PRODUCT_MODULES)


def watch_experts(layer: nn.Module, neurons: Units, watcher: Watcher) -> Watch:
    """Call `watcher(x, expert, tokens)` before each expert's down projection, which then reads the returned tensor.

    x (n, N) are the activations of the n tokens that are routed to expert number `expert`; `tokens` (n,) int64 are
    their positions in the flattened batch. If a watcher returns None, x is not changed. Watchers are called in the
    order of their registration. A forward method of the instance, such as accelerate's, is replaced too.
    """
    experts, down = layer.get_submodule(neurons.reads), neurons.slices[-1].path
    attributes = experts.__dict__  # a forward method in it hides that of the class
    if "watchers" not in attributes:
        # Restored when the last watcher is removed.
        before = {"forward": attributes["forward"]} if "forward" in attributes else {}
        is_standard = has_standard_forward(experts)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with resident(experts):
                if is_standard:
                    return _forward_standard(experts, *args, **kwargs)
                return _forward_of_class(experts, down.removeprefix(f"{neurons.reads}."), *args, **kwargs)

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


def _forward_of_class(experts: nn.Module, down: str, *args: Any, **kwargs: Any) -> Tensor:
    """Forward pass of the class itself, with products with down projections intercepted."""
    config = getattr(experts, "config", None)
    if config is not None:  # use the class's loop instead of grouped kernels
        experts.__dict__["config"] = LayerConfig(config, {"_experts_implementation": "eager"})
    try:
        with _DownProjectionWatch(attribute_at(experts, down), experts.__dict__["watchers"]):
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


# Choice of the router


def experts_per_token(config: PreTrainedConfig) -> int | None:
    """Return to how many experts each token is routed; None if the configuration does not tell."""
    for name in EXPERTS_PER_TOKEN:
        if value := getattr(config, name, None):
            return max(value) if isinstance(value, list | tuple) else value  # some configs have a list by layer
    return None


def active_experts(config: PreTrainedConfig, neurons: Units) -> int:
    """Return how many experts of these neurons compute each token; 1 without experts, all if the config does not
    tell."""
    return min(experts_per_token(config) or neurons.rows, neurons.rows)


def active_share(config: PreTrainedConfig, neurons: Units) -> float:
    """Return the share of experts that compute each token; 1 without experts."""
    return active_experts(config, neurons) / neurons.rows


def least_experts(config: PreTrainedConfig, experts: int) -> tuple[int, int]:
    """Return the number of groups of a router with E experts, and how many experts each group needs at least.

    Without groups of equal size there is one. Routers with groups choose groups first, by the two best experts of each,
    and then experts among them.
    """
    text_config = config.get_text_config(decoder=True)
    needed = experts_per_token(text_config) or experts
    groups = next((value for name in EXPERT_GROUPS if (value := getattr(text_config, name, None))), None)
    if groups is None or experts % groups:
        return 1, min(needed, experts)
    chosen = getattr(text_config, "topk_group", None) or groups
    return groups, min(max(2, -(-needed // min(chosen, groups))), experts // groups)


def router_needs(experts: int, config: PreTrainedConfig, why_not: str) -> tuple[int, int, str]:
    """Return the groups of a router, the least number of experts, and why none may be removed, or "".

    `why_not` is a reason that is known already.
    """
    groups, least = least_experts(config, experts)
    needed = experts_per_token(config.get_text_config(decoder=True))
    if not why_not and needed is None:
        why_not = "its configuration does not tell how many experts a token needs"
    if not why_not and needed >= experts:
        why_not = f"its router chooses all {experts} experts"
    return groups, groups * least, why_not


def kept_experts(keep: Tensor, experts: int) -> Tensor:
    """Return which of E experts keep neurons, (E,) bool, from the keep mask of their neurons, (E x N,)."""
    return keep.view(experts, -1).any(1)


def routing_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the numbers of the chosen experts, (n, k) int64, and their weights, (n, k), in a call of experts."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    chosen = next((tensor for tensor in tensors if tensor.dtype == torch.int64 and tensor.dim() == 2), None)
    if chosen is not None:
        for tensor in tensors:
            if tensor.shape == chosen.shape and tensor.is_floating_point():
                return chosen, tensor
    raise ValueError("experts are not called with numbers of chosen experts and their weights")


def watch_routing(experts: nn.Module, watcher: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call `watcher(chosen, weights)` before experts compute, with the result of `routing_in`."""

    def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher(*routing_in(args, kwargs))

    return experts.register_forward_pre_hook(pre_hook, with_kwargs=True)


def expert_output(layer: nn.Module, neurons: Units, expert: int, x: Tensor, experts: Units | None = None) -> Tensor:
    """Return the outputs (n, H) of an expert for inputs x (n, N) of its down projection, not weighted by the router.

    `experts` may have biases of the outputs.
    """
    down = neurons.slices[-1]
    weight = load_parameter(*find_parent(layer, down.path))[expert]
    y = x @ (weight.T if down.dim == 2 else weight).to(x)
    for s in () if experts is None else experts.slices:
        bias = attribute_at(layer, s.path) if is_inside(s.path, neurons.reads) else None
        if bias is not None and bias.shape == (neurons.rows, y.shape[1]):
            y = y + bias[expert].to(y)
    return y


@contextmanager
def without_experts(
    layers: Sequence[nn.Module], units: Iterable[Units], removed: Mapping[int, Collection[int]]
) -> Iterator[None]:
    """Exclude experts, by block, from the choice of their router while the context lasts.

    While a layer computes, the router has the rows of kept experts only, as in the smaller model. The numbers that it
    chooses are then converted to those of the whole stack.
    """
    with ExitStack() as hooks:
        for u in units:
            if u.kind == "experts" and removed.get(u.number):
                hooks.enter_context(_without_experts(layers[u.layer], u, removed[u.number]))
        yield


@contextmanager
def _without_experts(layer: nn.Module, experts: Units, removed: Collection[int]) -> Iterator[None]:
    """Exclude the experts of one block; see `without_experts`."""
    E, stack = experts.count, experts.reads
    kept = torch.tensor([expert for expert in range(E) if expert not in removed])
    numbers = torch.cat([kept, torch.tensor([E])])  # the number after the last expert means none
    of_router = [s for s in experts.slices if not is_inside(s.path, stack)]
    sized = [path for path in experts.attributes if not is_inside(path, stack)]
    restored = ExitStack()  # what the router had before

    def shrink_router(layer: nn.Module, _args: Any) -> None:
        restored.enter_context(resident(layer))
        for s in of_router:
            module, name = find_parent(layer, s.path)
            tensor = getattr(module, name)
            rows = torch.cat([kept, torch.arange(E, tensor.shape[s.dim])]).to(tensor.device)
            smaller, values = tensor.detach().index_select(s.dim, rows), module._parameters
            if name in module._buffers:
                values = module._buffers
            else:
                smaller = nn.Parameter(smaller, requires_grad=False)
            restored.callback(values.__setitem__, name, tensor)
            values[name] = smaller
        for path in sized:  # attributes with the number of experts
            module, name = find_parent(layer, path)
            if hasattr(module, name):
                restored.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, len(kept))

    def convert_numbers(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chosen, _ = routing_in(args, kwargs)
        converted = numbers.to(chosen.device)[chosen]
        args = tuple(converted if value is chosen else value for value in args)
        return args, {name: converted if value is chosen else value for name, value in kwargs.items()}

    with ExitStack() as hooks:
        hooks.callback(restored.close)
        hooks.callback(layer.register_forward_pre_hook(shrink_router).remove)
        hooks.callback(layer.register_forward_hook(lambda *_: restored.close(), always_call=True).remove)
        # First, so that other hooks see the numbers of the whole stack.
        pre_hook = layer.get_submodule(stack).register_forward_pre_hook(convert_numbers, with_kwargs=True, prepend=True)
        hooks.callback(pre_hook.remove)
        yield
