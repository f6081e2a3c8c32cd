"""Read text files as corpora: cut a file into documents, and tell which files are which split.

A folder holds `<split>.jsonl` (or .txt, .parquet) for train, validation and test, the layout that
`datasets.load_dataset("<folder>")` reads too. A missing test split falls back to validation. Text in one piece is cut
70/30.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from gprune.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
TRAIN_SHARE = 0.7


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
    documents.append("".join(lines))
    return [document.strip("\r\n") for document in documents if document.strip()]


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


def load_files(path: Path, split: str) -> list[str]:
    """Documents of a file or folder: the files `<split>.*`, or the split's share of text in one piece, cut 70/30."""
    files = text_files(path)
    if not files:  # there were some when the name was looked up
        raise UserError(f"Corpus '{path}' has vanished: expected {', '.join(SUFFIXES)} files, found none.")
    names = ("train", "validation", "test")
    train, validation, test = ([f for f in files if re.match(rf"{name}([.-]|$)", f.name)] for name in names)
    train, test = train or validation or test or files, test or validation or train or files
    if train == test:
        return contiguous_split(_read_all(train), split)
    return _read_all(train if split == "train" else test)


def _read_all(files: list[Path]) -> list[str]:
    documents = [document for file in files for document in _read(file) if document.strip()]
    if not documents:
        raise UserError(f"Corpus file '{files[0]}' holds no text; expected at least one document.")
    return documents


def _read(path: Path) -> list[str]:
    """The documents of one file: blank-line pieces of a .txt, the column "text" of a .jsonl or .parquet."""
    try:
        if path.suffix.lower() == ".txt":
            return split_text(path.read_text(encoding="utf-8"))
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path)
        with path.open(encoding="utf-8") as lines:
            return [_text_of(json.loads(line), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Corpus file '{path}' cannot be read as {path.suffix[1:]} in UTF-8: {error}.") from error


def _text_of(row: object, where: str) -> str:
    """The field "text" of a row, or a UserError that says where the row stands."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        got = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: expected an object with a string field 'text', got {got or 'none'}.")
    row["text"].encode()  # JSON can escape half a surrogate pair, which is no character: a ValueError
    return row["text"]


def _read_parquet(path: Path) -> list[str]:
    import pyarrow  # comes with datasets; heavy, so only when needed
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(path).names
        if "text" not in columns:
            raise UserError(f"{path}: expected a column 'text', got {', '.join(columns) or 'none'}.")
        rows = parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"Corpus file '{path}' cannot be read as parquet: {error}.") from error
    return [_text_of({"text": row}, str(path)) for row in rows if row is not None]
