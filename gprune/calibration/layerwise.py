"""The same statistics, block by block: every decoder layer sees the whole corpus before the next one sees any.

So the weights of an offloaded layer are fetched once per corpus and not once per batch, and one block's Gram matrices
are in memory at a time. What is kept instead are the hidden states of the corpus, on the CPU: tokens x H in the model's
dtype, 134 MB for 16 windows of 1024 tokens of a 7B model in bfloat16.

A layer's other arguments (masks, rotary embeddings, by kind of layer) are the decoder's business. It is run once per
batch with every layer standing aside: each notes what it is called with, and hands its hidden states on. The layers
then compute what they would have computed, in the same order within each, so all sums are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.calibration.statistics import KINDS, CorpusStatistics, StoredGram, gram_bytes
from gprune.models.blocks import Block, blocks_of, decoder_layers
from gprune.models.losses import capped, softcap_of
from gprune.models.offload import device_of, is_offloaded, resident

GRAMS_IN_MEMORY = 4 * 2**30  # bytes that all Gram matrices of a run may take; above, they go to files block by block
Store = Callable[[Block, dict[str, Tensor]], dict[str, StoredGram]]


def exceed_memory(blocks: Sequence[Block], *, corpora: int) -> bool:
    """Whether the Gram matrices of so many corpora take more than `GRAMS_IN_MEMORY`."""
    return corpora * gram_bytes(blocks) > GRAMS_IN_MEMORY


def walks(model: PreTrainedModel, *, corpora: int, gram: bool, sharded: bool = False) -> bool:
    """Whether calibration goes block by block: if the model is offloaded (and no sharded copy takes its place), or Gram
    matrices would exceed memory.
    """
    return (is_offloaded(model) and not sharded) or (gram and exceed_memory(blocks_of(model), corpora=corpora))


@dataclass
class Call:
    """One batch on its way through the layers."""

    input_ids: Tensor  # (B, T)
    hidden: Tensor  # (B, T, H), on the CPU: what enters the next layer
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each layer, but for the hidden states
    half: Tensor | None = None  # (B,) in {0, 1}
    weight: Tensor | None = None  # (B,)

    def through(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What a layer, the decoder's `index`-th or what has become of that one, makes of hidden states (B, T, H).

        Its weights have to be there; what it gives is where it computes.
        """
        args, kwargs = self.arguments[index]
        output = layer(hidden.to(device_of(layer)), *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


@dataclass
class Walk:
    """Batches that go through the decoder layers of a frozen model, all through one layer before the next.

    walk = Walk(model)
    for batch in loader:
        walk.add(batch["input_ids"], batch["half"])
    statistics = walk.statistics(gram=True)
    """

    model: PreTrainedModel
    calls: list[Call] = field(default_factory=list)
    _pool: dict[tuple, list[Tensor]] = field(default_factory=dict)  # one of all equal masks and embeddings
    _in_tuple: bool | None = None  # how layers return their hidden states

    @torch.no_grad()
    def add(self, input_ids: Tensor, half: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Embed (B, T) token ids and note what each layer is called with; `half` and `weight` as in `Collector`."""
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            seen.append((hidden, self._shared(args), self._shared(kwargs)))
            return hidden

        with self._standing_aside(note):
            self.model.get_decoder()(input_ids=input_ids, use_cache=False)
        arguments = [(args, kwargs) for _, args, kwargs in seen]
        self.calls.append(Call(input_ids, seen[0][0].cpu(), arguments, half, weight))

    def _shared(self, value: Any) -> Any:
        """The same; a tensor that equals one which another call was made with gives way to that one."""
        if isinstance(value, Tensor):
            pool = self._pool.setdefault((value.shape, value.dtype, value.device), [])
            for other in pool:
                if other is value or torch.equal(other, value):
                    return other
            pool.append(value)
            return value
        if isinstance(value, dict):
            return {key: self._shared(item) for key, item in value.items()}
        return type(value)(map(self._shared, value)) if type(value) in (tuple, list) else value

    @torch.no_grad()
    def steps(self, enter: Callable[[Block], Callable[[Call], None]] | None = None) -> Iterator[Block]:
        """Take all batches through one layer after the other; yields each block when the last batch has left it.

        Args:
            enter: called with each block when its weights are there; what it returns is told of each batch that comes.
        """
        for block in blocks_of(self.model):
            with resident(block.layer):
                announce = enter(block) if enter is not None else None
                for call in self.calls:
                    if announce is not None:
                        announce(call)
                    call.hidden = call.through(block.layer, block.index, call.hidden).cpu()
                yield block

    def statistics(self, *, gram: bool = False, store: Store | None = None) -> CorpusStatistics:
        """Statistics of all batches, the same bits as `Collector`'s, summed over devices when distributed.

        Args:
            gram: sum Gram matrices too.
            store: takes one block's Gram matrices by kind and says where they lie; None keeps all in memory.
        """
        found: list[CorpusStatistics] = []
        collector: Collector | None = None

        def enter(block: Block) -> Callable[[Call], None]:
            nonlocal collector
            collector = Collector(self.model, gram=gram, blocks=[block]).__enter__()
            return lambda call: collector.expect(call.input_ids.shape[1], call.half, call.weight)

        try:
            for block in self.steps(enter):
                collector.__exit__()
                statistics = collector.compute(copy=False)
                collector.release()
                collector = None
                if gram and store is not None:
                    places = store(block, {kind: getattr(statistics, kind)[0].gram for kind, _ in KINDS})
                    kept = {kind: [replace(getattr(statistics, kind)[0], gram=places[kind])] for kind, _ in KINDS}
                    statistics = replace(statistics, **kept)
                found.append(statistics)
        finally:
            if collector is not None:
                collector.__exit__()
        turned = torch.cat([statistics.turned for statistics in found])
        return CorpusStatistics([s.ffn[0] for s in found], [s.attention[0] for s in found], turned)

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """(B, T, V) logits of each batch, in the model's dtype, as the model with its hooks gives them."""
        for _ in self.steps():
            pass
        head, softcap = self.model.get_output_embeddings(), softcap_of(self.model)
        for call in self.calls:
            device = device_of(head)
            with self._standing_aside(lambda *_, hidden=call.hidden, device=device: hidden.to(device)):
                # Not called: whoever counts its tokens has counted these.
                decoded = self.model.get_decoder().forward(input_ids=call.input_ids, use_cache=False)
            yield capped(head(decoded.last_hidden_state), softcap)

    @contextmanager
    def _standing_aside(self, stand_in: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Let `stand_in(hidden, other arguments, keyword arguments)` give the hidden states that each layer returns."""
        layers = decoder_layers(self.model)
        before = [layer.__dict__.get("forward") for layer in layers]  # accelerate puts its own there

        def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            if self._in_tuple is None:  # how the decoder wants them, only a layer can tell
                own = before[0] or type(layers[0]).forward.__get__(layers[0])
                self._in_tuple = not isinstance(own(*args, **kwargs), Tensor)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            found = stand_in(hidden, args[1:], kwargs)
            return (found,) if self._in_tuple else found

        for layer in layers:
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer.__dict__.pop("forward")
                if own is not None:
                    layer.__dict__["forward"] = own
