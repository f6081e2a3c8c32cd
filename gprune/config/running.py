"""The groups of flags that say how a run is distilled, measured, logged, executed and kept, beside `groups.py`."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from gprune.checks import AtLeast1, AtLeast8, Few, NonNegative, Positive, Quantile, Seed, Sparsity, Text
from gprune.config.groups import Group
from gprune.errors import UserError

WandbName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\p{Cc}\p{Zl}\p{Zp}]*$")]
RELATIVE_RATE = 1.6e-3  # chosen on text that no table reports


class DistillConfig(Group, prefix="distill."):
    """How a pruned model learns from the dense one, where --recovery has the link distill."""

    targets: Literal["mlp", "all", "lora"] = "all"
    """What is trained. mlp: the FFN's weights. all: every weight of the decoder layers. lora: adapters, merged at the
    end (needs peft)."""
    tokens: AtLeast1 = 12_288
    """Training tokens, each used once, equally many from each of --corpora.recover: forward through the dense model,
    forward and backward through the pruned one."""
    batch_size: AtLeast1 = 1
    """Windows per step, over all devices together."""
    learning_rate: Positive = RELATIVE_RATE
    """Peak step size of AdamW, relative to the root mean square of each tensor that learns, whatever its scale. A
    tensor of zeros stays; LoRA's factor B takes steps that change its matrix by as much."""
    absolute_learning_rate: Positive | None = None
    """Peak step size of AdamW in the units of the weights, in place of --distill.learning_rate."""
    warmup: Quantile = 0.1
    """Share of the steps in which the step size rises; then it falls to 0."""
    weight_decay: NonNegative = 0.0
    """Of AdamW: decoupled from the gradient, times the step size."""
    kl: NonNegative = 1.0
    """Weight of the divergence from the dense model."""
    cross_entropy: NonNegative = 0.0
    """Weight of the next token's cross-entropy. With --distill.kl 0 it is plain fine-tuning."""
    clip: Positive = 1.0
    """Largest norm of the gradient, each tensor's times its size unless --distill.absolute_learning_rate is given."""
    rank: AtLeast1 = 8
    """lora: rank of the adapters."""
    accumulate: AtLeast1 = 1
    """Batches per optimizer step."""
    checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass, to save memory."""
    keep: Literal["last", "best"] = "last"
    """Which weights are kept: those of the last step, or of the measurement with the lowest perplexity."""

    def model_post_init(self, _: Any) -> None:
        if not self.kl + self.cross_entropy > 0:
            raise UserError("--distill.kl, --distill.cross_entropy: expected one of them above 0.")
        if self.absolute_learning_rate is not None and self.learning_rate != RELATIVE_RATE:
            raise UserError("--distill.absolute_learning_rate: expected no --distill.learning_rate beside it.")


class EvaluationConfig(Group, prefix="evaluation."):
    """What is measured at the end."""

    split: Literal["test", "development", "train"] = "test"
    """The split of --corpora.evaluate. Choose settings on development, so that test stays unseen; or on train, of
    corpora that the run does not read."""
    num_samples: AtLeast1 = 6
    """Windows per evaluated corpus, the same ones for every seed."""
    seq_len: AtLeast8 = 256
    """Tokens per window. Windows do not overlap (stride = seq_len)."""
    development_samples: AtLeast1 = 2
    """Development windows per corpus of learning and recovery, for curves over epochs, tokens and sparsity."""
    curve: list[Sparsity] = Field([0.2, 0.35])
    """Sparsities, besides 0 and the target, at which gprune's masks are measured on development text."""
    controls: list[Literal["base", "averaged", "unrecovered"]] = Field(["base", "averaged", "unrecovered"])
    """Rows beside the run's own. base: the base metric alone, allocated by --sparsity.start, or by an
    --sparsity.allocation that does not learn. averaged: the same, scored on all drift corpora. unrecovered: every row
    without recovery as well."""


class LoggingConfig(Group, prefix="logging."):
    """Where curves go. A CSV file is always written; these are the flags of Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] | None = None
    """Of W&B. Default: $WANDB_MODE, else offline: no account needed; `wandb leet run` shows every curve."""
    project: WandbName | None = None
    """W&B project; default: $WANDB_PROJECT, else gprune."""
    name: WandbName | None = None
    """Name of the run in W&B; default: $WANDB_NAME, else that of its folder."""
    group: WandbName | None = None
    """W&B group; default: $WANDB_RUN_GROUP, else the model's name, which groups ablations of one model."""
    tags: list[Annotated[Text, Field(min_length=1, max_length=64)]] = Field([])
    """W&B tags beside metric, scope, allocation, partition and target; default: $WANDB_TAGS."""
    artifacts: list[Literal["masks", "model"]] = Field([])
    """W&B artifacts of the finished run, read by gprune.load_run("wandb:..."). masks: what that needs but the
    model. model: all."""

    def model_post_init(self, _: Any) -> None:
        if self.resolved_mode not in ("offline", "online", "disabled"):
            raise UserError(f"WANDB_MODE: expected offline, online or disabled, got '{self.resolved_mode}'.")

    @property
    def resolved_mode(self) -> str:
        """The flag, else $WANDB_MODE, else offline."""
        return self.mode or os.environ.get("WANDB_MODE") or "offline"

    @property
    def resolved_tags(self) -> list[str]:
        """The flag, else $WANDB_TAGS."""
        return self.tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]

    @property
    def resolved_group(self) -> str | None:
        """The flag, else $WANDB_RUN_GROUP."""
        return self.group or os.environ.get("WANDB_RUN_GROUP") or None


class ClassPath(BaseModel, strict=True, extra="forbid"):
    """A class and the arguments that make an object of it, as LightningCLI writes them."""

    class_path: Text
    init_args: dict[Text, JsonValue] = {}


def precision_named(given: Any) -> Any:
    """A precision by its full name. Raises UserError for one of Lightning's that no stage can learn in."""
    reasons = {
        "bf16-true": "steps of AdamW are smaller than what bfloat16 weights tell apart",
        "16-mixed": "float16 overflows without scaled losses, which the stages do not have",
        "64-true": "nothing here needs float64",
    }
    name = {"bf16": "bf16-mixed", "32": "32-true", "16": "16-mixed", "16-true": "16-mixed", "64": "64-true"}.get(
        str(given), given
    )
    if (reason := reasons.get(str(name))) is not None:
        raise UserError(f"--trainer.precision: expected auto, 32-true or bf16-mixed, got {given!r}: {reason}.")
    return name


class TrainerConfig(Group, prefix="trainer."):
    """Flags of Lightning's Trainer. Each stage has one: calibration, refinement, threshold learning, and recoveries
    that learn."""

    accelerator: Text = "auto"
    """cpu, gpu, or auto."""
    devices: Few = 1
    """Processes per node. Statistics and thresholds agree with those of one process."""
    num_nodes: Few = 1
    """Nodes."""
    strategy: Literal["auto", "ddp"] = "auto"
    """auto or ddp."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch's setting of this name. high: matrix products of float32 in TF32 on GPUs that have it, several times
    faster; medium: in bfloat16."""
    precision: Annotated[Literal["auto", "32-true", "bf16-mixed"], BeforeValidator(precision_named)] = "auto"
    """Precision in which thresholds and recoveries learn, and errors of blocks are measured (--sparsity.allocation
    reconstruction); statistics and evaluation use --model.dtype. bf16-mixed: matrix products in bfloat16 (autocast),
    several times faster on GPUs of compute capability 8 and above and on CPUs with AMX, and slower elsewhere. auto:
    bf16-mixed on that hardware, 32-true elsewhere and with --model.dtype float16; a run that has begun keeps its
    precision, and rows of a list use 32-true unless they name another precision."""
    callbacks: list[ClassPath] = Field([])
    """Lightning callbacks of every stage, made anew for each: [{class_path: lightning.pytorch.callbacks.EarlyStopping,
    init_args: {monitor: learn/loss, strict: false}}]. Classes of other packages need --import."""
    logger: list[ClassPath] = Field([])
    """Lightning loggers beside CSV and W&B, such as [{class_path: TensorBoardLogger}] or MLFlowLogger. They write into
    the run's folder unless `save_dir` is given. Classes of other packages need --import."""
    log_every_n_steps: AtLeast1 | None = None
    """Steps from one point of a curve to the next. Default: 1, and 10 in the refinement."""
    gradient_clip_val: Positive | None = None
    """Largest norm of the gradient, in stages without a limit of their own (distill: --distill.clip). Default: none."""
    limit_train_batches: Positive | None = None
    """Batches per epoch of stages that learn from text: a number, or below 1 a share. Default: all."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Lightning's profiler of this name, whose reports go into profiles/ of the run, a file per stage."""
    max_steps: AtLeast1 | None = None
    """Optimizer steps after which stages that learn from text end, if their text has more. Default: all."""
    val_check_interval: Annotated[int | float, Field(gt=0)] | None = None
    """How often development perplexity is measured while a stage learns from text: every so many batches, or below 1
    after each such share of them. Default: after each epoch of thresholds, and up to four times in a distillation."""
    fast_dev_run: bool = False
    """Learn from one batch in each stage, without curves and checkpoints, to find errors. The rest of the run is as
    always."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms in stages: on a GPU the same bits each time, for more time."""
    detect_anomaly: bool = False
    """End with the operation whose gradient is NaN, where there is one. Slow."""

    def model_post_init(self, _: Any) -> None:
        if isinstance(every := self.val_check_interval, float) and every > 1:
            raise UserError(
                f"--trainer.val_check_interval must be a number of batches, or a share from 0 to 1; got {every:g}."
            )

    @property
    def lightning(self) -> dict[str, Any]:
        """What Lightning's Trainer is told."""
        asked = {n: getattr(self, n) for n in ("accelerator", "devices", "num_nodes", "strategy", "precision")}
        return asked | ({"precision": "32-true"} if self.precision == "auto" else {})  # until the hardware is known

    @property
    def unusual(self) -> dict[str, Any]:
        """What can change a result and is not its default, which no settings of earlier runs name."""
        names = (
            "callbacks", "gradient_clip_val", "limit_train_batches", "max_steps", "deterministic", "val_check_interval",
            "fast_dev_run",
        )  # fmt: skip
        return self.model_dump(include={*names, "float32_matmul_precision"}, exclude_defaults=True)


class RunFolderConfig(Group, prefix="run."):
    """Where results go."""

    dir: Text = "runs"
    """Folder of all runs."""
    name: Text | None = None
    """Folder of this run inside it. Default: model, metric, sparsity and a hash of all settings."""
    seed: Seed = 0
    """Seed of everything random: windows, partition, order of training windows."""
    checkpoint_minutes: NonNegative = 5.0
    """Minutes between checkpoints, from which a killed run resumes to the same bits; 0: after every step."""

    def model_post_init(self, _: Any) -> None:
        name = self.name or "run"
        if name in (".", "..") or name != os.path.basename(name) or len(os.fsencode(name)) > 200:
            raise UserError(f"--run.name: expected the name of a folder, of at most 200 bytes, got '{name:.100}'.")
