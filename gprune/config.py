"""RunConfig: every flag of `python train.py`, as typed dataclasses whose attribute docstrings are the help.

There is one name per thing: `--sparsity.target` on the command line is `sparsity: {target: ...}` in YAML,
`RunConfig(sparsity=SparsityConfig(target=...))` in Python, and `sparsity.target` in W&B.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from gprune.calibration.statistics import EXTRAS
from gprune.corpora.load import check_corpus, identity
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.models.offload import memory_limits
from gprune.recovery.projection import NEEDS_GRAM, RECOVERY, SEQUENTIAL
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.budget import SCOPES

# What modules may switch to besides activation-free metrics: the base metric seen through all drift corpora, as the
# mean of its ranks or scored on their pooled statistics.
CONSENSUS, AVERAGED = SEVERAL = ("consensus", "averaged")
CONTROLS = ("base", "base_averaged", "unrecovered")
PartitionMethod = Literal["refined", "initial", "random", "drift_only"]


def _choose(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"--{flag}: expected one of {', '.join(allowed)}, got '{value}'.")


def _at_least(flag: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"--{flag}: expected {least} or more, got {value}.")


@dataclass
class ModelConfig:
    """Which model is pruned."""

    name: str = "smollm2-135m"
    """Embedded name (smollm2-135m, or tiny-random to try the machinery),
    local Hugging Face folder, or hub id such as meta-llama/Llama-3.2-1B."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen weights. Statistics are summed in float64 whatever it is."""
    device_map: str | None = None
    """Handed to transformers, e.g. auto. Without it the model goes where the trainer's device is."""
    max_memory: dict[str, str] | None = None
    """What weights may take, e.g. {0: 20GiB, cpu: 60GiB}, by device number or cpu; with device_map. The rest stays on
    disk and is fetched block by block: such a model can be calibrated, pruned and recovered, but nothing learned."""
    shard: bool = False
    """Spread the layers of the frozen model over all processes (PyTorch's fully_shard) while statistics are collected
    and thresholds learned, for models that do not fit one device. Needs two or more --trainer.devices or .num_nodes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            memory_limits(self.max_memory)
            if self.device_map is None:
                raise UserError("--model.max_memory: expected --model.device_map auto with it, got no device_map.")


@dataclass
class CorporaConfig:
    """Which text is used for what. A corpus is an embedded name, a hub name, a name in $GPRUNE_DATA_DIR, or a path
    to a .txt, .jsonl, .parquet or folder."""

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
    num_samples: int = 16
    """Calibration windows per corpus."""
    seq_len: int = 256
    """Tokens per window, in calibration and learning."""
    learn_samples: int | None = None
    """Windows per learning corpus; default: num_samples. More of them is fresh text for learning, in place of epochs
    over the same."""
    batch_size: int = 4
    """Windows per step, over all devices together."""
    collect: list[Literal["gram", "saliency"]] = field(default_factory=list)
    """Collect these in a calibration pass although this run does not need them, so that later runs (obs,
    least_squares: gram; taylor: saliency) find them in the cache."""

    def __post_init__(self) -> None:
        _at_least("corpora.batch_size", self.batch_size, 1)
        _at_least("corpora.num_samples", self.num_samples, 2)  # two halves, for the noise floor
        _at_least("corpora.seq_len", self.seq_len, 8)
        if self.learn_samples is not None:
            _at_least("corpora.learn_samples", self.learn_samples, 1)
        for kind in self.collect:
            _choose("corpora.collect", kind, EXTRAS)
        for role in ("drift", "learn", "recover", "evaluate"):
            names = getattr(self, role)
            if not names:
                raise UserError(f"--corpora.{role}: expected at least one corpus, got an empty list.")
            if len(set(names)) != len(names):
                raise UserError(f"--corpora.{role}: a corpus is named twice in {names}; name each once.")


@dataclass
class PartitionConfig:
    """How each block's neurons are divided into modules."""

    num_modules: int = 8
    """Modules per block to start from; modules below max(32, N / 4K) neurons are merged."""
    method: PartitionMethod = "refined"
    """refined: k-means, then differentiable refinement. Ablations: initial (no refinement), random (the refined
    sizes, random members), drift_only (the refined sizes, by drift alone)."""
    subtract_noise: bool = False
    """Subtract the split-half noise floor from rank drift."""
    embedding_dim: int = 8
    """Principal directions of the parameter embedding."""
    steps: int = 120
    """Optimizer steps of the refinement."""
    learning_rate: float = 0.05
    """Adam step size of the refinement."""
    similarity_weight: float = 1.0
    """Weight of within-module parameter dispersion, in the start and in the refinement."""
    drift_weight: float = 1.0
    """Weight of within-module variance of drift, in the start and in the refinement."""
    consistency_weight: float = 2.0
    """Weight of the reward for rank consistency between corpora inside a module."""
    balance_weight: float = 0.1
    """Weight of equal module sizes."""
    entropy_weight: float = 0.1
    """Weight of decided assignments."""

    def __post_init__(self) -> None:
        _choose("partition.method", self.method, ("refined", "initial", "random", "drift_only"))
        _at_least("partition.num_modules", self.num_modules, 1)
        _at_least("partition.embedding_dim", self.embedding_dim, 1)
        _at_least("partition.steps", self.steps, 1)
        if not self.learning_rate > 0:
            raise UserError(f"--partition.learning_rate: expected a positive number, got {self.learning_rate}.")
        for name in ("similarity", "drift", "consistency", "balance", "entropy"):
            _at_least(f"partition.{name}_weight", getattr(self, f"{name}_weight"), 0)


@dataclass
class ReliabilityConfig:
    """When a module's own ranking gives way to an activation-free metric."""

    switch: bool = True
    """Let sensitive, weakly activated modules switch. False: every module keeps the base metric."""
    everywhere: bool = False
    """Let all modules switch, reliable or not: the switch's own control."""
    metric: str = "magnitude"
    """What to switch to: an activation-free metric; or consensus, the base metric's mean rank over the drift corpora;
    or averaged, the base metric scored on all of them together."""
    sensitivity_quantile: float = 0.75
    """Modules above this quantile of standardised sensitivity count as sensitive."""
    score_quantile: float = 0.5
    """Modules below this quantile of mean importance rank count as weakly activated."""

    def __post_init__(self) -> None:
        for name in ("sensitivity_quantile", "score_quantile"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"--reliability.{name}: expected a quantile in [0, 1], got {value}.")
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


@dataclass
class SparsityConfig:
    """How much goes, from where, and how the sparsity of each module is found."""

    target: float = 0.5
    """Fraction of the scope's parameters to remove, inside (0, 1)."""
    scope: str = "ffn"
    """ffn: whole FFN neurons. attention+ffn: whole KV groups too, in the same budget."""
    allocation: str = "learned"
    """How sparsity is spread. learned: one threshold per module, trained around the frozen model. Without learning:
    uniform (every block alike), global (scores standardised per block, one threshold: FLAP), owl (blocks with more
    outliers lose less), depth (whole blocks by influence: ShortGPT; with --gprune false). Under these every module
    keeps as much as the base metric keeps of it. equal: every module of the model loses the same fraction."""
    start: str = "uniform"
    """The base metric's allocation where thresholds are learned or equal, and where learning starts."""
    protect: list[int] = field(default_factory=list)
    """Blocks that keep everything, -1 being the last one. LLM-Pruner keeps [0,1,2,-1]."""
    owl_multiple: float = 5.0
    """owl: an element above this multiple of its block's mean is an outlier."""
    owl_spread: float = 0.08
    """owl: how far a block's sparsity may lie from the target."""
    width_multiple: int = 1
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
    through: Literal["none", "least_squares"] = "none"
    """What stands between masks and loss while they are learned. none: removed units are gone, as in the paper.
    least_squares: those that stay make up for them, as --recovery least_squares would have it; for runs that end in
    recovery. Solved anew every few steps, which costs a float64 Cholesky factor per block each time."""
    objective: Literal["mean", "worst"] = "mean"
    """Over the learning corpora. mean: of their losses. worst: corpora whose loss is farthest above the dense model's
    gain weight as learning goes on (group DRO, arXiv 1911.08731); with cross_entropy one more forward pass per step."""
    worst_step: float = 0.1
    """worst: how fast weights move, per nat and step."""
    epochs: int = 2
    """Passes over the learning windows."""
    learning_rate: float = 0.1
    """Adam step size of the thresholds, in logits."""
    offset_learning_rate: float = 0.05
    """Adam step size of the offsets, in logits."""
    offset_limit: float = 1.2
    """How far an offset may move a neuron's rank, in logits. A gradient does not see what removing a neuron that
    carries most of its block would do; a limit keeps what the metric ranks highest."""

    def __post_init__(self) -> None:
        _choose("sparsity.scope", self.scope, SCOPES)
        _choose("sparsity.learn", self.learn, ("thresholds", "offsets", "both"))
        _choose("sparsity.loss", self.loss, ("cross_entropy", "kl"))
        _choose("sparsity.objective", self.objective, ("mean", "worst"))
        _choose("sparsity.through", self.through, ("none", "least_squares"))
        _at_least("sparsity.worst_step", self.worst_step, 0)
        _choose("sparsity.allocation", self.allocation, ("learned", *ALLOCATION, "depth", "equal"))
        _choose("sparsity.start", self.start, tuple(ALLOCATION))
        _at_least("sparsity.epochs", self.epochs, 1)
        _at_least("sparsity.width_multiple", self.width_multiple, 1)
        for name in ("learning_rate", "offset_learning_rate", "offset_limit"):
            if not getattr(self, name) > 0:
                raise UserError(f"--sparsity.{name}: expected a positive number, got {getattr(self, name)}.")
        _at_least("sparsity.owl_multiple", self.owl_multiple, 1)
        _at_least("sparsity.owl_spread", self.owl_spread, 0)
        if self.uniform_width and (self.protect or self.allocation == "depth"):
            raise UserError(
                "--sparsity.uniform_width: blocks cannot be equally wide where some keep everything or go as a whole; "
                "expected it without --sparsity.protect and --sparsity.allocation depth."
            )
        if not 0 < self.target < 1:
            raise UserError(
                f"--sparsity.target: expected a fraction of parameters removed inside (0, 1), got {self.target}; "
                f"half the parameters is 0.5."
            )


@dataclass
class EvaluationConfig:
    """What is measured at the end."""

    split: Literal["test", "development", "train"] = "test"
    """Which text is measured on. Settings are chosen on development text, so that test text stays unseen; or on the
    longer train text of corpora that neither the run nor any report uses."""
    num_samples: int = 6
    """Windows per evaluated corpus: a sample of its split that is the same for every seed."""
    seq_len: int = 256
    """Tokens per window. Windows do not overlap (stride = seq_len) and start without BOS."""
    development_samples: int = 2
    """Development windows per learning corpus, for the curves: perplexity against epoch and against sparsity."""
    curve: list[float] = field(default_factory=lambda: [0.2, 0.35])
    """Sparsities, besides 0 and the target, at which gprune's masks are measured on development text."""
    controls: list[Literal["base", "base_averaged", "unrecovered"]] = field(default_factory=lambda: list(CONTROLS))
    """Rows beside the run's own. base: the metric alone, uniform. base_averaged: the same, scored on all drift corpora.
    unrecovered: all rows without recovery as well, where there is one."""

    def __post_init__(self) -> None:
        for name in self.controls:
            _choose("evaluation.controls", name, CONTROLS)
        _choose("evaluation.split", self.split, ("test", "development", "train"))
        for name in ("num_samples", "development_samples"):
            _at_least(f"evaluation.{name}", getattr(self, name), 1)
        _at_least("evaluation.seq_len", self.seq_len, 8)
        for value in self.curve:
            if not 0 < value < 1:
                raise UserError(f"--evaluation.curve: expected sparsities inside (0, 1), got {value}.")


@dataclass
class LoggingConfig:
    """Weights & Biases, with a CSV file beside it."""

    mode: Literal["offline", "online", "disabled"] | None = None
    """Default: $WANDB_MODE, else offline (files in the run folder, no account needed)."""
    project: str = "gprune"
    """W&B project."""
    group: str | None = None
    """W&B group; by default the model's name, so that ablations of one model stand together."""
    tags: list[str] = field(default_factory=list)
    """Further W&B tags; metric, scope and allocation are always there."""

    def __post_init__(self) -> None:
        if self.resolved_mode not in ("offline", "online", "disabled"):
            raise UserError(
                f"WANDB_MODE: expected offline, online or disabled, got '{self.resolved_mode}'; or use --logging.mode."
            )

    @property
    def resolved_mode(self) -> str:
        return self.mode or os.environ.get("WANDB_MODE") or "offline"


@dataclass
class TrainerConfig:
    """Lightning's own flags."""

    accelerator: str = "auto"
    """cpu, gpu, or auto."""
    devices: int = 1
    """Processes per node; statistics and thresholds agree with one process."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "auto"
    """auto or ddp."""

    def __post_init__(self) -> None:
        _at_least("trainer.devices", self.devices, 1)
        _at_least("trainer.num_nodes", self.num_nodes, 1)
        _choose("trainer.strategy", self.strategy, ("auto", "ddp"))


@dataclass
class RunFolderConfig:
    """Where results go."""

    dir: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Folder of this run inside it. Default: model, metric, sparsity and a hash of all settings."""
    seed: int = 0
    """Seed of everything drawn: windows, partition, order of learning."""

    def __post_init__(self) -> None:
        if self.name and (self.name in (".", "..") or self.name != os.path.basename(self.name) or "\0" in self.name):
            raise UserError(f"--run.name: expected the name of a folder inside --run.dir, got {self.name!r}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--run.seed: expected 0 to {2**32 - 1}, got {self.seed}.")


@dataclass
class RunConfig:
    """Generalization-aware structured pruning of a large language model.

    Prunes FFN neurons (and attention KV groups) of a frozen model: measures how each neuron's importance rank drifts
    between text distributions, divides neurons into modules that behave alike, ranks inside them, learns how sparse
    each module should be, prunes, and reports perplexity on text that was used and on text never seen.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    corpora: CorporaConfig = field(default_factory=CorporaConfig)
    importance: str = "wanda_sp"
    """Base importance metric, or one registered from Python. From activations: wanda_sp, wifn, wifv, ifv, act_norm,
    obs; from gradients: taylor, taylor_second, taylor_vector; from weights alone: magnitude, magnitude_l1,
    magnitude_down, magnitude_down_l1, gaussian_sp; random as a control."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    recovery: str = "none"
    """Recovery without training. none is the paper's method; what goes beyond it: bias (means of what was removed),
    least_squares (output projections solved again on the dense model's activations), least_squares_sequential (block
    by block, on those of the pruned and recovered model so far; costs some three forward passes for each pruned
    model), or one registered from Python."""
    ridge: float = 0.01
    """Ridge of least_squares, of least_squares_sequential and of --sparsity.through, relative to the mean diagonal of
    the Gram matrix."""
    gprune: bool = True
    """False: the base metric alone; --sparsity.allocation learned then means uniform."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    export: Literal["hf", "gguf", "none"] = "hf"
    """hf: the pruned model as a Hugging Face folder, reloaded and compared. gguf: that, and a GGUF file beside it, run
    in a llama.cpp build and compared (`python -m gprune.export.job` has its types). none: masks and numbers only."""
    dry_run: bool = False
    """Say tokens, passes, expected memory and resulting widths, and stop before anything is computed."""

    def __post_init__(self) -> None:
        _choose("export", self.export, ("hf", "gguf", "none"))
        IMPORTANCE[self.importance]
        RECOVERY[self.recovery]
        _at_least("ridge", self.ridge, 0)
        if self.model.shard and self.trainer.devices * self.trainer.num_nodes < 2:
            raise UserError(
                "--model.shard: expected two or more processes (--trainer.devices, .num_nodes) to spread the model "
                "over, got one; --model.device_map auto spreads it over the devices of one process."
            )
        if self.gprune and self.sparsity.allocation == "depth":
            raise UserError("--sparsity.allocation depth: a baseline without modules; expected --gprune false with it.")
        for flag, given in (
            ("--partition.method drift_only", self.partition.method == "drift_only"),
            ("--reliability.everywhere true", self.reliability.everywhere),
        ):
            if self.gprune and given and len(self.corpora.drift) < 2:
                raise UserError(f"{flag}: expected two or more --corpora.drift, got {self.corpora.drift}.")
        if self.learns_recovered and self.recovery not in NEEDS_GRAM | SEQUENTIAL:
            raise UserError(
                f"--sparsity.through {self.sparsity.through}: expected a run that ends in least squares, got "
                f"--recovery {self.recovery}; add --recovery least_squares, or learn with --sparsity.through none."
            )

    @property
    def learns(self) -> bool:
        """Whether thresholds are learned."""
        return self.gprune and self.sparsity.allocation == "learned"

    @property
    def learns_recovered(self) -> bool:
        """Whether thresholds are learned around the recovered model."""
        return self.learns and self.sparsity.through != "none"

    @property
    def base_allocation(self) -> str:
        """How the base metric's sparsity is spread over blocks: in its own rows, and where learning starts."""
        return self.sparsity.start if self.sparsity.allocation in ("learned", "equal") else self.sparsity.allocation

    @property
    def needs(self) -> frozenset[str]:
        """What of `statistics.EXTRAS` the run reads."""
        gram = frozenset({"gram"} if self.recovery in NEEDS_GRAM or self.learns_recovered else ())
        # gprune also scores by what stands in for drift and by what modules switch to
        names = {self.importance, *([IMPORTANCE[self.importance].drift, self.reliability.metric] * self.gprune)}
        return gram.union(*(IMPORTANCE[name].needs for name in names - set(SEVERAL)))

    @property
    def collects(self) -> frozenset[str]:
        """What of `statistics.EXTRAS` a calibration pass of this run collects: what it reads, and for later runs."""
        return self.needs | set(self.corpora.collect)

    @property
    def stages(self) -> list[tuple[str, str]]:
        """(stage, recovery) of every row of the result table after `dense`."""
        names, controls = ["base"], self.evaluation.controls
        if self.gprune:
            names = [name for name in ("base", "base_averaged") if name in controls] + ["gprune"]
        recoveries = [self.recovery]
        if self.recovery != "none" and "unrecovered" in controls:
            recoveries = ["none", self.recovery]
        return [(name, recovery) for recovery in recoveries for name in names]

    @property
    def roles(self) -> dict[str, list[str]]:
        """Corpora whose train text this run reads, by what it reads them for; roles it does not play are empty."""
        c = self.corpora
        return {
            "score": [c.score],
            "drift": c.drift if self.gprune else [],
            "learn": c.learn if self.learns else [],
            "recover": c.recover if self.recovery != "none" or self.learns_recovered else [],
        }

    @property
    def calibration(self) -> list[str]:
        """Every corpus that statistics are collected on, each once, in a fixed order."""
        roles = self.roles
        text_alone = self.recovery in SEQUENTIAL and not self.learns_recovered
        recover = [] if text_alone else roles["recover"]
        return list(dict.fromkeys([*roles["score"], *roles["drift"], *recover]))

    @property
    def used(self) -> list[str]:
        """Corpora whose train text the run reads, each once: evaluated, they count as seen."""
        return list(dict.fromkeys(name for names in self.roles.values() for name in names))

    def validate(self) -> None:
        """Check every value again: attributes may have been set after the object was made.

        Raises:
            UserError: as when the object was made with such a value.
        """
        for field_ in fields(self):
            check = getattr(getattr(self, field_.name), "__post_init__", None)
            if check is not None:
                check()
        self.__post_init__()

    def resolved(self) -> dict:
        """All settings as plain data, with the defaults that depend on others filled in."""
        plain = asdict(self)
        plain["logging"]["mode"] = self.logging.resolved_mode
        plain["run"]["name"] = self.run_name
        return plain

    def check_names(self) -> None:
        """Look every corpus name up, without reading text.

        Raises:
            UserError: listing the corpora there are; or naming one that would be measured on the text it calibrates.
        """
        for name in dict.fromkeys([*self.used, *self.corpora.evaluate]):
            check_corpus(name)
        used = {identity(name) for name in self.used}
        if self.evaluation.split == "train" and (
            both := [name for name in self.corpora.evaluate if identity(name) in used]
        ):
            raise UserError(
                f"--evaluation.split train: expected corpora that the run does not read, got '{both[0]}'; leave it out "
                f"of --corpora.evaluate, or measure on development text."
            )

    def settings(self) -> dict:
        """Everything that can change a result, as plain data: what two runs must share to share a folder.

        Left out: where results go, how they are logged, what is exported, what is collected for others, and where
        weights lie meanwhile.
        """
        plain = asdict(self)
        for place in ("max_memory", "shard"):
            plain["model"].pop(place)
        for group in ("logging", "export", "dry_run"):
            plain.pop(group)
        plain["corpora"].pop("collect")
        plain["run"] = {"seed": self.run.seed}
        plain["trainer"] = {"world_size": self.trainer.devices * self.trainer.num_nodes}
        return plain

    @property
    def run_name(self) -> str:
        """`--run.name`, or a name that equal settings share and different settings do not."""
        if self.run.name:
            return self.run.name
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        model = os.path.basename(os.path.normpath(self.model.name))
        kind = "gprune" if self.gprune else "base"
        return f"{model}-{kind}-{self.importance}-{self.sparsity.target:g}-{digest}"
