"""Corpora in local files: which files are which split, and how their text becomes documents.

A folder holds `<split>.jsonl` (or .txt, .parquet) for train, validation and test, the layout that
`datasets.load_dataset("<folder>")` reads too. A missing test split falls back to validation. Text in one piece is cut
70/30.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gprune.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
TRAIN_SHARE = 0.7
MOST = 2**28  # characters of a corpus that are read: 100,000 windows of 600 tokens
log = logging.getLogger("gprune")


def split_text(text: str, size: int = 2000) -> list[str]:
    """Cut running text into documents of about `size` characters, at blank lines.

    Text without blank lines is cut at the first line end after twice that size. Only newlines around a document are
    lost, so code keeps its indentation.
    """
    return list(_split_lines(text.splitlines(keepends=True), size))


def _split_lines(text: Iterable[str], size: int = 2000) -> Iterator[str]:
    """The documents of `split_text`, from lines with their ends."""
    lines, length = [], 0
    for line in text:
        lines.append(line)
        length += len(line)
        if length >= 2 * size or (length >= size and not line.strip()):
            yield from _document(lines)
            lines, length = [], 0
    yield from _document(lines)


def _document(lines: list[str]) -> list[str]:
    document = "".join(lines)
    return [document.strip("\r\n")] if document.strip() else []


def contiguous_split(documents: Iterable[str], split: str) -> list[str]:
    """The first 70 % of the (distinct) documents as "train", the rest as "test".

    Contiguous, because neighbouring pieces may come from one source: with every other piece of an article in test, the
    split itself would leak.
    """
    distinct = list(dict.fromkeys(documents))
    cut = round(TRAIN_SHARE * len(distinct))
    return distinct[:cut] if split == "train" else distinct[cut:]


def text_files(path: Path) -> list[Path]:
    """A file itself, or the files of a folder that can be read, by name."""
    try:
        candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError:  # gone since the line before, or closed to us
        candidates = []
    return [file for file in candidates if file.suffix.lower() in SUFFIXES and file.is_file()]


def load_files(path: Path, split: str, *, most: int = MOST) -> list[str]:
    """Documents of a file or folder: the files `<split>.*`, or the split's share of text in one piece, cut 70/30.

    Args:
        most: characters; of larger corpora the first ones are read, with a warning.

    Raises:
        UserError: naming the file, for text that has vanished, is empty, or cannot be read.
    """
    files = text_files(path)
    if not files:  # there were some when the name was looked up
        raise UserError(f"Corpus '{path}' has vanished: expected {', '.join(SUFFIXES)} files, found none.")
    names = ("train", "validation", "test")
    train, validation, test = ([f for f in files if re.match(rf"{name}([.-]|$)", f.name)] for name in names)
    train, test = train or validation or test or files, test or validation or train or files
    if train == test:
        return contiguous_split(_read_all(train, most), split)
    return _read_all(train if split == "train" else test, most)


def _read_all(files: list[Path], most: int) -> list[str]:
    """The documents of files, until there are `most` characters: no run needs more, and a file may have no end."""
    documents, left = [], most
    for file in files:
        for document in _read(file, most):
            if not document.strip():
                continue
            documents.append(document)
            left -= len(document)
            if left <= 0:
                log.warning("%s: of larger corpora the first %s characters are read.", file, f"{most:,}")
                return documents
    if not documents:
        raise UserError(f"Corpus file '{files[0]}' holds no text; expected at least one document.")
    return documents


def _read(path: Path, most: int) -> Iterator[str]:
    """The documents of one file: blank-line pieces of a .txt, the column "text" of a .jsonl or .parquet."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            lines = _lines(path, most)
            yield from _split_lines(line for text in lines for line in text.splitlines(keepends=True))
        elif suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            for n, line in enumerate(_lines(path, most), 1):
                if line.strip():
                    yield _text_of(json.loads(line), f"{path}:{n}")
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Corpus file '{path}' cannot be read as {suffix[1:]}: {error}.") from error


def _lines(path: Path, most: int) -> Iterator[str]:
    """The lines of a file in UTF-8 with their ends; a ValueError for one that is longer than a corpus is read."""
    with path.open(encoding="utf-8") as file:
        while line := file.readline(most + 1):
            if len(line) > most:
                raise ValueError(f"it has a line of more than {most:,} characters")
            yield line


def _text_of(row: object, where: str) -> str:
    """The field "text" of a row, or a UserError that says where the row stands."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        got = type(row).__name__
        if isinstance(row, dict):
            got = f"text of type {type(row['text']).__name__}" if "text" in row else f"the fields {', '.join(row)}"
        raise UserError(f"{where}: expected an object with a string field 'text', got {got[:200]}.")
    row["text"].encode()  # JSON can escape half a surrogate pair, which is no character: a ValueError
    return row["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    """The column "text", batch by batch, without rows that are null."""
    import pyarrow  # comes with datasets; heavy, so only when needed
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise UserError(f"{path}: expected a column 'text', got {', '.join(columns)[:200] or 'none'}.")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from (
                    _text_of({"text": row}, str(path)) for row in batch.column(0).to_pylist() if row is not None
                )
    except pyarrow.ArrowException as error:
        raise UserError(f"Corpus file '{path}' cannot be read as parquet: {error}.") from error
