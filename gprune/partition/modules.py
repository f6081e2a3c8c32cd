"""Modules: reliability and ranks of their neurons (step 6), and the results of steps 3 to 6 that a run saves.

If a module is sensitive to the text distribution *and* weakly activated, the importance order of its neurons depends
more on the calibration text than on the neurons. Such a module is ranked by a fallback: a metric that does not use
activations or, beyond the paper, the base metric over all drift corpora (`consensus`, `averaged`). Our reading of
GPrune-LLM (arXiv 2603.13418). A weighted mean of both orders was not better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from gprune.units.structure import of_kind, parts_of_key, unit_key


@dataclass(frozen=True)
class Drift:
    """Rank drift of one block's N neurons over D drift corpora."""

    scores: Tensor  # (D, N) importance per corpus
    ranks: Tensor  # (D, N) in (0, 1)
    drift: Tensor  # (N,) population standard deviation of ranks
    noise_floor: Tensor  # (N,) drift caused by sampling alone
    half_agreement: Tensor  # () Kendall tau between halves of a corpus, mean over corpora


@dataclass(frozen=True)
class ModuleReliability:
    """Reliability of the K modules of a block."""

    size: Tensor  # (K,) neurons
    score: Tensor  # (K,) mean within-block rank on corpora.score, (0, 1)
    sensitivity: Tensor  # (K,) mean rank drift
    noise_floor: Tensor  # (K,) mean noise floor
    switched: Tensor  # (K,) bool: sensitive, weakly activated, and sensitive beyond noise


@dataclass(frozen=True)
class ModuleRanks:
    """Ranks of units inside their modules, by key of units. Thresholds are applied to these ranks.

    Units that were not partitioned, such as the KV groups of a block, are one module.
    """

    p: Mapping[str, Tensor]  # (N,) float64 in (0, 1)
    labels: Mapping[str, Tensor]  # (N,) int64 in [0, K)

    @cached_property
    def modules(self) -> dict[str, int]:
        """K, the number of modules, by key."""
        return {key: count_modules(labels) for key, labels in self.labels.items()}

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        """logit p, (N,), by key."""
        return {key: torch.logit(p) for key, p in self.p.items()}

    @cached_property
    def sizes(self) -> dict[str, Tensor]:
        """(K,) int64: number of units of each module, by key."""
        return {key: torch.bincount(labels) for key, labels in self.labels.items()}

    def to(self, device: torch.device) -> ModuleRanks:
        """Copy to a device. Cached logits and sizes are copied too, so that they keep the same bits."""

        def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {key: tensor.to(device) for key, tensor in tensors.items()}

        result = ModuleRanks(copy(self.p), copy(self.labels))
        # Fill the cached properties, which cannot be assigned to a frozen dataclass.
        result.__dict__["logits"], result.__dict__["sizes"] = copy(self.logits), copy(self.sizes)
        return result

    def with_offsets(self, offsets: Mapping[str, Tensor]) -> ModuleRanks:
        """Shift the ranks of units by their offsets, (N,) in logits by key: p_i' = sigmoid(logit p_i + o_i)."""
        shifted = {key: torch.sigmoid(self.logits[key] + offset) for key, offset in offsets.items()}
        return replace(self, p={**self.p, **shifted})


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
        """(N,) int64 in [0, K): the module of each neuron, one tensor per block."""
        return of_kind(self.ranks.labels, "neurons")

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors by flat names, as in safetensors files."""
        flat = {"block_agreement": torch.tensor(self.block_agreement, dtype=torch.float64)}
        flat |= {f"rank.{key}": p for key, p in self.ranks.p.items()}
        for b, labels in enumerate(self.labels):
            flat |= {f"{b}.labels": labels, f"{b}.agreement": self.agreement[b]}
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
            ranks=ranks_in_modules(_ranks_in(flat), by_block("labels")),
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
                    "noise_floor": float(reliability.noise_floor[k]),
                    "agreement": None if agreement[k].isnan() else float(agreement[k]),
                    "switched": bool(reliability.switched[k]),
                })  # fmt: skip
        return rows


def ranks_in_modules(p: Mapping[str, Tensor], labels: Sequence[Tensor]) -> ModuleRanks:
    """Return ranks, by key, with the modules of the neurons of each block; other units are one module.

    Neurons come first, in any case: sums over units, and checkpoints, have the order of the keys, and files another.
    """
    p = dict(sorted(p.items(), key=lambda item: (not item[0].startswith("neurons."), *parts_of_key(item[0]))))
    of_neurons = {unit_key("neurons", b): of_block for b, of_block in enumerate(labels)}
    return ModuleRanks(
        p, {key: of_neurons.get(key, torch.zeros(len(ranks), dtype=torch.long)) for key, ranks in p.items()}
    )


def _ranks_in(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ranks in the result of `Modules.tensors`, by key; also from a file of an earlier version."""
    former = {"rank": "neurons", "group_rank": "kv_groups"}  # such as `3.rank`
    ranks = {name.removeprefix("rank."): p for name, p in flat.items() if name.startswith("rank.")}
    for suffix, kind in former.items():
        ranks |= {
            unit_key(kind, int(b)): p for name, p in flat.items() if (b := name.removesuffix(f".{suffix}")).isdigit()
        }
    return ranks


def count_modules(labels: Tensor) -> int:
    """Return the number of modules K of labels (N,) in [0, K); 0 for a block without neurons."""
    return int(labels.max()) + 1 if len(labels) else 0


def module_means(values: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of values (N,) in each module, (K,) float64; labels (N,) in [0, K)."""
    K = count_modules(labels)
    total = torch.zeros(K, dtype=torch.float64).index_add_(0, labels, values.double())
    return total / torch.bincount(labels, minlength=K)


def assess_reliability(
    labels: list[Tensor],
    ranks: list[Tensor],
    drifts: list[Tensor],
    floors: list[Tensor],
    *,
    sensitivity_quantile: float = 0.75,
    score_quantile: float = 0.5,
    switch: Literal["off", "unreliable", "everywhere"] = "unreliable",
) -> list[ModuleReliability]:
    """Find the modules with unreliable activations, from labels, ranks, drifts and noise floors, (N,) per block.

    With `switch` "unreliable", a module switches to the fallback if all of these hold: its sensitivity (mean drift),
    standardised over the neurons of its block, is at least the `sensitivity_quantile` of all modules of the model; its
    score (mean rank) is at most the `score_quantile`; its mean drift is above its mean noise floor. With "everywhere"
    all modules switch, and with "off" none.
    """
    scores = [module_means(*pair) for pair in zip(ranks, labels, strict=True)]
    sensitivities = [module_means(*pair) for pair in zip(drifts, labels, strict=True)]
    noises = [module_means(*pair) for pair in zip(floors, labels, strict=True)]
    standardised = []  # sensitivities, in standard deviations over the neurons of their block
    for sensitivity, drift in zip(sensitivities, drifts, strict=True):
        if len(drift):
            sensitivity = (sensitivity - drift.mean()) / drift.std().clamp_min(1e-12)
        standardised.append(sensitivity)  # empty for a block without an FFN
    sensitivity_limit = torch.cat(standardised).quantile(sensitivity_quantile)
    score_limit = torch.cat(scores).quantile(score_quantile)
    reliability = []
    blocks = zip(labels, scores, sensitivities, standardised, noises, strict=True)
    for block_labels, score, sensitivity, standardised_sensitivity, noise in blocks:
        if switch == "unreliable":
            is_sensitive = standardised_sensitivity >= sensitivity_limit
            switched = is_sensitive & (score <= score_limit) & (sensitivity > noise)
        else:
            switched = torch.full_like(score, switch == "everywhere", dtype=torch.bool)
        reliability.append(ModuleReliability(torch.bincount(block_labels), score, sensitivity, noise, switched))
    return reliability


def switched_share(reliability: list[ModuleReliability]) -> float:
    """Return the share of all neurons that are ranked by the fallback `--reliability.metric`."""
    switched = sum(int(block.size[block.switched].sum()) for block in reliability)
    neurons = sum(int(block.size.sum()) for block in reliability)
    return switched / neurons


def within_module_ranks(scores: Tensor, fallback: Tensor, labels: Tensor, switched: Tensor) -> Tensor:
    """Return p_i = (rank of neuron i in its module + 0.5) / n_m in (0, 1), (N,) float64; larger = keep.

    Neurons of module k are ranked by `fallback` (N,) if `switched[k]`, (K,) bool, and otherwise by `scores` (N,).
    `labels` (N,) in [0, K) are the modules of neurons, and n_m is the number of neurons of a module.

    Ties are broken by index, so the ranks of a module are always 0..n_m - 1, as a budget requires a total order.
    """
    p = torch.empty(len(scores), dtype=torch.float64)  # filled module by module
    for k, uses_fallback in enumerate(switched.tolist()):
        members = (labels == k).nonzero()[:, 0]
        importance = fallback if uses_fallback else scores
        order = importance[members].argsort(stable=True)
        p[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return p
