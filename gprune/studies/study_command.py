"""`gprune study`: run a list of configurations, on one or several machines."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from gprune.console import Parser, quiet
from gprune.errors import UserError
from gprune.storage.paths import expanded

ABOUT = """Run a list of configurations, store the results, and print tables.

After each configuration its numbers, masks and costs are written to <records>/<list>/<row>-seed<k>.json (masks of lists
in experiments/lists only with the key masks). A row with a record is not run again. A record of other settings or other
code than the row's is named and not used; --again runs its row again. Rows share calibration through the cache."""

EXAMPLES = """A list is a YAML file such as mine.yaml (docs/experiments.md has all keys):
  protocol: protocol          # settings of all rows, by file or name: which text is used, and how much
  common: {importance: taylor}
  rows:
    base: {gprune: false}
    ours: {}
    ours, 30 %: {sparsity.target: 0.3}
  compare: [[ours, base]]     # final models of two rows

Flags of `gprune prune` come after --, and override the settings of every row.

examples:
  gprune study mine.yaml                                    runs rows without a record, and prints tables
  gprune study mine.yaml --import my_metric.py              rows that use code of your own
  gprune study mine.yaml --table --output t.csv             only tables, also as a file: rows, seeds and means
  gprune study experiments/lists/headline.yaml --table      the project's results, in a clone
  gprune study LIST --seeds 0 1 2 --only paper best -- --corpora.num_samples=8
  gprune study LIST -- --logging.mode=online                each row a run of W&B, in the group LIST (default: offline)
  gprune study LIST --part 1/8                              one of eight machines' share (docs/experiments.md)"""
FORMATS = (".csv", ".json", ".md", ".tex", ".html")
OUTPUT = (
    "write the results too: .csv or .json with one line per row and seed, and one with the means over seeds (all "
    "numbers, intervals, settings and the record's file); .md, .tex or .html with the tables that are printed"
)
MESSAGE_ENDINGS = {"stopped": ". Finished rows are kept."}  # keyword arguments of `run_guarded`


def parser() -> Parser:
    """Return the parser of the command's arguments, without the flags after `--`."""
    result = Parser("gprune study", description=ABOUT, epilog=EXAMPLES)
    add = result.add_argument
    add("lists", nargs="+", metavar="LIST", help="YAML files, such as experiments/lists/parts.yaml")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="seeds of all rows (default: those of the list)")
    add("--only", nargs="+", metavar="ROW", help="run only these rows; print them (default: all)")
    add("--part", metavar="I/N", help="run every N-th row from the I-th on, as one of N machines")
    folder = "folder of records (default: runs/records; experiments/lists/records for lists in experiments/lists)"
    add("--records", metavar="FOLDER", help=folder)
    add("--again", action="store_true", help="run rows whose record is of other settings or other code too")
    add("--table", action="store_true", help="print tables from existing records; run nothing")
    add("--output", metavar="FILE", help=OUTPUT)
    add("--files", action="store_true", help="print the record's file of each row and seed; run nothing")
    add("--commands", action="store_true", help="print the shell command of each row and seed; run nothing")
    add("--costs", action="store_true", help="print seconds, tokens and memory of each step too")
    add("--figures", metavar="FOLDER", help="write figures of ratios and of sparsity per block to this folder")
    return result


def parse_arguments(args: Sequence[str]) -> Namespace:
    """Parse the arguments of the command. Those after `--` become `flags`.

    They are split off here, because argparse would add them to LIST or reject them.
    """
    args = list(args)
    end = args.index("--") if "--" in args else len(args)
    return Namespace(**vars(parser().parse_args(args[:end])), flags=args[end + 1 :])


def check_output(options: Namespace) -> None:
    """Raise UserError if `--output` cannot be written, before anything is computed."""
    if options.output is None:
        return
    path = expanded(options.output)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--output must end in one of {', '.join(FORMATS)}; got '{options.output}'.")
    if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise UserError(f"--output must be the path of a file in a folder; got '{options.output}'.")
    if len(options.lists) > 1:
        raise UserError(f"--output needs exactly one list; got {len(options.lists)} lists.")


def run(args: Sequence[str]) -> str:
    """Run the command. Tables are printed when they are ready, so the returned text is empty."""
    options = parse_arguments(args)
    check_output(options)
    from gprune.studies.listing import Listing

    listings = [  # reports invalid lists before the imports that take seconds; a list from a pipe can be read only once
        Listing.read(path, seeds=options.seeds, flags=options.flags, records=options.records) for path in options.lists
    ]
    quiet()
    from gprune.studies.runner import run_lists

    run_lists(listings, options)
    return ""
