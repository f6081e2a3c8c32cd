"""Figures of a list: those of the report over all rows, and a curve against a setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gprune.errors import UserError
from gprune.report.comparison_figures import curve_figure
from gprune.report.perplexity_tables import pooled, ratio_to
from gprune.report.records import by_stage
from gprune.report.style import FORMATS, save
from gprune.report.table import Estimate
from gprune.runs.results import FinishedRun
from gprune.studies.listing import Curve, Listing, flat
from gprune.studies.tables import Done, reported

BUDGET = "sparsity.target"  # what curves call parameters removed, in percent


def draw(listing: Listing, done: Done, folder: Path) -> None:
    """The report's figures over all rows, and the list's curve, as files."""
    made = reported(listing, done)
    made.draw(folder, prefix=f"{listing.path.stem}-")
    if listing.curve is not None and (figure := curve(listing.curve, made.runs)) is not None:
        save(figure, folder, f"{listing.path.stem}-curve", FORMATS)


def curve(asked: Curve, runs: Sequence[FinishedRun]) -> Figure | None:
    """The rows' stages over their own base against a setting; None where no row has both on unseen text."""
    over, of = asked.over, asked.of
    ratios: dict[tuple[str, str], dict[float, dict[int, Estimate]]] = {}
    for run in runs:
        settings = flat(run.settings)
        for stage, ratio in _over_base(run):
            if isinstance(settings[over], bool) or not isinstance(settings[over], int | float):
                raise UserError(f"curve: expected a setting that is a number, but {over} is {settings[over]!r}.")
            subject = f"{settings[of]:.0%} removed" if of == BUDGET else str(settings[of])
            by_seed = ratios.setdefault((subject, stage), {}).setdefault(settings[over], {})
            if run.seed in by_seed:
                raise UserError(
                    f"curve: expected one row for each {over} and {of}, got two of {settings[over]} and {settings[of]}."
                )
            by_seed[run.seed] = ratio
    lines = {
        name: [(x, pooled(list(by_seed.values()))) for x, by_seed in sorted(points.items())]
        for name, points in ratios.items()
    }
    label = "parameters of the scope removed" if over == BUDGET else over
    return curve_figure(lines, over=label, percent=over == BUDGET) if lines else None


def _over_base(run: FinishedRun) -> Iterator[tuple[str, Estimate]]:
    """Stage and unseen ratio to the run's own base with the same recovery, for each stage that has one."""
    recovery = run.settings["recovery"]
    for stage in by_stage(run.records):
        if stage[0] != "dense" and stage[1] == recovery:
            ratio = ratio_to(run, stage, run, ("base", recovery))
            if ratio is not None:  # None for the base itself, and without a base or unseen text
                yield stage[0], ratio
