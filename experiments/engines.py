"""Print the table of speeds in engines, from the records that `gprune evaluate --engine` has written.

    python -m experiments.engines RECORDS.json

Rows are models in an engine, columns are the time to the first token and per token of a single request, generated
tokens per second (prompts included) for each number of requests, and their ratio to the dense model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def models_of(records: Sequence[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Yield the name of an engine, that of a model, and its records, with the dense model first."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for r in sorted(records, key=lambda r: r["stage"] != "dense"):
        engine = r["task"].rpartition(" ")[0]
        grouped.setdefault((engine, "dense" if r["stage"] == "dense" else r["run"]), []).append(r)
    engines = dict.fromkeys(r["task"].rpartition(" ")[0] for r in records)
    for engine in engines:
        for (of_engine, model), of_model in grouped.items():
            if of_engine == engine:
                yield engine, model, of_model


def rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table."""
    batches = sorted({r["batch"] for r in records})
    header = ["engine", "model", "its class", "first token, ms", "per token, ms"]
    header += [f"tokens/s at {batch}" for batch in batches] + [f"times dense at {batch}" for batch in batches]
    table, dense_rates = [], {}
    for engine, model, of_model in models_of(records):
        by_task = {(r["task"].rpartition(" ")[2], r["batch"]): r for r in of_model}
        rates = {batch: by_task["generate", batch]["tokens_per_second"] for batch in batches}
        if model == "dense":
            dense_rates[engine] = rates
        table.append([
            engine, model, of_model[0]["engine_class"],
            *(f"{1000 * by_task[task, batches[0]]['seconds']:.1f}" for task in ("prefill", "decode")),
            *(f"{rate:.1f}" for rate in rates.values()),
            *(f"{rates[batch] / dense_rates[engine][batch]:.2f}" if engine in dense_rates else "" for batch in batches),
        ])  # fmt: skip
    return header, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown, and the largest spread of repeated measurements."""
    parser = argparse.ArgumentParser(prog="python -m experiments.engines", description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="JSON file, `--output` of `gprune evaluate`")
    records = json.loads(parser.parse_args(arguments).records.read_text(encoding="utf-8"))["records"]
    header, table = rows(records)
    print("|", " | ".join(header), "|")
    print("|" + "---|" * 3 + "---:|" * (len(header) - 3))
    for row in table:
        print("|", " | ".join(row), "|")
    spreads = sorted(r["spread"] for r in records)
    print(f"\nRepeated measurements differ by {spreads[len(spreads) // 2]:.0%} (median), at most {spreads[-1]:.0%}.")
    print(", ".join(sorted({f"{r['engine']} {r['engine_version']}" for r in records})), "|", records[0]["note"])
    return 0


if __name__ == "__main__":
    main()
