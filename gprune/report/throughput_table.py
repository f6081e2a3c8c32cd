"""The table of the task `speed`: throughput, against the dense model where both took turns."""

from __future__ import annotations

from collections.abc import Sequence

from gprune.report.table import Cell, Table
from gprune.runs.results import Record, row_name


def throughput_table(records: Sequence[Record]) -> Table:
    """Prefill, decoding and time to the first token, a row for each model and batch.

    Args:
        records: as in `evaluation.json`, with `run` and `stage` in each; those of other kinds are left out.
    """
    own = [r for r in records if r["kind"] == "speed"]
    dense = {r["rounds"]: r for r in own if r["stage"] == "dense"}
    rows: list[list[Cell]] = []
    for r in sorted(own, key=lambda r: (r["run"] or "", r["batch"], r["stage"] != "dense")):
        beside = dense.get(r["rounds"]) if r["stage"] != "dense" else None
        ratios = [beside and r[n] and beside[n] and r[n] / beside[n] for n in ("prefill", "decode")]
        name, numbers = row_name(r["stage"], r.get("recovery") or "none"), (r["prefill"], r["decode"])
        rows.append([name, r["run"], r["batch"], *numbers, 1000 * r["first_token"], *ratios, r["note"]])
    ratios = ["prefill / dense", "decode / dense"]
    columns = ["", "run", "batch", "prefill", "decode", "first token", *ratios, "measured with"]
    if len({r["run"] for r in own}) == 1:
        columns, rows = columns[:1] + columns[2:], [row[:1] + row[2:] for row in rows]
    return Table(
        "throughput",
        "Speed",
        columns,
        rows,
        dict.fromkeys(("prefill", "decode", "first token"), 1),
        note="Prefill of prompts and greedy decoding by transformers, in tokens per second of a batch together; "
        "milliseconds to the first token. Over dense: where both took turns.",
    )
