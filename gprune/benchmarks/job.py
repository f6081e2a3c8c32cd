"""Zero-shot accuracy and WikiText-2 perplexity of a run, a model folder or any model by name.

python -m gprune.evaluation runs/NAME --tasks piqa,arc_easy,wikitext2 --dense
python -m gprune.evaluation smollm2-135m --tasks piqa --limit 200

Records go into `evaluation.json` in the run, where `gprune report` finds them, each as soon as it is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gprune.console import Parser, run_verb
from gprune.errors import UserError

WIKITEXT = "wikitext2"


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "python -m gprune.evaluation", description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="a run's folder, a model folder, an embedded name or a hub id")
    made.add_argument(
        "--tasks", default="piqa,arc_easy", metavar="A,B",
        help=f"multiple-choice tasks of lm_eval's, or of local files in $GPRUNE_DATA_DIR/tasks; and {WIKITEXT} "
        "(default: %(default)s)",
    )  # fmt: skip
    made.add_argument("--limit", type=int, metavar="N", help="the first N questions or windows of each task")
    made.add_argument(
        "--dense", action="store_true", help="of a run: its dense model too, and paired differences to it"
    )
    made.add_argument(
        "--seq_len", type=int, default=2048, help=f"tokens per window of {WIKITEXT} (default: %(default)s)"
    )
    made.add_argument("--batch_size", type=int, default=8, help="choices per forward pass (default: %(default)s)")
    made.add_argument("--source", default="auto", help="of tasks: hub, local, or auto: the hub if it answers")
    made.add_argument("--dtype", help="float32, bfloat16, float16; default: the run's own, float32 for other models")
    made.add_argument("--output", metavar="FILE", help="JSON; default: evaluation.json in the run, else none")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code, as `run_verb`."""

    def work() -> str:
        records, output = run(parser().parse_args(args))
        from gprune.report.benchmark_table import evaluation_table

        table = evaluation_table(records)
        where = f"\nRecords are in {output}.\n" if output else ""
        return f"\n{table.to_markdown()}\n\n{table.note}\n" + where

    return run_verb(
        "gprune.evaluation",
        work,
        interrupted="Interrupted. Tasks that were finished are kept.",
        memory="Out of memory; lower --batch_size or --seq_len.",
    )


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], Path | None]:
    """Evaluate what the options ask for: the records, and the file they went into beside those that are there."""
    _check(options)
    from gprune.benchmarks.subjects import subjects_of
    from gprune.console import quiet
    from gprune.runs.results import read_evaluation

    tasks = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if any(name != WIKITEXT for name in tasks):
        from gprune.benchmarks.harness import require_lm_eval

        require_lm_eval()  # before a model is loaded
    quiet()
    subjects, output = subjects_of(options.model, dense=options.dense, dtype=options.dtype)
    output = Path(options.output).expanduser() if options.output else output
    if output is not None:
        read_evaluation(output)  # what is no such file is not written over
    name = Path(options.model).name
    records: list[dict[str, Any]] = []
    for subject in subjects:
        model, tokenizer = subject.load()
        for task in tasks:
            records += [r | subject.about | {"run": name} for r in evaluate(model, tokenizer, task, options)]
            if output is not None:
                keep(output, records)
    return records, output


def evaluate(model: Any, tokenizer: Any, task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one task; a group of tasks has several."""
    import logging

    from gprune.benchmarks.wikitext2 import wikitext2_perplexity
    from gprune.benchmarks.zero_shot import zero_shot

    logging.getLogger("gprune").info("Evaluating %s", task)
    if task == WIKITEXT:
        found = wikitext2_perplexity(model, tokenizer, seq_len=options.seq_len, limit=options.limit, progress=WIKITEXT)
        return [found]
    return zero_shot(
        model, tokenizer, [task], limit=options.limit, batch_size=options.batch_size, source=options.source
    )


def keep(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records beside those that are there, in the place of former ones of the same model and protocol."""
    from gprune.runs.results import read_evaluation
    from gprune.storage.files import write_json

    def key(r: dict[str, Any]) -> tuple[Any, ...]:
        run = r.get("run", records[0]["run"])  # records of earlier versions, in the run's own file, do not name it
        return run, *(r.get(name) for name in ("model", "stage", "recovery", "task", "content_hash", "dtype"))

    new = {key(r) for r in records}
    write_json(path, {"records": [*(r for r in read_evaluation(path) if key(r) not in new), *records]})


def _check(options: argparse.Namespace) -> None:
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit: expected 1 or more, got {options.limit}.")
    if options.batch_size < 1:
        raise UserError(f"--batch_size: expected 1 or more, got {options.batch_size}.")
    if options.dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype: expected float32, bfloat16 or float16, got '{options.dtype}'.")
    if not options.tasks.strip(" ,"):
        raise UserError("--tasks: expected at least one task, such as piqa,arc_easy.")


if __name__ == "__main__":
    raise SystemExit(main())
