"""Load a corpus by name: `load_corpus(name, split)` returns a list of documents.

A name is looked up, in this order, as a path (`.txt`, `.jsonl`, `.parquet`, or a folder of them), as a local mirror in
`$GPRUNE_DATA_DIR/corpora`, and in `CORPORA`, which has embedded corpora (no hub needed) and hub data sets. To add a
corpus, register a function that returns the documents of "train" and "test"; development text is taken from train:

    @CORPORA.register("my_corpus")
    def my_corpus(split: str) -> list[str]: ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePath

from gprune.corpora.local import SUFFIXES, load_files, text_files
from gprune.errors import UserError
from gprune.registry import NAME, Registry
from gprune.storage.reading import expanded

SPLITS = ("train", "development", "test")
DEVELOPMENT_EVERY = 10
DOWNLOADED = ("code_github", "stackexchange")  # corpora of `experiments/protocol.yaml` that are not registered

Corpus = Callable[[str], list[str]]
CORPORA: Registry[Corpus] = Registry("corpus")


def read_corpus(name: str, split: str) -> list[str]:
    """Read all documents of a corpus for `split`: "train", which includes development text, or "test"."""
    documents = source_of(name)(split)
    if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
        raise UserError(f"Corpus '{name}' must be a list of documents of type str; got {documents!r:.80}.")
    return documents


def load_corpus(name: str, split: str, *, read: Callable[[str, str], list[str]] = read_corpus) -> list[str]:
    """Load the documents of one split, in a fixed order.

    The split "development", for tuning, is every tenth document of the train text; "train" has the others.
    """
    if split not in SPLITS:
        raise UserError(f"Corpus '{name}': Unknown split '{split}'. Available: {', '.join(SPLITS)}.")
    documents = read(name, "test" if split == "test" else "train")
    if split != "test":
        development = documents[DEVELOPMENT_EVERY - 1 :: DEVELOPMENT_EVERY]
        if split == "development":
            documents = development
        else:
            excluded = set(development)  # also removes repetitions of a development document
            documents = [document for document in documents if document not in excluded]
    if not documents:
        cut = f"Text without a test split is cut 70/30, and every {DEVELOPMENT_EVERY}th train document is development"
        raise UserError(f"Corpus '{name}' needs more documents: its split {split} is empty. {cut} text.")
    return documents


def source_of(name: str) -> Corpus:
    """Return the function that reads the "train" or "test" documents of a corpus. No text is read here."""
    path = _path_of(name)
    if path is None and name in CORPORA:
        return CORPORA[name]
    if path is None:
        mirrors = sorted(folder.name for folder in _mirrors().glob("*") if text_files(folder))
        remedy = f" In a clone, python -m experiments.corpora downloads {name}." if name in DOWNLOADED else ""
        raise UserError(
            f"Unknown corpus '{name}'. Available: {', '.join(CORPORA)}; mirrors under $GPRUNE_DATA_DIR/corpora: "
            f"{', '.join(mirrors) or 'none'}; or a path to {', '.join(SUFFIXES)} files.{remedy}"
        )
    if not path.exists():
        raise UserError(f"Cannot read corpus '{name}': there is no such file or folder.")
    if not text_files(path):
        raise UserError(f"Corpus '{name}' must have {', '.join(SUFFIXES)} files; got none.")
    return partial(load_files, path)


def _path_of(name: str) -> Path | None:
    """Return the file or folder of a corpus; None for a registered name and for an unknown one."""
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
