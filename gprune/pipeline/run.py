"""An open run: its folder, loggers, token counts, and a Trainer for each stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel

from gprune.config import RunConfig
from gprune.models.loading import fingerprint
from gprune.pipeline.inputs import Text
from gprune.runs.folder import RunFolder
from gprune.runs.tracking import tracking
from gprune.runs.trainer import NamedProgressBar, plain_interrupts
from gprune.storage.files import key_of, to_yaml

log = logging.getLogger("gprune")


class TokenMeter:
    """Counts the tokens that go through the model's decoder, with and without gradients; counted, never estimated.

    Under ddp each process counts its own share.
    """

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

    def add(self, forward: int) -> None:
        """Count tokens that went through as many layers as the decoder has, though not by way of it."""
        self.forward += forward

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
    fingerprint: str  # of the dense model

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


@contextmanager
def opened(cfg: RunConfig, model: PreTrainedModel, text: Text) -> Iterator[Run]:
    """Open (or take up) the run folder and the loggers; seed everything; count the model's tokens.

    Raises:
        UserError: if the folder holds a run with other settings, is in use by another process, or cannot be written.
    """
    L.seed_everything(cfg.run.seed, verbose=False)
    meter = TokenMeter()
    meter.watch(model)
    inputs = {"model": fingerprint(model), "text": text.hashes()}
    settings = cfg.settings() | {"inputs": inputs}
    folder = RunFolder(
        os.path.join(os.path.expanduser(cfg.run.dir), cfg.run_name), meter.counts, key=key_of(settings=settings)
    )
    variant = "gprune" if cfg.gprune else "base"
    with (
        folder.opened(settings, to_yaml(cfg.resolved())),
        plain_interrupts(),
        tracking(
            folder.path,
            mode=cfg.logging.resolved_mode,
            name=cfg.run_name,
            project=cfg.logging.project,
            group=cfg.logging.group or os.path.basename(os.path.normpath(cfg.model.name)),
            job_type=variant,
            tags=[
                cfg.importance,
                cfg.sparsity.scope,
                cfg.sparsity.allocation,
                cfg.partition.method,
                *cfg.logging.tags,
            ],
            config=cfg.resolved(),
        ) as loggers,
    ):
        run = Run(cfg, folder, loggers, meter, inputs["model"])
        try:
            yield run
        finally:
            run.meter.close()
