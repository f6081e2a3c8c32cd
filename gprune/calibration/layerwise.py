"""Collect the same statistics block by block: every decoder layer sees the whole corpus before the next one sees any.

So the weights of an offloaded layer are fetched once per corpus and not once per batch, and one block's Gram matrices
are in memory at a time. In exchange the hidden states of the corpus stay on the CPU: tokens x H in the model's dtype,
134 MB for 16 windows of 1024 tokens of a 7B model in bfloat16.

Only the decoder knows a layer's other arguments (masks, rotary embeddings). So it runs once per batch while its layers
stand aside: each notes its arguments, and returns its hidden states unchanged. Later the layers compute with these
arguments, batch by batch in the same order, so all sums are the same bits.
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

GRAMS_IN_MEMORY = 4 * 2**30  # bytes; if a run's Gram matrices take more, they go to files block by block
Store = Callable[[Block, dict[str, Tensor]], dict[str, StoredGram]]


def walks(model: PreTrainedModel, *, corpora: int, gram: bool, sharded: bool = False) -> bool:
    """Whether calibration goes block by block: the model is offloaded, not sharded, or Gram matrices exceed memory."""
    return (is_offloaded(model) and not sharded) or (gram and corpora * gram_bytes(blocks_of(model)) > GRAMS_IN_MEMORY)


def check_walk(config: PreTrainedConfig) -> None:
    """Raise UserError for a type that computes something else layer by layer, as a tiny random copy shows: layers that
    pass more than hidden states on, or that are called more than once. Types with a record of gprune's own pass."""
    if (record := family_of_config(config)) in BUILT_IN.values():
        return
    try:
        model = tiny_model(shrunk(stock_config(config)))
    except Exception:  # a class that cannot be made small
        return
    remember(model, record)  # a class from elsewhere would have its structure looked for again
    ids = torch.arange(3, 27).view(2, 12)
    why = "the result is another one"
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
class Call:
    """One batch on its way through the layers."""

    input_ids: Tensor  # (B, T)
    hidden: Tensor  # (B, T, H), on the CPU: what enters the next layer
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # each layer's, without the hidden states
    half: Tensor | None = None  # (B,) in {0, 1}
    weight: Tensor | None = None  # (B,)

    def through(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The output of the decoder's layer number `index`, or a pruned version of it, for hidden states (B, T, H), on
        the layer's device; its weights have to be there."""
        device = device_of(layer)
        args, kwargs = send_to_device(self.arguments[index], device)  # noted on the device of the dense layer
        return hidden_in(layer(hidden.to(device), *args, **kwargs))


class _Left(Exception):  # noqa: N818 - no error
    """A forward pass was left on purpose, with what a layer returned."""


@dataclass
class Walk:
    """Batches on their way through the layers of a frozen model, all of them through one layer before the next.

    walk = Walk(model)
    for batch in loader:
        walk.add(batch["input_ids"], batch["half"])
    statistics = walk.statistics(gram=True)
    """

    model: PreTrainedModel
    calls: list[Call] = field(default_factory=list)
    _pool: dict[tuple, list[Tensor]] = field(default_factory=dict)  # noted tensors, without duplicates
    _form: Any = None  # what a layer returns: hidden states, or a tuple or list with them

    @torch.no_grad()
    def add(self, input_ids: Tensor, half: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Embed (B, T) token ids and note each layer's arguments; `half` and `weight` as for `Collector.observe`."""
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            seen.append((hidden, *recursively_apply(self._shared, (args, kwargs))))
            return hidden

        if self._form is None:
            self._form = self._returned_by_first_layer(input_ids[:1])
        with self._standing_aside(note):
            decoder_of(self.model)(input_ids=input_ids, use_cache=False)
        arguments = [(args, kwargs) for _, args, kwargs in seen]
        self.calls.append(Call(input_ids, seen[0][0].cpu(), arguments, half, weight))

    def _returned_by_first_layer(self, input_ids: Tensor) -> Any:
        """What the first layer returns; the decoder is left behind it."""
        layer = decoder_layers(self.model)[0]

        def leave(_layer: nn.Module, _inputs: Any, out: Any) -> None:
            raise _Left(out)

        handle = layer.register_forward_hook(leave)
        try:
            with resident(layer):  # not by a call, whose hooks would count these tokens
                decoder_of(self.model).forward(input_ids=input_ids, use_cache=False)
        except _Left as left:
            return left.args[0]
        finally:
            handle.remove()
        raise AssertionError("the decoder does not call its first layer")

    def _shared(self, tensor: Tensor) -> Tensor:
        """An earlier tensor that equals this one, or this one."""
        pool = self._pool.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for other in pool:
            if other is tensor or torch.equal(other, tensor):
                return other
        pool.append(tensor)
        return tensor

    @torch.no_grad()
    def _pass(self, layer: nn.Module, index: int, collector: Collector | None = None) -> None:
        """Take all batches through layer number `index`, whose weights are there; a collector is told of each."""
        for call in self.calls:
            if collector is not None:
                collector.expect(call.input_ids.shape[1], call.half, call.weight)
            call.hidden = call.through(layer, index, call.hidden).cpu()

    def statistics(self, *, gram: bool = False, store: Store | None = None) -> CorpusStatistics:
        """Statistics of all batches, the same bits as `Collector`'s, summed over processes; `store` writes one block's
        Gram matrices, by kind, and returns their places."""
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
        """The model's logits of each batch, (B, T, V) in its dtype; hooks on its layers take effect."""
        for index, layer in enumerate(decoder_layers(self.model)):
            with resident(layer):
                self._pass(layer, index)
        head, transform = self.model.get_output_embeddings(), LogitTransform.of(self.model)
        for call in self.calls:
            device = device_of(head)
            with self._standing_aside(lambda *_, hidden=call.hidden, device=device: hidden.to(device)):
                # Not by a call, whose hooks would count these tokens a second time.
                decoded = decoder_of(self.model).forward(input_ids=call.input_ids, use_cache=False)
            yield transform(head(decoded.last_hidden_state))

    @contextmanager
    def _standing_aside(self, stand_in: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Replace every layer by `stand_in(hidden, other arguments, keyword arguments)` while the context lasts."""
        layers = decoder_layers(self.model)
        before = [layer.__dict__.get("forward") for layer in layers]  # accelerate puts its own there

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
