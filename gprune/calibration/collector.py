"""Collect the statistics of a corpus in one pass, by hooks on the model that update torchmetrics states.

`gprune.calibration.layerwise` computes the same sums block by block.

    with Collector(model) as collector:
        for batch in loader:
            collector.observe(batch["input_ids"], batch["half"])
    statistics = collector.compute()        # CorpusStatistics
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from gprune.calibration.moments import StreamingExpertMoments, StreamingMoments, StreamingTurn, channel_statistics
from gprune.calibration.projections import OUTPUT_PROJECTIONS
from gprune.calibration.saliency import StreamingGradients, channel_saliency, salient_parts
from gprune.calibration.statistics import CorpusStatistics
from gprune.models.blocks import Block, blocks_of
from gprune.models.experts import watch_experts
from gprune.models.lookup import decoder_of
from gprune.models.losses import next_token_losses, require_activation_gradients
from gprune.models.offload import device_of


def _sum_of_processes(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """`dist_sync_fn` for torchmetrics that adds over processes, instead of gathering a copy from each."""
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


class Collector:
    """Context manager that collects statistics of inputs of down and output projections. Leaving it removes the hooks.

    Args:
        model: the frozen model.
        gram: whether to sum Gram matrices.
        saliency: scopes (`ffn`, `attention`) whose Taylor saliency is collected, by a backward pass.
        blocks: the blocks; by default all. If given, sums are added over processes instead of gathered, which needs
            less memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        gram: bool = False,
        saliency: Collection[str] = (),
        blocks: Sequence[Block] | None = None,
    ):
        self.model = model
        self.blocks = blocks_of(model) if blocks is None else list(blocks)
        self.metrics: dict[str, list[Metric]] = {scope: [] for scope in OUTPUT_PROJECTIONS}
        self.turns: list[StreamingTurn] = []
        self.gradients: dict[str, list[dict[str, StreamingGradients]]] = {scope: [] for scope in saliency}
        options = {} if blocks is None else {"dist_sync_fn": _sum_of_processes}
        for block in self.blocks:
            # States are on the layer's device. A backward pass writes to them, which inference tensors do not allow.
            with torch.inference_mode(False), device_of(block.layer):
                for scope, part in OUTPUT_PROJECTIONS.items():
                    if part == "down" and block.has_experts:
                        sums = StreamingExpertMoments(block.experts, block.neurons, gram=gram, **options)
                    else:
                        channels = block.parts[part].in_features if part in block.parts else 0
                        sums = StreamingMoments(channels, gram=gram, **options)
                    self.metrics[scope].append(sums)
                self.turns.append(StreamingTurn())
                for scope, gradients in self.gradients.items():
                    parts = salient_parts(block, scope).items()
                    gradients.append({n: StreamingGradients((p.out_features, p.in_features)) for n, p in parts})
        self._half = self._weight = torch.empty(0)
        self._halves: list[int | None] = []  # half of each window, on the host; None: ignored
        self._length = 0  # tokens per window
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Collector:
        for index, block in enumerate(self.blocks):
            for scope, part in OUTPUT_PROJECTIONS.items():
                metric = self.metrics[scope][index]
                if part not in block.parts:  # no such units: count tokens only
                    count = partial(self._see_tokens, metric)
                    self._handles.append(block.layer.register_forward_hook(count, with_kwargs=True))
                    continue
                host = block.parts[part].host
                if isinstance(metric, StreamingExpertMoments):
                    self._handles.append(
                        watch_experts(host, partial(self._see_expert, metric), block.family.expert_down)
                    )
                else:
                    self._handles.append(host.register_forward_pre_hook(partial(self._see_input, metric)))
            see_layer = partial(self._see_layer, self.turns[index])
            self._handles.append(block.layer.register_forward_hook(see_layer, with_kwargs=True))
            for gradients in self.gradients.values():
                for name, metric in gradients[index].items():
                    part = block.parts[name]
                    rows = None if part.rows is None else part.rows.to(device_of(part.host))
                    self._handles.append(part.host.register_forward_hook(partial(self._see_gradient, metric, rows)))
        if self.gradients:
            self._handles.append(require_activation_gradients(self.model))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _see_input(self, metric: StreamingMoments, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = self._by_window(inputs[0].detach())
        metric.update(x, self._half.to(x.device), self._weight.to(x.device))

    def _see_tokens(
        self, metric: StreamingMoments, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        x = self._by_window((args[0] if args else kwargs["hidden_states"]).detach())[..., :0]
        metric.update(x, self._half.to(x.device), self._weight.to(x.device))

    def _see_expert(self, metric: StreamingExpertMoments, x: Tensor, expert: int, tokens: Tensor) -> None:
        window = tokens // self._length
        metric.update(x.detach(), expert, self._half.to(x.device)[window], self._weight.to(x.device)[window])

    def _by_window(self, x: Tensor) -> Tensor:
        """Reshape to (B, T, C), as some layers flatten the batch."""
        return x.reshape(len(self._half), -1, x.shape[-1])

    def _see_layer(
        self, metric: StreamingTurn, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        output = output if isinstance(output, Tensor) else output[0]  # some layers return attention too
        # The input may still be on the device of the previous layer.
        metric.update(before.detach().to(output.device), output.detach(), self._weight.to(output.device))

    def _see_gradient(
        self, metric: StreamingGradients, rows: Tensor | None, _module: nn.Module, inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:  # fmt: skip
        x, halves = self._by_window(inputs[0].detach()), self._halves

        def add(gradient: Tensor) -> None:
            gradient = self._by_window(gradient)
            metric.update(x, gradient if rows is None else gradient[..., rows], halves)

        output.register_hook(add)

    def expect(self, length: int, half: Tensor, weight: Tensor | None = None) -> None:
        """Prepare for a batch of windows with `length` tokens; `half` and `weight` as for `observe`."""
        self._half, self._length = half, length
        self._weight = torch.ones(len(half), device=half.device) if weight is None else weight
        if self.gradients:  # gradients are added window by window
            pairs = torch.stack([half.double(), self._weight.double()], 1).tolist()
            self._halves = [int(h) if counts else None for h, counts in pairs]

    def observe(self, input_ids: Tensor, half: Tensor, weight: Tensor | None = None) -> None:
        """Run the decoder on (B, T) token ids; `half` (B,) in {0, 1}; windows with `weight` (B,) 0 are ignored."""
        self.expect(input_ids.shape[1], half, weight)
        if self.gradients:
            with torch.inference_mode(False), torch.enable_grad():
                # Sum over windows of the mean over tokens, which does not depend on the batch size.
                next_token_losses(self.model, input_ids.clone()).sum().backward()
        else:
            with torch.no_grad():
                decoder_of(self.model)(input_ids=input_ids, use_cache=False)

    def compute(self) -> CorpusStatistics:
        """Return statistics of all batches, summed over processes. Gram matrices are not copied."""
        by_scope = {s: [channel_statistics(m.compute()) for m in metrics] for s, metrics in self.metrics.items()}
        for scope, gradients in self.gradients.items():
            for i, (block, metrics) in enumerate(zip(self.blocks, gradients, strict=True)):
                terms = channel_saliency(block, scope, metrics)
                by_scope[scope][i] = replace(by_scope[scope][i], saliency=terms)
        turned = torch.stack([metric.compute().cpu().clone() for metric in self.turns])
        return CorpusStatistics(**by_scope, turned=turned)

    def release(self) -> None:
        """Free all sums. Because of reference cycles in torchmetrics they would stay until garbage collection."""
        by_part = [part for gradients in self.gradients.values() for parts in gradients for part in parts.values()]
        for metric in (*self.turns, *chain(*self.metrics.values()), *by_part):
            metric.__dict__.clear()
