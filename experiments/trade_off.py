"""Prune or quantize? Perplexity of the rows of a list and of the quantized dense model, against speed and size.

    pip install llama-cpp-py-sync        # without it, only the sizes of GGUF files are known
    python -m experiments.trade_off experiments/lists/trade_off.yaml FOLDER
    python -m experiments.engines runs/A runs/B --dense --batch 1  # then, for runs of your own:
    python -m experiments.trade_off runs/A runs/B FOLDER

Prints a table, and writes trade-off.png and .svg to FOLDER. Speed is the speedup of a prompt of 128 tokens and 32
generated tokens: of rows relative to the dense model, measured alternately in transformers, and of GGUF files relative
to f16 in llama.cpp.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import AutoTokenizer

from experiments.after_pruning import GGUF_TYPES
from experiments.engines import NEW_TOKENS
from experiments.summary import Lines, draw_curves, runs_of, times_dense
from gprune.console import Parser, quiet, run_guarded
from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, leading_token, make_windows
from gprune.errors import UserError
from gprune.export import export
from gprune.models.gguf import QUANTISED, has_llama_cpp, window_nll
from gprune.models.loading import locate_model
from gprune.report.figures import FORMATS, add_title, save, style
from gprune.report.tables import Cell, Estimate, Table
from gprune.runs.numbers import by_stage, unseen_ratio
from gprune.runs.results import FinishedRun, read_run

PROMPT, GENERATE = 128, NEW_TOKENS
COLUMNS = ["", "unseen / dense", "times as fast", "MiB"]
NOTE = (
    "Pruned models: timed in transformers in the dtype of the list; MiB of their weights in 16 bits. "
    "GGUF files of the dense model: timed in llama.cpp, relative to f16; MiB of the file."
)
AXES = {2: "times as fast", 3: "size, MiB"}  # label of a column
LABELS = {  # of a prefix of rows' names
    "share": "share of the FFN removed", "speed": "target in speed", "distilled": "share removed, then distilled",
    "dense": "not pruned, quantized",
}  # fmt: skip


def pruned(run: FinishedRun) -> list[Cell]:
    """Cells of a row of the list or of a run, by `COLUMNS`."""
    timed = [r for r in run.evaluation if r.get("batch") == 1 and r.get("prompt") == PROMPT]
    # The records of the list were written by a former task of gprune evaluate, without the name of the engine.
    seconds = {(r["stage"] == "dense", r["task"].removeprefix("transformers ")): r["seconds"] for r in timed}
    if any((of, task) not in seconds for of in (True, False) for task in ("prefill", "decode")):
        needed = f"python -m experiments.engines RUN --dense --batch 1 --prompt {PROMPT}"
        raise UserError(f"The table needs timings of `{needed}`; got none of '{run.name}'.")
    dense, own = (seconds[of, "prefill"] + GENERATE * seconds[of, "decode"] for of in (True, False))
    return [run.name, times_dense(run), dense / own, run.summary["parameters_after"] * 2 / 2**20]


def quantised(run: FinishedRun, scratch: Path) -> list[list[Cell]]:
    """Cells of the dense model of a row as GGUF files, by `COLUMNS`."""
    folder, has_build = locate_model(run.settings["model"]["name"]), has_llama_cpp()
    types = [kind for kind in GGUF_TYPES if has_build or kind != QUANTISED]
    files = [export(folder, scratch / f"{kind}.gguf", type=kind, check=has_build) for kind in types]
    seconds = seconds_in_llama_cpp(files) if has_build else []
    faster = [seconds[0] / own for own in seconds] or [None] * len(files)
    ratios = [ratio_in_llama_cpp(run, file) if has_build else None for file in files]
    sizes = [file.stat().st_size / 2**20 for file in files]
    return [[f"dense, GGUF {kind}", *of] for kind, *of in zip(types, ratios, faster, sizes, strict=True)]


def ratio_in_llama_cpp(run: FinishedRun, file: Path) -> Estimate | None:
    """Unseen perplexity of a GGUF file relative to the row's dense model, on the same windows."""
    own, dense = {}, by_stage(run.records)["dense"]
    tokenizer = AutoTokenizer.from_pretrained(locate_model(run.settings["model"]["name"]))
    for corpus, r in dense.items():
        if r["seen"]:
            continue
        bos = leading_token(tokenizer, run.settings["corpora"]["bos"])
        sample = Sample(len(r["window_nll"]), r["seq_len"], bos=bos)
        w = make_windows(load_corpus(r["corpus"], r["split"]), tokenizer, sample, corpus=r["corpus"], split=r["split"])
        own[corpus] = r | {"content_hash": w.content_hash, "window_nll": window_nll(file, w.tokens)}
    return unseen_ratio(own, dense)


def seconds_in_llama_cpp(files: Sequence[Path]) -> list[float]:
    """Seconds of each file for the prompt and the generated tokens: the fastest of four rounds over all files."""
    from llama_cpp_py_sync import Llama

    length = PROMPT + GENERATE
    options = {"n_ctx": length, "n_batch": length, "n_threads": torch.get_num_threads()}
    exact = {"flash_attn_type": 0, "type_k": "f32", "type_v": "f32"}  # attention as in `gprune.models.gguf`
    models = [Llama(str(file), **options, **exact) for file in files]

    def seconds(model: object) -> float:
        start = time.perf_counter()
        model._clear_context_state()
        for at in (0, *range(PROMPT, PROMPT + GENERATE)):
            model._eval_tokens([1] * (1 if at else PROMPT), at)
        return time.perf_counter() - start

    return [min(own) for own in zip(*([seconds(model) for model in models] for _ in range(4)), strict=True)]


@style()
def drawn(rows: Sequence[Sequence[Cell]]) -> Figure:
    """Draw unseen perplexity relative to dense against speed and against size. Lines are prefixes of rows' names."""
    figure, shown = Figure(figsize=(9.6, 4.4)), [row for row in rows if None not in row]
    for axes, column in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        lines: Lines = {(LABELS.get(row[0].partition(", ")[0], row[0]), ""): [] for row in shown}
        for row in sorted(shown, key=lambda row: row[column]):
            prefix, _, name = row[0].partition(", ")
            lines[LABELS.get(prefix, row[0]), ""].append((row[column], row[1]))
            if (prefix, column) != ("speed", 3):  # rows with a speed target have no size
                if prefix == "dense":  # below or above the line at 1
                    at = (5, -12) if row[1].value <= 1 else (5, 5)
                elif prefix == "distilled":
                    at = (5, -12)
                else:
                    at = (-5, 4) if column == 2 else (5, 4)
                side = {"ha": "right" if at[0] < 0 else "left", "textcoords": "offset points"}
                axes.annotate(name.removeprefix("GGUF "), (row[column], row[1].value), at, fontsize=8, **side)
        draw_curves(axes, lines, over=AXES[column], ticks="{x:g}", reference="dense")
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5]))
        axes.set_ylabel("perplexity on unseen text, times dense")
        axes.label_outer()
    axes.legend(loc="upper right")
    return add_title(figure, NOTE)


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.trade_off", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a YAML list with records, or folders of runs")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for the figure")
    options = parser.parse_args(arguments)
    quiet()
    runs: list[FinishedRun] = []
    for name in options.runs:
        runs += runs_of(str(Path(name).resolve())) if name.endswith(".yaml") else [read_run(name)]
    if not runs:
        raise UserError(f"List '{options.runs[0]}' needs records of its rows. Run `gprune study {options.runs[0]}`.")
    with tempfile.TemporaryDirectory(prefix="trade-off-") as scratch:
        rows = [*map(pruned, runs), *quantised(runs[0], Path(scratch))]
    table = Table("trade_off", "", COLUMNS, rows, {"unseen / dense": 3}, NOTE)
    files = save(drawn(rows), options.folder, "trade-off", FORMATS)
    return f"{table.for_stdout()}\n\nDrawn: {', '.join(map(str, files))}.\n"


if __name__ == "__main__":
    sys.exit(run_guarded("experiments.trade_off", work))
