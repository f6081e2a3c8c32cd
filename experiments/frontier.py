"""Is pruning worth it beside quantization? Loss, bytes and speed of pruned and dense models as GGUF files in llama.cpp.

    pip install llama-cpp-py-sync
    python -m experiments.frontier runs/A runs/B --output FILE          # runs of one dense model, with --export hf
    python -m experiments.frontier FILE --figures experiments/figures   # only the table and the figure

`gprune study experiments/lists/frontier.yaml --commands` prints the commands of runs; add `--export hf` to them.

Each model, the dense one first, is written in 16, 8 and 4 bits. llama.cpp measures the loss of the files on the run's
windows of unseen kinds of text (`experiments.kinds`), and is timed: a prompt of 512 tokens, and tokens generated after
it, one request. The files of a type are timed in turns. Loss is perplexity over that of the dense model in 16 bits.

A file is on the frontier of two numbers if no other file is better in one of them and at least as good in the other.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import AutoTokenizer

from experiments.after_pruning import GGUF_TYPES
from experiments.engines import EngineChoice, Forms, installed_versions, time_models
from experiments.kinds import UNSEEN
from gprune.console import Parser, quiet, run_guarded
from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, leading_token, make_windows
from gprune.errors import UserError
from gprune.evaluation.intervals import geometric_mean
from gprune.export import export
from gprune.models.gguf import window_nll
from gprune.models.loading import locate_model
from gprune.report.figures import add_title, line_style, save, style
from gprune.report.tables import Table
from gprune.runs.numbers import by_stage
from gprune.runs.results import FinishedRun, read_run
from gprune.storage.files import write_json

PROMPT = 512  # tokens
BITS = dict(zip(GGUF_TYPES, ("16 bits", "8 bits", "4 bits"), strict=True))
AXES = {"prefill": "prompt, tokens/s", "decode": "generated tokens/s", "bytes": "size of the file, MB"}
FileRow = dict[str, Any]  # a file: model, type, share, bytes, nll by kind, tokens/s of prefill and decode


def percent(share: float) -> str:
    """Return a share as text, such as 30 %."""
    return f"{share:.0%}".replace("%", " %")


def measure(runs: Sequence[FinishedRun], scratch: Path) -> dict[str, Any]:
    """Write, measure and time the dense model and the runs' models in each type."""
    dense = locate_model(runs[0].settings["model"]["name"])
    tokenizer = AutoTokenizer.from_pretrained(dense)
    windows = {}
    for corpus, r in by_stage(runs[0].records)["dense"].items():
        if corpus in UNSEEN:
            bos = leading_token(tokenizer, runs[0].settings["corpora"]["bos"])
            sample = Sample(len(r["window_nll"]), r["seq_len"], bos=bos)
            text = load_corpus(corpus, r["split"])
            windows[corpus] = make_windows(text, tokenizer, sample, corpus=corpus, split=r["split"]).tokens
    shares = [1 - run.summary["parameters_after"] / run.summary["parameters_before"] for run in runs]
    names = [f"{percent(run.settings['sparsity']['target'])} of the FFN" for run in runs]
    folders = [run.path / "model" for run in runs]
    models = [("dense", 0.0, dense), *zip(names, shares, folders, strict=True)]
    rows: list[FileRow] = []
    files: list[Path] = []
    for model, share, folder in models:
        for kind in BITS:
            files.append(export(folder, scratch / f"{len(files)}.gguf", type=kind))
            nll = {corpus: window_nll(files[-1], tokens) for corpus, tokens in windows.items()}
            rows.append({"model": model, "type": kind, "share": share, "bytes": files[-1].stat().st_size, "nll": nll})
    for kind in BITS:
        ((choice, version),) = installed_versions([EngineChoice("llama.cpp", kind, sys.executable)]).items()
        of_kind = {i: row for i, row in enumerate(rows) if row["type"] == kind}
        forms = [Forms({kind: files[i]}, kind) for i in of_kind]
        by_model = time_models(choice, version, forms, [1], PROMPT, scratch)
        for row, timings in zip(of_kind.values(), by_model, strict=True):
            row |= {timing["task"].rpartition(" ")[2]: timing["tokens_per_second"] for timing in timings}
    (length,) = {tokens.shape[1] for tokens in windows.values()}
    return {"predicted": length - 1, "note": timings[0]["note"], "files": rows}


def loss(row: FileRow, measured: dict[str, Any]) -> tuple[float, float]:
    """Return perplexity over that of the dense model in 16 bits: the mean of the unseen kinds, and the worst kind."""
    dense = measured["files"][0]["nll"]
    tokens = {kind: len(nll) * measured["predicted"] for kind, nll in dense.items()}
    by_kind = [math.exp((sum(row["nll"][kind]) - sum(dense[kind])) / tokens[kind]) for kind in dense]
    return geometric_mean(by_kind), max(by_kind)


def on_frontier(row: FileRow, measured: dict[str, Any], number: str) -> bool:
    """Return whether no other file is as good in both loss and a number, and better in one of them."""
    sign = 1 if number == "bytes" else -1  # a smaller value is better
    points = [(loss(other, measured)[0], sign * other[number]) for other in measured["files"]]
    own = loss(row, measured)[0], sign * row[number]
    return not any(point[0] <= own[0] and point[1] <= own[1] and point != own for point in points)


def table(measured: dict[str, Any]) -> Table:
    """Return the table of files; a star marks what is on a frontier with loss."""
    rows = []
    for row in measured["files"]:
        mean, worst = loss(row, measured)
        stars = {number: "*" * on_frontier(row, measured, number) for number in AXES}
        rows.append([
            row["model"], percent(row["share"]), BITS[row["type"]], f"{mean:.3f}", f"{worst:.2f}",
            f"{row['bytes'] / 1e6:.0f}{stars['bytes']}", *(f"{row[n]:.0f}{stars[n]}" for n in ("prefill", "decode")),
        ])  # fmt: skip
    columns = ["model", "of it removed", "type", "loss", "worst kind", "MB", "prompt, tokens/s", "generated tokens/s"]
    return Table("frontier", "", columns, rows, note=measured["note"])


@style()
def drawn(measured: dict[str, Any]) -> Figure:
    """Draw loss against each number: a line per type of files, and filled markers on the frontier."""
    figure = Figure(figsize=(9.6, 3.6))
    for axes, (number, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        for i, (kind, bits) in enumerate(BITS.items()):
            rows = [row for row in measured["files"] if row["type"] == kind]
            colour, _, marker = line_style(i)
            xs = [row[number] / (1e6 if number == "bytes" else 1) for row in rows]
            ys = [loss(row, measured)[0] for row in rows]
            axes.plot(xs, ys, color=colour, lw=1, alpha=0.5)
            for x, y, row in zip(xs, ys, rows, strict=True):
                fill = colour if on_frontier(row, measured, number) else "white"
                axes.plot([x], [y], color=colour, marker=marker, mfc=fill, ms=5, ls="none")
                if (number == "prefill" and kind == "q8_0") or (number != "prefill" and kind == "f16"):
                    name = percent(row["share"]) if row["share"] else "dense"
                    axes.annotate(name, (x, y), (5, 3), textcoords="offset points", fontsize=7, color=colour)
            axes.plot([], [], color=colour, marker=marker, ms=5, label=bits)
        axes.set(yscale="log", xlabel=label)
        axes.set_yticks([1, 1.2, 1.5, 2], ["1", "1.2", "1.5", "2"])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("perplexity on unseen text, times dense")
    figure.axes[-1].legend(loc="upper right")
    return add_title(figure, "Filled: no other file has both less loss and a better number. Shares are of the model.")


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.frontier", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or one JSON file with measurements")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the measurements")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figure to this folder")
    options = parser.parse_args(arguments)
    quiet()
    if options.runs[0].endswith(".json"):
        measured = json.loads(Path(options.runs[0]).read_text(encoding="utf-8"))
    else:
        runs = [read_run(name) for name in options.runs]
        if missing := [run.name for run in runs if not (run.path / "model").is_dir()]:
            raise UserError(f"RUN must be runs with an exported model (--export hf); got '{missing[0]}'.")
        with tempfile.TemporaryDirectory(prefix="frontier-") as scratch:
            measured = measure(runs, Path(scratch))
        if options.output:
            write_json(options.output, measured)
    text = f"{table(measured).for_stdout()}\n"
    if options.figures:
        text += f"Drawn: {', '.join(map(str, save(drawn(measured), options.figures, 'frontier')))}.\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.frontier", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
