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

from experiments.summary import Lines, draw_curves, runs_of, times_dense
from gprune.console import Parser, quiet, run_guarded
from gprune.report.figures import add_title, save, style
from gprune.report.tables import Estimate, Table
from gprune.runs.results import FinishedRun

COLUMNS = ["times dense", "SmolLM2-135M", "trained, 49k tokens", "Gemma-3-270M", "trained, 49k tokens "]
PEERS, PEERS_GEMMA, GEMMA = "peers.yaml", "peers_gemma.yaml", "gemma.yaml"
Place = tuple[str, str] | None  # list and row

# Label: rows of SmolLM2 before and after training, then of Gemma. All have weights in bfloat16 and seed 0.
ROWS: dict[str, tuple[Place, Place, Place, Place]] = {
    "base": ((PEERS, "base"), None, (GEMMA, "base"), None),
    "paper": (("parts.yaml", "paper"), None, (GEMMA, "paper"), None),
    "paper, centred": (("parts.yaml", "centred"), None, (GEMMA, "paper, centred"), None),
    "averaged": (("parts.yaml", "averaged"), None, (GEMMA, "averaged"), None),
    "averaged, least squares": (
        (PEERS, "averaged, least squares"), (PEERS, "averaged, least squares, 49k"),
        (GEMMA, "averaged, least squares"), (GEMMA, "best, 49k"),
    ),
    "best": (
        ("untrained.yaml", "smollm2, act_norm, reconstruction"), (PEERS, "best, 49k"),
        ("untrained.yaml", "gemma, act_norm, reconstruction"), None,
    ),
    "gates": (("beyond.yaml", "gates"), None, (GEMMA, "gates"), None),
    "sequential": (
        (PEERS, "untrained"), (PEERS, "untrained, 49k"), (PEERS_GEMMA, "untrained"),
        ("untrained.yaml", "gemma, act_norm, sequential, distilled"),
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

# Names of lines, in the order of their colours: the same masks have the same colour in all panels.
SUBJECTS = ("trained", "paper", "averaged", "untrained", "base", "best")
# Line of the figure: list and row of each point.
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
SMOLLM2_LINES: dict[str, list[Place]] = {
    "base": [("sparsity.yaml", f"wanda_sp {share}, base") for share in SHARES],
    "paper": [("sparsity.yaml", f"wanda_sp {share}") for share in SHARES],
    "averaged": [("sparsity.yaml", f"wanda_sp {share}, averaged") for share in SHARES],
    "untrained": [("untrained.yaml", "smollm2, act_norm, reconstruction")],
    "trained": [
        *(("distill_budgets.yaml", f"{share} %, 98k") for share in (20, 30, 40)),
        ("distill.yaml", "averaged, 98k"), ("distill_budgets.yaml", "60 %, 98k"),
    ],
}  # fmt: skip
GEMMA_LINES: dict[str, list[Place]] = {
    "base": [
        *(("gemma_budgets.yaml", f"{share} %, base") for share in (20, 30)), (GEMMA, "base"),
    ],
    "paper": [*(("gemma_budgets.yaml", f"{share} %, paper") for share in (20, 30)), (GEMMA, "paper")],
    "averaged": [
        *(("gemma_budgets.yaml", f"{share} %, averaged") for share in (20, 30)), (GEMMA, "averaged"),
    ],
    "trained": [*(("gemma_budgets.yaml", f"{share} %, best, 49k") for share in (20, 30)), (GEMMA, "best, 49k")],
}  # fmt: skip
TOKENS = ("98k", "197k", "393k", "786k", "1.57M")
TICKS = {49: "49k", 98: "98k", 197: "197k", 393: "393k", 786: "786k", 1573: "1.6M"}  # thousands of tokens
TOKEN_LINES: dict[str, list[Place]] = {
    "base": [("distill.yaml", f"base, {tokens}") for tokens in ("49k", "98k", "196k", "393k")],
    "paper": [("distill.yaml", f"paper, then {tokens}") for tokens in ("49k", "344k")],
    "trained": [("tokens.yaml", f"smollm2, {tokens}") for tokens in TOKENS],
    "best": [(PEERS, "best, 49k"), (PEERS, "best")],
    "trained, Gemma": [("tokens.yaml", f"gemma, {tokens}") for tokens in TOKENS],
}


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
    cells = [[label, *(found and found[1] for found in map(find, places))] for label, places in ROWS.items()]
    return Table("readme", "Quality", COLUMNS, cells)


def lines(places: dict[str, list[Place]], over: str) -> Lines:
    """Return the points of each line. `over` is `share` for the removed share, or `tokens` for thousands of tokens."""
    return {
        (subject, model): sorted(points(of, over), key=lambda point: point[0])
        for (subject, _, model), of in ((label.partition(", "), of) for label, of in places.items())
    }


def points(places: Sequence[Place], over: str) -> Iterator[tuple[float, Estimate]]:
    """Yield the points of a line whose rows have records."""
    for run, ratio in filter(None, map(find, places)):
        yield run.settings["sparsity"]["target"] if over == "share" else run.summary["learned_tokens"] / 1000, ratio


@style()
def drawn() -> Figure:
    """Draw three panels: perplexity against the removed share for both models, and against training tokens."""
    figure = Figure(figsize=(9.6, 3.7))  # inches; GitHub shows it about 830 pixels wide
    smollm2, gemma, tokens = figure.subplots(1, 3)
    labels = {"over": "share of the FFN removed", "ticks": "{x:.0%}", "reference": "dense", "subjects": SUBJECTS}
    draw_curves(smollm2, lines(SMOLLM2_LINES, "share"), **labels)
    draw_curves(gemma, lines(GEMMA_LINES, "share"), **labels)
    draw_curves(tokens, lines(TOKEN_LINES, "tokens"), **labels | {"over": "training tokens"})
    gemma.sharex(smollm2)
    gemma.sharey(smollm2)
    tokens.set_xscale("log")
    tokens.set_xticks(list(TICKS), list(TICKS.values()))
    tokens.set_yticks([1, 1.2, 1.5, 2, 2.5])
    tokens.minorticks_off()
    smollm2.set_ylabel("perplexity on unseen text, times dense", fontsize=10)
    for axes, title in (
        (smollm2, "SmolLM2-135M"),
        (gemma, "Gemma-3-270M"),
        (tokens, "Half removed, then trained"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.xaxis.label.set_size(10)
        axes.tick_params(labelsize=9)
    gemma.set_ylabel("")
    tokens.set_ylabel("")
    for axes, place in ((smollm2, "upper left"), (tokens, (0.02, 0.2))):
        axes.legend(loc=place, fontsize=9)
    return add_title(
        figure,
        "Standard protocol, one seed, 95 % intervals over windows. trained: averaged masks, least squares and 98k "
        "tokens (Gemma: 49k).\nuntrained was measured at 50 % on SmolLM2. Weights are in bfloat16; in float32 for "
        "trained on SmolLM2, and in the last panel except for best.",
        size=8,
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
        few_colours = picture.convert("RGB").quantize(256)  # less than half of the bytes
    few_colours.save(path, optimize=True)
    return f"Drawn: {path}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.readme", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
