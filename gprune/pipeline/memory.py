"""What each step of a run holds at its peak: bytes on the device and on the CPU, weights included."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from gprune.calibration.layerwise import exceed_memory
from gprune.calibration.statistics import gram_bytes
from gprune.checks import memory_limits
from gprune.config import RunConfig
from gprune.models.blocks import blocks_of
from gprune.models.memory import Shapes
from gprune.models.surgery import count_parameters
from gprune.pipeline.cost import two_counts
from gprune.recoveries import recovery_of
from gprune.sparsity.budget import Budget


@dataclass(frozen=True)
class Held:
    """Bytes on the device, or on all devices that a model is spread over, and on the CPU beside it."""

    device: int
    host: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.device + other.device, self.host + other.host)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.device + self.host


def memory_of(cfg: RunConfig, dense: PreTrainedModel, budget: Budget) -> dict[str, Held]:
    """The peak of each step, by name.

    Args:
        dense: its shapes; no weights are needed.
    """
    processes, blocks = cfg.trainer.devices * cfg.trainer.num_nodes, blocks_of(dense)
    shapes = Shapes(
        blocks, dense.config.hidden_size, dense.config.vocab_size,
        count_parameters(dense, "all") - sum(block.cost for block in blocks),
        4 if cfg.model.dtype == "float32" else 2, -(-cfg.corpora.batch_size // processes), cfg.corpora.seq_len,
    )  # fmt: skip
    weights, whole = _weights(cfg, dense, shapes), count_parameters(dense, "all")
    removed = budget.target / whole
    pruned = Held(round(weights.device * (1 - removed)), round(weights.host * (1 - removed)))
    if _offloaded(cfg, dense, shapes.width):  # placed anew, within the same limits
        left, (devices, host) = round(whole * shapes.width * (1 - removed)), _limits(cfg)
        pruned = Held(min(devices, left), min(host, left - min(devices, left)))
    share = 1 - budget.target / budget.costs.total
    small = shapes.at(shapes.width, (share, share if budget.costs.attention else 1.0))
    found = {"calibration": weights + _calibration(cfg, shapes, walks=_offloaded(cfg, dense, shapes.width))}
    if cfg.learns:
        found["learning"] = weights + Held(shapes.learning(kl=cfg.sparsity.loss == "kl"))
    recovery = _recovery(cfg, small, len(cfg.corpora.recover) * _states(cfg, shapes))
    evaluated = replace(shapes, windows=cfg.corpora.batch_size, length=cfg.evaluation.seq_len).scoring()
    # What the run ends with stays while other rows are pruned, and while it is checked without its recovery.
    rows = [of for of in cfg.stages if of != (cfg.final, cfg.recovery)]
    beside = {
        "recovery": pruned if any(of == cfg.recovery != "none" for _, of in rows) else Held(0),
        "evaluation": pruned if rows or cfg.recovery != "none" else Held(0),
    }
    if not cfg.model.shard:
        return found | {
            "recovery": weights + pruned + beside["recovery"] + recovery,
            "evaluation": weights + pruned + beside["evaluation"] + Held(evaluated),
        }
    both = round(whole * shapes.width * (2 - removed))  # on the CPU, where everything else is done
    taught = weights + pruned + Held(recovery.device // processes) if recovery_of(cfg.recovery).learns else Held(0)
    return found | {"recovery": taught + Held(0, recovery.host), "evaluation": Held(weights.device + evaluated, both)}


def _limits(cfg: RunConfig) -> tuple[int, int]:
    """Of `--model.max_memory`: of all devices together, and of the CPU; 0 where it says nothing."""
    limits = memory_limits(cfg.model.max_memory or {})
    host = limits.pop("cpu", 0)
    return sum(limits.values()), host


def _offloaded(cfg: RunConfig, dense: PreTrainedModel, width: int) -> bool:
    """Whether weights do not fit the devices, or where none is named the CPU."""
    devices, host = _limits(cfg)
    return 0 < (devices or host) < count_parameters(dense, "all") * width and not cfg.model.shard


def _weights(cfg: RunConfig, dense: PreTrainedModel, shapes: Shapes) -> Held:
    """Of the dense model; where it is offloaded, what `--model.max_memory` allows, and the block at work."""
    whole, largest = (n * shapes.width for n in (count_parameters(dense, "all"), max(b.cost for b in shapes.blocks)))
    if _offloaded(cfg, dense, shapes.width):
        devices, host = _limits(cfg)
        return Held(devices + largest, min(host, whole - devices))
    if not cfg.model.shard:
        return Held(whole)
    inside = sum(b.cost for b in shapes.blocks) * shapes.width
    # Embeddings and head on every process, its part of every block, and one or two blocks gathered.
    part = inside // (cfg.trainer.devices * cfg.trainer.num_nodes)
    return Held(whole - inside + part + 2 * largest, whole)


def _states(cfg: RunConfig, shapes: Shapes) -> int:
    """Hidden states of one corpus."""
    return cfg.corpora.num_samples * cfg.corpora.seq_len * shapes.hidden * shapes.width


def _calibration(cfg: RunConfig, shapes: Shapes, *, walks: bool) -> Held:
    """One corpus on the device; the statistics of those before it on the CPU."""
    blocks, corpora, act = shapes.blocks, len(cfg.calibration), shapes.collecting()
    if "saliency" in cfg.collects:  # gradients and their squares, for two halves of the corpus, in float32
        scopes = ("ffn", "attention") if cfg.attention else ("ffn",)
        parts = [p for b in blocks for kind in scopes for p in b.parts_of(kind)]
        numbers = [p.out_features * p.in_features for p in parts]
        act = 16 * sum(numbers) + max(shapes.learning() + 8 * max(numbers), 16 * max(numbers), act)
    if "gram" not in cfg.collects:
        return Held(act, _states(cfg, shapes) * walks)
    all_blocks, largest = gram_bytes(blocks), max(gram_bytes([b]) for b in blocks)
    if walks or ("saliency" not in cfg.collects and exceed_memory(blocks, corpora=corpora)):
        return Held(largest + max(act, largest), 2 * largest + _states(cfg, shapes))
    return Held(all_blocks + max(act, largest), corpora * all_blocks)


def _recovery(cfg: RunConfig, small: Shapes, states: int) -> Held:
    """Of recovery itself, with the Gram matrices that wait for it on the CPU."""
    method = recovery_of(cfg.recovery)
    found = method.memory(small, states, attention=cfg.attention, settings=cfg.recovery_settings)
    device, host = two_counts(f"Recovery '{cfg.recovery}', memory", found)
    if "gram" in method.needs and not exceed_memory(small.blocks, corpora=len(cfg.calibration)):
        host += (len(cfg.calibration) + 1) * gram_bytes(small.blocks)
    return Held(device, host)
