"""Keep masks, and gates and masks on a running model: forward hooks multiply units by gates, or zero masked units.

Hooks exist only inside context managers. Weights do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from gprune.models.blocks import Block, blocks_of
from gprune.models.experts import Watch, experts_without_neurons, watch_experts, without_experts
from gprune.models.offload import device_of


@dataclass(frozen=True)
class Masks:
    """Keep masks, True = keep, one tensor per block."""

    # (neurons,) bool, or (experts x neurons,), where experts keep equally many or none. An expert that keeps none is
    # removed with its row of the router, if others keep some.
    ffn: list[Tensor]
    attention: list[Tensor]  # (kv_groups,) bool; all True when attention is out of scope

    @property
    def blocks(self) -> list[bool]:
        """Whether each block is kept. A block that keeps no units is removed with its norms, as are all other blocks of
        its layer. A block that has no units is kept."""
        is_kept = []
        for ffn, attention in zip(self.ffn, self.attention, strict=True):
            has_no_units = len(ffn) + len(attention) == 0
            is_kept.append(ffn.any() | attention.any() | has_no_units)
        return torch.stack(is_kept).tolist()  # one transfer if masks are on a GPU

    def channels(self, block: Block) -> dict[str, Tensor]:
        """Return which columns are kept, bool.

        `ffn`: (experts x neurons,) of `down`; `attention`: (heads x head_dim,) of the output projection.
        """
        groups = self.attention[block.index].repeat_interleave(block.channels_per_group)
        return {"ffn": self.ffn[block.index], "attention": groups}

    def tensors(self) -> dict[str, Tensor]:
        """Return masks by the names `ffn.0`, `attention.0` and so on, as in safetensors files."""
        ffn = {f"ffn.{index}": mask for index, mask in enumerate(self.ffn)}
        attention = {f"attention.{index}": mask for index, mask in enumerate(self.attention)}
        return ffn | attention

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Masks:
        """Return masks from the result of `tensors`."""
        number_of_blocks = len(tensors) // 2
        ffn = [tensors[f"ffn.{index}"].bool() for index in range(number_of_blocks)]
        attention = [tensors[f"attention.{index}"].bool() for index in range(number_of_blocks)]
        return cls(ffn, attention)

    def __eq__(self, other: object) -> bool:
        """Return whether two masks keep the same units."""
        if not isinstance(other, Masks):
            return False
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

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
    model: PreTrainedModel, ffn: Sequence[Tensor] | None, attention: Sequence[Tensor] | None = None
) -> Iterator[PreTrainedModel]:
    """Multiply each block's FFN channels by its gate (N,), or (E x N,) with experts, and its KV groups by a gate (G,).

    `ffn` and `attention` have a gate per block; None: no gates. They are read in every forward pass, so their elements
    may be replaced between steps. Norms over all heads are computed over the heads that pass the gate. Leaving the
    context removes all hooks.
    """
    with ExitStack() as hooks:
        for block in blocks_of(model):
            if ffn is not None and block.down is not None:
                hooks.callback(_register_ffn_gate(block, ffn).remove)
            if attention is not None and block.output is not None:
                for handle in _register_attention_gates(block, attention):
                    hooks.callback(handle.remove)
        yield model


def _register_ffn_gate(block: Block, gates: Sequence[Tensor]) -> RemovableHandle | Watch:
    """Multiply the inputs of a block's down projection by its gate, (N,) or (E x N,). Return a handle with `remove`."""

    def expert_gate(x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        """Watcher of experts that multiplies the activations of one expert by its gate."""
        return x * gates[block.index].view(block.experts, -1)[expert].to(x)

    if block.has_experts:
        return watch_experts(block, expert_gate)
    return _multiply_input(block.down.host, _channel_gate(gates, block.index))


def _register_attention_gates(block: Block, gates: Sequence[Tensor]) -> Iterator[RemovableHandle]:
    """Multiply the heads of a block by the gate of their KV group, and adapt norms over all heads. Yield handles."""
    query_gate = _channel_gate(gates, block.index, repeats=block.channels_per_group)
    yield _multiply_input(block.output.host, query_gate)
    if block.family.query_norm is not None:
        yield from _renormalise(block.module(block.family.query_norm), query_gate)
    if block.family.key_norm is not None:
        key_gate = _channel_gate(gates, block.index, repeats=block.head_dim)
        yield from _renormalise(block.module(block.family.key_norm), key_gate)


def _channel_gate(gates: Sequence[Tensor], index: int, *, repeats: int = 1) -> Callable[[Tensor], Tensor]:
    """Return a function of x that returns the current gate of each channel of x, in its dtype and on its device."""

    def gate_for(x: Tensor) -> Tensor:
        gate = gates[index].to(x)
        return gate.repeat_interleave(repeats) if repeats > 1 else gate

    return gate_for


def _multiply_input(module: torch.nn.Module, gate_for: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Multiply the input of a module by a gate from now on. `gate_for` is a result of `_channel_gate`."""

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
    """Let the layers of removed blocks (by number) return their input while the context lasts."""

    def return_input(_module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook that replaces the hidden states in a layer's output by those in its input."""
        return with_hidden(output, args[0] if args else kwargs["hidden_states"])

    blocks = blocks_of(model) if removed else []
    # By layer, because a layer may have several blocks.
    layers = {blocks[index].layer_index: blocks[index].layer for index in removed}
    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.register_forward_hook(return_input, with_kwargs=True).remove)
        yield model


@contextmanager
def masked(model: PreTrainedModel, masks: Masks) -> Iterator[PreTrainedModel]:
    """Let the model compute as if it were pruned while the context lasts. Blocks without kept units are skipped, and
    routers do not choose experts without kept neurons.

    Args:
        model: a supported model.
        masks: one keep mask per block and scope. Their sizes are not checked.

    Raises:
        UserError: if the model's type is not supported.
    """
    blocks = blocks_of(model)
    # Masks are copied to the devices once, and not in every forward pass.
    devices = [device_of(block.layer) for block in blocks]
    ffn = [mask.to(device) for mask, device in zip(masks.ffn, devices, strict=True)]
    attention = [mask.to(device) for mask, device in zip(masks.attention, devices, strict=True)]
    all_groups_kept = bool(torch.stack([mask.all() for mask in masks.attention]).all())
    removed = [index for index, stays in enumerate(masks.blocks) if not stays]
    experts = without_experts(model, experts_without_neurons(blocks, masks.ffn))
    with bypassed(model, removed), experts, gated(model, ffn, None if all_groups_kept else attention):
        yield model
