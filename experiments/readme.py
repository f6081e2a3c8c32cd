"""The table of quality in the README and the figure below it, from the committed records.

    python -m experiments.readme                                # prints the table
    python -m experiments.readme --figures experiments/figures  # draws readme.png

All numbers are unseen perplexity divided by that of the dense model ("times dense").
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from experiments.summary import DENSE, Lines, draw_curves, runs_of
from gprune.console import Parser, quiet, run_guarded
from gprune.report.figures import add_title, save, style
from gprune.report.tables import Estimate, Table, ratio_to
from gprune.runs.numbers import ResultRow, by_row
from gprune.runs.results import FinishedRun

COLUMNS = ["times dense", "SmolLM2-135M", "trained, 49k tokens", "Gemma-3-270M", "trained, 49k tokens "]
PEERS, PEERS_GEMMA, GEMMA = "questions/peers.yaml", "questions/peers_gemma.yaml", "gemma.yaml"
AVERAGED: ResultRow = ("averaged", "none")
Place = tuple[str, str] | tuple[str, str, ResultRow] | None  # list, row and, unless it is the last one, stage

# Label: rows of SmolLM2 before and after training, then of Gemma. All have weights in bfloat16 and seed 0.
ROWS: dict[str, tuple[Place, Place, Place, Place]] = {
    "base": ((PEERS, "base"), None, (GEMMA, "base"), None),
    "paper": (("questions/parts.yaml", "paper"), None, (GEMMA, "paper"), None),
    "paper, centred": (("questions/parts.yaml", "centred"), None, (GEMMA, "paper, centred"), None),
    "averaged": (("questions/parts.yaml", "paper", AVERAGED), None, (GEMMA, "averaged"), None),
    "averaged, least squares (trained: best)": (
        (PEERS, "averaged, least squares"), (PEERS, "averaged, least squares, 49k"),
        (GEMMA, "averaged, least squares"), (GEMMA, "best, 49k"),
    ),
    "gates": (("questions/beyond.yaml", "gates"), None, (GEMMA, "gates"), None),
    "sequential": (
        (PEERS, "untrained"), (PEERS, "untrained, 49k"), (PEERS_GEMMA, "untrained"),
        ("questions/untrained.yaml", "gemma, act_norm, sequential, distilled"),
    ),
    "OSSCAR": (
        (PEERS, "OSSCAR"), (PEERS, "OSSCAR, 49k"), (PEERS_GEMMA, "OSSCAR"), None,
    ),
    "2SSP": ((PEERS, "2SSP"), (PEERS, "2SSP, 49k"), (PEERS_GEMMA, "2SSP"), None),
    "Torch-Pruning": ((PEERS, "Torch-Pruning, Taylor"), (PEERS, "Torch-Pruning, 49k"), None, None),
    "FLAP": ((PEERS, "FLAP"), None, None, None),
    "LLM-Pruner": (
        (PEERS, "LLM-Pruner, 640 tokens"), None, (PEERS_GEMMA, "LLM-Pruner, 640 tokens"), None,
    ),
    "ShortGPT": ((PEERS, "ShortGPT"), None, (PEERS_GEMMA, "ShortGPT"), None),
}  # fmt: skip

# Line of the figure: for each removed share its list, row and stage.
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
SMOLLM2_LINES: dict[str, list[Place]] = {
    "base": [("questions/sparsity.yaml", f"wanda_sp {share}", ("base", "none")) for share in SHARES],
    "paper": [("questions/sparsity.yaml", f"wanda_sp {share}") for share in SHARES],
    "averaged": [("questions/sparsity.yaml", f"wanda_sp {share}", AVERAGED) for share in SHARES],
    "sequential": [(PEERS, "untrained")],
    "best": [
        *(("questions/distill_budgets.yaml", f"{share} %, 98k") for share in (20, 30, 40)),
        ("questions/distill.yaml", "averaged, 98k"), ("questions/distill_budgets.yaml", "60 %, 98k"),
    ],
}  # fmt: skip
GEMMA_LINES: dict[str, list[Place]] = {
    "base": [
        *(("gemma_budgets.yaml", f"{share} %, paper", ("base", "none")) for share in (20, 30)), (GEMMA, "base"),
    ],
    "paper": [*(("gemma_budgets.yaml", f"{share} %, paper") for share in (20, 30)), (GEMMA, "paper")],
    "averaged": [
        *(("gemma_budgets.yaml", f"{share} %, paper", AVERAGED) for share in (20, 30)), (GEMMA, "averaged"),
    ],
    "sequential": [(PEERS_GEMMA, "untrained")],
    "best": [*(("gemma_budgets.yaml", f"{share} %, best, 49k") for share in (20, 30)), (GEMMA, "best, 49k")],
}  # fmt: skip
TOKENS = ("98k", "197k", "393k", "786k", "1.57M")
TICKS = (49, 98, 197, 393, 786, 1573)  # thousands of tokens
TOKEN_LINES: dict[str, list[Place]] = {
    "masks of base": [("questions/distill.yaml", f"base, {tokens}") for tokens in ("49k", "98k", "196k", "393k")],
    "masks of paper": [("questions/distill.yaml", f"paper, then {tokens}") for tokens in ("49k", "344k")],
    "best": [("questions/tokens.yaml", f"smollm2, {tokens}") for tokens in TOKENS],
    "best, Gemma": [("questions/tokens.yaml", f"gemma, {tokens}") for tokens in TOKENS],
}


def find(place: Place) -> tuple[FinishedRun, Estimate] | None:
    """Return the run of a row of a list and its unseen perplexity divided by dense; None without a record."""
    if place is None:
        return None
    path, name, *stages = place
    for run in runs_of(path):
        if run.name == name:
            stage = stages[0] if stages else list(by_row(run.records))[-1]
            ratio = ratio_to(run, stage, run, DENSE)
            return None if ratio is None else (run, ratio)
    return None


def table() -> Table:
    """Return the README's table of quality."""
    cells = [[label, *(found and found[1] for found in map(find, places))] for label, places in ROWS.items()]
    return Table("readme", "Quality", COLUMNS, cells)


def lines(places: dict[str, list[Place]], over: str) -> Lines:
    """Return the points of each line. `over` is `share` for the removed share, or `tokens` for thousands of tokens."""
    return {(label, ""): sorted(points(of, over), key=lambda point: point[0]) for label, of in places.items()}


def points(places: Sequence[Place], over: str) -> Iterator[tuple[float, Estimate]]:
    """Yield the points of a line whose rows have records."""
    for run, ratio in filter(None, map(find, places)):
        yield run.settings["sparsity"]["target"] if over == "share" else run.summary["learned_tokens"] / 1000, ratio


@style()
def drawn() -> Figure:
    """Draw three panels: perplexity against the removed share for both models, and against training tokens."""
    figure = Figure(figsize=(10.5, 3.6))
    smollm2, gemma, tokens = figure.subplots(1, 3)
    labels = {"over": "share of the FFN neurons removed", "ticks": "{x:.0%}", "reference": "dense"}
    draw_curves(smollm2, lines(SMOLLM2_LINES, "share"), **labels)
    draw_curves(gemma, lines(GEMMA_LINES, "share"), **labels)
    draw_curves(tokens, lines(TOKEN_LINES, "tokens"), **labels | {"over": "thousands of training tokens"})
    gemma.sharex(smollm2)
    gemma.sharey(smollm2)
    tokens.set_xscale("log")
    tokens.set_xticks(TICKS, list(map(str, TICKS)))
    tokens.set_yticks([1, 1.2, 1.5, 2, 2.5])
    tokens.minorticks_off()
    for axes, title, place in (
        (smollm2, "SmolLM2-135M", "upper left"),
        (gemma, "Gemma-3-270M", "upper left"),
        (tokens, "Half removed, then trained", "center left"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("perplexity on unseen text, times dense")
        axes.legend(loc=place)
    return add_title(
        figure,
        "Standard protocol, 95 % intervals over windows, one seed. best in the first two panels: 98k training tokens "
        "on SmolLM2, 49k on Gemma. sequential was measured at 50 % only.\n"
        "Weights are in bfloat16, and in float32 for best on SmolLM2 and in the last panel.",
    )


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.readme", description=__doc__)
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figure to this folder, no table")
    folder = parser.parse_args(arguments).figures
    quiet()
    if folder is None:
        return table().to_markdown() + "\n"
    (path,) = save(drawn(), folder, "readme")
    with Image.open(path) as picture:
        few_colours = picture.convert("RGB").quantize(64)  # a quarter of the bytes
    few_colours.save(path, optimize=True)
    return f"Drawn: {path}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.readme", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
