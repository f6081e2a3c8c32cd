"""RunConfig: all flags of `python train.py`, checks that involve several groups, and values derived from them."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field

from gprune.checks import AtLeast0, AtLeast1, NonNegative, Text, UpTo4096, check_options, whole_numbers
from gprune.config.groups import CorporaConfig, Group, ModelConfig, PartitionConfig, ReliabilityConfig, SparsityConfig
from gprune.config.running import (
    DEVELOPMENT_SAMPLES,
    QUALITY_DEVELOPMENT_SAMPLES,
    DistillConfig,
    EvaluationConfig,
    LoggingConfig,
    RunFolderConfig,
    TrainerConfig,
)
from gprune.corpora.load import code_of_corpora, identity, source_of
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.recoveries import RECOVERY, recovery_of
from gprune.registry import CALIBRATOR, LEARNER, REFINER
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.cost import COST

TRIES = 12  # largest number of models in a search for the sparsity of a target in quality; typical are about 4
LEARNED_TRIES = 4  # the same if each model is trained; typical are about 2
# Replaceable stages: group -> setting. `settings()` names a stage only if it is not the default.
STAGES = {"corpora": "calibrator", "partition": "refiner", "sparsity": "learner"}


class ExportConfig(Group, prefix="export.", plain_setting="format"):
    """Export of the pruned model."""

    format: Literal["hf", "gguf", "none"] = "hf"
    """Format of the model. hf: a Hugging Face folder, which is reloaded and compared. gguf: a GGUF file too
    (--export.type is its quantization). none: masks and numbers only. Short form:
    `--export gguf`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights. Default: --model.dtype, or for float32 the dtype in which the model is published.
    Perplexity is measured in --model.dtype."""
    type: Literal["f32", "f16", "q8_0"] = "f16"
    """Type of the matrices in the GGUF file; vectors are f32."""


class SpeedConfig(Group, prefix="speed."):
    """Workload for speed targets such as 1.4x, timed with transformers on this machine in --model.dtype."""

    batch: UpTo4096 = 1
    """Batch size (prompts)."""
    prompt: AtLeast1 = 128
    """Tokens of each prompt (prefill)."""
    generate: AtLeast0 = 32
    """Tokens generated after the first one (decoding); 0 times prefill alone."""
    measure: bool = False
    """Measure the latency table of this machine again instead of using the cached table, for example if its
    load has changed. A resumed run keeps its table."""

    def workload(self) -> dict[str, int]:
        """Return the workload that is timed: `batch`, `prompt` and `generate`."""
        return self.model_dump(exclude={"measure"})

    def __str__(self) -> str:
        decode = f", decode {self.generate}" if self.generate else ""
        return f"prefill {self.prompt} tokens{decode}, batch {self.batch}"


class PlanConfig(Group, prefix="plan."):
    """The machine that `--dry_run true` plans for. Default: this machine."""

    memory: Annotated[ByteSize, Field(gt=0, lt=10**15)] | None = None
    """Memory of a device, such as 80GiB. Default: that of this machine's GPU, or its main memory."""


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
    speed: SpeedConfig = Field(default_factory=SpeedConfig)
    recovery: Annotated[Text, BeforeValidator(_join_chain)] = "least_squares+distill"
    """Recovery of the pruned model: one method, or a chain such as [least_squares,distill]. none: as in the paper.
    bias: the mean output of removed units is added to biases. least_squares: output projections are fitted again to
    the dense model's activations. least_squares_sequential: the same block by block, on activations of the blocks
    pruned and recovered so far; costs about three forward passes per pruned model. distill: weights are trained to
    predict like the dense model, see --distill. Or the name of a registered recovery."""
    ridge: NonNegative = 0.01
    """Ridge penalty of least_squares and least_squares_sequential, relative to the mean diagonal of the Gram matrix."""
    distill: DistillConfig = Field(default_factory=DistillConfig)
    options: dict[Text, dict[Text, bool | int | float | Text]] = Field({})
    """Options of registered recoveries, refiners, learners and calibrators by name: --options.mine.power 2."""
    gprune: bool = True
    """False: prune by the base metric only, with --sparsity.start instead of --sparsity.allocation learned."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    run: RunFolderConfig = Field(default_factory=RunFolderConfig)
    export: Annotated[ExportConfig, BeforeValidator(_from_format)] = Field(default_factory=ExportConfig)
    dry_run: bool = False
    """Print the widths, and the number of parameters, tokens and FLOPs and the memory needed. Nothing is run."""
    plan: PlanConfig = Field(default_factory=PlanConfig)

    def model_post_init(self, _: Any) -> None:
        """Raise UserError for settings that contradict each other."""
        self._check_options()
        _ = IMPORTANCE[self.importance]  # raises if the metric is not registered
        self._check_method()
        self._check_recovery()
        self._check_quality_and_speed_targets()
        self._check_placement()

    def _check_method(self) -> None:
        """Raise UserError if the method needs modules, several corpora or gradients that the settings rule out."""
        drift = self.corpora.drift
        allocation = self.base_allocation
        if self.gprune and ALLOCATION[allocation].whole_blocks:
            raise UserError(f"--sparsity.allocation {allocation} needs --gprune false, because it has no modules.")
        if self.gprune and self.partition.method == "drift_only" and len(drift) < 2:
            raise UserError(f"--partition.method drift_only needs two or more --corpora.drift; got {drift}.")
        if self.gprune and self.reliability.everywhere and len(drift) < 2:
            raise UserError(f"--reliability.everywhere true needs two or more --corpora.drift; got {drift}.")
        if self.model.dtype == "float16" and self.backward_flag:
            raise UserError(f"--model.dtype must be bfloat16 or float32 for {self.backward_flag}; got float16.")

    def _check_recovery(self) -> None:
        """Raise UserError for settings with which a recovery that trains cannot work."""
        if not recovery_of(self.recovery).learns:
            return
        if self.distilled_windows < 1:
            least = f"{len(self.corpora.recover) * self.corpora.seq_len:,}"
            window = "one window of each of --corpora.recover"
            raise UserError(f"--distill.tokens must be {least} or more ({window}); got {self.distill.tokens:,}.")
        if self.evaluation.split == "development" and self.distill.keep == "best":
            raise UserError("--distill.keep best cannot be combined with --evaluation.split development.")
        if self.distill.keep == "best" and self.development_windows < 2:
            raise UserError(
                "--distill.keep best needs two or more --evaluation.development_samples to tell a rise from noise; got "
                f"{self.development_windows}."
            )

    def _check_quality_and_speed_targets(self) -> None:
        """Raise UserError if a target in quality or speed cannot be measured with these settings."""
        if self.sparsity.quality and self.evaluation.split == "development":
            raise UserError(
                f"--sparsity.target {self.sparsity.target} cannot be combined with --evaluation.split development, on "
                "which the sparsity is chosen."
            )
        if self.sparsity.quality and self.development_windows < 2:
            raise UserError(
                f"--sparsity.target {self.sparsity.target} needs two or more --evaluation.development_samples for a "
                f"confidence interval; got {self.development_windows}."
            )
        device_map, processes = self.model.device_map, self.processes
        if (flag := self.latency_table_flag) and (processes > 1 or device_map is not None):
            setting = f"{processes} processes" if processes > 1 else f"--model.device_map {device_map}"
            raise UserError(f"{flag} cannot be combined with {setting}, because speed is measured in one process.")

    def _check_placement(self) -> None:
        """Raise UserError for a combination of sharding, offloading and processes that is not supported."""
        model, processes = self.model, self.processes
        if model.shard and self.measures_errors:
            raise UserError(f"--model.shard true cannot be combined with --sparsity.allocation {self.base_allocation}.")
        if model.shard and processes < 2:
            raise UserError("--model.shard needs two or more processes (--trainer.devices, .num_nodes); got one.")
        if model.device_map is not None and processes > 1:
            flag = f"--model.device_map {model.device_map}"
            if not model.shard:
                raise UserError(f"{flag} needs one process, or --model.shard true; got {processes} processes.")
            if model.device_map != "cpu" and set(model.max_memory or ()) != {"cpu"}:
                raise UserError(f"{flag} needs --model.max_memory for cpu alone if --model.shard is true.")

    def _check_options(self) -> None:
        """Raise UserError for a stage that is not registered, and for options of a name that the run does not use."""
        # Name of a recovery or stage -> its registry, and its parameters that are set by flags instead of options.
        used_entries: dict[str, Any] = dict.fromkeys(self.recovery.split("+"), (RECOVERY, ()))
        used_entries |= {
            self.partition.refiner: (REFINER, type(self.partition).model_fields),
            self.sparsity.learner: (LEARNER, {*type(self.sparsity).model_fields, "shard"}),
            self.corpora.calibrator: (CALIBRATOR, ()),
        }
        allocation = self.base_allocation
        # Numbers are stored as floats, so 3 and 3.0 are the same setting. A parameter of type int takes whole numbers.
        options = whole_numbers(self.sparsity.options)
        check_options("--sparsity.options", allocation, ALLOCATION[allocation], options)
        for name, (registry, _) in used_entries.items():
            registry.check(name)
        for name, options in self.options.items():
            if name not in used_entries:
                raise UserError(
                    f"--options must name stages that the run uses ({', '.join(used_entries)}); got '{name}'."
                )
            registry, settings = used_entries[name]
            entry = getattr(registry[name], "registered", registry[name])
            check_options(f"--options.{name}", name, entry, options, settings=settings)

    @property
    def final(self) -> str:
        """Stage of the run's main row: `gprune`, or with `--gprune false` `base`, or `averaged` for several corpora."""
        if self.gprune:
            return "gprune"
        return "base" if len(self.corpora.scored) == 1 else "averaged"

    @property
    def own_row(self) -> tuple[str, str]:
        """(stage, recovery) of the run's main row; all other rows are controls."""
        return self.final, self.recovery

    @property
    def processes(self) -> int:
        """Number of processes over all nodes (the world size)."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def latency_table_flag(self) -> str:
        """The flag that needs a latency table of this machine, or an empty string."""
        if self.sparsity.currency == "seconds":
            return f"--sparsity.target {self.sparsity.target}"
        return "--sparsity.width_multiple auto" if self.sparsity.width_multiple is None else ""

    @property
    def learns(self) -> bool:
        """Whether thresholds are learned."""
        return self.gprune and ALLOCATION[self.sparsity.allocation].learned

    @property
    def backward_flag(self) -> str:
        """The flag that needs a backward pass of the frozen model, or an empty string."""
        if self.learns:
            return f"--sparsity.allocation {self.sparsity.allocation}"
        if "saliency" in self.collects:
            return f"--importance {self.importance}"
        return f"--sparsity.allocation {self.base_allocation}" if self.measures_errors else ""

    @property
    def measures_errors(self) -> bool:
        """Whether the allocation needs the rise of the loss caused by errors of each block."""
        return ALLOCATION[self.base_allocation].errors

    @property
    def base_allocation(self) -> str:
        """Allocation of the base metric, in control rows and as the start of learning."""
        allocation = self.sparsity.allocation
        return self.sparsity.start if ALLOCATION[allocation].modules else allocation

    @property
    def recovery_settings(self) -> dict[str, Any]:
        """Settings of recoveries by name: a group of flags, or options."""
        groups = {name: group for name, group in self if name in RECOVERY and isinstance(group, Group)}
        return groups | {name: options for name, options in self.options.items() if name in RECOVERY}

    @property
    def distilled_windows(self) -> int:
        """Training windows per recovery corpus, computed from `--distill.tokens`."""
        return self.distill.tokens // (len(self.corpora.recover) * self.corpora.seq_len)

    @property
    def attention(self) -> bool:
        """Whether KV groups are in scope."""
        return "attention" in self.sparsity.scope

    @property
    def needs(self) -> frozenset[str]:
        """Extra statistics (`gprune.calibration.projections.EXTRAS`) that the run reads."""
        metrics = {self.importance}
        if self.gprune:
            metrics |= {IMPORTANCE[self.importance].drift, self.reliability.metric}
        needed = set(recovery_of(self.recovery).needs & {"gram"})
        if self.measures_errors:
            needed.add("gram")
        return frozenset(needed.union(*(IMPORTANCE[name].needs for name in metrics if name in IMPORTANCE)))

    @property
    def collects(self) -> frozenset[str]:
        """Extra statistics that calibration collects: those of `needs`, and `--corpora.collect` for later runs."""
        return self.needs | set(self.corpora.collect)

    @property
    def stages(self) -> list[tuple[str, str]]:
        """(stage, recovery) of every row of the result table after `dense`."""
        controls = self.evaluation.controls
        before = {"base": (), "averaged": ("base",), "gprune": ("base", "averaged")}[self.final]
        stages = [*(name for name in before if name in controls), self.final]
        recoveries = [self.recovery]
        if self.recovery != "none" and "unrecovered" in controls:
            recoveries = ["none", self.recovery]
        return [(stage, recovery) for recovery in recoveries for stage in stages]

    @property
    def scored_on(self) -> dict[str, list[str]]:
        """Stage -> the corpora on whose pooled statistics its units are scored."""
        scored, needed = self.corpora.scored, {stage for stage, _ in self.stages}
        if self.gprune:
            needed.add("base")  # learning starts from its masks
        corpora = {"base": scored[:1], "averaged": self.corpora.drift if self.gprune else scored, "gprune": scored}
        return {stage: names for stage, names in corpora.items() if stage in needed}

    @property
    def evaluates_early(self) -> bool:
        """Whether rows without recovery are evaluated and shown before recovery begins."""
        return self.recovery != "none" and "unrecovered" in self.evaluation.controls

    @property
    def roles(self) -> dict[str, list[str]]:
        """Corpora whose train split the run reads, by role: `score`, `drift`, `learn` and `recover`.

        The list of a role that the run does not use is empty.
        """
        corpora, recovery = self.corpora, recovery_of(self.recovery)
        chooses_blocks_by_loss = "blocks" in self.sparsity.scope and self.sparsity.block_choice == "loss"
        return {
            "score": corpora.scored,
            "drift": corpora.drift if self.gprune or chooses_blocks_by_loss else [],
            "learn": corpora.learn if self.learns else [],
            "recover": corpora.recover if recovery.needs or recovery.learns else [],
        }

    @property
    def development_corpora(self) -> list[str]:
        """Corpora whose development split is measured.

        For a quality target these are all train corpora, otherwise those of learning and of recoveries that train.
        """
        if self.sparsity.quality:
            return self.train_corpora
        roles = self.roles
        recover = roles["recover"] if recovery_of(self.recovery).learns else []
        return list(dict.fromkeys([*roles["learn"], *recover]))

    @property
    def development_windows(self) -> int:
        """Largest number of development windows of each corpus, by default more for a quality target."""
        if self.evaluation.development_samples is not None:
            return self.evaluation.development_samples
        return QUALITY_DEVELOPMENT_SAMPLES if self.sparsity.quality else DEVELOPMENT_SAMPLES

    @property
    def training_free_recovery(self) -> str:
        """The recoveries of the `--recovery` chain that do not train, or `none`."""
        return "+".join(name for name in self.recovery.split("+") if not recovery_of(name).learns) or "none"

    @property
    def trials(self) -> list[str]:
        """The recovery of every model that is measured at most to find the sparsity of a target such as `+5%`.

        Empty for other targets, whose sparsity is known.
        """
        if not self.sparsity.quality:
            return []
        searches = 2 if self.learns else 1  # the first one is for the sparsity at which thresholds are learned
        trained = [self.recovery] * LEARNED_TRIES if recovery_of(self.recovery).learns else []
        return [self.training_free_recovery] * (searches * TRIES) + trained

    @property
    def calibration_corpora(self) -> list[str]:
        """Corpora of calibration, without duplicates, in a fixed order."""
        roles = self.roles
        recover = roles["recover"] if recovery_of(self.recovery).needs - {"text"} else []
        return list(dict.fromkeys([*roles["score"], *roles["drift"], *recover]))

    @property
    def train_corpora(self) -> list[str]:
        """Corpora whose train split the run reads, without duplicates. In evaluation they count as seen."""
        return list(dict.fromkeys(name for names in self.roles.values() for name in names))

    def check_names(self) -> None:
        """Raise UserError for unknown or repeated corpora. No text is read."""
        for name in dict.fromkeys([*self.train_corpora, *self.corpora.evaluate]):
            source_of(name)
        for role in ("score", "drift", "learn", "recover", "evaluate"):
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

        It is the code of registered functions and classes, and of `--trainer.callbacks`.
        """
        others = {IMPORTANCE[self.importance].drift, self.reliability.metric} if self.gprune else set()
        metrics = {self.importance, *(name for name in others if name in IMPORTANCE)}  # `averaged` is not a metric
        entries = [(IMPORTANCE, name) for name in metrics]
        entries += [(ALLOCATION, name) for name in {self.sparsity.allocation, self.base_allocation}]
        entries += [(COST, self.sparsity.cost)] if self.sparsity.cost else []
        entries += [(REFINER, self.partition.refiner), (LEARNER, self.sparsity.learner)]
        entries += [(CALIBRATOR, self.corpora.calibrator)]
        entries += [(RECOVERY, name) for name in self.recovery.split("+")]
        code = code_of_corpora([*self.train_corpora, *self.corpora.evaluate])
        for registry, name in entries:
            code |= registry.code(name)
        for callback in self.trainer.callbacks:
            code |= callback.code()
        return code

    def settings(self) -> dict[str, Any]:
        """Return the settings that can change a result, as plain data. They identify a run: a folder holds one set.

        Left out are the run folder, logging, export (except for a target in bytes), statistics collected for later
        runs, `max_memory` and `shard`. Some settings are left out at their default, so that settings stored by earlier
        versions, which lack them, identify the same run. `code` is the user's code, if there is any.
        """
        excluded: dict[str, Any] = {"model": {"max_memory", "shard"}, "corpora": {"collect"}}
        excluded |= dict.fromkeys(("logging", "export", "dry_run", "plan"), True)
        if "blocks" not in self.sparsity.scope:
            excluded["sparsity"] = {"block_share", "block_choice"}
        settings = self.model_dump(exclude=excluded)
        for group, name in STAGES.items():
            if settings[group][name] == type(getattr(self, group)).model_fields[name].default:
                del settings[group][name]
        if not self.options:
            del settings["options"]
        if self.latency_table_flag:  # without `measure`, because the latency table itself is an input of the run
            settings["speed"] = self.speed.workload()
        else:
            del settings["speed"]
        if self.sparsity.cost is None:
            del settings["sparsity"]["cost"]
        if self.sparsity.currency == "bytes":
            unused = set() if self.export.format == "gguf" else {"format", "type"}
            settings["export"] = self.export.model_dump(exclude=unused)
        if self.corpora.score is None:
            settings["corpora"]["score"] = self.corpora.drift
        settings["evaluation"]["development_samples"] = self.development_windows
        settings["run"] = {"seed": self.run.seed}
        trainer = {"world_size": self.processes, "precision": self.trainer.precision}
        settings["trainer"] = trainer | self.trainer.result_changing
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
        """`--run.name`, or by default MODEL-STAGE-METRIC-TARGET-HASH.

        HASH is the start of the SHA-256 of `settings()`. Names of models are cut to 100 characters.
        """
        if self.run.name:
            return self.run.name
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        model = os.path.basename(os.path.normpath(self.model.name))[:100]
        target = self.sparsity.target
        target_text = f"{target:g}" if isinstance(target, float) else target.replace("%", "pct")
        return f"{model}-{self.final}-{self.importance}-{target_text}-{digest}"
