"""An open run: its plan, the model, the text, its folder, loggers, token counts, and a Trainer for each stage."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.calibration.statistics import CorpusStatistics, pooled
from gprune.config import RunConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.models.blocks import Block, blocks_of
from gprune.models.loading import fingerprint
from gprune.models.masks import Masks
from gprune.pipeline.cost import passes
from gprune.pipeline.inputs import Text, load, prepare_text
from gprune.pipeline.plan import Plan, check
from gprune.recoveries import Material, recovery_of
from gprune.runs.folder import RunFolder
from gprune.runs.tracking import log_scalars, tracking
from gprune.runs.trainer import Checkpoints, StageBar, multiplying, plain_interrupts
from gprune.screen import Screen
from gprune.sparsity.budget import Budget
from gprune.stages.callbacks import DevelopmentCurve
from gprune.storage.files import content_hash, key_of
from gprune.storage.yaml_text import to_yaml

log = logging.getLogger("gprune")


class TokenMeter:
    """Counts the tokens that go through the model's decoder, with and without gradients; counted, never estimated.

    Under ddp each process counts its own share.
    """

    def __init__(self) -> None:
        self.forward = self.forward_backward = 0
        self._handles: list[RemovableHandle] = []

    def watch(self, model: PreTrainedModel) -> RemovableHandle:
        """Count what goes through this model's decoder from now on, until the handle is removed or the run ends."""
        handle = model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)
        self._handles.append(handle)
        return handle

    def _count(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if torch.is_grad_enabled():
            self.forward_backward += input_ids.numel()
        else:
            self.forward += input_ids.numel()

    def add(self, forward: int, forward_backward: int = 0) -> None:
        """Count tokens that went through as many layers as the decoder has, though not by way of it."""
        self.forward += forward
        self.forward_backward += forward_backward

    def work(self) -> float:
        """All tokens so far, by what they cost."""
        return passes(self.forward, self.forward_backward)

    def counts(self) -> dict[str, int]:
        """Tokens by kind, as the manifest has them."""
        return {"forward_tokens": self.forward, "forward_backward_tokens": self.forward_backward}

    def close(self) -> None:
        """Count no more."""
        while self._handles:
            self._handles.pop().remove()


@dataclass(frozen=True)
class Run:
    """What every step of the method works with."""

    plan: Plan
    model: PreTrainedModel  # dense, frozen; or what earlier steps of a schedule have left of it
    tokenizer: PreTrainedTokenizerBase
    text: Text
    folder: RunFolder
    loggers: list[Logger]
    meter: TokenMeter
    fingerprint: str  # of the model
    screen: Screen
    teacher: PreTrainedModel | None = None  # the dense model, where `model` is what earlier steps have left of it

    @property
    def cfg(self) -> RunConfig:
        return self.plan.cfg

    @property
    def budget(self) -> Budget:
        return self.plan.budget

    @cached_property
    def blocks(self) -> list[Block]:
        """The model's."""
        return blocks_of(self.model)

    def step(self, number: int, what: str) -> None:
        """A step of the method begins: say so, in the log and on the screen."""
        log.info("%s", self.screen.step(number, what))

    def trainer(self, what: str, **kwargs: Any) -> L.Trainer:
        """A fresh Trainer for one stage; `what` is said in the progress bar and the log."""
        log.info("%s", what)
        t, strategy = self.cfg.trainer, kwargs.pop("strategy", self.cfg.trainer.strategy)
        callbacks = [*kwargs.pop("callbacks", []), StageBar(self.screen, what)]
        return L.Trainer(
            accelerator=t.accelerator, devices=t.devices, num_nodes=t.num_nodes, strategy=strategy,
            logger=self.loggers, callbacks=callbacks, default_root_dir=self.folder.path,
            # Our samplers shard exactly; Lightning's would repeat windows to fill up the last batch.
            use_distributed_sampler=False,
            enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
            **kwargs,
        )  # fmt: skip

    def fit(
        self, name: str, what: str, stage: L.LightningModule, text: Sequence[Windows], *,
        batch_size: int | None = None, callbacks: Sequence[L.Callback] = (), **kwargs: Any,
    ) -> L.Trainer:  # fmt: skip
        """Train a stage on text, from its last checkpoint if a killed sitting left one.

        The checkpoint stays until what was learned is written to the folder, under the stage's name.

        Args:
            name: of the stage in the run folder.
            kwargs: of the Trainer.
        """
        cfg = self.cfg
        path, seconds = self.folder.checkpoint(name), 60 * cfg.run.checkpoint_minutes
        kept = Checkpoints(path, f"{self.folder.key} {name}", seconds, saved=self.folder.note)
        data = CorpusDataModule(train=text, batch_size=batch_size or cfg.corpora.batch_size, seed=cfg.run.seed)
        trainer = self.trainer(
            what, log_every_n_steps=1, precision=cfg.trainer.precision, callbacks=[*callbacks, kept], **kwargs
        )
        if (found := kept.found()) is not None:
            log.info("Going on from %s", found)
        log_scalars(self.loggers, {"fit": self.folder.number_of(name)}, step=0)
        trainer.fit(stage, data, ckpt_path=found, weights_only=True)
        return trainer

    def material(self, masks: Masks, statistics: Mapping[str, CorpusStatistics], recovery: str) -> Material:
        """What a recovery by this name works with: the statistics and the text of `corpora.recover` that it needs."""
        c, found = self.cfg.corpora, recovery_of(recovery)
        done = f"recovery/{recovery}-{content_hash(masks.tensors())[:8]}"
        return Material(
            self.model,
            masks,
            ridge=self.cfg.ridge,
            statistics=pooled(statistics[corpus] for corpus in c.recover) if found.needs - {"text"} else None,
            text=[self.text.train[corpus] for corpus in c.recover] if "text" in found.needs else (),
            batch_size=c.batch_size,
            count=self.meter.add,
            fresh=self.text.fresh if found.learns else (),
            settings=self.cfg.recovery_settings,
            fit=functools.partial(self._fit, ((done, f"-{n}" * bool(n)) for n in itertools.count())),
            shard=self.cfg.model.shard,
            teacher=self.teacher,
        )

    def _fit(
        self, places: Iterator[tuple[str, str]], what: str, stage: L.LightningModule, *, batch_size: int | None = None,
        clip: float | None = None, accumulate: int = 1, points: int = 4, keep: str = "last",
    ) -> None:  # fmt: skip
        """Train a recovery's stage once through its text, or give it back what an earlier sitting had learned.

        Args:
            places: where in the run folder what the recovery's stages have learned is kept, one after the other: what
                the name of each begins and ends with.
            batch_size: in place of `--corpora.batch_size`.
            clip: the largest norm of the gradient.
            accumulate: batches whose gradients make one step.
            points, keep: as in `--distill`; for stages that have a `student`.
        """
        if not isinstance(stage, L.LightningModule):
            raise UserError(f"{what}: expected a LightningModule to train, got {type(stage).__name__}.")
        (done, number), c = next(places), self.cfg.corpora
        name = f"{done}-{type(stage).__name__}{number}"
        if (learned := self.folder.read(name)) is None:  # the step that shrinks or evaluates counts its cost
            curve = DevelopmentCurve(self.text.development, points=points, keep=keep, batch_size=c.batch_size)
            text = self.text.fresh or [self.text.train[corpus] for corpus in c.recover]
            self.fit(
                name, what, stage, text, batch_size=batch_size, max_epochs=1, gradient_clip_val=clip,
                accumulate_grad_batches=accumulate, callbacks=[curve] * hasattr(stage, "student"),
                strategy=self._strategy(stage),
            )  # fmt: skip
            learned = {name: value.detach().cpu().clone() for name, value in stage.state_dict().items()}
            self.folder.write(name, learned)
            self.folder.note()
        stage.load_state_dict(learned)

    def _strategy(self, stage: L.LightningModule) -> str | ModelParallelStrategy:
        """The trainer's; or, for a stage that spreads what learns over processes, Lightning's for such."""
        t = self.cfg.trainer
        if not (self.cfg.model.shard and is_overridden("configure_model", stage)):
            return t.strategy
        return ModelParallelStrategy(t.devices * t.num_nodes, 1, save_distributed_checkpoint=False)


@contextmanager
def opened(cfg: RunConfig) -> Iterator[Run]:
    """Plan, load model and text, open (or take up) the run folder and the loggers, seed everything, count tokens.

    Raises:
        UserError: for settings, a model or text that cannot be; if the folder holds a run with other settings, is in
            use by another process, or cannot be written.
    """
    plan = check(cfg)
    model, tokenizer = load(cfg, plan.device)
    text = prepare_text(cfg, tokenizer, model.get_input_embeddings().num_embeddings)
    L.seed_everything(cfg.run.seed, verbose=False)
    meter = TokenMeter()
    meter.watch(model)
    inputs = {"model": fingerprint(model), "text": text.hashes()}
    settings = cfg.settings() | {"inputs": inputs}
    folder = RunFolder(cfg.folder, meter.counts, key=key_of(settings=settings))
    screen = Screen(plan.work, meter.work, rounds=cfg.sparsity.steps)
    with (
        folder.opened(settings, to_yaml(cfg.resolved())), plain_interrupts(),
        _loggers(cfg, folder) as loggers, multiplying(cfg.trainer.float32_matmul_precision), screen,
    ):  # fmt: skip
        try:
            yield Run(plan, model, tokenizer, text, folder, loggers, meter, inputs["model"], screen)
        finally:
            meter.close()


def _loggers(cfg: RunConfig, folder: RunFolder) -> AbstractContextManager[list[Logger]]:
    """The loggers of a run; none for one that is finished, which is read and not logged again."""
    if folder.finished:
        return nullcontext([])
    return tracking(
        folder.path,
        tracker=cfg.logging.resolved_tracker,
        mode=cfg.logging.resolved_mode,
        name=cfg.run_name,
        project=cfg.logging.project,
        # Sittings at a run are one run of W&B's.
        id=key_of(run=folder.key, name=cfg.run_name)[:12],
        resume="allow" if cfg.logging.resolved_mode == "online" else None,
        group=cfg.logging.group or os.path.basename(os.path.normpath(cfg.model.name)),
        job_type=cfg.final,
        tags=[
            tag[:64]  # as long as W&B has them
            for tag in (
                cfg.importance,
                cfg.sparsity.scope,
                cfg.sparsity.allocation,
                cfg.partition.method,
                *cfg.logging.tags,
            )
        ],
        config=cfg.resolved(),
    )
