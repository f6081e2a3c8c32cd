"""Results of partitioning that a run saves: rank drift, modules, their reliability and agreement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gprune.partition.reliability import ModuleReliability, count_modules


@dataclass(frozen=True)
class Drift:
    """Rank drift of one block's N neurons over D drift corpora."""

    scores: Tensor  # (D, N) importance per corpus
    ranks: Tensor  # (D, N) in (0, 1)
    drift: Tensor  # (N,) population standard deviation of ranks
    floor: Tensor  # (N,) noise floor: drift caused by sampling alone
    halves: Tensor  # () Kendall tau between halves of a corpus, mean over corpora


@dataclass(frozen=True)
class ModuleRanks:
    """Ranks of units inside their modules, one entry per block. Thresholds are applied to these ranks.

    The KV groups of a block form a separate module.
    """

    ffn: list[Tensor]  # p, (N,) float64 in (0, 1)
    labels: list[Tensor]  # (N,) int64 in [0, K)
    attention: list[Tensor]  # p of KV groups, (G,) float64

    @property
    def modules(self) -> list[int]:
        """K, the number of modules of each block."""
        return [count_modules(block_labels) for block_labels in self.labels]

    @cached_property
    def logits(self) -> tuple[list[Tensor], list[Tensor]]:
        """logit p per block, of neurons (N,) and of KV groups (G,)."""
        return [torch.logit(p) for p in self.ffn], [torch.logit(p) for p in self.attention]

    @cached_property
    def sizes(self) -> list[Tensor]:
        """(K,) int64: number of neurons of each module."""
        return [torch.bincount(block_labels) for block_labels in self.labels]

    def to(self, device: torch.device) -> ModuleRanks:
        """Copy to a device. Cached logits and sizes are copied too, so that they keep the same bits."""

        def copy(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.to(device) for tensor in tensors]

        result = ModuleRanks(copy(self.ffn), copy(self.labels), copy(self.attention))
        neuron_logits, group_logits = self.logits
        # Fill the cached properties, which cannot be assigned to a frozen dataclass.
        result.__dict__["logits"] = copy(neuron_logits), copy(group_logits)
        result.__dict__["sizes"] = copy(self.sizes)
        return result

    def with_offsets(self, offsets: list[Tensor]) -> ModuleRanks:
        """Shift every neuron's rank by its offset, (N,) in logits: p_i' = sigmoid(logit p_i + o_i)."""
        neuron_logits, _ = self.logits
        ffn = [torch.sigmoid(logits + offset) for logits, offset in zip(neuron_logits, offsets, strict=True)]
        return replace(self, ffn=ffn)


@dataclass(frozen=True)
class Modules:
    """Modules and their measurements, one entry per block."""

    ranks: ModuleRanks
    drift: list[Drift]
    reliability: list[ModuleReliability]
    agreement: list[Tensor]  # (K,) Kendall tau inside modules, NaN where undefined
    block_agreement: list[float]  # Kendall tau over the whole block

    @property
    def labels(self) -> list[Tensor]:
        """(N,) int64 in [0, K): the module of each neuron."""
        return self.ranks.labels

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors by flat names, as in safetensors files."""
        flat = {"block_agreement": torch.tensor(self.block_agreement, dtype=torch.float64)}
        for b, labels in enumerate(self.labels):
            flat |= {f"{b}.labels": labels, f"{b}.agreement": self.agreement[b]}
            flat |= {f"{b}.rank": self.ranks.ffn[b], f"{b}.group_rank": self.ranks.attention[b]}
            flat |= {f"{b}.drift.{name}": value for name, value in vars(self.drift[b]).items()}
            flat |= {f"{b}.reliability.{name}": value for name, value in vars(self.reliability[b]).items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> Modules:
        """Return modules from the result of `tensors`."""
        blocks = range(len(flat["block_agreement"]))

        def by_block(name: str) -> list[Tensor]:
            return [flat[f"{b}.{name}"] for b in blocks]

        def records_by_block(record: type, name: str) -> list[Any]:
            """Return a dataclass of each block, whose fields are tensors."""
            fields = record.__dataclass_fields__
            return [record(**{field: flat[f"{b}.{name}.{field}"] for field in fields}) for b in blocks]

        return cls(
            ranks=ModuleRanks(by_block("rank"), by_block("labels"), by_block("group_rank")),
            drift=records_by_block(Drift, "drift"),
            reliability=records_by_block(ModuleReliability, "reliability"),
            agreement=by_block("agreement"),
            block_agreement=flat["block_agreement"].tolist(),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per module, for tables and figures; undefined agreement is None."""
        rows = []
        for block, (reliability, agreement) in enumerate(zip(self.reliability, self.agreement, strict=True)):
            for k in range(len(reliability.size)):
                rows.append({
                    "block": block,
                    "module": k,
                    "neurons": int(reliability.size[k]),
                    "score": float(reliability.score[k]),
                    "sensitivity": float(reliability.sensitivity[k]),
                    "noise_floor": float(reliability.noise[k]),
                    "agreement": None if agreement[k].isnan() else float(agreement[k]),
                    "switched": bool(reliability.switched[k]),
                })  # fmt: skip
        return rows
