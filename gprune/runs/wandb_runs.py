"""Runs of Weights & Biases: begun, taken up again, told the axes of their curves."""

from __future__ import annotations

import logging as messages
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.utilities import rank_zero_only

from gprune.config import LoggingConfig
from gprune.errors import UserError, first_line

log = messages.getLogger("gprune")
# metric pattern -> its x axis. Lightning restarts its step in every stage, so each has its own; recoveries: `of_row`.
AXES = {
    "development/*": "development/tokens",
    "partition/*": "trainer/global_step",
    "learn/*": "learn/tokens",
    "curve/*": "curve/sparsity",
    "modules/*": "modules/index",
}
UPLOAD_SECONDS = 600  # that the end of a run waits for W&B; what is left lies in the folder for `wandb sync`


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
