"""The groups of flags, as typed dataclasses whose attribute docstrings are the help.

There is one name per thing: `--sparsity.target` on the command line is `sparsity: {target: ...}` in YAML,
`RunConfig(sparsity=SparsityConfig(target=...))` in Python, and `sparsity.target` in W&B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_type_hints

from gprune.checks import (
    AtLeast1,
    AtLeast2,
    AtLeast8,
    NonNegative,
    Positive,
    Quantile,
    Sparsity,
    check,
    memory_limits,
)
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.sparsity.allocation import ALLOCATION, check_options

# What modules may switch to besides activation-free metrics: the base metric seen through all drift corpora, as the
# mean of its ranks or scored on their pooled statistics.
CONSENSUS, AVERAGED = SEVERAL = ("consensus", "averaged")
PLACES = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|(cuda|xpu|npu|mps)(:[0-9]{1,3})?")


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
    """Spread the layers of a model over all processes (PyTorch's fully_shard) where it computes: statistics, learning,
    perplexity; for models that do not fit one device. Needs two or more --trainer.devices or .num_nodes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    def check(self) -> None:
        """Raise UserError for a place or a limit that no model can have."""
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
    """Corpora on which thresholds are learned (train split). The scoring corpus alone is our reading of the
    paper."""
    recover: list[str] = field(default_factory=lambda: ["wiki", "web", "python_code"])
    """Corpora that recovery reads: their statistics, or for least_squares_sequential and distill their text."""
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

    def check(self) -> None:
        """Raise UserError for a metric that modules cannot fall back on."""
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
class SparsityConfig(Group):
    """How much goes, from where, and how the sparsity of each module is found."""

    prefix: ClassVar[str] = "sparsity."
    target: Sparsity = 0.5
    """Fraction of the scope's parameters to remove, inside (0, 1)."""
    schedule: list[Sparsity] = field(default_factory=list)
    """Sparsities on the way to the target, rising, such as [0.3, 0.4]: at each the model is pruned and recovered, and
    what is left is scored again. --distill.tokens are shared between the steps. Needs
    --evaluation.controls []."""
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
    result is a stock model that needs nobody's code, where the family's config can say the sizes (gpt2, opt and
    gpt_neox can say no fewer heads); what sparsity it reaches is printed."""
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

    centred: bool = True
    """Take the mean over all units off the gradient. Opening any unit lowers the loss, so that Adam, which sees signs
    more than sizes, moves all thresholds the same way where modules are large or text is little; what is left says
    which units matter more."""

    @property
    def steps(self) -> int:
        """In how many steps the model is pruned, each on what the one before has left."""
        return 1 + len(self.schedule)

    def check(self) -> None:
        """Raise UserError for an allocation, budget or option that cannot be."""
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
