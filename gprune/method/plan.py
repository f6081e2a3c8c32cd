"""Check settings, and plan budget and tokens of a run, before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning import Callback
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.calibration.block_errors import BlockErrors
from gprune.calibration.layerwise import Grams
from gprune.calibration.saliency import Saliency
from gprune.config import RunConfig
from gprune.discovery import check_structure, family_of
from gprune.errors import UserError
from gprune.export.convert import FORMATS, format_named
from gprune.features import Feature, attribute
from gprune.method.pricing import Pricing
from gprune.models.blocks import Block, blocks_of, find_unpruned
from gprune.models.copies import skeleton
from gprune.models.loading import read_config
from gprune.models.losses import why_not_measurable
from gprune.recoveries import recoveries_of, recovery_learns
from gprune.runs.trainer import check_trainer, resolve_precision
from gprune.runs.user_callbacks import UserCallbacks
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import uniform_masks

STATISTICS: dict[str, Feature] = {"gram": Grams(), "saliency": Saliency(), "errors": BlockErrors()}
MAX_CACHED_BYTES = 2**32  # limit of the dense model's hidden states that are cached for other rows


def forward_equivalents(forward: int, forward_backward: int) -> float:
    """Cost of tokens in forward passes of one token. A backward pass costs as much as two forward passes."""
    return forward + 3 * forward_backward


@dataclass(frozen=True)
class Plan:
    """The plan of a run, made before weights are read."""

    pricing: Pricing
    budget: Budget
    why_precision: str  # reason for the precision, in words

    @property
    def cfg(self) -> RunConfig:
        return self.pricing.cfg

    @property
    def skeleton(self) -> PreTrainedModel:
        """The dense model without weights."""
        return self.pricing.skeleton

    @property
    def device(self) -> torch.device:
        return self.pricing.device

    @property
    def features(self) -> list[Any]:
        """The features of the run (`RunConfig.features`), and the statistics that they need."""
        needs = {need for feature in self.cfg.features for need in attribute(feature, "needs")} | self.cfg.collects
        return [*self.cfg.features, *(STATISTICS[name] for name in sorted(needs & STATISTICS.keys()))]

    @cached_property
    def tokens(self) -> dict[int, tuple[int, int]]:
        """Largest numbers of tokens (forward, forward and backward), by step: sums over the features of the run."""
        of_features = [attribute(feature, "planned_tokens")(self) for feature in self.features]
        total: dict[int, tuple[int, int]] = {}
        for tokens in ({1: (self.calibration_tokens, 0)}, *of_features, self.row_tokens):
            for step, (forward, trained) in tokens.items():
                earlier_forward, earlier_trained = total.get(step, (0, 0))
                total[step] = earlier_forward + forward, earlier_trained + trained
        return total

    @property
    def calibration_tokens(self) -> int:
        """Number of tokens in a pass over all calibration corpora."""
        return len(self.cfg.calibration_corpora) * self.cfg.corpora.num_samples * self.cfg.corpora.seq_len

    @property
    def row_tokens(self) -> dict[int, tuple[int, int]]:
        """Tokens of recovering and evaluating the rows of the result table: the main row in step 9, controls in 10."""
        cfg = self.cfg
        early, late = self.evaluated_models
        compared = 3 * cfg.evaluation.compared_tokens  # by the masked, the sliced and the reloaded model
        forward = {9: compared + early * cfg.evaluated_tokens, 10: late * cfg.evaluated_tokens}
        trained = {9: 0, 10: 0}
        for row in cfg.rows:
            is_main = row == cfg.own_row
            if is_main and cfg.trials and cfg.recovery_learns:
                continue  # the main row's model is one of the trials
            step = 9 if is_main else 10
            row_forward, row_trained = self.recovery_tokens(row[1], counts_teacher=is_main)
            forward[step] += row_forward
            trained[step] += row_trained
        return {step: (forward[step], trained[step]) for step in (9, 10)}

    @property
    def evaluated_models(self) -> tuple[int, int]:
        """How many models are evaluated before recovery (rows without recovery), and afterwards.

        If the dense model's forecasts are not cached, the dense model is evaluated again beside each row, and counts
        each time.
        """
        cfg = self.cfg
        models_per_row = 1 if self.can_cache(cfg.evaluated_tokens) else 2
        total = 1 + models_per_row * len(cfg.rows)
        unrecovered_rows = sum(recovery == "none" for _, recovery in cfg.rows)
        early = 1 + models_per_row * unrecovered_rows if cfg.evaluates_early else 0
        return early, total - early

    def recovery_tokens(self, chain: str, *, counts_teacher: bool) -> tuple[int, int]:
        """Return the (forward, forward and backward) tokens of one model's recovery, including development text."""
        cfg = self.cfg
        text = len(cfg.corpora.recover) * cfg.corpora.num_samples * cfg.corpora.seq_len
        forward = trained = 0
        for recovery in recoveries_of(chain, cfg.recovery_settings):
            own_forward, own_trained = recovery.tokens(text, cfg.fresh_tokens, attention=cfg.attention)
            forward += own_forward
            trained += own_trained
            if recovery.learns:
                forward += cfg.recovery_measurements * cfg.development_tokens
            if recovery.uses_teacher and not counts_teacher and self.caches_teacher:
                forward -= cfg.fresh_tokens
        return forward, trained

    @property
    def caches_teacher(self) -> bool:
        """Whether the teacher's hidden states are cached: several models are distilled and the states are small."""
        recoveries = [*self.cfg.trials, *(recovery for _, recovery in self.cfg.rows)]
        trained_models = sum(recovery_learns(recovery) for recovery in recoveries)
        return trained_models > 1 and self.can_cache(self.cfg.fresh_tokens)

    def can_cache(self, tokens: int) -> bool:
        """Return whether the dense model's final hidden states of a number of tokens are small enough to cache."""
        hidden_size = self.skeleton.config.get_text_config(decoder=True).hidden_size
        return tokens * hidden_size * (4 if self.cfg.model.dtype == "float32" else 2) <= MAX_CACHED_BYTES

    @cached_property
    def removed(self) -> int:
        """Number of removed parameters if all blocks are equally sparse; exact only for a target in parameters."""
        return self.budget.parameters_removed_by(uniform_masks(self.budget))

    @property
    def forward_tokens(self) -> int:
        """Number of tokens that pass forward only, over all steps."""
        return sum(forward for forward, _ in self.tokens.values())

    @property
    def forward_backward_tokens(self) -> int:
        """Number of tokens that pass forward and backward, over all steps."""
        return sum(trained for _, trained in self.tokens.values())


def check(cfg: RunConfig, callbacks: UserCallbacks | None = None, *, together: bool = False) -> Plan:
    """Check settings, model and device, and return the plan, before weights are loaded.

    The model is constructed from its configuration on the meta device, without weights.
    """
    cfg.validate()
    cfg.check_names()
    callbacks = callbacks or UserCallbacks(paths=cfg.trainer.callbacks)
    device = trainer_device(cfg, callbacks.of_stage(None))
    config = read_config(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    dense = skeleton(config, record=family_of(config), trust_remote_code=cfg.model.trust_remote_code)
    check_structure(dense)
    blocks = blocks_of(dense)
    if "attention" in cfg.sparsity.scope and not any(block.kv_groups for block in blocks):
        raise UserError(
            f"--sparsity.scope {cfg.sparsity.scope} needs KV groups that can be removed; model type "
            f"'{config.model_type}' has none. Use ffn."
        )
    if (why := why_not_measurable(dense)) is not None:
        raise UserError(
            f"Cannot measure the perplexity of model type '{config.model_type}': {why}. Prune it with "
            "gprune.apply_masks, or write a record (docs/extend.md, 'A model family')."
        )
    cfg, why_precision = resolve_precision(cfg, device, together=together)
    pricing = Pricing(cfg, dense, device)
    budget = pricing.budget()
    for feature in cfg.features:
        budget = attribute(feature, "limit_budget")(budget)
    plan = Plan(pricing, budget, why_precision)
    check_blocks(cfg, blocks, config)
    for feature in plan.features:
        attribute(feature, "refuse")(plan)
    _ = plan.tokens  # raises UserError for an impossible validation interval
    return plan


def trainer_device(cfg: RunConfig, callbacks: Sequence[Callback]) -> torch.device:
    """Return the Trainer's device. A dry run assumes that the requested GPUs and nodes exist."""
    settings = cfg.trainer.lightning_arguments | {"callbacks": callbacks}
    try:
        return check_trainer(**settings)
    except UserError:
        if not (cfg.dry_run and settings["accelerator"] in ("gpu", "cuda")):
            raise
        one_cpu = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
        check_trainer(**settings | one_cpu)  # checks the other settings
        return torch.device("cuda")


def check_blocks(cfg: RunConfig, blocks: Sequence[Block], config: PreTrainedConfig) -> None:
    """Raise UserError if flags do not fit the model's blocks or positions, or this machine."""
    if cfg.export.format in FORMATS:
        target = format_named(cfg.export.format)
        target.refuse(blocks, config, type=cfg.export.type, uniform=cfg.sparsity.uniform_width)
    if cfg.model.device_map is not None and cfg.export.dtype not in (None, cfg.model.dtype):
        raise UserError(
            f"--export.dtype must be --model.dtype ({cfg.model.dtype}) with --model.device_map, because offloaded "
            f"weights are not converted; got '{cfg.export.dtype}'."
        )
    longest = max(cfg.corpora.seq_len, cfg.evaluation.seq_len)
    text_config = config.get_text_config(decoder=True)
    if blocks[0].family.learned_positions and longest > (positions := text_config.max_position_embeddings):
        raise UserError(
            f"--corpora.seq_len and --evaluation.seq_len must be at most {positions} tokens, the number of positions "
            f"that model type '{config.model_type}' has learned; got {longest}."
        )


def describe_unpruned(plan: Plan) -> str:
    """Describe layers whose FFN or attention is not pruned, and how large they are; empty if all layers are pruned."""
    budget, model = plan.budget, plan.skeleton
    units_by_kind = {"FFN": [block.neurons for block in budget.units]}
    if "attention" in plan.cfg.sparsity.scope:
        units_by_kind["attention"] = [block.groups for block in budget.units]
    sentences = []
    for kind, units in units_by_kind.items():
        missing = sum(not any(units[block] for block in layer) for layer in budget.by_layer)
        if missing:
            layers = f"{missing} of {len(budget.by_layer)} layers"
            sentences.append(f"{kind} of {layers}, without units that can be removed")
    for path, module in find_unpruned(model).items():
        share = module.parameters / model.num_parameters()
        sentences.append(f"{path} in {module.layers} layers ({module.why}): {share:.1%} of the model")
    return "; ".join(sentences)
