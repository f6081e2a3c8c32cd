"""Collect the statistics of a corpus in one pass, by hooks on the model that update torchmetrics states.

with Collector(model) as collector:
    for batch in loader:
        collector.observe(batch["input_ids"], batch["half"])
statistics = collector.compute()        # CorpusStatistics
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from gprune.calibration.moments import (
    StreamingCosineChange,
    StreamingExpertMoments,
    StreamingMoments,
    StreamingRouting,
    channel_statistics,
)
from gprune.calibration.saliency import StreamingGradients, channel_saliency, salient_parts
from gprune.calibration.statistics import CorpusStatistics
from gprune.models.experts import expert_output, is_of_experts, watch_experts, watch_routing
from gprune.models.families import decoder_layers, decoder_of
from gprune.models.losses import next_token_losses, require_activation_gradients
from gprune.models.masks import hidden_in
from gprune.models.offload import device_of
from gprune.models.paths import owner_of
from gprune.models.units import units_of
from gprune.units.structure import KIND_OF_PART, Units, of_kind


class Collector:
    """Context manager that collects statistics of the inputs of all projections that read units, by hooks.

    Args:
        gram: whether to collect Gram matrices.
        saliency: scopes (`ffn`, `attention`) whose Taylor saliency is collected.
        routing: whether to collect sums over the tokens that are routed to each expert.
        blocks: numbers of the blocks of a range of layers, whose statistics are collected alone; by default all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        gram: bool = False,
        saliency: Collection[str] = (),
        routing: bool = False,
        blocks: Sequence[int] | None = None,
    ):
        self.model = model
        self.layers = decoder_layers(model)
        all_units = [u for u in units_of(model) if u.kind != "layer" and (blocks is None or u.number in blocks)]
        self.experts = {u.number: u for u in all_units if u.kind == "experts"}
        units = [u for u in all_units if u.kind != "experts"]
        self.units = {u.key: u for u in units}
        self.metrics: dict[str, Metric] = {}  # sums of inputs, by key of units
        self.cosine_changes: list[StreamingCosineChange] = []  # one for each block
        self.gradients: dict[str, list[StreamingGradients]] = {}  # by key of units: of each of `salient_parts`
        self.routing: dict[str, StreamingRouting] = {}  # by key of the neurons
        for u in units:
            # States are on the layer's device. A backward pass writes to them, which inference tensors do not allow.
            with torch.inference_mode(False), device_of(self.layers[u.layer]):
                if is_of_experts(self.layers[u.layer], u):
                    self.metrics[u.key] = StreamingExpertMoments(u.rows, u.count, gram=gram)
                    if routing:
                        self.routing[u.key] = StreamingRouting(u.rows)
                else:
                    channels = len(u.slices[-1].unit) if u.reads else 0
                    self.metrics[u.key] = StreamingMoments(channels, gram=gram)
        of_scopes = [KIND_OF_PART[scope] for scope in saliency]
        self.neurons = of_kind(self.units, "neurons")  # one set for each block
        for u in units:
            with torch.inference_mode(False), device_of(self.layers[u.layer]):
                if u.kind == "neurons":
                    self.cosine_changes.append(StreamingCosineChange())
                if u.kind in of_scopes:
                    layer = self.layers[u.layer]
                    self.gradients[u.key] = [StreamingGradients(p.shape(layer)) for p in salient_parts(u, layer)]
        # The current batch of B windows, see `observe`.
        self._half = torch.empty(0)  # (B,)
        self._weight = torch.empty(0)  # (B,)
        self._halves: list[int | None] = []  # half of each window, on the host; None: ignored
        self._length = 0  # tokens per window
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Collector:
        """Add the hooks to the model."""
        for u in self.units.values():
            self._watch_projection(u, self.metrics[u.key])
        for u, change in zip(self.neurons, self.cosine_changes, strict=True):
            add_change = partial(self._add_cosine_change, change)
            self._handles.append(self.layers[u.layer].register_forward_hook(add_change, with_kwargs=True))
            if u.key in self.routing:
                self._watch_routing(u, self.routing[u.key])
        for key, metrics in self.gradients.items():
            layer = self.layers[self.units[key].layer]
            for part, metric in zip(salient_parts(self.units[key], layer), metrics, strict=True):
                linear, rows = layer.get_submodule(owner_of(part.path)), part.rows.to(device_of(layer))
                self._handles.append(linear.register_forward_hook(partial(self._add_gradient, metric, rows)))
        if self.gradients:
            self._handles.append(require_activation_gradients(self.model))
        return self

    def _watch_routing(self, u: Units, metric: StreamingRouting) -> None:
        """Add the hooks that update a metric by the choice of a router and the outputs of its experts."""
        layer, experts = self.layers[u.layer], self.experts.get(u.number)
        routed: list[Tensor] = []  # chosen experts and their weights in the current call, each (tokens, k)

        def remember(chosen: Tensor, weights: Tensor) -> None:
            routed[:] = chosen, weights

        def add(x: Tensor, expert: int, tokens: Tensor) -> None:
            chosen, weights = routed
            is_chosen = chosen[tokens] == expert
            router_weight = (weights[tokens] * is_chosen).sum(1)
            # Experts of some classes compute all tokens, also those of other experts.
            counted = self._weight.to(x.device)[tokens // self._length] * is_chosen.any(1)
            output = expert_output(layer, u, expert, x.detach(), experts)
            metric.update(expert, output, router_weight.detach(), counted)

        self._handles.append(watch_routing(layer.get_submodule(u.reads), remember))
        self._handles.append(watch_experts(layer, u, add))

    def _watch_projection(self, u: Units, metric: Metric) -> None:
        """Add the hook that updates a metric by the inputs of what reads the units."""
        layer = self.layers[u.layer]
        if not u.reads:  # the block has no units of this kind: only count its tokens
            handle = layer.register_forward_hook(partial(self._count_tokens, metric), with_kwargs=True)
        elif is_of_experts(layer, u):
            handle = watch_experts(layer, u, partial(self._add_expert_input, metric))
        else:
            handle = layer.get_submodule(u.reads).register_forward_pre_hook(partial(self._add_input, metric))
        self._handles.append(handle)

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _add_input(self, metric: StreamingMoments, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Update a metric by the input of an output projection."""
        x = self._by_window(inputs[0].detach())
        metric.update(x, self._half.to(x.device), self._weight.to(x.device))

    def _count_tokens(
        self, metric: StreamingMoments, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        """Update the token count of a metric without channels, after a call of the layer."""
        hidden = args[0] if args else kwargs["hidden_states"]
        no_channels = self._by_window(hidden.detach())[..., :0]
        metric.update(no_channels, self._half.to(hidden.device), self._weight.to(hidden.device))

    def _add_expert_input(self, metric: StreamingExpertMoments, x: Tensor, expert: int, tokens: Tensor) -> None:
        """Add inputs x (n, N) of the down projection of an expert; `tokens` (n,) are their positions in the batch."""
        window = tokens // self._length
        metric.update(x.detach(), expert, self._half.to(x.device)[window], self._weight.to(x.device)[window])

    def _by_window(self, x: Tensor) -> Tensor:
        """Reshape to (B, T, C), as some layers flatten the batch."""
        return x.reshape(len(self._half), -1, x.shape[-1])

    def _add_cosine_change(
        self, metric: StreamingCosineChange, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        output: Tensor | tuple[Any, ...],
    ) -> None:  # fmt: skip
        """Update the metric of a block by the input and the output of its layer."""
        before = args[0] if args else kwargs["hidden_states"]
        after = hidden_in(output)  # some layers return attention too
        # The input may still be on the device of the previous layer.
        metric.update(before.detach().to(after.device), after.detach(), self._weight.to(after.device))

    def _add_gradient(
        self, metric: StreamingGradients, rows: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:  # fmt: skip
        """Update a metric in the backward pass; `rows` are the part's rows in a fused linear layer."""
        x = self._by_window(inputs[0].detach())
        halves = self._halves

        def add(gradient: Tensor) -> None:
            gradient = self._by_window(gradient)
            metric.update(x, gradient if len(rows) == gradient.shape[-1] else gradient[..., rows], halves)

        output.register_hook(add)

    def observe(self, input_ids: Tensor, half: Tensor, weight: Tensor | None = None) -> None:
        """Run the decoder on token ids (B, T). The hooks add each window to the sums of its half, (B,) in {0, 1}.

        Windows with a weight of 0, (B,), are ignored.
        """
        self._length = input_ids.shape[1]
        self._half = half
        self._weight = torch.ones(len(half), device=half.device) if weight is None else weight
        if self.gradients:
            # Gradients are added window by window, so the host needs the half of each window.
            pairs = torch.stack([half.double(), self._weight.double()], 1).tolist()  # a single transfer to the host
            self._halves = [int(window_half) if is_counted else None for window_half, is_counted in pairs]
            with torch.inference_mode(False), torch.enable_grad():
                # Sum over windows of the mean over tokens, which does not depend on the batch size.
                next_token_losses(self.model, input_ids.clone()).sum().backward()
        else:
            with torch.no_grad():
                decoder_of(self.model)(input_ids=input_ids, use_cache=False)

    def compute(self) -> CorpusStatistics:
        """Return statistics of all batches, summed over processes, and free the sums. Gram matrices are not copied."""
        channels = {key: channel_statistics(metric.compute()) for key, metric in self.metrics.items()}
        for key, metrics in self.gradients.items():
            u = self.units[key]
            channels[key] = replace(channels[key], saliency=channel_saliency(u, self.layers[u.layer], metrics))
        for key, metric in self.routing.items():
            channels[key] = replace(channels[key], routing=metric.compute().cpu().clone())
        turned = torch.stack([metric.compute().cpu().clone() for metric in self.cosine_changes])
        # Reference cycles in torchmetrics would keep the sums in memory until garbage collection.
        of_gradients = [metric for metrics in self.gradients.values() for metric in metrics]
        for metric in (*self.cosine_changes, *self.metrics.values(), *of_gradients, *self.routing.values()):
            metric.__dict__.clear()
        return CorpusStatistics(channels, turned)
