"""The groups of flags, as pydantic models whose attribute docstrings are the help.

There is one name per thing: `--sparsity.target` on the command line is `sparsity: {target: ...}` in YAML,
`RunConfig(sparsity=SparsityConfig(target=...))` in Python, and `sparsity.target` in W&B.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from gprune.checks import AtLeast1, AtLeast2, AtLeast8, Memory, NonNegative, Positive, Quantile, Text, refusal
from gprune.errors import UnregisteredError, UserError, nearest
from gprune.importance.metrics import IMPORTANCE
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.cost import COST
from gprune.sparsity.target import Asked, Target

# What modules may switch to besides activation-free metrics: the base metric seen through all drift corpora, as the
# mean of its ranks or scored on their pooled statistics.
CONSENSUS, AVERAGED = SEVERAL = ("consensus", "averaged")
AUTO = BeforeValidator(lambda given: None if given == "auto" else given)  # null in files
PLACES = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|(cuda|xpu|npu|mps)(:[0-9]{1,3})?")

INSTEAD = {  # of flags of Lightning's that have other names here, for who tries them
    "seed": "--run.seed",
    "seed_everything": "--run.seed",
    "ckpt_path": "the same command again, which goes on by itself",
    "optimizer": "--sparsity.learning_rate, --distill.learning_rate, or a stage of your own (docs/extend.md)",
    "import": "--import as a flag of the command: a file runs nobody's code",
    "trainer.max_epochs": "--sparsity.epochs (thresholds), --partition.steps (refinement), --distill.tokens",
    "trainer.max_time": "--trainer.callbacks '[{class_path: Timer, init_args: {duration: 00:12:00:00}}]'",
    "trainer.accumulate_grad_batches": "--distill.accumulate, or the callback GradientAccumulationScheduler",
    "trainer.limit_val_batches": "--evaluation.development_samples",
    "trainer.limit_test_batches": "--evaluation.num_samples and --corpora.num_samples",
    "distill.points": "--trainer.val_check_interval",
    "trainer.default_root_dir": "--run.dir",
    "trainer.enable_checkpointing": "--run.checkpoint_minutes",
}


class Group(
    BaseModel, strict=True, extra="forbid", validate_assignment=True, allow_inf_nan=False, use_attribute_docstrings=True
):
    """A group of flags. Raises UserError, which names the flag, for what it refuses.

    Types are checked whenever a value is given, also by assignment. What has to go together (`model_post_init`) is
    checked when the group is made, and by `validate`.
    """

    prefix: ClassVar[str]  # of the flags, with the dot
    plain_setting: ClassVar[str]  # the setting that a value in place of the whole group is for; empty: there is none

    def __init_subclass__(cls, prefix: str = "", plain_setting: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.prefix, cls.plain_setting = prefix, plain_setting

    def __init__(self, **values: Any) -> None:
        with self._refusing(*values):
            super().__init__(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        with self._refusing(name):
            super().__setattr__(name, value)

    @classmethod
    @contextlib.contextmanager
    def _refusing(cls, *names: str) -> Iterator[None]:
        for name in names:
            cls.check_name(name, cls.__name__)
        try:
            yield
        except ValidationError as error:
            own = error.errors(include_url=False)[0].get("ctx", {}).get("error")
            if isinstance(own, UserError):
                raise own from error
            raise UserError(f"{refusal(error, f'--{cls.prefix}')}.") from error

    @field_validator("*", mode="before")
    @classmethod
    def plain(cls, value: Any) -> Any:
        """Numbers and arrays of numpy and torch, paths and tuples as plain data; names in a mapping as text."""
        if type(value).__module__ in ("numpy", "torch") and hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, dict):
            return {str(key): cls.plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [cls.plain(inner) for inner in value]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @classmethod
    def check_name(cls, name: str, where: str) -> None:
        """Raise UserError, which begins with `where`, for what is no setting of the group."""
        if name not in cls.model_fields:
            if instead := INSTEAD.get(f"{cls.prefix}{name}"):
                raise UserError(f"{where}: there is no setting '{cls.prefix}{name}' here; expected {instead}.")
            near, known = nearest(name, cls.model_fields), ", ".join(cls.model_fields)
            hint = f"did you mean '{near}'?" if near else f"expected one of {known}."
            raise UserError(f"{where}: there is no setting '{cls.prefix}{name}'; {hint}")

    def validate(self) -> None:
        """Check everything again, after assignments and changes inside lists."""
        type(self)(**self.model_dump(warnings=False))


class ModelConfig(Group, prefix="model."):
    """Which model is pruned."""

    name: Text = "smollm2-135m"
    """Embedded name (smollm2-135m, gemma-3-270m, tiny-random), local Hugging Face folder, or hub id."""
    made_elsewhere: Text | None = None
    """Measure this model in place of pruning one: a folder or hub id of any causal language model, such as one that
    another tool has pruned. `name` is the dense model that it is compared with. Takes --recovery none or distill."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen weights; statistics are summed in float64."""
    device_map: Text | None = None
    """Passed to transformers, e.g. auto. Default: the model is on the trainer's device."""
    max_memory: Memory | None = None
    """Memory for weights by device number or cpu, e.g. {0: 20GiB, cpu: 60GiB}; needs device_map. Other weights stay on
    disk and are loaded block by block. Such a model has no gradients, but the pruned model can be distilled."""
    shard: bool = False
    """Shard the layers over all processes (PyTorch's fully_shard), for models that do not fit on one device."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    def model_post_init(self, _: Any) -> None:
        if self.device_map is not None and not PLACES.fullmatch(self.device_map):
            raise UserError(f"--model.device_map: expected auto or a device such as cuda:0, got '{self.device_map}'.")
        if self.max_memory is not None and self.device_map is None:
            raise UserError("--model.max_memory: expected --model.device_map auto with it.")


class CorporaConfig(Group, prefix="corpora."):
    """Which text is used for what. A corpus is an embedded name, a hub name, a folder in $GPRUNE_DATA_DIR/corpora, or
    a path to a .txt, .jsonl, .parquet or folder."""

    score: Text = "wiki"
    """The one corpus whose activations give the importance scores."""
    drift: list[Text] = Field(["wiki", "web", "python_code"])
    """Corpora between which rank drift is measured. With one there is no drift, and no module switches."""
    learn: list[Text] = Field(["wiki", "web", "python_code"])
    """Corpora on which thresholds are learned. The scoring corpus alone is our reading of the paper."""
    recover: list[Text] = Field(["wiki", "web", "python_code"])
    """Corpora that recovery reads: their statistics, or for least_squares_sequential and distill their text."""
    evaluate: list[Text] = Field(["wiki", "web", "stories", "technical", "python_docs"])
    """Corpora on which perplexity is reported (--evaluation.split), seen and unseen apart."""
    num_samples: AtLeast2 = 16
    """Calibration windows per corpus; at least two, because drift between their halves is the noise floor."""
    seq_len: AtLeast8 = 256
    """Tokens per window, in calibration and learning."""
    learn_samples: AtLeast1 | None = None
    """Windows per learning corpus; default: num_samples. More --sparsity.epochs repeat the same windows."""
    batch_size: AtLeast1 = 4
    """Windows per step, over all devices together."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every window begins with the BOS token, which is never scored. auto: if the tokenizer adds it."""
    collect: list[Literal["gram", "saliency"]] = Field([])
    """Statistics to cache for later runs: gram (for least_squares), saliency (for taylor)."""
    calibrator: Text = "streaming"
    """What collects statistics. streaming: one pass over each corpus. Or one registered from Python."""

    def model_post_init(self, _: Any) -> None:
        for role in ("drift", "learn", "recover", "evaluate"):
            names = getattr(self, role)
            if not names:
                raise UserError(f"--corpora.{role}: expected at least one corpus, got an empty list.")
            if len(set(names)) != len(names):
                raise UserError(f"--corpora.{role}: a corpus is named twice in {names}; name each once.")


class PartitionConfig(Group, prefix="partition."):
    """How each block's neurons are divided into modules."""

    num_modules: AtLeast1 = 8
    """K, modules per block to start from; those of fewer than max(32, N / 4K) of the N neurons are merged."""
    method: Literal["refined", "initial", "random", "drift_only"] = "refined"
    """refined: k-means, then differentiable refinement. Ablations: initial (no refinement), random (the refined
    sizes, random members), drift_only (the refined sizes, by drift alone)."""
    embedding_dim: AtLeast1 = 8
    """Principal directions of the parameter embedding."""
    steps: AtLeast1 = 120
    """Optimizer steps of the refinement."""
    learning_rate: Positive = 0.05
    """Adam step size of the refinement."""
    similarity_weight: NonNegative = 1.0
    """Weight of within-module parameter dispersion, in the initial partition and in the refinement."""
    drift_weight: NonNegative = 1.0
    """Weight of within-module variance of drift, in the initial partition and in the refinement."""
    consistency_weight: NonNegative = 2.0
    """Weight of the reward for rank consistency between corpora inside a module."""
    balance_weight: NonNegative = 0.1
    """Weight of equal module sizes."""
    entropy_weight: NonNegative = 0.1
    """Weight of decided assignments."""
    refiner: Text = "soft_assignment"
    """What refines. soft_assignment: gradient descent on soft assignments. Or one registered from Python."""


class ReliabilityConfig(Group, prefix="reliability."):
    """When a module's own ranking gives way to an activation-free metric."""

    switch: bool = True
    """Let sensitive, weakly activated modules switch. False: every module keeps the base metric."""
    everywhere: bool = False
    """Let all modules switch, reliable or not: a control."""
    metric: Text = "magnitude"
    """What to switch to: an activation-free metric; or consensus, the base metric's mean rank over the drift corpora;
    or averaged, the base metric scored on all of them together."""
    sensitivity_quantile: Quantile = 0.75
    """Modules above this quantile of standardised sensitivity count as sensitive."""
    score_quantile: Quantile = 0.5
    """Modules below this quantile of mean importance rank count as weakly activated."""

    def model_post_init(self, _: Any) -> None:
        if self.metric not in SEVERAL and not IMPORTANCE[self.metric].activation_free:
            known = ", ".join([name for name in IMPORTANCE if IMPORTANCE[name].activation_free] + [*SEVERAL])
            raise UserError(f"--reliability.metric: expected an activation-free metric ({known}), got '{self.metric}'.")
        if self.everywhere and not self.switch:
            raise UserError("--reliability.everywhere true: expected it without --reliability.switch false.")


class SparsityConfig(Group, prefix="sparsity."):
    """How much goes, from where, and how the sparsity of each module is found."""

    target: Asked = 0.5
    """How much goes: 0.5 of the scope's parameters, 30% of all, until 95M or 200MiB (as exported) are left, or until
    the model is 1.4x as fast in the setting of --speed. Or how much worse the model may become: +5% removes as much as
    keeps perplexity on development text, after --recovery, at most 5 % above dense (3% is a share of all parameters,
    +3% a quality)."""
    cost: Text | None = None
    """What the target counts, in place of what its unit says: parameters, kv_cache (numbers per token), or what is
    registered from Python."""
    scope: Annotated[
        Literal["ffn", "attention+ffn", "ffn+blocks", "attention+ffn+blocks"],
        BeforeValidator(lambda given: "+".join(sorted(str(given).split("+"), key="attention+ffn+blocks".find))),
    ] = "ffn"
    """ffn: whole FFN neurons. attention: whole KV groups too. blocks: whole blocks too. All in one budget."""
    block_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the target that whole blocks take at most; units of the other blocks make up the rest."""
    block_choice: Literal["loss", "influence"] = "loss"
    """Which blocks go. loss: the one without which the loss on a window of each of --corpora.drift is lowest, then
    again with it gone. influence: those that turn hidden states of the scoring corpus least (ShortGPT)."""
    allocation: Text = "learned"
    """How sparsity is allocated. learned: one threshold per module, trained around the frozen model. Without learning:
    uniform (every block alike), global (scores standardised per block, one threshold: FLAP), owl (blocks with more
    outliers lose less), reconstruction (blocks lose what costs the loss least behind least squares, by gradients on a
    little text), depth (whole blocks by influence: ShortGPT; needs --gprune false); each module then loses as much as
    the base metric takes from it. equal: every module of the model loses the same fraction."""
    start: Text = "uniform"
    """The base metric's allocation if --sparsity.allocation is learned or equal; learning starts from it."""
    options: dict[Text, float] = Field({})
    """Options of the allocation. owl: multiple (outliers are above this multiple of their block's mean; 5) and spread
    (largest distance of a block's sparsity from the target; 0.08). reconstruction: strength (how far blocks may differ:
    0 is uniform, 1 as the estimate has it; 0.75)."""
    protect: list[int] = Field([])
    """Decoder layers that keep everything, -1 being the last one. LLM-Pruner keeps [0,1,2,-1]."""
    width_multiple: Annotated[AtLeast1 | None, AUTO] = Field(
        default_factory=lambda given: None if str(given.get("target")).endswith("x") and not given.get("cost") else 1
    )
    """Widths end up on multiples of this: 64 or 128 suit matrix-multiply tiles and serving kernels (128 if quantised),
    32 the blocks of q8_0, 8 the grouped kernels of experts. auto, or null: the smallest of 1, 8, 16, ... 128 at which
    this machine loses nothing, by the table of a target of speed (its default). The overshoot is below a step."""
    uniform_width: bool = False
    """Give every block the same width and as many KV groups, the widest that reach the target: a stock model without
    code of its own, if the family's config can hold the sizes (gpt2, opt and gpt_neox: not fewer heads)."""
    learn: Literal["thresholds", "offsets", "both"] = "thresholds"
    """What is learned. thresholds: one number per module. offsets: one number per neuron, which shifts its rank;
    modules then only matter at the start. both: thresholds and offsets."""
    loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    """cross_entropy: of the next token. kl: divergence from the dense model, one more forward pass per step."""
    epochs: AtLeast1 = 1
    """Passes over the learning windows."""
    learning_rate: Positive = 0.1
    """Adam step size of the thresholds, in logits."""
    offset_learning_rate: Positive = 0.05
    """Adam step size of the offsets, in logits."""
    offset_limit: Positive = 1.2
    """Largest shift of a neuron's rank by its offset, in logits: it keeps the neurons that the metric ranks highest,
    whose loss gradients do not show."""
    centred: bool = True
    """Subtract the mean gradient over all units; otherwise Adam raises all gates together, and no mask changes."""
    learner: Text = "straight_through"
    """What learns. straight_through: gates that are hard forward and soft backward. Or one registered from Python."""

    def model_post_init(self, _: Any) -> None:
        """Raise UserError for flags that do not go together."""
        rule, start = ALLOCATION[self.allocation], ALLOCATION[self.start]
        if start.modules or start.whole_blocks:
            raise UserError(f"--sparsity.start: expected an allocation by blocks, such as uniform, got '{self.start}'.")
        if self.uniform_width and (self.protect or rule.whole_blocks):
            raise UserError("--sparsity.uniform_width: expected it without --sparsity.protect and allocation depth.")
        if "blocks" in self.scope and rule.whole_blocks:
            raise UserError(f"--sparsity.scope {self.scope}: expected it without blocks, which allocation depth takes.")
        if self.cost is not None:
            try:
                COST.check(self.cost)
            except UnregisteredError as error:
                raise UnregisteredError(f"--sparsity.cost: {error}") from error
        if self.cost and Target.of(self.target).unit == "bytes":
            raise UserError(f"--sparsity.target {self.target}: expected it without --sparsity.cost {self.cost}.")

    @property
    def quality(self) -> float | None:
        """The share of the dense perplexity that the target allows on top of it; None for a target in other units."""
        target = Target.of(self.target)
        return float(target.number) if target.unit == "quality" else None

    @property
    def currency(self) -> str:
        """What the target counts: `bytes`, `seconds`, or a registered cost."""
        return self.cost or {"x": "seconds", "bytes": "bytes"}.get(Target.of(self.target).unit, "parameters")
