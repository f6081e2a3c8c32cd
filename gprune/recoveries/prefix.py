"""Least squares along the pruned prefix: solve every output projection on activations of the pruned model.

`least_squares` solves each projection separately on activations of the dense model, so it cannot correct errors of
earlier blocks. Here the calibration text passes both models block by block. When all earlier blocks are pruned and
recovered, a projection that lost channels gets the weights

    V = argmin_V  sum_t ||y*_t - V x_t||^2 + lambda ||V - W_K||^2  =  W_K + E (G + lambda I)^-1,
    G = sum_t x_t x_t^T,  E = sum_t (y*_t - W_K x_t) x_t^T,  lambda = ridge x mean diagonal of G,

where x_t (K,) are the kept channels in the pruned model, W_K (H, K) their dense weights, and y*_t is the output with
which the pruned residual stream equals the dense one directly after the projection, so that all earlier errors are
corrected.

If there is an RMS norm n(y) = g y / rms(y) between projection and residual (Gemma 2 and 3), V solves the same problem
for x_t / r_t and

    y*_t = (g d_t + m y^d_t / r_t) / (g^2 + m),    r_t = rms of the dense projection's output y^d_t,

where d_t is the norm's output that makes the streams equal, and m is a tenth of the median of g^2. Errors are thereby
weighted as they enter the stream. The term with m keeps channels of small gain near the dense output. After any other
norm, and in layers with several blocks, y*_t is the output of the dense projection.

Attention is solved before the FFN of the same block. Biases do not change: both y* and W_K x + bias contain the bias,
so it cancels in E. All tokens of all corpora have equal weight. This recovery is ours; the paper has none.

G and E are summed in float32, and the system is solved in float64. For a bfloat16 model on a CPU with AMX, the error
y* - W_K x is rounded to bfloat16 in E. Hidden states are stored on the CPU in the model's dtype, and so are inputs of
the projection that is solved last. The cost is one pass through the dense layers and one pass through the pruned layers
for each projection of a block; one more if there is a norm after the FFN, or if `down` keeps its weights.
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
from gprune.models.bfloat16 import fast_products
from gprune.models.blocks import Block, blocks_of, by_layer
from gprune.models.masks import Masks
from gprune.models.offload import device_of, resident
from gprune.recoveries.least_squares import ridge_correction


def lost(masks: Masks, alone: Sequence[bool] | None = None) -> list[tuple[str, ...]]:
    """Return for each block the names of projections to solve, in the order of computation.

    These are the projections that lose channels. After a removed block also `down`, even if it keeps all channels.

    Args:
        masks: the masks.
        alone: whether each block is the only one of its layer; by default all are.
    """
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


# Input and output of a projection, and the input of the norm after it, if there is one
Seen = tuple[Tensor, Tensor, Tensor | None]
# Of one batch, (tokens, H): the dense stream after a projection, and the projection's output; None if it is not needed
Target = tuple[Tensor | None, Tensor | None]


class PrunedPrefix:
    """Pass text through a dense model and through pruned blocks, which are recovered one after the other.

    prefix = PrunedPrefix(model, masks, windows)
    for dense, block in ...:  # kept blocks, in order
        prefix.recover(dense, block)

    Args:
        model: the dense model, without experts. It is not changed, and may be offloaded.
        masks: masks of both kinds. Later blocks compensate for blocks that the masks remove.
        windows: the text, batches of (B, T) int64 token ids.
        ridge: lambda divided by the mean diagonal of G.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, masks: Masks, windows: Iterable[Tensor], *, ridge: float = 0.01):
        self.blocks = blocks_of(model)
        assert not any(block.has_experts for block in self.blocks), "experts are not recovered along the prefix"
        layers = by_layer(self.blocks)
        # For each block: whether it is the only one of its layer.
        self.alone = [len(own) == 1 for own in layers for _ in own]
        # For each block: whether it is the last one of its layer.
        self.ends = [block is own[-1] for own in layers for block in own]
        self.ridge, self.lost = ridge, lost(masks, self.alone)
        # Granite's factor of what is added to the residual.
        self.scale = getattr(self.blocks[0].layer, "residual_multiplier", 1.0)
        # Both streams are equal before block `first`. After block `last` no stream is needed.
        self.first = min((i for i, b in enumerate(self.lost) if b or not masks.blocks[i]), default=len(self.lost))
        self.last = max((i for i, b in enumerate(self.lost) if b), default=-1)
        walk = Walk(model)
        for ids in windows:
            walk.add(ids.to(device_of(model)))
        self.calls = walk.calls  # one per batch; `hidden`, (B, T, H), is the dense stream
        self.passed = 0  # number of layers that the dense stream has passed
        self.targets: dict[int, dict[str, list[Target]]] = {}  # targets of blocks of the last passed layer, by part
        self.gains: dict[tuple[int, str], Tensor | None] = {}  # `gain_of`, by block index and part
        self.hidden = [call.hidden for call in self.calls]  # the pruned stream, (B, T, H) for each batch
        self.tokens = 0  # number of tokens over all passes through pruned layers

    @torch.no_grad()
    def recover(self, dense: Block, block: Block) -> None:
        """Solve the projections of the next pruned block in place, and pass the text through the block.

        Args:
            dense: the same block before pruning. Blocks between this one and the previous call's were removed.
            block: the pruned block, with weights in memory.

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
        block.layer.to(device_of(dense.layer))  # the device of the layer's other arguments
        try:
            # If `down` is solved and no norm follows, its output in the stream is replaced without another pass.
            ends = self.ends[dense.index] and dense.index < self.last
            exchanged = ends and "down" in self.lost[dense.index] and self._joins(dense, "down")
            for part in self.lost[dense.index]:
                targets = self.targets[dense.index][part]
                self._solve(part, block, dense, targets, exchange=exchanged and part == "down")
            if ends and not exchanged:
                for i, hidden in enumerate(self.hidden):
                    self.hidden[i] = self._through(block, dense.layer_index, i, hidden).cpu()
        finally:
            block.layer.to(home)

    def _pass_dense(self, blocks: Sequence[Block]) -> dict[int, dict[str, list[Target]]]:
        """Pass the dense stream through a layer. Return targets by block index and projection, one per batch."""
        layer, index = blocks[0].layer, blocks[0].layer_index
        targets = {block.index: {part: [] for part in self.lost[block.index]} for block in blocks}
        with resident(layer), ExitStack() as hooks:
            seen = {block.index: hooks.enter_context(watched(block, targets[block.index])) for block in blocks}
            for call in self.calls:
                after = call.through(layer, index, call.hidden)
                for block in blocks:
                    for part, of_part in targets[block.index].items():
                        of_part.append(self._target(block, part, seen[block.index][part], call.hidden, after))
                call.hidden = after.cpu()
        return targets

    def _target(self, block: Block, part: str, seen: Seen, before: Tensor, after: Tensor) -> Target:
        """Return the target of a projection of the dense model for one batch."""
        joins, key = self._joins(block, part), (block.index, part)
        if key not in self.gains:
            self.gains[key] = gain_of(block.norm_behind(part), seen) if self.alone[block.index] and not joins else None
        stream = joins or self.gains[key] is not None
        return (
            self._behind(block, part, seen[1], before, after).cpu() if stream else None,
            None if joins else seen[1].cpu(),
        )

    def _solve(self, part: str, block: Block, dense: Block, targets: list[Target], *, exchange: bool) -> None:
        """Pass the pruned stream through a block with its current weights, and solve one of its projections.

        With `exchange`, for `down`, the stream is advanced to the end of the block, with the new weights.
        """
        place, device = block.parts[part], device_of(block.layer)
        gram = torch.zeros(place.in_features, place.in_features, device=device)
        cross = torch.zeros(place.out_features, place.in_features, device=device)
        entered = []  # inputs of the projection, one per batch
        with watched(block, (part,)) as seen:
            for i, (hidden, target) in enumerate(zip(self.hidden, targets, strict=True)):
                after = self._through(block, dense.layer_index, i, hidden)
                x, y, _ = seen[part]
                if exchange:
                    entered.append(x.cpu())
                    self.hidden[i] = (after.float() - y.reshape(after.shape).float() * self.scale).to(after.dtype).cpu()
                rows, error = self._equations(block, dense, part, target, (x, y), hidden, after)
                with fast_products(x):
                    add_gram(gram, rows)
                    cross.addmm_(error.T, rows)
        require_finite(f"activation came up in block {dense.index} of the pruned model", gram, cross)
        fill_gram(gram)
        correction = ridge_correction(gram.double(), cross.double(), self.ridge)
        place.set((place.weight.double() + correction).to(place.weight.dtype), None)
        for i, x in enumerate(entered):
            before = self.hidden[i].to(device)
            self.hidden[i] = (before + place.host(x.to(device)).reshape(before.shape) * self.scale).cpu()

    def _equations(
        self, block: Block, dense: Block, part: str, target: Target, seen: tuple[Tensor, Tensor],
        before: Tensor, after: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return x_t, (tokens, K), and y*_t - W_K x_t, (tokens, H), of one batch, as in the docstring of this module.

        Args:
            block: the pruned block.
            dense: the block before pruning.
            part: `down` or `output`.
            target: the target of the projection.
            seen: input and output of the projection.
            before: the input of the block.
            after: the output of the block.
        """
        (stream, wanted), (x, y) = target, (tensor.flatten(0, -2) for tensor in seen)
        if wanted is not None:
            wanted = wanted.to(y.device).flatten(0, -2).float()
        if stream is None:
            return x.float(), wanted - y.float()
        missing = (stream.to(y.device).float() - self._behind(block, part, seen[1], before, after).float()) / self.scale
        if wanted is None:
            return x.float(), missing
        gain = self.gains[dense.index, part].to(y.device)
        size = wanted.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        returned, damping = block.norm_behind(part)(y).float() + missing, 0.1 * gain.square().median()
        wanted = (gain * returned + damping * wanted / size) / (gain.square() + damping)
        return x.float() / size, wanted - y.float() / size

    def _behind(self, block: Block, part: str, output: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the residual stream after a projection, (tokens, H).

        Args:
            block: the block.
            part: `down` or `output`.
            output: the projection's output.
            before: the input of the block.
            after: the output of the block.
        """
        if part == "down":
            return after.flatten(0, -2)
        if not block.joins_residual(part):
            output = block.norm_behind(part)(output)
        return (before.to(output.device).reshape(output.shape) + output * self.scale).flatten(0, -2)

    def _joins(self, block: Block, part: str) -> bool:
        """Return whether the target is the residual stream and not the output of the projection."""
        return self.alone[block.index] and block.joins_residual(part)

    def _through(self, block: Block, index: int, batch: int, hidden: Tensor) -> Tensor:
        self.tokens += hidden.shape[0] * hidden.shape[1]
        return self.calls[batch].through(block.layer, index, hidden)


def gain_of(norm: nn.Module, seen: Seen) -> Tensor | None:
    """Return g of a norm n(y) = g y / rms(y) of a projection's output, (H,) float32, by calling the norm.

    Returns None for other norms, and for a norm of something else, such as the sum with the residual.
    """
    _, output, normed = seen
    if normed is None or not torch.equal(normed.flatten(0, -2), output.flatten(0, -2)):
        return None
    ones = torch.ones_like(output.flatten(0, -2)[:1])
    signs = ones * (1 - 2 * (torch.arange(ones.shape[-1], device=ones.device) % 2)).to(ones.dtype)
    gain = norm(ones)
    return gain[0].float() if torch.equal(norm(signs), gain * signs) else None


@contextmanager
def watched(block: Block, parts: Iterable[str]) -> Iterator[dict[str, Seen]]:
    """Record what projections of a block compute in the last forward pass, by name."""
    seen: dict[str, Seen] = {}

    def projected(part: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, inputs, output: seen.__setitem__(part, (inputs[0], output, None))

    def normed(part: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.__setitem__(part, (*seen[part][:2], inputs[0])) if part in seen else None

    with ExitStack() as hooks:
        for part in parts:
            hooks.callback(block.parts[part].host.register_forward_hook(projected(part)).remove)
            if (norm := block.norm_behind(part)) is not None:
                hooks.callback(norm.register_forward_pre_hook(normed(part)).remove)
        yield seen
