"""Tables of a study: those of the report, and comparisons of stages by perplexity and on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gprune.errors import UserError
from gprune.report import Report, of_runs
from gprune.report.benchmark_table import against
from gprune.report.grouping import as_small
from gprune.report.perplexity_tables import pool_estimates, ratio_to
from gprune.report.table import Estimate, Table
from gprune.runs.numbers import Record, by_stage, row_name
from gprune.runs.results import FinishedRun
from gprune.studies.archive import as_run, find_record
from gprune.studies.listing import Listing, Row

Done = Sequence[tuple[Row, dict[str, Any]]]  # finished rows with their records


def reported(listing: Listing, done: Done) -> Report:
    """Make the report of finished rows; seeds of a row are combined."""
    content = listing.content
    runs = [as_run(row, kept, content.seen) for row, kept in done]
    _check_text(done)
    return of_runs(runs, bases=bases_of(content.reference, runs), seen=content.seen)


def bases_of(reference: str | None, runs: Sequence[FinishedRun]) -> dict[Path, FinishedRun] | None:
    """Return path of a run -> reference run with the same seed, if the reference has as few parameters."""
    if reference is None:
        return None
    bases = {run.seed: run for run in runs if run.name == reference}
    return {run.path: base for run in runs if (base := bases.get(run.seed)) is not None and as_small(run, base)}


def _check_text(done: Done) -> None:
    """Raise UserError if rows with the same corpus settings have read different text.

    Mirrors, and the text of the Python interpreter, may differ between machines.
    """
    known: dict[tuple[Any, ...], tuple[Row, str]] = {}
    for row, kept in done:
        corpora, evaluation = kept["settings"]["corpora"], kept["settings"]["evaluation"]
        amount = [corpora.get(n) for n in ("num_samples", "learn_samples", "seq_len", "bos")]
        amount += [len(corpora.get("recover", ())), kept["settings"].get("distill", {}).get("tokens")]
        amount += [evaluation.get(n) for n in ("num_samples", "seq_len", "split", "development_samples")]
        for role, digest in kept["inputs"]["text"].items():
            other, before = known.setdefault((kept["inputs"]["model"], row.seed, role, *amount), (row, digest))
            if before != digest:
                files = f"{find_record(other)[0].name} or {find_record(row)[0].name}"
                raise UserError(
                    f"Cannot compare rows '{other.name}' and '{row.name}': they have read different text as {role}. "
                    f"Remove the outdated record ({files}) and its run folder, and run it again."
                )


def tables_of(listing: Listing, report: Report) -> list[Table]:
    """Return the tables of a list that have rows: of the report, comparisons of stages, and tasks."""
    runs = report.runs
    own = stage_comparison_table(listing, runs), task_table(listing, runs)
    return [t for t in (*(t for t in report.tables if t.name in listing.content.tables), *own) if t.rows]


def stage_comparison_table(listing: Listing, runs: Sequence[FinishedRun]) -> Table:
    """Table with a row per pair of stages that the list compares and whose rows are finished."""
    pairs = {(a, b): ratios for a, b in listing.content.compare if (ratios := ratios_of(runs, a, b)) is not None}
    rows = [
        [" / ".join(p), len(of), pool_estimates(of), pool_estimates(ratios_of(runs, *p, "kl"))]
        for p, of in pairs.items()
    ]
    none = "No ratio: the two have no seed in common, or were evaluated on other windows."
    columns, note = ["unseen perplexity of", "seeds", "ratio", "of exp(KL)"], [none] * any(not row[1] for row in rows)
    if all(row[-1] is None for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    else:
        note.append("exp(KL): of KL(dense || row) per token on the same windows.")
    return Table("compare", "Comparisons", columns, rows, dict.fromkeys(columns[2:], 3), " ".join(note))


def task_table(listing: Listing, runs: Sequence[FinishedRun]) -> Table:
    """Table with a row per compared pair and seed for which both have tasks, and a column per task."""
    rows: list[tuple[str, int, dict[str, str]]] = []
    for a, b in listing.content.compare:
        (a_runs, a_stage), (b_runs, b_stage) = (_stage(runs, name) for name in (a, b))
        by_seed = {r.seed: of_stage(r.evaluation, b_stage) for r in b_runs}
        for r in a_runs:
            if paired := against(of_stage(r.evaluation, a_stage), by_seed.get(r.seed, [])):
                rows.append((f"{a} - {b}", r.seed, paired))
    tasks = list(dict.fromkeys(task for *_, paired in rows for task in paired))
    note = "Paired: accuracy less accuracy +- standard error; WikiText-2 by its windows' tokens, x perplexity over "
    note += "perplexity with a 95 % interval."
    content = [[pair, seed, *(paired.get(task) for task in tasks)] for pair, seed, paired in rows]
    return Table("compare_tasks", "Comparisons on tasks", ["first - second", "seed", *tasks], content, note=note)


def of_stage(records: Sequence[Record], stage: tuple[str, str]) -> list[Record]:
    """Select the records of a (stage, recovery)."""
    return [r for r in records if (r["stage"], r.get("recovery") or "none") == stage]


def ratios_of(runs: Sequence[FinishedRun], a: str, b: str, number: str = "nll") -> list[Estimate] | None:
    """Compute `unseen_ratio` of two stages, each named `row: stage`, for every common seed.

    Returns:
        The ratios; None if a row is not finished; an empty list if windows differ.
    """
    (a_runs, a_stage), (b_runs, b_stage) = (_stage(runs, name) for name in (a, b))
    if not a_runs or not b_runs:
        return None
    by_seed = {r.seed: r for r in b_runs}
    ratios = [ratio_to(r, a_stage, by_seed[r.seed], b_stage, number) for r in a_runs if r.seed in by_seed]
    return [] if any(ratio is None for ratio in ratios) else ratios


def _stage(runs: Sequence[FinishedRun], name: str) -> tuple[list[FinishedRun], tuple[str, str]]:
    row, _, stage = name.rpartition(": ")
    members = [r for r in runs if r.name == row]
    stages = {row_name(*key): key for r in members for key in by_stage(r.records)}
    if members and stage not in stages:
        raise UserError(f"The key compare must name a stage of '{row}' ({', '.join(stages)}); got '{stage}'.")
    return members, stages.get(stage, ("", ""))
