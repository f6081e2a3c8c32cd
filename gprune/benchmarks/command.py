"""`gprune evaluate`: zero-shot accuracy and WikiText-2 perplexity of a run, a model folder or any model by name."""

from __future__ import annotations

from collections.abc import Sequence

from gprune.benchmarks.settings import WIKITEXT, Benchmarks
from gprune.console import Parser, guarded, quiet
from gprune.errors import UserError
from gprune.storage.reading import expanded

ABOUT = f"""Zero-shot accuracy and WikiText-2 perplexity of a run, a model folder or any model by name.

Tasks are multiple-choice tasks of EleutherAI's lm_eval, or of local files in $GPRUNE_DATA_DIR/tasks; {WIKITEXT} is the
perplexity in the convention of the literature. Records go into evaluation.json in the run, where `gprune report` finds
them, each as soon as it is there."""

EXAMPLES = """examples:
  gprune evaluate runs/NAME --tasks piqa,arc_easy,wikitext2 --dense
  gprune evaluate smollm2-135m --tasks piqa --limit 200
  gprune evaluate runs/NAME/model --tasks wikitext2 --seq_len 2048,128 --output numbers.json"""


def parser() -> Parser:
    """The command line."""
    usual = Benchmarks()
    made = Parser("gprune evaluate", description=ABOUT, epilog=EXAMPLES)
    made.add_argument("model", metavar="MODEL", help="a run's folder, a model folder, an embedded name or a hub id")
    made.add_argument("--tasks", default=",".join(usual.tasks), metavar="A,B", help="names (default: %(default)s)")
    made.add_argument("--limit", type=int, metavar="N", help="first questions or windows of each task (default: all)")
    made.add_argument("--dense", action="store_true", help="of a run: its dense model too, and paired differences")
    made.add_argument(
        "--seq_len", default=",".join(map(str, usual.seq_len)), metavar="N,M",
        help=f"tokens per window of {WIKITEXT}, a number for each (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--bos", default=usual.bos, metavar="WHEN",
        help=f"opens each window of {WIKITEXT}: auto, always or never (default: %(default)s, as the tokenizer does)",
    )  # fmt: skip
    made.add_argument(
        "--batch_size", type=int, default=usual.batch_size, metavar="N",
        help="choices per forward pass (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--source", default=usual.source, metavar="WHERE",
        help="of tasks: hub, local, or auto: the hub if it answers (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--dtype", metavar="DTYPE",
        help="float32, bfloat16 or float16 (default: the run's own; float32 for other models)",
    )  # fmt: skip
    made.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that comes with the model, which you have read",
    )
    made.add_argument("--output", metavar="FILE", help="JSON (default: evaluation.json in the run; else none)")
    return made


def main(args: Sequence[str]) -> int:
    """Returns the exit code, as `guarded`."""
    return guarded("gprune evaluate", lambda: run(args), stopped=". Tasks that were finished are kept.",
                   memory="; lower --batch_size or --seq_len.")  # fmt: skip


def run(args: Sequence[str]) -> str:
    """Evaluate what the arguments ask for; returns a table and where its records are."""
    options = vars(parser().parse_args(args))
    model, dense, output = (options.pop(name) for name in ("model", "dense", "output"))
    options["tasks"], lengths = (
        tuple(part.strip() for part in options[name].split(",") if part.strip()) for name in ("tasks", "seq_len")
    )
    try:
        options["seq_len"] = tuple(map(int, lengths))
    except ValueError:
        raise UserError(f"--seq_len: expected whole numbers, such as 2048,128, got '{','.join(lengths)}'.") from None
    asked = Benchmarks(**options)
    quiet()
    from gprune.benchmarks.measurement import evaluate

    records, path = evaluate(model, asked, dense=dense, output=None if output is None else expanded(output))
    from gprune.report.benchmark_table import evaluation_table

    table = evaluation_table(records)
    where = f"\nRecords are in {path}.\n" if path else ""
    return f"\n{table.shown()}\n" + where
