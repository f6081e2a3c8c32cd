"""Before anything is loaded: refuse what cannot work, and plan what the rest will cost."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)

from gprune.calibration.layerwise import exceed_memory
from gprune.calibration.saliency import salient_parts
from gprune.calibration.statistics import gram_bytes
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.export.gguf import check_expressible
from gprune.export.job import LLAMA_CPP, llama_cpp
from gprune.models.blocks import Block, blocks_of
from gprune.models.loading import read_config, skeleton
from gprune.models.masks import Masks
from gprune.models.offload import memory_limits
from gprune.models.surgery import count_parameters
from gprune.recovery.projection import ADDS_BIAS, SEQUENTIAL
from gprune.runs.trainer import check_trainer
from gprune.sparsity.budget import UnitCosts, check_budget, unit_costs
from gprune.sparsity.masks import keep_masks

log = logging.getLogger("gprune")


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any weight is read."""

    costs: UnitCosts
    target: int  # parameters to remove
    parameters: int  # of the whole model
    scope_parameters: int
    forward_tokens: int
    forward_backward_tokens: int
    uniform: Masks  # under uniform sparsity: the widths to expect
    device: torch.device
    memory_gib: float

    def describe(self, cfg: RunConfig) -> str:
        """The dry run, for people."""
        widths = [int(mask.sum()) for mask in self.uniform.ffn]
        groups = [int(mask.sum()) for mask in self.uniform.attention]
        share = self.target / self.parameters
        recovered = len(sequential_stages(cfg))
        recovery = f", {recovered} recovered block by block" * bool(recovered)
        backward = [f"{cfg.sparsity.epochs} epochs over {len(cfg.corpora.learn)} corpora"] * cfg.learns
        backward += ["saliency in the calibration passes"] * ("saliency" in cfg.collects)
        uniform = f"{min(widths)} to {max(widths)} of {max(self.costs.neurons)} neurons per block if uniform"
        uniform += f", {min(groups)} to {max(groups)} KV groups" * self.costs.attention
        uniform += "; learned thresholds move them" * cfg.learns
        return "\n".join(
            [
                f"model        {cfg.model.name}: {self.parameters:,} parameters, {len(widths)} blocks",
                f"scope        {cfg.sparsity.scope}: {self.scope_parameters:,} parameters in units",
                f"removes      {self.target:,} parameters: {cfg.sparsity.target:.1%} of the scope, "
                f"{share:.1%} of the model",
                f"widths       {'whole blocks go, and part of one' if cfg.base_allocation == 'depth' else uniform}",
                f"forward      at most {self.forward_tokens:,} tokens: {len(cfg.calibration)} calibration passes "
                f"(fewer if cached), "
                f"{1 + len(cfg.stages)} models evaluated on {len(cfg.corpora.evaluate)} corpora{recovery}",
                f"and backward {self.forward_backward_tokens:,} tokens: {' and '.join(backward)}"
                if backward
                else "and backward none: nothing is learned",
                f"memory       about {self.memory_gib:.1f} GiB",
                f"results      {os.path.join(cfg.run.dir, cfg.run_name)}",
            ]
        )


def check(cfg: RunConfig) -> Plan:
    """Refuse before anything is loaded, and plan.

    The model is built from its configuration on the meta device: shapes without weights.

    Raises:
        UserError: for an unknown corpus, an unsupported model, or an impossible budget.
    """
    cfg.validate()
    cfg.check_names()
    device = check_trainer(**asdict(cfg.trainer))
    config = read_config(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    dense = skeleton(config, trust_remote_code=cfg.model.trust_remote_code)
    blocks = blocks_of(dense)
    costs = unit_costs(
        blocks, scope=cfg.sparsity.scope, protect=cfg.sparsity.protect, uniform=cfg.sparsity.uniform_width
    )
    target = check_budget(costs, cfg.sparsity.target, width_multiple=cfg.sparsity.width_multiple)
    if cfg.base_allocation == "depth":
        check_depth(blocks, costs, target)
    for sparsity in cfg.evaluation.curve if cfg.learns else []:
        check_budget(costs, sparsity, width_multiple=cfg.sparsity.width_multiple, flag="evaluation.curve")
    check_blocks(cfg, blocks, config)
    if cfg.export == "gguf":
        check_gguf_possible(dense)
    parameters = count_parameters(dense, "all")
    c, e = cfg.corpora, cfg.evaluation
    development = len(c.learn) * e.development_samples * c.seq_len
    points = (cfg.sparsity.epochs + 1) + 2 + len(e.curve) if cfg.learns else 0
    evaluations = 1 + len(cfg.stages)
    calibration = len(cfg.calibration) * c.num_samples * c.seq_len
    backward = calibration if "saliency" in cfg.collects else 0
    learning = cfg.learns * cfg.sparsity.epochs * len(c.learn) * (c.learn_samples or c.num_samples) * c.seq_len
    teacher = cfg.sparsity.loss == "kl" or cfg.sparsity.objective == "worst"
    return Plan(
        costs=costs,
        target=target,
        device=device,
        parameters=parameters,
        scope_parameters=costs.total,
        forward_tokens=calibration
        - backward
        + len(c.evaluate) * e.num_samples * e.seq_len * evaluations
        + points * development
        + learning * teacher
        + sequential_tokens(cfg)
        + 3 * check_tokens(cfg),
        forward_backward_tokens=backward + learning,
        uniform=keep_masks(
            costs,
            [((torch.arange(n) + 0.5) / n).repeat(e) for n, e in zip(costs.neurons, costs.of_experts, strict=True)],
            [(torch.arange(n) + 0.5) / n for n in costs.groups],
            target=target,
            width_multiple=cfg.sparsity.width_multiple,
        ),
        memory_gib=1 + memory_bytes(cfg, dense) / 2**30,
    )


def sequential_stages(cfg: RunConfig) -> list[str]:
    """The models of the result table that are recovered along their pruned prefix."""
    return [stage for stage, recovery in cfg.stages if recovery in SEQUENTIAL]


def sequential_tokens(cfg: RunConfig) -> int:
    """Tokens that `gprune.recovery.sequential` takes through decoder layers, at most: for each model through the dense ones,
    through the pruned ones, and through these again for each projection that is solved.
    """
    passes = 2 + (2 if cfg.sparsity.scope == "attention+ffn" else 1)
    return (
        len(sequential_stages(cfg)) * passes * len(cfg.corpora.recover) * cfg.corpora.num_samples * cfg.corpora.seq_len
    )


def memory_bytes(cfg: RunConfig, dense: PreTrainedModel) -> int:
    """What a run needs at its peak beside the interpreter, roughly: bytes of weights, sums and activations.

    Weights count twice, dense and pruned, but what goes beyond `--model.max_memory` once, for the block at work. Gram
    matrices count for every corpus and once more pooled; where they go to files, as those of the block at work in
    float32 and once more in the float64 of the solver, and the hidden states of one corpus beside them. Recovery along
    the pruned prefix has hidden states of all its text: dense, pruned, and what is wanted behind a projection.
    """
    c, blocks = cfg.corpora, blocks_of(dense)
    width = 4 if cfg.model.dtype == "float32" else 2
    weights = count_parameters(dense, "all") * width
    largest = max(block.cost for block in blocks) * width
    limit = sum(memory_limits(cfg.model.max_memory or {}).values())
    offloaded = 0 < limit < weights
    grams = hidden = 0
    if "gram" in cfg.collects:
        grams = (len(cfg.calibration) + 1) * gram_bytes(blocks)
    if offloaded or (grams and "saliency" not in cfg.collects and exceed_memory(blocks, corpora=len(cfg.calibration))):
        grams = 4 * max(gram_bytes([block]) for block in blocks) if grams else 0
        hidden = c.num_samples * c.seq_len * dense.config.hidden_size * width
    if cfg.recovery in SEQUENTIAL:  # after calibration, whose sums of a block at work are as large
        grams = max(grams, 4 * max(gram_bytes([block]) for block in blocks))
        streams = 4 if cfg.sparsity.scope == "attention+ffn" else 3
        hidden = max(hidden, streams * len(c.recover) * c.num_samples * c.seq_len * dense.config.hidden_size * width)
    # gradients and their squares, for two halves of the corpus
    gradients = 16 * count_parameters(dense, cfg.sparsity.scope) if "saliency" in cfg.collects else 0
    widest = max(block.neurons for block in blocks)
    activations = 40 * c.batch_size * c.seq_len * widest * len(blocks) if cfg.learns else 0
    corrections = sum(b.down.weight.numel() for b in blocks) * width if cfg.learns_recovered else 0
    return (2 * limit + largest if offloaded else 2 * weights) + grams + hidden + gradients + activations + corrections


def check_blocks(cfg: RunConfig, blocks: Sequence[Block], config: PreTrainedConfig) -> None:
    """Raise UserError where this model's blocks or positions cannot do what the flags ask for."""
    name = f"model_type '{config.model_type}'"
    if cfg.recovery in SEQUENTIAL and cfg.model.shard:
        raise UserError(
            f"--recovery {cfg.recovery}: every process would take the text through all layers, on its own and from its "
            f"CPU; expected it without --model.shard true, or least_squares."
        )
    if cfg.learns_recovered and (cfg.model.shard or any(block.has_experts for block in blocks)):
        raise UserError(
            f"--sparsity.through {cfg.sparsity.through}: expected a model without experts that each process holds "
            f"whole, got {'--model.shard true' if cfg.model.shard else name}; learn with --sparsity.through none."
        )
    if any(block.has_experts for block in blocks):
        if cfg.recovery in SEQUENTIAL:
            raise UserError(
                f"--recovery: '{cfg.recovery}' does not see what enters each of the experts of {name}; expected none "
                f"or least_squares."
            )
        if cfg.recovery in ADDS_BIAS:
            raise UserError(
                f"--recovery: '{cfg.recovery}' adds biases, and the experts of {name} have none; expected none or "
                f"least_squares."
            )
        if "saliency" in cfg.collects:
            for block in blocks:
                salient_parts(block, "ffn")
    longest = max(cfg.corpora.seq_len, cfg.evaluation.seq_len)
    if blocks[0].family.learned_positions and longest > config.max_position_embeddings:
        raise UserError(
            f"--corpora.seq_len, --evaluation.seq_len: expected at most {config.max_position_embeddings} tokens, the "
            f"positions that {name} has learned, got {longest}."
        )


def check_gguf_possible(dense: PreTrainedModel) -> None:
    """Raise UserError now, not after hours, where the model or this machine allows no GGUF file."""
    if llama_cpp() is None:
        raise UserError(
            f"--export gguf: expected a llama.cpp build to check the file with; got none. Run `pip install "
            f"{next(iter(LLAMA_CPP.values()))}`, or take --export hf and `python -m gprune.export.job` with --unchecked."
        )
    check_expressible(dense)


def check_depth(blocks: Sequence[Block], costs: UnitCosts, target: int) -> None:
    """Raise UserError unless whole blocks can make up for the target and one is left, whichever they are."""
    gone = [block.cost for block in blocks if block.index not in costs.protected]
    removable = sum(gone) - (0 if costs.protected else max(gone))
    if target > removable:
        raise UserError(
            f"--sparsity.target: {target:,} parameters cannot go as whole blocks (--sparsity.allocation depth): "
            f"at most {removable:,} can while one block stays; ask for less."
        )


def check_tokens(cfg: RunConfig) -> int:
    """Tokens of the batch on which masked, sliced and reloaded logits are compared."""
    return min(cfg.evaluation.seq_len, 128)
