"""Gates and masks on a running model: forward hooks multiply units by gates, or zero masked units.

Hooks exist only inside context managers. Weights do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from gprune.models.blocks import Block, blocks_of
from gprune.models.experts import Watch, watch_experts
from gprune.models.masks import Masks
from gprune.models.offload import device_of
from gprune.models.outputs import with_hidden

Gates = Sequence[Tensor | None] | None  # one per block; None: no gate


@contextmanager
def gated(model: PreTrainedModel, ffn: Gates, attention: Gates = None) -> Iterator[PreTrainedModel]:
    """Multiply each block's FFN channels by its gate (N,), or (E x N,) with experts, and its KV groups by a gate (G,).

    Norms over all heads are computed over the heads that pass the gate. The lists are read in every forward pass, so
    their elements may be replaced between steps. Leaving the context removes all hooks.
    """
    with ExitStack() as taken_off:
        for block in blocks_of(model):
            if ffn is not None and block.down is not None:
                taken_off.callback(_ffn_gate(block, ffn).remove)
            for handle in () if attention is None or block.output is None else _attention_gates(block, attention):
                taken_off.callback(handle.remove)
        yield model


def _ffn_gate(block: Block, gates: Sequence[Tensor | None]) -> RemovableHandle | Watch:
    def expert_gate(x: Tensor, expert: int, tokens: Tensor) -> Tensor | None:
        gate = gates[block.index]
        return None if gate is None else x * gate.view(block.experts, -1)[expert].to(x)

    if block.has_experts:
        return watch_experts(block.down.host, expert_gate, block.family.expert_down)
    return _multiply(block.down.host, _channels(gates, block.index))


def _attention_gates(block: Block, gates: Sequence[Tensor | None]) -> Iterator[RemovableHandle]:
    query = _channels(gates, block.index, repeats=block.channels_per_group)
    yield _multiply(block.output.host, query)
    if block.family.query_norm is not None:
        yield from _renormalise(block.module(block.family.query_norm), query)
    if block.family.key_norm is not None:
        key = _channels(gates, block.index, repeats=block.head_dim)
        yield from _renormalise(block.module(block.family.key_norm), key)


def _channels(gates: Sequence[Tensor | None], index: int, *, repeats: int = 1) -> Callable[[Tensor], Tensor | None]:
    """Return a function that returns the current gate of each channel of x, in its dtype and on its device."""

    def gate_for(x: Tensor) -> Tensor | None:
        gate = gates[index]
        return None if gate is None else gate.to(x).repeat_interleave(repeats) if repeats > 1 else gate.to(x)

    return gate_for


def _multiply(module: torch.nn.Module, gate_for: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    def before(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate = gate_for(inputs[0])
        return inputs if gate is None else (inputs[0] * gate, *inputs[1:])

    return module.register_forward_pre_hook(before)


def _renormalise(norm: torch.nn.Module, gate_for: Callable[[Tensor], Tensor | None]) -> Iterator[RemovableHandle]:
    """Convert a root-mean-square norm over all heads to the norm over kept heads.

    The gate g keeps m = sum g of n channels. With c = sqrt(n / m), rms(x_kept) = rms(c g x). So the norm is called with
    c g x and returns c x_kept / rms(x_kept), and its output is divided by c.
    """

    def scale(gate: Tensor) -> Tensor:
        return (len(gate) / gate.sum().clamp_min(1)).sqrt()

    def before(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate = gate_for(inputs[0])
        return inputs if gate is None else (inputs[0] * gate * scale(gate), *inputs[1:])

    def after(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gate = gate_for(output)
        return output if gate is None else output / scale(gate)

    yield norm.register_forward_pre_hook(before)
    yield norm.register_forward_hook(after)


@contextmanager
def bypassed(model: PreTrainedModel, gone: Iterable[int]) -> Iterator[PreTrainedModel]:
    """Skip the layers of blocks while the context lasts: they return their input."""

    def skip(_module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return with_hidden(output, args[0] if args else kwargs["hidden_states"])

    with ExitStack() as taken_off:
        blocks = blocks_of(model) if (gone := list(gone)) else []
        for layer in {blocks[index].layer_index: blocks[index].layer for index in gone}.values():
            taken_off.callback(layer.register_forward_hook(skip, with_kwargs=True).remove)
        yield model


@contextmanager
def masked(model: PreTrainedModel, masks: Masks) -> Iterator[PreTrainedModel]:
    """Let the model compute as if it were pruned while the context lasts. Blocks without kept units are skipped."""
    blocks = blocks_of(model)
    whole = bool(torch.stack([m.all() for m in masks.attention]).all())
    # Moved to the device once, and not in every forward pass.
    ffn, groups = (
        [m.to(device_of(block.layer)) for m, block in zip(kind, blocks, strict=True)]
        for kind in (masks.ffn, masks.attention)
    )
    gone = [b for b, stays in enumerate(masks.blocks) if not stays]
    with bypassed(model, gone), gated(model, ffn, None if whole else groups):
        yield model
