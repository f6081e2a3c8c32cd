"""Figures of a list: those of the report over all rows, and a curve against a setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """The report's figures over all rows, and the list's own, as files."""
    made = reported(listing, done)
    made.draw(folder, prefix=f"{listing.path.stem}-")
    own = {"curve": listing.curve and curve(listing.curve, made.runs), "tokens": by_tokens(listing.lines, made.runs)}
    for name, figure in own.items():
        if figure is not None:
            save(titled(figure, made.about()), folder, f"{listing.path.stem}-{name}", FORMATS)


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
    ticks = "{x:.0%}" if over == BUDGET else "{x:g}"
    return curve_figure(lines, over=label, ticks=ticks, reference="base metric alone") if lines else None


TOKENS = "thousands of tokens learned from, forward and backward"


def by_tokens(asked: Mapping[str, Sequence[str]], runs: Sequence[FinishedRun]) -> Figure | None:
    """What comes out of each row over the dense model, against the tokens it learned from; None without rows."""
    lines = token_lines(asked, runs)
    return curve_figure(lines, over=TOKENS, ticks="{x:.0f}", reference="dense") if lines else None


def token_lines(
    asked: Mapping[str, Sequence[str]], runs: Sequence[FinishedRun]
) -> dict[tuple[str, str], list[tuple[float, Estimate]]]:
    """The lines of `by_tokens`: (thousands of tokens, ratio to dense).

    Raises:
        UserError: for two rows of a line that learned from as many tokens.
    """
    lines = {}
    for line, rows in asked.items():
        points: dict[int, dict[str, list[Estimate]]] = {}
        for run in (run for run in runs if run.name in rows):
            ratio = ratio_to(run, list(by_stage(run.records))[-1], run, ("dense", "none"))
            if ratio is not None:
                points.setdefault(run.summary["learned_tokens"], {}).setdefault(run.name, []).append(ratio)
        for tokens, found in points.items():
            if len(found) > 1:
                raise UserError(
                    f"lines: expected one row of '{line}' for each number of tokens, got {' and '.join(found)}, which "
                    f"learned from {tokens:,}."
                )
        if points:
            lines[line, ""] = [(n / 1000, pooled(*found.values())) for n, found in sorted(points.items())]
    return lines


def _over_base(run: FinishedRun) -> Iterator[tuple[str, Estimate]]:
    """Stage and unseen ratio to the run's own base with the same recovery, for each stage that has one."""
    recovery = run.settings["recovery"]
    for stage in by_stage(run.records):
        if stage[0] != "dense" and stage[1] == recovery:
            ratio = ratio_to(run, stage, run, ("base", recovery))
            if ratio is not None:  # None for the base itself, and without a base or unseen text
                yield stage[0], ratio
