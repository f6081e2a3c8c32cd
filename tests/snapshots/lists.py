"""The rows of all lists that have no record, and the numbers over corpora of three lists as frames."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pandas as pd
import yaml

import gprune
from gprune.runs.numbers import COLUMNS
from gprune.studies.archive import finished_record
from gprune.studies.listing import Listing
from tests.snapshots.files import ROOT, STORED

LISTS = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "experiments").glob("**/*.yaml"))
    if "rows" in yaml.safe_load(path.read_text(encoding="utf-8"))
]
FRAMES = ("tokens", "stability", "peers_gemma")  # text of several sizes; seeds; models made elsewhere


def missing(listing: str) -> list[str]:
    """Return the rows and seeds of a list that have no record."""
    with contextlib.chdir(ROOT):
        rows = Listing.read(Path(listing)).rows
        return [f"{row.name}, seed {row.seed}" for row in rows if finished_record(row) is None]


def frame(name: str) -> pd.DataFrame:
    """Return the numbers over corpora and of the whole model of a list, with the means over its seeds."""
    with contextlib.redirect_stdout(io.StringIO()):
        frame = gprune.load_study(ROOT / f"experiments/lists/{name}.yaml").to_frame(means=True)
    return frame[(frame["corpus"] == "") & (frame["windows"].notna() | (frame["number"] == "parameters"))][COLUMNS]


def csv_of(name: str) -> Path:
    """Return the stored file of a frame."""
    return STORED / f"{name}.csv"
