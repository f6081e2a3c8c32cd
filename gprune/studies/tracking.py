"""Study lists in W&B: one run per row, named after the row and in the group of its list, and one for the tables.

The W&B folders of all runs are in `<records>/<list>/wandb/`, so that `wandb leet` shows them together. A folder's name
ends in the id of its run, so that nothing is logged twice. W&B is imported when something is logged.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gprune.benchmarks.measurement import task_numbers
from gprune.config import RunConfig
from gprune.report import Table
from gprune.runs.numbers import key_part, run_numbers
from gprune.storage.files import key_of
from gprune.studies.archive import task_results
from gprune.studies.listing import EXPERIMENTS, OTHER_RECORDS, Listing, Row
from gprune.studies.tables import FinishedRows


def with_wandb_names(row: Row) -> RunConfig:
    """Return the row's configuration with a name, a group and tags for W&B. A group and tags of the user are kept."""
    logging = row.config.logging
    names = {
        "name": f"{_words(row.name)[:100]}, seed {row.seed}",
        "group": logging.resolved_group or _words(row.study)[:128],
        "tags": [_words(row.study)[:64], _words(row.name)[:64], *logging.resolved_tags],
    }
    return row.config.model_copy(update={"logging": logging.model_copy(update=names)})


def wandb_folder(row: Row) -> Path:
    """Return W&B's folder for a list. It is next to the records, unless they are in `experiments`."""
    in_repository = row.records.resolve().is_relative_to(EXPERIMENTS)
    return (OTHER_RECORDS if in_repository else row.records) / row.study


@contextmanager
def wandb_beside_records(row: Row) -> Iterator[Path]:
    """Context in which W&B writes to `wandb_folder` of the row or, if it is set, to $WANDB_DIR."""
    users_folder = os.environ.get("WANDB_DIR")
    folder = users_folder or str(wandb_folder(row))
    os.environ["WANDB_DIR"] = folder
    try:
        yield Path(folder)
    finally:
        if users_folder:
            os.environ["WANDB_DIR"] = users_folder
        else:
            del os.environ["WANDB_DIR"]


def log_study(listing: Listing, done: FinishedRows, flags: Sequence[str], tables: Sequence[Table]) -> Path | None:
    """Log finished rows that are not in W&B yet and, if all rows are finished, the tables of the list.

    Args:
        listing: the parsed list.
        done: finished rows with their records.
        flags: flags of train.py that override the settings of every row.
        tables: tables of the list.

    Returns:
        The folder for `wandb leet`; None if W&B is disabled for all rows.
    """
    tracked = [(row, record) for row, record in done if row.config.logging.resolved_mode != "disabled"]
    if not tracked:
        return None
    with wandb_beside_records(tracked[0][0]) as folder:
        for row, record in tracked:
            log_row(folder, row, record)
        if len(tracked) == len(listing.rows):
            log_list(folder, listing, flags, tables)
    return folder / "wandb"


def log_row(folder: Path, row: Row, record: dict[str, Any]) -> None:
    """Log the numbers of a row's record, without curves, unless the row was logged when it ran.

    The W&B configuration of such a run has `record: true`.
    """
    from gprune.runs.tracking import wandb_arguments, wandb_id, wandb_run

    cfg = with_wandb_names(row)
    settings = cfg.settings() | {"inputs": record["inputs"]}
    id = wandb_id(key_of(settings=settings), cfg)
    if _has_run(folder, id):
        return
    with wandb_run(folder, cfg.logging, id=id, **wandb_arguments(cfg)) as run:
        if run is None:
            return
        if not run.resumed:  # otherwise the row has run on another machine, and has logged its curves online
            run.config.update({"record": True, "environment": record["environment"]})
        numbers = run_numbers(record["records"], record["summary"], record["steps"], cfg.own_row)
        run.log({name: value for name, value in numbers.items() if name.startswith("final/")})
        run.summary.update(numbers | task_numbers(task_results(row, record)))


def log_list(folder: Path, listing: Listing, flags: Sequence[str], tables: Sequence[Table]) -> None:
    """Log the tables of a list, whose numbers are of several rows, and the list file as a run of type `study`.

    The run's id depends on the tables and the rows, so a list with new results is logged again.
    """
    import wandb

    from gprune.runs.tracking import wandb_run

    name = _words(listing.path.stem)
    rows = {f"{row.name}, seed {row.seed}": row.settings for row in listing.rows}
    id = f"all_{key_of(study=name, flags=list(flags), rows=rows, tables=[table.to_csv() for table in tables])}"
    if _has_run(folder, id):
        return
    logging_of_rows = listing.rows[0].config.logging
    logging = logging_of_rows.model_copy(update={"name": _words(shlex.join([name, *flags]))[:128]})
    identity = {"id": id, "name": name, "group": name, "job_type": "study", "tags": [name]}
    with wandb_run(folder, logging, config={}, **identity) as run:
        if run is None:
            return
        for table in tables:
            header, *cells = table.rows_with_bounds()
            run.log({f"tables/{table.name}": wandb.Table(header, cells, allow_mixed_types=True)})
        artifact = wandb.Artifact(key_part(name), type="list")
        artifact.add_file(str(listing.path))
        run.log_artifact(artifact)


def _words(name: str) -> str:
    """Replace the characters of a name that are invalid in W&B."""
    return "".join(c if c.isprintable() and c not in r"/\#?%:" else " " for c in name)


def _has_run(folder: Path, id: str) -> bool:
    """Return whether W&B's folder has a run with this id."""
    return any(folder.glob(f"wandb/*run-*-{id}"))
