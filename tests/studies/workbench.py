"""Write and run lists on a tiny world, and make runs from the losses of windows."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from gprune.__main__ import run as command
from gprune.models.masks import Masks
from gprune.runs.results import FinishedRun
from gprune.studies.archive import finished_record
from gprune.studies.listing import Listing, Row
from tests import tiny_run

ROWS = {"plain": {"gprune": False}, "ours": {}, "other": {"sparsity": {"epochs": 2}, "reliability.switch": False}}
OF_FIRST = {name: {"row": f"first.yaml:{name}"} for name in ROWS}  # in another list, with the records of the first
COMPARE = [["ours", "plain"], ["other", "ours"]]


class Workbench:
    """Write lists for the tiny world, and run `gprune study` on them with a separate folder of records.

    Call it like a function to run a list: `bench(path, "--table")`.
    """

    def __init__(self, world: tiny_run.World, folder: Path):
        self.world, self.folder, self.records = world, folder, folder / "records"
        flags = [f for f in world.args(folder / "runs") if not f.startswith("--run.name")]
        self.common = {name: yaml.safe_load(value) for name, value in (f[2:].split("=", 1) for f in flags)}

    def write(self, name: str, rows: Mapping[str, Any], **content: Any) -> Path:
        """Write a list, and return its path. `content` are its other keys; `common` is added to that of the world."""
        common = self.common | content.pop("common", {})
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"common": common, "rows": rows, **content}, sort_keys=False))
        return path

    def rows(self, path: Path, **options: Any) -> list[Row]:
        """Return the rows of a list. Options are those of `Listing.read`."""
        return Listing.read(path, **{"records": self.records, **options}).rows

    def done(self, path: Path) -> tuple[Listing, list[tuple[Row, dict[str, Any]]]]:
        """Return a list, and a pair (row, record) for each of its rows that has a record."""
        listing = Listing.read(path, records=self.records)
        return listing, [(row, record) for row in listing.rows if (record := finished_record(row)) is not None]

    def __call__(self, *arguments: object) -> str:
        """Run `gprune study` with the arguments, and return its output."""
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out

    def refused(self, *arguments: object) -> str:
        """Run `gprune study`, which has to fail, and return its one line on stderr."""
        code, _, err = self.run(*arguments)
        assert code == 2
        assert err.startswith("gprune study: ")
        assert err.count("\n") == 1
        return err

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Run `gprune study`, and return its exit code and what it writes to stdout and stderr."""
        words = [str(argument) for argument in arguments]
        if "--records" not in words:
            end_of_options = words.index("--") if "--" in words else len(words)  # flags of train.py follow `--`
            words[end_of_options:end_of_options] = ["--records", str(self.records)]
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = command("study", words)
        return code, out.getvalue(), err.getvalue()


def cells(line: str) -> list[str]:
    """Return the cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def unseen(record: Mapping[str, Any], stage: str, number: str = "window_nll") -> dict[str, list[float]]:
    """Return {corpus: value} of the unseen corpora of a stage, for the field `number` of their records."""
    return {r["corpus"]: r[number] for r in record["records"] if r["stage"] == stage and not r["seen"]}


def fake_run(
    name: str, stages: Mapping[str, Mapping[str, Sequence[float]]], *, seed: int = 0, recovery: str = "none"
) -> FinishedRun:
    """Return a run with the given losses of windows, {stage: {corpus: [nats of each window]}}, and no other results.

    Windows have 11 tokens, of which 10 are predicted.
    """
    records = [
        {
            "stage": stage, "recovery": recovery, "seen": False, "corpus": corpus, "seq_len": 11,
            "content_hash": corpus, "seed": seed, "model": "dense model", "window_nll": list(nll),
            "perplexity": math.exp(sum(nll) / (10 * len(nll))),
        }
        for stage, corpora in stages.items() for corpus, nll in corpora.items()
    ]  # fmt: skip
    settings = {"recovery": recovery, "run": {"seed": seed}, "inputs": {"model": "of the tests"}}
    return FinishedRun(Path(f"{name}-{seed}"), name, settings, records, {}, Masks.of_blocks([], []), None, [])
