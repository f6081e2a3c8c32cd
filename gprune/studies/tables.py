"""From records of rows to tables: means, ratios, comparisons, spreads, costs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import gprune
from gprune import report
from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.report.comparison_figures import curve_figure
from gprune.report.perplexity_tables import over_seeds, ratio_to
from gprune.report.records import by_stage, row_name
from gprune.report.table import Estimate, Table, markdown
from gprune.runs.results import FinishedRun, with_defaults
from gprune.studies.listing import Listing, Row, flat, plain

CONTROL = "control"  # what tables call the result of a row that the list names as a control
BUDGET = "sparsity.target"  # what curves call parameters removed, in percent
Done = Sequence[tuple[Row, dict[str, Any]]]  # rows with their records


def packed(masks: Masks) -> dict[str, dict[str, Any]]:
    """Keep masks as base64 of their bits: 8 kB for 46,080 neurons."""
    return {
        kind: {
            "sizes": [len(m) for m in found],
            "bits": base64.b64encode(np.packbits(torch.cat(found).numpy())).decode(),
        }
        for kind, found in (("ffn", masks.ffn), ("attention", masks.attention))
    }


def unpacked(kept: dict[str, dict[str, Any]]) -> Masks:
    """What `packed` was given."""
    parts = {}
    for kind, value in kept.items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(value["bits"]), dtype=np.uint8), count=sum(value["sizes"]))
        parts[kind] = list(torch.from_numpy(bits.astype(bool)).split(value["sizes"]))
    return Masks(**parts)


def as_run(row: Row, kept: dict[str, Any], seen: Sequence[str] | None) -> FinishedRun:
    """A record as reports read runs, unless it has seen what the list calls unseen."""
    records, evaluation = (_named(row, kept.get(name, [])) for name in ("records", "evaluation"))
    if seen is not None and (extra := sorted({r["corpus"] for r in records if r["seen"]} - set(seen))):
        raise UserError(
            f"Row '{row.name}': expected text that the list calls unseen, got {extra[0]}, which the run used, or "
            f"which shares text with what it used; add it to `seen` ({', '.join(seen)})."
        )
    return FinishedRun(
        path=row.path,
        name=row.name,
        settings=with_defaults(kept["settings"], plain(gprune.RunConfig().settings())) | {"inputs": kept["inputs"]},
        records=records,
        summary=kept["summary"],
        masks=unpacked(kept["masks"]),
        modules=None,
        evaluation=[r | {"run": row.name} for r in evaluation if row.wanted_tasks],
    )


def _named(row: Row, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, with the result of a control called what it is."""
    return [r | {"stage": CONTROL} if row.control and r["stage"] == "gprune" else r for r in records]


def reported(listing: Listing, done: Done) -> report.Report:
    """The report of finished rows; rows that differ in seed alone are one."""
    runs = [as_run(row, kept, listing.seen) for row, kept in done]
    _check_text(done)
    by_seed = [r for r in runs if r.name == listing.reference] if listing.reference else None
    return report.of_runs(runs, base=by_seed[0] if by_seed else None, by_seed=by_seed, seen=listing.seen)


def _check_text(done: Done) -> None:
    """Rows that ask for the same text have had the same: mirrors and the interpreter's own text differ by machine."""
    known: dict[tuple[Any, ...], tuple[str, str]] = {}
    for row, kept in done:
        amount = [kept["settings"]["corpora"].get(n) for n in ("num_samples", "learn_samples", "seq_len")]
        amount += [kept["settings"]["evaluation"].get(n) for n in ("num_samples", "seq_len", "split")]
        for role, digest in kept["inputs"]["text"].items():
            name, before = known.setdefault((kept["inputs"]["model"], row.seed, role, *amount), (row.name, digest))
            if before != digest:
                raise UserError(
                    f"Rows '{name}' and '{row.name}' have read other text as {role}: expected one set of mirrors and "
                    f"one version of Python; remove the record {row.path.name} and run the row again."
                )


def text_of(listing: Listing, done: Done) -> str:
    """Markdown: means and ratios, perplexities, comparisons, tasks; then the protocol."""
    made = reported(listing, done)
    tables = [t for t in made.tables if t.name in listing.tables]
    parts = [f"**{listing.about}**", *(t.to_markdown() + f"\n\n{t.note}" for t in tables if t.rows)]
    by_name: dict[str, list[FinishedRun]] = {}
    for r in made.runs:
        by_name.setdefault(r.name, []).append(r)
    pairs = [(f"{a} / {b}", ratios_of(by_name, a, b)) for a, b in listing.compare]
    rows = [[name, len(ratios), _mean(ratios)] for name, ratios in pairs if ratios is not None]
    if rows:
        columns = ["unseen perplexity of", "seeds", "ratio"]
        parts.append(Table("compare", "Comparisons", columns, rows, {"ratio": 3}).to_markdown())
    if any(not ratios for _, ratios in pairs if ratios is not None):
        parts.append("No ratio: the two have no seed in common, or were evaluated on other windows.")
    if spread := spreads(listing, made.runs):
        parts.append(markdown(spread))
        parts.append(
            "In brackets 95 % intervals over windows for the two rows that are furthest apart. That the data picked "
            "these two is not in them, so that rows that are alike do not spread by 0."
        )
    return "\n\n".join([*parts, *made.protocols()])


def spreads(listing: Listing, runs: Sequence[FinishedRun]) -> list[list[str]]:
    """log(max / min) of the unseen geometric mean over the rows of each group: of their own base, of its average over
    corpora, and of their result, each blank unless all rows have it; with 95 % intervals, windows resampled for all
    rows alike.
    """
    stages = ("base", "base_averaged", "gprune")
    rows = [["unseen, log(max / min) over", *stages, "gprune / base"]]
    for group, names in listing.spread.items():
        found = [_spread(runs, names, stage) for stage in stages]
        base, _, result = found
        ratio = None if base is None or result is None or base[0] == 0 else result / base
        if any(draws is not None for draws in found):
            cells = ["" if draws is None else _with_interval(draws) for draws in (*found, ratio)]
            rows.append([f"{group}: {', '.join(names)}", *cells])
    return rows if len(rows) > 1 else []


def _spread(runs: Sequence[FinishedRun], names: Sequence[str], stage: str) -> Tensor | None:
    """Of one stage, recovered as the row is: (1 + draws,), the value first; None unless all rows, two or more, have it.

    The two rows that are furthest apart stay the two in every draw: a range of resampled rows would lie above the range
    that is resampled. The same windows are drawn for every stage and row.

    Raises:
        UserError: where rows were evaluated on other windows.
    """
    by_seed = [{r.seed: _unseen(r, (stage, r.settings["recovery"])) for r in runs if r.name == name} for name in names]
    seeds = sorted(set.intersection(*(set(found) for found in by_seed))) if by_seed else []
    rows = [[found[seed] for seed in seeds] for found in by_seed]  # name, seed -> corpus -> record
    if len(names) < 2 or not seeds or not all(records for row in rows for records in row):
        return None
    if len({tuple(sorted((c, r["content_hash"]) for c, r in records.items())) for row in rows for records in row}) > 1:
        raise UserError(
            f"spread: expected rows that were evaluated on the same unseen text, but {', '.join(names)} were not; name "
            f"the corpora that count as seen in all of them with `seen`."
        )
    generator, logs = torch.Generator().manual_seed(0), []
    for corpus in sorted(rows[0][0]):
        # (names, windows), the mean over seeds
        nll = torch.tensor([[r[corpus]["window_nll"] for r in row] for row in rows], dtype=torch.float64).mean(1)
        pick = torch.randint(nll.shape[1], (2000, nll.shape[1]), generator=generator)
        means = torch.cat([nll.mean(1)[:, None], nll[:, pick].mean(2)], dim=1)
        logs.append(means / (rows[0][0][corpus]["seq_len"] - 1))
    means = torch.stack(logs).mean(0)  # (names, 1 + draws)
    return means[means[:, 0].argmax()] - means[means[:, 0].argmin()]


def _unseen(run: FinishedRun, stage: tuple[str, str]) -> dict[str, dict[str, Any]]:
    return {r["corpus"]: r for r in run.records if (r["stage"], r["recovery"]) == stage and not r["seen"]}


def _with_interval(draws: Tensor) -> str:
    low, high = torch.quantile(draws[1:], torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return f"{float(draws[0]):.3f} [{low:.3f}, {high:.3f}]"


def curve(listing: Listing, runs: Sequence[FinishedRun]) -> Figure | None:
    """The rows' stages over their own base against a setting; None where the list asks for none or has no such rows."""
    if listing.curve is None:
        return None
    over, of = listing.curve["over"], listing.curve["of"]
    ratios: dict[tuple[str, str], dict[float, dict[int, Estimate]]] = {}
    for r in runs:
        settings, key = flat(r.settings), r.settings["recovery"]
        for stage, recovery in by_stage(r.records):
            if stage not in ("dense", "base") and recovery == key and ("base", key) in by_stage(r.records):
                found = ratio_to(r, (stage, key), r, ("base", key))
                if found is None:  # no unseen text
                    continue
                if isinstance(settings[over], bool) or not isinstance(settings[over], int | float):
                    raise UserError(f"curve: expected a setting that is a number, but {over} is {settings[over]!r}.")
                subject = f"{settings[of]:.0%} removed" if of == BUDGET else str(settings[of])
                points = ratios.setdefault((subject, stage), {}).setdefault(settings[over], {})
                if r.seed in points:
                    raise UserError(
                        f"curve: expected one row for each {over} and {of}, got two of {settings[over]} and "
                        f"{settings[of]}."
                    )
                points[r.seed] = found
    lines = {
        name: [(x, _mean(list(found.values()))) for x, found in sorted(points.items())]
        for name, points in ratios.items()
    }
    if not lines:
        return None
    budget = over == BUDGET
    return curve_figure(lines, over="parameters of the scope removed" if budget else over, percent=budget)


def compared(runs: dict[str, list[FinishedRun]], a: str, b: str) -> Estimate | None:
    """Unseen geometric mean of one stage over another's, `row: stage` each: over windows, or over seeds if several."""
    return _mean(ratios_of(runs, a, b) or [])


def ratios_of(runs: dict[str, list[FinishedRun]], a: str, b: str) -> list[Estimate] | None:
    """A ratio for every seed that both have; none unless all are of the same windows. None where a row has not run."""
    (a_runs, a_stage), (b_runs, b_stage) = (_stage(runs, name) for name in (a, b))
    if not a_runs or not b_runs:
        return None
    by_seed = {r.seed: r for r in b_runs}
    ratios = [ratio_to(r, a_stage, by_seed[r.seed], b_stage) for r in a_runs if r.seed in by_seed]
    return [] if any(ratio is None for ratio in ratios) else ratios


def _mean(ratios: Sequence[Estimate]) -> Estimate | None:
    if not ratios:
        return None
    return ratios[0] if len(ratios) == 1 else over_seeds([ratio.value for ratio in ratios])


def _stage(runs: dict[str, list[FinishedRun]], name: str) -> tuple[list[FinishedRun], tuple[str, str]]:
    row, _, stage = name.partition(": ")
    members = runs.get(row, [])
    stages = {row_name(*key): key for r in members for key in by_stage(r.records)}
    if members and stage not in stages:
        raise UserError(f"compare: expected a stage of '{row}' ({', '.join(stages)}), got '{stage}'.")
    return members, stages.get(stage, ("", ""))


def costs_of(done: Done) -> str:
    """Markdown: seconds, tokens and peak memory of each step of each row; what the cache had already costs nothing."""
    rows = [["run", "step", "seconds", "tokens forward", "and backward", "peak MiB"]]
    for row, kept in done:
        for step, used in kept["steps"].items():
            tokens = (f"{used.get(kind, 0):,.0f}" for kind in ("forward_tokens", "forward_backward_tokens"))
            rows.append(
                [
                    f"{row.name}, seed {row.seed}",
                    step,
                    f"{used['seconds']:.1f}",
                    *tokens,
                    f"{used['peak_memory_mib']:,}",
                ]
            )
    note = "peak MiB: the process's highest so far, so that a row may show that of one before it."
    return f"{markdown(rows)}\n\n{note}"
