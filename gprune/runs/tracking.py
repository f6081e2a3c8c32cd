"""CSV, and Weights & Biases or TensorBoard: the loggers of all stages of a run, and the axes of its curves."""

from __future__ import annotations

import logging as messages
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.image import imread

from gprune.config import LoggingConfig, RunConfig
from gprune.console import no_interrupts
from gprune.errors import UserError, first_line

log = messages.getLogger("gprune")
# metric pattern -> its x axis. Lightning restarts its step in every stage, so each stage has an axis of its own.
# Those of recoveries are added by `of_row`.
AXES = {
    "development/*": "development/tokens",
    "partition/*": "trainer/global_step",
    "learn/*": "learn/tokens",
    "curve/*": "curve/sparsity",
    "modules/*": "modules/index",
}
UPLOAD_SECONDS = 600  # that the end of a run waits for W&B; what is left lies in the folder for `wandb sync`


class _OfRow:
    """A logger whose curves bear the name of the row that learns: `distill/loss` is logged as `distill/<row>/loss`."""

    row = ""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics({of_this_row(key, self.row): value for key, value in metrics.items()}, step)


class _CSV(_OfRow, CSVLogger):
    pass


class _TensorBoard(_OfRow, TensorBoardLogger):
    pass


class _Wandb(_OfRow, WandbLogger):
    """One that may fail: the run goes on without it, and says so once."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.tell(lambda run: super(_Wandb, self).log_metrics(metrics, step))

    def tell(self, what: Callable[[Any], None]) -> None:
        """Call a function of the W&B run, unless W&B has failed before."""
        if self.lost:
            return
        try:
            what(self.experiment)
        except Exception as error:  # wandb's, and those of the socket to its service
            self.lost = True
            log.warning("W&B is lost (%s); the run goes on without it.", first_line(error))


@contextmanager
def tracking(folder: Path, logging: LoggingConfig, **about: Any) -> Iterator[list[Logger]]:
    """A CSVLogger and, if `logging` names one, a WandbLogger or a TensorBoardLogger; closed when the context is left.

    Args:
        folder: the run folder; the loggers write `csv/`, `wandb/` and `tensorboard/` into it.
        logging: the flags of `--logging`.
        about: as `wandb_run` takes it.
    """
    # Without a version of its own, a run taken up again would delete the curves of its earlier sittings.
    loggers: list[Logger] = [_CSV(folder, name="csv")]
    if logging.resolved_tracker == "tensorboard":
        # One version for all sittings: events are added to those that are there.
        loggers.append(_TensorBoard(folder, name="tensorboard", version="", default_hp_metric=False))
        loggers[-1].log_hyperparams(about["config"])
    with wandb_run(folder, logging, **about) as run:
        if run is not None:
            # With a run of its own, WandbLogger would pass wandb.init an option that wandb 0.31 warns about on stderr.
            loggers.append(_Wandb(save_dir=folder, project=run.project, experiment=run))
        try:
            yield loggers
        finally:
            for logger in loggers:
                logger.save()  # what was logged after the last Trainer is still in memory


@contextmanager
def wandb_run(
    folder: Path | str, logging: LoggingConfig, *, id: str, name: str, group: str, job_type: str, tags: Sequence[str],
    config: Mapping[str, Any],
) -> Iterator[Any]:  # fmt: skip
    """A run of W&B, finished when the context is left; or the one that is open, which stays open.

    Flags of `logging` come first, then W&B's variables ($WANDB_NAME and so on), then the arguments. An open run keeps
    its name, group and tags, and gets the configuration as `gprune`.

    Args:
        folder: W&B writes into `wandb/` in it, unless $WANDB_DIR says where.
        logging: the flags of `--logging`.
        id: equal ids are one run, also in several files: `wandb sync` puts them together.
        config: settings, nested.

    Yields:
        wandb.Run, or None: with another tracker, in other processes than the first, and where W&B cannot start.

    Raises:
        UserError: online without an account.
    """
    if logging.resolved_tracker != "wandb" or rank_zero_only.rank != 0:
        yield None
        return
    if wandb.run is not None:
        wandb.run.config.update({"gprune": dict(config)}, allow_val_change=True)
        yield _with_axes(wandb.run)
        return
    known = os.environ.get
    own_tags = logging.tags or list(filter(None, known("WANDB_TAGS", "").split(",")))
    run = _started(
        # mode=, not offline=True, which leaves WANDB_MODE set in the process for whoever comes next.
        mode=logging.resolved_mode,
        dir=known("WANDB_DIR") or folder,
        project=logging.project or known("WANDB_PROJECT") or "gprune",
        name=logging.name or known("WANDB_NAME") or name,
        group=logging.group or known("WANDB_RUN_GROUP") or group,
        job_type=job_type,
        tags=list(dict.fromkeys(tag[:64] for tag in (*tags, *own_tags))),  # as long as W&B has them
        config=dict(config),
        id=id,
        resume="allow",  # offline it is noted for `wandb sync`
        settings=wandb.Settings(silent=True, console="off", finish_timeout=UPLOAD_SECONDS),
    )
    exit_code = 1
    try:
        yield run and _with_axes(run)
        exit_code = 0
    finally:
        if run is not None:
            # Offline it takes a second, in which a second Ctrl-C would get a line of W&B's.
            with no_interrupts() if run.offline else nullcontext():
                run.finish(exit_code=exit_code)


def about(cfg: RunConfig) -> dict[str, Any]:
    """What `wandb_run` is told of a run with these settings, but for its id."""
    s = cfg.sparsity
    return {
        "name": cfg.run_name,
        "group": os.path.basename(os.path.normpath(cfg.model.name)),
        "job_type": cfg.final,
        "tags": [cfg.importance, s.scope, s.allocation, cfg.partition.method, f"target {s.target:g}"],
        "config": cfg.resolved(),
    }


def key_part(name: str) -> str:
    """A name as a part of a key: `gprune + least_squares+distill` is `gprune_least_squares_distill`."""
    return re.sub(r"[^\w.-]+", "_", name)


def of_this_row(key: str, row: str) -> str:
    """A key with the row behind its first part, unless it is of the whole run."""
    first, slash, rest = key.partition("/")
    return key if not row or first in ("development", "epoch", "trainer") else f"{first}/{row}{slash}{rest}"


@contextmanager
def of_row(loggers: Sequence[Logger], row: str, stage: str) -> Iterator[None]:
    """All that is logged meanwhile is of this row of the run's table; of none where the name is empty.

    Args:
        stage: what the stage's curves begin with; they are drawn against its tokens.
    """
    for logger in loggers:
        logger.row = key_part(row)
        if row and isinstance(logger, _Wandb):
            axis = of_this_row(f"{stage}/tokens", logger.row)
            logger.tell(lambda run, axis=axis: _draw(run, f"{axis.removesuffix('tokens')}*", axis))
    try:
        yield
    finally:
        for logger in loggers:
            logger.row = ""


def _started(mode: str, **settings: Any) -> Any:
    """A run of W&B; one that cannot reach the server is written offline. None where that fails too."""
    try:
        return wandb.init(mode=mode, **settings)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        advice = "log in with `wandb login`, or use --logging.mode offline"
        raise UserError(f"W&B could not start a run ({first_line(error)}); {advice}.") from error
    except (wandb.errors.Error, OSError) as error:
        wandb.teardown()  # it would take the id for one that is in use
        instead = "the run is logged offline, for `wandb sync`" if mode == "online" else "the run goes on without it"
        log.warning("W&B could not start a run (%s); %s.", first_line(error), instead)
        return _started("offline", **settings) if mode == "online" else None


def _with_axes(run: Any) -> Any:
    """The run, told what each curve is drawn against."""
    for pattern, axis in AXES.items():
        _draw(run, pattern, axis)
    return run


def _draw(run: Any, pattern: str, axis: str) -> None:
    run.define_metric(axis, hidden=True)
    run.define_metric(pattern, step_metric=axis)


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
            logger.log_metrics({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})
        elif isinstance(logger, TensorBoardLogger):
            for path in paths:
                image = imread(path)
                logger.experiment.add_image(f"figures/{path.stem}", image, dataformats="HWC"[: image.ndim])


@rank_zero_only
def log_scalars(loggers: Sequence[Logger], values: dict[str, float], *, step: int) -> None:
    """Log values at a step of the Trainer, in every logger."""
    for logger in loggers:
        logger.log_metrics(values, step=step)


@rank_zero_only
def log_numbers(loggers: Sequence[Logger], numbers: Mapping[str, float]) -> None:
    """Single numbers: those of `final/` as a point of a curve too, which sweeps read; all in the summary of W&B."""
    log_scalars(loggers, {name: value for name, value in numbers.items() if name.startswith("final/")}, step=0)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.tell(lambda run: run.summary.update(dict(numbers)))
