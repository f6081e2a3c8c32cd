"""Which flags a run does not read, and why: one table from a setting to the flags that it switches off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gprune.config.run_config import RunConfig
from gprune.config.running import LoggingConfig
from gprune.sparsity.allocation import ALLOCATION

OFFSETS = ("sparsity.offset_learning_rate", "sparsity.offset_limit")
LEARNING = (
    "corpora.learn", "corpora.learn_samples", "evaluation.curve", "sparsity.learn", "sparsity.loss", "sparsity.epochs",
    "sparsity.centred", "sparsity.learning_rate", "sparsity.learner", *OFFSETS,
)  # fmt: skip
WEIGHTS = ("partition.consistency_weight", "partition.balance_weight", "partition.entropy_weight")
REFINING = ("partition.refiner", "partition.steps", "partition.learning_rate", *WEIGHTS)
QUANTILES = ("reliability.sensitivity_quantile", "reliability.score_quantile")
SWITCHING = ("reliability.everywhere", "reliability.metric", *QUANTILES)
TRAINING = (
    "evaluation.development_samples", "trainer.precision", "trainer.limit_train_batches", "trainer.max_steps",
    "run.checkpoint_minutes",
)  # fmt: skip
WANDB = tuple(f"logging.{name}" for name in LoggingConfig.model_fields.keys() - {"tracker", "mode"})


def switched_off(c: RunConfig) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """The table: a reason, whether it holds, and the flags that are then not read. A group's name means all its flags.

    Of recoveries that are registered from Python nothing is said: nobody knows what they read.
    """
    chain, allocation, w = set(c.recovery.split("+")), c.sparsity.allocation, c.logging
    solved = chain <= {"none", "bias", "least_squares", "least_squares_sequential"}
    yield "--gprune false", not c.gprune, ("partition", "reliability", "corpora.drift", *LEARNING)
    yield f"--sparsity.allocation {allocation}", not c.learns, LEARNING
    yield f"--sparsity.allocation {allocation}", not ALLOCATION[allocation].modules, ("sparsity.start",)
    yield "--sparsity.learn offsets", c.sparsity.learn == "offsets", ("sparsity.learning_rate",)
    yield "--sparsity.learn thresholds", c.sparsity.learn == "thresholds", OFFSETS
    yield "--partition.method initial", c.partition.method == "initial", REFINING
    yield "--reliability.switch false", not c.reliability.switch, SWITCHING
    yield "one corpus in --corpora.drift", len(c.corpora.drift) < 2, ("reliability.switch", *SWITCHING)
    yield "--reliability.everywhere true", c.reliability.everywhere, QUANTILES
    yield f"--recovery {c.recovery}", not c.roles["recover"], ("corpora.recover",)
    yield f"--recovery {c.recovery}", chain <= {"none", "bias", "distill"}, ("ridge",)
    yield f"--recovery {c.recovery}", solved, ("distill",)
    yield f"--distill.targets {c.distill.targets}", c.distill.targets != "lora", ("distill.rank",)
    yield "no thresholds or weights are learned", solved and not c.learns, TRAINING
    yield f"--gprune false, --recovery {c.recovery}", solved and not c.gprune, ("trainer.gradient_clip_val",)
    yield "--gprune false, --recovery none", c.stages == [("base", "none")], ("evaluation.controls",)
    yield "--export none", c.export.format == "none", ("export.dtype",)
    yield "--dry_run false", not c.dry_run, ("plan",)
    yield f"--logging.tracker {w.tracker}", w.tracker != "wandb", ("logging.mode", *WANDB)
    yield f"--logging.mode {w.resolved_mode}", w.resolved_mode == "disabled", WANDB


def unread(cfg: RunConfig, names: Iterable[str]) -> str:
    """Those of `names` that a run with these settings does not read, and why, in one line; empty if it reads all."""
    left, reasons = set(names), {}
    for reason, holds, flags in switched_off(cfg):
        if holds and (off := sorted(n for n in left if n in flags or n.partition(".")[0] in flags)):
            reasons.setdefault(reason, []).extend(f"--{name}" for name in off)
            left.difference_update(off)
    return "; ".join(f"{', '.join(flags)} ({reason})" for reason, flags in reasons.items())
