"""Flags that a run does not read, and why: one table from a setting to the flags that it switches off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gprune.config.run_config import RunConfig

LEARNING = (
    "corpora.learn", "corpora.learn_samples", "evaluation.curve", "sparsity.learn", "sparsity.loss", "sparsity.epochs",
    "sparsity.centred", "sparsity.learning_rate", "sparsity.learner", "sparsity.offset_learning_rate",
    "sparsity.offset_limit",
)  # fmt: skip
SWITCHING = tuple(f"reliability.{name}" for name in ("everywhere", "metric", "sensitivity_quantile", "score_quantile"))


def switched_off(c: RunConfig) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """The table: a reason, whether it holds, and the flags that are then not read. A group's name means all its flags.

    Of recoveries that are registered from Python nothing is said: nobody knows what they read.
    """
    chain, s = set(c.recovery.split("+")), c.sparsity
    solved = chain <= {"none", "bias", "least_squares", "least_squares_sequential"}
    yield "--gprune false", not c.gprune, ("partition", "reliability", *LEARNING)
    yield "--gprune false", not c.roles["drift"], ("corpora.drift",)
    yield f"--sparsity.scope {s.scope}", "blocks" not in s.scope, ("sparsity.block_share", "sparsity.block_choice")
    yield f"--sparsity.allocation {s.allocation}", not c.learns, LEARNING
    yield "--reliability.switch false", not c.reliability.switch, SWITCHING
    yield f"--recovery {c.recovery}", not c.roles["recover"], ("corpora.recover",)
    yield f"--recovery {c.recovery}", chain <= {"none", "bias", "distill"}, ("ridge",)
    yield f"--recovery {c.recovery}", solved, ("distill",)
    yield f"--distill.targets {c.distill.targets}", c.distill.targets != "lora", ("distill.rank",)
    yield "--export none", c.export.format == "none", ("export.dtype",)
    yield "--dry_run false", not c.dry_run, ("plan",)
    yield f"--sparsity.target {c.sparsity.target}", not (c.timed_for or c.dry_run), ("speed",)


def unread(cfg: RunConfig, names: Iterable[str]) -> str:
    """Those of `names` that a run with these settings does not read, and why, in one line; empty if none is known."""
    left, reasons = set(names), {}
    for reason, holds, flags in switched_off(cfg):
        if holds and (off := sorted(n for n in left if n in flags or n.partition(".")[0] in flags)):
            reasons.setdefault(reason, []).extend(f"--{name}" for name in off)
            left.difference_update(off)
    return "; ".join(f"{', '.join(flags)} ({reason})" for reason, flags in reasons.items())
