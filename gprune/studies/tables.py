"""Tables of a study: those of the report, and comparisons of stages by perplexity and on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gprune.errors import UserError
from gprune.report import Report, of_runs
from gprune.report.benchmark_table import compare_records
from gprune.report.grouping import same_size
from gprune.report.perplexity_tables import pool_estimates, ratio_to
from gprune.report.table import Estimate, Table
from gprune.runs.numbers import Record, by_stage, row_name
from gprune.runs.results import FinishedRun
from gprune.studies.archive import find_record, row_to_run
from gprune.studies.listing import Listing, Row

FinishedRows = Sequence[tuple[Row, dict[str, Any]]]  # finished rows with their records


def make_report(listing: Listing, done: FinishedRows) -> Report:
    """Make the report of finished rows. Seeds of a row are combined."""
    content = listing.content
    runs = [row_to_run(row, record, content.seen) for row, record in done]
    _check_text(done)
    return of_runs(runs, bases=reference_runs(content.reference, runs), seen=content.seen)


def reference_runs(reference: str | None, runs: Sequence[FinishedRun]) -> dict[Path, FinishedRun] | None:
    """Return path of a run -> reference run with the same seed, if the two have the same number of parameters."""
    if reference is None:
        return None
    references = {run.seed: run for run in runs if run.name == reference}
    pairs = [(run, references[run.seed]) for run in runs if run.seed in references]
    return {run.path: reference_run for run, reference_run in pairs if same_size(run, reference_run)}


def _check_text(done: FinishedRows) -> None:
    """Raise UserError if rows with the same corpus settings have read different text.

    Mirrors, and the text of the Python interpreter, may differ between machines.
    """
    # Model, seed, role and amount of text -> the first row with them, and the hash of its text.
    first_read: dict[tuple[Any, ...], tuple[Row, str]] = {}
    for row, record in done:
        settings, inputs = record["settings"], record["inputs"]
        corpora, evaluation = settings["corpora"], settings["evaluation"]
        amount = [corpora.get(name) for name in ("num_samples", "learn_samples", "seq_len", "bos")]
        amount += [len(corpora.get("recover", ())), settings.get("distill", {}).get("tokens")]
        amount += [evaluation.get(name) for name in ("num_samples", "seq_len", "split", "development_samples")]
        for role, digest in inputs["text"].items():
            key = (inputs["model"], row.seed, role, *amount)
            first_row, first_digest = first_read.setdefault(key, (row, digest))
            if first_digest != digest:
                files = f"{find_record(first_row)[0].name} or {find_record(row)[0].name}"
                raise UserError(
                    f"Cannot compare rows '{first_row.name}' and '{row.name}': they have read different text as "
                    f"{role}. Remove the outdated record ({files}) and its run folder, and run it again."
                )


def study_tables(listing: Listing, report: Report) -> list[Table]:
    """Return the tables that have rows: those of the report that the list selects, and comparisons of stages."""
    tables = [table for table in report.tables if table.name in listing.content.tables]
    tables += [stage_comparison_table(listing, report.runs), task_table(listing, report.runs)]
    return [table for table in tables if table.rows]


def stage_comparison_table(listing: Listing, runs: Sequence[FinishedRun]) -> Table:
    """Table of ratios: one row per pair of stages that the list compares, if the rows of both are finished."""
    rows = []
    for pair in dict.fromkeys(map(tuple, listing.content.compare)):
        ratios = stage_ratios(runs, *pair)
        if ratios is not None:
            ratios_of_kl = stage_ratios(runs, *pair, "kl")
            rows.append([" / ".join(pair), len(ratios), pool_estimates(ratios), pool_estimates(ratios_of_kl)])
    columns = ["unseen perplexity of", "seeds", "ratio", "of exp(KL)"]
    notes = []
    if any(seeds == 0 for _, seeds, *_ in rows):
        notes.append("No ratio: the two have no seed in common, or were evaluated on other windows.")
    if all(ratio_of_kl is None for *_, ratio_of_kl in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    else:
        notes.append("exp(KL): of KL(dense || row) per token on the same windows.")
    return Table("compare", "Comparisons", columns, rows, dict.fromkeys(columns[2:], 3), " ".join(notes))


def task_table(listing: Listing, runs: Sequence[FinishedRun]) -> Table:
    """Table of paired differences on tasks: one column per task.

    There is one row per compared pair and per seed for which both have task results.
    """
    results: list[tuple[str, int, dict[str, str]]] = []  # pair, seed, and task -> formatted difference
    for first, second in listing.content.compare:
        first_runs, first_stage = _find_stage(runs, first)
        second_runs, second_stage = _find_stage(runs, second)
        second_records = {run.seed: select_stage(run.evaluation, second_stage) for run in second_runs}
        for run in first_runs:
            first_records = select_stage(run.evaluation, first_stage)
            differences = compare_records(first_records, second_records.get(run.seed, []))
            if differences:
                results.append((f"{first} - {second}", run.seed, differences))
    tasks = list(dict.fromkeys(task for *_, differences in results for task in differences))
    note = "Paired: accuracy less accuracy +- standard error; WikiText-2 by its windows' tokens, x perplexity over "
    note += "perplexity with a 95 % interval."
    rows = [[pair, seed, *(differences.get(task) for task in tasks)] for pair, seed, differences in results]
    return Table("compare_tasks", "Comparisons on tasks", ["first - second", "seed", *tasks], rows, note=note)


def select_stage(records: Sequence[Record], stage: tuple[str, str]) -> list[Record]:
    """Select the records of a (stage, recovery)."""
    return [r for r in records if (r["stage"], r.get("recovery") or "none") == stage]


def stage_ratios(runs: Sequence[FinishedRun], first: str, second: str, number: str = "nll") -> list[Estimate] | None:
    """Compute `unseen_ratio` of two stages for every common seed."""
    first_runs, first_stage = _find_stage(runs, first)
    second_runs, second_stage = _find_stage(runs, second)
    if not first_runs or not second_runs:
        return None
    by_seed = {run.seed: run for run in second_runs}
    ratios = [
        ratio_to(run, first_stage, by_seed[run.seed], second_stage, number) for run in first_runs if run.seed in by_seed
    ]
    return [] if any(ratio is None for ratio in ratios) else ratios


def _find_stage(runs: Sequence[FinishedRun], name: str) -> tuple[list[FinishedRun], tuple[str, str]]:
    """Find the runs and the stage that a name such as `ours: gprune` refers to."""
    row, _, stage = name.rpartition(": ")
    runs_of_row = [run for run in runs if run.name == row]
    keys = {row_name(*key): key for run in runs_of_row for key in by_stage(run.records)}
    if not runs_of_row:
        return [], ("", "")
    if stage not in keys:
        raise UserError(f"The key compare must name a stage of '{row}' ({', '.join(keys)}); got '{stage}'.")
    return runs_of_row, keys[stage]
