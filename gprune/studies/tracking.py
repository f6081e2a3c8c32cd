"""Lists in W&B: each row is a run, named for the row, in the group of its list, and the list itself is one more.

What has been logged has a folder of links in `<records>/<list>/`: `wandb leet` shows all rows of a list together, and
nothing is logged twice. W&B is imported where something is logged.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gprune.benchmarks.measurement import task_numbers
from gprune.config import RunConfig
from gprune.report import Report, Table
from gprune.report.records import run_numbers
from gprune.runs.results import key_part
from gprune.storage.files import key_of
from gprune.storage.yaml_text import to_yaml
from gprune.studies.archive import of_tasks
from gprune.studies.listing import EXPERIMENTS, OTHER_RECORDS, Listing, Row
from gprune.studies.tables import Done


def named(row: Row) -> RunConfig:
    """The row's configuration, with a name, a group and tags for W&B by list and row; tags that were given stay."""
    given = row.config.logging
    about = {
        "name": f"{_words(row.name)[:100]}, seed {row.seed}",
        "group": given.resolved_group or _words(row.study)[:128],
        "tags": [_words(row.study)[:64], _words(row.name)[:64], *given.resolved_tags],
    }
    return row.config.model_copy(update={"logging": given.model_copy(update=about)})


def log(listing: Listing, done: Done, flags: Sequence[str], report: Report, tables: Sequence[Table]) -> Path | None:
    """Log what is not in W&B yet: finished rows and, if all of them are, the list with its tables.

    Returns:
        The folder of links; None where W&B tracks no row.
    """
    tracked = [(row, record) for row, record in done if row.config.logging.resolved_tracker == "wandb"]
    for row, record in tracked:
        log_row(row, record)
    if len(tracked) == len(listing.rows):
        log_list(listing, flags, tables, report)
    return folder_of(tracked[0][0]) if tracked else None


def log_row(row: Row, record: dict[str, Any]) -> None:
    """Link the run of a row that has run here, or log the numbers of its record: once, without curves.

    `record` is true in the configuration of what is logged from a record.
    """
    from gprune.runs.tracking import about, id_of
    from gprune.runs.wandb_runs import wandb_run

    cfg, folder = named(row), folder_of(row)
    id = id_of(key_of(settings=cfg.settings() | {"inputs": record["inputs"]}), cfg)
    name = f"{key_part(row.name)[:80]}_s{row.seed}_{id}"
    if _is_linked(folder, name):
        return
    if not _files(Path(cfg.folder), id):
        folder.mkdir(parents=True, exist_ok=True)
        with wandb_run(folder, cfg.logging, id=id, **about(cfg)) as run:
            if run is None:
                return
            if not run.resumed:  # online: the row has run elsewhere, and has logged its curves
                run.config.update({"record": True, "environment": record["environment"]})
            numbers = run_numbers(record["records"], record["summary"], record["steps"], cfg.own_row)
            run.log({name: value for name, value in numbers.items() if name.startswith("final/")})
            run.summary.update(numbers | task_numbers(of_tasks(row, record)))
    _link(folder, name, _files(Path(cfg.folder), id) | _files(folder, id))


def log_list(listing: Listing, flags: Sequence[str], tables: Sequence[Table], report: Report) -> None:
    """The list as a run of type `study`: tables, compared pairs, figures, and the list as an artifact.

    A run that is there is added to, unless it has the same tables of the same rows.
    """
    import wandb

    from gprune.runs.wandb_runs import wandb_run

    stem, first, folder = _words(listing.path.stem), listing.rows[0].config.logging, folder_of(listing.rows[0])
    rows = {f"{row.name}, seed {row.seed}": row.settings for row in listing.rows}
    id = key_of(study=stem, flags=list(flags))[:12]
    name = f"all_{key_of(rows=rows, tables=[table.to_csv() for table in tables])[:8]}_{id}"
    if _is_linked(folder, name):
        return
    logging = first.model_copy(update={"name": _words(shlex.join([stem, *flags]))[:128]})
    config = {"about": listing.about, "rows": list(rows), "reference": listing.reference, "seen": listing.seen}
    about = {"name": stem, "group": stem, "job_type": "study", "tags": [stem], "config": config}
    with wandb_run(folder, logging, id=id, **about) as run, TemporaryDirectory() as drawn:
        if run is None:
            return
        wide = {table.name: table.wide() for table in tables}
        logged = {f"tables/{n}": wandb.Table(head, cells, allow_mixed_types=True) for n, (head, *cells) in wide.items()}
        figures = report.draw(Path(drawn), ["png"])
        run.log(logged | {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
        for pair, _, ratio in (row for table in tables if table.name == "compare" for row in table.rows):
            run.summary.update(
                {f"compare/{key_part(pair)}/{n}": v for n, v in ratio._asdict().items()} if ratio else {}
            )
        artifact = wandb.Artifact(key_part(stem), type="list")
        artifact.add_file(str(listing.path))
        with artifact.new_file("rows.yaml") as file:
            file.write(to_yaml(rows))
        run.log_artifact(artifact)
    _link(folder, name, _files(folder, id))


def folder_of(row: Row) -> Path:
    """Where the rows of a list are linked: beside their records, unless those are in `experiments`."""
    committed = row.records.resolve().is_relative_to(EXPERIMENTS)
    return (OTHER_RECORDS if committed else row.records) / row.study


def _words(name: str) -> str:
    """A name without the characters that W&B refuses."""
    return "".join(c if c.isprintable() and c not in r"/\#?%:" else " " for c in name)


def _files(folder: Path, id: str) -> set[Path]:
    """Folders that W&B has written of a run: one for each sitting at it."""
    return {*Path(os.environ.get("WANDB_DIR") or folder).glob(f"wandb/*run-*-{id}")}


def _is_linked(folder: Path, name: str) -> bool:
    return any(folder.glob(f"run-*-{name}"))


def _link(folder: Path, name: str, sittings: set[Path]) -> None:
    """Link what W&B's folders of a run hold, in folders of this name, for `wandb leet` shows the names of folders."""
    for sitting in sittings:
        place = folder / f"run-{sitting.name.split('-')[-2]}-{name}"
        place.mkdir(parents=True, exist_ok=True)
        for file in sitting.iterdir():
            with suppress(OSError):  # there already, or no links on this system
                link = place / (f"run-{name}.wandb" if file.suffix == ".wandb" else file.name)
                link.symlink_to(os.path.relpath(file, place))
