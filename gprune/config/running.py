"""The groups of flags that say how a run is measured, logged, executed and kept, beside `groups.py`."""

from __future__ import annotations

import os
from dataclasses import field
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from gprune.checks import AtLeast0, AtLeast1, AtLeast8, Few, NonNegative, Seed, Sparsity, Text, shown
from gprune.config.groups import Group, group
from gprune.errors import UserError

Control = Literal["base", "averaged", "unrecovered"]
WandbName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\p{Cc}\p{Zl}\p{Zp}]*$")]


@group("evaluation.")
class EvaluationConfig(Group):
    """What is measured at the end."""

    split: Literal["test", "development", "train"] = "test"
    """The split of --corpora.evaluate. Choose settings on development, so that test stays unseen; or on train, which is
    longer, of corpora that neither the run nor any report uses."""
    num_samples: AtLeast1 = 6
    """Windows per evaluated corpus, the same ones for every seed."""
    seq_len: AtLeast8 = 256
    """Tokens per window. Windows do not overlap (stride = seq_len)."""
    development_samples: AtLeast1 = 2
    """Development windows per corpus of learning and recovery, for curves over epochs, tokens and sparsity."""
    curve: list[Sparsity] = field(default_factory=lambda: [0.2, 0.35])
    """Sparsities, besides 0 and the target, at which gprune's masks are measured on development text."""
    samples: AtLeast0 = 3
    """Number of evaluated texts whose beginnings the dense and the pruned model continue, for the page of the run."""
    controls: list[Control] = field(default_factory=lambda: ["base", "averaged", "unrecovered"])
    """Rows beside the run's own. base: the base metric alone, allocated by --sparsity.start, or by an
    --sparsity.allocation that does not learn. averaged: the same, scored on all drift corpora. unrecovered: every row
    without recovery as well."""


@group("logging.")
class LoggingConfig(Group):
    """Where curves go."""

    tracker: Literal["wandb", "tensorboard", "csv"] = "wandb"
    """wandb: Weights & Biases. tensorboard: event files in the run folder (needs the package tensorboard). csv: only
    the CSV file, which is always written."""
    mode: Literal["offline", "online", "disabled"] | None = None
    """Of W&B. Default: $WANDB_MODE, else offline: files in the run folder, no account needed, and `wandb leet run`
    shows every curve in the terminal."""
    project: WandbName = "gprune"
    """W&B project."""
    group: WandbName | None = None
    """W&B group; default: the model's name, which groups ablations of one model."""
    tags: list[Annotated[Text, Field(min_length=1, max_length=64)]] = field(default_factory=list)
    """W&B tags beside metric, scope and allocation."""

    def __post_init__(self) -> None:
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

    @property
    def resolved_mode(self) -> str:
        """W&B's mode: the flag, else $WANDB_MODE, else offline."""
        return self.mode or os.environ.get("WANDB_MODE") or "offline"

    @property
    def resolved_tracker(self) -> str:
        """csv, too, where W&B is disabled."""
        return "csv" if self.tracker == "wandb" and self.resolved_mode == "disabled" else self.tracker


@group("trainer.")
class TrainerConfig(Group):
    """Lightning's own flags."""

    accelerator: Text = "auto"
    """cpu, gpu, or auto."""
    devices: Few = 1
    """Processes per node. Statistics and thresholds agree with those of one process."""
    num_nodes: Few = 1
    """Nodes."""
    strategy: Literal["auto", "ddp"] = "auto"
    """auto or ddp."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch's setting of this name, for matrix products in float32. high: TF32 on GPUs that have it, several times
    faster, with 10 bits of mantissa; medium: bfloat16 inside. It has no effect on bfloat16 weights."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Precision in which thresholds and recoveries are trained. bf16-mixed: matrix products in bfloat16 (autocast),
    trained parameters in float32; several times faster on a GPU, or a CPU with AMX. Statistics and evaluation use
    --model.dtype."""

    @property
    def lightning(self) -> dict[str, Any]:
        """What Lightning's Trainer is told."""
        return {n: getattr(self, n) for n in ("accelerator", "devices", "num_nodes", "strategy", "precision")}


@group("run.")
class RunFolderConfig(Group):
    """Where results go."""

    dir: Text = "runs"
    """Folder of all runs."""
    name: Text | None = None
    """Folder of this run inside it. Default: model, metric, sparsity and a hash of all settings."""
    seed: Seed = 0
    """Seed of everything random: windows, partition, order of training windows."""
    checkpoint_minutes: NonNegative = 5.0
    """Minutes between checkpoints in training; 0: after every step. A killed run resumes from the last one, to the same
    bits."""

    def __post_init__(self) -> None:
        """Raise UserError for a name that leads out of the folder of runs, or that no file can have."""
        name = self.name or "run"
        if name in (".", "..") or name != os.path.basename(name) or len(os.fsencode(name)) > 200:
            raise UserError(
                f"--run.name: expected the name of a folder inside --run.dir, of at most 200 bytes, got {shown(name)}."
            )
