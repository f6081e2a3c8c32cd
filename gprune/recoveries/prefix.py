"""Least squares along the pruned prefix: solve every output projection on activations of the pruned model.

`least_squares` solves each projection separately on activations of the dense model, so it cannot correct errors of
earlier blocks. Here the calibration text passes both models block by block. When all earlier blocks are pruned and
recovered, a projection that lost channels gets the weights

    V = argmin_V  sum_t ||y*_t - V x_t||^2 + lambda ||V - W_K||^2  =  W_K + E (G + lambda I)^-1,
    G = sum_t x_t x_t^T,  E = sum_t (y*_t - W_K x_t) x_t^T,  lambda = ridge x mean diagonal of G,

where x_t (K,) are the kept channels in the pruned model, W_K (H, K) their dense weights, and y*_t is the output with
which the pruned residual stream equals the dense one directly after the projection, so that all earlier errors are
corrected. Some models multiply the output by a constant before it joins the stream. The constant is measured for each
projection (`residual_factor`).

If there is an RMS norm n(y) = g y / rms(y) between projection and residual (Gemma 2 and 3), V solves the same problem
for x_t / r_t and

    y*_t = (g d_t + m y^d_t / r_t) / (g^2 + m),    r_t = rms of the dense projection's output y^d_t,

where d_t is the norm's output that makes the streams equal, and m is a tenth of the median of g^2. Errors are thereby
weighted as they enter the stream. The term with m keeps channels of small gain near the dense output. After any other
norm, in layers with several blocks, and if the stream does not change by a constant times the output, as in layers of
Gemma 4 that change the stream after the FFN, y*_t is the output of the dense projection.

Attention is solved before the FFN of the same block. Biases do not change: both y* and W_K x + bias contain the bias,
so it cancels in E. All tokens of all corpora have equal weight. This recovery is ours; the paper has none.

G and E are summed in float32, and the system is solved in float64. For a bfloat16 model on a CPU with AMX, the error
y* - W_K x is rounded to bfloat16 in E. Hidden states are stored on the CPU in the model's dtype, and so are inputs of
the projection that is solved last. The cost is one pass through the dense layers and one pass through the pruned layers
for each projection of a block; one more if there is a norm after the FFN, or if `down` keeps its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.calibration.layerwise import LayerCall, Walk
from gprune.calibration.moments import add_gram, fill_gram
from gprune.errors import require_finite
from gprune.models.blocks import Block, blocks_of, by_layer
from gprune.models.masks import Masks, changed
from gprune.models.offload import device_of, resident
from gprune.models.parts import is_norm
from gprune.models.products import fast_products
from gprune.recoveries.least_squares import ridge_correction

SAMPLE_TOKENS = 8  # of the text with which `residual_factor` is measured


class Observed(NamedTuple):
    """What a projection has computed in the last forward pass."""

    input: Tensor  # (B, T, K)
    output: Tensor  # (B, T, H)
    norm_input: Tensor | None  # input of the norm after the projection, if there is such a norm


class Target(NamedTuple):
    """Target of a projection for one batch, on the CPU. What the equations do not need is None."""

    stream: Tensor | None  # (tokens, H), the dense residual stream directly after the projection
    output: Tensor | None  # (B, T, H), the output of the dense projection


def projections_to_solve(masks: Masks, alone: Sequence[bool] | None = None) -> list[tuple[str, ...]]:
    """Return for each block the names of projections to solve, in the order of computation.

    These are the projections that lose channels. After a removed block also `down`, even if it keeps all channels;
    not in blocks that are not `alone` in their layer.
    """
    if alone is None:
        alone = [True] * len(masks.blocks)
    follows_kept_block = [True, *masks.blocks[:-1]]
    by_block = []
    for groups, neurons, is_kept, follows_kept, is_alone in zip(
        masks.attention, masks.ffn, masks.blocks, follows_kept_block, alone, strict=True
    ):
        parts = []
        if is_kept and not groups.all():
            parts.append("output")
        follows_removed = is_alone and not follows_kept
        if is_kept and len(neurons) and (follows_removed or not neurons.all()):
            parts.append("down")
        by_block.append(tuple(parts))
    return by_block


class PrunedPrefix:
    """Pass text through a dense model and through pruned blocks, which are recovered one after the other.

    Example:

        prefix = PrunedPrefix(model, masks, windows)
        for dense, block in ...:  # kept blocks, in order
            prefix.recover(dense, block)

    The dense model has no experts; it is not changed, and may be offloaded. `windows` are batches of (B, T) token ids.
    Later blocks compensate for blocks that the masks remove. `tokens` counts all passes through pruned layers.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, masks: Masks, windows: Iterable[Tensor], *, ridge: float = 0.01):
        self.blocks = blocks_of(model)
        assert not any(block.has_experts for block in self.blocks), "experts are not recovered along the prefix"
        layers = by_layer(self.blocks)
        # For each block: whether it is the only one of its layer.
        self.alone = [len(blocks) == 1 for blocks in layers for _ in blocks]
        # For each block: whether it is the last one of its layer.
        self.ends_layer = [block is blocks[-1] for blocks in layers for block in blocks]
        self.ridge = ridge
        self.parts_to_solve = projections_to_solve(masks, self.alone)
        # Both streams are equal before block `first_changed`. After block `last_solved` no stream is needed.
        changed = [b for b, parts in enumerate(self.parts_to_solve) if parts or not masks.blocks[b]]
        solved = [b for b, parts in enumerate(self.parts_to_solve) if parts]
        self.first_changed = min(changed, default=len(self.blocks))
        self.last_solved = max(solved, default=-1)
        walk = Walk(model)
        for ids in windows:
            walk.add(ids.to(device_of(model)))
        walk.add(walk.calls[0].input_ids[:1, :SAMPLE_TOKENS])
        self.sample = walk.calls.pop()
        self.calls = walk.calls  # one per batch; `hidden`, (B, T, H), is the dense stream
        self.passed_layers = 0  # number of layers that the dense stream has passed
        # Targets of the last layer that the dense stream has passed: block index -> projection -> one per batch.
        self.targets: dict[int, dict[str, list[Target]]] = {}
        # (block index, projection) -> `residual_factor`; None also in layers with several blocks
        self.factors: dict[tuple[int, str], float | None] = {}
        # (block index, projection) -> `rms_norm_gain` of the norm after the projection
        self.gains: dict[tuple[int, str], Tensor | None] = {}
        self.pruned_stream = [call.hidden for call in self.calls]  # (B, T, H) for each batch
        self.tokens = 0

    @torch.no_grad()
    def recover(self, dense: Block, block: Block) -> None:
        """Solve the projections of the next pruned block in place, and pass the text through the block."""
        if dense.index > self.last_solved:
            return
        for layer_blocks in by_layer(self.blocks)[self.passed_layers : dense.layer_index + 1]:
            self.targets = self._pass_dense(layer_blocks)
        self.passed_layers = dense.layer_index + 1
        if dense.layer_index < self.blocks[self.first_changed].layer_index:  # both streams are still equal
            self.pruned_stream = [call.hidden for call in self.calls]
            return
        former_device = device_of(block.layer)
        block.layer.to(device_of(dense.layer))  # the device of the layer's other arguments
        try:
            parts = self.parts_to_solve[dense.index]
            must_advance = self.ends_layer[dense.index] and dense.index < self.last_solved
            # If `down` is solved and no norm follows, its output in the stream is replaced without another pass.
            exchanges_output = must_advance and "down" in parts and self._joins_stream(dense, "down")
            for part in parts:
                targets = self.targets[dense.index][part]
                self._solve(part, block, dense, targets, exchange=exchanges_output and part == "down")
            if must_advance and not exchanges_output:
                for batch, hidden in enumerate(self.pruned_stream):
                    self.pruned_stream[batch] = self._run_layer(block, dense.layer_index, batch, hidden).cpu()
        finally:
            block.layer.to(former_device)

    def _pass_dense(self, blocks: Sequence[Block]) -> dict[int, dict[str, list[Target]]]:
        """Pass the dense stream through a layer, whose blocks are given. Return targets as in `self.targets`."""
        layer, index = blocks[0].layer, blocks[0].layer_index
        targets = {block.index: {part: [] for part in self.parts_to_solve[block.index]} for block in blocks}
        with resident(layer), ExitStack() as hooks:
            for block in blocks:
                for part in targets[block.index]:
                    factor = residual_factor(block, part, self.sample) if self.alone[block.index] else None
                    self.factors[block.index, part] = factor
            observed = {
                block.index: hooks.enter_context(watch_projections(block, targets[block.index])) for block in blocks
            }
            for call in self.calls:
                after = call.run_layer(layer, index, call.hidden)
                for block in blocks:
                    for part, targets_of_part in targets[block.index].items():
                        projection = observed[block.index][part]
                        targets_of_part.append(self._target(block, part, projection, call.hidden, after))
                call.hidden = after.cpu()
        return targets

    def _target(self, block: Block, part: str, projection: Observed, before: Tensor, after: Tensor) -> Target:
        """Return the target of a dense projection for one batch, with the block's input and output (B, T, H).

        If the output joins the stream directly, the target is the stream; after an RMS norm, it is stream and output;
        otherwise it is the output.
        """
        joins_stream = self._joins_stream(block, part)
        key = block.index, part
        if key not in self.gains:
            norm_follows = self.factors[key] is not None and not joins_stream
            self.gains[key] = rms_norm_gain(block.norm_after(part), projection) if norm_follows else None
        stream = output = None
        if joins_stream or self.gains[key] is not None:
            stream = self._stream_after(block, part, self.factors[key], projection.output, before, after).cpu()
        if not joins_stream:
            output = projection.output.cpu()
        return Target(stream, output)

    def _solve(self, part: str, block: Block, dense: Block, targets: list[Target], *, exchange: bool) -> None:
        """Pass the pruned stream through a block with its current weights, and solve one of its projections."""
        solved = block.parts[part]
        device = device_of(block.layer)
        gram = torch.zeros(solved.in_features, solved.in_features, device=device)
        cross = torch.zeros(solved.out_features, solved.in_features, device=device)
        inputs = []  # inputs of the projection, one per batch, if its output is exchanged
        factor = self.factors[dense.index, part]
        with watch_projections(block, (part,)) as observed:
            for batch, (before, target) in enumerate(zip(self.pruned_stream, targets, strict=True)):
                after = self._run_layer(block, dense.layer_index, batch, before)
                projection = observed[part]
                if exchange:  # the stream without the output of the projection, which is added below
                    inputs.append(projection.input.cpu())
                    added = projection.output.reshape(after.shape).float() * factor
                    self.pruned_stream[batch] = (after.float() - added).to(after.dtype).cpu()
                rows, error = self._equations(block, dense, part, target, projection, before, after)
                with fast_products(projection.input):
                    add_gram(gram, rows)
                    cross.addmm_(error.T, rows)
        require_finite(f"activation came up in block {dense.index} of the pruned model", gram, cross)
        fill_gram(gram)
        correction = ridge_correction(gram.double(), cross.double(), self.ridge)
        solved.set((solved.weight.double() + correction).to(solved.weight.dtype), None)
        for batch, x in enumerate(inputs):
            stream = self.pruned_stream[batch].to(device)
            added = solved.host(x.to(device)).reshape(stream.shape) * factor
            self.pruned_stream[batch] = (stream + added).cpu()

    def _equations(
        self, block: Block, dense: Block, part: str, target: Target, projection: Observed,
        before: Tensor, after: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return x_t, (tokens, K), and y*_t - W_K x_t, (tokens, H), of one batch (docstring of this module)."""
        x, y = projection.input.flatten(0, -2), projection.output.flatten(0, -2)
        dense_output = None
        if target.output is not None:
            dense_output = target.output.to(y.device).flatten(0, -2).float()
        if target.stream is None:
            return x.float(), dense_output - y.float()
        factor = self.factors[dense.index, part]
        stream = self._stream_after(block, part, factor, projection.output, before, after)
        # What has to be added to the output (of the norm, if one follows) so that both streams are equal.
        missing = (target.stream.to(y.device).float() - stream.float()) / factor
        if dense_output is None:
            return x.float(), missing
        # The projection is followed by an RMS norm: g = gain, r_t = size, d_t = norm_target, m = damping.
        gain = self.gains[dense.index, part].to(y.device)
        size = dense_output.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        norm_target = block.norm_after(part)(y).float() + missing
        damping = 0.1 * gain.square().median()
        y_target = (gain * norm_target + damping * dense_output / size) / (gain.square() + damping)
        return x.float() / size, y_target - y.float() / size

    def _stream_after(
        self, block: Block, part: str, factor: float, output: Tensor, before: Tensor, after: Tensor
    ) -> Tensor:
        """Return the residual stream directly after a projection, (tokens, H)."""
        if part == "down":  # has a factor only if the FFN is last, so the layer's output is the stream after `down`
            return after.flatten(0, -2)
        if not block.joins_residual(part):
            output = block.norm_after(part)(output)
        return (before.to(output.device).reshape(output.shape) + output * factor).flatten(0, -2)

    def _joins_stream(self, block: Block, part: str) -> bool:
        """Return whether the target is the residual stream and not the output of the projection."""
        return self.factors[block.index, part] is not None and block.joins_residual(part)

    def _run_layer(self, block: Block, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Return the output of a pruned layer for hidden states (B, T, H) of a batch, and count the tokens."""
        self.tokens += hidden.shape[0] * hidden.shape[1]
        return self.calls[batch].run_layer(block.layer, index, hidden)


def residual_factor(block: Block, part: str, call: LayerCall) -> float | None:
    """Return the factor c with which the output of a projection joins the residual stream; None without such a factor.

    If a norm follows the projection, its output counts instead. For `down`, the stream is the output of the layer, so
    None also means that the FFN is not the last part of the layer. For `output`, it is the input of the layer plus c
    times what is added.

    The layer is called with hidden states of zeros and with random numbers instead of what the projection adds. Nothing
    else is in the stream, so the result is not rounded in relation to larger numbers, and a factor of 1 is exact.
    """
    layer, projection = block.layer, block.parts[part]
    added_by = block.norm_after(part)
    if added_by is None:
        added_by = projection.host
    silent = [block.parts[name].host for name in ("down", "output") if name in block.parts and name != part]
    if part == "output":  # every later part of the layer begins or ends with a norm
        silent += [module for module in layer.modules() if is_norm(module)]
    silent = [module for module in silent if module is not added_by]
    random = torch.randn(call.input_ids.numel(), projection.out_features, generator=torch.Generator().manual_seed(4))
    random = random.to(call.hidden)  # on the CPU
    if call.hidden.numel() != random.numel():  # several residual streams
        return None
    random_there = random.to(device_of(layer))
    zeros = torch.zeros_like(random_there)

    def output(entering: Tensor, added: Tensor) -> Tensor:
        """Return the layer's output for its input and for what the projection adds; all are (tokens, H)."""
        with ExitStack() as hooks:
            for module in silent:
                hooks.enter_context(changed(module, torch.zeros_like))
            # Copies, because a layer may change tensors in place.
            hooks.enter_context(changed(added_by, lambda y: added.reshape(y.shape).to(y.dtype, copy=True)))
            hidden = entering.reshape(call.hidden.shape).clone()
            return call.run_layer(layer, block.layer_index, hidden).reshape(added.shape)

    constant = output(zeros, zeros)  # such as biases
    of_added = _factor((output(zeros, random_there) - constant).cpu(), random)
    if part == "down" or of_added is None:
        return of_added
    # It is not 1 if the layer multiplies its output, as in Gemma 4.
    of_input = _factor((output(random_there, zeros) - constant).cpu(), random)
    return None if of_input is None else of_added / of_input


def _factor(x: Tensor, reference: Tensor) -> float | None:
    """Return the number c with x = c reference, except for rounding; None if no number fits, or if it is zero."""
    tolerance = max(1e-3, torch.finfo(x.dtype).eps)
    x, reference = x.double().flatten(), reference.double().flatten()
    factor = float((x @ reference) / (reference @ reference))  # least squares
    largest = float(x.abs().max())
    is_multiple = float((x - factor * reference).abs().max()) <= tolerance * largest  # not if a number is not finite
    return factor if is_multiple and largest > 0 else None


def rms_norm_gain(norm: nn.Module, projection: Observed) -> Tensor | None:
    """Return g of a norm n(y) = g y / rms(y) of a projection's output, (H,) float32, by calling the norm.

    Returns None for other norms, and for a norm of something else, such as the sum with the residual.
    """
    output, norm_input = projection.output, projection.norm_input
    if norm_input is None or not torch.equal(norm_input.flatten(0, -2), output.flatten(0, -2)):
        return None
    ones = torch.ones_like(output.flatten(0, -2)[:1])
    signs = ones * (1 - 2 * (torch.arange(ones.shape[-1], device=ones.device) % 2)).to(ones.dtype)  # 1, -1, 1, ...
    gain = norm(ones)
    is_rms_norm = torch.equal(norm(signs), gain * signs)  # ones and signs have the RMS 1, but different means
    return gain[0].float() if is_rms_norm else None


@contextmanager
def watch_projections(block: Block, parts: Iterable[str]) -> Iterator[dict[str, Observed]]:
    """Context manager that records what projections of a block compute in the last forward pass, by their names."""
    observed: dict[str, Observed] = {}

    def record_projection(part: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook of a projection."""
        observed[part] = Observed(inputs[0], output.clone(), None)  # Falcon adds to its output in place

    def record_norm_input(part: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the norm after a projection."""
        if part in observed:  # otherwise the projection has not been called yet
            observed[part] = observed[part]._replace(norm_input=inputs[0])

    with ExitStack() as hooks:
        for part in parts:
            host = block.parts[part].host
            hooks.callback(host.register_forward_hook(partial(record_projection, part)).remove)
            norm = block.norm_after(part)
            if norm is not None:
                hooks.callback(norm.register_forward_pre_hook(partial(record_norm_input, part)).remove)
        yield observed
