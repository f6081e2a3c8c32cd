"""Before the method: refuse what cannot work, plan what it will cost, fetch model and text."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gprune.architectures import blocks_of, check_family, load_model, locate_model
from gprune.config import RunConfig
from gprune.corpora import load_corpus
from gprune.data import Windows, make_windows
from gprune.masks import UnitCosts, check_budget, unit_costs
from gprune.recovery import NEEDS_GRAM
from gprune.surgery import count_parameters
from gprune.trainer import check_trainer

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
    uniform_widths: list[int]  # neurons per block under uniform sparsity
    memory_gib: float

    def describe(self, cfg: RunConfig) -> str:
        """The dry run, for people."""
        widths = self.uniform_widths
        share = self.target / self.parameters
        learned = cfg.gprune and cfg.sparsity.allocation == "learned"
        return "\n".join(
            [
                f"model        {cfg.model.name}: {self.parameters:,} parameters, {len(widths)} blocks",
                f"scope        {cfg.sparsity.scope}: {self.scope_parameters:,} parameters in units",
                f"removes      {self.target:,} parameters: {cfg.sparsity.target:.1%} of the scope, "
                f"{share:.1%} of the model",
                f"widths       {min(widths)} to {max(widths)} of {max(self.costs.neurons)} neurons per block if uniform"
                + ("; learned thresholds move them" if learned else ""),
                f"forward      at most {self.forward_tokens:,} tokens: calibration on {len(cfg.corpora.calibration)} "
                f"corpora (fewer if cached), evaluation on {len(cfg.corpora.evaluate)}",
                f"and backward {self.forward_backward_tokens:,} tokens: {cfg.sparsity.epochs} epochs over "
                f"{len(cfg.corpora.learn)} corpora"
                if learned
                else "and backward none: nothing is learned",
                f"memory       about {self.memory_gib:.1f} GiB",
                f"results      {os.path.join(cfg.run.dir, cfg.run_name)}",
            ]
        )


def evaluated_stages(cfg: RunConfig) -> list[tuple[str, str]]:
    """(stage, recovery) of every row of the result table after `dense`; each stage without recovery too."""
    stages = [name for name in ("base", "base_averaged") if name in cfg.evaluation.controls or not cfg.gprune]
    stages = [*stages, "gprune"] if cfg.gprune else [s for s in stages if s != "base_averaged"]
    recoveries = ["none"] if cfg.recovery == "none" else ["none", cfg.recovery]
    return [(stage, recovery) for recovery in recoveries for stage in stages]


def check(cfg: RunConfig) -> Plan:
    """Refuse before anything is loaded, and plan.

    The model is built from its configuration on the meta device: shapes without weights.

    Raises:
        UserError: for an unknown corpus, an unsupported model, or an impossible budget.
    """
    cfg.check_names()
    check_trainer(**asdict(cfg.trainer))
    check_family(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    config = AutoConfig.from_pretrained(locate_model(cfg.model.name), trust_remote_code=cfg.model.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.model.trust_remote_code)
    costs = unit_costs(blocks_of(skeleton), scope=cfg.sparsity.scope)
    target = check_budget(costs, cfg.sparsity.target, width_multiple=cfg.sparsity.width_multiple)
    for sparsity in cfg.evaluation.curve:
        check_budget(costs, sparsity, width_multiple=cfg.sparsity.width_multiple)
    parameters = count_parameters(skeleton, "all")
    c, e = cfg.corpora, cfg.evaluation
    learned = cfg.gprune and cfg.sparsity.allocation == "learned"
    development = len(c.learn) * e.development_samples * c.seq_len
    points = (cfg.sparsity.epochs + 1) + 2 + len(e.curve) if learned else 0
    evaluations = 1 + len(evaluated_stages(cfg))
    gram = sum(n * n for n in costs.neurons) if cfg.recovery in NEEDS_GRAM else 0
    weight_bytes = 4 if cfg.model.dtype == "float32" else 2
    activations = c.batch_size * c.seq_len * max(costs.neurons) * len(costs.neurons) * 10 if learned else 0
    return Plan(
        costs=costs,
        target=target,
        parameters=parameters,
        scope_parameters=costs.total,
        forward_tokens=len(c.calibration) * c.num_samples * c.seq_len
        + len(c.evaluate) * e.num_samples * e.seq_len * evaluations
        + points * development
        + 3 * check_tokens(cfg),
        forward_backward_tokens=learned * cfg.sparsity.epochs * len(c.learn) * c.num_samples * c.seq_len,
        uniform_widths=[n - round(n * target / costs.total) for n in costs.neurons],
        memory_gib=1 + (2 * parameters * weight_bytes + 4 * (len(c.calibration) + 1) * gram + 4 * activations) / 2**30,
    )


def check_tokens(cfg: RunConfig) -> int:
    """Tokens of the batch on which masked, sliced and reloaded logits are compared."""
    return min(cfg.evaluation.seq_len, 128)


def load(cfg: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model and its tokenizer."""
    log.info("Loading %s", cfg.model.name)
    return load_model(
        cfg.model.name,
        dtype=getattr(torch, cfg.model.dtype),
        device_map=cfg.model.device_map,
        trust_remote_code=cfg.model.trust_remote_code,
    )


@dataclass(frozen=True)
class Text:
    """Windows by role; the same corpus in two roles has the same windows."""

    train: Mapping[str, Windows]  # score, drift, learn and recover, by corpus
    development: list[Windows]  # one per learning corpus
    test: list[Windows]  # one per evaluated corpus

    @property
    def used(self) -> list[Windows]:
        return [*self.train.values(), *self.development]


def prepare_text(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read, tokenise and cut every corpus for its roles.

    Raises:
        UserError: for a corpus with too little text for the samples asked for.
    """
    c, e = cfg.corpora, cfg.evaluation

    def windows(corpus: str, split: str, samples: int, seq_len: int) -> Windows:
        # Text that is measured on stays the same for every --run.seed: seeds compare methods, not test sets.
        seed = cfg.run.seed if split == "train" else 0
        texts = load_corpus(corpus, split)
        return make_windows(
            texts, tokenizer, corpus=corpus, split=split, num_samples=samples, seq_len=seq_len, seed=seed, join=JOIN
        )

    log.info("Reading %d corpora", len({*c.calibration, *c.learn, *c.evaluate}))
    train = dict.fromkeys([*c.calibration, *c.learn])
    return Text(
        train={name: windows(name, "train", c.num_samples, c.seq_len) for name in train},
        development=[windows(name, "development", e.development_samples, c.seq_len) for name in c.learn],
        test=[windows(name, "test", e.num_samples, e.seq_len) for name in c.evaluate],
    )
