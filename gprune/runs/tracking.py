"""Tracking with CSV and Weights & Biases (W&B): open loggers for all stages, resume W&B runs, log results."""

from __future__ import annotations

import inspect
import logging as messages
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from gprune.checks import require
from gprune.config import LoggingConfig, RunConfig, flatten
from gprune.config.elsewhere import with_made_elsewhere
from gprune.errors import UserError, first_line, optional_output
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import key_part, keyed
from gprune.runs.trainer import class_of, instantiate
from gprune.storage.files import key_of

log = messages.getLogger("gprune")
RESUME_KEYS = ("id", "project", "entity", "name", "group", "job_type")  # stored for `resumed_run`
# Metric pattern -> x axis. Lightning's step restarts in every stage, so stages that are trained on text have axes of
# their own, which `show_over_tokens` defines.
AXES = {
    "development/*": "development/tokens",
    "partition/*": "trainer/global_step",
    "curve/*": "curve/sparsity",
    "modules/*": "modules/index",
}
# Files of a run folder that `load_run` reads, except the model.
RUN_FILES = ("*.json", "config.yaml", "*.safetensors", "statistics/*")
UPLOAD_SECONDS = 600  # longest wait for W&B at the end of a run; `wandb sync` can upload the rest


class _Wandb(WandbLogger):
    """A WandbLogger whose failures do not stop the run."""

    failed = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.try_with_run(lambda run: super(_Wandb, self).log_metrics(metrics, step))

    def try_with_run(self, function: Callable[[Any], None]) -> None:
        """Call a function with the W&B run. If the call fails, log one line, and never use W&B again."""
        if not self.failed:
            self.failed = True
            with optional_output("to W&B from now on", "csv/ has the curves"):
                function(self.experiment)
                self.failed = False


def wandb_loggers(loggers: Sequence[Logger]) -> list[_Wandb]:
    """Return the W&B loggers among loggers."""
    return [logger for logger in loggers if isinstance(logger, _Wandb)]


@contextmanager
def tracking(folder: RunFolder, cfg: RunConfig, user_loggers: Sequence[Logger] = ()) -> Iterator[list[Logger]]:
    """Context with the open loggers of a run: CSV, W&B unless `--logging` disables it, and the user's.

    A finished run has no loggers, because it is not logged again.
    """
    if folder.finished:
        yield []
        return
    # CSVLogger chooses a new version, so that a resumed run does not delete the curves of earlier sessions.
    loggers: list[Logger] = [CSVLogger(folder.path, name="csv")]
    about = wandb_arguments(cfg)
    with wandb_run(folder.path, cfg.logging, id=wandb_id(folder.key, cfg), **about) as run:
        if run is not None:
            # Without `experiment`, WandbLogger would open a run itself: all metrics would also match the axis
            # `trainer/global_step`, and wandb 0.31 would warn on stderr about an option.
            loggers.append(_Wandb(save_dir=folder.path, project=run.project, experiment=run))
            identity = {name: getattr(run, name) or None for name in RESUME_KEYS}
            folder.update_manifest(wandb=identity | {"mode": run.settings.mode})
        for logger in user_loggers:
            try:
                logger.log_hyperparams(flatten(cfg.resolved()))
            except Exception as error:  # at this point most loggers open their files or call their server
                cause = error.__cause__ or error.__context__ or error
                raise UserError(f"Cannot log with {type(logger).__name__}: {first_line(cause)}.") from error
        loggers += user_loggers
        try:
            yield loggers
        finally:
            for logger in loggers:
                logger.save()  # writes metrics that were logged after the last Trainer


def loggers_of_user(cfg: RunConfig, given: Logger | Sequence[Logger]) -> list[Logger]:
    """Return the loggers of the user: objects given in Python, and those of `--trainer.logger`.

    The default of an argument `save_dir` is the run folder.
    """
    loggers = [given] if isinstance(given, Logger) else list(given)
    for logger in loggers:
        require(logger, Logger, "Loggers must be objects of lightning.pytorch.loggers.Logger")
    for described in cfg.trainer.logger:
        parameters = inspect.signature(class_of(described, "--trainer.logger", Logger)).parameters
        defaults = {"save_dir": str(Path(cfg.folder))} if "save_dir" in parameters else {}
        with_defaults = described.model_copy(update={"init_args": defaults | described.init_args})
        loggers.append(instantiate(with_defaults, "--trainer.logger", Logger))
    return loggers


def wandb_arguments(cfg: RunConfig, other: str | None = None) -> dict[str, Any]:
    """Arguments `name` to `config` of `wandb_run`, for a run that prunes or, with `other`, only measures that model."""
    s = cfg.sparsity
    arguments = {
        "name": cfg.run_name,
        "group": os.path.basename(os.path.normpath(cfg.model.name)),
        "job_type": cfg.method,
        "tags": [cfg.metrics, s.scope, s.allocation, cfg.partition.method, f"target {s.target}"],
        "config": cfg.resolved(),
    }
    if other is not None:
        config = with_made_elsewhere(cfg.resolved(), other)
        arguments |= {"job_type": "model", "tags": ["made elsewhere"], "config": config}
    return arguments


def wandb_id(key: str, cfg: RunConfig) -> str:
    """Return the W&B id of a run, which is the same in all sessions.

    The id depends on the run's key and on the name and the group given by flags. It begins with the run's name, because
    W&B's folders are named after it.
    """
    name = cfg.logging.name or cfg.run_name
    readable = re.sub("[^A-Za-z0-9_]+", "_", name)[:48]
    unique = key_of(run=key, name=[cfg.logging.group, name])[:12]
    return f"{readable}_{unique}"


def show_over_tokens(loggers: Sequence[Logger], stage: str) -> None:
    """Let W&B show the metrics of a stage that is trained over its tokens."""
    for logger in wandb_loggers(loggers):
        logger.try_with_run(partial(define_axes, axes={f"{stage}/*": f"{stage}/tokens"}))


def curves_hint(folder: Path) -> str:
    """Return where the curves of a run can be viewed without an account: a command, or the folder of CSV files."""
    latest = Path(os.environ.get("WANDB_DIR") or folder) / "wandb" / "latest-run"
    if latest.exists():
        return f"`wandb leet run {latest}` shows them in the terminal"
    return f"{folder / 'csv'}"


@rank_zero_only
def log_scalars(loggers: Sequence[Logger], values: dict[str, float], *, step: int) -> None:
    """Log values to all loggers, with `step` as Lightning's step."""
    for logger in loggers:
        logger.log_metrics(values, step=step)


def charts(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of the final model on all unseen text, which W&B shows as charts, `final/unseen` first.

    The runs of a list have these charts side by side. W&B orders charts by name, so other numbers, which are in its
    summary, would come before them.
    """
    return {name: value for name, value in numbers.items() if re.fullmatch("final/unseen[^/]*", name)}


@rank_zero_only
def log_numbers(loggers: Sequence[Logger], frame: pd.DataFrame) -> None:
    """Log the frame of a run to W&B's summary, and numbers of `final/` as metrics too, which sweeps can optimise."""
    numbers = keyed(frame)
    final = {name: value for name, value in numbers.items() if name.startswith("final/")}
    for logger in loggers:
        logger.log_metrics(charts(final) if isinstance(logger, _Wandb) else final, step=0)
    for logger in wandb_loggers(loggers):
        logger.try_with_run(lambda run: run.summary.update(numbers))


@rank_zero_only
def log_pictures(loggers: Sequence[Logger], figures: Sequence[Path], table: str) -> None:
    """Log figures (PNG files) to W&B, TensorBoard and MLflow, and to the latter two the result table (Markdown)."""
    for logger in loggers:
        experiment = logger.experiment
        if isinstance(logger, _Wandb):
            for path in figures:
                logger.log_image(f"figures/{path.stem}", [str(path)])
        elif hasattr(experiment, "add_image"):  # TensorBoard
            for path in figures:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                experiment.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")
            experiment.add_text("results", table)
        elif hasattr(experiment, "log_artifact") and hasattr(logger, "run_id"):  # MLflow
            for path in figures:
                experiment.log_artifact(logger.run_id, str(path), "figures")
            experiment.log_text(logger.run_id, table, "results.md")


@rank_zero_only
def log_artifacts(loggers: Sequence[Logger], folder: Path, cfg: RunConfig, metadata: Mapping[str, Any]) -> None:
    """Upload the run folder as W&B artifacts, such as `smollm2-135m-masks`.

    All runs of one dense model are versions of the same artifact.
    """
    model = os.path.basename(os.path.normpath(cfg.model.name))
    version_metadata = {"model": model, "run": cfg.run_name, "budget": cfg.sparsity.target, **metadata}
    for kind in cfg.logging.artifacts:
        patterns = RUN_FILES if kind == "masks" else (*RUN_FILES, "model/**/*")
        files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
        for logger in wandb_loggers(loggers):
            artifact = wandb.Artifact(key_part(f"{model}-{kind}"), type=kind, metadata=version_metadata)
            for path in files:
                # Tensors are uploaded without a copy. Other files may be rewritten meanwhile, so W&B copies them.
                policy = "immutable" if path.suffix == ".safetensors" else "mutable"
                artifact.add_file(str(path), name=str(path.relative_to(folder)), policy=policy, skip_cache=True)
            logger.try_with_run(lambda run, artifact=artifact: run.log_artifact(artifact))


@contextmanager
def wandb_run(
    folder: Path | str, logging: LoggingConfig, *, id: str, name: str, group: str, job_type: str, tags: Sequence[str],
    config: Mapping[str, Any],
) -> Iterator[Any]:  # fmt: skip
    """Context with a W&B run, which is finished at the end. A run that is already open is used, and stays open.

    It is None if W&B is disabled or cannot be started, and on other ranks than 0.

    Flags of `logging` have precedence, then W&B's environment variables ($WANDB_NAME and so on), then the arguments. A
    run that is already open keeps its name, group and tags. The configuration is stored in its config under `gprune`.
    """
    if logging.resolved_mode == "disabled" or rank_zero_only.rank != 0:
        yield None
        return
    if wandb.run is not None:
        wandb.run.config.update({"gprune": dict(config)}, allow_val_change=True)
        yield define_axes(wandb.run, AXES)
        return
    variables = os.environ
    with _wandb_run(
        folder,
        mode=logging.resolved_mode,
        project=logging.project or variables.get("WANDB_PROJECT") or "gprune",
        name=logging.name or variables.get("WANDB_NAME") or name,
        group=logging.resolved_group or group,
        job_type=job_type,
        tags=list(dict.fromkeys(tag[:64] for tag in (*tags, *logging.resolved_tags))),  # W&B's limit is 64 characters
        config=dict(config),
        id=id,
    ) as run:
        yield run and define_axes(run, AXES)


@contextmanager
def resumed_run(folder: Path, identity: Mapping[str, Any]) -> Iterator[wandb.Run | None]:
    """Context with a finished W&B run, opened again to add results to it. If this run is still open, it is used.

    In online mode the run is resumed. In offline mode another file with the same id is written, which `wandb sync`
    merges. The link `wandb/latest-run` is not changed.
    """
    if wandb.run is not None and wandb.run.id == identity["id"]:
        yield wandb.run
        return
    mode = os.environ.get("WANDB_MODE") or identity["mode"]
    # `create_new`, because another run may be open.
    with _wandb_run(folder, latest=False, reinit="create_new", **identity | {"mode": mode}) as run:
        yield run


@contextmanager
def _wandb_run(folder: Path | str, *, latest: bool = True, **settings: Any) -> Iterator[wandb.Run | None]:
    """Context with a new W&B run, which is finished at the end. `latest`: whether `latest-run` becomes a link to it."""
    folder = Path(os.environ.get("WANDB_DIR") or folder)
    with suppress(OSError):  # W&B falls back to a temporary folder
        folder.mkdir(parents=True, exist_ok=True)
    run = _start(
        dir=folder,
        resume="allow",  # in offline mode this setting is stored for `wandb sync`
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


def _start(mode: str, **settings: Any) -> Any:
    """Start a W&B run. If the server cannot be reached, start it offline; return None if that fails too."""
    try:
        return wandb.init(mode=mode, **settings)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        advice = "Log in with `wandb login`, or use --logging.mode offline"
        raise UserError(f"Cannot start a W&B run: {first_line(error)}. {advice}.") from error
    except (wandb.errors.Error, OSError) as error:
        wandb.teardown()  # otherwise W&B would report that the id is in use
        if mode == "online":
            consequence = "The run is logged offline, for `wandb sync`"
        else:
            consequence = "The run continues without W&B"
        log.warning("Cannot start a W&B run: %s. %s.", first_line(error), consequence)
        return _start("offline", **settings) if mode == "online" else None


def define_axes(run: wandb.Run, axes: Mapping[str, str]) -> wandb.Run:
    """Define the x axes of metrics in a W&B run, and return the run."""
    for pattern, axis in axes.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    return run
