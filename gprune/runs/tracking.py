"""CSV and Weights & Biases: the loggers of all stages of a run, and what they are told."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from gprune.config import RunConfig
from gprune.errors import dispensable
from gprune.runs.folder import RunFolder
from gprune.runs.results import key_part
from gprune.runs.wandb_runs import draw, wandb_run
from gprune.storage.files import key_of

OF_STAGE = re.compile(r"^(?!(?:development|epoch|trainer)\b)[^/]+")  # how keys begin that are not of the whole run
TAKEN_UP_BY = ("id", "project", "entity", "name", "group", "job_type")  # what `taken_up` has to know of a run of W&B


class _OfRow:
    """A logger whose curves bear the name of the row that learns: `distill/loss` is logged as `distill/<row>/loss`."""

    row = ""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        of_row = rf"\g<0>/{self.row}" if self.row else r"\g<0>"
        super().log_metrics({OF_STAGE.sub(of_row, key): value for key, value in metrics.items()}, step)


class _CSV(_OfRow, CSVLogger):
    pass


class _Wandb(_OfRow, WandbLogger):
    """One that may fail: the run goes on without it."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.tell(lambda run: super(_Wandb, self).log_metrics(metrics, step))

    def tell(self, what: Callable[[Any], None]) -> None:
        """Call a function of the W&B run, unless W&B has failed before."""
        if not self.lost:
            self.lost = True
            with dispensable("what W&B would show from now on", "csv/ has its curves"):
                what(self.experiment)
                self.lost = False


def of_wandb(loggers: Sequence[Logger]) -> list[_Wandb]:
    return [logger for logger in loggers if isinstance(logger, _Wandb)]


@contextmanager
def tracking(folder: RunFolder, cfg: RunConfig) -> Iterator[list[Logger]]:
    """A CSVLogger and, unless `--logging` says otherwise, a WandbLogger; closed when the context is left.

    None for a run that is finished, which is read and not logged again.
    """
    if folder.finished:
        yield []
        return
    # Without a version of its own, a run taken up again would delete the curves of its earlier sittings.
    loggers = [_CSV(folder.path, name="csv")]
    with wandb_run(folder.path, cfg.logging, id=id_of(folder.key, cfg), **about(cfg)) as run:
        if run is not None:
            # With a run of its own, WandbLogger would pass wandb.init an option that wandb 0.31 warns about on stderr.
            loggers.append(_Wandb(save_dir=folder.path, project=run.project, experiment=run))
            known = {name: getattr(run, name) or None for name in TAKEN_UP_BY}
            folder.update_manifest(wandb=known | {"mode": run.settings.mode})
        try:
            yield loggers
        finally:
            for logger in loggers:
                logger.save()  # what was logged after the last Trainer is still in memory


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


def id_of(key: str, cfg: RunConfig) -> str:
    """W&B's id of a run with this key, under the name and in the group that flags give it: the same in all sittings.

    It ends the names of W&B's folders, and begins as the run's name does.
    """
    name = cfg.logging.name or cfg.run_name
    return f"{re.sub('[^A-Za-z0-9_]+', '_', name)[:48]}_{key_of(run=key, name=[cfg.logging.group, name])[:12]}"


@contextmanager
def of_row(loggers: Sequence[Logger], row: str, stage: str) -> Iterator[None]:
    """All that is logged meanwhile is of this row of the run's table; of none where the name is empty.

    Args:
        stage: what the stage's curves begin with; they are drawn against its tokens.
    """
    curves = f"{stage}/{key_part(row)}"
    for logger in loggers:
        logger.row = key_part(row)
    for logger in of_wandb(loggers) if row else ():
        logger.tell(partial(draw, axes={f"{curves}/*": f"{curves}/tokens"}))
    try:
        yield
    finally:
        for logger in loggers:
            logger.row = ""


def how_to_look(folder: Path) -> str:
    """The command that shows the curves of a run, without an account."""
    latest = Path(os.environ.get("WANDB_DIR") or folder) / "wandb" / "latest-run"
    if latest.exists():
        return f"`wandb leet run {latest}` shows them in the terminal"
    return f"{folder / 'csv'} has them"


@rank_zero_only
def log_scalars(loggers: Sequence[Logger], values: dict[str, float], *, step: int) -> None:
    """Log values at a step of the Trainer, in every logger."""
    for logger in loggers:
        logger.log_metrics(values, step=step)


@rank_zero_only
def log_numbers(loggers: Sequence[Logger], numbers: Mapping[str, float]) -> None:
    """Single numbers: those of `final/` as a point of a curve too, which sweeps read; all in the summary of W&B."""
    log_scalars(loggers, {name: value for name, value in numbers.items() if name.startswith("final/")}, step=0)
    for logger in of_wandb(loggers):
        logger.tell(lambda run: run.summary.update(dict(numbers)))
