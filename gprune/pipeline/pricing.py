"""The budget of a target: what units of this model cost in parameters, bytes, seconds or another unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gprune.benchmarks.speed import SPEED_TABLE, Table, best_multiple, price_from_table, speed_table
from gprune.config import RunConfig
from gprune.errors import UserError, quoting
from gprune.export.convert import TYPES
from gprune.models.blocks import blocks_of
from gprune.runs.trainer import multiplying
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.cost import COST, Price, parameter_costs
from gprune.sparsity.target import HALF_BITS


@dataclass(frozen=True)
class Pricing:
    """Costs of the units of a model, by which `--sparsity.target` becomes a budget."""

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
        m, published = self.cfg.model, self.skeleton.config.dtype  # None if the config has no dtype
        own = m.dtype == "float32" and m.device_map is None and published in (torch.bfloat16, torch.float16)
        return self.cfg.export.dtype or (str(published).removeprefix("torch.") if own else m.dtype)

    def budget(self) -> Budget:
        """Return the requested budget. Raise UserError if it is impossible."""
        s, blocks = self.cfg.sparsity, blocks_of(self.skeleton)
        price = price_from_table(self.speed, blocks) if s.currency == "seconds" else self.priced(s.currency)
        how = {"protect": s.protect, "uniform": s.uniform_width, "block_share": s.block_share, "price": price}
        costs = unit_costs(blocks, scope=s.scope, **how)
        multiple, export = s.width_multiple or best_multiple(self.speed), self.cfg.export
        if (export.format, export.type) == ("gguf", "q8_0") and multiple % 32:
            raise UserError(
                f"--export.type q8_0 needs --sparsity.width_multiple 32 or a multiple of 32; got {multiple}."
            )
        try:
            return Budget.of(costs, s.target, multiple)
        except UserError as error:
            if s.currency == "bytes" and (narrower := self.narrower_export):
                raise UserError(f"{error} {narrower}.") from error
            raise

    @property
    def narrower_export(self) -> str:
        """A hint about a flag with which weights need fewer bytes; empty if there is none."""
        export = self.cfg.export
        if export.format == "gguf":
            of_type = {"f32": "f16", "f16": "q8_0 --sparsity.width_multiple 32"}.get(export.type)
            return f"With --export.type {of_type} the weights take about half the bytes" if of_type else ""
        return (
            "With --export.dtype bfloat16 the weights take half the bytes" if self.exported_dtype == "float32" else ""
        )

    def priced(self, currency: str) -> Price:
        """Return costs in a registered currency; for `bytes`, in 1/16 byte of the export."""
        blocks, export = blocks_of(self.skeleton), self.cfg.export
        size = getattr(torch, self.exported_dtype).itemsize * HALF_BITS
        matrix, vector = (int(2 * TYPES[export.type]), 64) if export.format == "gguf" else (size, size)
        of_bytes = partial(parameter_costs, weight=lambda p: matrix if p.ndim > 1 else vector)
        needed = "It must return whole numbers for a neuron, a KV group and the whole of each block"
        with quoting(f"Cannot compute cost '{currency}': ", f". {needed}."):
            costs = (of_bytes if currency == "bytes" else COST[currency])(self.skeleton, blocks)
            return Price.by_unit(costs, [b.neurons for b in blocks], [b.kv_groups for b in blocks])

    @cached_property
    def speed(self) -> Table | None:
        """Latency table of this machine at the `--speed` settings: measured if needed, else from the cache, or None."""
        cfg, most = self.cfg, getattr(self.skeleton.config, "max_position_embeddings", math.inf)
        length, measure = cfg.speed.prompt + cfg.speed.generate, bool(cfg.latency_table_flag)
        if measure and length > most:
            raise UserError(
                f"--speed.prompt and --speed.generate must add up to at most {most:,} positions; got {length:,}."
            )
        if measure and not self.device_available:
            raise UserError(f"{cfg.latency_table_flag} needs a GPU in this machine to measure on.")
        with multiplying(cfg.trainer.float32_matmul_precision):
            dtype, setting = getattr(torch, cfg.model.dtype), cfg.speed.workload()
            how = {"measure": measure, "again": cfg.speed.measure, "own": Path(cfg.folder) / SPEED_TABLE}
            return speed_table(self.skeleton, self.device, dtype, setting, **how)
