"""Weights & Biases and CSV: one logger pair for all stages of a run, and the axes of its curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from gprune.errors import UserError

on_process_zero = rank_zero_only

# metric pattern -> its x axis. Lightning restarts its step in every stage, so each stage has an axis of its own.
AXES = {
    "learn/perplexity/*": "learn/epoch",
    "distill/perplexity/*": "distill/tokens",
    "curve/perplexity/*": "curve/sparsity",
    "modules/*": "modules/index",
}


@contextmanager
def tracking(folder: Path, *, mode: str, project: str, **about: Any) -> Iterator[list[Logger]]:
    """A CSVLogger and, unless `mode` is "disabled", a WandbLogger, closed when the context is left.

    Args:
        folder: the run folder; W&B writes `wandb/` and the CSV logger `csv/` into it.
        mode: offline (no account, `wandb sync` later), online or disabled.
        project: W&B project.
        about: what else `wandb.init` is told of the run: name, group, job_type, tags, and config, the resolved
            configuration.
    """
    # Without a version of its own, a run taken up again would delete the curves of its earlier sittings.
    loggers: list[Logger] = [CSVLogger(folder, name="csv")]
    if mode != "disabled":
        # A run of our own: WandbLogger would pass wandb.init an option that wandb 0.31 warns about on stderr. And
        # mode=, not offline=True, which leaves WANDB_MODE set in the process for whoever comes next.
        experiment = start(
            dir=folder, project=project, mode=mode, settings=wandb.Settings(silent=True, console="off"), **about
        )  # fmt: skip
        loggers.append(WandbLogger(save_dir=folder, project=project, experiment=experiment))
        define_axes(loggers[-1])
    exit_code = 1
    try:
        yield loggers
        exit_code = 0
    finally:
        loggers[0].save()  # what was logged after the last Trainer is still in memory
        finish(exit_code)


@rank_zero_only
def start(**settings: Any) -> Any:
    """`wandb.init`, or the one line that says why it could not be.

    Raises:
        UserError: online without an account or without network.
    """
    try:
        return wandb.init(**settings)
    except wandb.errors.Error as error:
        raise UserError(
            f"W&B could not start a run ({str(error).strip().splitlines()[0]}); log in with `wandb login`, or use "
            f"--logging.mode offline."
        ) from error


@rank_zero_only
def define_axes(logger: WandbLogger) -> None:
    for pattern, axis in AXES.items():
        logger.experiment.define_metric(axis, hidden=True)
        logger.experiment.define_metric(pattern, step_metric=axis)


@rank_zero_only
def finish(exit_code: int) -> None:
    if wandb.run is not None:
        wandb.run.finish(exit_code=exit_code)


@rank_zero_only
def log_table(loggers: Sequence[Logger], key: str, rows: Sequence[dict[str, Any]]) -> None:
    """A W&B table of flat rows that share their columns."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rows:
            columns = list(rows[0])
            logger.log_table(key, columns=columns, data=[[row[column] for column in columns] for row in rows])


@rank_zero_only
def log_images(loggers: Sequence[Logger], paths: Sequence[Path]) -> None:
    """Figures as W&B images under `figures/<stem>`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})


@rank_zero_only
def log_scalars(loggers: Sequence[Logger], values: dict[str, float], *, step: int) -> None:
    for logger in loggers:
        logger.log_metrics(values, step=step)
