"""Streaming statistics of what enters `down_proj` (neurons) and `o_proj` (attention channels).

One pass per corpus over the frozen decoder, without the language-model head. Per channel and for each of two
halves of the corpus (windows with an even and with an odd index): count, sum, sum of squares and sum of absolute
values, in float64. The halves give rank drift its noise floor. Per block: how far it turns the hidden state.
Optionally the Gram matrix, for recovery and output-aware metrics, and the Taylor saliency, which takes a backward pass.

    with Collector(model) as collector:
        for batch in loader:
            collector.observe(batch["input_ids"], batch["index"] % 2)
    statistics = collector.compute()        # CorpusStatistics
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
from gprune.saliency import Saliency, StreamingGradients, channel_saliency, salient_parts

SUMS = ("count", "sum", "sum_sq", "sum_abs")
KINDS = (("ffn", "down"), ("attention", "output"))
EXTRAS = ("gram", "saliency")  # what is collected only where something needs it


@dataclass(frozen=True)
class StoredGram:
    """A Gram matrix that lies in files: read when it is looked at, and never kept.

    With several sources it is their sum, in that order.
    """

    sources: tuple[tuple[Path, str], ...]  # file and tensor
    expert: int | None = None  # of stacked ones

    def read(self) -> Tensor:
        """(C, C) float32, or (E, C / E, C / E) of E experts.

        Raises:
            UserError: if a file has gone, or is damaged.
        """
        total: Tensor | None = None
        for path, name in self.sources:
            gram = _stored_tensor(path, name)
            total = gram if total is None else total.add_(gram)
        return total if self.expert is None else total[self.expert]


def _stored_tensor(path: Path, name: str) -> Tensor:
    from gprune.artifacts import read_tensors  # here, because it imports half of gprune

    found = read_tensors(path)
    if found is None or name not in found:
        raise UserError(
            f"{path} is missing or not whole: a Gram matrix that a calibration pass left there. Start again to have it "
            f"computed anew; processes on several machines need one $GPRUNE_CACHE between them."
        )
    return found[name]


class _Looked:
    """A field of `Moments` that reads a `StoredGram` whenever it is looked at."""

    def __get__(self, moments: Moments | None, owner: type) -> Tensor | None:
        value = None if moments is None else moments.__dict__["gram"]
        return value.read() if isinstance(value, StoredGram) else value

    def __set__(self, moments: Moments, value: Tensor | StoredGram | None) -> None:
        moments.__dict__["gram"] = value


@dataclass(frozen=True)
class Moments:
    """Sums over tokens for C channels. All float64; `count` is a 0-d tensor, or (C,) for experts, each of which sees
    tokens of its own.

    `gram` and `saliency` are there where a metric says that it needs them.
    """

    count: Tensor  # () or (C,), tokens
    sum: Tensor  # (C,)
    sum_sq: Tensor  # (C,)
    sum_abs: Tensor  # (C,)
    # Sum over tokens of x x^T, (C, C) float32, or (E, C / E, C / E) of E experts; of the whole corpus only.
    # In a file (`StoredGram`) it is read anew each time that it is looked at.
    gram: Tensor | None = _Looked()
    saliency: Saliency | None = None

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count.clamp_min(1)  # 0 where no token came by

    @property
    def mean_sq(self) -> Tensor:
        return self.sum_sq / self.count.clamp_min(1)

    @property
    def variance(self) -> Tensor:
        """Population variance over tokens, (C,); clamped at 0, where float rounding would leave -1e-20."""
        return (self.mean_sq - self.mean.square()).clamp_min(0)

    def of_expert(self, index: int, experts: int) -> Moments:
        """The channels of one of E experts."""
        sums = (getattr(self, name).view(experts, -1)[index] for name in SUMS)
        gram = self.__dict__["gram"]
        if isinstance(gram, StoredGram):
            return Moments(*sums, gram=replace(gram, expert=index))
        return Moments(*sums, gram=None if gram is None else gram[index])

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in SUMS))


@dataclass(frozen=True)
class ChannelStatistics:
    """Moments of the two halves of a corpus; where collected, the Gram matrix and the saliency of halves and whole.

    Saliency does not add up over halves, since it takes absolute values of sums over windows.
    """

    halves: tuple[Moments, Moments]
    gram: Tensor | StoredGram | None = None
    saliency: tuple[Saliency, Saliency, Saliency] | None = None

    @property
    def total(self) -> Moments:
        return replace(
            self.halves[0] + self.halves[1],
            gram=self.gram,
            saliency=None if self.saliency is None else self.saliency[2],
        )

    def half(self, index: int) -> Moments:
        """Moments of half 0 or 1 of the corpus, without a Gram matrix."""
        return replace(self.halves[index], saliency=None if self.saliency is None else self.saliency[index])

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors."""
        flat = {f"{half}.{name}": getattr(m, name) for half, m in enumerate(self.halves) for name in SUMS}
        if self.gram is not None:
            flat["gram"] = self.gram
        for part, saliency in enumerate(self.saliency or ()):
            flat |= {f"saliency.{part}.{name}": value for name, value in vars(saliency).items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> ChannelStatistics:
        """What `tensors` gave."""
        halves = tuple(Moments(*(flat[f"{half}.{name}"] for name in SUMS)) for half in (0, 1))
        saliency = None
        if "saliency.0.first" in flat:
            names = Saliency.__dataclass_fields__
            saliency = tuple(Saliency(*(flat[f"saliency.{part}.{name}"] for name in names)) for part in range(3))
        return cls(halves, flat.get("gram"), saliency)


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of one corpus: one entry per block for neurons and one for attention channels."""

    ffn: list[ChannelStatistics]
    attention: list[ChannelStatistics]
    turned: Tensor  # (blocks,) float64: sum over tokens of 1 - cos(what enters a block, what leaves it)

    @property
    def influence(self) -> Tensor:
        """(blocks,) float64 in [0, 2]: mean over tokens of 1 - cos(x_b, x_b+1), the block influence of ShortGPT."""
        return self.turned / self.attention[0].total.count

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors, as saved in safetensors."""
        flat = {"turned": self.turned}
        for kind, _ in KINDS:
            for index, channel in enumerate(getattr(self, kind)):
                flat |= {f"{kind}.{index}.{name}": value for name, value in channel.tensors().items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> CorpusStatistics:
        """What `tensors` gave, in any order; extras may be left out."""
        nested: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, value in flat.items():
            if name != "turned":
                kind, index, rest = name.split(".", 2)
                nested.setdefault((kind, int(index)), {})[rest] = value
        depth = len(flat["turned"])
        return cls(
            *([ChannelStatistics.from_tensors(nested[kind, b]) for b in range(depth)] for kind, _ in KINDS),
            turned=flat["turned"],
        )


def kind_of(name: str) -> str:
    """Which of `moments` and `EXTRAS` a tensor of `CorpusStatistics.tensors` belongs to: each is cached by itself."""
    return next((extra for extra in EXTRAS if f".{extra}" in name), "moments")


def pooled(statistics: Iterable[CorpusStatistics], *, gram: bool = True) -> CorpusStatistics:
    """The statistics of several corpora read as one text (equal tokens each: the corpora averaged).

    Moments and Gram matrices are exactly those of the joined text. Saliency is the mean of the corpora's, since it
    takes absolute values after each one's sum. `gram=False` leaves Gram matrices out.
    """

    def pool(parts: list[ChannelStatistics]) -> ChannelStatistics:
        halves = tuple(sum((part.halves[h] for part in parts[1:]), start=parts[0].halves[h]) for h in (0, 1))
        grams = [part.gram for part in parts if gram and part.gram is not None]
        salient = [part.saliency for part in parts if part.saliency is not None]
        return ChannelStatistics(
            halves,
            _sum(grams) if len(grams) == len(parts) else None,
            tuple(sum(same[1:], start=same[0]) / len(parts) for same in zip(*salient, strict=True))
            if len(salient) == len(parts)
            else None,
        )

    statistics = list(statistics)
    return CorpusStatistics(
        *(
            [pool(list(parts)) for parts in zip(*(getattr(s, kind) for s in statistics), strict=True)]
            for kind, _ in KINDS
        ),
        turned=torch.stack([s.turned for s in statistics]).sum(0),
    )


def _sum(grams: Sequence[Tensor | StoredGram]) -> Tensor | StoredGram:
    if isinstance(grams[0], StoredGram):
        return StoredGram(tuple(source for gram in grams for source in gram.sources))
    return sum(grams[1:], start=grams[0])


def gram_bytes(blocks: Sequence[Block]) -> int:
    """Bytes of the Gram matrices of one corpus: 4 (E N^2 + C^2) per block of E experts of N neurons (E = 1 if dense)
    and C attention channels; 485 MB + 67 MB for a block of Llama-2-7B.
    """
    return sum(4 * (b.experts * b.neurons**2 + b.output.in_features**2) for b in blocks)


def _add_gram(metric: Metric, *shape: int) -> None:
    """Give a metric the state `gram`; of the zeros to reset it with, which torchmetrics keeps, there is one number."""
    metric.add_state("gram", torch.zeros(()), dist_reduce_fx="sum")
    metric.gram, metric._defaults["gram"] = torch.zeros(shape), torch.zeros(()).expand(shape)


def _panels(channels: int, width: int = 192) -> list[slice]:
    """Stretches of channels, small enough that what lies below the diagonal of each costs little."""
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


class StreamingMoments(Metric):
    """torchmetrics state of one projection's input; sums over devices are sums over tokens."""

    full_state_update = False

    def __init__(self, channels: int, *, gram: bool = False, **options: Any):
        super().__init__(**options)
        # float64: a corpus has some 10^6 tokens, and sum_sq - sum^2/n loses half the digits
        self.add_state("count", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("sum", "sum_sq", "sum_abs"):
            self.add_state(name, torch.zeros(2, channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.with_gram = gram
        if gram:
            _add_gram(self, channels, channels)

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
            flat = (x * weight[:, None, None]).flatten(0, 1)
            for rows in _panels(flat.shape[1]):  # the upper triangle: two thirds of the time
                self.gram[rows, rows.start :].addmm_(flat[:, rows].T, flat[:, rows.start :])

    def compute(self) -> dict[str, Tensor]:
        """The accumulated sums by name: `count` (2,), the others (2, C), and `gram` (C, C) if asked for."""
        for rows in _panels(self.sum.shape[1]) if self.with_gram else ():
            self.gram[rows.stop :, rows] = self.gram[rows, rows.stop :].T
        names = (*SUMS, *(("gram",) if self.with_gram else ()))
        return {name: getattr(self, name) for name in names}


class StreamingExpertMoments(Metric):
    """torchmetrics state of what enters the down projections of E experts with N neurons each."""

    full_state_update = False

    def __init__(self, experts: int, neurons: int, *, gram: bool = False, **options: Any):
        super().__init__(**options)
        self.add_state("count", torch.zeros(2, experts, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("sum", "sum_sq", "sum_abs"):
            self.add_state(name, torch.zeros(2, experts, neurons, dtype=torch.float64), dist_reduce_fx="sum")
        self.with_gram = gram
        if gram:
            _add_gram(self, experts, neurons, neurons)

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
    """One pass over batches with `input_ids` (B, T) and `index` (B,), the windows' positions in the corpus."""
    with Collector(model, gram=gram, saliency=saliency) as collector:
        for batch in batches:
            collector.observe(batch["input_ids"], batch["index"] % 2, batch.get("weight"))
    return collector.compute()
