"""Least squares along the pruned prefix: every output projection is solved again on the pruned model's own activations.

`least_squares` solves each projection by itself, on activations of the dense model, and does not see the errors of
earlier blocks. Here the calibration text goes through both models side by side, block by block. Once the blocks before
it are pruned and recovered, a projection that lost channels gets the weights

    V = argmin_V  sum_t ||y*_t - V x_t||^2 + lambda ||V - W_K||^2  =  W_K + E (G + lambda I)^-1,
    G = sum_t x_t x_t^T,  E = sum_t (y*_t - W_K x_t) x_t^T,  lambda = ridge x mean diagonal of G,

with x_t (K,) the kept channels as the pruned model computes them, W_K (H, K) their dense weights, and y*_t the output
with which the pruned residual stream equals the dense one right behind the projection, all earlier errors corrected.
Where a norm stands between projection and residual (`Block.joins_residual`), y*_t is the dense projection's output,
since the norm's output is not linear in V. So it is in layers of several blocks, where more stands between one
projection and the end of the layer. A block's attention comes before its FFN. A bias does not change: both y* and
W_K x + bias contain it, so that it cancels in E. Our reading: the paper recovers nothing. All tokens of all corpora
count equally.

G and E are summed in float32 and solved in float64. Hidden states lie on the CPU in the model's dtype. The cost is one
pass through the dense layers, one through the pruned layers, and one more through these for each projection of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.calibration.layerwise import Walk
from gprune.calibration.moments import add_gram, fill_gram
from gprune.errors import require_finite
from gprune.models.blocks import Block, blocks_of, by_layer
from gprune.models.masks import Masks
from gprune.models.offload import device_of, resident
from gprune.recoveries.least_squares import ridge_correction


def lost(masks: Masks, alone: Sequence[bool] | None = None) -> list[tuple[str, ...]]:
    """For each block that stays, the output projections that lose channels, in the order of computation; behind blocks
    that are gone `down` too, whatever it keeps, if the block is `alone` in its layer (by default each is)."""
    near = [True, *masks.blocks[:-1]]
    near = near if alone is None else [stays or not only for stays, only in zip(near, alone, strict=True)]
    blocks = zip(masks.attention, masks.ffn, masks.blocks, near, strict=True)
    return [
        tuple(
            part
            for part, same in (("output", groups.all()), ("down", (neurons.all() and near) or not len(neurons)))
            if stays and not same
        )
        for groups, neurons, stays, near in blocks
    ]


class PrunedPrefix:
    """The text on its way through a dense model and, beside it, through pruned and recovered blocks.

    prefix = PrunedPrefix(model, masks, windows)
    for dense, block in ...:  # blocks that stay, first one first
        prefix.recover(dense, block)

    Args:
        model: dense, without experts; left as it is, and its weights may be offloaded.
        masks: of both kinds; the next block, and later ones, make up for blocks that the masks drop.
        windows: the text, (B, T) int64 token ids each.
        ridge: lambda over the mean diagonal of G.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, masks: Masks, windows: Iterable[Tensor], *, ridge: float = 0.01):
        self.blocks = blocks_of(model)
        assert not any(block.has_experts for block in self.blocks), "experts are not recovered along the prefix"
        layers = by_layer(self.blocks)
        self.alone = [len(own) == 1 for own in layers for _ in own]  # of each block, whether its layer has no other
        self.ends = [block is own[-1] for own in layers for block in own]  # whether it is the last one of its layer
        self.ridge, self.lost = ridge, lost(masks, self.alone)
        self.scale = getattr(self.blocks[0].layer, "residual_multiplier", 1.0)  # Granite's, of what joins the residual
        # Before the first block that differs both streams are the same; after the last projection nothing is needed.
        self.first = min((i for i, b in enumerate(self.lost) if b or not masks.blocks[i]), default=len(self.lost))
        self.last = max((i for i, b in enumerate(self.lost) if b), default=-1)
        walk = Walk(model)
        for ids in windows:
            walk.add(ids.to(device_of(model)))
        self.calls = walk.calls  # of each batch; `hidden`, (B, T, H), is the dense stream
        self.passed = 0  # layers that the dense stream has been through
        self.targets: dict[int, dict[str, list[Tensor]]] = {}  # of each block of the last layer passed, by part
        self.hidden = [call.hidden for call in self.calls]  # (B, T, H) each, the pruned stream
        self.tokens = 0  # sum over passes through pruned layers

    @torch.no_grad()
    def recover(self, dense: Block, block: Block) -> None:
        """Solve the projections of the next pruned block in place and let the text go through it.

        Args:
            dense: the same block before pruning; the blocks between it and the `dense` of the last call were dropped.
            block: pruned, its weights in memory.

        Raises:
            UserError: if an activation is not finite.
        """
        if dense.index > self.last:
            return
        for passed in by_layer(self.blocks)[self.passed : dense.layer_index + 1]:
            self.targets = self._pass_dense(passed)
        self.passed = dense.layer_index + 1
        if dense.layer_index < self.blocks[self.first].layer_index:
            self.hidden = [call.hidden for call in self.calls]
            return
        home = device_of(block.layer)
        block.layer.to(device_of(dense.layer))  # where the layer's other arguments are
        try:
            for part in self.lost[dense.index]:
                self._solve(part, block, dense, self.targets[dense.index][part])
            if self.ends[dense.index] and dense.index < self.last:
                for i, hidden in enumerate(self.hidden):
                    self.hidden[i] = self._through(block, dense.layer_index, i, hidden).cpu()
        finally:
            block.layer.to(home)

    def _pass_dense(self, blocks: Sequence[Block]) -> dict[int, dict[str, list[Tensor]]]:
        """Take the dense stream through the blocks of a layer; returns targets of the projections of each, by its
        index: (tokens, H) of each batch."""
        layer, index = blocks[0].layer, blocks[0].layer_index
        targets = {block.index: {part: [] for part in self.lost[block.index]} for block in blocks}
        with resident(layer), ExitStack() as hooks:
            seen = {block.index: hooks.enter_context(watched(block, targets[block.index])) for block in blocks}
            for call in self.calls:
                after = call.through(layer, index, call.hidden)
                for block in blocks:
                    for part, of_part in targets[block.index].items():
                        output = seen[block.index][part][1]
                        of_part.append(self._behind(block, part, output, call.hidden, after).cpu())
                call.hidden = after.cpu()
        return targets

    def _solve(self, part: str, block: Block, dense: Block, targets: list[Tensor]) -> None:
        """Take the pruned stream through a block with its present weights, and solve one of its projections."""
        place, device = block.parts[part], device_of(block.layer)
        scale = self.scale if self._joins(dense, part) else 1.0
        gram = torch.zeros(place.in_features, place.in_features, device=device)
        cross = torch.zeros(place.out_features, place.in_features, device=device)
        with watched(block, (part,)) as seen:
            for i, (hidden, target) in enumerate(zip(self.hidden, targets, strict=True)):
                after = self._through(block, dense.layer_index, i, hidden)
                x, y = seen[part]
                x = x.flatten(0, -2).float()
                error = (target.to(device).float() - self._behind(dense, part, y, hidden, after).float()) / scale
                add_gram(gram, x)
                cross.addmm_(error.T, x)
        require_finite(f"activation came up in block {dense.index} of the pruned model", gram, cross)
        fill_gram(gram)
        correction = ridge_correction(gram.double(), cross.double(), self.ridge)
        place.set((place.weight.double() + correction).to(place.weight.dtype), None)

    def _behind(self, block: Block, part: str, output: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """What has to equal the dense model's behind a projection, (tokens, H): the stream, or the projection's output.

        `before` enters the block, and `after` leaves it, with both parts where attention and FFN stand side by side.
        """
        if not self._joins(block, part):
            return output.flatten(0, -2)
        stream = after if part == "down" else before.to(output.device).reshape(output.shape) + output * self.scale
        return stream.flatten(0, -2)

    def _joins(self, block: Block, part: str) -> bool:
        """Whether the residual stream is compared, and not the projection's output."""
        return self.alone[block.index] and block.joins_residual(part)

    def _through(self, block: Block, index: int, batch: int, hidden: Tensor) -> Tensor:
        self.tokens += hidden.shape[0] * hidden.shape[1]
        return self.calls[batch].through(block.layer, index, hidden)


@contextmanager
def watched(block: Block, parts: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """(input, output) of each of these parts of a block in its last forward pass, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(part: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, inputs, output: seen.__setitem__(part, (inputs[0], output))

    with ExitStack() as hooks:
        for part in parts:
            hooks.callback(block.parts[part].host.register_forward_hook(hook(part)).remove)
        yield seen
