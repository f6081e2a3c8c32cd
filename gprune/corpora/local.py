"""Corpora in local files: assign files to splits, and split text into documents.

A folder has `<split>.jsonl` (or .txt, .parquet) for train, validation and test, the layout of
`datasets.load_dataset("<folder>")`. A missing test split falls back to validation. Text without splits is cut 70/30.
"""

from __future__ import annotations

import json
import logging
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path

from gprune.errors import UserError, quoting

SUFFIXES = (".txt", ".jsonl", ".parquet")
TRAIN_SHARE = 0.7
MOST = 2**28  # limit of characters read from a corpus: 100,000 windows of 600 tokens
log = logging.getLogger("gprune")


def split_text(text: str, size: int = 2000) -> list[str]:
    """Cut running text into documents of about `size` characters, at blank lines.

    Text without blank lines is cut at the first line end after twice that size. Only newlines around a document are
    removed, so code keeps its indentation.
    """
    documents, lines, length = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= 2 * size or (length >= size and not line.strip()):
            documents.append("".join(lines))
            lines, length = [], 0
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
    """Read the documents of one split: the files `<split>.*`, or without such files the split's share of a 70/30 cut.

    At most `MOST` characters are read; a longer corpus is truncated with a warning.

    Raises:
        UserError: if a file is empty or cannot be read.
    """
    files = text_files(path)
    names = ("train", "validation", "test")
    train, validation, test = ([f for f in files if re.match(rf"{name}([.-]|$)", f.name)] for name in names)
    train, test = train or validation or test or files, test or validation or train or files
    if train == test:
        return contiguous_split(_read_all(train), split)
    return _read_all(train if split == "train" else test)


def _read_all(files: list[Path]) -> list[str]:
    documents, left = [], MOST
    for file in files:
        with quoting(f"Cannot read corpus file '{file}' as {file.suffix[1:].lower()}: "):
            for document in filter(str.strip, _read(file)):
                documents.append(document)
                left -= len(document)
                if left <= 0:
                    log.warning("%s: the corpus is truncated to its first %s characters.", file, f"{MOST:,}")
                    return documents
    if not documents:
        raise UserError(f"Corpus file '{files[0]}' must have at least one document; got no text.")
    return documents


def _read(path: Path) -> Iterator[str]:
    """Yield the documents of a file: pieces of a .txt cut at blank lines, or the column "text" of .jsonl, .parquet."""
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile  # a dependency of datasets, slow to import

        with ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["text"]):
                yield from (_text_of({"text": t}, str(path)) for t in batch["text"].to_pylist() if t is not None)
        return
    if path.suffix.lower() == ".txt":
        with path.open(encoding="utf-8-sig") as file:  # without a byte order mark
            yield from split_text(file.read(2 * MOST))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line := line.removeprefix(BOM_UTF8).strip():
                yield _document(line, path, number)


def _document(line: bytes, path: Path, number: int) -> str:
    """Return the document on a line of a .jsonl file. Errors name the line."""
    with quoting(f"Cannot read line {number} of corpus file '{path}' as jsonl: "):
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:  # its own message would say line 1
            raise ValueError(f"{error.msg} at column {error.colno}") from error
        return _text_of(row, f"{path}:{number}")


def _text_of(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: The row must be an object with a string field 'text'; got {row!r:.100}.")
    text.encode()  # raises ValueError for an unpaired surrogate, which JSON can escape
    return text
