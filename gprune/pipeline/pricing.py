"""The budget of a target: what units of this model cost in parameters, bytes, seconds or another unit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from gprune.config import DEFAULT_MULTIPLE, RunConfig
from gprune.errors import UserError, quoting
from gprune.export.gguf import TYPES
from gprune.export.hf import kept_in_float32
from gprune.models.blocks import Block, blocks_of
from gprune.runs.trainer import matmul_precision
from gprune.sparsity.budget import Budget, block_units, default_width_multiple
from gprune.sparsity.cost import COST, Costs, Currency, ModelCosts, costs_of_blocks, parameter_costs
from gprune.sparsity.target import HALF_BITS


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
    measured: dict[str, Any] = field(default_factory=dict)  # what currencies have measured on this machine

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

    def budget(self) -> Budget:
        """Return the budget of `--sparsity.target`."""
        s, export, blocks = self.cfg.sparsity, self.cfg.export, blocks_of(self.skeleton)
        costs, outside = self.costs_in(s.currency)
        units = block_units(blocks, scope=s.scope, protect=s.protect, costs=costs)
        multiple = default_width_multiple(units) if s.width_multiple == DEFAULT_MULTIPLE else s.width_multiple
        if multiple is None:
            with matmul_precision(self.cfg.trainer.float32_matmul_precision):
                multiple = COST["seconds"].best_multiple(self)
        if (export.format, export.type) == ("gguf", "q8_0") and multiple % 32:
            raise UserError(
                f"--export.type q8_0 needs --sparsity.width_multiple 32 or a multiple of 32; got {multiple}."
            )
        block_share = s.block_share if "blocks" in s.scope else 0.0
        try:
            return Budget.of(
                units, s.target, multiple, uniform=s.uniform_width, block_share=block_share, outside=outside
            )
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

    def costs_in(self, currency: str) -> ModelCosts:
        """Return the costs of the model in a registered currency."""
        cost = COST[currency]
        if not isinstance(cost, Currency):
            return self.costs_by(currency, cost)
        with matmul_precision(self.cfg.trainer.float32_matmul_precision):  # a currency may measure
            return cost.costs(self)

    def costs_by(self, currency: str, cost: Callable[..., Costs]) -> ModelCosts:
        """Return the costs of the model by a function of the model and its blocks."""
        blocks = blocks_of(self.skeleton)
        needed = "It must return whole numbers for a neuron, a KV group and the whole of each block"
        with quoting(f"Cannot compute cost '{currency}': ", f". {needed}."):
            return costs_of_blocks(cost(self.skeleton, blocks), blocks)

    def exported_bytes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Costs:
        """Return the cost of units in half bits of the export.

        GGUF files store vectors as float32. Some parameters of Hugging Face folders are float32 in any case.
        """
        export = self.cfg.export
        if export.format == "gguf":
            of_matrix, of_vector = int(2 * TYPES[export.type]), 4 * HALF_BITS
            return parameter_costs(model, blocks, weight=lambda p: of_matrix if p.ndim > 1 else of_vector)
        dtype = getattr(torch, self.exported_dtype)
        in_float32 = {id(model.get_parameter(name)) for name in kept_in_float32(model, dtype)}
        return parameter_costs(
            model, blocks, weight=lambda p: HALF_BITS * (4 if id(p) in in_float32 else dtype.itemsize)
        )
