"""`gprune evaluate`: measure tasks and perplexity of a run, a model folder or any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gprune.benchmarks.settings import Benchmarks, parse_benchmarks
from gprune.console import Parser, quiet, write_stdout
from gprune.storage.paths import expanded

ABOUT = """Measure tasks and perplexity of runs, model folders or any models by name.

Tasks are those of EleutherAI's lm_eval, with data of the hub, or YAML tasks with local files (--include_path).
A task that cannot be measured does not end the others.
wikitext2 and c4 are perplexities in the conventions of the literature. Each record is written to evaluation.json of the
run immediately, for `gprune report`."""

EXAMPLES = """examples:
  gprune evaluate runs/NAME --tasks piqa,arc_easy,wikitext2 --dense
  gprune evaluate runs/NAME --tasks zeroshot7 --dense
  gprune evaluate smollm2-135m --tasks piqa --limit 200
  gprune evaluate runs/NAME --tasks wikitext2 --device_map auto --max_memory '{0: 20GiB, cpu: 60GiB}'
  gprune evaluate runs/NAME/model --tasks wikitext2 --seq_len 2048,128 --output numbers.json"""
MESSAGE_ENDINGS = {  # keyword arguments of `run_guarded`
    "stopped": ". Finished tasks are kept.",
    "memory": "; lower --batch_size or --seq_len.",
}


def parser() -> Parser:
    """Return the parser of the command: the model, the output file, and a flag for each field of `Benchmarks`."""
    result = Parser("gprune evaluate", description=ABOUT, epilog=EXAMPLES)
    model_help = "folder of a run or a model, embedded name, or hub id"
    result.add_argument("model", metavar="MODEL", nargs="+", help=model_help)
    dense_help = "measure the dense model of a run too, with paired differences"
    result.add_argument("--dense", action="store_true", help=dense_help)
    output_help = "JSON file for records (default: evaluation.json in the run; none for other models)"
    result.add_argument("--output", metavar="FILE", help=output_help)
    for name, field in Benchmarks.__pydantic_fields__.items():
        default, flag_help = field.default, field.description
        if default is False:
            result.add_argument(f"--{name}", action="store_true", help=flag_help)
            continue
        list_options: dict[str, Any] = {}
        if isinstance(default, tuple):
            list_options = {"metavar": "A,B", "type": split_commas}
            default = ",".join(map(str, default))
        if default is not None:
            flag_help = f"{flag_help} (default: {default})"
        result.add_argument(f"--{name}", default=default, help=flag_help, **list_options)
    return result


def split_commas(text: str | list[str]) -> list[str]:
    """Split text at commas, without blanks and empty parts. Parts, which the parser checks again, are unchanged."""
    if isinstance(text, list):
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def run(args: Sequence[str]) -> str:
    """Run the command, and return the table of results and the path of the records as text."""
    options = vars(parser().parse_args(args))
    models, dense, output = (options.pop(name) for name in ("model", "dense", "output"))
    benchmarks = parse_benchmarks(**options)
    quiet()
    from gprune.benchmarks.measurement import UnmeasuredTasksError, evaluate

    file = None if output is None else expanded(output)
    records: list[dict[str, Any]] = []
    paths: list[Path] = []
    unmeasured: UnmeasuredTasksError | None = None
    for model in models:
        try:
            measured, path = evaluate(model, benchmarks, dense=dense, output=file)
        except UnmeasuredTasksError as error:
            unmeasured, measured, path = error, error.records, error.path
        records += measured
        paths += [] if path is None else [path]
    text = results_as_text(records, paths)
    if unmeasured is None:
        return text
    if records and text:
        write_stdout(text)
    raise unmeasured


def results_as_text(records: Sequence[dict[str, Any]], paths: Sequence[Path]) -> str:
    """Format the tables of records, and the paths where they are stored."""
    from gprune.report.task_tables import evaluation_tables

    text = "".join(f"\n{table.for_stdout()}\n" for table in evaluation_tables(records))
    stored = "".join(f"Records: {path}\n" for path in dict.fromkeys(paths))
    return f"{text}\n{stored}" if stored else text
