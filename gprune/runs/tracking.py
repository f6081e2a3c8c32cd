"""CSV and Weights & Biases: runs begun and taken up, the loggers of all stages, and what they are told."""

from __future__ import annotations

import inspect
import logging as messages
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from gprune.config import LoggingConfig, RunConfig, flat
from gprune.config.running import ClassPath
from gprune.errors import UserError, first_line, optional_output
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import key_part
from gprune.runs.user_callbacks import class_of, made
from gprune.storage.files import key_of

log = messages.getLogger("gprune")
OF_STAGE = re.compile(r"^(?!(?:development|epoch|trainer)\b)[^/]+")  # how keys begin that are not of the whole run
TAKEN_UP_BY = ("id", "project", "entity", "name", "group", "job_type")  # what `taken_up` has to know of a run of W&B
# metric pattern -> its x axis. Lightning restarts its step in every stage, so each has its own; recoveries: `of_row`.
AXES = {
    "development/*": "development/tokens",
    "partition/*": "trainer/global_step",
    "learn/*": "learn/tokens",
    "curve/*": "curve/sparsity",
    "modules/*": "modules/index",
}
FOLDER = ("*.json", "config.yaml", "*.safetensors", "masks/*", "statistics/*")  # what `load_run` reads, but the model
UPLOAD_SECONDS = 600  # that the end of a run waits for W&B; what is left lies in the folder for `wandb sync`


class _ByRow:
    """`log_metrics` of a logger, with the row of the run's table whose model learns in the names of curves.

    `distill/loss` becomes `distill/<row>/loss`. Development perplexity keeps its name for the run's own model and
    becomes `controls/<row>/perplexity` for a control.
    """

    row, control = "", False

    def __init__(self, log_metrics: Callable[..., None]):
        self.log_metrics = log_metrics

    def __call__(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.log_metrics({self.named(key): value for key, value in metrics.items()}, step)

    def named(self, key: str) -> str:
        if self.control and key.startswith("development/"):
            return key.replace("development", f"controls/{self.row}", 1)
        return OF_STAGE.sub(rf"\g<0>/{self.row}", key) if self.row else key


class _Wandb(WandbLogger):
    """A WandbLogger whose failures do not stop the run."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.tell(lambda run: super(_Wandb, self).log_metrics(metrics, step))

    def tell(self, what: Callable[[Any], None]) -> None:
        """Call a function of the W&B run, unless W&B has failed before."""
        if not self.lost:
            self.lost = True
            with optional_output("what W&B would show from now on", "csv/ has its curves"):
                what(self.experiment)
                self.lost = False


def of_wandb(loggers: Sequence[Logger]) -> list[_Wandb]:
    return [logger for logger in loggers if isinstance(logger, _Wandb)]


@contextmanager
def tracking(folder: RunFolder, cfg: RunConfig, own: Sequence[Logger] = ()) -> Iterator[list[Logger]]:
    """Open the loggers of a run: CSV, W&B unless `--logging` disables it, and the caller's; close them on leaving.

    A finished run has none: it is read and not logged again.

    Args:
        own: the caller's Lightning loggers.
    """
    if folder.finished:
        yield []
        return
    # Without a version of its own, a resumed run would delete the curves of its earlier sessions.
    loggers: list[Logger] = [CSVLogger(folder.path, name="csv")]
    with wandb_run(folder.path, cfg.logging, id=id_of(folder.key, cfg), **about(cfg)) as run, ExitStack() as undo:
        if run is not None:
            # With a run of its own, WandbLogger would pass wandb.init an option that wandb 0.31 warns about on stderr.
            loggers.append(_Wandb(save_dir=folder.path, project=run.project, experiment=run))
            known = {name: getattr(run, name) or None for name in TAKEN_UP_BY}
            folder.update_manifest(wandb=known | {"mode": run.settings.mode})
        for logger in own:
            try:
                logger.log_hyperparams(flat(cfg.resolved()))
            except Exception as error:  # most loggers open their files, or call their server, only now
                cause = error.__cause__ or error.__context__ or error
                raise UserError(f"Logger {type(logger).__name__}: {first_line(cause)}.") from error
        loggers += own
        for logger in loggers:
            logger.log_metrics = _ByRow(logger.log_metrics)
            undo.callback(delattr, logger, "log_metrics")
            undo.callback(logger.save)  # what was logged after the last Trainer is still in memory
        yield loggers


def made_loggers(paths: Sequence[ClassPath], folder: Path) -> list[Logger]:
    """The loggers of `--trainer.logger`; one that writes files, and was not told where, writes into this folder.

    Raises:
        UserError: as `made`.
    """
    loggers = []
    for described in paths:
        taken = inspect.signature(class_of(described, "--trainer.logger", Logger)).parameters
        place = {"save_dir": str(folder)} if "save_dir" in taken else {}
        described = described.model_copy(update={"init_args": place | described.init_args})
        loggers.append(made(described, "--trainer.logger", Logger))
    return loggers


def about(cfg: RunConfig) -> dict[str, Any]:
    """What `wandb_run` is told of a run with these settings, but for its id."""
    s, ours = cfg.sparsity, cfg.final != "model"
    tags = [cfg.importance, s.scope, s.allocation, cfg.partition.method, f"target {s.target}"]
    return {
        "name": cfg.run_name,
        "group": os.path.basename(os.path.normpath(cfg.model.name)),
        "job_type": cfg.final,
        "tags": tags if ours else ["made elsewhere"],
        "config": cfg.resolved(),
    }


def id_of(key: str, cfg: RunConfig) -> str:
    """W&B's id of a run with this key, under the name and in the group that flags give it: the same in all sittings.

    It ends the names of W&B's folders, and begins as the run's name does.
    """
    name = cfg.logging.name or cfg.run_name
    return f"{re.sub('[^A-Za-z0-9_]+', '_', name)[:48]}_{key_of(run=key, name=[cfg.logging.group, name])[:12]}"


@contextmanager
def of_row(loggers: Sequence[Logger], row: str, stage: str, *, control: bool = False) -> Iterator[None]:
    """Name all that is logged meanwhile for this row of the run's table; an empty name changes nothing.

    Args:
        stage: the prefix of the stage's curves, which are drawn against its tokens.
        control: whether the row is not the run's own.
    """
    curves = f"{stage}/{key_part(row)}"
    for logger in loggers:
        logger.log_metrics.row, logger.log_metrics.control = key_part(row), control
    axes = {f"{curves}/*": f"{curves}/tokens"}
    if control:
        axes[f"controls/{key_part(row)}/*"] = f"controls/{key_part(row)}/tokens"
    for logger in of_wandb(loggers) if row else ():
        logger.tell(partial(draw, axes=axes))
    try:
        yield
    finally:
        for logger in loggers:
            logger.log_metrics.row, logger.log_metrics.control = "", False


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


@rank_zero_only
def log_pictures(loggers: Sequence[Logger], figures: Sequence[Path], table: str) -> None:
    """Figures (PNG files) and the table of results (Markdown), for loggers that take them: W&B, TensorBoard, MLflow."""
    for logger in loggers:
        experiment = None if isinstance(logger, _Wandb) else logger.experiment
        if isinstance(logger, _Wandb):
            images = {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
            logger.tell(lambda run, images=images: run.log(images))
        elif hasattr(experiment, "add_image"):
            for path in figures:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                experiment.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")
            experiment.add_text("results", table)
        elif hasattr(experiment, "log_artifact") and hasattr(logger, "run_id"):
            for path in figures:
                experiment.log_artifact(logger.run_id, str(path), "figures")
            experiment.log_text(logger.run_id, table, "results.md")


@rank_zero_only
def log_artifacts(loggers: Sequence[Logger], folder: Path, cfg: RunConfig, metadata: Mapping[str, Any]) -> None:
    """The run folder as artifacts of W&B, such as `smollm2-135m-masks`, whose versions are runs of one dense model.

    Args:
        metadata: tells versions apart, beside the budget.
    """
    model = os.path.basename(os.path.normpath(cfg.model.name))
    about = {"model": model, "run": cfg.run_name, "budget": cfg.sparsity.target, **metadata}
    for kind in cfg.logging.artifacts:
        patterns = FOLDER if kind == "masks" else (*FOLDER, "model/**/*")
        for logger in of_wandb(loggers):
            artifact = wandb.Artifact(key_part(f"{model}-{kind}"), type=kind, metadata=about)
            for path in sorted(path for name in patterns for path in folder.glob(name) if path.is_file()):
                # Tensors are uploaded from where they lie; of what may be written again there is a copy.
                policy = "immutable" if path.suffix == ".safetensors" else "mutable"
                artifact.add_file(str(path), name=str(path.relative_to(folder)), policy=policy, skip_cache=True)
            logger.tell(methodcaller("log_artifact", artifact))


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
        id: equal ids are one run, also in several files: `wandb sync` puts them together.

    Yields:
        wandb.Run, or None: where it is disabled, in other processes than the first, and where W&B cannot start.

    Raises:
        UserError: online without an account.
    """
    if logging.resolved_mode == "disabled" or rank_zero_only.rank != 0:
        yield None
        return
    if wandb.run is not None:
        wandb.run.config.update({"gprune": dict(config)}, allow_val_change=True)
        yield draw(wandb.run, AXES)
        return
    known = os.environ.get
    with _begun(
        folder,
        # mode=, not offline=True, which leaves WANDB_MODE set in the process for whoever comes next.
        mode=logging.resolved_mode,
        project=logging.project or known("WANDB_PROJECT") or "gprune",
        name=logging.name or known("WANDB_NAME") or name,
        group=logging.resolved_group or group,
        job_type=job_type,
        tags=list(dict.fromkeys(tag[:64] for tag in (*tags, *logging.resolved_tags))),  # as long as W&B has them
        config=dict(config),
        id=id,
    ) as run:
        yield run and draw(run, AXES)


@contextmanager
def taken_up(folder: Path, known: Mapping[str, Any]) -> Iterator[wandb.Run | None]:
    """A run of W&B that has been finished, to add to it; the one that is open where that is it.

    Online it is resumed. Offline another file with its id is written beside the others, and `wandb sync` puts them
    together. `wandb/latest-run` stays where it was.

    Args:
        known: `wandb` of the manifest.
    """
    if wandb.run is not None and wandb.run.id == known["id"]:
        yield wandb.run
        return
    mode = os.environ.get("WANDB_MODE") or known["mode"]
    with _begun(folder, latest=False, reinit="create_new", **known | {"mode": mode}) as run:  # one may be open
        yield run


@contextmanager
def _begun(folder: Path | str, *, latest: bool = True, **settings: Any) -> Iterator[wandb.Run | None]:
    """A run of our own, finished when the context is left; `latest`: `wandb/latest-run` leads to it."""
    folder = Path(os.environ.get("WANDB_DIR") or folder)
    with suppress(OSError):  # W&B writes into a temporary one then
        folder.mkdir(parents=True, exist_ok=True)
    run = _started(
        dir=folder,
        resume="allow",  # offline it is noted for `wandb sync`
        settings=wandb.Settings(silent=True, console="off", finish_timeout=UPLOAD_SECONDS, symlink=latest),
        **settings,
    )
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception:  # its service has died, and would be asked again
                with suppress(Exception):
                    wandb.teardown()
                wandb.run = None


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


def draw(run: wandb.Run, axes: Mapping[str, str]) -> wandb.Run:
    """The run, told what its curves are drawn against."""
    for pattern, axis in axes.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    return run
