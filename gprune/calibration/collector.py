"""Streaming sums of what enters the output projections: torchmetrics states, and the hooks that feed them.

`collect` makes one pass over a corpus; `gprune.calibration.layerwise` makes the same sums block by block.

    with Collector(model) as collector:
        for batch in loader:
            collector.observe(batch["input_ids"], batch["half"])
    statistics = collector.compute()        # CorpusStatistics
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from gprune.calibration.moments import StreamingExpertMoments, StreamingMoments, StreamingTurn, channel_statistics
from gprune.calibration.saliency import StreamingGradients, channel_saliency, salient_parts
from gprune.calibration.statistics import KINDS, CorpusStatistics
from gprune.models.blocks import Block, blocks_of
from gprune.models.experts import watch_experts
from gprune.models.losses import next_token_loss
from gprune.models.offload import device_of


def _moments_of(block: Block, part: str, *, gram: bool, **options: Any) -> Metric:
    channels = getattr(block, part).in_features
    if part == "down" and block.has_experts:
        return StreamingExpertMoments(block.experts, block.neurons, gram=gram, **options)
    return StreamingMoments(channels, gram=gram, **options)


def _sum_of_processes(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """For torchmetrics, which would gather a copy from every process and add them up: one copy, added up already."""
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


class Collector:
    """Context manager that watches the inputs of every `down_proj` and `o_proj`; leaving removes the hooks.

    Args:
        model: frozen.
        gram: sum Gram matrices too.
        saliency: scopes (`ffn`, `attention`) whose weights' Taylor saliency is collected too, by a backward pass.
        blocks: those to watch, whose sums are then added up over processes with little memory; None for all.
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
        devices = [device_of(b.layer) for b in self.blocks]
        options = {} if blocks is None else {"dist_sync_fn": _sum_of_processes}
        with torch.inference_mode(False):  # a backward pass writes into them, wherever they were made
            self.metrics = {
                kind: [
                    _moments_of(b, part, gram=gram, **options).to(device)
                    for b, device in zip(self.blocks, devices, strict=True)
                ]
                for kind, part in KINDS
            }
            self.turns = [StreamingTurn().to(device) for device in devices]
            self.gradients = {
                kind: [
                    {
                        name: StreamingGradients((part.out_features, part.in_features)).to(device)
                        for name, part in salient_parts(b, kind).items()
                    }
                    for b, device in zip(self.blocks, devices, strict=True)
                ]
                for kind in saliency
            }
        self._half = self._weight = torch.empty(0)
        self._length = 0  # tokens per window
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Collector:
        for kind, part in KINDS:
            for block, metric in zip(self.blocks, self.metrics[kind], strict=True):
                host = getattr(block, part).host
                if isinstance(metric, StreamingExpertMoments):
                    self._handles.append(watch_experts(host, self._expert_hook(metric)))
                else:
                    self._handles.append(host.register_forward_pre_hook(self._moments_hook(metric)))
        for block, metric in zip(self.blocks, self.turns, strict=True):
            self._handles.append(block.layer.register_forward_hook(self._turn_hook(metric), with_kwargs=True))
        for found in self.gradients.values():
            for block, metrics in zip(self.blocks, found, strict=True):
                for name, metric in metrics.items():
                    part = block.parts[name]
                    self._handles.append(part.host.register_forward_hook(self._gradient_hook(metric, part.rows)))
        if self.gradients:  # something must ask for a gradient, and no weight may
            embedding = self.model.get_input_embeddings()
            self._handles.append(embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_()))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _moments_hook(self, metric: StreamingMoments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = self._by_window(inputs[0].detach())
            metric.update(x, self._half.to(x.device), self._weight.to(x.device))

        return hook

    def _expert_hook(self, metric: StreamingExpertMoments) -> Callable[[Tensor, int, Tensor], None]:
        def watch(x: Tensor, expert: int, tokens: Tensor) -> None:
            window = tokens // self._length
            metric.update(x.detach(), expert, self._half.to(x.device)[window], self._weight.to(x.device)[window])

        return watch

    def _by_window(self, x: Tensor) -> Tensor:
        """(B, T, C), also of layers that flatten the batch."""
        return x.reshape(len(self._half), -1, x.shape[-1])

    def _turn_hook(self, metric: StreamingTurn) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            # A layer on another device than the last one is handed what it sees from there.
            metric.update(before.detach().to(after.device), after.detach(), self._weight.to(after.device))

        return hook

    def _gradient_hook(self, metric: StreamingGradients, rows: Tensor | None) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = self._by_window(inputs[0].detach())
            half, weight = self._half.to(x.device), self._weight.to(x.device)

            def add(gradient: Tensor) -> None:
                gradient = self._by_window(gradient)
                metric.update(x, gradient if rows is None else gradient[..., rows], half, weight)

            output.register_hook(add)

        return hook

    def expect(self, length: int, half: Tensor, weight: Tensor | None = None) -> None:
        """What comes next are windows of `length` tokens; `half` (B,) in {0, 1}; `weight` (B,), 0 leaves one out."""
        self._half, self._length = half, length
        self._weight = torch.ones(len(half), device=half.device) if weight is None else weight

    def observe(self, input_ids: Tensor, half: Tensor, weight: Tensor | None = None) -> None:
        """Run the decoder on (B, T) token ids; `half` (B,) in {0, 1}; `weight` (B,), 0 leaves a window out."""
        self.expect(input_ids.shape[1], half, weight)
        if self.gradients:
            with torch.inference_mode(False), torch.enable_grad():
                # Each window's loss is its own mean over tokens, whatever the batch.
                ones = torch.ones(len(half), device=half.device)
                next_token_loss(self.model, input_ids.clone(), ones).backward()
        else:
            with torch.no_grad():
                self.model.get_decoder()(input_ids=input_ids, use_cache=False)

    def compute(self, *, copy: bool = True) -> CorpusStatistics:
        """Statistics so far, summed over devices when distributed; without `copy` no batch may be observed after it."""
        found = {kind: [channel_statistics(m.compute(), copy=copy) for m in self.metrics[kind]] for kind, _ in KINDS}
        for kind, gradients in self.gradients.items():
            for i, (block, metrics) in enumerate(zip(self.blocks, gradients, strict=True)):
                sums = {part: metric.compute() for part, metric in metrics.items()}
                saliency = channel_saliency(block, kind, sums)
                found[kind][i] = replace(found[kind][i], saliency=saliency)
        turned = torch.stack([metric.compute().cpu().clone() for metric in self.turns])
        return CorpusStatistics(**found, turned=turned)

    def release(self) -> None:
        """Let go of all sums at once: torchmetrics refer to themselves, and would keep theirs until Python looks."""
        for metric in [*self.turns, *(m for metrics in self.metrics.values() for m in metrics)]:
            metric.__dict__.clear()


def collect(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    gram: bool = False,
    saliency: Collection[str] = (),
) -> CorpusStatistics:
    """One pass over batches with `input_ids` (B, T) and `index` (B,), the windows' positions in the corpus.

    `half` (B,) in {0, 1} says which half of the corpus a window counts for; without it windows take turns, which
    makes halves too much alike where neighbouring windows share a text.
    """
    with Collector(model, gram=gram, saliency=saliency) as collector:
        for batch in batches:
            half = batch["half"] if "half" in batch else batch["index"] % 2
            collector.observe(batch["input_ids"], half, batch.get("weight"))
    return collector.compute()
