"""Load a corpus by name, or from local files: `load_corpus(name, split)` returns a list of documents.

A name is looked up, in this order, as a path (`.txt`, `.jsonl`, `.csv`, `.parquet`, or a folder of them), as a local
mirror in `$GPRUNE_DATA_DIR/corpora`, and in `CORPORA`, which has embedded corpora (no hub needed) and hub data sets.
Any other name `OWNER/NAME` is a data set on the Hugging Face hub. To add a corpus, register a function that returns the
documents of "train" and "test"; development text is taken from train:

    @CORPORA.register("my_corpus")
    def my_corpus(split: str) -> list[str]: ...

A folder has `<split>.jsonl` (or .txt, .parquet) for train, validation (or dev) and test, the layout of
`datasets.load_dataset("<folder>")`, in lower or upper case. A missing test split falls back to validation. Text without
splits is cut 70/30. Of a single file, 70 % are train text, 10 % development text and 20 % test text, after long
documents were cut into passages if there are few of them.
"""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePath

from gprune.corpora.documents import CORPORA, Conversation, Corpus, contiguous_split, document_of, text_of, without_text
from gprune.errors import UserError, quoting
from gprune.registry import NAME
from gprune.storage.paths import expanded

SPLITS = ("train", "development", "test")
DEVELOPMENT_EVERY = 10
DEVELOPMENT_EVERY_OF_FILE = 8  # 10 % of a file, whose train documents are 80 %
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
TRAIN_SHARE_OF_FILE = 0.8  # with development text
LEAST_DOCUMENTS = 15  # of text without splits, so that all three splits have some
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # OWNER/NAME or OWNER/NAME:CONFIG
PASSAGES = 40  # into which the text of fewer documents is cut
SHORTEST_PASSAGE = 200  # characters
# Corpora of lists in `experiments/` that are not registered, by the arguments of the command that makes them.
MADE_BY = {
    "experiments.corpora --output data": ("c4_code", "c4_code_wiki"),
    "experiments.kinds --clones clones --output data": (
        "news", "interviews", "conversation", "fiction", "speeches", "travel", "medicine", "papers", "drama", "law",
        "rust", "german", "howto", "biography", "essays", "letters", "podcasts", "vlogs", "court", "textbooks", "c",
        "french", "c4_code_5", "c4_code_10", "c4_code_25",
        "c4_code_25_spanish", "c4_code_25_russian", "c4_code_25_four",
    ),
}  # fmt: skip


def read_corpus(name: str, split: str) -> list[str]:
    """Read all documents of a corpus for `split`: "train", which includes development text, or "test"."""
    documents = source_of(name)(split)
    if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
        raise UserError(f"Corpus '{name}' must be a list of documents of type str; got {documents!r:.80}.")
    return documents


def load_corpus(name: str, split: str, *, read: Callable[[str, str], list[str]] = read_corpus) -> list[str]:
    """Load the documents of one split, in a fixed order.

    The split "development", for tuning, is every tenth document of the train text (of a single file every eighth);
    "train" has the others.
    """
    if split not in SPLITS:
        raise UserError(f"Corpus '{name}': Unknown split '{split}'. Available: {', '.join(SPLITS)}.")
    documents = read(name, "test" if split == "test" else "train")
    found = len(documents)
    path = _path_of(name)
    every = DEVELOPMENT_EVERY_OF_FILE if path is not None and path.is_file() else DEVELOPMENT_EVERY
    if split != "test":
        development = documents[every - 1 :: every]
        if split == "development":
            documents = development
        else:
            excluded = set(development)  # also removes repetitions of a development document
            documents = [document for document in documents if document not in excluded]
    if not documents:
        cut = f"text without splits is cut in two, and every {every}th train document is development text"
        raise UserError(
            f"Corpus '{name}' must have {LEAST_DOCUMENTS} or more documents for its split {split}, because {cut}; got "
            f"{found} of {'test' if split == 'test' else 'train'}. Cut long documents at paragraphs."
        )
    return documents


def source_of(name: str) -> Corpus:
    """Return the function that reads the "train" or "test" documents of a corpus. No text is read here."""
    path = _path_of(name)
    if path is None and name in CORPORA:
        return CORPORA[name]
    if path is None and HUB_NAME.fullmatch(name):
        from gprune.corpora.hub import load_named  # imports the hub's client

        return partial(load_named, name)
    if path is None:
        mirrors = sorted(folder.name for folder in _mirrors().glob("*") if text_files(folder))
        command = next((command for command, made in MADE_BY.items() if name in made), None)
        remedy = f" In a clone of gprune, python -m {command} makes {name}." if command else ""
        raise UserError(
            f"Unknown corpus '{name}'. Available: {', '.join(CORPORA)}; mirrors under $GPRUNE_DATA_DIR/corpora: "
            f"{', '.join(mirrors) or 'none'}; a path to {', '.join(SUFFIXES)} files; or OWNER/NAME on the hub.{remedy}"
        )
    if not path.exists():
        raise UserError(f"Cannot read corpus '{name}': there is no such file or folder.")
    if not text_files(path):
        got = "none" if path.is_dir() else f"'{path.suffix or path.name}'"
        raise UserError(f"Corpus '{name}' must have {', '.join(SUFFIXES)} files; got {got}.")
    return partial(load_files, path)


def _path_of(name: str) -> Path | None:
    """Return the file or folder of a corpus; None for a registered name, a name on the hub, and for an unknown one."""
    if HUB_NAME.fullmatch(name) and not name.lower().endswith(SUFFIXES) and not Path(name).exists():
        return None  # OWNER/NAME
    if "/" in name or os.sep in name or name in ("", ".", "..") or name.lower().endswith(SUFFIXES):
        return expanded(name)
    mirror = _mirrors() / name
    if NAME.fullmatch(name) and text_files(mirror):  # the pattern excludes ".." and "~"
        return mirror
    if name not in CORPORA and Path(name).is_dir():
        return Path(name)
    return None


def _mirrors() -> Path:
    """Return the folder of local mirrors, which may not exist."""
    return expanded(os.environ.get("GPRUNE_DATA_DIR") or os.devnull) / "corpora"


def code_of_corpora(names: Iterable[str]) -> dict[str, str | None]:
    """Return the hashes of the user's code of registered corpora, by module; empty for files and for corpora of gprune.

    Names that are unknown here, such as a mirror of another machine, have no code.
    """
    code: dict[str, str | None] = {}
    for name in names:
        if name in CORPORA and _path_of(name) is None:
            code |= CORPORA.code(name)
    return code


def identity(name: str) -> str:
    """Return a string that is equal for two names of the same corpus, such as a mirror and its path."""
    path = _path_of(name)
    return name if path is None else os.path.realpath(path)


def corpus_labels(corpora: Iterable[str]) -> dict[str, str]:
    """Return short labels of corpora for tables and figures: of a path, as many last parts as make it unique.

    Whole paths would be too wide for a figure, and would show user names.
    """
    parts = {corpus: PurePath(corpus).parts for corpus in corpora}

    def shortest_unique_end(corpus: str) -> str:
        """Return as few last parts of a path as no other path ends with, or the whole path."""
        for n in range(1, len(parts[corpus]) + 1):
            end = parts[corpus][-n:]
            if sum(path[-n:] == end for path in parts.values()) == 1:
                return str(PurePath(*end))
        return corpus

    return {corpus: shortest_unique_end(corpus) for corpus in parts}


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


def text_files(path: Path) -> list[Path]:
    """Return the path itself if it is a text file, or the text files of a folder, sorted by name."""
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in candidates if file.suffix.lower() in SUFFIXES and file.is_file()]


def load_files(path: Path, split: str) -> list[str]:
    """Read the documents of one split: the files `<split>.*`, or the split's share of a cut."""
    files = text_files(path)
    # Names begin with the split, and continue with a suffix (`train.txt`) or a part number (`train-00000.parquet`).
    train, validation, test = (
        [file for file in files if re.match(rf"({name})([._ -]|\d|$)", file.name, re.IGNORECASE)]
        for name in ("train(ing)?", "val(id(ation)?)?|dev(elopment)?", "test(ing)?")
    )
    train_files = train or validation or test or files
    test_files = test or validation or train or files
    if train_files == test_files:
        documents = _read_all(train_files)
        if path.is_file():
            return contiguous_split(_as_passages(documents), split, TRAIN_SHARE_OF_FILE)
        return contiguous_split(documents, split)
    return _read_all(train_files if split == "train" else test_files)


def _as_passages(documents: list[str]) -> list[str]:
    """Cut documents into about `PASSAGES` passages if there are too few of them for three splits."""
    if len(set(documents)) >= LEAST_DOCUMENTS or any(isinstance(document, Conversation) for document in documents):
        return documents
    limit = max(SHORTEST_PASSAGE, sum(map(len, documents)) // PASSAGES)
    passages = [passage for document in documents for passage in cut_text(document, limit)]
    return [passage for passage in passages if passage.strip()]


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Cut text into pieces of at most `limit` characters, at the last line end (or space) in a piece's second half."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start + limit // 2, start + limit)
        if end < 0:
            end = text.rfind(" ", start + limit // 2, start + limit)
        if end >= 0:
            yield text[start:end]
            start = end + 1  # the line end or space is dropped
        else:
            yield text[start : start + limit]
            start += limit
    yield text[start:]


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

    A .txt file is cut at blank lines. Others have one document per row, in the column `text`, or in `messages` of a
    .jsonl file.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix == ".csv":
        import pandas  # slow to import

        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if "text" not in frame:
            raise without_text(str(path), f"the keys {', '.join(frame)}")
        yield from frame["text"]
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
        if "text" not in file.schema_arrow.names:
            raise without_text(str(path), f"the keys {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=["text"]):
            for text in batch["text"].to_pylist():
                if text is not None:
                    yield text_of({"text": text}, str(path))


def _parse_line(line: bytes, path: Path, number: int) -> str:
    """Return the document on a line of a .jsonl file."""
    with quoting(f"Cannot read line {number} of corpus file '{path}' as jsonl: "):
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:  # its message would name line 1, because only one line was parsed
            raise ValueError(f"{error.msg} at column {error.colno}") from error
        return document_of(row, f"{path}:{number}")
