"""The figure of the README and its table of quality, from the committed records.

    python -m experiments.readme                                # prints the table of quality
    python -m experiments.readme --shares                       # prints what is lost and gained at several shares
    python -m experiments.readme --commands                     # prints the command of each row of both tables
    python -m experiments.readme --figures experiments/figures  # draws readme.png

All numbers are unseen perplexity divided by that of the dense model ("times dense").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from experiments.frontier import BITS, loss, percent
from experiments.summary import HERE, runs_of, times_dense
from gprune.console import Parser, quiet, run_guarded
from gprune.report.figures import add_title, draw_line, line_style, save, style
from gprune.report.tables import Estimate, Table
from gprune.runs.results import FinishedRun

COLUMNS = ["times dense", "SmolLM2-135M", "trained, 49k tokens", "Gemma-3-270M"]
PEERS, PEERS_GEMMA, GEMMA = "peers.yaml", "peers_gemma.yaml", "gemma.yaml"
Place = tuple[str, str] | None  # list and row

# Label: rows of SmolLM2 before and after training, and of Gemma. All have weights in bfloat16 and seed 0.
ROWS: dict[str, tuple[Place, Place, Place]] = {
    "one corpus": ((PEERS, "base"), None, (GEMMA, "base")),
    "paper's method": (("parts.yaml", "paper"), None, (GEMMA, "paper")),
    "averaged": (("parts.yaml", "averaged"), None, (GEMMA, "averaged")),
    "recommended": (
        ("untrained.yaml", "smollm2, act_norm, reconstruction"), (PEERS, "best, 49k"),
        ("untrained.yaml", "gemma, act_norm, reconstruction"),
    ),
    "gates": (("beyond.yaml", "gates"), None, (GEMMA, "gates")),
    "OSSCAR": ((PEERS, "OSSCAR"), (PEERS, "OSSCAR, 49k"), (PEERS_GEMMA, "OSSCAR")),
    "2SSP": ((PEERS, "2SSP"), (PEERS, "2SSP, 49k"), (PEERS_GEMMA, "2SSP")),
    "Torch-Pruning": ((PEERS, "Torch-Pruning, Taylor"), (PEERS, "Torch-Pruning, 49k"), None),
    "FLAP": ((PEERS, "FLAP"), None, None),
    "LLM-Pruner": ((PEERS, "LLM-Pruner, 640 tokens"), None, (PEERS_GEMMA, "LLM-Pruner, 640 tokens")),
    "ShortGPT": ((PEERS, "ShortGPT"), None, (PEERS_GEMMA, "ShortGPT")),
}  # fmt: skip

# Line of the figure: list and row of each point. The rows of each line have the same metric, by shares.
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
SMOLLM2_LINES: dict[str, list[Place]] = {
    "one corpus": [("sparsity.yaml", f"wanda_sp {share}, base") for share in SHARES],
    "paper's method": [("sparsity.yaml", f"wanda_sp {share}") for share in SHARES],
    "averaged": [("sparsity.yaml", f"wanda_sp {share}, averaged") for share in SHARES],
    "trained": [
        *(("distill_budgets.yaml", f"{share} %, 98k") for share in (20, 30, 40)),
        ("distill.yaml", "averaged, 98k"), ("distill_budgets.yaml", "60 %, 98k"),
    ],
}  # fmt: skip
GEMMA_LINES: dict[str, list[Place]] = {
    "one corpus": [
        *(("gemma_budgets.yaml", f"{share} %, base") for share in (20, 30)), (GEMMA, "base"),
    ],
    "paper's method": [*(("gemma_budgets.yaml", f"{share} %, paper") for share in (20, 30)), (GEMMA, "paper")],
    "averaged": [
        *(("gemma_budgets.yaml", f"{share} %, averaged") for share in (20, 30)), (GEMMA, "averaged"),
    ],
    "trained": [*(("gemma_budgets.yaml", f"{share} %, best, 49k") for share in (20, 30)), (GEMMA, "best, 49k")],
}  # fmt: skip
LIFTS = {"one corpus": 4, "paper's method": 2, "averaged": -4}  # of the names of lines that end near others, in points


def find(place: Place) -> tuple[FinishedRun, Estimate] | None:
    """Return the run of a row of a list and its unseen perplexity divided by dense; None without a record."""
    if place is None:
        return None
    path, name = place
    for run in runs_of(path):
        if run.name == name:
            ratio = times_dense(run)
            return None if ratio is None else (run, ratio)
    return None


def table() -> Table:
    """Return the README's table of quality."""
    cells = [
        [label, *(found and f"{found[1].value:.2f}" for found in map(find, places))] for label, places in ROWS.items()
    ]
    return Table("readme", "Quality", COLUMNS, cells)


def files_in_llama_cpp() -> list[dict[str, Any]]:
    """Return the measurements of `experiments.frontier` on SmolLM2. Each has the dense model, measured beside it."""
    folder = HERE / "records" / "gguf"
    return [json.loads((folder / name).read_text(encoding="utf-8")) for name in ("smollm2.json", "smollm2_20_50.json")]


def shares_table() -> Table:
    """Return the README's table of what is lost and gained: perplexity relative to dense in 16 bits, speed to 8 bits.

    Speeds are compared with those of the dense model in the same measurement.
    """
    rows = []
    for i, measured in enumerate(files_in_llama_cpp()):
        dense, dense_8_bits, *_ = measured["files"]
        for row in measured["files"]:
            is_dense = row["model"] == "dense"
            if row is dense or (is_dense and i > 0) or not (is_dense or row["type"] == "q8_0"):
                continue
            mean, worst = loss(row, measured)
            rows.append([
                "nothing" if is_dense else row["model"].removesuffix(" of the FFN"), percent(row["share"]),
                f"{row['bytes'] / 1e6:.0f} MB, {BITS[row['type']]}", f"{mean:.2f} ({worst:.1f})",
                *(f"{row[number] / dense_8_bits[number]:.1f}" for number in ("prefill", "decode")),
            ])  # fmt: skip
    rows.sort(key=lambda cells: int(cells[1].split()[0]))  # by the share of the model
    columns = ["of the FFN removed", "of the model", "file", "perplexity", "prompt speed", "generation"]
    return Table("shares", "What is lost and gained", columns, rows)


def commands() -> str:
    """Return the commands that measure the rows of both tables, by row."""
    lines = [
        "# What is lost and gained: the first four print the commands of runs, whose folders the last one measures"
    ]
    for share in ("10 %", "20 %", "30 %", "50 %"):
        lines.append(
            f'gprune study experiments/lists/frontier.yaml --only "SmolLM2, {share}" --commands -- --export hf'
        )
    lines.append("python -m experiments.frontier runs/experiments/NAME ... --output FILE")
    for label, places in ROWS.items():
        lines.append(f"# {label}: SmolLM2, SmolLM2 trained, Gemma")
        lines += [f'gprune study experiments/lists/{path} --only "{row}"' for path, row in filter(None, places)]
    return "\n".join(lines) + "\n"


def points(places: Sequence[Place]) -> list[tuple[float, float]]:
    """Return the points of a line, (share of the FFN, times dense), in the order of their shares."""
    found = filter(None, map(find, places))
    return sorted((run.settings["sparsity"]["target"], ratio.value) for run, ratio in found)


@style()
def drawn() -> Figure:
    """Draw perplexity against the removed share, a panel for each model, with the names of lines at their ends."""
    measured, _ = files_in_llama_cpp()
    quantized = next(row for row in measured["files"] if (row["model"], row["type"]) == ("dense", "q8_0"))
    eight_bits, _ = loss(quantized, measured)
    figure = Figure(figsize=(9.6, 3.7))  # inches; GitHub shows it about 830 pixels wide
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, of_model in zip(
        panels, ("SmolLM2-135M", "Gemma-3-270M"), (SMOLLM2_LINES, GEMMA_LINES), strict=True
    ):
        for i, (name, places) in enumerate(of_model.items()):
            shares, ratios = zip(*points(places), strict=True)
            draw_line(axes, i, shares, ratios, name)
            colour = line_style(i)[0]
            axes.annotate(name, (shares[-1], ratios[-1]), (6, LIFTS.get(name, 0)), textcoords="offset points",
                          va="center", fontsize=9, color=colour)  # fmt: skip
        axes.axhline(eight_bits, color="0.35", ls="--", lw=1)
        axes.annotate("nothing removed, 8 bits", (0.2, eight_bits), (0, 5), textcoords="offset points", fontsize=9,
                      color="0.35")  # fmt: skip
        axes.set(yscale="log", xlim=(0.19, max(shares) + 0.13), xlabel="share of the FFN removed")
        axes.set_yticks([1, 1.5, 2, 3, 5, 10, 15], ["1", "1.5", "2", "3", "5", "10", "15"])
        axes.set_xticks([0.2, 0.3, 0.4, 0.5, 0.6], ["20 %", "30 %", "40 %", "50 %", "60 %"])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=10)
    panels[0].set_ylabel("perplexity on unseen text, times dense")
    return add_title(
        figure,
        "trained: averaged masks, least squares and 98k training tokens (Gemma: 49k). The other lines train nothing. "
        "Standard protocol, one seed.",
        size=8,
    )


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.readme", description=__doc__)
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figure to this folder, no table")
    parser.add_argument("--shares", action="store_true", help="print what is lost and gained at several shares")
    parser.add_argument("--commands", action="store_true", help="print the command of each row of both tables")
    options = parser.parse_args(arguments)
    folder = options.figures
    quiet()
    if options.commands:
        return commands()
    if folder is None:
        return (shares_table() if options.shares else table()).to_markdown() + "\n"
    (path,) = save(drawn(), folder, "readme")
    with Image.open(path) as picture:
        few_colours = picture.convert("RGB").quantize(256)  # less than half of the bytes
    few_colours.save(path, optimize=True)
    return f"Drawn: {path}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.readme", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
