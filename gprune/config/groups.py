"""The groups of flags, as typed dataclasses whose attribute docstrings are the help.

There is one name per thing: `--sparsity.target` on the command line is `sparsity: {target: ...}` in YAML,
`RunConfig(sparsity=SparsityConfig(target=...))` in Python, and `sparsity.target` in W&B.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, get_type_hints

from gprune.checks import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    AtLeast8,
    Few,
    NonNegative,
    Positive,
    Quantile,
    Seed,
    Sparsity,
    check,
    memory_limits,
    shown,
)
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.sparsity.allocation import ALLOCATION, check_options

# What modules may switch to besides activation-free metrics: the base metric seen through all drift corpora, as the
# mean of its ranks or scored on their pooled statistics.
CONSENSUS, AVERAGED = SEVERAL = ("consensus", "averaged")
PLACES = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|(cuda|xpu|npu|mps)(:[0-9]{1,3})?")
Control = Literal["base", "averaged", "unrecovered"]


@dataclass  # jsonargparse takes only classes all of whose bases are dataclasses as groups
class Group:
    """A group of flags: every value is checked against its type, and then against the others of the group."""

    prefix: ClassVar[str] = ""  # of the group's flags, with the dot

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(self):
            setattr(self, one.name, check(self.prefix + one.name, hints[one.name], getattr(self, one.name)))
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses what is no setting: a misspelt one would be taken and change nothing."""
        known = [one.name for one in fields(self)]
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else f"; expected one of {', '.join(known)}."
            raise UserError(f"{type(self).__name__} has no setting '{self.prefix}{name}'{meant}")
        super().__setattr__(name, value)

    def check(self) -> None:
        """Raise UserError for values that do not go together."""


@dataclass
class ModelConfig(Group):
    """Which model is pruned."""

    prefix: ClassVar[str] = "model."
    name: str = "smollm2-135m"
    """Embedded name (smollm2-135m, gemma-3-270m, or tiny-random to try the machinery),
    local Hugging Face folder, or hub id such as meta-llama/Llama-3.2-1B."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen weights. Statistics are summed in float64 whatever it is."""
    device_map: str | None = None
    """Handed to transformers, e.g. auto. Without it the model goes where the trainer's device is."""
    max_memory: dict[str, str] | None = None
    """What weights may take, e.g. {0: 20GiB, cpu: 60GiB}, by device number or cpu; with device_map. The rest stays on
    disk and is fetched block by block: no gradient goes through such a model, but what is left can be distilled."""
    shard: bool = False
    """Spread the layers of the frozen model over all processes (PyTorch's fully_shard) while statistics are collected
    and thresholds learned, for models that do not fit one device. Needs two or more --trainer.devices or .num_nodes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    def check(self) -> None:
        if self.device_map is not None and not PLACES.fullmatch(self.device_map):
            raise UserError(
                f"--model.device_map: expected auto, balanced, balanced_low_0, sequential or a device such as cuda:0, "
                f"got '{self.device_map}'."
            )
        if self.max_memory is not None:
            memory_limits(self.max_memory)
            if self.device_map is None:
                raise UserError("--model.max_memory: expected --model.device_map auto with it, got no device_map.")


@dataclass
class CorporaConfig(Group):
    """Which text is used for what. A corpus is an embedded name, a hub name, a name in $GPRUNE_DATA_DIR, or a path
    to a .txt, .jsonl, .parquet or folder."""

    prefix: ClassVar[str] = "corpora."
    score: str = "wiki"
    """The one corpus whose activations give the importance scores."""
    drift: list[str] = field(default_factory=lambda: ["wiki", "web", "python_code"])
    """Two or more corpora between which rank drift is measured. One corpus turns drift and the switch off."""
    learn: list[str] = field(default_factory=lambda: ["wiki", "web", "python_code"])
    """Corpora on which thresholds are learned (train split). [score] is our reading of the paper."""
    recover: list[str] = field(default_factory=lambda: ["wiki", "web", "python_code"])
    """Corpora whose statistics, or for least_squares_sequential whose text, recovery uses."""
    evaluate: list[str] = field(default_factory=lambda: ["wiki", "web", "stories", "technical", "python_docs"])
    """Corpora on which perplexity is reported (--evaluation.split), seen and unseen apart."""
    num_samples: AtLeast2 = 16
    """Calibration windows per corpus; at least two, whose halves give drift its noise floor."""
    seq_len: AtLeast8 = 256
    """Tokens per window, in calibration and learning."""
    learn_samples: AtLeast1 | None = None
    """Windows per learning corpus; default: num_samples. More of them is fresh text for learning, in place of epochs
    over the same."""
    batch_size: AtLeast1 = 4
    """Windows per step, over all devices together."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether the beginning-of-sequence token opens every window, for whatever it is used. It takes the first place and
    is never scored. auto: where the model's tokenizer puts it before a text by itself (Llama, Gemma)."""
    separator: Literal["blank", "eos"] = "blank"
    """What stands between documents in a window: a blank line, which text has inside documents too, or the EOS token,
    which models have seen between documents in training."""
    collect: list[Literal["gram", "saliency"]] = field(default_factory=list)
    """Collect these in a calibration pass although this run does not need them, so that later runs (obs,
    least_squares: gram; taylor: saliency) find them in the cache."""

    def check(self) -> None:
        for role in ("drift", "learn", "recover", "evaluate"):
            names = getattr(self, role)
            if not names:
                raise UserError(f"--corpora.{role}: expected at least one corpus, got an empty list.")
            if len(set(names)) != len(names):
                raise UserError(f"--corpora.{role}: a corpus is named twice in {names}; name each once.")


@dataclass
class PartitionConfig(Group):
    """How each block's neurons are divided into modules."""

    prefix: ClassVar[str] = "partition."
    num_modules: AtLeast1 = 8
    """Modules per block to start from; modules below max(32, N / 4K) neurons are merged."""
    method: Literal["refined", "initial", "random", "drift_only"] = "refined"
    """refined: k-means, then differentiable refinement. Ablations: initial (no refinement), random (the refined
    sizes, random members), drift_only (the refined sizes, by drift alone)."""
    subtract_noise: bool = False
    """Subtract the split-half noise floor from rank drift."""
    embedding_dim: AtLeast1 = 8
    """Principal directions of the parameter embedding."""
    steps: AtLeast1 = 120
    """Optimizer steps of the refinement."""
    learning_rate: Positive = 0.05
    """Adam step size of the refinement."""
    similarity_weight: NonNegative = 1.0
    """Weight of within-module parameter dispersion, in the start and in the refinement."""
    drift_weight: NonNegative = 1.0
    """Weight of within-module variance of drift, in the start and in the refinement."""
    consistency_weight: NonNegative = 2.0
    """Weight of the reward for rank consistency between corpora inside a module."""
    balance_weight: NonNegative = 0.1
    """Weight of equal module sizes."""
    entropy_weight: NonNegative = 0.1
    """Weight of decided assignments."""


@dataclass
class ReliabilityConfig(Group):
    """When a module's own ranking gives way to an activation-free metric."""

    prefix: ClassVar[str] = "reliability."
    switch: bool = True
    """Let sensitive, weakly activated modules switch. False: every module keeps the base metric."""
    everywhere: bool = False
    """Let all modules switch, reliable or not: the switch's own control."""
    metric: str = "magnitude"
    """What to switch to: an activation-free metric; or consensus, the base metric's mean rank over the drift corpora;
    or averaged, the base metric scored on all of them together."""
    sensitivity_quantile: Quantile = 0.75
    """Modules above this quantile of standardised sensitivity count as sensitive."""
    score_quantile: Quantile = 0.5
    """Modules below this quantile of mean importance rank count as weakly activated."""
    softness: NonNegative = 0.0
    """0: a module switches or it does not. Above: its ranks are a mixture, in which what it switches to weighs the more
    the more sensitive and the less activated it is. The weight is a sigmoid of how far the module is past each limit of
    the switch, in standard deviations of neurons, over the softness."""

    def check(self) -> None:
        if self.metric not in SEVERAL and not IMPORTANCE[self.metric].activation_free:
            free = [name for name in IMPORTANCE if IMPORTANCE[name].activation_free]
            raise UserError(
                f"--reliability.metric: expected an activation-free metric ({', '.join(free)}) or one of "
                f"{', '.join(SEVERAL)}, got '{self.metric}'."
            )
        if self.everywhere and not self.switch:
            raise UserError(
                "--reliability.everywhere: expected a switch that all modules take, got --reliability.switch false; "
                "give one of them."
            )
        if self.softness and (self.everywhere or not self.switch):
            other = "--reliability.everywhere true" if self.everywhere else "--reliability.switch false"
            raise UserError(
                f"--reliability.softness {self.softness:g}: expected modules that switch the more the less reliable "
                f"they are, got {other}; give one of them."
            )


@dataclass
class SparsityConfig(Group):
    """How much goes, from where, and how the sparsity of each module is found."""

    prefix: ClassVar[str] = "sparsity."
    target: Sparsity = 0.5
    """Fraction of the scope's parameters to remove, inside (0, 1)."""
    schedule: list[Sparsity] = field(default_factory=list)
    """Sparsities on the way to the target, rising, such as [0.3, 0.4]: at each the model is pruned and recovered, and
    what is left is scored again. --distill.tokens are shared between the steps. Without controls in the table."""
    scope: Literal["ffn", "attention+ffn"] = "ffn"
    """ffn: whole FFN neurons. attention+ffn: whole KV groups too, in the same budget."""
    allocation: str = "learned"
    """How sparsity is spread. learned: one threshold per module, trained around the frozen model. Without learning:
    uniform (every block alike), global (scores standardised per block, one threshold: FLAP), owl (blocks with more
    outliers lose less), depth (whole blocks by influence: ShortGPT; with --gprune false). Under these every module
    keeps as much as the base metric keeps of it. equal: every module of the model loses the same fraction."""
    start: str = "uniform"
    """The base metric's allocation where thresholds are learned or equal, and where learning starts."""
    options: dict[str, float] = field(default_factory=dict)
    """Options of the allocation. owl: multiple (an element above so many times its block's mean is an outlier; 5) and
    spread (how far a block's sparsity may lie from the target; 0.08)."""
    protect: list[int] = field(default_factory=list)
    """Blocks that keep everything, -1 being the last one. LLM-Pruner keeps [0,1,2,-1]."""
    width_multiple: AtLeast1 = 1
    """Widths end up on multiples of this: 64 or 128 suit matrix-multiply tiles and serving kernels (quantised ones want
    128), 32 the blocks of q8_0, 8 the grouped kernels of experts. The overshoot is less than one step."""
    uniform_width: bool = False
    """Every block ends up with the same width (and as many KV groups): the widest one that removes the target. The
    result is a stock model that needs nobody's code; what sparsity it reaches is printed."""
    learn: Literal["thresholds", "offsets", "both"] = "thresholds"
    """What is learned. thresholds: one number per module. offsets: one per neuron, which moves its rank; a free gate
    for every neuron, for which modules only matter as a start. both: the two together."""
    loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    """cross_entropy: of the next token. kl: divergence from the dense model, one more forward pass per step."""
    epochs: AtLeast1 = 1
    """Passes over the learning windows."""
    learning_rate: Positive = 0.1
    """Adam step size of the thresholds, in logits."""
    offset_learning_rate: Positive = 0.05
    """Adam step size of the offsets, in logits."""
    offset_limit: Positive = 1.2
    """How far an offset may move a neuron's rank, in logits. A gradient does not see what removing a neuron that
    carries most of its block would do; a limit keeps what the metric ranks highest."""

    @property
    def steps(self) -> int:
        """In how many steps the model is pruned, each on what the one before has left."""
        return 1 + len(self.schedule)

    def check(self) -> None:
        starts = [name for name in ALLOCATION if not (ALLOCATION[name].modules or ALLOCATION[name].whole_blocks)]
        for flag, name, known in (("allocation", self.allocation, list(ALLOCATION)), ("start", self.start, starts)):
            if name not in known:
                raise UserError(f"--sparsity.{flag}: expected one of {', '.join(known)}, got '{name}'.")
        rule = ALLOCATION[self.allocation]
        if self.schedule and self.schedule[-1] == self.target:
            self.schedule = self.schedule[:-1]
        if self.schedule != sorted({*self.schedule}) or (self.schedule and self.schedule[-1] > self.target):
            raise UserError(
                f"--sparsity.schedule: expected rising sparsities below --sparsity.target {self.target:g}, got "
                f"{self.schedule}."
            )
        if self.schedule and ALLOCATION[self.start if rule.modules else self.allocation].whole_blocks:
            raise UserError("--sparsity.schedule: whole blocks go in one step; expected it without allocation depth.")
        check_options(self.start if rule.modules else self.allocation, self.options)
        if self.uniform_width and (self.protect or rule.whole_blocks):
            raise UserError(
                "--sparsity.uniform_width: blocks cannot be equally wide where some keep everything or go as a whole; "
                "expected it without --sparsity.protect and --sparsity.allocation depth."
            )


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
    """Development windows per learning corpus, for the curves: perplexity against epoch and against sparsity."""
    curve: list[Sparsity] = field(default_factory=lambda: [0.2, 0.35])
    """Sparsities, besides 0 and the target, at which gprune's masks are measured on development text."""
    samples: AtLeast0 = 3
    """Evaluated texts whose beginning the dense and the pruned model go on writing, for the page of the run."""
    controls: list[Control] = field(default_factory=lambda: ["base", "averaged", "unrecovered"])
    """Rows beside the run's own. base: the metric alone, uniform. averaged: the same, scored on all drift corpora.
    unrecovered: all rows without recovery as well, where there is one."""


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
    """What learns is kept so often, and a killed run goes on from there to the same bits; 0: after every step."""

    def check(self) -> None:
        if self.name and (self.name in (".", "..") or self.name != os.path.basename(self.name)):
            raise UserError(f"--run.name: expected the name of a folder inside --run.dir, got {self.name!r}.")
        if self.name and len(os.fsencode(self.name)) > 200:
            raise UserError(f"--run.name: expected at most 200 bytes, got {shown(self.name)}.")
