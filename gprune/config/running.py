"""Groups of flags for distillation, evaluation, logging, the Trainer and the run folder; `groups.py` has the others."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from gprune.checks import AtLeast1, AtLeast8, NonNegative, Positive, Quantile, Seed, Sparsity, Text, UpTo4096
from gprune.config.groups import IF_CHANGED, NEVER, Group
from gprune.errors import UserError
from gprune.user_code import code_at

WandbName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\p{Cc}\p{Zl}\p{Zp}]*$")]
# Default of --distill.learning_rate, tuned on text that no result table uses.
RELATIVE_RATE = 1.6e-3


class DistillConfig(Group, prefix="distill."):
    """Distillation of the dense model into the pruned one, for recoveries that include distill."""

    targets: Literal["mlp", "all", "lora"] = "all"
    """Which weights are trained. mlp: those of the FFN. all: all weights of the decoder layers. lora: LoRA adapters,
    merged at the end (needs peft)."""
    tokens: AtLeast1 = 12_288
    """Number of training tokens, split evenly over --corpora.recover: forward through the dense model, forward and
    backward through the pruned model."""
    repeat: bool | Literal["auto"] | None = None
    """Use the text of corpora that are too small for their share of --distill.tokens several times, instead of
    stopping. auto: at most four times, and of at least 8,192 tokens; statistics and evaluation of a short corpus then
    have fewer windows. Default: auto with --corpora.text, otherwise false."""
    batch_size: AtLeast1 = 1
    """Windows per step, over all devices together."""
    learning_rate: Positive = RELATIVE_RATE
    """Peak learning rate of AdamW, relative to the root mean square (RMS) of each trained tensor. A tensor of zeros is
    not changed. The rate of LoRA's factor B is scaled so that the adapted matrix changes by as much."""
    absolute_learning_rate: Positive | None = None
    """Peak learning rate of AdamW in the units of the weights, instead of --distill.learning_rate."""
    warmup: Quantile = 0.1
    """Share of the steps in which the learning rate rises from 0; afterwards it decays to 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW, multiplied by the learning rate."""
    kl: NonNegative = 1.0
    """Weight of the KL divergence from the dense model."""
    cross_entropy: NonNegative = 0.0
    """Weight of the next-token cross-entropy. With --distill.kl 0 distillation becomes plain fine-tuning."""
    clip: Positive = 1.0
    """Largest gradient norm. Gradients are scaled by the RMS of each tensor before clipping, unless
    --distill.absolute_learning_rate is given."""
    rank: AtLeast1 = 8
    """Rank of the adapters of --distill.targets lora."""
    accumulate: AtLeast1 = 1
    """Batches per optimizer step (gradient accumulation)."""
    checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass, to save memory."""

    def model_post_init(self, _: Any) -> None:
        """Raise UserError if the loss has no term, or both learning rates are set."""
        if not self.kl + self.cross_entropy > 0:
            raise UserError("--distill.kl or --distill.cross_entropy must be more than 0; got 0 for both.")
        if self.absolute_learning_rate is not None and self.learning_rate != RELATIVE_RATE:
            raise UserError("--distill.absolute_learning_rate cannot be combined with --distill.learning_rate.")


class EvaluationConfig(Group, prefix="evaluation."):
    """Evaluation at the end, and development text during learning."""

    split: Literal["test", "development", "train"] = "test"
    """Split of --corpora.evaluate. Tune settings on development, so that test stays unseen, or on train with corpora
    that the run does not read."""
    num_samples: AtLeast1 = 6
    """Windows per evaluated corpus, the same for every seed."""
    seq_len: AtLeast8 = 256
    """Tokens per window. Windows do not overlap (stride = seq_len)."""
    development_samples: AtLeast1 | None = None
    """Development windows per corpus of --corpora.learn and --corpora.recover, for curves over epochs, tokens and
    sparsity. Default: 2; for a target in quality such as +5%, 8 of each corpus that the run reads, or as many as a
    smaller corpus has."""
    curve: list[Sparsity] = Field([0.2, 0.35])
    """Sparsities at which perplexity of gprune's masks is measured on development text, besides 0 and the target."""
    before_recovery: Annotated[bool, NEVER] = True
    """Measure the pruned model before its recovery too, which shows what pruning cost and what recovery gave back.
    Rows of a study list do not unless they set it."""
    prompts: Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], NEVER] = Field(
        ["The first railway line in the country was opened in", "What is the capital of France?"]
    )
    """Prompts that the dense, the pruned and the recovered model continue at the end, by at most 30 tokens. A prompt
    that ends with ? goes through the chat template of the model's tokenizer, if it has one. []: none."""

    @property
    def compared_tokens(self) -> int:
        """Number of tokens on which masked, sliced and reloaded logits are compared."""
        return min(self.seq_len, 128)


class LoggingConfig(Group, prefix="logging."):
    """Logging to Weights & Biases (W&B). Curves are always written to a CSV file too."""

    mode: Literal["offline", "online", "disabled"] | None = None
    """Mode of W&B: offline, online or disabled. Default: $WANDB_MODE, else offline. Offline needs no account; `wandb
    leet run` shows the curves."""
    project: WandbName | None = None
    """W&B project. Default: $WANDB_PROJECT, else gprune."""
    name: WandbName | None = None
    """Name of the run in W&B. Default: $WANDB_NAME, else the name of the run's folder."""
    group: WandbName | None = None
    """W&B group. Default: $WANDB_RUN_GROUP, else the model's name, which groups ablations of one model."""
    tags: list[Annotated[Text, Field(min_length=1, max_length=64)]] = Field([])
    """W&B tags, added to metric, scope, allocation, partition and target. Default: $WANDB_TAGS."""
    artifacts: list[Literal["masks", "model"]] = Field([])
    """W&B artifacts to upload from the finished run, for gprune.load_run("wandb:..."). masks: everything except the
    model. model: the model too."""

    def model_post_init(self, _: Any) -> None:
        if self.resolved_mode not in ("offline", "online", "disabled"):
            raise UserError(f"WANDB_MODE must be offline, online or disabled; got '{self.resolved_mode}'.")

    @property
    def resolved_mode(self) -> str:
        """`--logging.mode`, or by default $WANDB_MODE, or `offline`."""
        return self.mode or os.environ.get("WANDB_MODE") or "offline"

    @property
    def resolved_tags(self) -> list[str]:
        """`--logging.tags`, or by default the tags in $WANDB_TAGS, which are separated by commas."""
        return self.tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]

    @property
    def resolved_group(self) -> str | None:
        """`--logging.group`, or by default $WANDB_RUN_GROUP."""
        return self.group or os.environ.get("WANDB_RUN_GROUP") or None


class ClassPath(BaseModel, strict=True, extra="forbid"):
    """A class and its arguments, in the form of LightningCLI."""

    class_path: Text
    init_args: dict[Text, JsonValue] = {}

    def code(self) -> dict[str, str | None]:
        """Return the hashes of the user's code of the class, by module; empty for a class of Lightning.

        The hash is None if the class is not loaded.
        """
        return code_at(self.class_path) if "." in self.class_path else {}


def full_precision(value: Any) -> Any:
    """Return Lightning's full name of a precision."""
    return {"bf16": "bf16-mixed", "32": "32-true"}.get(str(value), value)


SET_BY_GPRUNE = {  # arguments of Lightning's Trainer that gprune sets -> what to use instead
    "max_epochs": "--sparsity.epochs (thresholds), --partition.steps (refinement), --distill.tokens",
    "max_time": "--trainer.callbacks '[{class_path: Timer, init_args: {duration: 00:12:00:00}}]'",
    "accumulate_grad_batches": "--distill.accumulate, or the callback GradientAccumulationScheduler",
    "limit_val_batches": "--evaluation.development_samples",
    "limit_test_batches": "--evaluation.num_samples and --corpora.num_samples",
    "overfit_batches": "--trainer.limit_train_batches",
    "num_sanity_val_steps": "--trainer.fast_dev_run true",
    "barebones": "--logging.mode disabled --trainer.log_every_n_steps 100",
    "use_distributed_sampler": "--trainer.devices alone, whose samplers repeat no window",
    "inference_mode": "--trainer.devices alone, because stages need gradients",
    "default_root_dir": "--run.dir",
    "enable_checkpointing": "--run.checkpoint_minutes",
}
WITHOUT_EFFECT = (  # arguments of Lightning's Trainer that change no result, so that they do not identify a run
    "profiler", "log_every_n_steps", "detect_anomaly", "enable_progress_bar", "enable_model_summary",
    "enable_autolog_hparams", "model_registry",
)  # fmt: skip


class TrainerConfig(Group, prefix="trainer.", extra="allow"):
    """Flags of Lightning's Trainer. Each stage has its own Trainer: calibration, refinement, threshold learning, and
    recoveries that train. Other arguments of lightning.Trainer are accepted too, such as --trainer.profiler simple,
    --trainer.max_steps 100, --trainer.gradient_clip_val 1, --trainer.deterministic true or --trainer.fast_dev_run true.
    """

    accelerator: Annotated[Text, NEVER] = "auto"
    """cpu, gpu, or auto. auto: a GPU if there is one; cpu on a Mac."""
    devices: Annotated[UpTo4096, NEVER] = 1
    """Processes per node. Statistics and thresholds agree with those of one process."""
    num_nodes: Annotated[UpTo4096, NEVER] = 1
    """Number of nodes."""
    strategy: Annotated[Literal["auto", "ddp", "fsdp"], NEVER] = "auto"
    """auto, ddp or fsdp. fsdp: ddp, except that distillation shards the layers of both models, gradients and the states
    of AdamW over all processes (Lightning's ModelParallelStrategy, PyTorch's fully_shard)."""
    float32_matmul_precision: Annotated[Literal["highest", "high", "medium"], IF_CHANGED] = "highest"
    """Argument of torch.set_float32_matmul_precision. highest: float32 matrix products in float32, on AMD's CPUs with
    AVX-512 by oneDNN instead of MKL. high: in TF32 on GPUs that support it, several times faster. medium: permits
    bfloat16, which CPUs with AMX and GPUs use."""
    precision: Annotated[Literal["auto", "32-true", "bf16-mixed"], BeforeValidator(full_precision)] = "auto"
    """Precision of threshold learning, of recoveries that train, and of errors of blocks (--sparsity.allocation
    reconstruction); statistics and evaluation use --model.dtype. bf16-mixed: matrix products in bfloat16
    (autocast). They are 2 to 7 times as fast on CPUs with AMX and on AMD's CPUs with AVX512-BF16, and slower on other
    CPUs; on GPUs they were not measured. auto: bf16-mixed on these CPUs and on GPUs of compute capability 8 and above,
    32-true elsewhere and with --model.dtype float16. A resumed run keeps its precision. Rows of a study list use
    32-true unless they set a precision."""
    callbacks: Annotated[list[ClassPath], IF_CHANGED] = Field([])
    """Lightning callbacks of every stage, constructed again for each: [{class_path:
    lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: learn/loss, strict: false}}]. Classes of other
    packages need --import."""
    logger: Annotated[list[ClassPath], NEVER] = Field([])
    """Lightning loggers in addition to CSV and W&B, such as [{class_path: TensorBoardLogger}] or MLFlowLogger. They
    write into the run's folder unless `save_dir` is given. Classes of other packages need --import."""
    limit_train_batches: Annotated[Positive | None, IF_CHANGED] = None
    """Batches per epoch of stages that train on text: a number of batches, or a share if below 1. Default: all."""
    val_check_interval: Annotated[Annotated[int | float, Field(gt=0)] | None, IF_CHANGED] = None
    """How often development perplexity is measured while a stage trains on text: a number of batches, or a share of the
    batches if below 1. Default: after each epoch of threshold learning, and up to four times in a distillation."""
    __pydantic_extra__: dict[str, JsonValue]

    @classmethod
    def check_name(cls, name: str, where: str) -> None:
        """Raise UserError for an argument that gprune sets. Lightning's names are checked by `runs.trainer`."""
        if name in SET_BY_GPRUNE:
            raise UserError(f"{where}: Setting 'trainer.{name}' cannot be changed. Use {SET_BY_GPRUNE[name]}.")

    def model_post_init(self, _: Any) -> None:
        """Raise UserError for a float `val_check_interval` above 1: neither a number of batches nor a share."""
        interval = self.val_check_interval
        if isinstance(interval, float) and interval > 1:
            raise UserError(
                f"--trainer.val_check_interval must be a number of batches, or a share from 0 to 1; got {interval:g}."
            )

    @property
    def other_arguments(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer that have no field here. null and false stand for Lightning's default."""
        given = self.model_extra or {}
        return {name: value for name, value in given.items() if value is not None and value is not False}


class RunFolderConfig(Group, prefix="run."):
    """The run folder, the seed and checkpoints."""

    dir: Annotated[Text, NEVER] = "runs"
    """Parent folder of all runs."""
    name: Annotated[Text | None, NEVER] = None
    """Name of this run's folder. Default: model, metric, sparsity and a hash of all settings."""
    seed: Seed = 0
    """Random seed of the choice of windows, the partition, and the order of training windows."""
    checkpoint_minutes: Annotated[NonNegative, NEVER] = 5.0
    """Minutes between checkpoints; 0: after every step. A killed run resumes from them with identical results."""

    def model_post_init(self, _: Any) -> None:
        """Raise UserError for a name that is not a folder name, or too long."""
        name = self.name or "run"
        if name in (".", "..") or name != os.path.basename(name) or len(os.fsencode(name)) > 200:
            raise UserError(f"--run.name must be a folder name of at most 200 bytes; got '{name:.100}'.")
