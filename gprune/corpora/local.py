"""Corpora in local files: assign files to splits, and split text into documents.

A folder has `<split>.jsonl` (or .txt, .parquet) for train, validation (or dev) and test, the layout of
`datasets.load_dataset("<folder>")`, in lower or upper case. A missing test split falls back to validation. Text without
splits is cut 70/30.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path

from gprune.errors import UserError, quoting

SUFFIXES = (".txt", ".jsonl", ".parquet")
TRAIN_SHARE = 0.7


def split_text(text: str, size: int = 2000) -> list[str]:
    """Cut running text into documents of about `size` characters, at blank lines.

    Text without blank lines is cut at the first line end after twice that size. Only newlines around a document are
    removed, so code keeps its indentation.
    """
    documents: list[str] = []
    lines: list[str] = []  # of the current document
    length = 0  # characters in these lines
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= 2 * size or (length >= size and not line.strip()):
            documents.append("".join(lines))
            lines = []
            length = 0
    return [document.strip("\r\n") for document in [*documents, "".join(lines)] if document.strip()]


def contiguous_split(documents: Iterable[str], split: str) -> list[str]:
    """Return the first 70 % of the distinct documents for "train", the others for "test".

    The split is contiguous, because neighbouring pieces may come from one source: with every other piece of an article
    in test, train text would leak into test.
    """
    distinct = list(dict.fromkeys(documents))
    cut = round(TRAIN_SHARE * len(distinct))
    return distinct[:cut] if split == "train" else distinct[cut:]


def text_files(path: Path) -> list[Path]:
    """Return the path itself if it is a text file, or the text files of a folder, sorted by name."""
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in candidates if file.suffix.lower() in SUFFIXES and file.is_file()]


def load_files(path: Path, split: str) -> list[str]:
    """Read the documents of one split: the files `<split>.*`, or the split's share of a 70/30 cut."""
    files = text_files(path)
    # Names begin with the split, and continue with a suffix (`train.txt`) or a part number (`train-00000.parquet`).
    train, validation, test = (
        [file for file in files if re.match(rf"({name})([._ -]|\d|$)", file.name, re.IGNORECASE)]
        for name in ("train(ing)?", "val(id(ation)?)?|dev(elopment)?", "test(ing)?")
    )
    train_files = train or validation or test or files
    test_files = test or validation or train or files
    if train_files == test_files:
        return contiguous_split(_read_all(train_files), split)
    return _read_all(train_files if split == "train" else test_files)


def _read_all(files: list[Path]) -> list[str]:
    """Read the documents of all files. Raise UserError if a file cannot be read, or no file has any text."""
    documents: list[str] = []
    for file in files:
        with quoting(f"Cannot read corpus file '{file}' as {file.suffix[1:].lower()}: "):
            documents += filter(str.strip, _read(file))
    if not documents:
        names = ", ".join(f"'{file}'" for file in files)
        noun = "file" if len(files) == 1 else "files"
        raise UserError(f"Corpus {noun} {names} must have at least one document; got no text.")
    return documents


def _read(path: Path) -> Iterator[str]:
    """Yield the documents of a file.

    A .txt file is cut at blank lines. A .jsonl or .parquet file has one document per row, in the column `text`.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix == ".txt":
        with path.open(encoding="utf-8-sig") as file:  # without a byte order mark
            yield from split_text(file.read())
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = line.removeprefix(BOM_UTF8).strip()
                if row:
                    yield _parse_line(row, path, number)


def _read_parquet(path: Path) -> Iterator[str]:
    """Yield the column `text` of a .parquet file, without missing values."""
    from pyarrow.parquet import ParquetFile  # a dependency of datasets, slow to import

    with ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["text"]):
            for text in batch["text"].to_pylist():
                if text is not None:
                    yield _text_of({"text": text}, str(path))


def _parse_line(line: bytes, path: Path, number: int) -> str:
    """Return the document on a line of a .jsonl file."""
    with quoting(f"Cannot read line {number} of corpus file '{path}' as jsonl: "):
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:  # its message would name line 1, because only one line was parsed
            raise ValueError(f"{error.msg} at column {error.colno}") from error
        return _text_of(row, f"{path}:{number}")


def _text_of(row: object, location: str) -> str:
    """Return the field `text` of a row."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{location}: The row must be an object with a string field 'text'; got {row!r:.100}.")
    text.encode()  # raises ValueError for an unpaired surrogate
    return text
