"""How far apart rows lie: by how much the choice of a metric, or of a corpus that scores, matters.

python -m experiments.ranges experiments/questions/dependence.yaml

log(max / min) of the unseen geometric mean over the rows of each group; windows are resampled for all rows alike.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gprune.report import Estimate, Table
from gprune.report.records import records_of
from gprune.runs.results import STAGES, FinishedRun
from gprune.studies.archive import as_run, record_of
from gprune.studies.listing import Listing

GROUPS = {
    "dependence": {
        "metrics": ["wanda_sp", "wifv", "act_norm", "taylor"],
        "scoring corpora": ["wanda_sp", "scored on c4", "scored on code_github"],
    },
    "metrics": {"metrics": ["wanda_sp 0.5", "wifv 0.5", "ifv 0.5", "act_norm 0.5", "taylor 0.5"]},
}


def log_range(runs: Sequence[FinishedRun], stage: str) -> Tensor | None:
    """(1 + draws,) log(max / min) over runs of one seed on the same windows, the value first; None unless all have
    the stage. The two that are furthest apart stay the two in every draw: else draws would lie above the value."""
    rows = [records_of(run.records, (stage, run.settings["recovery"]), seen=False) for run in runs]  # corpus -> record
    if not all(rows):
        return None
    generator, logs = torch.Generator().manual_seed(0), []
    for corpus in sorted(rows[0]):
        nll = torch.tensor([row[corpus]["window_nll"] for row in rows], dtype=torch.float64)  # (rows, windows)
        pick = torch.randint(nll.shape[1], (2000, nll.shape[1]), generator=generator)
        logs.append(torch.cat([nll.mean(1)[:, None], nll[:, pick].mean(2)], dim=1) / (rows[0][corpus]["seq_len"] - 1))
    means = torch.stack(logs).mean(0)  # (rows, 1 + draws)
    return means[means[:, 0].argmax()] - means[means[:, 0].argmin()]


def range_table(groups: Mapping[str, Sequence[str]], runs: Sequence[FinishedRun]) -> Table:
    """A row for each group: of their base, of its average over corpora, of their result, as far as all rows have it."""
    rows = []
    for group, names in groups.items():
        base, averaged, result = (log_range([r for r in runs if r.name in names], stage) for stage in STAGES)
        draws = base, averaged, result, None if base is None or result is None else result / base
        bounds = [d if d is None else torch.stack([d[0], *d[1:].quantile(d.new_tensor([0.025, 0.975]))]) for d in draws]
        rows.append([f"{group}: {', '.join(names)}", *(b if b is None else Estimate(*b.tolist()) for b in bounds)])
    columns = ["unseen, log(max / min) over", *STAGES, "gprune / base"]
    return Table(
        "ranges", "Ranges", columns, rows, dict.fromkeys(columns[1:], 3),
        "In brackets 95 % intervals by bootstrap over windows for the two rows that are furthest apart. That the data "
        "picked these two is not in them, so that rows that are alike do not spread by 0.",
    )  # fmt: skip


def main(args: Sequence[str]) -> int:
    """Print the table of a list; returns 0."""
    listing = Listing.read(*args)
    kept = [(row, record) for row in listing.rows if (record := record_of(row)) is not None]
    print(range_table(GROUPS[listing.path.stem], [as_run(*one, listing.content.seen) for one in kept]).shown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
