"""Before the method: refuse what cannot work, plan what it will cost, fetch model and text."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gprune.architectures import Block, blocks_of
from gprune.config import RunConfig
from gprune.corpora import load_corpus
from gprune.data import Windows, make_windows
from gprune.errors import UserError
from gprune.export import LLAMA_CPP, llama_cpp
from gprune.export.gguf import check_expressible, tokenizer_keys
from gprune.loading import load_model, read_config, skeleton
from gprune.masks import Masks, UnitCosts, check_budget, keep_masks, unit_costs
from gprune.offload import is_offloaded, memory_limits
from gprune.recovery import ADDS_BIAS, SEQUENTIAL
from gprune.saliency import salient_parts
from gprune.statistics import gram_bytes
from gprune.surgery import count_parameters
from gprune.trainer import check_trainer
from gprune.walk import exceed_memory

log = logging.getLogger("gprune")
JOIN = "\n\n"  # between documents


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
    """Tokens that `gprune.sequential` takes through decoder layers, at most: for each model through the dense ones,
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
            f"{next(iter(LLAMA_CPP.values()))}`, or take --export hf and `python -m gprune.export` with --unchecked."
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


def check_backward(cfg: RunConfig, model: PreTrainedModel) -> None:
    """Raise UserError where a gradient is asked of a model whose weights come and go."""
    if cfg.model.shard or not is_offloaded(model):
        return
    why = "weights that do not fit --model.max_memory are fetched for each forward pass, and no gradient goes through"
    if cfg.learns:
        raise UserError(
            f"--sparsity.allocation learned: {why}; give the model more devices or memory, or add "
            f"--sparsity.allocation uniform (or global, owl, equal), which learns nothing."
        )
    if "saliency" in cfg.collects:
        raise UserError(
            f"--importance {cfg.importance}: {why}; give the model more devices or memory, or choose a metric without "
            f"gradients, such as wanda_sp."
        )


def check_tokens(cfg: RunConfig) -> int:
    """Tokens of the batch on which masked, sliced and reloaded logits are compared."""
    return min(cfg.evaluation.seq_len, 128)


def load(cfg: RunConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model, on the trainer's device unless `device_map` places it, and its tokenizer."""
    log.info("Loading %s", cfg.model.name)
    model, tokenizer = load_model(
        cfg.model.name,
        dtype=getattr(torch, cfg.model.dtype),
        device_map=cfg.model.device_map,
        max_memory=cfg.model.max_memory,
        trust_remote_code=cfg.model.trust_remote_code,
    )
    check_backward(cfg, model)
    if cfg.export == "gguf":
        tokenizer_keys(tokenizer, model.get_input_embeddings().num_embeddings)  # refuses what GGUF has no words for
    # To be sharded it stays on the CPU: each process takes its part from there.
    return model if cfg.model.device_map or cfg.model.shard else model.to(device), tokenizer


@dataclass(frozen=True)
class Text:
    """Windows by role. What calibrates and what is learned on begins with the same windows of a corpus."""

    train: Mapping[str, Windows]  # score, drift and recover, by corpus
    learn: list[Windows]  # one per learning corpus, also train text: those above and more, or fewer
    development: list[Windows]  # one per learning corpus
    test: list[Windows]  # one per evaluated corpus, of `evaluation.split`

    @property
    def used(self) -> list[Windows]:
        """What no evaluated text may share; curves on development text do not use it, they show it."""
        shown = {w.split for w in self.test}
        return [*self.train.values(), *self.learn, *(w for w in self.development if w.split not in shown)]

    def hashes(self) -> dict[str, str]:
        """Content hash by corpus, split and role: what two sittings at one run must share."""
        roles = {"": self.train.values(), " learned": self.learn, " curve": self.development, " evaluated": self.test}
        return {f"{w.corpus} {w.split}{role}": w.content_hash for role, found in roles.items() for w in found}


def prepare_text(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read, tokenise and cut every corpus for its roles.

    Raises:
        UserError: for a corpus with too little text for the samples asked for.
    """
    c, e = cfg.corpora, cfg.evaluation

    def windows(corpus: str, split: str, samples: int, seq_len: int, *flags: str, seed: int = 0) -> Windows:
        # Text that is measured on stays the same for every --run.seed: seeds compare methods, not test sets.
        return make_windows(
            load_corpus(corpus, split), tokenizer, corpus=corpus, split=split, num_samples=samples, seq_len=seq_len,
            seed=seed, join=JOIN, flags=flags,
        )  # fmt: skip

    calibrated = dict.fromkeys([*cfg.calibration, *cfg.roles["recover"]])
    log.info("Reading %d corpora", len({*cfg.used, *c.evaluate}))
    return Text(
        train={
            name: windows(
                name, "train", c.num_samples, c.seq_len, "--corpora.num_samples", "--corpora.seq_len", seed=cfg.run.seed
            )
            for name in calibrated
        },
        learn=[
            windows(
                name,
                "train",
                c.learn_samples or c.num_samples,
                c.seq_len,
                f"--corpora.{'learn' if c.learn_samples else 'num'}_samples",
                "--corpora.seq_len",
                seed=cfg.run.seed,
            )
            for name in cfg.roles["learn"]
        ],
        development=[
            windows(
                name,
                "development",
                e.development_samples,
                c.seq_len,
                "--evaluation.development_samples",
                "--corpora.seq_len",
            )
            for name in cfg.roles["learn"]
        ],
        test=[
            windows(name, e.split, e.num_samples, e.seq_len, "--evaluation.num_samples", "--evaluation.seq_len")
            for name in c.evaluate
        ],
    )
