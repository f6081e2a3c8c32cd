"""A list of configurations, run and tabulated: the work of `gprune study`.

After each configuration its numbers, masks and costs are written to the folder of records; whichever list asks, a
configuration whose settings stand there is not run again.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gprune
from gprune.benchmarks import measurement as benchmarks
from gprune.benchmarks.settings import Benchmarks
from gprune.console import process_index, say
from gprune.errors import UserError
from gprune.evaluation.perplexity import processes
from gprune.models.blocks import blocks_of
from gprune.models.loading import load_model
from gprune.models.losses import next_token_loss
from gprune.models.offload import device_of
from gprune.pipeline.plan import check
from gprune.runs import schema
from gprune.runs.folder import RunFolder
from gprune.sparsity.gates import gated
from gprune.storage.files import read_json, write_json
from gprune.studies.archive import dense_path, learned_tokens, path_of, plain, read, record_of, write
from gprune.studies.figures import draw
from gprune.studies.listing import Listing, Row, commands, parts_of
from gprune.studies.packing import packed
from gprune.studies.tables import cost_table, text_of

Made = tuple[Path, dict[str, Any]]  # a run's folder and record


def run(row: Row) -> Made:
    """Run one configuration and keep what came out.

    Returns:
        The run's folder, and the record; an empty one in other processes than the first, which keeps it.
    """
    cfg = row.config
    before = read(path_of(row)) or {"masks": None}  # of another list, which wants other things of this row
    if row.wanted_tasks and cfg.recovery != "none":  # masks do not hold what recovery changed
        cfg = replace(cfg, export="hf")
    result = gprune.prune(cfg)
    if process_index() != 0:
        return result.path, {}
    manifest = RunFolder(result.path).manifest
    kept = {
        "name": row.name,
        "settings": plain(cfg.settings()),
        "inputs": manifest["settings"]["inputs"],
        "environment": manifest["environment"],
        "steps": manifest["steps"],
        "summary": {k: v for k, v in result.summary.items() if k not in ("geometric_means", "unseen_over_base")}
        | {"learned_tokens": learned_tokens(manifest["steps"])},
        "learning": manifest.get("learning"),
        "masks": packed(result.masks) if row.masks or before["masks"] else None,
        "records": [rounded(r) for r in result.records],
    }
    kept |= {name: before[name] for name in ("tasks", "evaluation") if name in before}
    write(path_of(row), kept)
    return result.path, kept


def measure_tasks(row: Row, folder: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """Measure the tasks that the list asks for on a finished run, and keep them in its record, which is returned."""
    kept = kept | {"tasks": row.wanted_tasks, "evaluation": evaluated(folder, row, kept["inputs"]["model"])}
    write(path_of(row), kept)  # asked again: another list may have written its own tasks beside it
    return kept


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """With the nll of each window, where it has some, to 0.0001."""
    if "window_nll" not in record:
        return record
    return record | {"window_nll": [round(v, 4) for v in record["window_nll"]]}


def evaluated(folder: Path, row: Row, dense_model: str) -> list[dict[str, Any]]:
    """Records of `gprune evaluate` on a finished run; the dense model's, by its fingerprint, are kept for all rows."""
    asked, shared = asked_of(row), dense_path(row, dense_model)
    if not (read_json(shared, check=schema.evaluation) or {}).get("records"):  # kept now: it may take an hour
        measured, _ = benchmarks.evaluate(str(folder), asked, dense=True, pruned=False)
        write_json(shared, {"records": list(map(rounded, measured))})
    return [rounded(r) for r in benchmarks.evaluate(str(folder), asked)[0]]


def asked_of(row: Row) -> Benchmarks:
    """The row's tasks; raises UserError for what cannot be measured."""
    tasks = row.wanted_tasks
    own = {k: tasks[k] for k in ("limit", "dtype") if k in tasks}
    if (lengths := tasks.get("seq_len")) is not None:
        own["seq_len"] = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    return Benchmarks(tuple(tasks["names"]), trust_remote_code=row.config.model.trust_remote_code, **own)


def token_hours(pending: Sequence[Row]) -> str:
    """What is still to be computed, at most, and how long it takes at this machine's speed right now; tasks apart."""
    forward = backward = 0
    for row in pending:
        plan = check(row.config)
        forward, backward = forward + plan.forward_tokens, backward + plan.forward_backward_tokens
    tokens = f"{forward:,} tokens forward", f"{backward:,} forward and backward"
    what = f"{len(pending)} configurations: at most {{}} and {{}}, shared passes counted for each"
    what += ", tasks not counted" * any(row.wanted_tasks for row in pending)
    cfg = pending[0].config
    m = cfg.model
    if m.shard or m.max_memory:  # what one process measures says nothing, or takes minutes
        return what.format(*tokens)
    dtype, trust = getattr(torch, m.dtype), m.trust_remote_code
    model, _ = load_model(m.name, dtype=dtype, device_map=m.device_map, trust_remote_code=trust)
    model = model if m.device_map else model.to(check(cfg).device)
    device = device_of(model)
    ids = torch.randint(model.config.vocab_size, (cfg.corpora.batch_size, cfg.corpora.seq_len), device=device)
    with torch.no_grad():
        next_token_loss(model, ids[:, :64])  # warm
        forward_speed = ids.numel() / seconds(lambda: next_token_loss(model, ids).item())  # the number: a GPU is done
    gates = [torch.ones(b.experts * b.neurons, requires_grad=True, device=device_of(b.layer)) for b in blocks_of(model)]
    with gated(model, gates):
        backward_speed = ids.numel() / seconds(
            lambda: (next_token_loss(model, ids).backward(), gates[0].grad.sum().item())
        )
    hours = (forward / forward_speed + backward / backward_speed) / 3600
    speeds = f" ({forward_speed:.0f}/s here)", f" ({backward_speed:.0f}/s)"
    return what.format(*(count + speed for count, speed in zip(tokens, speeds, strict=True))) + f": {hours:.1f} hours"


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def work(options: Namespace) -> None:
    """Run, then print; options as the command line of `gprune study` gives them."""
    waiting: list[Callable[[], None]] = []  # of lists whose rows have run
    for path in options.lists:
        listing = Listing.read(path, seeds=options.seeds, flags=options.flags, records=options.records)
        names = dict.fromkeys(row.name for row in listing.rows)
        if unknown := [name for name in options.only or () if name not in names]:
            raise UserError(f"--only: expected rows of {path} ({', '.join(names)}), got '{unknown[0]}'.")
        chosen = parts_of([row for row in listing.rows if row.name in (options.only or names)], options.part)
        pending = [row for row in chosen if record_of(row) is None]
        if options.commands:
            say("".join(f"{line}\n" for line in commands(path, pending, options)))
            continue
        ran = run_all(pending) if pending and not options.table else []
        waiting.append(partial(finish, listing, chosen, ran, options))
        if processes()[1] == 1 and process_index() == 0:
            waiting.pop()()
    if process_index() == 0:  # the others are through: none waits for tasks of hours, until torch gives them up
        for rest in waiting:
            rest()


def run_all(pending: Sequence[Row]) -> list[tuple[Row, Made]]:
    """Say what it will cost, run each row, and say when its record is kept.

    Returns:
        Rows whose tasks are still to be measured, with what `run` gave.
    """
    for row in pending:
        if row.wanted_tasks:
            benchmarks.check(asked_of(row))
    first = process_index() == 0  # of processes that Lightning has started with the same command
    if first:
        say(token_hours(pending) + "\n")
    ran = []
    for row in pending:
        spent = seconds(lambda row=row: ran.append((row, run(row))))
        if processes()[1] > 1:  # the record is there for all of them, whatever list asks for it next
            torch.distributed.barrier()
        if first:
            say_kept(row, spent)
    return [(row, made) for row, made in ran if row.wanted_tasks]


def finish(listing: Listing, chosen: Sequence[Row], ran: Sequence[tuple[Row, Made]], options: Namespace) -> None:
    """Measure the tasks of rows that have run, and print and draw what a list's rows have given."""
    for row, (folder, kept) in ran:
        spent = seconds(partial(measure_tasks, row, folder, kept))
        say_kept(row, spent, "tasks ")
    wanted = [row for row in listing.rows if row in chosen or row.name in listing.reference]
    done = [(row, kept) for row in wanted if (kept := record_of(row)) is not None]
    say("\n" + (text_of(listing, done) if done else f"{listing.path}: no records yet.") + "\n")
    if options.costs and (costs := cost_table(done)).rows:
        say("\n" + costs.shown() + "\n")
    if done and options.figures:
        draw(listing, done, Path(options.figures))


def say_kept(row: Row, spent: float, what: str = "") -> None:
    """Say how many seconds a row, or its tasks, took, and that they are on the disk."""
    say(f"{row.name}, seed {row.seed}: {what}{spent:.0f} s, kept\n")
    sys.stdout.flush()
