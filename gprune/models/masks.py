"""Keep masks, and gates and masks on a running model: forward hooks multiply units by gates, or zero masked units.

Hooks exist only inside context managers. Weights do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from gprune.models.experts import (
    Watch,
    is_of_experts,
    kept_experts,
    watch_experts,
    without_experts,
)
from gprune.models.families import decoder_layers
from gprune.models.offload import device_of
from gprune.models.paths import owner_of
from gprune.models.units import units_of
from gprune.units.structure import Units, current_name, kinds_of_units, of_kind, unit_key


class Masks(dict[str, Tensor]):
    """Keep masks by key of units (`units_of`), bool, True = keep.

    `neurons.BLOCK` is (neurons,), or (experts x neurons,), where experts keep equally many or none: an expert that
    keeps none is removed with its row of the router, if others keep some. `kv_groups.BLOCK` is (kv_groups,). Units
    without a mask are kept.
    """

    @classmethod
    def of_blocks(cls, ffn: Sequence[Tensor], attention: Sequence[Tensor]) -> Masks:
        """Return masks from those of the neurons and of the KV groups of each block."""
        of_kinds = (("neurons", ffn), ("kv_groups", attention))
        return cls({unit_key(kind, b): mask for kind, masks in of_kinds for b, mask in enumerate(masks)})

    @property
    def ffn(self) -> tuple[Tensor, ...]:
        """The masks of neurons, one per block."""
        return tuple(of_kind(self, "neurons"))

    @property
    def attention(self) -> tuple[Tensor, ...]:
        """The masks of KV groups, one per block."""
        return tuple(of_kind(self, "kv_groups"))

    @property
    def blocks(self) -> list[bool]:
        """Whether each block is kept. A block that keeps no units is removed with its norms, as are all other blocks of
        its layer. A block that has no units is kept."""
        is_kept = []
        for ffn, attention in zip(self.ffn, self.attention, strict=True):
            has_no_units = len(ffn) + len(attention) == 0
            is_kept.append(ffn.any() | attention.any() | has_no_units)
        return torch.stack(is_kept).tolist()  # one transfer if masks are on a GPU

    def layers(self, units: Iterable[Units]) -> list[bool]:
        """Whether each layer is kept, whose blocks are kept together; `units` are those of the model."""
        by_layer = {u.layer: u.number for u in units if u.kind == "neurons"}
        block_is_kept = self.blocks
        return [block_is_kept[number] for number in by_layer.values()]

    def kept(self, u: Units) -> Tensor:
        """Return which of these units are kept, (rows x count,) bool."""
        if u.kind == "experts":
            return kept_experts(self[unit_key("neurons", u.number)], u.count)
        return self[u.key] if u.key in self else torch.ones(u.size, dtype=torch.bool)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Masks:
        """Return masks from the tensors of a safetensors file, also of an earlier version."""
        return cls({current_name(name): mask.bool() for name, mask in tensors.items()})

    def __eq__(self, other: object) -> bool:
        """Return whether two masks keep the same units."""
        if not isinstance(other, Masks):
            return False
        return self.keys() == other.keys() and all(torch.equal(mask, other[key]) for key, mask in self.items())

    def __ne__(self, other: object) -> bool:
        """Return whether two masks keep other units; that of `dict` would compare tensors by `==`."""
        return not self == other

    __hash__ = None


def hidden_in(out: Any) -> Tensor:
    """Return the hidden states in the output of a module."""
    return out if isinstance(out, Tensor) else hidden_in(out[0])


def with_hidden(out: Any, hidden: Tensor) -> Any:
    """Return the output of a module with other hidden states."""
    return hidden if isinstance(out, Tensor) else type(out)([hidden, *out[1:]])


@contextmanager
def changed(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the hidden states h that a module returns by `change(h)` while the context lasts."""
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: with_hidden(output, change(hidden_in(output)))
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def gated(
    model: PreTrainedModel, gates: Mapping[str, Tensor], units: Sequence[Units] | None = None
) -> Iterator[PreTrainedModel]:
    """Multiply the channels of units by their gate, (rows x count,), by key; units without a gate are not changed.

    Gates are read in every forward pass, so they may be replaced between steps. Norms over all heads are computed over
    the heads that pass the gate. Leaving the context removes all hooks. `units` are those of the model, found if None.
    """
    layers = decoder_layers(model)
    with ExitStack() as hooks:
        for u in units_of(model) if units is None else units:
            if u.key in gates and u.count:
                for handle in _register_gates(layers[u.layer], u, gates):
                    hooks.callback(handle.remove)
        yield model


def _register_gates(layer: torch.nn.Module, u: Units, gates: Mapping[str, Tensor]) -> Iterator[RemovableHandle | Watch]:
    """Multiply the channels of units by their gate, and adapt norms over all of them. Yield handles with `remove`."""

    def expert_gate(x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        """Watcher of experts that multiplies the activations of one expert by its gate."""
        return x * gates[u.key].view(u.rows, -1)[expert].to(x)

    if is_of_experts(layer, u):
        yield watch_experts(layer, u, expert_gate)
        return
    yield _multiply_input(layer.get_submodule(u.reads), lambda x: u.of_channels(gates[u.key].to(x)))
    for s in u.slices:
        if s.is_norm:
            of_norm = replace(u, slices=(s,))  # whose channels are those of the norm
            norm = layer.get_submodule(owner_of(s.path))
            yield from _renormalise(norm, lambda x, of_norm=of_norm: of_norm.of_channels(gates[u.key].to(x)))


def _multiply_input(module: torch.nn.Module, gate_for: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Multiply the input x of a module by `gate_for(x)` from now on."""

    def pre_hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * gate_for(inputs[0]), *inputs[1:])

    return module.register_forward_pre_hook(pre_hook)


def _renormalise(norm: torch.nn.Module, gate_for: Callable[[Tensor], Tensor]) -> Iterator[RemovableHandle]:
    """Convert a root-mean-square norm over all heads to the norm over kept heads.

    The gate g keeps m = sum g of n channels. With c = sqrt(n / m), rms(x_kept) = rms(c g x). So the norm is called with
    c g x and returns c x_kept / rms(x_kept), and its output is divided by c.
    """

    def scale(gate: Tensor) -> Tensor:
        """Return c, (), in float32 or a wider dtype of the gate. It is finite even if the gate keeps nothing."""
        kept = gate.sum(dtype=torch.promote_types(gate.dtype, torch.float32))
        return (len(gate) / kept.clamp_min(1)).sqrt()

    def pre_hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate = gate_for(inputs[0])
        return (inputs[0] * gate * scale(gate), *inputs[1:])

    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output / scale(gate_for(output))

    yield norm.register_forward_pre_hook(pre_hook)
    yield norm.register_forward_hook(hook)


@contextmanager
def bypassed(model: PreTrainedModel, removed: Collection[int]) -> Iterator[PreTrainedModel]:
    """Let removed layers (by number) return their input while the context lasts."""

    def return_input(_module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook that replaces the hidden states in a layer's output by those in its input."""
        return with_hidden(output, args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        for number in removed:
            layer = decoder_layers(model)[number]
            hooks.callback(layer.register_forward_hook(return_input, with_kwargs=True).remove)
        yield model


@contextmanager
def masked(model: PreTrainedModel, masks: Masks) -> Iterator[PreTrainedModel]:
    """Let the model compute as if it were pruned while the context lasts. Blocks without kept units are skipped, and
    routers do not choose experts without kept neurons.

    Args:
        model: a supported model.
        masks: keep masks by key of units. Their sizes are not checked.

    Raises:
        UserError: if the model's type is not supported.
    """
    units, layers = units_of(model), decoder_layers(model)
    # Masks are copied to the devices once, and not in every forward pass.
    gates: dict[str, Tensor] = {}
    for kind in kinds_of_units(units):
        alike = [u for u in units if u.kind == kind and u.key in masks]
        if alike and not torch.stack([masks[u.key].all() for u in alike]).all():
            gates |= {u.key: masks[u.key].to(device_of(layers[u.layer])) for u in alike}
    neurons = [u for u in units if u.kind == "neurons"]
    removed = {u.layer for u, stays in zip(neurons, masks.blocks, strict=True) if not stays}
    kept = {u.number: masks.kept(u) for u in units if u.kind == "experts"}
    lost = {number: (~keep).nonzero()[:, 0].tolist() for number, keep in kept.items() if keep.any()}
    with bypassed(model, removed), without_experts(layers, units, lost), gated(model, gates, units):
        yield model
