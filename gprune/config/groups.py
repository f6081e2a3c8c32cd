"""Groups of flags as pydantic models. The docstring of an attribute is the flag's help.

A setting has the same name everywhere: `--sparsity.target` on the command line is `sparsity: {target: ...}` in YAML,
`RunConfig(sparsity=SparsityConfig(target=...))` in Python, and `sparsity.target` in W&B.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    WrapValidator,
    field_validator,
)

from gprune.checks import (
    AtLeast1,
    AtLeast2,
    AtLeast8,
    Memory,
    NonNegative,
    NumberOrBool,
    Positive,
    Quantile,
    Text,
    format_value,
    validation_message,
)
from gprune.errors import UserError, closest_name
from gprune.importance.metrics import IMPORTANCE
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.target import Target, TargetSetting, split_scope

# Values of --reliability.metric besides activation-free metrics: the mean rank of the base metric over the drift
# corpora, and the base metric computed from their pooled statistics.
CONSENSUS, AVERAGED = "consensus", "averaged"
MULTI_CORPUS_METRICS = (CONSENSUS, AVERAGED)
DEFAULT_MULTIPLE = "default"  # value of --sparsity.width_multiple for `budget.default_width_multiple`


def _parse_multiple(value: Any, check: Callable[[Any], int | None]) -> Any:
    """Return a width multiple: a number that passes pydantic's `check`, or `DEFAULT_MULTIPLE`.

    Records have None for the former value auto, which runs refuse.
    """
    if value == DEFAULT_MULTIPLE:
        return value
    if isinstance(value, str):
        raise UserError(f"--sparsity.width_multiple must be a whole number or {DEFAULT_MULTIPLE}; got '{value}'.")
    return check(value)


WidthMultiple = Annotated[AtLeast1 | None, WrapValidator(_parse_multiple), PlainSerializer(lambda value: value)]
DEVICE_MAP = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|(cuda|xpu|npu|mps)(:[0-9]{1,3})?")


class Identity(Enum):
    """Marker of a setting, or a group, that does not always identify a run. Without a marker it does."""

    NEVER = "never, unless the run uses it and `RunConfig.settings` adds it"
    IF_CHANGED = "unless it has its default value, since settings stored by earlier versions may lack it"


NEVER, IF_CHANGED = Identity
SCOPES = (  # values of --sparsity.scope, with their parts in this order
    "ffn", "attention+ffn", "ffn+blocks", "attention+ffn+blocks", "experts", "ffn+experts", "attention+ffn+experts",
    "experts+blocks", "ffn+experts+blocks", "attention+ffn+experts+blocks",
)  # fmt: skip

REPLACEMENTS = {  # flags of Lightning's command line, and names that only files have -> what to use instead
    "seed": "--run.seed",
    "seed_everything": "--run.seed",
    "ckpt_path": "the same command again, which resumes the run",
    "optimizer": "--sparsity.learning_rate, --distill.learning_rate, or a stage of your own (docs/extend.md)",
    "import": "the command's flag --import; files cannot import code",
    "model.made_elsewhere": "gprune.measure in Python, or a row `model: FOLDER` of a list",
}


class Group(
    BaseModel, strict=True, extra="forbid", validate_assignment=True, allow_inf_nan=False, use_attribute_docstrings=True
):
    """A group of flags. An invalid value raises UserError with the name of the flag.

    Types and ranges are checked in the constructor and on assignment. Rules about several settings of a group
    (`model_post_init`) are checked in the constructor. Names of features, and what features refuse, are checked by
    `check` before a run begins. So settings of a record can be read without the code of its features.
    """

    prefix: ClassVar[str]  # prefix of the flags, including the dot
    plain_setting: ClassVar[str]  # field set by a bare value (`--export gguf` sets `export.format`), or empty

    def __init_subclass__(cls, prefix: str = "", plain_setting: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.prefix, cls.plain_setting = prefix, plain_setting

    def __init__(self, **values: Any) -> None:
        with self._user_errors(*values):
            super().__init__(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):  # a private attribute, which is no setting
            return super().__setattr__(name, value)
        with self._user_errors(name):
            super().__setattr__(name, value)

    @classmethod
    @contextlib.contextmanager
    def _user_errors(cls, *names: str) -> Iterator[None]:
        """Check that the settings exist, and convert pydantic's errors to UserError."""
        for name in names:
            cls.check_name(name, cls.__name__)
        try:
            yield
        except ValidationError as error:
            raised_by_check = error.errors(include_url=False)[0].get("ctx", {}).get("error")
            if isinstance(raised_by_check, UserError):
                raise raised_by_check from error
            raise UserError(f"{validation_message(error, f'--{cls.prefix}')}.") from error

    @field_validator("*", mode="before")
    @classmethod
    def to_plain_data(cls, value: Any) -> Any:
        """Convert a value to types that YAML and JSON can store.

        NumPy and torch values become numbers and lists, tuples become lists, and paths and dictionary keys become str.
        """
        if type(value).__module__ in ("numpy", "torch") and hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, dict):
            return {str(key): cls.to_plain_data(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [cls.to_plain_data(item) for item in value]
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        return value

    @classmethod
    def check_name(cls, name: str, where: str) -> None:
        """Raise UserError if the group has no setting `name`. The message begins with `where`."""
        if name not in cls.model_fields:
            replacement = REPLACEMENTS.get(f"{cls.prefix}{name}")
            closest = closest_name(name, cls.model_fields)
            suggestion = f"Did you mean '{closest}'? " if closest else ""
            hint = f"Use {replacement}" if replacement else f"{suggestion}Available: {', '.join(cls.model_fields)}"
            raise UserError(f"{where}: Unknown setting '{cls.prefix}{name}'. {hint}.")

    def check(self) -> None:
        """Raise UserError for a name that is not registered, and for settings that contradict what is registered."""

    def validate(self) -> None:
        """Check all settings, also after assignments and changes inside lists."""
        type(self)(**self.model_dump(warnings=False))
        self.check()


class ModelConfig(Group, prefix="model."):
    """The model to prune."""

    name: Text = "smollm2-135m"
    """Embedded name (smollm2-135m, gemma-3-270m, tiny-random), local Hugging Face folder, or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen weights; statistics are accumulated in float64."""
    device_map: Text | None = None
    """Passed to transformers, such as auto. Default: the whole model is on the Trainer's device."""
    max_memory: Annotated[Memory | None, NEVER] = None
    """Memory for weights by device number or cpu, such as {0: 20GiB, cpu: 60GiB}; needs --model.device_map. Weights
    that do not fit stay on disk, and every forward pass loads them. Gram matrices of all corpora that exceed the
    smallest limit are stored in the cache, and collected in several passes over the text: those of one pass take at
    most this limit, in addition to the weights. Gradients of an offloaded model are not available, but the pruned model
    can be distilled."""
    trust_remote_code: bool = False
    """Run Python code in the model's repository. Use it only if you have read that code."""

    def model_post_init(self, _: Any) -> None:
        """Raise UserError for an unknown device map, and for limits of memory without a device map."""
        if self.device_map is not None and not DEVICE_MAP.fullmatch(self.device_map):
            raise UserError(f"--model.device_map must be auto or a device such as cuda:0; got '{self.device_map}'.")
        if self.max_memory is not None and self.device_map is None:
            raise UserError("--model.max_memory needs --model.device_map auto.")


def _one_name_to_list(names: Any) -> Any:
    """Convert the name of a single corpus to a list."""
    return [names] if isinstance(names, str) else names


def _as_text(text: Any) -> Any:
    """Return `--corpora.text` as a list of names, or as shares by name. UserError for another type or other shares."""
    text = _one_name_to_list(text)
    is_list = isinstance(text, list) and all(isinstance(name, str) for name in text)
    is_mixture = isinstance(text, dict) and all(isinstance(share, int | float) for share in text.values())
    if text is not None and not is_list and not is_mixture:
        raise UserError(
            f"--corpora.text must be a name, a list of names, or shares by name such as '{{a.txt: 0.7, c4: 0.3}}'; got "
            f"{format_value(text)}."
        )
    if not is_mixture:
        return text
    total = sum(text.values())
    if not all(share > 0 for share in text.values()) or abs(total - 1) > 1e-6:
        raise UserError(f"--corpora.text must have shares above 0 that add up to 1; got {text}, in all {total:g}.")
    return {name: float(share) for name, share in text.items()}


def name_or_list(names: Any) -> Any:
    """Convert a list of one corpus to its name, the form in which settings are stored."""
    return names[0] if isinstance(names, list) and len(names) == 1 else names


ROLES = ("score", "drift", "learn", "recover", "evaluate")  # settings of `CorporaConfig` that name corpora


def roles_of_text(text: Any, evaluate: Any) -> dict[str, list[str]]:
    """Return the settings that `--corpora.text` stands for, by name; empty without a text, or if a type is wrong.

    `evaluate` are the corpora of `--corpora.evaluate` until then, which stay as text that the run does not use.
    """
    text = _one_name_to_list(text)
    if not text or not isinstance(text, list | dict) or not isinstance(evaluate, list):
        return {}
    text = [*text]
    return dict.fromkeys(ROLES, text) | {"evaluate": [*text, *(name for name in evaluate if name not in text)]}


class CorporaConfig(Group, prefix="corpora."):
    """Corpora for each step. A corpus is an embedded name, a hub name, a folder in $GPRUNE_DATA_DIR/corpora, or the
    path of a .txt, .jsonl, .csv or .parquet file or of a folder. Rows have a string `text`, or in .jsonl `messages` for
    the chat template of the model's tokenizer."""

    text: Annotated[
        list[Text] | dict[Text, float] | None, BeforeValidator(_as_text), PlainSerializer(name_or_list), NEVER
    ] = None
    """Your own text, such as mine.jsonl or [mine.jsonl,c4]: short for --corpora.score, drift, learn and recover with
    this text, and for reporting it before the other corpora of --corpora.evaluate. {mine.jsonl: 0.7, c4: 0.3} gives
    shares of the windows and of the training tokens, which otherwise are equal. Of a file, 10 % are development text,
    and 20 % are only reported. Short text is used several times, see --distill.repeat. Flags that follow may change a
    role again."""
    score: Annotated[list[Text] | None, BeforeValidator(_one_name_to_list), PlainSerializer(name_or_list)] = Field(
        ["wiki"]
    )
    """Corpus for the activations of importance scores, or a list of corpora, whose statistics are pooled. null: all of
    --corpora.drift. Learning starts from masks that are scored on the first one."""
    drift: list[Text] = Field(["wiki", "web", "python_code"])
    """Corpora between which rank drift is measured. With a single corpus drift is 0 and no module switches."""
    learn: list[Text] = Field(["wiki", "web", "python_code"])
    """Corpora on which thresholds are learned. In our reading, the paper uses the scoring corpus alone."""
    recover: list[Text] = Field(["wiki", "web", "python_code"])
    """Corpora for recovery: their statistics, or their text for distill."""
    evaluate: list[Text] = Field(["wiki", "web", "stories", "technical", "python_docs"])
    """Corpora on which perplexity is reported (--evaluation.split), with seen and unseen corpora apart."""
    num_samples: AtLeast2 = 16
    """Calibration windows per corpus. At least two, because the drift between two halves is the noise floor."""
    seq_len: AtLeast8 = 256
    """Tokens per window in calibration and learning."""
    learn_samples: AtLeast1 | None = None
    """Windows per learning corpus. Default: --corpora.num_samples. Every epoch of --sparsity.epochs uses the same
    windows."""
    batch_size: AtLeast1 = 4
    """Windows per step, over all devices together."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every window begins with the BOS token, which is never scored. auto: if the tokenizer adds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "text":
            self._take_roles()

    def _take_roles(self, *, without: Collection[str] = ()) -> None:
        """Set the roles that `text` stands for, without some of them."""
        for role, corpora in roles_of_text(self.text, self.evaluate).items():
            if role not in without:
                setattr(self, role, corpora)

    def model_post_init(self, _: Any) -> None:
        """Set what `text` stands for and is not given. Raise UserError if a role has no corpora, or a corpus twice."""
        self._take_roles(without=set(self.model_fields_set))
        for role in ROLES:
            names = self.scored if role == "score" else getattr(self, role)
            if not names:
                raise UserError(f"--corpora.{role} must name at least one corpus; got an empty list.")
            if len(set(names)) != len(names):
                raise UserError(f"--corpora.{role} must name each corpus once; got {names}.")

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the corpora in a mixture, which `text` has; empty if all corpora have the same share."""
        return self.text if isinstance(self.text, dict) else {}

    def windows_of(self, corpora: Sequence[str], each: int, *, least: int = 1) -> dict[str, int]:
        """Return the number of windows of each corpus: `each`, or `each` on average by `shares`, and at least `least`.

        Raise UserError for a corpus without a share.
        """
        if not self.shares or each <= 0:
            return dict.fromkeys(corpora, each)
        if missing := [name for name in corpora if name not in self.shares]:
            raise UserError(
                f"--corpora.text must have a share of each corpus that the run reads ({', '.join(corpora)}); got none "
                f"of '{missing[0]}'."
            )
        total = sum(self.shares[name] for name in corpora)
        return {name: max(least, round(each * len(corpora) * self.shares[name] / total)) for name in corpora}

    @property
    def scored(self) -> list[str]:
        """Corpora of `score`; those of `drift` if `score` is null."""
        return self.drift if self.score is None else self.score


class PartitionConfig(Group, prefix="partition."):
    """Partition of each block's neurons into modules."""

    num_modules: AtLeast1 = 8
    """K, the initial number of modules per block. Modules of fewer than max(32, N / 4K) of the N neurons are merged."""
    method: Literal["refined", "initial", "random", "drift_only"] = "refined"
    """How modules are found. refined: k-means, then differentiable refinement. Ablations: initial (k-means alone),
    random (refined sizes, random members), drift_only (refined sizes, members by drift alone)."""
    embedding_dim: AtLeast1 = 8
    """Number of principal components in the parameter embedding."""
    steps: AtLeast1 = 120
    """Optimizer steps of the refinement."""
    learning_rate: Positive = 0.05
    """Learning rate of Adam in the refinement."""
    similarity_weight: NonNegative = 1.0
    """Weight of within-module parameter dispersion in the refinement. The initial k-means multiplies features by it."""
    drift_weight: NonNegative = 1.0
    """Weight of within-module variance of drift in the refinement. The initial k-means multiplies drift by it."""
    consistency_weight: NonNegative = 2.0
    """Weight of the reward for rank consistency between corpora inside a module."""
    balance_weight: NonNegative = 0.1
    """Weight of the term for equal module sizes."""
    entropy_weight: NonNegative = 0.1
    """Weight of the entropy of assignments, which makes them hard."""


class ReliabilityConfig(Group, prefix="reliability."):
    """Which modules are ranked by another metric because the base metric is unreliable there."""

    switch: bool = True
    """Rank sensitive, weakly activated modules by --reliability.metric. False: every module keeps the base metric."""
    everywhere: bool = False
    """Switch all modules, reliable or not (a control)."""
    metric: Text = "magnitude"
    """Metric of modules that switch: an activation-free metric; consensus, the base metric's mean rank over the drift
    corpora; or averaged, the base metric computed from their pooled statistics."""
    sensitivity_quantile: Quantile = 0.75
    """A module is sensitive if its standardised sensitivity is at least this quantile, and its mean drift is above its
    noise floor."""
    score_quantile: Quantile = 0.5
    """A module is weakly activated if its mean importance rank is at most this quantile."""

    def check(self) -> None:
        """Raise UserError if the metric needs activations of a single corpus, or settings contradict each other."""
        if self.metric not in MULTI_CORPUS_METRICS and not IMPORTANCE[self.metric].activation_free:
            activation_free = [name for name in IMPORTANCE if IMPORTANCE[name].activation_free]
            known = ", ".join([*activation_free, *MULTI_CORPUS_METRICS])
            raise UserError(f"--reliability.metric must be an activation-free metric ({known}); got '{self.metric}'.")
        if self.everywhere and not self.switch:
            raise UserError("--reliability.everywhere true cannot be combined with --reliability.switch false.")


def _sort_scope(scope: Any) -> str:
    """Put the parts of a scope in the order of the flag's values, so that `ffn+attention` is `attention+ffn`."""
    parts = ["blocks" if part == "layers" else part for part in str(scope).split("+")]
    parts.sort(key="attention+ffn+experts+blocks".find)  # -1 for an unknown part, which the flag's type rejects
    return "+".join(parts)


class SparsityConfig(Group, prefix="sparsity."):
    """The sparsity target, what may be pruned, and how sparsity is allocated to modules."""

    target: TargetSetting = 0.3
    """How much is removed: 30%ffn, 30%, 95M, 200MiB, 1.4x or +5%. 30%ffn: 30 % of the FFN's parameters; of another
    --sparsity.scope, such as 30%attention+ffn, 30 % of its parameters. 0.3 is 30 % of any scope. 30%: 30 % of all
    parameters of the model. 95M or 200MiB: until so many parameters or bytes (as exported) are left. 1.4x: until the
    model is 1.4 times as fast on this machine. +5%: as much as possible while perplexity on development text, after the
    parts of --recovery that do not train, is at most 5 % above the dense model."""
    limit: Annotated[Literal["mean", "worst"], IF_CHANGED] = "mean"
    """Whose perplexity a target in quality such as +5% limits. mean: the geometric mean over the development corpora.
    worst: that of every development corpus."""
    cost: Annotated[Text | None, IF_CHANGED] = None
    """What the target counts, instead of the quantity that its unit implies: parameters, kv_cache (numbers per token),
    bytes (of the export), seconds (on this machine), or the name of a registered cost."""
    scope: Annotated[Literal[SCOPES], BeforeValidator(_sort_scope)] = "ffn"
    """What may be removed. ffn: FFN neurons. attention: KV groups too. experts: whole experts of mixtures, alone (with
    --gprune false) or too. blocks (or layers): whole layers too. They share one budget."""
    block_share: Annotated[float, Field(gt=0, le=1), NEVER] = 0.25
    """Largest share of the target that is met by whole blocks; the rest is met by units of the other blocks."""
    block_choice: Annotated[Literal["loss", "influence"], NEVER] = "loss"
    """How whole blocks are chosen. loss: greedily, each time the block whose removal gives the lowest loss on a window
    of each of --corpora.drift. influence: the blocks that change hidden states of the first scoring corpus
    least (ShortGPT)."""
    expert_metric: Annotated[Text, NEVER] = "reap"
    """Importance of whole experts. reap: mean over the tokens routed to an expert of router weight times norm of its
    output (REAP). frequency: number of these tokens. output_norm: mean norm of the output. random: a control. Or the
    name of a registered one. Several scoring corpora are pooled."""
    expert_share: Annotated[float, Field(gt=0, le=1), NEVER] = 1.0
    """Largest share of the target, after whole blocks, that is met by whole experts; neurons and KV groups in scope
    meet the rest."""
    uniform_experts: Annotated[bool, NEVER] = True
    """Remove the same number of experts in every layer, chosen per layer, so that the result can be a stock model.
    False: rank the experts of all layers together, by scores relative to the mean of their layer."""
    allocation: Text = "learned"
    """How sparsity is allocated: learned, equal, uniform, global, owl or reconstruction. learned: one threshold
    per module, trained with the model frozen. equal: the same fraction of every module. The others do not learn, and
    each module loses what the base metric ranks lowest in its block: uniform (the same sparsity in every block), global
    (scores standardised per block, one threshold: FLAP), owl (blocks with more outliers lose less), reconstruction
    (blocks lose more where gradients on a little text predict the smallest rise of the loss after least squares)."""
    start: Text = "uniform"
    """Allocation of the base metric if --sparsity.allocation is learned or equal; learning starts from it."""
    options: dict[Text, NumberOrBool] = Field({})
    """Options of the allocation, with their defaults. owl: multiple (outliers are above this multiple of their block's
    mean; 5) and spread (largest difference between a block's sparsity and the target; 0.08). reconstruction: strength
    (from 0, which is uniform, to 1, the estimated optimum; 0.75)."""
    protect: list[int] = Field([])
    """Decoder layers that are not pruned; -1 is the last layer. LLM-Pruner protects [0,1,2,-1]."""
    width_multiple: WidthMultiple = DEFAULT_MULTIPLE
    """FFN widths are multiples of this. default: by the model's configuration, 32 from 512 neurons up (the blocks of
    q8_0), 8 for experts from 128 neurons up (their grouped kernels), and otherwise 1. 64 or 128 suit matrix-multiply
    tiles and serving kernels (128 if quantised), 256 the K-quants of GGUF such as q4_k_m. The target is overshot by
    less than one multiple."""
    uniform_width: bool = False
    """Give all blocks the same width and number of KV groups, the largest that reach the target. The result loads as a
    stock model without custom code, if the family's config can express the sizes (gpt2, opt and gpt_neox cannot have
    fewer heads). Allocations to blocks other than uniform are refused."""
    learn: Literal["thresholds", "offsets", "both"] = "thresholds"
    """Learned parameters. thresholds: one number per module. offsets: one number per neuron, which shifts its rank;
    modules then matter for initialization only. both: thresholds and offsets."""
    loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    """Loss of learning. cross_entropy: of the next token. kl: KL divergence from the dense model, which needs one more
    forward pass per step."""
    epochs: AtLeast1 = 1
    """Epochs over the learning windows."""
    learning_rate: Positive = 0.1
    """Learning rate of Adam for thresholds, in logits."""
    offset_learning_rate: Positive = 0.05
    """Learning rate of Adam for offsets, in logits."""
    offset_limit: Positive = 1.2
    """Largest shift of a neuron's rank by its offset, in logits. It protects the neurons that the metric ranks highest,
    because gradients underestimate what their removal costs."""
    centred: bool = True
    """Subtract the mean gradient over all units. Without it Adam raises all gates together, which changes no mask."""

    def __init__(self, **settings: Any) -> None:
        """Raise UserError for a target such as `30%ffn` that is a share of another scope."""
        given, scope = settings.get("target"), settings.get("scope", "ffn")
        _, of_scope = split_scope(given)
        if of_scope and _sort_scope(of_scope) != _sort_scope(scope):
            raise UserError(f"--sparsity.target must be a share of --sparsity.scope {scope}; got {given}.")
        super().__init__(**settings)

    def check(self) -> None:
        """Raise UserError for settings that contradict each other."""
        for allocation in (self.allocation, self.start):
            ALLOCATION.check(allocation)
        if ALLOCATION[self.start].modules:
            raise UserError(f"--sparsity.start must be an allocation by blocks such as uniform; got '{self.start}'.")
        if self.width_multiple is None:
            raise UserError("--sparsity.width_multiple must be a whole number or default; got null.")
        if self.uniform_width and self.protect:
            raise UserError("--sparsity.uniform_width cannot be combined with --sparsity.protect.")
        flag, base = ("start", self.start) if ALLOCATION[self.allocation].modules else ("allocation", self.allocation)
        if self.uniform_width and base in ("global", "owl", "reconstruction"):
            raise UserError(
                f"--sparsity.uniform_width true needs --sparsity.{flag} uniform, because all blocks lose equally much; "
                f"got {base}."
            )
        if self.limit == "worst" and not Target.of(self.target).is_searched:
            raise UserError(
                f"--sparsity.limit worst needs a --sparsity.target in quality such as +5%; got {self.target}."
            )
        unit = Target.of(self.target).unit
        if self.cost and (unit == "bytes" or (unit == "parameters" and self.cost in ("bytes", "seconds"))):
            raise UserError(f"--sparsity.target {self.target} cannot be combined with --sparsity.cost {self.cost}.")

    @property
    def chooses_blocks_by_loss(self) -> bool:
        """Whether whole blocks are in scope and chosen by the loss on `--corpora.drift`."""
        return "blocks" in self.scope and self.block_choice == "loss"

    @property
    def currency(self) -> str:
        """What the target counts: `bytes`, `seconds`, or a registered cost."""
        return self.cost or {"x": "seconds", "bytes": "bytes"}.get(Target.of(self.target).unit, "parameters")

    @property
    def currency_flag(self) -> str:
        """The flag that determines the currency, with its value."""
        return f"--sparsity.cost {self.cost}" if self.cost else f"--sparsity.target {self.target}"
