"""Tracking with CSV and Weights & Biases (W&B): open loggers for all stages, resume W&B runs, log results."""

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

from gprune.config import LoggingConfig, RunConfig, flatten
from gprune.config.running import ClassPath
from gprune.errors import UserError, first_line, optional_output
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import key_part
from gprune.runs.user_callbacks import class_of, instantiate
from gprune.storage.files import key_of

log = messages.getLogger("gprune")
OF_STAGE = re.compile(r"^(?!(?:development|epoch|trainer)\b)[^/]+")  # prefix of keys that belong to one stage
RESUME_KEYS = ("id", "project", "entity", "name", "group", "job_type")  # stored for `resumed_run`
# Metric pattern -> x axis. Lightning's step restarts in every stage, so stages have axes of their own. Those of
# recoveries are defined in `of_row`.
AXES = {
    "development/*": "development/tokens",
    "partition/*": "trainer/global_step",
    "learn/*": "learn/tokens",
    "curve/*": "curve/sparsity",
    "modules/*": "modules/index",
}
FOLDER = ("*.json", "config.yaml", "*.safetensors", "masks/*", "statistics/*")  # files for `load_run`, except the model
UPLOAD_SECONDS = 600  # longest wait for W&B at the end of a run; `wandb sync` can upload the rest


class _ByRow:
    """Wrapper of a logger's `log_metrics` that adds the row of the result table to metric names.

    `distill/loss` becomes `distill/<row>/loss`. Development perplexity keeps its name for the run's main row, and
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

    failed = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.tell(lambda run: super(_Wandb, self).log_metrics(metrics, step))

    def tell(self, what: Callable[[Any], None]) -> None:
        """Call a function of the W&B run, unless W&B has failed before."""
        if not self.failed:
            self.failed = True
            with optional_output("to W&B from now on", "csv/ has the curves"):
                what(self.experiment)
                self.failed = False


def of_wandb(loggers: Sequence[Logger]) -> list[_Wandb]:
    return [logger for logger in loggers if isinstance(logger, _Wandb)]


@contextmanager
def tracking(folder: RunFolder, cfg: RunConfig, own: Sequence[Logger] = ()) -> Iterator[list[Logger]]:
    """Context with the open loggers of a run: CSV, W&B unless `--logging` disables it, and the user's.

    A finished run has no loggers, because it is not logged again.

    Args:
        own: Lightning loggers of the user.
    """
    if folder.finished:
        yield []
        return
    # CSVLogger chooses a new version, so that a resumed run does not delete the curves of earlier sessions.
    loggers: list[Logger] = [CSVLogger(folder.path, name="csv")]
    with wandb_run(folder.path, cfg.logging, id=id_of(folder.key, cfg), **about(cfg)) as run, ExitStack() as undo:
        if run is not None:
            # Without `experiment`, WandbLogger would pass wandb.init an option that wandb 0.31 warns about on stderr.
            loggers.append(_Wandb(save_dir=folder.path, project=run.project, experiment=run))
            known = {name: getattr(run, name) or None for name in RESUME_KEYS}
            folder.update_manifest(wandb=known | {"mode": run.settings.mode})
        for logger in own:
            try:
                logger.log_hyperparams(flatten(cfg.resolved()))
            except Exception as error:  # at this point most loggers open their files or call their server
                cause = error.__cause__ or error.__context__ or error
                raise UserError(f"Cannot log with {type(logger).__name__}: {first_line(cause)}.") from error
        loggers += own
        for logger in loggers:
            logger.log_metrics = _ByRow(logger.log_metrics)
            undo.callback(delattr, logger, "log_metrics")
            undo.callback(logger.save)  # writes metrics that were logged after the last Trainer
        yield loggers


def made_loggers(paths: Sequence[ClassPath], folder: Path) -> list[Logger]:
    """Construct the loggers of `--trainer.logger`. The default of an argument `save_dir` is `folder`.

    Raises:
        UserError: as `instantiate`.
    """
    loggers = []
    for described in paths:
        taken = inspect.signature(class_of(described, "--trainer.logger", Logger)).parameters
        place = {"save_dir": str(folder)} if "save_dir" in taken else {}
        described = described.model_copy(update={"init_args": place | described.init_args})
        loggers.append(instantiate(described, "--trainer.logger", Logger))
    return loggers


def about(cfg: RunConfig) -> dict[str, Any]:
    """Arguments of `wandb_run` for a run with these settings, except `id`."""
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
    """Return the W&B id of a run, which is the same in all sessions.

    The id depends on the run's key and on the name and the group given by flags. It begins with the run's name, because
    W&B's folders are named after it.
    """
    name = cfg.logging.name or cfg.run_name
    return f"{re.sub('[^A-Za-z0-9_]+', '_', name)[:48]}_{key_of(run=key, name=[cfg.logging.group, name])[:12]}"


@contextmanager
def of_row(loggers: Sequence[Logger], row: str, stage: str, *, control: bool = False) -> Iterator[None]:
    """Context in which the name of a row of the result table is added to logged metrics.

    Args:
        row: name of the row; an empty name changes nothing.
        stage: prefix of the stage's metrics, whose x axis is the number of tokens.
        control: whether the row is a control.
    """
    curves = f"{stage}/{key_part(row)}"
    for logger in loggers:
        logger.log_metrics.row, logger.log_metrics.control = key_part(row), control
    axes = {f"{curves}/*": f"{curves}/tokens"}
    if control:
        axes[f"controls/{key_part(row)}/*"] = f"controls/{key_part(row)}/tokens"
    for logger in of_wandb(loggers) if row else ():
        logger.tell(partial(define_axes, axes=axes))
    try:
        yield
    finally:
        for logger in loggers:
            logger.log_metrics.row, logger.log_metrics.control = "", False


def how_to_look(folder: Path) -> str:
    """Return a hint how to view the curves of a run without an account."""
    latest = Path(os.environ.get("WANDB_DIR") or folder) / "wandb" / "latest-run"
    if latest.exists():
        return f"`wandb leet run {latest}` shows them in the terminal"
    return f"{folder / 'csv'}"


@rank_zero_only
def log_scalars(loggers: Sequence[Logger], values: dict[str, float], *, step: int) -> None:
    """Log values at a step of the Trainer to all loggers."""
    for logger in loggers:
        logger.log_metrics(values, step=step)


@rank_zero_only
def log_numbers(loggers: Sequence[Logger], numbers: Mapping[str, float]) -> None:
    """Log single numbers to W&B's summary, and those of `final/` as metrics too, which sweeps can optimise."""
    log_scalars(loggers, {name: value for name, value in numbers.items() if name.startswith("final/")}, step=0)
    for logger in of_wandb(loggers):
        logger.tell(lambda run: run.summary.update(dict(numbers)))


@rank_zero_only
def log_pictures(loggers: Sequence[Logger], figures: Sequence[Path], table: str) -> None:
    """Log figures (PNG files) and the result table (Markdown) to W&B, TensorBoard and MLflow."""
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
    """Upload the run folder as W&B artifacts, such as `smollm2-135m-masks`. Runs of one dense model are its versions.

    Args:
        metadata: added to the metadata of the version.
    """
    model = os.path.basename(os.path.normpath(cfg.model.name))
    about = {"model": model, "run": cfg.run_name, "budget": cfg.sparsity.target, **metadata}
    for kind in cfg.logging.artifacts:
        patterns = FOLDER if kind == "masks" else (*FOLDER, "model/**/*")
        for logger in of_wandb(loggers):
            artifact = wandb.Artifact(key_part(f"{model}-{kind}"), type=kind, metadata=about)
            for path in sorted(path for name in patterns for path in folder.glob(name) if path.is_file()):
                # Tensors are uploaded without a copy. Other files may be rewritten meanwhile, so W&B copies them.
                policy = "immutable" if path.suffix == ".safetensors" else "mutable"
                artifact.add_file(str(path), name=str(path.relative_to(folder)), policy=policy, skip_cache=True)
            logger.tell(methodcaller("log_artifact", artifact))


@contextmanager
def wandb_run(
    folder: Path | str, logging: LoggingConfig, *, id: str, name: str, group: str, job_type: str, tags: Sequence[str],
    config: Mapping[str, Any],
) -> Iterator[Any]:  # fmt: skip
    """Context with a W&B run, which is finished at the end. A run that is already open is used, and stays open.

    Flags of `logging` have precedence, then W&B's environment variables ($WANDB_NAME and so on), then the arguments. An
    open run keeps its name, group and tags, and gets the configuration as `gprune`.

    Args:
        folder: W&B writes into its subfolder `wandb/`, unless $WANDB_DIR is set.
        id: id of the run. `wandb sync` merges several files with the same id.

    Yields:
        wandb.Run; None if W&B is disabled or cannot start, and on ranks other than 0.

    Raises:
        UserError: in online mode without an account.
    """
    if logging.resolved_mode == "disabled" or rank_zero_only.rank != 0:
        yield None
        return
    if wandb.run is not None:
        wandb.run.config.update({"gprune": dict(config)}, allow_val_change=True)
        yield define_axes(wandb.run, AXES)
        return
    known = os.environ.get
    with _wandb_run(
        folder,
        # offline=True would leave WANDB_MODE set in the process.
        mode=logging.resolved_mode,
        project=logging.project or known("WANDB_PROJECT") or "gprune",
        name=logging.name or known("WANDB_NAME") or name,
        group=logging.resolved_group or group,
        job_type=job_type,
        tags=list(dict.fromkeys(tag[:64] for tag in (*tags, *logging.resolved_tags))),  # W&B's limit is 64 characters
        config=dict(config),
        id=id,
    ) as run:
        yield run and define_axes(run, AXES)


@contextmanager
def resumed_run(folder: Path, known: Mapping[str, Any]) -> Iterator[wandb.Run | None]:
    """Context with a finished W&B run, opened again to add results to it. If it is the open run, that is used.

    In online mode the run is resumed. In offline mode another file with the same id is written, which `wandb sync`
    merges. The link `wandb/latest-run` is not changed.

    Args:
        folder: folder of the run.
        known: the entry `wandb` of the manifest.
    """
    if wandb.run is not None and wandb.run.id == known["id"]:
        yield wandb.run
        return
    mode = os.environ.get("WANDB_MODE") or known["mode"]
    # `create_new`, because another run may be open.
    with _wandb_run(folder, latest=False, reinit="create_new", **known | {"mode": mode}) as run:
        yield run


@contextmanager
def _wandb_run(folder: Path | str, *, latest: bool = True, **settings: Any) -> Iterator[wandb.Run | None]:
    """Context with a new W&B run, which is finished at the end. `latest`: whether `wandb/latest-run` points to it."""
    folder = Path(os.environ.get("WANDB_DIR") or folder)
    with suppress(OSError):  # W&B falls back to a temporary folder
        folder.mkdir(parents=True, exist_ok=True)
    run = _started(
        dir=folder,
        resume="allow",  # in offline mode it is stored for `wandb sync`
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
            except Exception:  # W&B's service process has died; teardown stops further calls
                with suppress(Exception):
                    wandb.teardown()
                wandb.run = None


def _started(mode: str, **settings: Any) -> Any:
    """Start a W&B run. If the server cannot be reached, start it offline; return None if that fails too."""
    try:
        return wandb.init(mode=mode, **settings)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        advice = "Log in with `wandb login`, or use --logging.mode offline"
        raise UserError(f"Cannot start a W&B run: {first_line(error)}. {advice}.") from error
    except (wandb.errors.Error, OSError) as error:
        wandb.teardown()  # otherwise W&B would report that the id is in use
        instead = "The run is logged offline, for `wandb sync`" if mode == "online" else "The run continues without W&B"
        log.warning("Cannot start a W&B run: %s. %s.", first_line(error), instead)
        return _started("offline", **settings) if mode == "online" else None


def define_axes(run: wandb.Run, axes: Mapping[str, str]) -> wandb.Run:
    """Define the x axes of metrics in a W&B run, and return the run."""
    for pattern, axis in axes.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    return run
