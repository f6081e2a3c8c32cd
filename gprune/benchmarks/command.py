"""`gprune evaluate`: tasks, perplexity and speed of a run, a model folder or any model."""

from __future__ import annotations

from collections.abc import Sequence

from gprune.benchmarks.settings import SPEED, TEXTS, Benchmarks, benchmarks
from gprune.console import Parser, quiet
from gprune.storage.reading import expanded

ABOUT = f"""Tasks, perplexity and speed of a run, a model folder or any model by name.

Tasks are those of EleutherAI's lm_eval, with its own data or local files in $GPRUNE_DATA_DIR/tasks.
{" and ".join(TEXTS)} are perplexities in the conventions of the literature, {SPEED} is prefill, decoding and
the time to the first token on this machine, with --dense in turns. Records go into evaluation.json in the run, where
`gprune report` finds them, each as soon as it is there."""

EXAMPLES = """examples:
  gprune evaluate runs/NAME --tasks piqa,arc_easy,wikitext2 --dense
  gprune evaluate smollm2-135m --tasks piqa --limit 200
  gprune evaluate runs/NAME/model --tasks wikitext2 --seq_len 2048,128 --output numbers.json"""
ENDS = {
    "stopped": ". Tasks that were finished are kept.",
    "memory": "; lower --batch_size or --seq_len.",
}  # as for `guarded`


def parser() -> Parser:
    """The command line: the model, a flag for each field of `Benchmarks`, and where records go."""
    made = Parser("gprune evaluate", description=ABOUT, epilog=EXAMPLES)
    made.add_argument("model", metavar="MODEL", help="a run's folder, a model folder, an embedded name or a hub id")
    made.add_argument("--dense", action="store_true", help="of a run: its dense model too, and paired differences")
    made.add_argument("--output", metavar="FILE", help="JSON (default: evaluation.json in the run; else none)")
    for name, field in Benchmarks.__pydantic_fields__.items():
        usual, text = field.default, field.description
        if usual is False:
            made.add_argument(f"--{name}", action="store_true", help=text)
            continue
        several = {"metavar": "A,B", "type": listed} if isinstance(usual, tuple) else {}
        usual = ",".join(map(str, usual)) if several else usual
        text = text if usual is None else f"{text} (default: {usual})"
        made.add_argument(f"--{name}", default=usual, help=text, **several)
    return made


def listed(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def run(args: Sequence[str]) -> str:
    """Evaluate what the arguments ask for; returns a table and where its records are."""
    options = vars(parser().parse_args(args))
    model, dense, output = (options.pop(name) for name in ("model", "dense", "output"))
    asked = benchmarks(**options)
    quiet()
    from gprune.benchmarks.measurement import evaluate

    records, path = evaluate(model, asked, dense=dense, output=None if output is None else expanded(output))
    from gprune.report.benchmark_table import evaluation_table

    table = evaluation_table(records)
    where = f"\nRecords are in {path}.\n" if path else ""
    return f"\n{table.shown()}\n" + where
