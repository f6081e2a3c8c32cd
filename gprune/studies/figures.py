"""Figures of a list: those of the report over all rows, and a curve against a setting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gprune.config import flat
from gprune.errors import UserError
from gprune.report.comparison_figures import curve_figure
from gprune.report.perplexity_tables import pooled, ratio_to
from gprune.report.records import by_stage
from gprune.report.style import FORMATS, save, titled
from gprune.report.table import Estimate
from gprune.runs.results import FinishedRun
from gprune.studies.listing import Curve, Listing
from gprune.studies.tables import Done, reported

BUDGET = "sparsity.target"  # what curves call parameters removed, in percent


def draw(listing: Listing, done: Done, folder: Path) -> None:
    """The report's figures over all rows, and the list's curve, as files."""
    report = reported(listing, done)
    report.draw(folder, prefix=f"{listing.path.stem}-")
    figure = curve(listing.curve, report.runs) if listing.curve else None
    if figure is not None:
        save(titled(figure, report.about()), folder, f"{listing.path.stem}-curve", FORMATS)


def curve(asked: Curve, runs: Sequence[FinishedRun]) -> Figure | None:
    """The rows' stages over their own base against a setting; None where no row has both on unseen text.

    Raises:
        UserError: for a setting that is no number, and for two rows at one point.
    """
    ratios: dict[tuple[str, str], dict[float, dict[int, Estimate]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        settings = flat(run.settings)
        x, of = settings[asked.over], settings[asked.of]
        if isinstance(x, bool) or not isinstance(x, int | float):
            raise UserError(f"curve: expected a setting that is a number, but {asked.over} is {x!r}.")
        subject = f"{of:.0%} removed" if asked.of == BUDGET else str(of)
        for stage, ratio in _over_base(run):
            by_seed = ratios[subject, stage][x]
            if run.seed in by_seed:
                raise UserError(
                    f"curve: expected one row for each {asked.over} and {asked.of}, got two of {x} and {of}."
                )
            by_seed[run.seed] = ratio
    lines = {
        line: [(x, pooled(list(by_seed.values()))) for x, by_seed in sorted(points.items())]
        for line, points in ratios.items()
    }
    label, ticks = ("parameters of the scope removed", "{x:.0%}") if asked.over == BUDGET else (asked.over, "{x:g}")
    return curve_figure(lines, over=label, ticks=ticks, reference="base metric alone") if lines else None


def _over_base(run: FinishedRun) -> Iterator[tuple[str, Estimate]]:
    """Stage and unseen ratio to the run's own base with the same recovery, for each stage that has one."""
    recovery = run.settings["recovery"]
    for stage in by_stage(run.records):
        if stage[0] != "dense" and stage[1] == recovery:
            ratio = ratio_to(run, stage, run, ("base", recovery))
            if ratio is not None:  # None for the base itself, and without a base or unseen text
                yield stage[0], ratio
