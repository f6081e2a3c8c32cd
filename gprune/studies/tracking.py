"""Study lists in W&B: one run per row, named after the row and in the group of its list, and one run for the list.

The W&B folders of all runs are in `<records>/<list>/wandb/`, so that `wandb leet` shows them together. A folder's name
ends in the id of its run, so that nothing is logged twice. W&B is imported when something is logged.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gprune.benchmarks.measurement import task_numbers
from gprune.config import RunConfig
from gprune.report import Report, Table
from gprune.runs.numbers import key_part, run_numbers
from gprune.storage.files import key_of
from gprune.studies.archive import of_tasks
from gprune.studies.listing import EXPERIMENTS, OTHER_RECORDS, Listing, Row
from gprune.studies.tables import Done


def named(row: Row) -> RunConfig:
    """Return the row's configuration with W&B name, group and tags of list and row. Tags of the user are kept."""
    given = row.config.logging
    about = {
        "name": f"{_words(row.name)[:100]}, seed {row.seed}",
        "group": given.resolved_group or _words(row.study)[:128],
        "tags": [_words(row.study)[:64], _words(row.name)[:64], *given.resolved_tags],
    }
    return row.config.model_copy(update={"logging": given.model_copy(update=about)})


def folder_of(row: Row) -> Path:
    """Return W&B's folder for a list: beside its records, unless they are in `experiments`."""
    committed = row.records.resolve().is_relative_to(EXPERIMENTS)
    return (OTHER_RECORDS if committed else row.records) / row.study


@contextmanager
def beside_records(row: Row) -> Iterator[Path]:
    """Context in which W&B writes to `folder_of` the row, unless $WANDB_DIR is set."""
    given = os.environ.get("WANDB_DIR")
    os.environ["WANDB_DIR"] = folder = given or str(folder_of(row))
    try:
        yield Path(folder)
    finally:
        os.environ.pop("WANDB_DIR")
        os.environ.update({"WANDB_DIR": given} if given else {})


def log(listing: Listing, done: Done, flags: Sequence[str], report: Report, tables: Sequence[Table]) -> Path | None:
    """Log finished rows that are not in W&B yet and, if all rows are finished, the list with its tables.

    Returns:
        The folder for `wandb leet`; None if W&B is disabled for all rows.
    """
    tracked = [(row, record) for row, record in done if row.config.logging.resolved_mode != "disabled"]
    if not tracked:
        return None
    with beside_records(tracked[0][0]) as folder:
        for row, record in tracked:
            log_row(folder, row, record)
        if len(tracked) == len(listing.rows):
            log_list(folder, listing, flags, tables, report)
    return folder / "wandb"


def log_row(folder: Path, row: Row, record: dict[str, Any]) -> None:
    """Log the numbers of a row's record, without curves, unless the row was logged when it ran.

    The W&B configuration of such a run has `record: true`.
    """
    from gprune.runs.tracking import about, id_of, wandb_run

    cfg = named(row)
    id = id_of(key_of(settings=cfg.settings() | {"inputs": record["inputs"]}), cfg)
    if _has_run(folder, id):
        return
    with wandb_run(folder, cfg.logging, id=id, **about(cfg)) as run:
        if run is None:
            return
        if not run.resumed:  # otherwise the row has run on another machine, and has logged its curves online
            run.config.update({"record": True, "environment": record["environment"]})
        numbers = run_numbers(record["records"], record["summary"], record["steps"], cfg.own_row)
        run.log({name: value for name, value in numbers.items() if name.startswith("final/")})
        run.summary.update(numbers | task_numbers(of_tasks(row, record)))


def log_list(folder: Path, listing: Listing, flags: Sequence[str], tables: Sequence[Table], report: Report) -> None:
    """Log a list as a run of type `study`: settings of rows, tables, comparisons, figures, and the list file.

    The run's id depends on the tables and the rows.
    """
    import wandb

    from gprune.runs.tracking import wandb_run

    stem, first = _words(listing.path.stem), listing.rows[0].config.logging
    rows = {f"{row.name}, seed {row.seed}": row.settings for row in listing.rows}
    id = f"all_{key_of(study=stem, flags=list(flags), rows=rows, tables=[table.to_csv() for table in tables])}"
    if _has_run(folder, id):
        return
    logging = first.model_copy(update={"name": _words(shlex.join([stem, *flags]))[:128]})
    config = {"rows": rows} | {name: getattr(listing.content, name) for name in ("about", "reference", "seen")}
    about = {"name": stem, "group": stem, "job_type": "study", "tags": [stem], "config": config}
    with wandb_run(folder, logging, id=id, **about) as run, TemporaryDirectory() as drawn:
        if run is None:
            return
        wide = {table.name: table.wide() for table in tables}
        logged = {f"tables/{n}": wandb.Table(head, cells, allow_mixed_types=True) for n, (head, *cells) in wide.items()}
        figures = report.draw(Path(drawn), ["png"])
        run.log(logged | {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
        for pair, _, *ratios in (row for table in tables if table.name == "compare" for row in table.rows):
            for kind, ratio in zip(("", "exp_kl/"), ratios, strict=False):
                of_pair = {} if ratio is None else ratio._asdict()
                run.summary.update({f"compare/{key_part(pair)}/{kind}{name}": v for name, v in of_pair.items()})
        artifact = wandb.Artifact(key_part(stem), type="list")
        artifact.add_file(str(listing.path))
        run.log_artifact(artifact)


def _words(name: str) -> str:
    """Replace the characters of a name that are invalid in W&B."""
    return "".join(c if c.isprintable() and c not in r"/\#?%:" else " " for c in name)


def _has_run(folder: Path, id: str) -> bool:
    return any(folder.glob(f"wandb/*run-*-{id}"))
