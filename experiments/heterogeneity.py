"""Test whether neurons are heterogeneous, with the results of a finished run with three or more drift corpora.

    python -m experiments.heterogeneity runs/NAME                            # Markdown: every third block, the mean
    python -m experiments.heterogeneity runs/NAME --all --figure drift.svg   # all blocks; drift.png and drift.svg

For each block of N neurons, K modules and D drift corpora, with drift and noise floor of `gprune/partition/drift.py`:

drift         mean rank drift: standard deviation of a neuron's importance rank over the corpora, ranks in (0, 1)
floor         mean split-half noise floor: the drift expected from sampling alone
ratio         drift / floor
above floor   share of neurons whose drift exceeds the 95th percentile of the block's N floors. With sampling noise
              alone it would be somewhat above 0.05: a drift has D - 1 degrees of freedom, a floor D
tau           Kendall's tau-b of the whole block, mean over pairs of corpora
tau halves    the same between the two halves of one corpus, mean over corpora: the agreement with sampling noise alone
              (somewhat too low, since ranks from half of the tokens have twice the sampling variance)
tau inside    tau between corpora inside modules, mean weighted by pairs of neurons. Modules of neurons with similar
              importance decrease it, modules of weak and strong neurons increase it, so a difference from tau proves
              nothing
least, most   smallest and largest sensitivity (mean drift) of a module
switched      modules that rank by the activation-free metric

The test compares eta squared, the share of the variance of drift between modules, with random partitions of the same
sizes. For the run's modules the test is circular, since they were chosen to have neurons of equal drift. Therefore
data-free modules are made from the parameters alone (k-means on the embedding of gate, up and down, without weight on
drift), independent of activations. This requires the dense model (`--no-data-free` skips it). Besides, the drift of
neurons with very high or low ranks is limited, so modules that differ in importance differ in drift. `given rank` is
eta squared of drift minus its mean over neurons of similar rank (32 quantiles of mean rank).
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

from gprune.console import Parser, quiet, run_guarded
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.importance.scores import unit_weights
from gprune.models.embedded import model_label
from gprune.models.families import decoder_layers
from gprune.models.loading import fingerprint, load_model
from gprune.models.units import units_of
from gprune.partition.drift import rank_drift
from gprune.partition.initial import initial_partition, parameter_embedding, shuffled_partition
from gprune.partition.modules import Modules, module_means
from gprune.report.figures import FORMATS, add_title, heterogeneity_figure, save
from gprune.report.tables import Cell, Table, caption
from gprune.runs.results import FinishedRun, read_run

EVERY = 3  # blocks of the short table
RANK_BINS = 32


@dataclass(frozen=True)
class Separation:
    """Eta squared of the modules of one block, and of random partitions."""

    eta_squared: float
    random: Tensor  # (permutations,)


def pair_weighted_mean(values: Tensor, sizes: Tensor) -> float:
    """Mean of values per module (K,), weighted by the n(n-1)/2 pairs of each module. NaN values are ignored."""
    defined = ~values.isnan()
    pairs = (sizes * (sizes - 1) / 2).double()[defined]
    return float((values[defined] * pairs).sum() / pairs.sum()) if bool(defined.any()) else float("nan")


def block_numbers(modules: Modules) -> Tensor:
    """(blocks, 10) float64: the columns of the first table without the ratio, and the number of modules K."""
    rows = []
    for d, y, reliability, agreement, tau in zip(
        modules.drift, modules.labels, modules.reliability, modules.agreement, modules.block_agreement, strict=True
    ):
        # `d.drift` is not used, since a run may have subtracted the floor from it.
        drift, floor = rank_drift(d.ranks), d.noise_floor
        sensitivity = module_means(drift, y)
        inside = pair_weighted_mean(agreement, reliability.size)
        row = [drift.mean(), floor.mean(), share_above(drift, floor), tau, d.half_agreement, inside]
        row += [sensitivity.min(), sensitivity.max(), reliability.switched.sum(), len(sensitivity)]
        rows.append(list(map(float, row)))
    return torch.tensor(rows, dtype=torch.float64)


def share_above(drift: Tensor, floor: Tensor) -> float:
    """Share of neurons whose drift exceeds the 95th percentile of the floors: (N,), (N,) -> [0, 1]."""
    return float((drift > floor.quantile(0.95)).double().mean())


def eta_squared(values: Tensor, labels: Tensor) -> float:
    """Variance of module means, weighted by size, over the variance of values (N,): in [0, 1]; 0 if constant."""
    values = values.double()
    total = float((values - values.mean()).square().sum())
    between = float((module_means(values, labels)[labels] - values.mean()).square().sum())
    return between / total if total > 0 else 0.0


def given_rank(drift: Tensor, ranks: Tensor) -> Tensor:
    """Drift (N,) minus its mean over neurons of similar rank, by quantiles of the mean of ranks (D, N) over corpora."""
    order = ranks.mean(0).argsort(stable=True)
    bins = torch.empty_like(order)
    bins[order] = torch.arange(len(order)) * min(RANK_BINS, len(order)) // len(order)
    return drift - module_means(drift, bins)[bins]


def separation(values: Tensor, labels: Tensor, *, permutations: int, seed: int) -> Separation:
    """Eta squared of a partition, and of `permutations` random partitions with the same sizes."""
    shuffled = (shuffled_partition(labels, seed=seed + i) for i in range(permutations))
    random = torch.tensor([eta_squared(values, y) for y in shuffled], dtype=torch.float64)
    return Separation(eta_squared(values, labels), random)


def data_free_modules(run: FinishedRun) -> list[Tensor]:
    """Module labels per block from the dense model's parameters alone, with the run's other settings.

    Raises:
        UserError: if the model cannot be loaded, or is not the model of the run.
    """
    model_settings, p = run.settings["model"], run.settings["partition"]
    model, _ = load_model(model_settings["name"], dtype=getattr(torch, model_settings["dtype"]))
    family_of(model)
    if fingerprint(model) != run.model:
        raise UserError(
            f"Run '{run.path}' needs the dense model that it pruned, but '{model_settings['name']}' has other weights. "
            f"Add --no-data-free to skip data-free modules."
        )
    layers = decoder_layers(model)
    weights = (unit_weights(u, layers[u.layer]) for u in units_of(model) if u.kind == "neurons")
    embeddings = [parameter_embedding(w, dim=p["embedding_dim"], seed=run.seed) for w in weights]
    settings = {"num_modules": p["num_modules"], "drift_weight": 0.0, "seed": run.seed}
    return [initial_partition(e, torch.zeros(len(e)), **settings) for e in embeddings]


def block_table(values: Tensor, *, every: int) -> Table:
    """Every `every`-th row of `block_numbers`, and the mean over all rows without NaN. Counts are summed."""
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
    """A row per partition and quantity: means over blocks, and the number of blocks above all random partitions."""
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
    """Both tables with a description, as Markdown.

    Raises:
        UserError: if the run has no modules, or fewer than three drift corpora.
    """
    modules, corpora = run.modules, run.settings["corpora"]["drift"]
    if modules is None:
        raise UserError(f"RUN must be a run with --gprune true; got '{run.path}', which has no modules.")
    if len(corpora) < 3:
        raise UserError(
            f"RUN must have three or more drift corpora; got '{run.path}' with {len(corpora)} drift corpora "
            f"({', '.join(corpora)})."
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
    """Draw drift and Kendall's tau of all modules, as PNG and SVG with the file's name. Returns the paths."""
    figure = add_title(heterogeneity_figure(run.modules), caption(run.records))
    for axes in figure.axes:
        if axes.get_xlabel() == "block":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name = file.stem if file.suffix.removeprefix(".") in FORMATS else file.name
    return save(figure, file.parent, name, FORMATS)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command_line = Parser("python -m experiments.heterogeneity", description=__doc__)
    command_line.add_argument("run", metavar="RUN", help="folder of a finished run, such as runs/NAME")
    command_line.add_argument("--all", action="store_true", help=f"print all blocks instead of every {EVERY}rd")
    command_line.add_argument("--figure", type=Path, metavar="FILE", help="draw a figure to FILE as .png and .svg")
    command_line.add_argument("--permutations", type=int, default=20, help="random partitions per block; default 20")
    command_line.add_argument("--seed", type=int, default=0, help="seed of the random partitions")
    command_line.add_argument(
        "--data-free", action=argparse.BooleanOptionalAction, default=True,
        help="also test modules made from the dense model's parameters alone (default)",
    )  # fmt: skip
    return command_line


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    options = parser().parse_args(arguments)
    if options.permutations < 1:
        raise UserError(f"--permutations must be 1 or more; got {options.permutations}.")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2^63 - 1; got {options.seed}.")
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
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.heterogeneity", work)


if __name__ == "__main__":
    sys.exit(main())
