"""Corpora in local files: which files are which split, and how their text becomes documents.

A folder holds `<split>.jsonl` (or .txt, .parquet) for train, validation and test, the layout that
`datasets.load_dataset("<folder>")` reads too. A missing test split falls back to validation. Text in one piece is cut
70/30.
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
MOST = 2**28  # characters of a corpus that are read: 100,000 windows of 600 tokens
log = logging.getLogger("gprune")


def split_text(text: str, size: int = 2000) -> list[str]:
    """Cut running text into documents of about `size` characters, at blank lines.

    Text without blank lines is cut at the first line end after twice that size. Only newlines around a document are
    lost, so code keeps its indentation.
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
    """The first 70 % of the (distinct) documents as "train", the rest as "test".

    Contiguous, because neighbouring pieces may come from one source: with every other piece of an article in test, the
    split itself would leak.
    """
    distinct = list(dict.fromkeys(documents))
    cut = round(TRAIN_SHARE * len(distinct))
    return distinct[:cut] if split == "train" else distinct[cut:]


def text_files(path: Path) -> list[Path]:
    """A file itself, or the files of a folder that can be read, by name."""
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in candidates if file.suffix.lower() in SUFFIXES and file.is_file()]


def load_files(path: Path, split: str) -> list[str]:
    """Documents of a file or folder: the files `<split>.*`, or the split's share of text in one piece, cut 70/30.

    Of larger corpora the first `MOST` characters are read, with a warning.

    Raises:
        UserError: naming the file, for text that is empty or cannot be read.
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
        with quoting(f"Corpus file '{file}' cannot be read as {file.suffix[1:].lower()}: ", "."):
            for document in filter(str.strip, _read(file)):
                documents.append(document)
                left -= len(document)
                if left <= 0:
                    log.warning("%s: of larger corpora the first %s characters are read.", file, f"{MOST:,}")
                    return documents
    if not documents:
        raise UserError(f"Corpus file '{files[0]}' holds no text; expected at least one document.")
    return documents


def _read(path: Path) -> Iterator[str]:
    """The documents of one file: blank-line pieces of a .txt, the column "text" of a .jsonl or .parquet."""
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile  # comes with datasets; heavy, so only when needed

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
    """The document on a line of a .jsonl file; a UserError names the line."""
    with quoting(f"Corpus file '{path}', line {number}, cannot be read as jsonl: ", "."):
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:  # its own message counts lines inside this one
            raise ValueError(f"{error.msg} at column {error.colno}") from error
        return _text_of(row, f"{path}:{number}")


def _text_of(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: expected an object with a string field 'text', got {row!r:.100}.")
    text.encode()  # JSON can escape half a surrogate pair, which is no character: a ValueError
    return text
