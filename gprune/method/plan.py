"""Check settings, and plan budget, prices and tokens of a run, before weights are loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES
from lightning import Callback
from torch import Tensor
from transformers import PreTrainedModel

from gprune.calibration.block_errors import error_tokens, refuse_experts
from gprune.calibration.saliency import salient_parts
from gprune.calibration.statistics import gram_bytes, ranges_in_memory
from gprune.checks import memory_limits
from gprune.config import DEFAULT_MULTIPLE, RunConfig
from gprune.discovery import check_structure, family_of
from gprune.errors import UserError, quoting
from gprune.evaluation.speed import costs_from_table, latency_table
from gprune.export.convert import FORMATS, format_named
from gprune.export.hf import kept_in_float32
from gprune.models.copies import skeleton
from gprune.models.families import decoder_layers, record_of
from gprune.models.gguf import stored_type
from gprune.models.loading import read_config
from gprune.models.losses import why_not_measurable
from gprune.models.paths import attribute_at
from gprune.models.surgery import widths
from gprune.models.units import find_unpruned, units_of
from gprune.recoveries import RECOVERY, recoveries_of
from gprune.runs.trainer import (
    UserCallbacks,
    arguments_of_user,
    check_trainer,
    matmul_precision,
    measurements,
    placement,
    resolve_precision,
)
from gprune.sparsity.budget import Budget, budget_of, default_width_multiple
from gprune.sparsity.cut import uniform_masks
from gprune.sparsity.experts import check_routers
from gprune.sparsity.price import COST, Costs, Price, parameter_costs, price_of
from gprune.sparsity.target import CUTS, HALF_BITS_PER_BYTE, LEARNING_CUTS
from gprune.sparsity.whole_blocks import check_attention_remains, check_renumbering, trial_tokens
from gprune.units.structure import Units

Tokens = dict[int, tuple[int, int]]  # step of the method -> (forward, forward and backward)
MAX_FORECAST_BYTES = 2**32  # limit of the dense model's forecasts that are kept for the KL of both stages


def device_memory(device: torch.device) -> int:
    """Return the memory of a GPU, or the main memory of this machine for the CPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return math.prod(map(os.sysconf, ("SC_PHYS_PAGES", "SC_PAGE_SIZE")))


@dataclass(frozen=True)
class Pricing:
    """Costs of the units of a model. They convert `--sparsity.target` to a budget."""

    cfg: RunConfig
    skeleton: PreTrainedModel  # the dense model without weights
    device: torch.device

    @property
    def device_available(self) -> bool:
        """Whether this machine has the device. A dry run can plan for another one."""
        return self.device.type == "cpu" or torch.cuda.is_available()

    @property
    def exported_dtype(self) -> str:
        """Dtype of the exported weights, such as bfloat16."""
        if self.cfg.export.dtype:
            return self.cfg.export.dtype
        m = self.cfg.model
        published = self.skeleton.config.dtype  # None if the config has no dtype
        # A float32 run of a 16-bit model exports the dtype of the original, unless weights are offloaded.
        if m.dtype == "float32" and m.device_map is None and published in (torch.bfloat16, torch.float16):
            return str(published).removeprefix("torch.")
        return m.dtype

    @cached_property
    def latency_table(self) -> dict[str, Any]:
        """The latency table of this machine (`gprune.evaluation.speed`), measured unless it is cached."""
        cfg = self.cfg
        if not self.device_available:
            raise UserError(f"{cfg.sparsity.currency_flag} needs a GPU in this machine to measure on.")
        with matmul_precision(cfg.trainer.float32_matmul_precision):
            return latency_table(self.skeleton, self.device, getattr(torch, cfg.model.dtype), cfg.attention)

    def budget(self) -> Budget:
        """Return the budget of `--sparsity.target`."""
        s, export, units = self.cfg.sparsity, self.cfg.export, units_of(self.skeleton)
        price, outside = self.price_in(s.currency)
        multiple = default_width_multiple(units) if s.width_multiple == DEFAULT_MULTIPLE else s.width_multiple
        if (export.format, export.type) == ("gguf", "q8_0") and multiple % 32:
            raise UserError(
                f"--export.type q8_0 needs --sparsity.width_multiple 32 or a multiple of 32; got {multiple}."
            )
        if "experts" in s.scope:
            check_routers(units, self.skeleton.config.model_type, s.scope)
        try:
            return budget_of(
                units, s.target, scope=s.scope, width_multiple=multiple, uniform=s.uniform_width, protect=s.protect,
                price=price, outside=outside, block_share=s.block_share, expert_share=s.expert_share,
                uniform_experts=s.uniform_experts,
            )  # fmt: skip
        except UserError as error:
            if s.currency == "bytes" and (narrower := self.narrower_export):
                raise UserError(f"{error} {narrower}.") from error
            raise

    @property
    def narrower_export(self) -> str:
        """A hint about a flag that reduces the bytes of the exported weights; empty if there is none."""
        export = self.cfg.export
        if export.format == "gguf":
            narrower_type = {"f32": "f16", "f16": "q8_0 --sparsity.width_multiple 32"}.get(export.type)
            return f"With --export.type {narrower_type} the weights take about half the bytes" if narrower_type else ""
        if self.exported_dtype == "float32":
            return "With --export.dtype bfloat16 the weights take half the bytes"
        return ""

    def price_in(self, currency: str) -> tuple[Price, int]:
        """Return the price of the model in a registered currency, and the cost of the rest.

        UserError if a function's costs are invalid.
        """
        units = units_of(self.skeleton)
        if currency == "seconds":
            return costs_from_table(self.latency_table, units)
        cost: Callable[..., Costs] = self.exported_bytes if currency == "bytes" else COST[currency]
        needed = "It must return whole numbers by key of units, such as 'neurons.0'"
        with quoting(f"Cannot compute cost '{currency}': ", f". {needed}."):
            return price_of(cost(self.skeleton, units), units)

    def exported_bytes(self, model: PreTrainedModel, units: Sequence[Units]) -> Costs:
        """Return the cost of units in half bits of the export.

        GGUF files store vectors as float32, and matrices whose rows are no whole blocks of q8_0 as float16. Rows of
        output projections of attention may be shortened to any number of KV groups. Some parameters of Hugging Face
        folders are float32 in any case.
        """
        export = self.cfg.export
        if export.format == "gguf":
            layers = decoder_layers(model)
            cut = [u for u in units if u.kind == "kv_groups" and self.cfg.attention and u.count]
            projections = {id(attribute_at(layers[u.layer], u.slices[-1].path)): u.repeats for u in cut}

            def half_bits(parameter: Tensor) -> int:
                row = projections.get(id(parameter), parameter.shape[-1])
                weights, num_bytes = GGML_QUANT_SIZES[stored_type((*parameter.shape[:-1], row), export.type)]
                return HALF_BITS_PER_BYTE * num_bytes // weights

            return parameter_costs(model, units, weight=half_bits)
        dtype = getattr(torch, self.exported_dtype)
        in_float32 = {id(model.get_parameter(name)) for name in kept_in_float32(model, dtype)}
        return parameter_costs(
            model, units, weight=lambda p: HALF_BITS_PER_BYTE * (4 if id(p) in in_float32 else dtype.itemsize)
        )


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

    @cached_property
    def tokens(self) -> Tokens:
        """Largest numbers of tokens (forward, forward and backward), by step."""
        cfg, calibration, passes = self.cfg, self.calibration_tokens, len(self.gram_ranges) or 1
        parts: list[Tokens] = [{1: (passes * calibration, 0)}, self.model_tokens]
        if "saliency" in cfg.needs:  # calibration has a backward pass
            parts.append({1: (-calibration, calibration)})
        if cfg.measures_errors:
            parts.append({2: (0, error_tokens(cfg, "base")), 7: (0, error_tokens(cfg, "modules"))})
        if cfg.sparsity.chooses_blocks_by_loss:
            parts.append({2: (trial_tokens(self), 0)})
        if cfg.learns:
            parts.append({7: self.learning_tokens})
        if cfg.searches_quality:
            parts.append(self.search_tokens)
        total: Tokens = {}
        for tokens in parts:
            for step, (forward, trained) in tokens.items():
                earlier_forward, earlier_trained = total.get(step, (0, 0))
                total[step] = earlier_forward + forward, earlier_trained + trained
        return total

    @property
    def development_tokens(self) -> int:
        """Largest number of tokens in the development text. By default a quality target uses less of small corpora."""
        return len(self.cfg.development_corpora) * self.cfg.development_windows * self.cfg.corpora.seq_len

    @property
    def learning_tokens(self) -> tuple[int, int]:
        """Tokens of threshold learning, and of development perplexity before, during and after learning."""
        cfg, epochs = self.cfg, self.cfg.sparsity.epochs
        windows = self._windows(cfg.corpora.learn, cfg.corpora.learn_samples or cfg.corpora.num_samples)
        learning = epochs * windows * cfg.corpora.seq_len
        # The curve over sparsities has the dense model, the target and others.
        measured = measurements(cfg.trainer, windows, cfg.corpora.batch_size, epochs=epochs)
        measured += 2 + len(cfg.evaluation.curve)
        teacher = learning if cfg.sparsity.loss == "kl" else 0
        return measured * self.development_tokens + teacher, learning

    @property
    def searched_models(self) -> int:
        """Largest number of models that a target in quality measures. A bisection of 2^n - 1 cuts measures n."""
        return CUTS.bit_length() + (LEARNING_CUTS.bit_length() if self.cfg.learns else 0)

    @property
    def search_tokens(self) -> Tokens:
        """Tokens of the search for a quality, and of the recovered model on development text if it is trained."""
        cfg = self.cfg
        recovered, _ = self.recovery_tokens(cfg.training_free_recovery)
        searched = self.development_tokens + self.searched_models * (recovered + self.development_tokens)
        return {8: (searched, 0), 9: (self.development_tokens if cfg.recovery_learns else 0, 0)}

    @property
    def calibration_tokens(self) -> int:
        """Number of tokens in a pass over all calibration corpora."""
        c = self.cfg.corpora
        return self._windows(self.cfg.calibration_corpora, c.num_samples, least=2) * c.seq_len

    def _windows(self, corpora: list[str], each: int, *, least: int = 1) -> int:
        """Return the number of windows of corpora in all, with `each` window per corpus on average."""
        return sum(self.cfg.corpora.windows_of(corpora, each, least=least).values())

    @cached_property
    def gram_ranges(self) -> list[list[int]]:
        """Numbers of the blocks of each pass of calibration, if Gram matrices exceed `--model.max_memory`.

        One pass collects the statistics of one range of layers. Empty if the matrices of all corpora stay in memory.
        They are summed on the devices of the layers, and moved to the CPU, so the smallest limit counts.
        """
        units, corpora = units_of(self.skeleton), len(self.cfg.calibration_corpora)
        limit = min(memory_limits(self.cfg.model.max_memory or {}).values(), default=math.inf)
        if "gram" not in self.cfg.needs or corpora * gram_bytes(units) <= limit:
            return []
        return ranges_in_memory(units, limit)

    @property
    def model_tokens(self) -> Tokens:
        """Tokens of recovering and evaluating the model: up to its recovery in step 9, afterwards in step 10.

        If the dense model's forecasts are not kept, the dense model is evaluated again beside each stage, and counts
        each time.
        """
        cfg, tokens = self.cfg, self.cfg.evaluated_tokens
        compared = 3 * cfg.evaluation.compared_tokens  # by the masked, the sliced and the reloaded model
        forward, trained = self.recovery_tokens(cfg.recovery)
        of_stage = tokens if self.keeps_forecasts else 2 * tokens
        before = tokens + of_stage if cfg.measures_pruned else 0
        after = of_stage if cfg.measures_pruned else tokens + of_stage
        return {9: (forward + compared + before, trained), 10: (after, 0)}

    def recovery_tokens(self, chain: str) -> tuple[int, int]:
        """Return the (forward, forward and backward) tokens of a model's recovery, including development text."""
        cfg = self.cfg
        text = self._windows(cfg.corpora.recover, cfg.corpora.num_samples, least=2) * cfg.corpora.seq_len
        fresh_windows = self._windows(cfg.corpora.recover, cfg.fresh_windows)
        forward = trained = 0
        for recovery in recoveries_of(chain, cfg.recovery_settings):
            own_forward, own_trained = recovery.tokens(
                text, fresh_windows * cfg.corpora.seq_len, attention=cfg.attention
            )
            forward += own_forward
            trained += own_trained
            if recovery.learns:
                measured = measurements(  # by default after each quarter
                    cfg.trainer, fresh_windows, cfg.distill.batch_size, 0.25, accumulate=cfg.distill.accumulate
                )
                forward += measured * self.development_tokens
        return forward, trained

    @property
    def keeps_forecasts(self) -> bool:
        """Whether the dense model's forecasts of the evaluated text are small enough to keep."""
        hidden_size = self.skeleton.config.get_text_config(decoder=True).hidden_size
        bytes_per_number = 4 if self.cfg.model.dtype == "float32" else 2
        return self.cfg.evaluated_tokens * hidden_size * bytes_per_number <= MAX_FORECAST_BYTES

    @cached_property
    def removed(self) -> int:
        """Number of removed parameters if all blocks are equally sparse; exact only for a target in parameters."""
        return self.budget.parameters_removed_by(uniform_masks(self.budget))

    def describe_removed(self) -> str:
        """Return how many parameters are removed, and their share of the scope and of the model."""
        of_scope, of_model = self.removed / self.budget.total_parameters, self.removed / self.skeleton.num_parameters()
        return f"{self.removed:,} parameters: {of_scope:.1%} of {self.cfg.sparsity.scope}, {of_model:.1%} of the model"

    @property
    def forward_tokens(self) -> int:
        """Number of tokens that pass forward only, over all steps."""
        return sum(forward for forward, _ in self.tokens.values())

    @property
    def forward_backward_tokens(self) -> int:
        """Number of tokens that pass forward and backward, over all steps."""
        return sum(trained for _, trained in self.tokens.values())


def make_plan(cfg: RunConfig, callbacks: UserCallbacks | None = None, *, together: bool = False) -> Plan:
    """Check settings, model and device, and return the plan, before weights are loaded.

    The model is constructed from its configuration on the meta device, without weights. With `together` all
    processes of the run make the plan, and agree on its precision; this may launch them.
    """
    cfg.validate()
    cfg.check_names()
    callbacks = callbacks or UserCallbacks(paths=cfg.trainer.callbacks)
    device = trainer_device(cfg, callbacks.of_stage(None))
    config = read_config(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    dense = skeleton(config, record=family_of(config), trust_remote_code=cfg.model.trust_remote_code)
    check_structure(dense)
    if "attention" in cfg.sparsity.scope and not any(widths(dense)["kv_groups"]):
        raise UserError(
            f"--sparsity.scope {cfg.sparsity.scope} needs KV groups that can be removed; model type "
            f"'{config.model_type}' has none. Use ffn."
        )
    if (why := why_not_measurable(dense)) is not None:
        raise UserError(
            f"Cannot measure the perplexity of model type '{config.model_type}': {why}. Prune it with "
            "gprune.apply_masks."
        )
    cfg, why_precision = resolve_precision(cfg, device, together=together)
    pricing = Pricing(cfg, dense, device)
    budget = pricing.budget()
    plan = Plan(pricing, budget, why_precision)
    check_export(cfg, dense)
    check_model(plan)
    _ = plan.tokens  # raises UserError for an impossible validation interval
    return plan


def trainer_device(cfg: RunConfig, callbacks: Sequence[Callback]) -> torch.device:
    """Return the Trainer's device. A dry run assumes that the requested GPUs and nodes exist."""
    given = arguments_of_user(cfg.trainer)
    for name in ("deterministic", "benchmark"):  # settings of PyTorch, which the Trainer of the check would leave set
        given.pop(name, None)
    precision = "32-true" if cfg.trainer.precision == "auto" else cfg.trainer.precision  # `auto` is resolved later
    settings = placement(cfg.trainer) | given | {"precision": precision, "callbacks": callbacks}
    try:
        return check_trainer(**settings)
    except UserError:
        if not (cfg.dry_run and settings["accelerator"] in ("gpu", "cuda")):
            raise
        one_cpu = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
        check_trainer(**settings | one_cpu)  # checks the other settings
        return torch.device("cuda")


def check_model(plan: Plan) -> None:
    """Raise UserError for a model that the scope, the allocation, the metric or the recovery does not support."""
    cfg = plan.cfg
    if "blocks" in cfg.sparsity.scope:
        check_attention_remains(plan)
        if plan.budget.removed:
            check_renumbering(plan)
    if cfg.learns:
        for sparsity in cfg.evaluation.curve:
            plan.budget.at(sparsity)  # raises for an impossible one
    for name in cfg.recovery.split("+"):
        RECOVERY[name].refuse(plan)
    if cfg.measures_errors:
        refuse_experts(plan.skeleton)
    if "saliency" in cfg.needs:
        for u in plan.budget.of_kind("neurons"):
            salient_parts(u, decoder_layers(plan.skeleton)[u.layer])  # raises for experts


def check_export(cfg: RunConfig, model: PreTrainedModel) -> None:
    """Raise UserError if flags of export or length do not fit the model's units or positions, or this machine."""
    if cfg.export.format in FORMATS:
        target = format_named(cfg.export.format)
        uniform = cfg.sparsity.uniform_width
        unequal_heads = "attention" in cfg.sparsity.scope and not uniform
        target.refuse(units_of(model), model.config, type=cfg.export.type, uniform=uniform, unequal_heads=unequal_heads)
    if cfg.model.device_map is not None and cfg.export.dtype not in (None, cfg.model.dtype):
        raise UserError(
            f"--export.dtype must be --model.dtype ({cfg.model.dtype}) with --model.device_map, because offloaded "
            f"weights are not converted; got '{cfg.export.dtype}'."
        )
    longest = max(cfg.corpora.seq_len, cfg.evaluation.seq_len)
    text_config = model.config.get_text_config(decoder=True)
    if record_of(model).learned_positions and longest > (positions := text_config.max_position_embeddings):
        raise UserError(
            f"--corpora.seq_len and --evaluation.seq_len must be at most {positions} tokens, the number of positions "
            f"that model type '{model.config.model_type}' has learned; got {longest}."
        )


def describe_unpruned(plan: Plan) -> str:
    """Describe layers whose FFN or attention is not pruned, and how large they are; empty if all layers are pruned."""
    budget, model = plan.budget, plan.skeleton
    names, layers = {"FFN": "neurons"}, len(budget.of_kind("layer"))
    if "attention" in plan.cfg.sparsity.scope:
        names["attention"] = "kv_groups"
    sentences = []
    for name, kind in names.items():
        missing = layers - len({u.layer for u in budget.of_kind(kind) if u.count})
        if missing:
            sentences.append(f"{name} of {missing} of {layers} layers, without units that can be removed")
    for path, module in find_unpruned(model).items():
        share = module.parameters / model.num_parameters()
        sentences.append(f"{path} in {module.layers} layers ({module.why}): {share:.1%} of the model")
    return "; ".join(sentences)
