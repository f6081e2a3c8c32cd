"""The groups of flags that say how a run is measured, logged, executed and kept, beside `groups.py`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from gprune.checks import (
    AtLeast0,
    AtLeast1,
    AtLeast8,
    Few,
    NonNegative,
    Seed,
    Sparsity,
    shown,
)
from gprune.config.groups import Group
from gprune.errors import UserError

Control = Literal["base", "averaged", "unrecovered"]


@dataclass
class EvaluationConfig(Group):
    """What is measured at the end."""

    prefix: ClassVar[str] = "evaluation."
    split: Literal["test", "development", "train"] = "test"
    """Which text is measured on. Settings are chosen on development text, so that test text stays unseen; or on the
    longer train text of corpora that neither the run nor any report uses."""
    num_samples: AtLeast1 = 6
    """Windows per evaluated corpus: a sample of its split that is the same for every seed."""
    seq_len: AtLeast8 = 256
    """Tokens per window. Windows do not overlap (stride = seq_len)."""
    development_samples: AtLeast1 = 2
    """Development windows per corpus of learning and recovery, for curves against epoch, tokens and sparsity."""
    curve: list[Sparsity] = field(default_factory=lambda: [0.2, 0.35])
    """Sparsities, besides 0 and the target, at which gprune's masks are measured on development text."""
    samples: AtLeast0 = 3
    """Evaluated texts whose beginning the dense and the pruned model go on writing, for the page of the run."""
    controls: list[Control] = field(default_factory=lambda: ["base", "averaged", "unrecovered"])
    """Rows beside the run's own. base: the metric alone, spread as --sparsity.start says, or as an allocation that does
    not learn. averaged: the same, scored on all drift corpora. unrecovered: all rows without recovery as well, where
    there is one."""


@dataclass
class LoggingConfig(Group):
    """Where curves go."""

    prefix: ClassVar[str] = "logging."
    tracker: Literal["wandb", "tensorboard", "csv"] = "wandb"
    """wandb: Weights & Biases. tensorboard: event files in the run folder (needs the package tensorboard). csv: the
    CSV file alone, which is always there."""
    mode: Literal["offline", "online", "disabled"] | None = None
    """Of W&B. Default: $WANDB_MODE, else offline: files in the run folder, no account needed, and `wandb leet run`
    shows every curve in the terminal."""
    project: str = "gprune"
    """W&B project."""
    group: str | None = None
    """W&B group; by default the model's name, so that ablations of one model stand together."""
    tags: list[str] = field(default_factory=list)
    """Further W&B tags; metric, scope and allocation are always there."""

    def check(self) -> None:
        """Raise UserError for a mode of W&B that there is not."""
        if self.resolved_mode not in ("offline", "online", "disabled"):
            raise UserError(
                f"WANDB_MODE: expected offline, online or disabled, got '{self.resolved_mode}'; or use --logging.mode."
            )
        if self.tracker == "tensorboard" and find_spec("tensorboard") is None:
            raise UserError(
                "--logging.tracker: expected the package tensorboard for tensorboard, and it is not installed; run "
                "`pip install tensorboard`, or take csv."
            )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise UserError(
                    f"--logging.tags: expected tags of 1 to 64 characters, as W&B has them, got {shown(tag)}."
                )
        for flag, value, most in (("project", self.project, 128), ("group", self.group or "-", 128)):
            if not 1 <= len(value) <= most or set(value) & set("/\\#?%:"):
                raise UserError(
                    f"--logging.{flag}: expected 1 to {most} characters without / \\ # ? % :, got {shown(value)}."
                )

    @property
    def resolved_mode(self) -> str:
        """W&B's mode: the flag, else $WANDB_MODE, else offline."""
        return self.mode or os.environ.get("WANDB_MODE") or "offline"

    @property
    def resolved_tracker(self) -> str:
        """csv, too, where W&B is disabled."""
        return "csv" if self.tracker == "wandb" and self.resolved_mode == "disabled" else self.tracker


@dataclass
class TrainerConfig(Group):
    """Lightning's own flags."""

    prefix: ClassVar[str] = "trainer."
    accelerator: str = "auto"
    """cpu, gpu, or auto."""
    devices: Few = 1
    """Processes per node; statistics and thresholds agree with one process."""
    num_nodes: Few = 1
    """Nodes."""
    strategy: Literal["auto", "ddp"] = "auto"
    """auto or ddp."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch's setting of this name, for everything that a run multiplies in float32. high: TF32 on GPUs that have it,
    several times faster, with 10 bits of mantissa; medium: bfloat16 inside. It has no effect on bfloat16 weights."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """In what thresholds and recoveries are learned. bf16-mixed: matrix products in bfloat16 (autocast), what learns in
    float32; several times faster where the processor multiplies bfloat16 (a GPU, or a CPU with AMX). Statistics and
    evaluation keep --model.dtype."""

    @property
    def lightning(self) -> dict[str, Any]:
        """What Lightning's Trainer is told."""
        return {n: getattr(self, n) for n in ("accelerator", "devices", "num_nodes", "strategy", "precision")}


@dataclass
class RunFolderConfig(Group):
    """Where results go."""

    prefix: ClassVar[str] = "run."
    dir: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Folder of this run inside it. Default: model, metric, sparsity and a hash of all settings."""
    seed: Seed = 0
    """Seed of everything drawn: windows, partition, order of learning."""
    checkpoint_minutes: NonNegative = 5.0
    """Minutes between two checkpoints of what learns; a killed run goes on from the last one, to the same bits. 0: one
    after every step."""

    def check(self) -> None:
        if self.name and (self.name in (".", "..") or self.name != os.path.basename(self.name)):
            raise UserError(f"--run.name: expected the name of a folder inside --run.dir, got {self.name!r}.")
        if self.name and len(os.fsencode(self.name)) > 200:
            raise UserError(f"--run.name: expected at most 200 bytes, got {shown(self.name)}.")
