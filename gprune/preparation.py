"""Before the method: refuse what cannot work, plan what it will cost, open the run, fetch model and text."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gprune.architectures import blocks_of, check_family, fingerprint, load_model, locate_model
from gprune.artifacts import RunFolder, to_yaml
from gprune.config import RunConfig
from gprune.corpora import load_corpus
from gprune.data import Windows, make_windows
from gprune.masks import UnitCosts, check_budget, unit_costs
from gprune.recovery import NEEDS_GRAM
from gprune.surgery import count_parameters
from gprune.tracking import tracking
from gprune.trainer import check_trainer, plain_interrupts

log = logging.getLogger("gprune")
JOIN = "\n\n"  # between documents


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any weight is read."""

    costs: UnitCosts
    target: int  # parameters to remove
    parameters: int  # of the whole model
    scope_parameters: int
    forward_tokens: int
    forward_backward_tokens: int
    uniform_widths: list[int]  # neurons per block under uniform sparsity
    memory_gib: float

    def describe(self, cfg: RunConfig) -> str:
        """The dry run, for people."""
        widths = self.uniform_widths
        share = self.target / self.parameters
        learned = cfg.gprune and cfg.sparsity.allocation == "learned"
        return "\n".join(
            [
                f"model        {cfg.model.name}: {self.parameters:,} parameters, {len(widths)} blocks",
                f"scope        {cfg.sparsity.scope}: {self.scope_parameters:,} parameters in units",
                f"removes      {self.target:,} parameters: {cfg.sparsity.target:.1%} of the scope, "
                f"{share:.1%} of the model",
                f"widths       {min(widths)} to {max(widths)} of {max(self.costs.neurons)} neurons per block if uniform"
                + ("; learned thresholds move them" if learned else ""),
                f"forward      at most {self.forward_tokens:,} tokens: calibration on {len(cfg.corpora.calibration)} "
                f"corpora (fewer if cached), evaluation on {len(cfg.corpora.evaluate)}",
                f"and backward {self.forward_backward_tokens:,} tokens: {cfg.sparsity.epochs} epochs over "
                f"{len(cfg.corpora.learn)} corpora"
                if learned
                else "and backward none: nothing is learned",
                f"memory       about {self.memory_gib:.1f} GiB",
                f"results      {os.path.join(cfg.run.dir, cfg.run_name)}",
            ]
        )


def evaluated_stages(cfg: RunConfig) -> list[tuple[str, str]]:
    """(stage, recovery) of every row of the result table after `dense`; each stage without recovery too."""
    stages = [name for name in ("base", "base_averaged") if name in cfg.evaluation.controls or not cfg.gprune]
    stages = [*stages, "gprune"] if cfg.gprune else [s for s in stages if s != "base_averaged"]
    recoveries = ["none"] if cfg.recovery == "none" else ["none", cfg.recovery]
    return [(stage, recovery) for recovery in recoveries for stage in stages]


def check(cfg: RunConfig) -> Plan:
    """Refuse before anything is loaded, and plan.

    The model is built from its configuration on the meta device: shapes without weights.

    Raises:
        UserError: for an unknown corpus, an unsupported model, or an impossible budget.
    """
    cfg.check_names()
    check_trainer(**asdict(cfg.trainer))
    check_family(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    config = AutoConfig.from_pretrained(locate_model(cfg.model.name), trust_remote_code=cfg.model.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.model.trust_remote_code)
    costs = unit_costs(blocks_of(skeleton), scope=cfg.sparsity.scope)
    target = check_budget(costs, cfg.sparsity.target, width_multiple=cfg.sparsity.width_multiple)
    for sparsity in cfg.evaluation.curve:
        check_budget(costs, sparsity, width_multiple=cfg.sparsity.width_multiple)
    parameters = count_parameters(skeleton, "all")
    c, e = cfg.corpora, cfg.evaluation
    learned = cfg.gprune and cfg.sparsity.allocation == "learned"
    development = len(c.learn) * e.development_samples * c.seq_len
    points = (cfg.sparsity.epochs + 1) + 2 + len(e.curve) if learned else 0
    evaluations = 1 + len(evaluated_stages(cfg))
    gram = sum(n * n for n in costs.neurons) if cfg.recovery in NEEDS_GRAM else 0
    weight_bytes = 4 if cfg.model.dtype == "float32" else 2
    activations = c.batch_size * c.seq_len * max(costs.neurons) * len(costs.neurons) * 10 if learned else 0
    return Plan(
        costs=costs,
        target=target,
        parameters=parameters,
        scope_parameters=costs.total,
        forward_tokens=len(c.calibration) * c.num_samples * c.seq_len
        + len(c.evaluate) * e.num_samples * e.seq_len * evaluations
        + points * development
        + 3 * check_tokens(cfg),
        forward_backward_tokens=learned * cfg.sparsity.epochs * len(c.learn) * c.num_samples * c.seq_len,
        uniform_widths=[n - round(n * target / costs.total) for n in costs.neurons],
        memory_gib=1 + (2 * parameters * weight_bytes + 4 * (len(c.calibration) + 1) * gram + 4 * activations) / 2**30,
    )


def check_tokens(cfg: RunConfig) -> int:
    """Tokens of the batch on which masked, sliced and reloaded logits are compared."""
    return min(cfg.evaluation.seq_len, 128)


class TokenMeter:
    """Counts the tokens that go through the model's decoder, with and without gradients. Never estimated."""

    def __init__(self) -> None:
        self.forward = self.forward_backward = 0
        self._handles: list[Any] = []

    def watch(self, model: PreTrainedModel) -> None:
        self._handles.append(model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True))

    def _count(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if torch.is_grad_enabled():
            self.forward_backward += input_ids.numel()
        else:
            self.forward += input_ids.numel()

    def counts(self) -> dict[str, int]:
        return {"forward_tokens": self.forward, "forward_backward_tokens": self.forward_backward}

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()


@dataclass
class Run:
    """An open run: its folder, loggers and meter, and how to make a Trainer."""

    cfg: RunConfig
    folder: RunFolder
    loggers: list[Logger]
    meter: TokenMeter

    def trainer(self, what: str, **kwargs: Any) -> L.Trainer:
        """A fresh Trainer for one stage; `what` is said in the progress bar and the log."""
        log.info("%s", what)
        t = self.cfg.trainer
        callbacks = [*kwargs.pop("callbacks", []), NamedProgressBar(what)]
        return L.Trainer(
            accelerator=t.accelerator, devices=t.devices, num_nodes=t.num_nodes, strategy=t.strategy,
            logger=self.loggers, callbacks=callbacks, default_root_dir=self.folder.path,
            # Our samplers shard exactly; Lightning's would repeat windows to fill up the last batch.
            use_distributed_sampler=False,
            enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
            **kwargs,
        )  # fmt: skip


class NamedProgressBar(TQDMProgressBar):
    """Lightning's progress bar, saying what is going on."""

    def __init__(self, what: str):
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 0)
        self.what = what

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.set_description(self.what)
        return bar

    def init_test_tqdm(self) -> Any:
        bar = super().init_test_tqdm()
        bar.set_description(self.what)
        return bar


@contextmanager
def opened(cfg: RunConfig) -> Iterator[Run]:
    """Open (or take up) the run folder and the loggers; seed everything.

    Raises:
        UserError: if the folder holds a run with other settings or cannot be written.
    """
    L.seed_everything(cfg.run.seed, verbose=False)
    meter = TokenMeter()
    folder = RunFolder(os.path.join(cfg.run.dir, cfg.run_name), meter.counts)
    rank_zero_only(folder.open)(cfg.settings(), to_yaml(asdict(cfg)))
    variant = "gprune" if cfg.gprune else "base"
    with (
        plain_interrupts(),
        tracking(
            folder.path,
            mode=cfg.logging.resolved_mode,
            name=cfg.run_name,
            project=cfg.logging.project,
            group=cfg.logging.group or os.path.basename(cfg.model.name),
            job_type=variant,
            tags=[
                cfg.importance,
                cfg.sparsity.scope,
                cfg.sparsity.allocation,
                cfg.partition.method,
                *cfg.logging.tags,
            ],
            config=asdict(cfg),
        ) as loggers,
    ):
        run = Run(cfg, folder, loggers, meter)
        try:
            yield run
        finally:
            run.meter.close()


def load(cfg: RunConfig, run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model and its tokenizer, watched by the run's token meter."""
    log.info("Loading %s", cfg.model.name)
    model, tokenizer = load_model(
        cfg.model.name,
        dtype=getattr(torch, cfg.model.dtype),
        device_map=cfg.model.device_map,
        trust_remote_code=cfg.model.trust_remote_code,
    )
    run.meter.watch(model)
    run.folder.update_manifest(model={"name": cfg.model.name, "fingerprint": fingerprint(model)})
    return model, tokenizer


@dataclass(frozen=True)
class Text:
    """Windows by role; the same corpus in two roles has the same windows."""

    train: Mapping[str, Windows]  # score, drift, learn and recover, by corpus
    development: list[Windows]  # one per learning corpus
    test: list[Windows]  # one per evaluated corpus

    @property
    def used(self) -> list[Windows]:
        return [*self.train.values(), *self.development]


def prepare_text(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read, tokenise and cut every corpus for its roles.

    Raises:
        UserError: for a corpus with too little text for the samples asked for.
    """
    c, e = cfg.corpora, cfg.evaluation

    def windows(corpus: str, split: str, samples: int, seq_len: int) -> Windows:
        # Text that is measured on stays the same for every --run.seed: seeds compare methods, not test sets.
        seed = cfg.run.seed if split == "train" else 0
        texts = load_corpus(corpus, split)
        return make_windows(
            texts, tokenizer, corpus=corpus, split=split, num_samples=samples, seq_len=seq_len, seed=seed, join=JOIN
        )

    log.info("Reading %d corpora", len({*c.calibration, *c.learn, *c.evaluate}))
    train = dict.fromkeys([*c.calibration, *c.learn])
    return Text(
        train={name: windows(name, "train", c.num_samples, c.seq_len) for name in train},
        development=[windows(name, "development", e.development_samples, c.seq_len) for name in c.learn],
        test=[windows(name, "test", e.num_samples, e.seq_len) for name in c.evaluate],
    )
