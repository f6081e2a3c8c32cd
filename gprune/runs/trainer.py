"""Lightning's Trainer, fit for people: settings refused before anything is computed, and a Ctrl-C that stays one."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar

from gprune.errors import UserError


def check_trainer(*, accelerator: str, devices: int, num_nodes: int, strategy: str) -> torch.device:
    """Build a Trainer and throw it away: whether this machine can do what is asked for, Lightning knows best.

    Returns:
        The device of this process.

    Raises:
        UserError: for an accelerator that is not there, too many devices, or an unknown strategy.
    """
    info = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = info.level
    info.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer = L.Trainer(
                accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy,
                logger=False, enable_checkpointing=False, enable_model_summary=False,
                enable_progress_bar=False,
            )  # fmt: skip
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".!")
        raise UserError(
            f"--trainer: cannot use accelerator '{accelerator}' with {devices} device(s) and strategy '{strategy}' "
            f"here: {reason}. Expected e.g. --trainer.accelerator auto --trainer.strategy auto."
        ) from error
    finally:
        info.setLevel(level)
    device = trainer.strategy.root_device
    if device.type == "mps":
        raise UserError(
            "--trainer.accelerator: Apple's GPU has no float64, which statistics are summed in; use "
            "--trainer.accelerator cpu."
        )
    return device


@contextmanager
def plain_interrupts() -> Iterator[None]:
    """Ctrl-C inside a Trainer stays a KeyboardInterrupt.

    Lightning makes it `sys.exit(1)`, which a notebook reports as a crash, and leaves Ctrl-C ignored from then on.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


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
