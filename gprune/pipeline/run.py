"""An open run: its plan, the model, the text, its folder, loggers, token counts, and a Trainer for each stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.evaluation.perplexity import Forecast
from gprune.models.blocks import Block, blocks_of
from gprune.models.loading import fingerprint
from gprune.pipeline.cost import keeps_taught, passes
from gprune.pipeline.inputs import Text, load, prepare_text
from gprune.pipeline.plan import Plan, check
from gprune.runs.checkpoints import Checkpoints
from gprune.runs.folder import RunFolder
from gprune.runs.tracking import of_row, tracking
from gprune.runs.trainer import PROFILERS, StageBar, multiplying, plain_interrupts
from gprune.runs.user_callbacks import Witness, callbacks_of_stage, retell
from gprune.screen import Screen
from gprune.sparsity.budget import Budget
from gprune.stages.callbacks import StepCurves, curves_of
from gprune.storage.files import key_of
from gprune.storage.yaml_text import to_yaml

log = logging.getLogger("gprune")


class TokenMeter:
    """Counts the tokens that go through the model's decoder, with and without gradients; counted, never estimated.

    Under ddp each process counts its own share.
    """

    def __init__(self) -> None:
        self.forward = self.forward_backward = 0
        self._earlier: Counter[str] = Counter()  # of earlier sittings, which a checkpoint holds the result of
        self.hooks = ExitStack()

    def watch(self, model: PreTrainedModel) -> RemovableHandle:
        """Count what goes through this model's decoder from now on, until the handle is removed or the run ends."""
        handle = model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)
        self.hooks.callback(handle.remove)
        return handle

    def _count(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()
        self.add(*((0, tokens) if torch.is_grad_enabled() else (tokens, 0)))

    def add(self, forward: int, forward_backward: int = 0) -> None:
        """Count tokens that were passed layer by layer, outside `decoder.forward`."""
        self.forward += forward
        self.forward_backward += forward_backward

    def work(self) -> float:
        """All tokens so far, by what they cost."""
        return passes(self.forward, self.forward_backward)

    def counts(self) -> dict[str, int]:
        """Tokens by kind, as the manifest has them, with those that were taken up."""
        here = {"forward_tokens": self.forward, "forward_backward_tokens": self.forward_backward}
        return {kind: count + self._earlier[kind] for kind, count in here.items()}

    def take_up(self, earlier: dict[str, int]) -> None:
        """Count tokens of an earlier sitting as well, but not as work of this one."""
        self._earlier.update(earlier)


@dataclass(frozen=True)
class Run:
    """What every step of the method works with."""

    plan: Plan
    model: PreTrainedModel  # dense, frozen
    tokenizer: PreTrainedTokenizerBase
    text: Text
    folder: RunFolder
    loggers: list[Logger]
    meter: TokenMeter
    fingerprint: str  # of the model
    screen: Screen
    callbacks: Sequence[L.Callback]  # that the caller brings, beside those of `--trainer.callbacks`
    forecasts: dict[str, list[Forecast]] = field(default_factory=dict)  # by hash of windows; empty where none is kept

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

    @property
    def learning_tokens(self) -> int:
        """Tokens that thresholds learn from."""
        return sum(w.tokens.numel() for w in self.text.learn) * self.cfg.sparsity.epochs if self.cfg.learns else 0

    @cached_property
    def taught(self) -> dict[bytes, Tensor] | None:
        """`Material.taught` of all rows; None where it is not kept."""
        return {} if keeps_taught(self.cfg, self.model.config.hidden_size) else None

    def step(self, number: int, what: str) -> None:
        """A step of the method begins: say so, in the log and on the screen."""
        log.info("%s", self.screen.step(number, what))

    def trainer(self, what: str, *, name: str = "", callbacks: Sequence[L.Callback] = (), **kwargs: Any) -> L.Trainer:
        """A fresh Trainer for one stage. Bar and log say `what`, whose first word names its files without a `name`."""
        log.info("%s", what)
        t, name = self.cfg.trainer, name or what.split()[0].lower()
        brought = callbacks_of_stage(self.callbacks, t.callbacks, self.folder / f"checkpoints/{name}")
        witness = Witness(lambda how_far: self.folder.update_manifest(stopped={name: how_far}))
        callbacks = [*brought, witness, *callbacks, StageBar(self.screen, what)]
        kwargs["gradient_clip_val"] = kwargs.get("gradient_clip_val") or t.gradient_clip_val
        kwargs["log_every_n_steps"] = t.log_every_n_steps or kwargs.get("log_every_n_steps", 1)
        return L.Trainer(
            accelerator=t.accelerator, devices=t.devices, num_nodes=t.num_nodes,
            logger=self.loggers, callbacks=callbacks, default_root_dir=self.folder.path,
            deterministic=t.deterministic or None, detect_anomaly=t.detect_anomaly,
            profiler=t.profiler and PROFILERS[t.profiler](self.folder / "profiles", name.replace("/", "-")),
            # Our samplers shard exactly; Lightning's would repeat windows to fill up the last batch.
            use_distributed_sampler=False,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),  # else Lightning brings its own
            enable_model_summary=False, num_sanity_val_steps=0,
            **{"strategy": t.strategy} | kwargs,
        )  # fmt: skip

    def fit(
        self, name: str, what: str, stage: L.LightningModule, text: Sequence[Windows], *,
        batch_size: int | None = None, callbacks: Sequence[L.Callback] = (), row: str = "", **kwargs: Any,
    ) -> L.Trainer:  # fmt: skip
        """Train a stage on text, from its last checkpoint if a killed sitting left one.

        The checkpoint stays until what was learned is written to the folder, under the stage's name.

        Args:
            name: of the stage in the run folder.
            row: of the run's table, whose model learns: its curves bear the name.
            kwargs: of the Trainer.
        """
        cfg, t, limit = self.cfg, self.cfg.trainer, self.cfg.trainer.limit_train_batches
        saving = Checkpoints(self.folder, name, stage, self.meter, 60 * cfg.run.checkpoint_minutes)
        data = CorpusDataModule(train=text, batch_size=batch_size or cfg.corpora.batch_size, seed=cfg.run.seed)
        trainer = self.trainer(
            what, name=name, callbacks=[StepCurves(), *callbacks, saving], precision=t.precision, **kwargs,
            limit_train_batches=limit if limit is None or limit < 1 else int(limit), max_steps=t.max_steps or -1,
        )  # fmt: skip
        if (checkpoint := saving.usable()) is not None:
            log.info("Going on from %s; what is computed again since then counts once", checkpoint)
        with self.folder.part(name), of_row(self.loggers, row, curves_of(stage)):
            trainer.fit(stage, data, ckpt_path=checkpoint, weights_only=True)
        return trainer


@contextmanager
def opened(cfg: RunConfig, callbacks: Sequence[L.Callback] = ()) -> Iterator[Run]:
    """Plan, load model and text, open (or take up) the run folder and the loggers, seed everything, count tokens.

    Args:
        callbacks: that the caller brings, beside those of `--trainer.callbacks`.

    Raises:
        UserError: for settings, a model or text that cannot be; if the folder holds a run with other settings, is in
            use by another process, or cannot be written; for what a callback that is not ours raises.
    """
    asked, plan = cfg.trainer.precision, check(cfg, callbacks, together=True)
    cfg = plan.cfg
    model, tokenizer = load(cfg, plan.device)
    log.info("Reading %d corpora", len({*cfg.used, *cfg.corpora.evaluate}))
    text = prepare_text(cfg, tokenizer, model.get_input_embeddings().num_embeddings)
    L.seed_everything(cfg.run.seed, verbose=False)
    meter = TokenMeter()
    meter.watch(model)
    inputs = {"model": fingerprint(model), "text": text.hashes()}
    if callbacks:  # class, and Lightning's key of its state
        inputs["callbacks"] = [f"{type(one).__module__}.{one.state_key}" for one in callbacks]
    if cfg.timed_for:  # another machine's table is another budget
        inputs["speed"] = key_of(table=plan.speed)
    settings = cfg.settings() | {"inputs": inputs}
    folder = RunFolder(cfg.folder, meter.counts, key=key_of(settings=settings))
    work = {step: passes(*tokens) for step, tokens in plan.tokens.items()}
    screen = Screen(work, meter.work)
    with (
        folder.opened(settings, to_yaml(cfg.resolved())), plain_interrupts(),
        tracking(folder, cfg) as loggers, screen, meter.hooks,
        multiplying(cfg.trainer.float32_matmul_precision),
    ):  # fmt: skip
        if asked == "auto" and not (folder.finished or folder.manifest.get("precision")):
            folder.update_manifest(precision={"asked": asked, "because": plan.why_precision})
        log.info("Precision of learning: %s (%s)", cfg.trainer.precision, plan.why_precision)
        try:
            yield Run(plan, model, tokenizer, text, folder, loggers, meter, inputs["model"], screen, callbacks)
        except Exception as error:
            retell(error)
            raise
