"""Load a corpus by name: `load_corpus(name, split)` gives a list of documents.

A name is, in this order: a path (`.txt`, `.jsonl`, `.parquet`, or a folder of them), a local mirror in
`$GPRUNE_DATA_DIR/corpora`, or an entry of `CORPORA`, which holds embedded corpora (no hub needed) and hub data sets. To
add a corpus, register a function that returns the documents of "train" and "test"; development text is cut from train:

    @CORPORA.register("my_corpus")
    def my_corpus(split: str) -> list[str]: ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePath

from gprune.corpora.local import SUFFIXES, load_files, text_files
from gprune.errors import UserError, one_line
from gprune.registry import NAME, Registry
from gprune.storage.reading import expanded

SPLITS = ("train", "development", "test")
DEVELOPMENT_EVERY = 10
DOWNLOADED = ("code_github", "stackexchange")  # of `experiments/protocol.yaml`, and in no registry

Corpus = Callable[[str], list[str]]
CORPORA: Registry[Corpus] = Registry("corpus")


def read_corpus(name: str, half: str) -> list[str]:
    """The documents of "train", development text included, or of "test"; a UserError for what is no list of text."""
    source = source_of(name)
    with CORPORA.running(name):
        documents = source(half)
    if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
        raise UserError(f"Corpus '{name}': expected a list of documents, each a str, got {documents!r:.80}.")
    return documents


def load_corpus(name: str, split: str, *, read: Callable[[str, str], list[str]] = read_corpus) -> list[str]:
    """The documents of one split, in a fixed order.

    Settings are chosen on "development": every tenth document of the train text, which "train" then lacks.

    Args:
        read: `read_corpus`, or what keeps its results, so that both splits of a train text come from one reading.

    Raises:
        UserError: for an unknown name or split, text that cannot be read or had, and an empty split.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split '{split}' of corpus '{name}'. Available: {', '.join(SPLITS)}.")
    documents = read(name, "test" if split == "test" else "train")
    if split != "test":
        development = documents[DEVELOPMENT_EVERY - 1 :: DEVELOPMENT_EVERY]
        apart = set(development)
        documents = development if split == "development" else [d for d in documents if d not in apart]
    if not documents:
        cut = f"Text without a test split is cut 70/30, and every {DEVELOPMENT_EVERY}th train document is development"
        raise UserError(f"Corpus '{name}' has no {split} documents: too few of them. {cut} text. Give it more.")
    return documents


def source_of(name: str) -> Corpus:
    """The function that returns the "train" or "test" documents of `name`, development text included.

    Reads no text. Raises UserError for a name that stands for nothing.
    """
    place = _place(name)
    if place is None and name in CORPORA:
        return CORPORA[name]
    if place is None:
        mirrors = sorted(folder.name for folder in _mirrors().glob("*") if text_files(folder))
        raise UserError(
            f"Unknown corpus '{name}'. Available: {', '.join(CORPORA)}; mirrors under $GPRUNE_DATA_DIR/corpora: "
            f"{', '.join(mirrors) or 'none'}; or a path to {', '.join(SUFFIXES)} files."
            + (f" In a clone, python -m experiments.corpora downloads {name}." if name in DOWNLOADED else "")
        )
    if not place.exists():
        raise UserError(f"Corpus '{name}' looks like a path, but there is no such file or folder.")
    if not text_files(place):
        raise UserError(f"Corpus '{name}': expected {', '.join(SUFFIXES)} files, found none.")
    return partial(load_files, place)


def _place(name: str) -> Path | None:
    """The file or folder that a name stands for; None for a registered name, and for one that stands for nothing."""
    if "/" in name or os.sep in name or name in ("", ".", "..") or name.lower().endswith(SUFFIXES):
        return expanded(name)
    if NAME.fullmatch(name) and text_files(_mirrors() / name):  # no "..", nor "~"
        return _mirrors() / name
    return Path(name) if name not in CORPORA and Path(name).is_dir() else None


def _mirrors() -> Path:
    """The folder of mirrors, which may not be there."""
    return expanded(os.environ.get("GPRUNE_DATA_DIR") or os.devnull) / "corpora"


def identity(name: str) -> str:
    """The same string for two names of one corpus, such as two spellings of a path, or a mirror and its path."""
    place = _place(name)
    return name if place is None else os.path.realpath(place)


def corpus_labels(corpora: Iterable[str]) -> dict[str, str]:
    """What tables and figures call corpora: a path by its last part, and by as many more as tell it from the others.

    Whole paths would squeeze a figure to nothing, and say whose machine it was.
    """
    parts = {corpus: PurePath(corpus).parts for corpus in corpora}

    def unique_ends(own: tuple[str, ...]) -> Iterator[str]:
        for n in range(1, len(own) + 1):
            if sum(other[-n:] == own[-n:] for other in parts.values()) == 1:
                yield str(PurePath(*own[-n:]))

    return {corpus: one_line(next(unique_ends(own), corpus)) for corpus, own in parts.items()}
