"""What `--dry_run` says of a plan: tokens, FLOPs, time and the widths to expect."""

from __future__ import annotations

import math
import time

import torch

from gprune.config import RunConfig
from gprune.models.blocks import Block, blocks_of
from gprune.models.masks import Masks
from gprune.models.surgery import count_parameters
from gprune.pipeline.cost import calibration_tokens, recovery_tokens
from gprune.pipeline.plan import Plan
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import keep_masks


def describe(plan: Plan) -> str:
    """A line for each property of the run, ready to be printed."""
    cfg, budget = plan.cfg, plan.budget
    parameters, costs = count_parameters(plan.skeleton, "all"), budget.costs
    recovered = [tokens for _, recovery in cfg.stages if any(tokens := recovery_tokens(cfg, recovery))]
    forward = (
        f"at most {plan.forward_tokens:,} tokens: {len(cfg.calibration)} calibration passes (fewer if cached), "
        f"{1 + len(cfg.stages)} models evaluated on {len(cfg.corpora.evaluate)} corpora"
    )
    if recovered:
        forward += f", {len(recovered)} of them recovered with text"
    learned = []
    if cfg.learns:
        learned.append(f"{cfg.sparsity.epochs} epochs over {len(cfg.corpora.learn)} corpora")
    if "saliency" in cfg.collects:
        learned.append("saliency in the calibration passes")
    if trained := sum(backward > 0 for _, backward in recovered):
        learned.append(f"{trained} models recovered by learning")
    lines = {
        "model": f"{cfg.model.name}: {parameters:,} parameters, {len(costs.neurons)} blocks",
        "scope": f"{cfg.sparsity.scope}: {costs.total:,} parameters in units",
        "removes": f"{budget.target:,} parameters: {cfg.sparsity.target:.1%} of the scope, "
        f"{budget.target / parameters:.1%} of the model",
        "widths": expected_widths(cfg, budget),
        "forward": forward,
        "and backward": f"{plan.forward_backward_tokens:,} tokens: {' and '.join(learned)}"
        if learned
        else "none: nothing is learned",
        "compute": compute_time(plan),
        "results": cfg.folder,
    }
    return "\n".join(f"{name:12} {line}" for name, line in lines.items())


def uniform_masks(budget: Budget) -> Masks:
    """Masks that meet the budget with every module equally sparse."""

    def ranks(units: int) -> torch.Tensor:
        return (torch.arange(units) + 0.5) / units

    costs = budget.costs
    neurons = [ranks(n).repeat(experts) for n, experts in zip(costs.neurons, costs.of_experts, strict=True)]
    return keep_masks(budget, neurons, [ranks(n) for n in costs.groups])


def expected_widths(cfg: RunConfig, budget: Budget) -> str:
    """Neurons and KV groups that blocks keep under uniform sparsity."""
    if ALLOCATION[cfg.base_allocation].whole_blocks:
        return "whole blocks go, and part of one"
    masks, costs = uniform_masks(budget), budget.costs
    neurons, groups = ([int(mask.sum()) for mask in of_blocks] for of_blocks in (masks.ffn, masks.attention))
    expected = f"{min(neurons)} to {max(neurons)} of {max(costs.neurons)} neurons per block if uniform"
    if costs.attention:
        expected += f", {min(groups)} to {max(groups)} KV groups"
    if cfg.learns:
        expected += "; learned thresholds move them"
    return expected


def compute_time(plan: Plan) -> str:
    """FLOPs, and the seconds that they take at least, by what this machine's matrix products reach now."""
    t, dtype, config = plan.cfg.trainer, plan.cfg.model.dtype, plan.skeleton.config
    total, processes = flops(plan), t.devices * t.num_nodes
    reached = speed(plan.device, getattr(torch, dtype), (max(plan.budget.costs.neurons), config.hidden_size))
    seconds, rate = total / (reached * processes), f"{scaled(reached)}FLOP/s"
    size, unit = next((n, unit) for n, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= n or n == 1)
    if processes > 1:
        rate += f" x {processes} processes"
    return (
        f"at most {scaled(total)}FLOP: {seconds / size:.3g} {unit} at {rate}, which matrix products of {dtype} reach "
        f"on {plan.device} now; other work comes on top"
    )


def scaled(number: float) -> str:
    """1.5e12 as '1.5 T'."""
    power = max(0, min(5, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}"


def flops(plan: Plan) -> float:
    """FLOPs of the passes of a run and of its Gram matrices, at most: as if nothing were pruned.

    A multiply-add counts 2. A token forward: 2 x weights of the blocks, 4 T C for attention over T tokens, and 2 V H
    for the head, but in calibration. Backward: the same again through frozen weights and the head, and once more where
    weights learn; twice for attention. Gram matrices: two thirds of 2 (N^2 + C^2).
    """
    cfg, config, blocks = plan.cfg, plan.skeleton.config, blocks_of(plan.skeleton)
    weights = sum(_weight_flops(block, getattr(config, "num_experts_per_tok", 1)) for block in blocks)
    attention = sum(4.0 * cfg.corpora.seq_len * block.output.in_features for block in blocks)
    head = 2.0 * config.vocab_size * config.hidden_size
    learned = sum(backward for _, backward in (recovery_tokens(cfg, recovery) for _, recovery in cfg.stages))
    calibrated = calibration_tokens(cfg)
    total = plan.forward_tokens * (weights + attention + head)
    total += plan.forward_backward_tokens * (2 * weights + 3 * attention + 2 * head) + learned * weights
    if "saliency" not in cfg.collects:
        total -= calibrated * head
    if "gram" in cfg.collects:
        total += calibrated * sum(4 / 3 * (b.neurons**2 + b.output.in_features**2) for b in blocks)
    return total


def _weight_flops(block: Block, active: int) -> float:
    """FLOPs of a token forward through a block's weights; of experts, through `active` ones."""
    ffn, attention = (
        sum(part.out_features * part.in_features for part in block.parts_of(kind)) for kind in ("ffn", "attention")
    )
    return 2 * (attention + (ffn * active / block.experts if block.has_experts else ffn))


def speed(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], *, seconds: float = 0.5) -> float:
    """FLOP/s of products of 512 tokens with a weight of this shape (out, in), measured for so long after a first one.

    A real pass has element-wise work, attention and waiting beside them, and is slower.
    """
    tokens, weight = (torch.ones(n, shape[1], dtype=dtype, device=device) for n in (512, shape[0]))

    def work() -> None:
        tokens @ weight.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        work()
        count += 1
    return 2.0 * count * len(tokens) * weight.numel() / (time.perf_counter() - start)
