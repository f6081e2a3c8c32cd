"""RunConfig: all flags of `python train.py`, checks that involve several groups, and values derived from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, PrivateAttr

from gprune.calibration import EXTRAS
from gprune.checks import NonNegative, Text, check_options, option_defaults, whole_numbers
from gprune.config.groups import (
    IF_CHANGED,
    MULTI_CORPUS_METRICS,
    NEVER,
    ROLES,
    CorporaConfig,
    Group,
    ModelConfig,
    PartitionConfig,
    ReliabilityConfig,
    SparsityConfig,
    name_or_list,
)
from gprune.config.running import (
    WITHOUT_EFFECT,
    DistillConfig,
    EvaluationConfig,
    LoggingConfig,
    RunFolderConfig,
    TrainerConfig,
)
from gprune.corpora.load import code_of_corpora, identity, source_of
from gprune.errors import UserError
from gprune.importance.metrics import EXPERT_IMPORTANCE, IMPORTANCE
from gprune.recoveries import RECOVERY, check_chain, recovery_learns, recovery_needs
from gprune.registry import Registry, Stage, check_stage, stages_of
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.price import COST, COSTS_OF_RUN
from gprune.sparsity.target import Target
from gprune.user_code import code_of, code_of_module

# Windows per corpus for a target in quality. At a rise of 10 % of SmolLM2, the half width of the 95 % interval over the
# three default corpora is 8.8 points with 2 windows of each (median of random choices), 3.3 with 4, 2.1 with 8, and 1.7
# with 16. The smallest of these corpora has 8 windows of development text.
QUALITY_SAMPLES = 8
LEARNING_FLAGS = (
    "corpora.learn corpora.learn_samples evaluation.curve sparsity.learn sparsity.loss sparsity.epochs "
    "sparsity.centred sparsity.learning_rate sparsity.offset_learning_rate sparsity.offset_limit"
)
IDENTITY_OF_PARTS = {  # settings that identify a run only if a part of the scope uses them
    "blocks": ("block_share", "block_choice"),
    "experts": ("expert_metric", "expert_share", "uniform_experts"),
}


class ExportConfig(Group, prefix="export.", plain_setting="format"):
    """Export of the pruned model."""

    format: Literal["hf", "gguf", "nemotron-nas", "none"] = "hf"
    """Format of the model. hf: a Hugging Face folder, which is reloaded and compared. gguf: a GGUF file too
    (--export.type is its quantization). nemotron-nas: a DeciLM folder too, for serving engines (docs/export.md). none:
    masks and numbers only. Short form: `--export gguf`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights. Default: --model.dtype, or for float32 the dtype in which the model is published.
    Perplexity is measured in --model.dtype."""
    type: Literal["f32", "f16", "q8_0"] = "f16"
    """Type of the matrices in the GGUF file; vectors are f32."""


def _join_chain(recovery: Any) -> Any:
    """Convert a list of recoveries to a chain such as `least_squares+distill`; an empty list is `none`."""
    return "+".join(map(str, recovery)) or "none" if isinstance(recovery, list) else recovery


def _from_format(export: Any) -> Any:
    """Convert the short form `--export gguf` to settings."""
    return {"format": export} if isinstance(export, str) else export


class RunConfig(Group):
    """Generalization-aware structured pruning of a large language model.

    Prunes FFN neurons (and attention KV groups) of a frozen model: measures how each neuron's importance rank drifts
    between text distributions, partitions neurons into modules that behave alike, ranks neurons inside each module,
    learns the sparsity of each module, prunes, recovers, and reports perplexity on seen and unseen corpora.
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    corpora: CorporaConfig = Field(default_factory=CorporaConfig)
    importance: Text = "wanda_sp"
    """Base importance metric, or the name of a registered one. From activations: wanda_sp, wifv, ifv, wifn, act_norm.
    From gradients: taylor. From weights alone: magnitude, magnitude_down. Control: random."""
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    reliability: ReliabilityConfig = Field(default_factory=ReliabilityConfig)
    sparsity: SparsityConfig = Field(default_factory=SparsityConfig)
    recovery: Annotated[Text, BeforeValidator(_join_chain)] = "least_squares+distill"
    """Recovery of the pruned model: one method, or a chain such as [least_squares,distill]. none: as in the paper.
    bias: the mean output of removed units is added to biases. least_squares: output projections are fitted again to
    the dense model's activations. distill: weights are trained to predict like the dense model, see --distill. Or the
    name of a registered recovery."""
    ridge: NonNegative = 0.01
    """Ridge penalty of least_squares, relative to the mean diagonal of the Gram matrix."""
    distill: DistillConfig = Field(default_factory=DistillConfig)
    options: Annotated[dict[Text, dict[Text, bool | int | float | Text]], IF_CHANGED] = Field({})
    """Options of your own recoveries by name: --options.mine.power 2."""
    stages: Annotated[Text | dict[Text, JsonValue] | None, IF_CHANGED] = None
    """Module of --import with your own stages: its `learner`, `refiner` or `calibrator`, a LightningModule class or a
    functools.partial of one with arguments. Default: the built-in stages."""
    _given_stages: dict[str, Stage] = PrivateAttr({})  # those of `gprune.prune`, by kind
    gprune: bool = True
    """False: prune by the base metric only, with --sparsity.start instead of --sparsity.allocation learned."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: Annotated[LoggingConfig, NEVER] = Field(default_factory=LoggingConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    run: RunFolderConfig = Field(default_factory=RunFolderConfig)
    export: Annotated[ExportConfig, BeforeValidator(_from_format), NEVER] = Field(default_factory=ExportConfig)
    dry_run: Annotated[bool, NEVER] = False
    """Print the widths, and the number of parameters, bytes and tokens and the memory needed. Nothing is run."""
    allow_unused: Annotated[bool, NEVER] = False
    """Accept flags that the chosen method does not use, as in sweeps over methods. By default they are refused."""

    def check(self) -> None:
        """Raise UserError for settings that contradict each other."""
        for _, group in self:
            if isinstance(group, Group):
                group.check()
        self._check_options()
        self._check_text_and_gradients()
        self._check_scope_and_target()
        self._check_placement()

    def _check_options(self) -> None:
        """Raise UserError for names that are not registered, and for options of a name that the run does not use."""
        # Numbers are stored as floats, so 3 and 3.0 are the same setting. A parameter of type int takes whole numbers.
        allocation = self.base_allocation
        options = whole_numbers(self.sparsity.options)
        check_options("--sparsity.options", allocation, ALLOCATION[allocation], options)
        for registry, name in self.entries:
            registry.check(name)
        check_chain(self.recovery)
        recoveries = self.recovery.split("+")
        for name, options in self.options.items():
            if name not in recoveries:
                raise UserError(
                    f"--options must name recoveries that the run uses ({', '.join(recoveries)}); got '{name}'."
                )
            entry = getattr(RECOVERY[name], "registered", RECOVERY[name])
            check_options(f"--options.{name}", name, entry, options)
        if isinstance(self.stages, str):
            for kind, stage in stages_of(self.stages).items():
                check_stage(kind, stage)

    def _check_text_and_gradients(self) -> None:
        """Raise UserError if the method needs several corpora, text or gradients that the settings rule out."""
        drift = self.corpora.drift
        if self.gprune and self.partition.method == "drift_only" and len(drift) < 2:
            raise UserError(f"--partition.method drift_only needs two or more --corpora.drift; got {drift}.")
        if self.gprune and self.reliability.everywhere and len(drift) < 2:
            raise UserError(f"--reliability.everywhere true needs two or more --corpora.drift; got {drift}.")
        if self.recovery_learns and self.fresh_windows < 1:
            least = f"{len(self.corpora.recover) * self.corpora.seq_len:,}"
            window = "one window of each of --corpora.recover"
            raise UserError(f"--distill.tokens must be {least} or more ({window}); got {self.distill.tokens:,}.")
        if self.model.dtype == "float16" and self.backward_flag:
            raise UserError(f"--model.dtype must be bfloat16 or float32 for {self.backward_flag}; got float16.")

    def _check_scope_and_target(self) -> None:
        """Raise UserError for settings that whole experts, or a target in quality or speed, cannot be combined with."""
        s = self.sparsity
        scope, target, currency = f"--sparsity.scope {s.scope}", f"--sparsity.target {s.target}", s.currency
        if "experts" in s.scope and self.gprune and "ffn" not in s.scope:
            raise UserError(f"{scope} needs --gprune false, because experts have no modules.")
        if "experts" in s.scope and currency in ("seconds", "kv_cache"):
            raise UserError(f"{scope} needs a target in parameters or bytes; got {s.target}, which counts {currency}.")
        if self.searches_quality and self.evaluation.split == "development":
            raise UserError(
                f"{target} cannot be combined with --evaluation.split development, on which the sparsity is chosen."
            )
        if self.searches_quality and self.development_windows < 2:
            raise UserError(
                f"{target} needs two or more --evaluation.development_samples for a confidence interval; got "
                f"{self.development_windows}."
            )
        device_map, processes = self.model.device_map, self.processes
        if currency == "seconds" and (processes > 1 or device_map is not None):
            setting = f"{processes} processes" if processes > 1 else f"--model.device_map {device_map}"
            raise UserError(
                f"{s.currency_flag} cannot be combined with {setting}, because speed is measured in one process."
            )

    def _check_placement(self) -> None:
        """Raise UserError for a device map with several processes, each of which would use all devices."""
        if self.model.device_map is not None and self.processes > 1:
            flag = f"--model.device_map {self.model.device_map}"
            raise UserError(f"{flag} needs one process; got {self.processes} processes.")

    @property
    def entries(self) -> list[tuple[Registry[Any], str]]:
        """What the run uses of the registries, as (registry, name)."""
        metrics = [self.importance]
        if self.gprune and self.reliability.metric not in MULTI_CORPUS_METRICS:
            metrics.append(self.reliability.metric)
        return [
            *((IMPORTANCE, name) for name in dict.fromkeys(metrics)),
            *((COST, name) for name in [self.sparsity.currency] if name not in COSTS_OF_RUN),
            *((ALLOCATION, name) for name in dict.fromkeys([self.base_allocation, self.sparsity.allocation])),
            *((RECOVERY, name) for name in self.recovery.split("+")),
            *([(EXPERT_IMPORTANCE, self.sparsity.expert_metric)] if "experts" in self.sparsity.scope else []),
        ]  # fmt: skip

    def unused(self, names: Iterable[str]) -> str:
        """Return those of the given flags that the run does not use, with the choices that are the reasons."""
        s, recoveries = self.sparsity, set(self.recovery.split("+"))  # a user's own recovery may use any flag
        drift_is_used = self.gprune or self.corpora.score is None or s.chooses_blocks_by_loss
        rules = [  # flags and groups, the choice that decides whether the run uses them, and whether it does
            (f"partition reliability {LEARNING_FLAGS}", "gprune", self.gprune),
            ("corpora.drift", "gprune", drift_is_used),
            ("sparsity.start", "sparsity.allocation", self.base_allocation != s.allocation),
            (LEARNING_FLAGS, "sparsity.allocation", self.learns),
            ("sparsity.learning_rate", "sparsity.learn", s.learn != "offsets"),
            ("sparsity.offset_learning_rate sparsity.offset_limit", "sparsity.learn", s.learn != "thresholds"),
            ("importance sparsity.width_multiple sparsity.uniform_width", "sparsity.scope", "ffn" in s.scope),
            ("sparsity.expert_metric sparsity.expert_share sparsity.uniform_experts", "sparsity.scope",
             "experts" in s.scope),
            ("sparsity.block_share sparsity.block_choice", "sparsity.scope", "blocks" in s.scope),
            ("partition.steps partition.learning_rate partition.consistency_weight partition.balance_weight "
             "partition.entropy_weight", "partition.method", self.partition.method != "initial"),
            ("reliability.everywhere reliability.metric reliability.sensitivity_quantile reliability.score_quantile",
             "reliability.switch", self.reliability.switch),
            ("ridge", "sparsity.scope", "ffn" in s.scope or self.measures_errors),
            ("ridge", "recovery", bool(recoveries - {"none", "bias", "distill"}) or self.measures_errors),
            ("distill", "recovery", bool(recoveries - {"none", "bias", "least_squares"})),
            ("corpora.recover", "recovery", recoveries != {"none"}),
            ("distill.rank", "distill.targets", self.distill.targets == "lora"),
            ("export.dtype", "export.format", self.export.format != "none" or s.currency == "bytes"),
            ("export.type", "export.format", self.export.format == "gguf"),
        ]  # fmt: skip
        choices: dict[str, str] = {}
        for flags, choice, is_used in rules:
            if not is_used:
                choices = dict.fromkeys(flags.split(), choice) | choices
        given: dict[str, list[str]] = {}  # reason -> flags
        for name in sorted(set(names)):
            if choice := choices.get(name.partition(".")[0]) or choices.get(name):
                group, _, setting = choice.rpartition(".")
                value = getattr(getattr(self, group) if group else self, setting)
                given.setdefault(f"--{choice} {str(value).lower()}", []).append(f"--{name}")
        return "; ".join(f"{', '.join(flags)} ({reason})" for reason, flags in given.items())

    def check_used(self, names: Iterable[str], where: str = "") -> None:
        """Raise UserError for given flags that the run does not use, unless `allow_unused` is set."""
        if not self.allow_unused and (unused := self.unused(names)):
            place = f"{where}: " if where else ""
            raise UserError(f"{place}The run cannot use {unused}. Remove these flags, or add --allow_unused true.")

    def with_stages(self, **stages: Stage | None) -> RunConfig:
        """Return a copy with stages given from Python, by kind: some of `refiner`, `learner` and `calibrator`.

        Raise UserError for an invalid stage, and if the settings are those of a run whose stages are not given again.
        """
        given = {kind: stage for kind, stage in stages.items() if stage is not None}
        if isinstance(self.stages, str) and given:
            raise UserError("Stages must be given to gprune.prune or by --stages; got both.")
        if isinstance(self.stages, dict) and (missing := sorted(self.stages.keys() - given)):
            raise UserError(f"Stages of these settings must be given again: gprune.prune(cfg, {missing[0]}=...).")
        cfg = self.model_copy(deep=True)
        if given:
            cfg.stages = {kind: check_stage(kind, stage) for kind, stage in given.items()}
            cfg._given_stages = given
        return cfg

    def user_stage(self, kind: str) -> Stage | None:
        """Return the user's stage of a kind, such as `learner`, or None for the built-in one."""
        return stages_of(self.stages).get(kind) if isinstance(self.stages, str) else self._given_stages.get(kind)

    @property
    def metrics(self) -> str:
        """The metrics that rank what is removed: of neurons and KV groups, of other units, or both joined by `+`."""
        of_units = [self.importance] if "ffn" in self.sparsity.scope else []
        of_experts = [self.sparsity.expert_metric] if "experts" in self.sparsity.scope else []
        return "+".join([*of_units, *of_experts])

    @property
    def method(self) -> str:
        """What chooses the removed units, in names of runs: `gprune`, or `base` for the base metric alone."""
        return "gprune" if self.gprune else "base"

    @property
    def final_stage(self) -> str:
        """Stage of the run's final model in records: `recovered`, or `pruned` without recovery."""
        return "pruned" if self.recovery == "none" else "recovered"

    @property
    def measures_pruned(self) -> bool:
        """Whether the pruned model is also measured before its recovery."""
        return self.recovery != "none" and self.evaluation.before_recovery

    @property
    def processes(self) -> int:
        """Number of processes over all nodes (the world size)."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def learns(self) -> bool:
        """Whether thresholds or offsets are learned."""
        allocation = self.sparsity.allocation
        return self.gprune and allocation in ALLOCATION and ALLOCATION[allocation].learned

    @property
    def backward_flag(self) -> str:
        """The flag that needs a backward pass of the frozen model, or an empty string."""
        if self.learns:
            return f"--sparsity.allocation {self.sparsity.allocation}"
        if "saliency" in self.needs:
            return f"--importance {self.importance}"
        return f"--sparsity.allocation {self.base_allocation}" if self.measures_errors else ""

    @property
    def measures_errors(self) -> bool:
        """Whether the allocation needs the rise of the loss caused by errors of each block."""
        return self.base_allocation in ALLOCATION and ALLOCATION[self.base_allocation].errors

    @property
    def base_allocation(self) -> str:
        """Allocation of the base metric: of a run with `--gprune false`, or where learning starts."""
        allocation = self.sparsity.allocation
        has_modules = allocation in ALLOCATION and ALLOCATION[allocation].modules
        return self.sparsity.start if has_modules else allocation

    @property
    def recovery_settings(self) -> dict[str, Any]:
        """Settings of recoveries by name: a group of flags, or options."""
        groups = {name: group for name, group in self if name in RECOVERY and isinstance(group, Group)}
        return groups | {name: options for name, options in self.options.items() if name in RECOVERY}

    @property
    def recovery_learns(self) -> bool:
        """Whether the recovery trains on text."""
        return recovery_learns(self.recovery)

    @property
    def fresh_windows(self) -> int:
        """Training windows per recovery corpus, computed from `--distill.tokens`."""
        return self.distill.tokens // (len(self.corpora.recover) * self.corpora.seq_len)

    @property
    def repeat(self) -> bool | str:
        """Whether training uses text of small corpora several times: `--distill.repeat`, with its default."""
        if self.distill.repeat is not None:
            return self.distill.repeat
        return "auto" if self.corpora.text else False

    @property
    def evaluated_tokens(self) -> int:
        """Number of tokens that each model is evaluated on."""
        return len(self.corpora.evaluate) * self.evaluation.num_samples * self.evaluation.seq_len

    @property
    def attention(self) -> bool:
        """Whether KV groups are in scope."""
        return "attention" in self.sparsity.scope

    @property
    def needs(self) -> frozenset[str]:
        """Extra statistics that the run reads; without neurons in scope not gram, as no projection is solved again."""
        scope = self.sparsity.scope
        entries = [registry[name] for registry, name in self.entries if name in registry]
        needs = {"routing"} if "experts" in scope else set()
        needs = needs.union(*(getattr(entry, "needs", ()) for entry in entries))
        return frozenset(needs.intersection(EXTRAS) - (set() if "ffn" in scope else {"gram"}))

    @property
    def base_corpora(self) -> list[str]:
        """Corpora on which the base metric scores units for its masks; where learning starts, the first one of them."""
        return self.corpora.scored[:1] if self.gprune else self.corpora.scored

    @property
    def roles(self) -> dict[str, list[str]]:
        """Corpora whose train split the run reads, by role: `score`, `drift`, `learn` and `recover`.

        The list of a role that the run does not use is empty: `drift` if it only names the corpora of `score`.
        """
        c, chain = self.corpora, [RECOVERY[name] for name in self.recovery.split("+") if name in RECOVERY]
        return {
            "score": c.scored,
            "drift": c.drift if self.gprune or self.sparsity.chooses_blocks_by_loss else [],
            "learn": c.learn if self.learns else [],
            "recover": c.recover if any(entry.needs or entry.learns for entry in chain) else [],
        }

    @property
    def development_corpora(self) -> list[str]:
        """Corpora whose development split is measured: those of training, or all that a search for a quality reads."""
        if self.searches_quality:
            return self.train_corpora
        roles = self.roles
        return list(dict.fromkeys([*roles["learn"], *(roles["recover"] if self.recovery_learns else [])]))

    @property
    def development_windows(self) -> int:
        """Largest number of development windows of each corpus."""
        return self.evaluation.development_samples or (QUALITY_SAMPLES if self.searches_quality else 2)

    @property
    def training_free_recovery(self) -> str:
        """The recoveries of the `--recovery` chain that do not train, or `none`."""
        return "+".join(name for name in self.recovery.split("+") if not recovery_learns(name)) or "none"

    @property
    def searches_quality(self) -> bool:
        """Whether the target is a quality, so that the run finds out how much is removed."""
        return Target.of(self.sparsity.target).is_searched

    @property
    def calibration_corpora(self) -> list[str]:
        """Corpora of calibration, without duplicates, in a fixed order."""
        roles = self.roles
        recover = roles["recover"] if recovery_needs(self.recovery) - {"text"} else []
        return list(dict.fromkeys([*roles["score"], *roles["drift"], *recover]))

    @property
    def train_corpora(self) -> list[str]:
        """Corpora whose train split the run reads, without duplicates. In evaluation they count as seen."""
        return list(dict.fromkeys(name for names in self.roles.values() for name in names))

    def check_names(self) -> None:
        """Raise UserError for unknown or repeated corpora, and if an evaluated train split is also used otherwise.

        No text is read.
        """
        for name in dict.fromkeys([*self.train_corpora, *self.corpora.evaluate]):
            source_of(name)
        self.corpora.windows_of(self.train_corpora, 1)  # raises for a corpus without a share
        for role in ROLES:
            names: dict[str, str] = {}  # identity of a corpus -> its first name
            for name in getattr(self.corpora, role) or ():
                if (first_name := names.setdefault(identity(name), name)) != name:
                    raise UserError(f"--corpora.{role} must name each corpus once; got '{first_name}' and '{name}'.")
        trained_on = {identity(name) for name in self.train_corpora}
        shared = [name for name in self.corpora.evaluate if identity(name) in trained_on]
        if self.evaluation.split == "train" and shared:
            needed = "needs corpora that the run does not read otherwise"
            raise UserError(f"--evaluation.split train {needed}; got '{shared[0]}'.")

    def resolved(self) -> dict[str, Any]:
        """Return all settings as plain data, with the mode of W&B and the name of the run that result from them."""
        settings = self.model_dump()
        settings["logging"]["mode"] = self.logging.resolved_mode
        settings["run"]["name"] = self.run_name
        return settings

    @property
    def code(self) -> dict[str, str | None]:
        """Hashes of the user's code that the run uses, by module (`gprune.user_code`); empty without such code.

        It is the code of registered functions and classes, of stages, and of `--trainer.callbacks`.
        """
        code = code_of_corpora([*self.train_corpora, *self.corpora.evaluate])
        for registry, name in self.entries:
            code |= registry.code(name)
        if isinstance(self.stages, str):
            code |= code_of_module(self.stages)
        for stage in self._given_stages.values():
            code |= code_of(stage)
        for callback in self.trainer.callbacks:
            code |= callback.code()
        return code

    def settings(self) -> dict[str, Any]:
        """Return the settings that can change a result, as plain data. They identify a run: a folder holds one set.

        `Identity` marks settings that are left out, unless the scope or currency uses them. `code` is the user's code.
        """
        settings = _identifying(self, self.model_dump(), self.model_dump(exclude_defaults=True))
        settings["corpora"]["score"] = name_or_list(self.corpora.scored)
        if self.corpora.shares:
            settings["corpora"]["shares"] = self.corpora.shares
        if self.base_allocation in ALLOCATION:
            settings["sparsity"]["options"] = option_defaults(ALLOCATION[self.base_allocation]) | self.sparsity.options
        settings["evaluation"]["development_samples"] = self.development_windows
        settings["distill"]["repeat"] = self.repeat
        arguments = {name: v for name, v in self.trainer.other_arguments.items() if name not in WITHOUT_EFFECT}
        settings["trainer"] |= arguments | {"world_size": self.processes}
        s = self.sparsity
        in_use = [name for part, names in IDENTITY_OF_PARTS.items() if part in s.scope for name in names]
        settings["sparsity"] |= {name: getattr(s, name) for name in in_use}
        if s.currency == "bytes":  # settings that change the size of the export
            unused = set() if self.export.format == "gguf" else {"format", "type"}
            settings["export"] = self.export.model_dump(exclude=unused)
        if code := self.code:
            settings["code"] = code
        return settings

    @property
    def matmul_settings(self) -> dict[str, str]:
        """`float32_matmul_precision` unless it is torch's default; part of all cache keys."""
        return self.trainer.model_dump(include={"float32_matmul_precision"}, exclude_defaults=True)

    @property
    def folder(self) -> str:
        """Path of the run folder."""
        return os.path.join(os.path.expanduser(self.run.dir), self.run_name)

    @property
    def run_name(self) -> str:
        """`--run.name`, or by default MODEL-METHOD-METRIC-TARGET-HASH.

        HASH is the start of the SHA-256 of `settings()`. Names of models are cut to 100 characters.
        """
        if self.run.name:
            return self.run.name
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        model = os.path.basename(os.path.normpath(self.model.name))[:100]
        target = self.sparsity.target
        target_text = f"{target:g}" if isinstance(target, float) else target.replace("%", "pct")
        return f"{model}-{self.method}-{self.metrics}-{target_text}-{digest}"


def _identifying(group: Group, settings: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Return those settings of a group that identify a run (see `Identity`); `changed` differ from their defaults."""
    identifying = {}
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if NEVER in field.metadata:
            continue
        if isinstance(value, Group):
            identifying[name] = _identifying(value, settings[name], changed.get(name, {}))
        elif IF_CHANGED not in field.metadata:
            identifying[name] = settings[name]
        elif name in changed:
            identifying[name] = changed[name]
    return identifying
