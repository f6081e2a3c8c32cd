"""Weights & Biases and CSV: one logger pair for all stages of a run, and the axes of its curves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("gprune")
on_process_zero = rank_zero_only

# metric pattern -> its x axis. Lightning restarts its step in every stage, so each stage has an axis of its own.
AXES = {
    "learn/perplexity/*": "learn/epoch",
    "curve/perplexity/*": "curve/sparsity",
    "modules/*": "modules/index",
}


@contextmanager
def tracking(
    folder: Path,
    *,
    mode: str,
    name: str,
    project: str,
    group: str,
    job_type: str,
    tags: Sequence[str],
    config: dict[str, Any],
) -> Iterator[list[Logger]]:
    """A CSVLogger and, unless `mode` is "disabled", a WandbLogger, closed when the context is left.

    Args:
        folder: the run folder; W&B writes `wandb/` and the CSV logger `csv/` into it.
        mode: offline (no account, `wandb sync` later), online or disabled.
        config: the resolved configuration, which becomes the W&B run's.
    """
    loggers: list[Logger] = [CSVLogger(folder, name="csv", version="")]
    if mode != "disabled":
        # A run of our own: WandbLogger would pass wandb.init an option that wandb 0.31 warns about on stderr. And
        # mode=, not offline=True, which leaves WANDB_MODE set in the process for whoever comes next.
        start = rank_zero_only(wandb.init, default=None)
        experiment = start(
            name=name, dir=folder, project=project, mode=mode, group=group, job_type=job_type, tags=list(tags),
            config=config, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        loggers.append(WandbLogger(save_dir=folder, project=project, experiment=experiment))
        define_axes(loggers[-1])
    try:
        yield loggers
    except BaseException:
        finish(exit_code=1)
        raise
    else:
        finish(exit_code=0)


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
