"""Streaming sums of what enters the output projections: torchmetrics states, and the hooks that feed them.

`collect` makes one pass over a corpus; `gprune.walk` makes the same sums block by block.

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
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from gprune.architectures import Block, blocks_of
from gprune.errors import UserError
from gprune.experts import watch_experts
from gprune.losses import next_token_loss
from gprune.offload import device_of
from gprune.saliency import StreamingGradients, channel_saliency, salient_parts
from gprune.statistics import KINDS, SUMS, ChannelStatistics, CorpusStatistics, Moments


def _panels(channels: int, width: int = 192) -> list[slice]:
    """Stretches of channels, small enough that what lies below the diagonal of each costs little."""
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x of rows x (n, C) to the upper triangle of `gram` (C, C): two thirds of the time of all of it."""
    for columns in _panels(len(gram)):
        gram[columns, columns.start :].addmm_(x[:, columns].T, x[:, columns.start :])


def fill_gram(gram: Tensor) -> None:
    """Make a matrix (C, C) whole again of which only the upper triangle was summed up."""
    for rows in _panels(len(gram)):
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T


class _Sums(Metric):
    """torchmetrics state of the channels that enter a projection, of `stacks` such as (E,) experts or () of one."""

    full_state_update = False

    def __init__(self, *stacks: int, channels: int, gram: bool = False, **options: Any):
        super().__init__(**options)
        # float64: a corpus has some 10^6 tokens, and sum_sq - sum^2/n loses half the digits
        self.add_state("count", torch.zeros(2, *stacks, dtype=torch.float64), dist_reduce_fx="sum")
        for name in SUMS[1:]:
            self.add_state(name, torch.zeros(2, *stacks, channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.with_gram = gram
        if gram:  # of the zeros to reset it with, which torchmetrics keeps, there is one number
            shape = (*stacks, channels, channels)
            self.add_state("gram", torch.zeros(()), dist_reduce_fx="sum")
            self.gram, self._defaults["gram"] = torch.zeros(shape), torch.zeros(()).expand(shape)


class StreamingMoments(_Sums):
    """The state of one projection's input; sums over devices are sums over tokens."""

    def __init__(self, channels: int, *, gram: bool = False, **options: Any):
        super().__init__(channels=channels, gram=gram, **options)

    def update(self, x: Tensor, half: Tensor, weight: Tensor) -> None:
        """Add activations x (B, T, C) of windows that belong to `half` (B,) in {0, 1}; `weight` (B,) in {0, 1}."""
        x = x.float()
        assign = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)  # (half, window)
        assign[half, torch.arange(len(x), device=x.device)] = weight.double()
        self.count += assign.sum(1) * x.shape[1]
        self.sum += assign @ x.sum(1).double()
        # Plain sums: an einsum or a vector norm over the middle dimension takes ten times as long on a CPU.
        self.sum_sq += assign @ x.square().sum(1).double()
        self.sum_abs += assign @ x.abs().sum(1).double()
        if self.with_gram:
            add_gram(self.gram, (x * weight[:, None, None]).flatten(0, 1))

    def compute(self) -> dict[str, Tensor]:
        """The accumulated sums by name: `count` (2,), the others (2, C), and `gram` (C, C) if asked for."""
        if self.with_gram:
            fill_gram(self.gram)
        names = (*SUMS, *(("gram",) if self.with_gram else ()))
        return {name: getattr(self, name) for name in names}


class StreamingExpertMoments(_Sums):
    """The state of what enters the down projections of E experts with N neurons each."""

    def __init__(self, experts: int, neurons: int, *, gram: bool = False, **options: Any):
        super().__init__(experts, channels=neurons, gram=gram, **options)

    def update(self, x: Tensor, expert: int, half: Tensor, weight: Tensor) -> None:
        """Add activations x (n, N) of tokens that are routed to `expert` and belong to `half` (n,) in {0, 1}."""
        x = x.float()
        assign = torch.stack([(half == h) * weight for h in (0, 1)]).double()  # (half, token)
        self.count[:, expert] += assign.sum(1)
        self.sum[:, expert] += assign @ x.double()
        self.sum_sq[:, expert] += assign @ x.square().double()
        self.sum_abs[:, expert] += assign @ x.abs().double()
        if self.with_gram:
            weighted = x * weight[:, None]
            self.gram[expert].addmm_(weighted.T, weighted)

    def compute(self) -> dict[str, Tensor]:
        """As `StreamingMoments.compute`, expert by expert: all (2, E x N), and `gram` (E, N, N) if asked for."""
        count = self.count[..., None].expand_as(self.sum)
        sums = {"count": count} | {name: getattr(self, name) for name in SUMS[1:]}
        return {n: t.flatten(1) for n, t in sums.items()} | ({"gram": self.gram} if self.with_gram else {})


class StreamingTurn(Metric):
    """torchmetrics state of one block: the sum over tokens of 1 - cos(what enters it, what leaves it)."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, weight: Tensor) -> None:
        """Add hidden states (B, T, H); `weight` (B,), 0 leaves a window out."""
        turned = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
        self.sum += (turned.sum(1).double() * weight).sum()

    def compute(self) -> Tensor:
        """() float64."""
        return self.sum


def channel_statistics(sums: dict[str, Tensor], *, copy: bool = True) -> ChannelStatistics:
    """What `StreamingMoments.compute` returned, on the CPU, halves apart; without `copy` the Gram matrix is the sum's.

    Raises:
        UserError: if an activation was not finite.
    """
    if not bool(torch.isfinite(sums["sum_sq"]).all()):
        raise UserError(
            "A non-finite activation came up during calibration; expected finite numbers. Check the model's "
            "weights, or use --model.dtype float32 instead of a 16-bit type."
        )
    halves = tuple(Moments(*(sums[name][h].cpu().clone() for name in SUMS)) for h in (0, 1))
    gram = sums["gram"].cpu() if "gram" in sums else None
    return ChannelStatistics(halves, gram.clone() if copy and gram is not None else gram)


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
