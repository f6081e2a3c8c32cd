"""Load a corpus by name: `load_corpus(name, split)` gives a list of documents.

A name is, in this order: a path (`.txt`, `.jsonl`, `.parquet`, or a folder of them), a local mirror under
`$GPRUNE_DATA_DIR`, or an entry of `CORPORA`, which holds embedded corpora (no hub needed) and hub data sets. To add a
corpus, register a function that returns the documents of "train" and "test"; development text is cut from train here:

    @CORPORA.register("my_corpus")
    def my_corpus(split: str) -> list[str]: ...
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from gprune.corpora.local import SUFFIXES, load_files, text_files
from gprune.errors import UserError
from gprune.registry import Registry
from gprune.storage.reading import expanded

SPLITS = ("train", "development", "test")
DEVELOPMENT_EVERY = 10

Corpus = Callable[[str], list[str]]
CORPORA: Registry[Corpus] = Registry("corpus", called=True)


def load_corpus(name: str, split: str) -> list[str]:
    """The documents of one split, in a fixed order.

    Settings are chosen on "development": every tenth document of the train text, which "train" then lacks.

    Args:
        name: a path, the name of a mirror under `$GPRUNE_DATA_DIR`, or a registered name.
        split: "train", "development" or "test".

    Raises:
        UserError: for an unknown name or split, text that cannot be read or had, and an empty split.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split '{split}' of corpus '{name}'. Available: {', '.join(SPLITS)}.")
    raw = documents_of(_source(name)("test" if split == "test" else "train"), name)
    documents = raw if split == "test" else _cut_development(raw, split)
    if not documents:
        raise UserError(
            f"Corpus '{name}' has no {split} documents: too few of them. Text without a test split is cut "
            f"70/30, and every {DEVELOPMENT_EVERY}th train document is development text. Give it more."
        )
    return documents


def documents_of(returned: Any, name: str) -> list[str]:
    """What the function of a corpus returned, as a list of documents.

    Raises:
        UserError: for one string, whose letters would be documents, and for documents that are no strings.
    """
    if isinstance(returned, str | bytes) or not isinstance(returned, Iterable):
        raise _no_documents(name, type(returned).__name__)
    documents = list(returned)
    if wrong := next((type(d).__name__ for d in documents if not isinstance(d, str)), None):
        raise _no_documents(name, f"one of {wrong}")
    return documents


def _no_documents(name: str, got: str) -> UserError:
    return UserError(f"Corpus '{name}': expected a list of documents, each a str, got {got}.")


def check_corpus(name: str) -> None:
    """Raise a UserError for a name that `load_corpus` cannot resolve, without reading text."""
    _source(name)


def mirrors() -> list[str]:
    """Names of the local mirrors under `$GPRUNE_DATA_DIR`."""
    folders = [folder for root in _mirror_roots() if root.is_dir() for folder in root.iterdir() if folder.is_dir()]
    return sorted({folder.name for folder in folders if text_files(folder)})


def _source(name: str) -> Corpus:
    """The function that returns the "train" or "test" documents of `name`, development text included."""
    place = _place(name)
    if place is None and name in CORPORA:
        return CORPORA[name]
    if place is None:
        raise UserError(
            f"Unknown corpus '{name}'. Available: {', '.join(CORPORA)}; mirrors under GPRUNE_DATA_DIR: "
            f"{', '.join(mirrors()) or 'none'}; or a path to {', '.join(SUFFIXES)} files."
        )
    if not place.exists():
        raise UserError(f"Corpus '{name}' looks like a path, but there is no such file or folder.")
    if not text_files(place):
        raise UserError(f"Corpus '{name}': expected {', '.join(SUFFIXES)} files, found none.")
    return partial(load_files, place)


def _place(name: str) -> Path | None:
    """The file or folder that a name stands for; None for a registered name, and for one that stands for nothing."""
    if _looks_like_path(name):
        return expanded(name)
    if (mirror := _mirror(name)) is not None or name in CORPORA:
        return mirror
    return Path(name) if Path(name).is_dir() else None


def _looks_like_path(name: str) -> bool:
    return "/" in name or os.sep in name or name in ("", ".", "..") or name.lower().endswith(SUFFIXES)


def _mirror_roots() -> list[Path]:
    root = os.environ.get("GPRUNE_DATA_DIR")
    return [expanded(root) / "corpora", expanded(root)] if root else []


def _mirror(name: str) -> Path | None:
    """The folder with text under `$GPRUNE_DATA_DIR` that a name stands for."""
    # Only a plain name: with separators, or dots in front, it could lead out of GPRUNE_DATA_DIR.
    plain = re.fullmatch(r"\w[\w.-]*", name)
    return next((root / name for root in _mirror_roots() if plain and text_files(root / name)), None)


def identity(name: str) -> str:
    """The same string for two names of one corpus, such as two spellings of a path, or a mirror and its path."""
    place = _place(name)
    return name if place is None else os.path.realpath(place)


def _cut_development(train: list[str], split: str) -> list[str]:
    """Every tenth train document as "development", or the others without copies of those as "train"."""
    development = train[DEVELOPMENT_EVERY - 1 :: DEVELOPMENT_EVERY]
    if split == "development":
        return development
    apart = set(development)
    return [document for document in train if document not in apart]
