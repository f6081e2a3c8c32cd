"""CSV, and Weights & Biases or TensorBoard: the loggers of all stages of a run, and the axes of its curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.image import imread

from gprune.console import no_interrupts
from gprune.errors import UserError, first_line

# metric pattern -> its x axis. Lightning restarts its step in every stage, so each stage has an axis of its own.
AXES = {
    "learn/perplexity/*": "learn/epoch",
    "distill/perplexity/*": "distill/tokens",
    "curve/perplexity/*": "curve/sparsity",
    "modules/*": "modules/index",
}


@contextmanager
def tracking(folder: Path, *, tracker: str, mode: str, project: str, **about: Any) -> Iterator[list[Logger]]:
    """A CSVLogger and, if `tracker` names one, a WandbLogger or a TensorBoardLogger; closed when the context is left.

    Args:
        folder: the run folder; the loggers write `csv/`, `wandb/` and `tensorboard/` into it.
        tracker: wandb, tensorboard, or csv.
        mode: of W&B: offline (no account, `wandb sync` later) or online.
        project: W&B project.
        about: what else `wandb.init` is told of the run: name, group, job_type, tags, and config, the resolved
            configuration.
    """
    # Without a version of its own, a run taken up again would delete the curves of its earlier sittings.
    loggers: list[Logger] = [CSVLogger(folder, name="csv")]
    if tracker == "tensorboard":
        # One version for all sittings: events are added to those that are there.
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False))
        loggers[-1].log_hyperparams(about["config"])
    if tracker == "wandb":
        # A run of our own: WandbLogger would pass wandb.init an option that wandb 0.31 warns about on stderr. And
        # mode=, not offline=True, which leaves WANDB_MODE set in the process for whoever comes next.
        settings = wandb.Settings(silent=True, console="off")
        experiment = start(dir=folder, project=project, mode=mode, settings=settings, **about)
        loggers.append(WandbLogger(save_dir=folder, project=project, experiment=experiment))
    exit_code = 1
    try:
        yield loggers
        exit_code = 0
    finally:
        for logger in loggers:
            logger.save()  # what was logged after the last Trainer is still in memory
        if wandb.run is not None:
            # Offline it takes a second, in which a second Ctrl-C would get a line of W&B's; online it may hang.
            with no_interrupts() if wandb.run.offline else nullcontext():
                wandb.run.finish(exit_code=exit_code)


@rank_zero_only
def start(**settings: Any) -> Any:
    """A run of W&B, which knows what each curve is drawn against.

    Raises:
        UserError: online without an account or without network.
    """
    try:
        run = wandb.init(**settings)
    except wandb.errors.Error as error:
        advice = "log in with `wandb login`, or use --logging.mode offline"
        raise UserError(f"W&B could not start a run ({first_line(error)}); {advice}.") from error
    run.define_metric("fit", hidden=True)
    for pattern, axis in AXES.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    return run


def how_to_look(folder: Path, tracker: str) -> str:
    """The command that shows the curves of a run, without an account."""
    if tracker == "wandb" and (latest := folder / "wandb" / "latest-run").exists():
        return f"`wandb leet run {latest}` shows them in the terminal"
    if tracker == "tensorboard" and (events := folder / "tensorboard").exists():
        return f"`tensorboard --logdir {events}` shows them"
    return f"{folder / 'csv'} has them"


@rank_zero_only
def log_table(loggers: Sequence[Logger], key: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table of flat rows that share their columns, where the tracker has tables or text."""
    columns = list(rows[0]) if rows else []
    data = [[row[column] for column in columns] for row in rows]
    for logger in loggers if rows else ():
        if isinstance(logger, WandbLogger):
            logger.log_table(key, columns=columns, data=data)
        elif isinstance(logger, TensorBoardLogger):
            lines = [columns, ["---"] * len(columns), *data]
            logger.experiment.add_text(key, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


@rank_zero_only
def log_images(loggers: Sequence[Logger], paths: Sequence[Path]) -> None:
    """Figures as images under `figures/<stem>`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})
        elif isinstance(logger, TensorBoardLogger):
            for path in paths:
                image = imread(path)
                logger.experiment.add_image(f"figures/{path.stem}", image, dataformats="HWC"[: image.ndim])


@rank_zero_only
def log_scalars(loggers: Sequence[Logger], values: dict[str, float], *, step: int) -> None:
    """Log values at a step of the Trainer, in every logger."""
    for logger in loggers:
        logger.log_metrics(values, step=step)
