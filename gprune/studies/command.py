"""`gprune study`: a list of configurations, run on one machine or spread over many."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from gprune.console import Parser, quiet
from gprune.errors import UserError
from gprune.storage.reading import expanded

ABOUT = """Run a list of configurations, keep what came out, print tables. What a list is: gprune/studies/listing.py.

After each configuration its numbers and costs are written to the folder of records, and its masks (for lists in
experiments/ only if the list says so). A configuration that has a record is not run again, whichever list
asks for it. Run folders share calibration through the cache."""

EXAMPLES = """Flags of train.py come after --, and last in every row.

examples:
  gprune study experiments/questions/parts.yaml             prints token-hours, runs, prints tables
  gprune study experiments/questions/parts.yaml --table     from the records that are kept
  gprune study mine.yaml --table --output t.csv             the same as a file: a line for each row and seed
  gprune study mine.yaml --records results                  a list of your own
  gprune study LIST --seeds 0 1 2 --only paper best -- --corpora.num_samples=8
  gprune study LIST -- --logging.mode=online                each row a run of W&B, in the group LIST (default: offline)
  gprune study LIST --part 1/8                              one of eight machines' share (docs/experiments.md)"""
FORMATS = (".csv", ".json", ".md", ".tex", ".html")
OUTPUT = (
    "write the results too: .csv or .json has a line for each row and seed with all numbers, intervals, settings and "
    "the record's file; .md, .tex or .html has the tables that are printed"
)
ENDS = {"stopped": ". Rows that were finished are kept."}  # as for `guarded`


def parser() -> Parser:
    """The command line, without the flags after `--`."""
    made = Parser("gprune study", description=ABOUT, epilog=EXAMPLES)
    made.add_argument("lists", nargs="+", metavar="LIST", help="YAML files, such as experiments/questions/parts.yaml")
    made.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="of all rows (default: the list's own)")
    made.add_argument("--only", nargs="+", metavar="ROW", help="run and print these rows only (default: all)")
    made.add_argument("--part", metavar="I/N", help="run every N-th row from the I-th on: one machine's share")
    made.add_argument(
        "--records", metavar="FOLDER", help="(default: runs/records; experiments/records for lists there)"
    )
    made.add_argument("--table", action="store_true", help="print what is there; run nothing")
    made.add_argument("--output", metavar="FILE", help=OUTPUT)
    made.add_argument(
        "--files", action="store_true", help="print which record belongs to each row and seed; run nothing"
    )
    made.add_argument("--costs", action="store_true", help="print seconds, tokens and memory of each step as well")
    made.add_argument("--figures", metavar="FOLDER", help="draw ratios and sparsity per block into this folder")
    return made


def arguments(given: Sequence[str]) -> Namespace:
    """Options, and as `flags` what comes after `--` (argparse gives that to LIST, or refuses it behind options)."""
    own, flags = (given, []) if "--" not in given else (given[: given.index("--")], given[given.index("--") + 1 :])
    return Namespace(**vars(parser().parse_args(own)), flags=list(flags))


def check_output(options: Namespace) -> None:
    """Raise UserError, before anything is computed, for an `--output` that cannot be written."""
    if options.output is None:
        return
    path = expanded(options.output)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--output must end in one of {', '.join(FORMATS)}; got '{options.output}'.")
    if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise UserError(f"--output must be a file in a folder; '{options.output}' is not.")
    if len(options.lists) > 1:
        raise UserError(f"--output takes the results of one list; got {len(options.lists)} lists.")


def run(args: Sequence[str]) -> str:
    """Do what the arguments ask for; tables are printed as they become ready, so nothing comes back."""
    options = arguments(args)
    check_output(options)
    from gprune.studies.listing import Listing

    for path in options.lists:  # what is wrong with a list needs none of what takes seconds to import
        Listing.read(path, seeds=options.seeds, flags=options.flags, records=options.records)
    quiet()
    from gprune.studies.runner import work

    work(options)
    return ""
