"""Are neurons heterogeneous? What a finished run with three or more drift corpora says, block by block.

    python -m experiments.heterogeneity runs/NAME                            # Markdown: every third block, the mean
    python -m experiments.heterogeneity runs/NAME --all --figure drift.svg   # all blocks; drift.png and drift.svg

Per block of N neurons, K modules and D drift corpora; drift and its noise floor as in `gprune/partition/drift.py`:

drift         mean rank drift: standard deviation of a neuron's importance rank over the corpora, ranks in (0, 1)
floor         mean split-half noise floor: the drift that sampling alone would show
ratio         drift / floor
above floor   share of neurons whose drift exceeds the 95th percentile of the block's N floors. With sampling noise
              alone it would be somewhat above 0.05: a drift has D - 1 degrees of freedom, a floor D
tau           Kendall's tau-b averaged over pairs of corpora, over the whole block
tau halves    the same between the two halves of one corpus, mean over corpora: what sampling alone leaves of agreement
              (somewhat too low, since half the tokens rank with twice the sampling variance)
tau inside    that between corpora inside modules, mean weighted by pairs of neurons. It falls by itself where a module
              holds neurons of like importance, and rises where it mixes weak and strong ones, so that a difference from
              tau proves nothing
least, most   smallest and largest sensitivity (mean drift) of a module
switched      modules that rank by the metric switched to

The test is of eta squared, the share of the variance of drift that lies between modules, against random partitions of
the same sizes. For the run's own modules it is circular: they were made to hold neurons of equal drift. So modules are
made again from the parameters alone (k-means on the embedding of gate, up and down, with no weight on drift), which
never saw an activation; for this the dense model is loaded (`--no-data-free` does without). And a neuron ranked at
either end has no room to drift, so that modules which differ in importance differ in drift: `given rank` is eta squared
of what is left of drift when the mean of neurons ranked alike (32 quantiles of mean rank) is taken out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from gprune.console import Parser, guarded, quiet
from gprune.errors import UserError
from gprune.importance.weights import ffn_weights
from gprune.models.blocks import blocks_of
from gprune.models.embedded import model_label
from gprune.models.loading import fingerprint, load_model
from gprune.partition.drift import rank_drift
from gprune.partition.initial import initial_partition, parameter_embedding, shuffled_partition
from gprune.partition.modules import Modules
from gprune.partition.reliability import module_means
from gprune.report.records import caption
from gprune.report.run_figures import heterogeneity_figure
from gprune.report.style import FORMATS, save, titled
from gprune.report.table import Cell, Table
from gprune.runs.results import FinishedRun, read_run

EVERY = 3  # blocks of the short table
RANK_BINS = 32


@dataclass(frozen=True)
class Separation:
    """How much of something differs between the modules of one block: eta squared, and of random partitions."""

    eta_squared: float
    random: Tensor  # (permutations,)


def pair_weighted_mean(values: Tensor, sizes: Tensor) -> float:
    """Mean of per-module values (K,) weighted by the n(n-1)/2 pairs of each module; undefined modules left out."""
    defined = ~values.isnan()
    pairs = (sizes * (sizes - 1) / 2).double()[defined]
    return float((values[defined] * pairs).sum() / pairs.sum()) if bool(defined.any()) else float("nan")


def block_numbers(modules: Modules) -> Tensor:
    """(blocks, 10) float64: the columns of the first table but for the ratio, and K beside the modules switched."""
    rows = []
    for d, y, reliability, agreement, tau in zip(
        modules.drift, modules.labels, modules.reliability, modules.agreement, modules.block_agreement, strict=True
    ):
        # Not `d.drift`, from which a run may have subtracted the floor.
        drift, floor = rank_drift(d.ranks), d.floor
        sensitivity = module_means(drift, y)
        inside = pair_weighted_mean(agreement, reliability.size)
        row = [drift.mean(), floor.mean(), share_above(drift, floor), tau, d.halves, inside]
        row += [sensitivity.min(), sensitivity.max(), reliability.switched.sum(), len(sensitivity)]
        rows.append(list(map(float, row)))
    return torch.tensor(rows, dtype=torch.float64)


def share_above(drift: Tensor, floor: Tensor) -> float:
    """Share of neurons whose drift exceeds the 95th percentile of the floors: (N,), (N,) -> [0, 1]."""
    return float((drift > floor.quantile(0.95)).double().mean())


def eta_squared(values: Tensor, labels: Tensor) -> float:
    """Variance of the modules' means, weighted by size, over the variance of values (N,): in [0, 1], 0 if constant."""
    values = values.double()
    total = float((values - values.mean()).square().sum())
    between = float((module_means(values, labels)[labels] - values.mean()).square().sum())
    return between / total if total > 0 else 0.0


def given_rank(drift: Tensor, ranks: Tensor) -> Tensor:
    """Drift (N,) less its mean among neurons ranked alike; ranks (D, N): quantiles of the mean over corpora."""
    order = ranks.mean(0).argsort(stable=True)
    bins = torch.empty_like(order)
    bins[order] = torch.arange(len(order)) * min(RANK_BINS, len(order)) // len(order)
    return drift - module_means(drift, bins)[bins]


def separation(values: Tensor, labels: Tensor, *, permutations: int, seed: int) -> Separation:
    """Eta squared of the partition, and of `permutations` random ones with its sizes."""
    shuffled = (shuffled_partition(labels, seed=seed + i) for i in range(permutations))
    random = torch.tensor([eta_squared(values, y) for y in shuffled], dtype=torch.float64)
    return Separation(eta_squared(values, labels), random)


def data_free_modules(run: FinishedRun) -> list[Tensor]:
    """Module labels per block from the dense model's parameters alone, with the run's own settings otherwise.

    Raises:
        UserError: where the model cannot be had, or is another one than the run's.
    """
    model_settings, p = run.settings["model"], run.settings["partition"]
    model, _ = load_model(model_settings["name"], dtype=getattr(torch, model_settings["dtype"]))
    if fingerprint(model) != run.model:
        raise UserError(
            f"The model '{model_settings['name']}' has other weights than the one '{run.path}' pruned; expected the "
            f"same. --no-data-free does without it."
        )
    weights = map(ffn_weights, blocks_of(model))
    embeddings = [parameter_embedding(w, dim=p["embedding_dim"], seed=run.seed) for w in weights]
    settings = {"num_modules": p["num_modules"], "drift_weight": 0.0, "seed": run.seed}
    return [initial_partition(e, torch.zeros(len(e)), **settings) for e in embeddings]


def block_table(values: Tensor, *, every: int) -> Table:
    """Every `every`-th row of `block_numbers`, and the mean over all where it is defined; counts are summed."""
    columns = ["block", "drift", "floor", "ratio", "above floor", "tau", "tau halves", "tau inside", "least", "most"]
    columns += ["switched"]

    def cells(name: str, numbers: Tensor, counts: Tensor) -> list[Cell]:
        drift, floor, *rest = numbers.tolist()
        row = [drift, floor, drift / floor if floor else None, *rest]
        switched = f"{int(counts[0])} of {int(counts[1])}"
        return [name, *(None if v is None or math.isnan(v) else v for v in row), switched]

    shown = [cells(str(b), v[:-2], v[-2:]) for b, v in enumerate(values) if b % every == 0]
    shown.append(cells("mean", values[:, :-2].nanmean(0), values[:, -2:].sum(0)))
    digits = dict.fromkeys(("drift", "floor", *columns[4:-1]), 3)
    return Table("blocks", "Drift and agreement per block", columns, shown, digits)


def separation_table(
    ranks: Sequence[Tensor], partitions: dict[str, list[Tensor]], *, permutations: int, seed: int
) -> Table:
    """A row per partition and quantity: means over blocks, and how many blocks lie above all their random ones."""
    drifts = [rank_drift(r) for r in ranks]
    quantities = {"drift": drifts, "drift given rank": list(map(given_rank, drifts, ranks))}
    rows: list[list[Cell]] = []
    for name, labels in partitions.items():
        for what, values in quantities.items():
            separations = [
                separation(v, y, permutations=permutations, seed=seed + permutations * b)
                for b, (v, y) in enumerate(zip(values, labels, strict=True))
            ]
            numbers = torch.tensor(
                [[s.eta_squared, float(s.random.mean()), float(s.random.max())] for s in separations]
            )
            above = int((numbers[:, 0] > numbers[:, 2]).sum())
            rows.append([f"{name}: {what}", *numbers.mean(0).tolist(), f"{above} of {len(separations)}"])
    columns = ["modules: quantity", "eta squared", "random, mean", "random, largest", "blocks above their largest"]
    digits = dict.fromkeys(columns[1:4], 3)
    return Table("separation", "Between modules", columns, rows, digits)


def text_of(run: FinishedRun, *, every: int, data_free: bool, permutations: int, seed: int) -> str:
    """Both tables with what they say, as Markdown.

    Raises:
        UserError: for a run without modules, or with fewer than three drift corpora.
    """
    modules, corpora = run.modules, run.settings["corpora"]["drift"]
    if modules is None:
        raise UserError(f"'{run.path}' is a run of the base metric, which has no modules; expected one with --gprune.")
    if len(corpora) < 3:
        raise UserError(
            f"'{run.path}' has {len(corpora)} drift corpora ({', '.join(corpora)}); expected three or more."
        )
    partitions = {"the run's (circular)": modules.labels}
    if data_free:
        partitions["data-free"] = data_free_modules(run)
    blocks = block_table(block_numbers(modules), every=every)
    between = separation_table([d.ranks for d in modules.drift], partitions, permutations=permutations, seed=seed)
    c, label = run.settings["corpora"], model_label(run.settings["model"]["name"])
    about = (
        f"**{run.name}**: {label}, importance `{run.settings['importance']}`, drift over {', '.join(corpora)}, "
        f"{c['num_samples']} windows of {c['seq_len']} tokens each, seed {run.seed}."
    )
    note = (
        f"Random: {permutations} random partitions of the same sizes per block. The run's own modules were made with "
        f"drift in view, so their eta squared proves nothing; data-free modules come from the parameters alone."
    )
    return "\n\n".join([about, blocks.to_markdown(), between.to_markdown(), note])


def draw(run: FinishedRun, file: Path) -> list[Path]:
    """Drift and Kendall tau of every module in every block, as PNG and SVG under the file's name."""
    figure = titled(heterogeneity_figure(run.modules), caption(run.records))
    for axes in figure.axes:
        if axes.get_xlabel() == "block":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name = file.stem if file.suffix.removeprefix(".") in FORMATS else file.name
    return save(figure, file.parent, name, FORMATS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command_line = Parser("python -m experiments.heterogeneity", description=__doc__)
    command_line.add_argument("run", metavar="RUN", help="folder of a finished run, such as runs/NAME")
    command_line.add_argument("--all", action="store_true", help=f"print all blocks, not every {EVERY}rd")
    command_line.add_argument("--figure", type=Path, metavar="FILE", help="draw into FILE, as .png and as .svg")
    command_line.add_argument("--permutations", type=int, default=20, help="random partitions per block; default 20")
    command_line.add_argument("--seed", type=int, default=0, help="of the random partitions")
    command_line.add_argument(
        "--data-free", action=argparse.BooleanOptionalAction, default=True,
        help="load the dense model, and make modules from its parameters alone (default)",
    )  # fmt: skip
    return command_line


def work(arguments: Sequence[str] | None = None) -> str:
    """What the command prints."""
    options = parser().parse_args(arguments)
    if options.permutations < 1:
        raise UserError(f"--permutations: expected 1 or more, got {options.permutations}.")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed: expected 0 or more and less than 2^63, got {options.seed}.")
    quiet()
    run = read_run(options.run)
    text = text_of(
        run, every=1 if options.all else EVERY, data_free=options.data_free, permutations=options.permutations,
        seed=options.seed,
    )  # fmt: skip
    if options.figure is not None:
        text += f"\n\nDrawn: {', '.join(map(str, draw(run, options.figure)))}."
    return text + "\n"


def main() -> int:
    """Exit code 2 and one line for what a user can mend."""
    return guarded("experiments.heterogeneity", work)


if __name__ == "__main__":
    sys.exit(main())
