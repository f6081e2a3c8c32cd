"""RunConfig: every flag of `python train.py`, and what follows from the flags together."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field

from gprune.checks import AtLeast0, AtLeast1, Few, NonNegative, Positive, Text, check_options
from gprune.config.groups import CorporaConfig, Group, ModelConfig, PartitionConfig, ReliabilityConfig, SparsityConfig
from gprune.config.running import DistillConfig, EvaluationConfig, LoggingConfig, RunFolderConfig, TrainerConfig
from gprune.corpora.load import identity, source_of
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.recoveries import RECOVERY, recovery_of
from gprune.registry import CALIBRATOR, LEARNER, REFINER
from gprune.sparsity.allocation import ALLOCATION

# Stages that others may take the place of, by the groups that name them: in the keys of what is kept where they do.
NOT_OF_OTHERS = ("importance", "partition", "reliability", "sparsity", "ridge")  # what --model.made_elsewhere ignores
STAGES = {"corpora": "calibrator", "partition": "refiner", "sparsity": "learner"}


class ExportConfig(Group, prefix="export.", plain_setting="format"):
    """What is made of the pruned model."""

    format: Literal["hf", "gguf", "none"] = "hf"
    """hf: the pruned model as a Hugging Face folder, reloaded and compared. gguf: that, and a GGUF file beside it, run
    in a llama.cpp build and compared (`gprune export` has its types). none: masks and numbers only. In short:
    `--export gguf`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights. Default: --model.dtype, or for a run in float32 the dtype in which the model is
    published. Perplexity is that of the weights in --model.dtype."""
    type: Literal["f32", "f16", "q8_0"] = "f16"
    """Of the matrices in the GGUF file; vectors are f32."""


class SpeedConfig(Group, prefix="speed."):
    """The setting of a target such as 1.4x: as transformers generates, on this machine, in --model.dtype."""

    batch: Few = 1
    """Prompts at once."""
    prompt: AtLeast1 = 128
    """Tokens of each prompt (prefill)."""
    generate: AtLeast0 = 32
    """Tokens after the one that follows the prompt (decoding); 0: the speed of prefill alone."""
    measure: bool = False
    """Measure this machine's table of speed again, whatever the cache has; a run that has begun resumes by its own."""

    def setting(self) -> dict[str, int]:
        """What is timed."""
        return self.model_dump(exclude={"measure"})

    def __str__(self) -> str:
        decode = f", decode {self.generate}" if self.generate else ""
        return f"prefill {self.prompt} tokens{decode}, batch {self.batch}"


class PlanConfig(Group, prefix="plan."):
    """The machine that `--dry_run true` plans for, in place of the one at hand."""

    memory: Annotated[ByteSize, Field(gt=0, lt=10**15)] | None = None
    """Memory of a device, such as 80GiB. Default: that of the GPU, or of this machine."""
    tflops: Positive | None = None
    """Sustained speed of a device, in 10^12 operations per second. Default: measured on the device at hand."""


class RunConfig(Group):
    """Generalization-aware structured pruning of a large language model.

    Prunes FFN neurons (and attention KV groups) of a frozen model: measures how each neuron's importance rank drifts
    between text distributions, divides neurons into modules that behave alike, ranks inside them, learns how sparse
    each module should be, prunes, and reports perplexity on text that was used and on text never seen.
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    corpora: CorporaConfig = Field(default_factory=CorporaConfig)
    importance: Text = "wanda_sp"
    """Base importance metric, or one registered from Python. From activations: wanda_sp, wifv, ifv, wifn, act_norm;
    from gradients: taylor; from weights alone: magnitude, magnitude_down; random as a control."""
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    reliability: ReliabilityConfig = Field(default_factory=ReliabilityConfig)
    sparsity: SparsityConfig = Field(default_factory=SparsityConfig)
    speed: SpeedConfig = Field(default_factory=SpeedConfig)
    recovery: Annotated[
        Text, BeforeValidator(lambda chain: "+".join(map(str, chain)) or "none" if isinstance(chain, list) else chain)
    ] = "least_squares+distill"
    """How the pruned model is repaired: one recovery, or a chain such as [least_squares,distill]. none: the paper's
    method. bias: means of what was removed. least_squares: output projections solved again on the dense model's
    activations. least_squares_sequential: the same block by block, on the activations of the blocks pruned and
    recovered so far; costs some three forward passes for each pruned model. distill: weights learn to predict as the
    dense model does, see --distill. Or one registered from Python."""
    ridge: NonNegative = 0.01
    """Ridge of least_squares and of least_squares_sequential, relative to the mean diagonal of the Gram matrix."""
    distill: DistillConfig = Field(default_factory=DistillConfig)
    options: dict[Text, dict[Text, bool | int | float | Text]] = Field({})
    """Options of a recovery, refiner, learner or calibrator, by its name: --options.mine.power 2."""
    gprune: bool = True
    """False: only the base metric; `--sparsity.start` takes the place of `--sparsity.allocation learned`."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    run: RunFolderConfig = Field(default_factory=RunFolderConfig)
    export: Annotated[
        ExportConfig, BeforeValidator(lambda given: {"format": given} if isinstance(given, str) else given)
    ] = Field(default_factory=ExportConfig)
    dry_run: bool = False
    """Print tokens, windows, FLOPs, time, memory and resulting widths, and stop before weights are loaded."""
    plan: PlanConfig = Field(default_factory=PlanConfig)

    def model_post_init(self, _: Any) -> None:
        """Raise UserError for settings that cannot go together."""
        if self.model.made_elsewhere is not None:
            self.measure_only()
        self._check_options()
        _ = IMPORTANCE[self.importance]  # refuses a metric that is not registered
        m, d, drift, processes = self.model, self.distill, self.corpora.drift, self.processes
        allocation, whole_blocks = self.base_allocation, ALLOCATION[self.base_allocation].whole_blocks
        if self.gprune and whole_blocks:
            raise UserError(f"--sparsity.allocation {allocation}: has no modules; expected --gprune false with it.")
        if self.gprune and self.partition.method == "drift_only" and len(drift) < 2:
            raise UserError(f"--partition.method drift_only: expected two or more --corpora.drift, got {drift}.")
        if self.gprune and self.reliability.everywhere and len(drift) < 2:
            raise UserError(f"--reliability.everywhere true: expected two or more --corpora.drift, got {drift}.")
        if m.dtype == "float16" and self.backward:
            raise UserError(f"--model.dtype float16: expected bfloat16 or float32 for {self.backward}.")
        if recovery_of(self.recovery).learns:
            if self.distilled_windows < 1:
                least = f"a window of each of --corpora.recover, {len(self.corpora.recover) * self.corpora.seq_len:,}"
                raise UserError(f"--distill.tokens: expected {least} tokens or more, got {d.tokens:,}.")
            if self.evaluation.split == "development" and d.keep == "best":
                raise UserError("--evaluation.split development: expected test with --distill.keep best.")
        if self.sparsity.quality and self.evaluation.development_samples < 2:
            raise UserError(
                f"--sparsity.target {self.sparsity.target}: expected two or more --evaluation.development_samples, of "
                f"which the interval of a quality is made, got {self.evaluation.development_samples}."
            )
        if (flag := self.timed_for) and (processes > 1 or m.device_map is not None):
            raise UserError(f"{flag}: expected one process, and no --model.device_map, where speed is measured.")
        if m.shard and self.measures_errors:
            raise UserError(f"--model.shard true: expected another rule than --sparsity.allocation {allocation}.")
        if m.shard and processes < 2:
            raise UserError("--model.shard: expected two or more processes (--trainer.devices, .num_nodes), got one.")
        if m.device_map is not None and processes > 1:
            where = f"--model.device_map {m.device_map}:"
            if not m.shard:
                raise UserError(f"{where} expected one process, or --model.shard true, got {processes} processes.")
            if m.device_map != "cpu" and set(m.max_memory or ()) != {"cpu"}:
                raise UserError(f"{where} expected --model.max_memory with a limit for cpu alone, got --model.shard.")

    def measure_only(self) -> None:
        """Reset what prunes to the defaults, so that equal measurements of a model made elsewhere are equal settings.

        Raises:
            UserError: for what needs gprune's own masks or statistics, and for several processes.
        """
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in NOT_OF_OTHERS}
        self.__dict__.update(defaults | {"gprune": False})
        where = f"--model.made_elsewhere {self.model.made_elsewhere}:"
        if self.recovery not in ("none", "distill"):
            raise UserError(f"{where} expected --recovery none or distill, got {self.recovery}.")
        if self.processes > 1 or self.model.shard or self.model.device_map is not None:
            raise UserError(f"{where} expected one process, and no --model.device_map.")
        if self.dry_run or self.export.format == "gguf":
            raise UserError(f"{where} expected neither --dry_run true nor --export gguf.")

    def _check_options(self) -> None:
        """Raise UserError for a stage that nobody has registered, and for options that the run does not have."""
        used: dict[str, Any] = dict.fromkeys(self.recovery.split("+"), (RECOVERY, ()))
        used |= {
            self.partition.refiner: (REFINER, type(self.partition).model_fields),
            self.sparsity.learner: (LEARNER, {*type(self.sparsity).model_fields, "shard"}),
            self.corpora.calibrator: (CALIBRATOR, ()),
        }
        check_options("--sparsity.options", (a := self.base_allocation), ALLOCATION[a], self.sparsity.options)
        for name, (registry, _) in used.items():
            registry.check(name)
        for name, options in self.options.items():
            if name not in used:
                raise UserError(f"--options: expected names that the run uses ({', '.join(used)}), got '{name}'.")
            registry, settings = used[name]
            entry = getattr(registry[name], "origin", registry[name])
            check_options(f"--options.{name}", name, entry, options, settings=settings)

    @property
    def final(self) -> str:
        """The stage that the run is about: `gprune`, `base` where the base metric is alone, or `model` for a model that
        was made elsewhere."""
        return "model" if self.model.made_elsewhere is not None else "gprune" if self.gprune else "base"

    @property
    def own_row(self) -> tuple[str, str]:
        """(stage, recovery) of the model that the run is about; all others are controls."""
        return self.final, self.recovery

    @property
    def processes(self) -> int:
        """Processes on all nodes."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def timed_for(self) -> str:
        """The flag for which this machine's speed by widths is measured; empty where none is."""
        s = self.sparsity
        asked = f"--sparsity.target {s.target}" if s.currency == "seconds" else ""
        return asked or ("" if s.width_multiple else "--sparsity.width_multiple auto")

    @property
    def learns(self) -> bool:
        """Whether thresholds are learned."""
        return self.gprune and ALLOCATION[self.sparsity.allocation].learned

    @property
    def backward(self) -> str:
        """The flag that has the frozen model go backward, in words; empty where none does."""
        if self.learns:
            return f"--sparsity.allocation {self.sparsity.allocation}"
        if "saliency" in self.collects:
            return f"--importance {self.importance}"
        return f"--sparsity.allocation {self.base_allocation}" if self.measures_errors else ""

    @property
    def measures_errors(self) -> bool:
        """Whether the allocation reads what errors of blocks cost."""
        return self.final != "model" and ALLOCATION[self.base_allocation].errors

    @property
    def base_allocation(self) -> str:
        """How the base metric's sparsity is spread over blocks: in its own rows, and where learning starts."""
        s = self.sparsity
        return s.start if ALLOCATION[s.allocation].modules else s.allocation

    @property
    def recovery_settings(self) -> dict[str, Any]:
        """Settings of recoveries, by their names: a group of flags, or options."""
        groups = {name: group for name, group in self if name in RECOVERY and isinstance(group, Group)}
        return groups | {name: options for name, options in self.options.items() if name in RECOVERY}

    @property
    def distilled_windows(self) -> int:
        """Windows of each recovery corpus that `--distill.tokens` come from."""
        return self.distill.tokens // (len(self.corpora.recover) * self.corpora.seq_len)

    @property
    def attention(self) -> bool:
        """Whether KV groups are in scope."""
        return "attention" in self.sparsity.scope

    @property
    def needs(self) -> frozenset[str]:
        """What of `calibration.statistics.EXTRAS` the run reads."""
        if self.final == "model":
            return frozenset()
        names = {self.importance}
        if self.gprune:
            names |= {IMPORTANCE[self.importance].drift, self.reliability.metric}
        gram = recovery_of(self.recovery).needs & {"gram"} | ({"gram"} if self.measures_errors else set())
        return gram.union(*(IMPORTANCE[name].needs for name in names if name in IMPORTANCE))

    @property
    def collects(self) -> frozenset[str]:
        """What of `calibration.statistics.EXTRAS` a calibration pass collects: for this run, and for later ones."""
        return self.needs | set(self.corpora.collect)

    @property
    def stages(self) -> list[tuple[str, str]]:
        """(stage, recovery) of every row of the result table after `dense`."""
        names, controls = [self.final], self.evaluation.controls
        if self.gprune:
            names = [name for name in ("base", "averaged") if name in controls] + ["gprune"]
        recoveries = [self.recovery]
        if self.recovery != "none" and "unrecovered" in controls:
            recoveries = ["none", self.recovery]
        return [(name, recovery) for recovery in recoveries for name in names]

    @property
    def evaluates_early(self) -> bool:
        """Whether rows without recovery are evaluated, and shown, before anything recovers."""
        return self.recovery != "none" and "unrecovered" in self.evaluation.controls

    @property
    def roles(self) -> dict[str, list[str]]:
        """Corpora whose train text this run reads, by what it reads them for; roles it does not play are empty."""
        c, recovery, scope = self.corpora, recovery_of(self.recovery), self.sparsity.scope
        return {
            "score": [c.score],
            "drift": c.drift if self.gprune or ("blocks" in scope and self.sparsity.block_choice == "loss") else [],
            "learn": c.learn if self.learns else [],
            "recover": c.recover if recovery.needs or recovery.learns else [],
        }

    @property
    def developed(self) -> list[str]:
        """Corpora whose development text is measured: of a target in quality all that the run reads, else those that
        something is learned on."""
        roles = self.roles
        recover = roles["recover"] if recovery_of(self.recovery).learns else []
        return list(dict.fromkeys(self.used if self.sparsity.quality else [*roles["learn"], *recover]))

    @property
    def unlearned_recovery(self) -> str:
        """The links of `--recovery` that train nothing, by which a target in quality is searched for; perhaps none."""
        return "+".join(one for one in self.recovery.split("+") if not recovery_of(one).learns) or "none"

    @property
    def calibration(self) -> list[str]:
        """Every corpus that statistics are collected on, each once, in a fixed order."""
        if self.final == "model":
            return []
        roles = self.roles
        recover = roles["recover"] if recovery_of(self.recovery).needs - {"text"} else []
        return list(dict.fromkeys([*roles["score"], *roles["drift"], *recover]))

    @property
    def used(self) -> list[str]:
        """Corpora whose train text the run reads, each once: evaluated, they count as seen."""
        return list(dict.fromkeys(name for names in self.roles.values() for name in names))

    def check_names(self) -> None:
        """Look every corpus name up, without reading text."""
        for name in dict.fromkeys([*self.used, *self.corpora.evaluate]):
            source_of(name)
        for role in ("drift", "learn", "recover", "evaluate"):
            names: dict[str, str] = {}
            for name in getattr(self.corpora, role):
                if (first := names.setdefault(identity(name), name)) != name:
                    raise UserError(f"--corpora.{role}: '{first}' and '{name}' are one corpus; name it once.")
        used = {identity(name) for name in self.used}
        both = [name for name in self.corpora.evaluate if identity(name) in used]
        if self.evaluation.split == "train" and both:
            raise UserError(f"--evaluation.split train: expected corpora that the run does not read, got '{both[0]}'.")

    def resolved(self) -> dict[str, Any]:
        """All settings as plain data, with the defaults that depend on others filled in."""
        plain = self.model_dump()
        plain["logging"]["mode"] = self.logging.resolved_mode
        plain["run"]["name"] = self.run_name
        return plain

    def settings(self) -> dict[str, Any]:
        """Everything that can change a result, as plain data: what two runs must share to share a folder.

        Left out: where results go, how they are logged and shown, what is exported (but for a target in bytes), what is
        collected for others, `max_memory` and `shard`.
        """
        out = {"model": {"max_memory", "shard"}, "corpora": {"collect"}}
        out |= {} if "blocks" in self.sparsity.scope else {"sparsity": {"block_share", "block_choice"}}
        plain = self.model_dump(exclude=out | dict.fromkeys(("logging", "export", "dry_run", "plan"), True))
        for group, name in STAGES.items():
            if plain[group][name] == type(getattr(self, group)).model_fields[name].default:
                del plain[group][name]
        if not self.options:
            del plain["options"]
        if not self.timed_for:
            del plain["speed"]
        else:
            plain["speed"] = self.speed.setting()  # the table is an input of the run, however it was measured
        if self.sparsity.cost is None:
            del plain["sparsity"]["cost"]
        if self.sparsity.currency == "bytes":
            of_gguf = set() if self.export.format == "gguf" else {"format", "type"}
            plain["export"] = self.export.model_dump(exclude=of_gguf)
        if self.model.made_elsewhere is None:
            del plain["model"]["made_elsewhere"]
        plain["run"] = {"seed": self.run.seed}
        plain["trainer"] = {"world_size": self.processes, "precision": self.trainer.precision} | self.trainer.unusual
        return plain

    @property
    def matmul(self) -> dict[str, str]:
        """`float32_matmul_precision`, where it is not what torch does by itself: part of all keys of what is kept."""
        return self.trainer.model_dump(include={"float32_matmul_precision"}, exclude_defaults=True)

    @property
    def folder(self) -> str:
        """Where results go."""
        return os.path.join(os.path.expanduser(self.run.dir), self.run_name)

    @property
    def run_name(self) -> str:
        """`--run.name`, or a name that equal settings share and different settings do not."""
        if self.run.name:
            return self.run.name
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        model = os.path.basename(os.path.normpath(self.model.name))
        if (other := self.model.made_elsewhere) is not None:
            return f"{os.path.basename(os.path.normpath(other))[:100]}-beside-{model[:100]}-{digest}"
        spelt = f"{target:g}" if isinstance(target := self.sparsity.target, float) else target.replace("%", "pct")
        return f"{model[:100]}-{self.final}-{self.importance}-{spelt}-{digest}"
