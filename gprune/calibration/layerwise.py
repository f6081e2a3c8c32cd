"""Collect statistics layer by layer: the whole corpus passes a decoder layer before the next layer begins.

Weights of an offloaded layer are then read once per corpus instead of once per batch, and only one layer's Gram
matrices are in memory. In return, hidden states of the corpus are stored on the CPU: tokens x H in the model's dtype,
134 MB for 16 windows of 1024 tokens of a 7B model in bfloat16.

Layers have other arguments, such as masks and rotary embeddings, which only the decoder computes. To record them, the
decoder first runs once per batch with replaced layers, which record their arguments and return hidden states unchanged.
Then the real layers compute with these arguments, in the same order of batches, so all sums have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.calibration.statistics import CorpusStatistics, StoredGram, gram_bytes
from gprune.errors import UserError, first_line
from gprune.models.blocks import Block, blocks_of, by_layer, decoder_layers
from gprune.models.families import BUILT_IN
from gprune.models.lookup import decoder_of, family_of_config, remember
from gprune.models.losses import LogitTransform
from gprune.models.offload import device_of, is_offloaded, resident
from gprune.models.outputs import hidden_in, with_hidden
from gprune.models.tiny import shrunk, stock_config, tiny_model

GRAMS_IN_MEMORY = 4 * 2**30  # bytes; larger Gram matrices of a run are written to files block by block
Store = Callable[[Block, dict[str, Tensor]], dict[str, StoredGram]]


def walks(model: PreTrainedModel, *, corpora: int, gram: bool, sharded: bool = False) -> bool:
    """Return whether to calibrate layer by layer: for offloaded, unsharded models and for large Gram matrices."""
    return (is_offloaded(model) and not sharded) or (gram and corpora * gram_bytes(blocks_of(model)) > GRAMS_IN_MEMORY)


def check_walk(config: PreTrainedConfig) -> None:
    """Raise UserError if a tiny random model of the type gives other logits layer by layer.

    This is the case if layers pass on more than hidden states, or are called more than once. Types with a built-in
    record are not checked.
    """
    if (record := family_of_config(config)) in BUILT_IN.values():
        return
    try:
        model = tiny_model(shrunk(stock_config(config)))
    except Exception:  # no tiny model of this class
        return
    remember(model, record)  # avoids another discovery for classes of other packages
    ids = torch.arange(3, 27).view(2, 12)
    why = "the logits differ"
    try:
        walk = Walk(model)
        walk.add(ids)
        logits, expected = next(walk.logits()), model(input_ids=ids, use_cache=False).logits
        if (logits - expected).abs().max() <= 1e-4 * expected.abs().max():
            return
    except Exception as error:
        why = first_line(error)
    raise UserError(
        f"Model type '{config.model_type}' cannot be computed layer by layer ({why}), which offloaded weights, Gram "
        "matrices beyond memory and --recovery least_squares_sequential need; use more memory or another --recovery."
    )


@dataclass
class LayerCall:
    """One batch between two layers."""

    input_ids: Tensor  # (B, T)
    hidden: Tensor  # (B, T, H), on the CPU: input of the next layer
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each layer, without hidden states
    half: Tensor | None = None  # (B,) in {0, 1}
    weight: Tensor | None = None  # (B,)

    def through(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return the output of a layer for hidden states (B, T, H), on the layer's device.

        Args:
            layer: layer number `index` of the decoder, or a pruned version of it, with weights on its device.
            index: number of the layer, whose recorded arguments are used.
            hidden: hidden states.
        """
        device = device_of(layer)
        args, kwargs = send_to_device(self.arguments[index], device)  # recorded on the device of the dense layer
        return hidden_in(layer(hidden.to(device), *args, **kwargs))


class _Left(Exception):  # noqa: N818 - no error
    """Leaves a forward pass early, with the output of a layer."""


@dataclass
class Walk:
    """Pass batches through a frozen model layer by layer.

    walk = Walk(model)
    for batch in loader:
        walk.add(batch["input_ids"], batch["half"])
    statistics = walk.statistics(gram=True)
    """

    model: PreTrainedModel
    calls: list[LayerCall] = field(default_factory=list)
    _pool: dict[tuple, list[Tensor]] = field(default_factory=dict)  # recorded tensors, without duplicates
    _form: Any = None  # an output of a layer: hidden states, or a tuple or list with them

    @torch.no_grad()
    def add(self, input_ids: Tensor, half: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Embed (B, T) token ids and record arguments of each layer; `half` and `weight` as for `Collector.observe`."""
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            seen.append((hidden, *recursively_apply(self._shared, (args, kwargs))))
            return hidden

        if self._form is None:
            self._form = self._returned_by_first_layer(input_ids[:1])
        with self._standing_aside(note):
            decoder_of(self.model)(input_ids=input_ids, use_cache=False)
        arguments = [(args, kwargs) for _, args, kwargs in seen]
        self.calls.append(LayerCall(input_ids, seen[0][0].cpu(), arguments, half, weight))

    def _returned_by_first_layer(self, input_ids: Tensor) -> Any:
        """Return the output of the first layer. The decoder stops after this layer."""
        layer = decoder_layers(self.model)[0]

        def leave(_layer: nn.Module, _inputs: Any, out: Any) -> None:
            raise _Left(out)

        handle = layer.register_forward_hook(leave)
        try:
            with resident(layer):  # not by a call, because hooks would count these tokens
                decoder_of(self.model).forward(input_ids=input_ids, use_cache=False)
        except _Left as left:
            return left.args[0]
        finally:
            handle.remove()
        raise AssertionError("the decoder does not call its first layer")

    def _shared(self, tensor: Tensor) -> Tensor:
        """Return an equal tensor that was recorded earlier, or this one."""
        pool = self._pool.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for other in pool:
            if other is tensor or torch.equal(other, tensor):
                return other
        pool.append(tensor)
        return tensor

    @torch.no_grad()
    def _pass(self, layer: nn.Module, index: int, collector: Collector | None = None) -> None:
        """Pass all batches through layer number `index`, with weights in memory, and tell the collector of each."""
        for call in self.calls:
            if collector is not None:
                collector.expect(call.input_ids.shape[1], call.half, call.weight)
            call.hidden = call.through(layer, index, call.hidden).cpu()

    def statistics(self, *, gram: bool = False, store: Store | None = None) -> CorpusStatistics:
        """Return statistics of all batches, summed over processes, with the same bits as `Collector`.

        Args:
            gram: whether to sum Gram matrices.
            store: writes Gram matrices of a block, by kind, and returns references to the files.
        """
        ffn, attention, turned = [], [], []
        for index, blocks in enumerate(by_layer(blocks_of(self.model))):
            layer = blocks[0].layer
            with resident(layer), Collector(self.model, gram=gram, blocks=blocks) as collector:
                self._pass(layer, index, collector)
            statistics = collector.compute()
            collector.release()
            for block, *channels in zip(blocks, statistics.ffn, statistics.attention, strict=True):
                own = dict(zip(("ffn", "attention"), channels, strict=True))
                if gram and store is not None:
                    places = store(block, {kind: channels.gram for kind, channels in own.items()})
                    own = {kind: replace(channels, gram=places[kind]) for kind, channels in own.items()}
                ffn.append(own["ffn"])
                attention.append(own["attention"])
            turned.append(statistics.turned)
        return CorpusStatistics(ffn, attention, torch.cat(turned))

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """Yield the logits of each batch, (B, T, V) in the model's dtype. Hooks on layers run."""
        for index, layer in enumerate(decoder_layers(self.model)):
            with resident(layer):
                self._pass(layer, index)
        head, transform = self.model.get_output_embeddings(), LogitTransform.of(self.model)
        for call in self.calls:
            device = device_of(head)
            with self._standing_aside(lambda *_, hidden=call.hidden, device=device: hidden.to(device)):
                # Not by a call, because hooks would count these tokens again.
                decoded = decoder_of(self.model).forward(input_ids=call.input_ids, use_cache=False)
            yield transform(head(decoded.last_hidden_state))

    @contextmanager
    def _standing_aside(self, stand_in: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Replace every layer by `stand_in(hidden, other arguments, keyword arguments)` while the context lasts."""
        layers = decoder_layers(self.model)
        before = [layer.__dict__.get("forward") for layer in layers]  # accelerate may have set one

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return with_hidden(self._form, stand_in(hidden, args[1:], kwargs))

        for layer in layers:
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer.__dict__.pop("forward")
                if own is not None:
                    layer.__dict__["forward"] = own
