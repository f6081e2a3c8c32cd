"""The same after recovery fine-tuning (LoRA): what is left of the differences between pruned models?

    export GPRUNE_DATA_DIR=mirrors
    python -m experiments.finetune runs/A runs/B --dense --tokens 100000 --corpora wikitext2 c4 code_github
    python -m experiments.finetune runs/A runs/B --rank 8 --learning-rate 1e-3 --dtype bfloat16 --reference A
    python -m experiments.finetune --table                        # from the records that are kept

Each RUN is a finished run that exported its model (`--export hf`). Every row learns from the same windows in the same
order: train text, drawn with a seed of its own, so that calibration has drawn another sample; how much of it
calibration has read all the same is recorded. One pass with AdamW, equal settings and seeds, plain next-token
cross-entropy. The adapters sit on every linear layer of the decoder layers that the family's record names (experts,
stacked tensors and no layers, stay as they are), are float32, and stay apart from the weights: nothing is merged.

Evaluated before and after on the windows of the runs themselves. A row is refused where that text, or the perplexity
before, is not what its run recorded, and so are rows that were evaluated on different text.

What LoRA reads is *seen* text. A corpus counts as seen, in all rows, if any row's run used it, if fine-tuning reads it,
or if it shares more than 1 % of its 13-word n-grams with what fine-tuning reads; the table is about the others.

One JSON record per row in `experiments/records/finetune/`; a row whose settings stand there is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import lora
from experiments.lora import DENSE, DTYPES, Row, Settings
from gprune.console import Parser, guarded, quiet
from gprune.corpora.load import check_corpus
from gprune.errors import UserError
from gprune.evaluation.intervals import bootstrap_perplexity, paired_bootstrap_ratio
from gprune.report.grouping import read_runs, run_names
from gprune.report.table import Estimate, Table
from gprune.storage.files import key_of, read_json


def rows_of(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, refused before any weight is read.

    Raises:
        UserError: for no such run, one that is not finished or exported no model, and runs that cannot be compared.
    """
    runs = read_runs(options.runs)
    for finished in runs:
        if not (finished.path / "model" / "config.json").is_file():
            raise UserError(
                f"'{finished.path}' exported no model; run its command again with --export hf, and then this."
            )
        if finished.name == DENSE:
            raise UserError(f"'{finished.path}' is named as the dense model's row is; rename the folder.")
    dtypes = {finished.settings["model"]["dtype"] for finished in runs}
    if options.dtype is None and len(dtypes) > 1:
        raise UserError(f"--dtype: expected one for all rows, since the runs have {' and '.join(sorted(dtypes))}.")
    for corpus in options.corpora:
        check_corpus(corpus)
    alpha = float(2 * options.rank if options.alpha is None else options.alpha)
    settings = Settings(
        corpora=options.corpora, tokens=options.tokens, seq_len=options.seq_len, batch_size=options.batch_size,
        rank=options.rank, alpha=alpha, learning_rate=options.learning_rate,
        dtype=options.dtype or dtypes.pop(), seed=options.seed,
    )  # fmt: skip
    rows = [Row(lora.row_of(finished.name), finished, settings) for finished in runs]
    rows = [*([Row(DENSE, runs[0], settings)] if options.dense else []), *rows]
    for row in rows[1:]:
        if differ := [
            c for c, text in row.identity["evaluated"].items() if rows[0].identity["evaluated"].get(c) != text
        ]:
            raise UserError(f"Rows '{rows[0].name}' and '{row.name}' were evaluated on different text of {differ[0]}.")
        if missing := rows[0].measured.keys() - row.measured.keys():
            raise UserError(f"Row '{row.name}' was not evaluated on {min(missing)}, as row '{rows[0].name}' was.")
    seen = {c for row in rows for c, r in row.measured.items() if r["seen"]} | set(settings.corpora)
    if not rows[0].measured.keys() - seen:
        raise UserError(f"Every evaluated corpus ({', '.join(rows[0].measured)}) is seen by one row or another.")
    return rows


def token_hours(pending: Sequence[Row], *, accelerator: str) -> str:
    """What is to be computed, and how long it takes at the speed of this machine right now."""
    settings = pending[0].settings
    backward = settings.windows * settings.seq_len * len(settings.corpora) * len(pending)
    forward = sum(2 * len(r["window_nll"]) * r["seq_len"] for row in pending for r in row.measured.values())
    forward_speed, backward_speed = lora.speeds(pending[0], accelerator=accelerator)
    hours = (forward / forward_speed + backward / backward_speed) / 3600
    return (
        f"{len(pending)} rows: {forward:,} tokens forward ({forward_speed:.0f}/s here) and {backward:,} forward and "
        f"backward ({backward_speed:.0f}/s): {hours:.2f} hours"
    )


def table_of(kept: Sequence[dict[str, Any]], reference: str | None) -> str:
    """Markdown: unseen geometric means before and after, and ratios to the reference row; then the protocol.

    Raises:
        UserError: for rows that read different text, no such reference, and no text unseen by all rows.
    """
    names = [row["name"] for row in kept]
    plain = [row for row in kept if row["name"] == reference or (reference is None and row["name"] != DENSE)]
    if reference is None or plain:
        base = (plain or kept)[0]
    else:
        raise UserError(f"--reference: expected a row ({', '.join(names)}), got '{reference}'.")
    for row in kept:
        if row["read"] != base["read"] or row["tokens"] != base["tokens"]:
            raise UserError(
                f"Rows '{base['name']}' and '{row['name']}' were fine-tuned on different text; remove the records "
                f"of one in {lora.RECORDS} and run it again."
            )
        if row["identity"]["evaluated"] != base["identity"]["evaluated"]:
            raise UserError(f"Rows '{base['name']}' and '{row['name']}' were evaluated on different text.")
    seen = {r["corpus"] for row in kept for r in row["records"] if r["seen"]}
    unseen = [r["corpus"] for r in base["records"] if r["corpus"] not in seen]
    if not unseen:
        raise UserError(f"Every evaluated corpus ({', '.join(sorted(seen))}) is seen by one row or another.")
    predicted = base["records"][0]["seq_len"] - 1

    def nll(row: dict[str, Any], when: str) -> dict[str, list[float]]:
        return {r["corpus"]: r[f"window_nll_{when}"] for r in row["records"] if r["corpus"] in unseen}

    def to_base(row: dict[str, Any], when: str) -> Estimate | None:
        return None if row is base else Estimate(*paired_bootstrap_ratio(nll(row, when), nll(base, when), predicted))

    rows = []
    for row in kept:
        means = [Estimate(*bootstrap_perplexity(nll(row, when), predicted)) for when in ("before", "after")]
        gained = Estimate(*paired_bootstrap_ratio(nll(row, "after"), nll(row, "before"), predicted))
        rows.append([row["name"], *means, gained, to_base(row, "before"), to_base(row, "after")])
    to = f"/ {base['name']}"
    columns = ["unseen perplexity of", "before", "after", "after / before", f"{to}, before", f"{to}, after"]
    made = Table("finetune", "Before and after LoRA", columns, rows, dict.fromkeys(columns[3:], 3))
    return f"{made.to_markdown()}\n\n{note_of(kept, base, unseen, seen)}"


def note_of(kept: Sequence[dict[str, Any]], base: dict[str, Any], unseen: Sequence[str], seen: set[str]) -> str:
    """What the table's numbers are, in a paragraph."""
    s, first = base["identity"]["finetuning"], base["records"][0]
    sizes = ", ".join(f"{row['trainable']:,} beside {row['parameters']:,} ({row['name']})" for row in kept)
    overlap = max(row["calibration_overlap"] for row in kept)
    return (
        f"{base['model']}. LoRA of rank {s['rank']} (alpha {s['alpha']:g}) on {base['tokens']:,} tokens of "
        f"{', '.join(s['corpora'])} (windows of {s['seq_len']}), one pass, AdamW, learning rate "
        f"{s['learning_rate']:g}, batches of {s['batch_size']}, seed {s['seed']}, {s['dtype']}; learned parameters: "
        f"{sizes}. At most {overlap:.1%} of this text's 13-word n-grams are in what a run had calibrated on. Geometric "
        f"means over {', '.join(unseen)} ({len(first['window_nll_before'])} windows of {first['seq_len']} tokens each, "
        f"{first['split']} text, no BOS), unseen by every row's run and by LoRA; seen: "
        f"{', '.join(sorted(seen)) or 'none'}. In brackets 95 % intervals: bootstrap over windows, paired for ratios."
    )


def tables_of_records(options: argparse.Namespace) -> str:
    """A table for each way of fine-tuning that there are records of, of the named rows or of all.

    Raises:
        UserError: where there are no such records, or two for one row of a table.
    """
    wanted = {lora.row_of(name) for name in run_names(options.runs)} | ({DENSE} if options.dense else set())
    by_settings: dict[str, dict[Path, dict[str, Any]]] = {}
    for path in sorted(lora.RECORDS.glob("*.json"), key=lambda p: (not p.name.startswith(DENSE), p.name)):
        kept = read_json(path)
        if kept is not None and (not options.runs or kept["name"] in wanted):
            key = key_of(finetuning=kept["identity"]["finetuning"], evaluated=kept["identity"]["evaluated"])
            by_settings.setdefault(key, {})[path] = kept
    if not by_settings:
        raise UserError(f"--table: there are no records of these rows in {lora.RECORDS}; run them first.")
    all_names = sorted({row["name"] for files in by_settings.values() for row in files.values()})
    if options.reference not in (None, *all_names):
        raise UserError(f"--reference: expected a row ({', '.join(all_names)}), got '{options.reference}'.")
    tables = []
    for files in by_settings.values():
        found = list(files.values())
        names = Counter(row["name"] for row in found)
        if twice := [str(path) for path, row in files.items() if names[row["name"]] > 1]:
            raise UserError(
                f"--table: expected one record per row, got {', '.join(twice)}; remove what is out of date."
            )
        tables.append(table_of(found, options.reference if options.reference in names else None))
    return "\n\n".join(tables) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m experiments.finetune"
    )
    made.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs that exported a model")
    made.add_argument("--dense", action="store_true", help="the dense model of the first run as a row of its own")
    made.add_argument("--reference", metavar="ROW", help="row that others are divided by: a folder's name, or dense")
    made.add_argument("--tokens", type=int, default=100_000, help="for each row, all corpora together")
    made.add_argument(
        "--corpora", nargs="+", default=["wikitext2", "c4", "code_github"], help="whose train text is read"
    )
    made.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    made.add_argument("--batch-size", type=int, default=4, help="windows per step")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=float, help="default: twice the rank")
    made.add_argument("--learning-rate", type=float, default=1e-3, help="the highest")
    made.add_argument("--dtype", choices=DTYPES, help="of the frozen weights (default: as in the runs)")
    made.add_argument("--seed", type=int, default=0, help="of the text, its order and the adapters")
    made.add_argument("--accelerator", default="auto", help="cpu, gpu, or auto")
    made.add_argument("--table", action="store_true", help="print from the records that are kept; run nothing")
    return made


def work(arguments: Sequence[str] | None = None) -> str:
    """Run what is missing; returns the table."""
    options = parser().parse_args(arguments)
    quiet()
    if options.table:
        return tables_of_records(options)
    if not options.runs:
        raise UserError("expected one run folder or more, such as runs/NAME; see --help.")
    rows = rows_of(options)
    names = [row.name for row in rows]
    if options.reference not in (None, *names):
        raise UserError(f"--reference: expected a row ({', '.join(names)}), got '{options.reference}'.")
    pending = [row for row in rows if row.found() is None]
    if pending:
        sys.stdout.write(token_hours(pending, accelerator=options.accelerator) + "\n")
    for row in pending:
        kept = lora.run(row, accelerator=options.accelerator)
        sys.stdout.write(f"{row.name}: {kept['seconds']:.0f} s, kept\n")
        sys.stdout.flush()
    return "\n" + table_of([row.found() for row in rows], options.reference) + "\n"


def main() -> int:
    """Exit code 2 and one line for what a user can mend."""
    return guarded("experiments.finetune", work, stopped=". What was finished is kept.")


if __name__ == "__main__":
    sys.exit(main())
