"""Check settings, and plan budget and tokens of a run, before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from lightning import Callback
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.calibration.errors import check_dense
from gprune.calibration.layerwise import check_walk, needs_walk
from gprune.calibration.saliency import salient_parts
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.export.convert import check_type
from gprune.export.gguf_writer import check_expressible
from gprune.models.blocks import Block, blocks_of, find_unpruned
from gprune.models.families import PRUNED
from gprune.models.loading import read_config, skeleton
from gprune.models.masks import Masks
from gprune.models.structure import check_by_copy, check_structure, why_not_measurable
from gprune.models.surgery import attention_by_layer, prune
from gprune.pipeline.cost import tokens_by_step
from gprune.pipeline.pricing import Pricing
from gprune.recoveries import recovery_of
from gprune.runs.trainer import check_trainer, resolve_precision
from gprune.runs.user_callbacks import UserCallbacks
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import uniform_masks
from gprune.sparsity.target import Target


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

    @cached_property
    def tokens(self) -> dict[int, tuple[int, int]]:
        """Largest numbers of tokens (forward, forward and backward), by step."""
        return tokens_by_step(
            self.cfg, self.skeleton.config.get_text_config(decoder=True).hidden_size, self.budget.costs
        )

    @cached_property
    def removed(self) -> int:
        """Number of removed parameters if all blocks are equally sparse; exact only for a target in parameters."""
        return self.budget.costs.in_parameters.removed(uniform_masks(self.budget))

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
    dense = skeleton(config, trust_remote_code=cfg.model.trust_remote_code)
    check_by_copy(config)
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
    whole_blocks = ALLOCATION[cfg.base_allocation].whole_blocks
    if whole_blocks:
        budget = limit_to_depth(budget)
    if whole_blocks or budget.costs.block_share:
        check_attention_remains(config, budget)
    if whole_blocks or budget.costs.removed_blocks:
        check_renumbering(dense, budget)
    if cfg.learns:
        for sparsity in cfg.evaluation.curve:
            budget.at(sparsity)  # raises UserError for an impossible sparsity
    check_blocks(cfg, blocks, config)
    corpora, gram = len(cfg.calibration_corpora), "gram" in cfg.collects
    by_block = needs_walk(dense, corpora=corpora, gram=gram, sharded=cfg.model.shard)
    along_prefix = not recovery_of(cfg.recovery, cfg.recovery_settings).sharded
    if by_block or along_prefix:
        check_walk(config, along_prefix=along_prefix)
    check_checkpointing(cfg, dense)
    plan = Plan(pricing, budget, why_precision)
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
    if cfg.export.format == "gguf":
        check_type(cfg.export.type)
        check_expressible(blocks, config, uniform=cfg.sparsity.uniform_width)
    if cfg.model.device_map is not None and cfg.export.dtype not in (None, cfg.model.dtype):
        raise UserError(
            f"--export.dtype must be --model.dtype ({cfg.model.dtype}) with --model.device_map, because offloaded "
            f"weights are not converted; got '{cfg.export.dtype}'."
        )
    recovery_of(cfg.recovery, cfg.recovery_settings).refuse(blocks, shard=cfg.model.shard)
    if "saliency" in cfg.collects:
        for block in blocks:
            salient_parts(block, "ffn")  # raises UserError for experts
    if cfg.measures_errors:
        check_dense(blocks)
    longest = max(cfg.corpora.seq_len, cfg.evaluation.seq_len)
    text_config = config.get_text_config(decoder=True)
    if blocks[0].family.learned_positions and longest > (positions := text_config.max_position_embeddings):
        raise UserError(
            f"--corpora.seq_len and --evaluation.seq_len must be at most {positions} tokens, the number of positions "
            f"that model type '{config.model_type}' has learned; got {longest}."
        )


def check_checkpointing(cfg: RunConfig, dense: PreTrainedModel) -> None:
    """Raise UserError if layers of the model cannot be recomputed in the backward pass, which the run asks for."""
    distills = "distill" in cfg.recovery.split("+")
    if distills and cfg.distill.checkpointing and not dense.supports_gradient_checkpointing:
        raise UserError(
            "--distill.checkpointing must be false, because transformers does not support it for model type "
            f"'{dense.config.model_type.removeprefix(PRUNED)}'; got true."
        )


def check_attention_remains(config: PreTrainedConfig, budget: Budget) -> None:
    """Raise UserError if a budget allows removing all layers with attention of a model that has others too.

    Without attention, generation with a cache fails, because recurrent layers do not count tokens.
    """
    costs = budget.costs
    has_attention = attention_by_layer(config)
    if all(has_attention) or not any(has_attention):
        return
    layers = [blocks for blocks, has in zip(costs.by_layer, has_attention, strict=True) if has]
    if any(blocks not in costs.open_layers for blocks in layers):
        return
    layer_costs = [sum(costs.prices.blocks[block] for block in blocks) for blocks in layers]
    limit = costs.block_share * budget.target if costs.block_share else budget.target
    # The last removed layer may exceed the target.
    if sum(layer_costs) - max(layer_costs) < limit:
        numbers = [layer for layer, has in enumerate(has_attention) if has]
        raise UserError(
            f"--sparsity.protect must name a layer with attention of model type '{config.model_type}' if whole blocks "
            f"are removed, because generation needs one; these are {numbers}, such as --sparsity.protect "
            f"[{numbers[-1]}]."
        )


def check_renumbering(dense: PreTrainedModel, budget: Budget) -> None:
    """Raise UserError if other layers would change when a layer is removed and the following ones are renumbered.

    The first removable layer of the model without weights is removed, and `prune` compares the others.
    """
    blocks = blocks_of(dense)
    first = min(b.layer_index for b in blocks if b.index not in budget.costs.protected)
    ffn = [torch.full((b.experts * b.neurons,), b.layer_index != first) for b in blocks]
    attention = [torch.full((b.kv_groups,), b.layer_index != first) for b in blocks]
    prune(dense, Masks(ffn, attention))  # the result is not needed, only its error


def limit_to_depth(budget: Budget) -> Budget:
    """Limit a budget to the cost of all whole blocks except one.

    A quality target is lowered to that limit.
    """
    protected, prices = budget.costs.protected, budget.costs.prices.blocks
    layers = [layer for layer in budget.costs.by_layer if protected.isdisjoint(layer)]
    layer_costs = [sum(prices[block] for block in layer) for layer in layers]
    kept = 0 if protected else max(layer_costs)  # protected blocks are kept, otherwise the largest layer
    removable = sum(layer_costs) - kept
    if Target.of(budget.setting).unit == "quality":
        return replace(budget.removing(min(budget.target, removable)), setting=budget.setting)
    if budget.target > removable:
        raise UserError(
            f"--sparsity.allocation depth cannot remove {budget.target:,}: whole blocks are at most {removable:,} if "
            "one block is kept. Use a lower --sparsity.target."
        )
    return budget


def describe_unpruned(plan: Plan) -> str:
    """Describe layers whose FFN or attention is not pruned, and how large they are; empty if all layers are pruned."""
    costs, model = plan.budget.costs, plan.skeleton
    units_by_kind = {"FFN": costs.neurons}
    if "attention" in plan.cfg.sparsity.scope:
        units_by_kind["attention"] = costs.groups
    sentences = []
    for kind, units in units_by_kind.items():
        missing = sum(not any(units[block] for block in layer) for layer in costs.by_layer)
        if missing:
            layers = f"{missing} of {len(costs.by_layer)} layers"
            sentences.append(f"{kind} of {layers}, without units that can be removed")
    for path, module in find_unpruned(model).items():
        share = module.parameters / model.num_parameters()
        sentences.append(f"{path} in {module.layers} layers ({module.why}): {share:.1%} of the model")
    return "; ".join(sentences)
