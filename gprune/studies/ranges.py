"""How far apart the rows of a group lie: by how much the choice of a metric, or of a corpus, matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gprune.errors import UserError
from gprune.report.records import records_of
from gprune.report.table import Estimate, Table
from gprune.runs.results import STAGES, FinishedRun


def range_table(groups: Mapping[str, Sequence[str]], runs: Sequence[FinishedRun]) -> Table:
    """log(max / min) of the unseen geometric mean over the rows of each group.

    Of their own base, of its average over corpora, and of their result, each blank unless all rows have it; with 95 %
    intervals, windows resampled for all rows alike.
    """
    rows = []
    for group, names in groups.items():
        base, averaged, result = (log_range(runs, names, stage) for stage in STAGES)
        ratio = None if base is None or result is None or base[0] == 0 else result / base
        cells = [None if draws is None else _estimate(draws) for draws in (base, averaged, result, ratio)]
        if any(cells):
            rows.append([f"{group}: {', '.join(names)}", *cells])
    columns = ["unseen, log(max / min) over", *STAGES, "gprune / base"]
    return Table(
        "ranges", "Ranges", columns, rows, dict.fromkeys(columns[1:], 3),
        "In brackets 95 % intervals by bootstrap over windows for the two rows that are furthest apart. That the data "
        "picked these two is not in them, so that rows that are alike do not spread by 0.",
    )  # fmt: skip


def log_range(runs: Sequence[FinishedRun], names: Sequence[str], stage: str) -> Tensor | None:
    """(1 + draws,) log(max / min) over rows of one stage, recovered as the row is, the value first.

    The two rows that are furthest apart stay the two in every draw: a range of resampled rows would lie above the range
    that is resampled. The same windows are drawn for every stage and row.

    Returns:
        None unless there are two rows or more, and all have the stage.

    Raises:
        UserError: where rows were evaluated on other windows.
    """
    by_seed = [
        {r.seed: records_of(r.records, (stage, r.settings["recovery"]), seen=False) for r in runs if r.name == name}
        for name in names
    ]
    seeds = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    rows = [[of_seed[seed] for seed in seeds] for of_seed in by_seed]  # name, seed -> corpus -> record
    if len(names) < 2 or not seeds or not all(records for row in rows for records in row):
        return None
    if len({tuple(sorted((c, r["content_hash"]) for c, r in records.items())) for row in rows for records in row}) > 1:
        raise UserError(
            f"ranges: expected rows that were evaluated on the same unseen text, but {', '.join(names)} were not; name "
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


def _estimate(draws: Tensor) -> Estimate:
    low, high = torch.quantile(draws[1:], torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Estimate(float(draws[0]), low, high)
