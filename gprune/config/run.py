"""RunConfig: every flag of `python train.py`, and what follows from the flags together."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from gprune.checks import NonNegative, Text
from gprune.config.groups import (
    SEVERAL,
    CorporaConfig,
    Group,
    ModelConfig,
    PartitionConfig,
    ReliabilityConfig,
    SparsityConfig,
    group,
)
from gprune.config.recovery import DistillConfig
from gprune.config.running import EvaluationConfig, LoggingConfig, RunFolderConfig, TrainerConfig
from gprune.corpora.load import check_corpus, identity
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE
from gprune.recoveries import recovery_of
from gprune.sparsity.allocation import ALLOCATION


def joined(chain: Any) -> Any:
    """A chain of recoveries as one name, `least_squares+distill`; what is no list of names as it is."""
    names = isinstance(chain, list) and all(isinstance(name, str) for name in chain)
    return "+".join(chain) or "none" if names else chain


@group()
class RunConfig(Group):
    """Generalization-aware structured pruning of a large language model.

    Prunes FFN neurons (and attention KV groups) of a frozen model: measures how each neuron's importance rank drifts
    between text distributions, divides neurons into modules that behave alike, ranks inside them, learns how sparse
    each module should be, prunes, and reports perplexity on text that was used and on text never seen.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    corpora: CorporaConfig = field(default_factory=CorporaConfig)
    importance: Text = "wanda_sp"
    """Base importance metric, or one registered from Python. From activations: wanda_sp, wifn, wifv, ifv, act_norm,
    obs; from gradients: taylor, taylor_second, taylor_vector; from weights alone: magnitude, magnitude_l1,
    magnitude_down, magnitude_down_l1, gaussian_sp; random as a control."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    recovery: Annotated[Text, BeforeValidator(joined)] = "least_squares+distill"
    """How the pruned model is repaired: one recovery, or a chain such as [least_squares,distill]. none: the paper's
    method. bias: means of what was removed. least_squares: output projections solved again on the dense model's
    activations. least_squares_sequential: the same block by block, on the activations of the blocks pruned and
    recovered so far; costs some three forward passes for each pruned model. distill: weights learn to predict as the
    dense model does, see --distill. Or one registered from Python."""
    ridge: NonNegative = 0.01
    """Ridge of least_squares and of least_squares_sequential, relative to the mean diagonal of the Gram matrix."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    gprune: bool = True
    """False: only the base metric; `--sparsity.start` takes the place of `--sparsity.allocation learned`."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    export: Literal["hf", "gguf", "none"] = "hf"
    """hf: the pruned model as a Hugging Face folder, reloaded and compared. gguf: that, and a GGUF file beside it, run
    in a llama.cpp build and compared (`gprune export` has its types). none: masks and numbers only."""
    dry_run: bool = False
    """Print tokens, FLOPs, time and resulting widths, and stop before the model runs."""

    def __post_init__(self) -> None:
        """Raise UserError for settings that cannot go together."""
        IMPORTANCE[self.importance]
        self._check_recovery()
        self._check_places()
        if self.model.dtype == "float16" and (self.learns or "saliency" in self.collects):
            raise UserError(
                "--model.dtype float16: the gradients that thresholds and Taylor metrics need are too small for it; "
                "expected bfloat16 or float32, or --sparsity.allocation uniform and a metric without gradients."
            )
        if self.gprune and ALLOCATION[self.sparsity.allocation].whole_blocks:
            raise UserError(
                f"--sparsity.allocation {self.sparsity.allocation}: a baseline without modules; expected --gprune "
                f"false with it."
            )
        for flag, chosen in (
            ("--partition.method drift_only", self.partition.method == "drift_only"),
            ("--reliability.everywhere true", self.reliability.everywhere),
        ):
            if self.gprune and chosen and len(self.corpora.drift) < 2:
                raise UserError(f"{flag}: expected two or more --corpora.drift, got {self.corpora.drift}.")

    def _check_recovery(self) -> None:
        """Raise UserError for an unknown recovery, and for settings with which it cannot learn."""
        if not recovery_of(self.recovery).learns:
            return
        if self.distilled_windows < 1:
            least = len(self.corpora.recover) * self.corpora.seq_len
            raise UserError(
                f"--distill.tokens: expected a window of each of --corpora.recover, {least:,} tokens or more, got "
                f"{self.distill.tokens:,}."
            )
        if self.evaluation.split == "development" and self.distill.keep == "best":
            raise UserError(
                "--evaluation.split development: --distill.keep best chooses the weights on this text; expected test, "
                "or --distill.keep last."
            )
        if self.distill.hidden and ALLOCATION[self.base_allocation].whole_blocks:
            raise UserError(
                f"--distill.hidden: expected 0 with --sparsity.allocation {self.base_allocation}, which leaves fewer "
                f"blocks than the dense model has to compare them with; got {self.distill.hidden}."
            )

    def _check_places(self) -> None:
        """Raise UserError for a model whose parts have no place in the processes that there are."""
        processes, m = self.trainer.devices * self.trainer.num_nodes, self.model
        if m.shard and processes < 2:
            raise UserError(
                "--model.shard: expected two or more processes (--trainer.devices, .num_nodes) to spread the model "
                "over, got one; --model.device_map auto spreads it over the devices of one process."
            )
        if m.device_map is None or processes < 2:
            return
        if not m.shard:
            raise UserError(
                f"--model.device_map {m.device_map}: expected one process, which spreads the model over all devices, "
                f"got {processes} (--trainer.devices, .num_nodes); leave one of them out, or take --model.shard true."
            )
        if m.device_map != "cpu" and set(m.max_memory or ()) != {"cpu"}:
            raise UserError(
                f"--model.device_map {m.device_map}: with --model.shard true every process takes its part from the CPU "
                f"or the disk; expected --model.max_memory with a limit for cpu alone, such as {{cpu: 100GiB}}."
            )

    @property
    def final(self) -> str:
        """The stage that the run is about: `gprune`, or `base` where the base metric is alone."""
        return "gprune" if self.gprune else "base"

    @property
    def learns(self) -> bool:
        """Whether thresholds are learned."""
        return self.gprune and ALLOCATION[self.sparsity.allocation].learned

    @property
    def base_allocation(self) -> str:
        """How the base metric's sparsity is spread over blocks: in its own rows, and where learning starts."""
        s = self.sparsity
        return s.start if ALLOCATION[s.allocation].modules else s.allocation

    @property
    def recovery_settings(self) -> dict[str, Group]:
        """Flags of recoveries, by their names."""
        return {"distill": self.distill}

    @property
    def distilled_windows(self) -> int:
        """Windows of each recovery corpus that `--distill.tokens` come from."""
        return self.distill.tokens // (len(self.corpora.recover) * self.corpora.seq_len)

    @property
    def attention(self) -> bool:
        """Whether KV groups are in scope."""
        return self.sparsity.scope == "attention+ffn"

    @property
    def needs(self) -> frozenset[str]:
        """What of `calibration.statistics.EXTRAS` the run reads."""
        # gprune also scores by what stands in for drift and by what modules switch to
        names = {self.importance, *([IMPORTANCE[self.importance].drift, self.reliability.metric] * self.gprune)}
        gram = recovery_of(self.recovery).needs & {"gram"}
        return gram.union(*(IMPORTANCE[name].needs for name in names - set(SEVERAL)))

    @property
    def collects(self) -> frozenset[str]:
        """What of `calibration.statistics.EXTRAS` a calibration pass collects: for this run, and for later ones."""
        return self.needs | set(self.corpora.collect)

    @property
    def stages(self) -> list[tuple[str, str]]:
        """(stage, recovery) of every row of the result table after `dense`."""
        names, controls = ["base"], self.evaluation.controls
        if self.gprune:
            names = [name for name in ("base", "averaged") if name in controls] + ["gprune"]
        recoveries = [self.recovery]
        if self.recovery != "none" and "unrecovered" in controls:
            recoveries = ["none", self.recovery]
        return [(name, recovery) for recovery in recoveries for name in names]

    @property
    def roles(self) -> dict[str, list[str]]:
        """Corpora whose train text this run reads, by what it reads them for; roles it does not play are empty."""
        c, recovery = self.corpora, recovery_of(self.recovery)
        return {
            "score": [c.score],
            "drift": c.drift if self.gprune else [],
            "learn": c.learn if self.learns else [],
            "recover": c.recover if recovery.needs or recovery.learns else [],
        }

    @property
    def calibration(self) -> list[str]:
        """Every corpus that statistics are collected on, each once, in a fixed order."""
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
            check_corpus(name)
        for role in ("drift", "learn", "recover", "evaluate"):
            names: dict[str, str] = {}
            for name in getattr(self.corpora, role):
                if (first := names.setdefault(identity(name), name)) != name:
                    raise UserError(f"--corpora.{role}: '{first}' and '{name}' are one corpus; name it once.")
        used = {identity(name) for name in self.used}
        both = [name for name in self.corpora.evaluate if identity(name) in used]
        if self.evaluation.split == "train" and both:
            raise UserError(
                f"--evaluation.split train: expected corpora that the run does not read, got '{both[0]}'; leave it out "
                f"of --corpora.evaluate, or measure on development text."
            )

    def resolved(self) -> dict[str, Any]:
        """All settings as plain data, with the defaults that depend on others filled in."""
        plain = asdict(self)
        plain["logging"]["mode"] = self.logging.resolved_mode
        plain["run"]["name"] = self.run_name
        return plain

    def settings(self) -> dict[str, Any]:
        """Everything that can change a result, as plain data: what two runs must share to share a folder.

        Left out: where results go, how they are logged and shown, what is exported, what is collected for others, and
        where weights lie meanwhile.
        """
        plain = asdict(self)
        for place in ("max_memory", "shard"):
            plain["model"].pop(place)
        for name in ("logging", "export", "dry_run"):
            plain.pop(name)
        plain["corpora"].pop("collect")
        plain["evaluation"].pop("samples")
        plain["run"] = {"seed": self.run.seed}
        plain["trainer"] = {
            "world_size": self.trainer.devices * self.trainer.num_nodes, "precision": self.trainer.precision
        } | self.matmul  # fmt: skip
        return plain

    @property
    def matmul(self) -> dict[str, str]:
        """`float32_matmul_precision`, where it is not what torch does by itself: part of all keys of what is kept."""
        name = "float32_matmul_precision"
        return {} if self.trainer.float32_matmul_precision == "highest" else {name: getattr(self.trainer, name)}

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
        return f"{model[:100]}-{self.final}-{self.importance}-{self.sparsity.target:g}-{digest}"
