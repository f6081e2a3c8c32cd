"""A list of configurations, run on one machine or spread over many: resumes, keeps records, prints tables.

    export GPRUNE_DATA_DIR=mirrors
    python -m experiments.run experiments/questions/parts.yaml            # prints token-hours, runs, prints tables
    python -m experiments.run experiments/questions/parts.yaml --table    # from the records that are kept
    python -m experiments.run LIST --seeds 0 1 2 --only paper best -- --corpora.num_samples=8

A list is YAML: `protocol` (files under all rows), `common` settings, `rows` by name (settings of `train.py`, nested or
dotted, and `config`, files to start from), `reference` (the row whose stage `base` all others are divided by),
`compare` (pairs of stages), `spread` (groups of rows that are to lie close together), `seen` (corpora that count as
seen in every row), `seeds`, `tables` (of `gprune.report`, those to print), and `tasks` for `python -m
gprune.evaluation`. Files are named from the list's own folder.

After each configuration its numbers, masks and costs are written to `experiments/records/runs/`; whichever list asks, a
configuration whose settings stand there is not run again. Run folders share calibration through the cache.

On a cluster each line of `--commands` is a job of its own, in any order, on any node with the same checkout:

    python -m experiments.run LIST --commands | parallel -j 8                             # GNU parallel
    sbatch --array=1-8 --wrap 'python -m experiments.run LIST --part $SLURM_ARRAY_TASK_ID/8'
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import gprune
from gprune import cli, report
from gprune.architectures import blocks_of
from gprune.artifacts import key_of, read_json, write_json
from gprune.errors import UserError
from gprune.gates import gated
from gprune.loading import load_model
from gprune.losses import next_token_loss
from gprune.masks import Masks
from gprune.preparation import check
from gprune.report import FinishedRun, Report, row_name
from gprune.verbs import Parser, run_verb

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "runs"
# Numbers do not depend on these: a row is the same row with and without them.
OWN = {"export": "none", "logging.mode": "disabled", "run.dir": "runs/experiments"}
KEYS = {"about", "protocol", "common", "rows", "reference", "compare", "spread", "seeds", "tasks", "seen", "tables"}
TABLES = ("summary", "perplexity", "evaluation")
ALL_TABLES = {*TABLES, "records", "sparsity", "stability"}


@dataclass(frozen=True)
class Row:
    """One configuration with one seed."""

    name: str
    seed: int
    flags: tuple[str, ...]
    tasks: dict[str, Any]

    @cached_property
    def config(self) -> gprune.RunConfig:
        """Raises UserError, with the row's name, for what train.py would refuse."""
        try:
            return cli.parse(list(self.flags))
        except (UserError, argparse.ArgumentError) as error:
            raise UserError(f"Row '{self.name}': {error}") from error

    @cached_property
    def path(self) -> Path:
        """Where its record is, under whatever name another list gave the row; or where it will be.

        Told apart by the settings that are not the defaults, so that a setting that is new today, at its default,
        leaves yesterday's records what they were.
        """
        default, settings = (flat(plain(cfg.settings())) for cfg in (gprune.RunConfig(), self.config))
        key = key_of(settings={name: value for name, value in settings.items() if value != default.get(name)})[:10]
        slug = "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())
        there = sorted(RECORDS.glob(f"*-{key}*.json"))
        # A record under this key may be of other settings, those of a default that has changed since: it stays.
        again = f"-{len(there)}" if there else ""
        fresh = RECORDS / f"{slug}-seed{self.seed}-{key}{again}.json"
        return next((path for path in there if self.is_of(read_json(path))), fresh)

    def is_of(self, kept: dict[str, Any] | None) -> bool:
        """Whether a record is this row's.

        A setting that did not exist then had its default's effect; one whose default has changed since had the old
        one's.
        """
        if kept is None:
            return False
        default = gprune.RunConfig().settings()
        then, now = (flat(plain(s)) for s in (kept["settings"], self.config.settings()))
        return flat(plain(default)) | then == now


@dataclass(frozen=True)
class Listing:
    """A list file."""

    path: Path
    about: str
    rows: list[Row]
    reference: str | None
    compare: list[tuple[str, str]]
    spread: dict[str, list[str]]
    tables: tuple[str, ...]  # of the report's, those that are printed
    seen: list[str] | None  # corpora that count as seen in every row; None: each row's own

    @classmethod
    def read(cls, path: Path | str, *, seeds: Sequence[int] | None = None, flags: Sequence[str] = ()) -> Listing:
        """Parse a list; `flags` come last in every row.

        Raises:
            UserError: for a file that is none, an unknown key, a row that is no mapping or that there is not.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"List '{path}': expected a YAML file, but {type(error).__name__} came up.") from error
        if not isinstance(content, dict) or not isinstance(content.get("rows"), dict) or set(content) - KEYS:
            unknown = sorted(set(content) - KEYS) if isinstance(content, dict) else []
            raise UserError(
                f"List '{path}': expected a mapping with 'rows' and of {', '.join(sorted(KEYS))}"
                + (f"; got {', '.join(map(str, unknown))}." if unknown else ".")
            )
        _check_rows(path, content)
        protocol = _configs(path, content.get("protocol"))
        common = [*flags_of(OWN), *flags_of(content.get("common") or {})]
        rows = []
        for seed in content.get("seeds", [0]) if seeds is None else seeds:
            for name, settings in content["rows"].items():
                settings = dict(settings or {})
                files = [*protocol, *_configs(path, settings.pop("config", None))]
                given = (*files, *common, *flags_of(settings), f"--run.seed={seed}", *flags)
                rows.append(Row(str(name), seed, given, content.get("tasks") or {}))
        compare = [(str(a), str(b)) for a, b in content.get("compare", [])]
        return cls(
            path, content.get("about", path.stem), rows, content.get("reference"), compare,
            content.get("spread", {}), tuple(content.get("tables", TABLES)), content.get("seen"),
        )  # fmt: skip


def _check_rows(path: Path, content: dict[str, Any]) -> None:
    lists = [content.get("compare", []), content.get("seeds", []), content.get("tables", []), content.get("seen") or []]
    if not all(isinstance(part, list) for part in lists) or not all(len(pair) == 2 for pair in lists[0]):
        raise UserError(f"List '{path}': expected lists in compare (of pairs), seeds, tables and seen; see --help.")
    if unknown := sorted(set(lists[2]) - ALL_TABLES):
        raise UserError(f"List '{path}', tables: expected of {', '.join(sorted(ALL_TABLES))}, got '{unknown[0]}'.")
    if content.get("tasks") and not content["tasks"].get("names"):
        raise UserError(f"List '{path}', tasks: expected names, such as [piqa, arc_easy], got none.")
    names = {str(name) for name in content["rows"]}
    for name, settings in content["rows"].items():
        if not isinstance(settings, dict | None):
            raise UserError(f"List '{path}', row '{name}': expected settings by name, got {settings!r}.")
    for key, wanted in (
        ("reference", [content["reference"]] if "reference" in content else []),
        ("compare", [stage.partition(": ")[0] for pair in content.get("compare", []) for stage in pair]),
        ("spread", [name for group in content.get("spread", {}).values() for name in group]),
    ):
        if unknown := [name for name in wanted if name not in names]:
            raise UserError(f"List '{path}', {key}: expected rows ({', '.join(names)}), got '{unknown[0]}'.")


def _configs(path: Path, names: str | list[str] | None) -> list[str]:
    names = [names] if isinstance(names, str) else names or []
    return [flag for name in names for flag in ("--config", str(path.parent / name))]


def flags_of(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested or dotted settings as flags of train.py."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, dict):
            flags += flags_of(value, f"{prefix}{name}.")
        else:
            flags.append(f"--{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def found(row: Row) -> dict[str, Any] | None:
    """The record of an earlier run with the same settings, with the tasks this list asks for."""
    kept = read_json(row.path)
    return kept if row.is_of(kept) and _tasks_of(row) in ({}, kept.get("tasks")) else None


def run(row: Row) -> dict[str, Any]:
    """Run one configuration, and its tasks, and keep what came out."""
    cfg, tasks = row.config, _tasks_of(row)
    if tasks and cfg.recovery != "none":  # masks do not hold what recovery changed
        cfg = replace(cfg, export="hf")
    result = gprune.prune(cfg)
    manifest = read_json(result.path / "manifest.json")
    kept = {
        "name": row.name,
        "flags": [f for f in row.flags if not f.startswith(("--run.", "--logging.", "--export", "--corpora.collect"))],
        "settings": plain(cfg.settings()),
        "inputs": manifest["settings"]["inputs"],
        "environment": manifest["environment"],
        "steps": manifest["steps"],
        "summary": {k: v for k, v in result.summary.items() if k not in ("geometric_means", "unseen_over_base")},
        "learning": manifest.get("learning"),
        "masks": packed(result.masks),
        "records": [r | {"window_nll": [round(v, 4) for v in r["window_nll"]]} for r in result.records],
    }
    if tasks:
        kept |= {"tasks": tasks, "evaluation": evaluated(result.path, cfg, tasks, kept["inputs"]["model"])}
    write_json(row.path, kept)
    return kept


def _tasks_of(row: Row) -> dict[str, Any]:
    """The tasks of the list, unless it asks for them with other seeds only."""
    wanted = row.seed in row.tasks.get("seeds", [row.seed])
    return {name: value for name, value in row.tasks.items() if name != "seeds"} if wanted else {}


def evaluated(folder: Path, cfg: gprune.RunConfig, tasks: dict[str, Any], dense_model: str) -> list[dict[str, Any]]:
    """Records of `python -m gprune.evaluation` on a finished run, the dense model's (by its fingerprint) first."""
    from gprune.evaluation import __main__ as evaluation

    options = {
        "--tasks": ",".join(tasks["names"]),
        **{f"--{k}": str(tasks[k]) for k in ("limit", "seq_len", "dtype") if k in tasks},
    }
    shared = RECORDS.parent / "dense" / f"{key_of(model=[dense_model, cfg.model.dtype], tasks=tasks)}.json"
    dense = (read_json(shared) or {}).get("records")
    arguments = [str(folder), *(part for pair in options.items() for part in pair), *(["--dense"] if not dense else [])]
    _, path = evaluation.run(evaluation.parser().parse_args(arguments))
    records = read_json(path)["records"]
    if dense:  # measured with an earlier row: the same model, text and settings
        return [*dense, *(r for r in records if r["stage"] != "dense")]
    write_json(shared, {"records": [r for r in records if r["stage"] == "dense"]})
    return records


def packed(masks: Masks) -> dict[str, dict[str, Any]]:
    """Keep masks as base64 of their bits: 8 kB for 46,080 neurons."""
    return {
        kind: {
            "sizes": [len(m) for m in found],
            "bits": base64.b64encode(np.packbits(torch.cat(found).numpy())).decode(),
        }
        for kind, found in (("ffn", masks.ffn), ("attention", masks.attention))
    }


def unpacked(kept: dict[str, dict[str, Any]]) -> Masks:
    """What `packed` was given."""
    parts = {}
    for kind, value in kept.items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(value["bits"]), dtype=np.uint8), count=sum(value["sizes"]))
        parts[kind] = list(torch.from_numpy(bits.astype(bool)).split(value["sizes"]))
    return Masks(**parts)


def as_run(row: Row, kept: dict[str, Any], seen: Sequence[str] | None) -> FinishedRun:
    """A record as reports read runs, unless it has seen what the list calls unseen."""
    records = kept["records"]
    if seen is not None and (extra := sorted({r["corpus"] for r in records if r["seen"]} - set(seen))):
        raise UserError(
            f"Row '{row.name}': expected text that the list calls unseen, got {extra[0]}, which the run used, or "
            f"which shares text with what it used; add it to `seen` ({', '.join(seen)})."
        )
    return FinishedRun(
        path=row.path,
        name=row.name,
        settings=kept["settings"] | {"inputs": kept["inputs"]},
        records=records,
        summary=kept["summary"],
        masks=unpacked(kept["masks"]),
        modules=None,
        evaluation=[r | {"run": row.name} for r in kept.get("evaluation", []) if _tasks_of(row)],
    )


def reported(listing: Listing, done: Sequence[tuple[Row, dict[str, Any]]]) -> Report:
    """The report of finished rows; rows that differ in seed alone are one."""
    runs = [as_run(row, kept, listing.seen) for row, kept in done]
    _check_text(done)
    by_seed = [r for r in runs if r.name == listing.reference] if listing.reference else None
    return report.of_runs(runs, base=by_seed[0] if by_seed else None, by_seed=by_seed, seen=listing.seen)


def _check_text(done: Sequence[tuple[Row, dict[str, Any]]]) -> None:
    """Rows that ask for the same text have had the same: mirrors and the interpreter's own text differ by machine."""
    known: dict[tuple[Any, ...], tuple[str, str]] = {}
    for row, kept in done:
        amount = [kept["settings"]["corpora"].get(n) for n in ("num_samples", "learn_samples", "seq_len")]
        amount += [kept["settings"]["evaluation"].get(n) for n in ("num_samples", "seq_len", "split")]
        for role, digest in kept["inputs"]["text"].items():
            name, before = known.setdefault((row.seed, role, *amount), (row.name, digest))
            if before != digest:
                raise UserError(
                    f"Rows '{name}' and '{row.name}' have read other text as {role}: expected one set of mirrors and "
                    f"one version of Python; remove the record {row.path.name} and run the row again."
                )


def text_of(listing: Listing, done: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """Markdown: means and ratios, perplexities, comparisons, tasks; then the protocol."""
    made = reported(listing, done)
    tables = [t for t in made.tables if t.name in listing.tables]
    parts = [f"**{listing.about}**", *(t.to_markdown() + f"\n\n{t.note}" for t in tables if t.rows)]
    by_name: dict[str, list[FinishedRun]] = {}
    for r in made.runs:
        by_name.setdefault(r.name, []).append(r)
    rows = [[f"{a} / {b}", ratio] for a, b in listing.compare if (ratio := compared(by_name, a, b)) is not None]
    if rows:
        columns = ["unseen perplexity of", "ratio"]
        parts.append(report.Table("compare", "Comparisons", columns, rows, {"ratio": 3}).to_markdown())
    if spread := spreads(listing, made.runs):
        parts.append(report.markdown(spread))
    return "\n\n".join([*parts, *made.protocols()])


def spreads(listing: Listing, runs: Sequence[FinishedRun]) -> list[list[str]]:
    """log(max / min) of the unseen geometric mean over the rows of each group, of their own base and their result."""
    rows = [["unseen, log(max / min) over", "base", "gprune", "gprune / base"]]
    for group, names in listing.spread.items():
        found = []
        for stage in ("base", "gprune"):
            means = []
            for name in names:  # each its geometric mean over seeds
                of = [
                    report.mean_perplexity(r, (stage, r.settings["recovery"]), seen=False)
                    for r in runs
                    if r.name == name and (stage, r.settings["recovery"]) in report.by_stage(r.records)
                ]
                means += [report.over_seeds([e.value for e in of]).value] if of and None not in of else []
            found.append(math.log(max(means) / min(means)) if len(means) == len(names) > 1 else 0.0)
        if min(found) > 0:  # else some are not there yet
            rows.append([f"{group}: {', '.join(names)}", *(f"{v:.3f}" for v in (*found, found[1] / found[0]))])
    return rows if len(rows) > 1 else []


def compared(runs: dict[str, list[FinishedRun]], a: str, b: str) -> report.Estimate | None:
    """Unseen geometric mean of one stage over another's, `row: stage` each: over windows, or over seeds if several."""
    (a_runs, a_stage), (b_runs, b_stage) = (_stage(runs, name) for name in (a, b))
    if not a_runs or not b_runs:
        return None
    by_seed = {r.seed: r for r in b_runs}
    ratios = [report.ratio_to(r, a_stage, by_seed[r.seed], b_stage) for r in a_runs if r.seed in by_seed]
    if not ratios or any(ratio is None for ratio in ratios):
        return None
    return ratios[0] if len(ratios) == 1 else report.over_seeds([ratio.value for ratio in ratios])


def _stage(runs: dict[str, list[FinishedRun]], name: str) -> tuple[list[FinishedRun], tuple[str, str]]:
    row, _, stage = name.partition(": ")
    members = runs.get(row, [])
    stages = {row_name(*key): key for r in members for key in report.by_stage(r.records)}
    if members and stage not in stages:
        raise UserError(f"compare: expected a stage of '{row}' ({', '.join(stages)}), got '{stage}'.")
    return members, stages.get(stage, ("", ""))


def costs_of(done: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """Markdown: seconds, tokens and peak memory of each step of each row; what the cache had already costs nothing."""
    rows = [["run", "step", "seconds", "tokens forward", "and backward", "peak MiB"]]
    for row, kept in done:
        for step, used in kept["steps"].items():
            tokens = (f"{used.get(kind, 0):,.0f}" for kind in ("forward_tokens", "forward_backward_tokens"))
            rows.append(
                [
                    f"{row.name}, seed {row.seed}",
                    step,
                    f"{used['seconds']:.1f}",
                    *tokens,
                    f"{used['peak_memory_mib']:,}",
                ]
            )
    return report.markdown(rows)


def token_hours(pending: Sequence[Any]) -> str:
    """What is still to be computed, at most, and how long it takes at the speed of this machine right now.

    Args:
        pending: rows, or whatever else has a `config`.
    """
    forward = backward = 0
    for row in pending:
        plan = check(row.config)
        forward, backward = forward + plan.forward_tokens, backward + plan.forward_backward_tokens
    cfg = pending[0].config
    m = cfg.model
    model, _ = load_model(m.name, dtype=getattr(torch, m.dtype), trust_remote_code=m.trust_remote_code)
    ids = torch.randint(model.config.vocab_size, (cfg.corpora.batch_size, cfg.corpora.seq_len))
    with torch.no_grad():
        next_token_loss(model, ids[:, :64])  # warm
        forward_speed = ids.numel() / seconds(lambda: next_token_loss(model, ids))
    gates = [torch.ones(b.experts * b.neurons, requires_grad=True) for b in blocks_of(model)]
    with gated(model, gates):
        backward_speed = ids.numel() / seconds(lambda: next_token_loss(model, ids).backward())
    hours = (forward / forward_speed + backward / backward_speed) / 3600
    return (
        f"{len(pending)} configurations: at most {forward:,} tokens forward ({forward_speed:.0f}/s here) and "
        f"{backward:,} forward and backward ({backward_speed:.0f}/s), shared passes counted for each: {hours:.1f} hours"
    )


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def parts_of(rows: Sequence[Row], part: str | None) -> list[Row]:
    """Every n-th row from the i-th on, for `part` i/n; of all rows, so that shares do not depend on what is done."""
    if part is None:
        return list(rows)
    try:
        index, count = map(int, part.split("/"))
        if not 1 <= index <= count:
            raise ValueError
    except ValueError as error:
        raise UserError(f"--part: expected I/N with 1 <= I <= N, such as 1/4, got '{part}'.") from error
    return list(rows[index - 1 :: count])


def commands(path: str, rows: Sequence[Row], flags: Sequence[str]) -> Iterator[str]:
    """One command line per row."""
    for row in rows:
        more = ["--", *flags] if flags else []
        command = ["python", "-m", "experiments.run", path, "--only", row.name, "--seeds", str(row.seed), *more]
        yield shlex.join(command)


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "python -m experiments.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Flags of train.py come after --, and last in every row.",
    )  # fmt: skip
    made.add_argument("lists", nargs="+", metavar="LIST", help="YAML files, such as experiments/questions/parts.yaml")
    made.add_argument("--seeds", nargs="+", type=int, help="of all rows; default: the list's own")
    made.add_argument("--only", nargs="+", metavar="ROW", help="run and print these rows only")
    made.add_argument("--part", metavar="I/N", help="run every N-th row from the I-th on: one machine's share")
    made.add_argument("--table", action="store_true", help="print what is there; run nothing")
    made.add_argument("--costs", action="store_true", help="print seconds, tokens and memory of each step as well")
    made.add_argument("--commands", action="store_true", help="print one command per pending row; run nothing")
    made.add_argument("--figures", metavar="FOLDER", help="draw means, ratios and mask stability into this folder")
    return made


def arguments(given: Sequence[str]) -> Namespace:
    """Options, and as `flags` what comes after `--` (argparse gives that to LIST, or refuses it behind options)."""
    own, flags = (given, []) if "--" not in given else (given[: given.index("--")], given[given.index("--") + 1 :])
    return Namespace(**vars(parser().parse_args(own)), flags=list(flags))


def work(options: Namespace) -> None:
    """Run, then print."""
    for path in options.lists:
        listing = Listing.read(path, seeds=options.seeds, flags=options.flags)
        names = dict.fromkeys(row.name for row in listing.rows)
        if unknown := [name for name in options.only or () if name not in names]:
            raise UserError(f"--only: expected rows of {path} ({', '.join(names)}), got '{unknown[0]}'.")
        chosen = parts_of([row for row in listing.rows if row.name in (options.only or names)], options.part)
        pending = [row for row in chosen if found(row) is None]
        if options.commands:
            sys.stdout.writelines(f"{line}\n" for line in commands(path, pending, options.flags))
            continue
        if pending and not options.table:
            sys.stdout.write(token_hours(pending) + "\n")
            for row in pending:
                started = time.perf_counter()
                run(row)
                sys.stdout.write(f"{row.name}, seed {row.seed}: {time.perf_counter() - started:.0f} s, kept\n")
                sys.stdout.flush()
        wanted = [row for row in listing.rows if row in chosen or row.name == listing.reference]
        done = [(row, kept) for row in wanted if (kept := found(row)) is not None]
        sys.stdout.write("\n" + (text_of(listing, done) if done else f"{path}: no records yet.") + "\n")
        if done and options.costs:
            sys.stdout.write("\n" + costs_of(done) + "\n")
        if done and options.figures:
            reported(listing, done).draw(Path(options.figures), prefix=f"{listing.path.stem}-")


def main() -> None:
    """Exit code 2 and one line for what a user can mend, 130 for Ctrl-C."""

    def listed() -> str:
        options = arguments(sys.argv[1:])
        cli.quiet()
        work(options)
        return ""

    code = run_verb("experiments.run", listed, interrupted="Interrupted. Rows that were finished are kept.")
    if code:
        sys.exit(code)


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    main()
