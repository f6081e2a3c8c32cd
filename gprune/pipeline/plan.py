"""Before anything is loaded: refuse what cannot work, and plan what the rest will cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)

from gprune.calibration.saliency import salient_parts
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.export.convert import LLAMA_CPP, has_llama_cpp
from gprune.export.gguf_writer import check_expressible
from gprune.models.blocks import Block, blocks_of
from gprune.models.folders import check_stored
from gprune.models.loading import locate_model, read_config, skeleton
from gprune.models.masks import Masks
from gprune.models.surgery import count_parameters
from gprune.pipeline.cost import flops, passes, recovery_tokens, speed, tokens_by_step
from gprune.pipeline.memory import Held, memory_of
from gprune.recoveries import recovery_of
from gprune.runs.trainer import check_trainer
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.cut import keep_masks

log = logging.getLogger("gprune")


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any weight is read."""

    cfg: RunConfig
    budget: Budget
    parameters: int  # of the whole model
    tokens: dict[int, tuple[int, int]]  # (forward, forward and backward) by step, at most
    device: torch.device
    memory: dict[str, Held]  # the peak of each step
    flops: float  # of all matrix products
    shape: tuple[int, int]  # of the largest weight

    @property
    def forward_tokens(self) -> int:
        """Tokens that go forward alone, over all steps."""
        return sum(forward for forward, _ in self.tokens.values())

    @property
    def forward_backward_tokens(self) -> int:
        """Tokens that go forward and backward, over all steps."""
        return sum(trained for _, trained in self.tokens.values())

    @property
    def work(self) -> dict[int, float]:
        """Tokens by step as `passes` weighs them."""
        return {step: passes(*tokens) for step, tokens in self.tokens.items()}

    @property
    def check_tokens(self) -> int:
        """Tokens of the batch on which masked, sliced and reloaded logits are compared."""
        return min(self.cfg.evaluation.seq_len, 128)

    @property
    def uniform(self) -> Masks:
        """Masks under uniform sparsity: the widths to expect."""
        costs = self.budget.costs
        even = zip(costs.neurons, costs.of_experts, strict=True)
        return keep_masks(
            self.budget,
            [((torch.arange(n) + 0.5) / n).repeat(e) for n, e in even],
            [(torch.arange(n) + 0.5) / n for n in costs.groups],
        )

    def describe(self) -> str:
        """The dry run, for people."""
        cfg, costs, uniform = self.cfg, self.budget.costs, self.uniform
        widths, groups = ([int(mask.sum()) for mask in kind] for kind in (uniform.ffn, uniform.attention))
        backward = [f"{cfg.sparsity.epochs} epochs over {len(cfg.corpora.learn)} corpora"] * cfg.learns
        backward += ["saliency in the calibration passes"] * ("saliency" in cfg.collects)
        expected = f"{min(widths)} to {max(widths)} of {max(costs.neurons)} neurons per block if uniform"
        expected += f", {min(groups)} to {max(groups)} KV groups" * costs.attention
        expected += "; learned thresholds move them" * cfg.learns
        if ALLOCATION[cfg.base_allocation].whole_blocks:
            expected = "whole blocks go, and part of one"
        tokens = [recovery_tokens(cfg, recovery) for _, recovery in cfg.stages]
        recovered, taught = sum(any(pair) for pair in tokens), sum(trained > 0 for _, trained in tokens)
        recovery = f", {recovered} of them recovered with text" * bool(recovered)
        backward += [f"{taught} models recovered by learning"] * bool(taught)
        lines = {
            "model": f"{cfg.model.name}: {self.parameters:,} parameters, {len(widths)} blocks",
            "scope": f"{cfg.sparsity.scope}: {costs.total:,} parameters in units",
            "removes": f"{self.budget.target:,} parameters: {cfg.sparsity.target:.1%} of the scope, "
            f"{self.budget.target / self.parameters:.1%} of the model",
            "widths": expected,
            "forward": f"at most {self.forward_tokens:,} tokens: {len(cfg.calibration)} calibration passes (fewer if "
            f"cached), {1 + len(cfg.stages)} models evaluated on {len(cfg.corpora.evaluate)} corpora{recovery}",
            "and backward": f"{self.forward_backward_tokens:,} tokens: {' and '.join(backward)}"
            if backward
            else "none: nothing is learned",
            "compute": self._compute(),
            "memory": self._memory(),
            "results": cfg.folder,
        }
        return "\n".join(f"{name:12} {line}" for name, line in lines.items())

    def _compute(self) -> str:
        """FLOPs, and the seconds that they take at least, by what this machine's matrix products reach now."""
        t, dtype = self.cfg.trainer, self.cfg.model.dtype
        processes = t.devices * t.num_nodes
        reached = speed(self.device, getattr(torch, dtype), self.shape) * processes
        seconds, each = self.flops / reached, f" x {processes} processes" * (processes > 1)
        long = next(
            f"{seconds / n:.3g} {unit}" for n, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= n or n == 1
        )
        return (
            f"at most {scaled(self.flops)}FLOP: {long} at {scaled(reached / processes)}FLOP/s{each}, which matrix "
            f"products of {dtype} reach on {self.device} now; other work comes on top"
        )

    def _memory(self) -> str:
        """Peaks of all steps, the highest first."""
        steps = sorted(self.memory.items(), key=lambda item: -item[1].total)
        if self.device.type == "cpu" and self.cfg.model.device_map is None:
            return "about " + ", ".join(f"{1 + held.total / 2**30:.1f} GiB in {name}" for name, held in steps)
        devices, host = max(h.device for h in self.memory.values()), max(h.host for h in self.memory.values())
        each = ", ".join(f"{held.device / 2**30:.1f} in {name}" for name, held in steps)
        return f"about {devices / 2**30:.1f} GiB on the device ({each}) and {2 + host / 2**30:.1f} GiB on the CPU"


def scaled(number: float) -> str:
    """1.5e12 as '1.5 T'."""
    power = max(0, min(5, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}"


def check(cfg: RunConfig) -> Plan:
    """Refuse before anything is loaded, and plan.

    The model is built from its configuration on the meta device: shapes without weights.
    """
    cfg.validate()
    cfg.check_names()
    device = check_trainer(**cfg.trainer.lightning)
    config = read_config(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    dense = skeleton(config, trust_remote_code=cfg.model.trust_remote_code)
    check_stored(dense, locate_model(cfg.model.name))
    blocks, s = blocks_of(dense), cfg.sparsity
    costs = unit_costs(blocks, scope=s.scope, protect=s.protect, uniform=s.uniform_width)
    budget = Budget.of(costs, s.target, s.width_multiple)
    if ALLOCATION[cfg.base_allocation].whole_blocks:
        check_depth(blocks, budget, config)
    for sparsity in cfg.evaluation.curve if cfg.learns else []:
        budget.at(sparsity)
    check_blocks(cfg, blocks, config)
    if cfg.export == "gguf":
        check_gguf_possible(dense)
    tokens = tokens_by_step(cfg)
    return Plan(
        cfg=cfg,
        budget=budget,
        parameters=count_parameters(dense, "all"),
        tokens=tokens,
        device=device,
        memory=memory_of(cfg, dense, budget),
        flops=flops(cfg, dense),
        shape=(blocks[0].neurons, config.hidden_size),
    )


def check_blocks(cfg: RunConfig, blocks: Sequence[Block], config: PreTrainedConfig) -> None:
    """Raise UserError where this model's blocks or positions cannot do what the flags ask for."""
    recovery_of(cfg.recovery).refuse(blocks, shard=cfg.model.shard, settings=cfg.recovery_settings)
    if "saliency" in cfg.collects:
        for block in blocks:
            salient_parts(block, "ffn")  # refuses experts
    longest = max(cfg.corpora.seq_len, cfg.evaluation.seq_len)
    if blocks[0].family.learned_positions and longest > config.max_position_embeddings:
        raise UserError(
            f"--corpora.seq_len, --evaluation.seq_len: expected at most {config.max_position_embeddings} tokens, the "
            f"positions that model_type '{config.model_type}' has learned, got {longest}."
        )


def check_gguf_possible(dense: PreTrainedModel) -> None:
    """Raise UserError now, not after hours, where the model or this machine allows no GGUF file."""
    if not has_llama_cpp():
        raise UserError(
            f"--export gguf: expected a llama.cpp build to check the file with; got none. Run `pip install "
            f"{LLAMA_CPP}`, or take --export hf, and then `gprune export` with --unchecked."
        )
    check_expressible(dense)


def check_depth(blocks: Sequence[Block], budget: Budget, config: PreTrainedConfig) -> None:
    """Raise UserError unless whole blocks can make up for the target, one is left, and none computes by its number."""
    for name, plain in (("scale_attn_by_inverse_layer_idx", False), ("decoder_sparse_step", 1)):
        if getattr(config, name, plain) != plain:
            raise UserError(
                f"--sparsity.allocation depth: expected blocks that compute alike in any place, but {name} of this "
                f"model is {getattr(config, name)}; take another allocation."
            )
    protected = budget.costs.protected
    gone = [block.cost for block in blocks if block.index not in protected]
    removable = sum(gone) - (0 if protected else max(gone))
    if budget.target > removable:
        raise UserError(
            f"--sparsity.target: {budget.target:,} parameters cannot go as whole blocks (--sparsity.allocation depth): "
            f"at most {removable:,} can while one block stays; ask for less."
        )
