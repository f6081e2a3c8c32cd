"""Collect statistics layer by layer: the whole corpus passes a decoder layer before the next layer begins.

Weights of an offloaded layer are then read once per corpus instead of once per batch, and only one layer's Gram
matrices are in memory. In return, hidden states of the corpus are stored on the CPU: tokens x H in the model's dtype,
134 MB for 16 windows of 1024 tokens of a 7B model in bfloat16.

Layers have other arguments, such as masks and rotary embeddings, which only the decoder computes. To record them, the
decoder first runs once per batch with replaced layers, which record their arguments and return hidden states unchanged.
Then the real layers compute with these arguments, in the same order of batches, so all sums have the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.calibration.statistics import CorpusStatistics, StoredGram, gram_bytes
from gprune.discovery import family_of, tiny_copy
from gprune.errors import UserError, first_line
from gprune.features import Feature
from gprune.models.blocks import Block, blocks_of, by_layer, decoder_layers
from gprune.models.copies import turn_off_rescaling
from gprune.models.families import BUILT_IN, decoder_of
from gprune.models.losses import LogitTransform, head_input
from gprune.models.masks import hidden_in, with_hidden
from gprune.models.offload import device_of, is_offloaded, resident

GRAMS_IN_MEMORY = 4 * 2**30  # bytes; larger Gram matrices of a run are written to files block by block
Store = Callable[[Block, dict[str, Tensor]], dict[str, StoredGram]]


def needs_walk(model: PreTrainedModel, *, corpora: int, gram: bool) -> bool:
    """Return whether to calibrate layer by layer: for offloaded models and for large Gram matrices."""
    if is_offloaded(model):
        return True
    return gram and corpora * gram_bytes(blocks_of(model)) > GRAMS_IN_MEMORY


class Grams(Feature):
    """Gram matrices as a feature of a run: beyond memory they are collected layer by layer."""

    def refuse(self, plan: Any) -> None:
        """Raise UserError if the model cannot be computed layer by layer and has to be."""
        corpora = len(plan.cfg.calibration_corpora)
        if needs_walk(plan.skeleton, corpora=corpora, gram=True):
            check_walk(plan.skeleton.config)


def check_walk(config: PreTrainedConfig, *, along_prefix: bool = False) -> None:
    """Raise UserError if a tiny random model of the type gives other logits layer by layer.

    This is the case if layers pass on more than hidden states, are called more than once, or depend on a state of the
    decoder. The tiny model has all layers, since the type may treat later layers in another way. Types with a built-in
    record, and those without a tiny model, are not checked. With `along_prefix`, for `PrunedPrefix`, the layers of a
    copy must give these logits too.
    """
    if family_of(config) in BUILT_IN:
        return
    try:
        model = tiny_copy(config)
    except Exception:  # no tiny model of this class
        return
    models = [model]
    if along_prefix:
        models.append(copy.deepcopy(model))
    else:
        turn_off_rescaling(model)  # as in a loaded model; types that need it are not recovered along the prefix
    reason = "the logits differ"
    try:
        if all(_same_logits(model, decoder_layers(other)) for other in models):
            return
    except Exception as error:
        reason = first_line(error)
    raise UserError(
        f"Model type '{config.model_type}' cannot be computed layer by layer ({reason}), which offloaded weights, Gram "
        "matrices beyond memory and --recovery least_squares_sequential need; use more memory or another --recovery."
    )


def _same_logits(model: PreTrainedModel, layers: Sequence[nn.Module]) -> bool:
    """Return whether these layers, of the model or of a copy, give the model's logits one by one."""
    ids = torch.arange(3, 27).view(2, 12)  # ids below 3 may be special tokens
    walk = Walk(model)
    walk.add(ids)
    logits = next(walk.logits(layers))
    expected = model(input_ids=ids, use_cache=False).logits
    return bool((logits - expected).abs().max() <= 1e-4 * expected.abs().max())  # equal except for rounding


@dataclass
class LayerCall:
    """A batch that passes the layers one by one, with the arguments of each layer."""

    input_ids: Tensor  # (B, T)
    hidden: Tensor  # (B, T, H), on the CPU: input of the next layer
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each layer, without hidden states
    half: Tensor | None = None  # (B,) in {0, 1}
    weight: Tensor | None = None  # (B,)

    def run_layer(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return the output of a layer for hidden states, (B, T, H), on the layer's device."""
        device = device_of(layer)
        args, kwargs = send_to_device(self.arguments[index], device)  # recorded on the device of the dense layer
        return hidden_in(layer(hidden.to(device), *args, **kwargs))


class _StopForward(Exception):  # noqa: N818 - no error
    """Stops a forward pass early. The argument is the output of a layer."""


@dataclass
class Walk:
    """Pass batches through a frozen model layer by layer.

    Example:

        walk = Walk(model)
        for batch in loader:
            walk.add(batch["input_ids"], batch["half"])
        statistics = walk.statistics(gram=True)
    """

    model: PreTrainedModel
    calls: list[LayerCall] = field(default_factory=list)  # one per batch
    # (shape, dtype, device) -> recorded tensors, no two of them equal
    _pool: dict[tuple, list[Tensor]] = field(default_factory=dict)
    _example_output: Any = None  # an output of a layer: hidden states, or a tuple or list with them

    @torch.no_grad()
    def add(self, input_ids: Tensor, half: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Embed token ids (B, T) and record the arguments of each layer; `half` and `weight` are as for `Collector`."""
        embedded: list[Tensor] = []  # input of each layer; all are equal
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            """Record the call of a layer, and return its hidden states unchanged."""
            embedded.append(hidden)
            arguments.append(recursively_apply(self._without_duplicates, (args, kwargs)))
            return hidden

        if self._example_output is None:
            self._example_output = self._run_first_layer(input_ids[:1])
        with self._replaced_layers(record):
            decoder_of(self.model)(input_ids=input_ids, use_cache=False)
        self.calls.append(LayerCall(input_ids, embedded[0].cpu(), arguments, half, weight))

    def _run_first_layer(self, input_ids: Tensor) -> Any:
        """Return the output of the first layer. The decoder stops after this layer."""
        layer = decoder_layers(self.model)[0]

        def stop(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            raise _StopForward(output)

        handle = layer.register_forward_hook(stop)
        try:
            with resident(layer):
                # `forward` and not a call, because hooks of the decoder would count these tokens.
                decoder_of(self.model).forward(input_ids=input_ids, use_cache=False)
        except _StopForward as stopped:
            return stopped.args[0]
        finally:
            handle.remove()
        raise AssertionError("the decoder does not call its first layer")

    def _without_duplicates(self, tensor: Tensor) -> Tensor:
        """Return an equal tensor that was recorded earlier, or this one."""
        pool = self._pool.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for recorded in pool:
            if recorded is tensor or torch.equal(recorded, tensor):
                return recorded
        pool.append(tensor)
        return tensor

    @torch.no_grad()
    def statistics(self, *, gram: bool = False, routing: bool = False, store: Store | None = None) -> CorpusStatistics:
        """Return statistics of all batches, summed over processes, with the same bits as `Collector`."""
        ffn, attention, turned = [], [], []
        for index, blocks in enumerate(by_layer(blocks_of(self.model))):
            layer = blocks[0].layer
            with resident(layer), Collector(self.model, gram=gram, routing=routing, blocks=blocks) as collector:
                for call in self.calls:
                    collector.start_batch(call.input_ids.shape[1], call.half, call.weight)
                    call.hidden = call.run_layer(layer, index, call.hidden).cpu()
            statistics = collector.compute()
            for block, neurons, channels in zip(blocks, statistics.ffn, statistics.attention, strict=True):
                if gram and store is not None:
                    stored = store(block, {"ffn": neurons.gram, "attention": channels.gram})
                    neurons = replace(neurons, gram=stored["ffn"])
                    channels = replace(channels, gram=stored["attention"])
                ffn.append(neurons)
                attention.append(channels)
            turned.append(statistics.turned)
        return CorpusStatistics(ffn, attention, torch.cat(turned))

    @torch.no_grad()
    def logits(self, layers: Sequence[nn.Module] | None = None) -> Iterator[Tensor]:
        """Yield the logits of each batch, (B, T, V) in the model's dtype, from `layers`, by default the model's.

        Layers are called, so their hooks run.
        """
        for index, layer in enumerate(layers or decoder_layers(self.model)):
            with resident(layer):
                for call in self.calls:
                    call.hidden = call.run_layer(layer, index, call.hidden).cpu()
        head = self.model.get_output_embeddings()
        transform = LogitTransform.of(self.model)
        for call in self.calls:
            device = device_of(head)
            # Every replaced layer returns the output of the last layer, to which the decoder applies its final norm.
            with self._replaced_layers(lambda *_, hidden=call.hidden, device=device: hidden.to(device)):
                # `forward` and not a call, because hooks of the decoder would count these tokens again.
                decoded = decoder_of(self.model).forward(input_ids=call.input_ids, use_cache=False)
            yield transform(head(head_input(self.model, decoded)))

    @contextmanager
    def _replaced_layers(self, compute: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Context manager that replaces every layer by `compute`."""
        layers = decoder_layers(self.model)
        former_forwards = [layer.__dict__.get("forward") for layer in layers]  # accelerate may have set one

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return with_hidden(self._example_output, compute(hidden, args[1:], kwargs))

        for layer in layers:
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer, former_forward in zip(layers, former_forwards, strict=True):
                layer.__dict__.pop("forward")
                if former_forward is not None:
                    layer.__dict__["forward"] = former_forward
