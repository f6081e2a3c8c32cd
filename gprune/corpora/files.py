"""Read text files as corpora: cut a file into documents, and tell which files are which split.

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
from typing import Any

from gprune.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
TRAIN_SHARE = 0.7
MOST = 2**28  # characters of a corpus that are read: 100,000 windows of 600 tokens
CHUNK = 2**20  # characters that are read at once
log = logging.getLogger("gprune")


def split_text(text: str, size: int = 2000) -> list[str]:
    """Cut running text into documents of about `size` characters, at blank lines.

    Text without blank lines is cut at the first line end after twice that size. Only newlines around a document are
    lost, so code keeps its indentation.
    """
    return list(_split_lines(text.splitlines(keepends=True), size))


def _split_lines(given: Iterable[str], size: int = 2000) -> Iterator[str]:
    """The documents of `split_text`, from lines with their ends."""
    lines, length = [], 0
    for line in given:
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
    """The documents of files, until there are `MOST` characters: no run needs more, and a file may have no end."""
    documents, left = [], MOST
    for file in files:
        for document in _read(file):
            if not document.strip():
                continue
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
    try:
        if path.suffix.lower() == ".txt":
            yield from _split_lines(_lines(path))
        elif path.suffix.lower() == ".parquet":
            yield from _read_parquet(path)
        else:
            for n, line in enumerate(_lines(path), 1):
                if line.strip():
                    yield _text_of(json.loads(line), f"{path}:{n}")
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Corpus file '{path}' cannot be read as {path.suffix[1:]} in UTF-8: {error}.") from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends, as `str.splitlines` cuts them; for JSON, at newlines alone.

    Raises:
        ValueError: for NUL, which is in no text, and for a line that is longer than a corpus is read.
    """
    plain, begun, length = path.suffix.lower() == ".txt", [], 0
    with path.open(encoding="utf-8") as file:
        while chunk := file.read(CHUNK):
            if "\0" in chunk:
                raise ValueError("it holds NUL")
            lines = chunk.splitlines(keepends=True) if plain else re.findall(r"[^\n]*\n|[^\n]+", chunk)
            for line in lines:
                begun.append(line)
                length += len(line)
                if length > MOST:
                    raise ValueError(f"it has a line of more than {MOST:,} characters")
                if line.endswith("\n") or (plain and len((line + "x").splitlines()) > 1):
                    yield "".join(begun)
                    begun, length = [], 0
    if begun:
        yield "".join(begun)


def _text_of(row: object, where: str) -> str:
    """The field "text" of a row, or a UserError that says where the row stands."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        got = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: expected an object with a string field 'text', got {(got or 'none')[:200]}.")
    row["text"].encode()  # JSON can escape half a surrogate pair, which is no character: a ValueError
    return row["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    """The column "text", batch by batch.

    As a dictionary, where a text that many rows share is one text: a few bytes of parquet can stand for gigabytes.
    """
    import pyarrow  # comes with datasets; heavy, so only when needed
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        if "text" not in schema.names:
            raise UserError(f"{path}: expected a column 'text', got {', '.join(schema.names)[:200] or 'none'}.")
        kind = schema.field("text").type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(f"{path}: expected a column 'text' of strings, got one of {str(kind)[:200]}.")
        _check_parquet(path, metadata)
        with parquet.ParquetFile(path, read_dictionary=["text"]) as file:
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                column = batch.column(0)
                if isinstance(column, pyarrow.DictionaryArray):
                    texts = column.dictionary.to_pylist()
                    rows = (None if n is None else texts[n] for n in column.indices.to_pylist())
                else:
                    rows = column.to_pylist()
                yield from (_text_of({"text": row}, str(path)) for row in rows if row is not None)
    except pyarrow.ArrowException as error:
        raise UserError(f"Corpus file '{path}' cannot be read as parquet: {error}.") from error


def _check_parquet(path: Path, metadata: Any) -> None:
    """Raise UserError for a file that says it has more rows, or larger groups of them, than a corpus is read."""
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    most = min(4 * MOST, 1000 * path.stat().st_size + 2**26)  # no text is packed a thousandfold
    if metadata.num_rows > MOST or largest > most:
        raise UserError(
            f"{path}: expected at most {MOST:,} rows, and {most:,} bytes in a group of rows, got "
            f"{metadata.num_rows:,} and {largest:,}."
        )
