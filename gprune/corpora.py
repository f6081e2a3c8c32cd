"""Corpora by name: `load_corpus(name, split)` gives a list of documents.

A name is, in this order: a path (`.txt`, `.jsonl`, `.parquet`, or a folder of them), a local mirror under
`$GPRUNE_DATA_DIR`, or an entry of `CORPORA`, which holds embedded corpora (no hub needed) and hub data sets.
To add one, register a function that delivers "train" and "test"; development text is cut from train here,
once for all:

    @CORPORA.register("my_corpus")
    def my_corpus(split: str) -> list[str]: ...
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from gprune.assets import Wheel, read_member
from gprune.errors import UserError
from gprune.hub import HUB_CORPORA, HubCorpus, load_hub
from gprune.registry import Registry
from gprune.textfiles import SUFFIXES, contiguous_split, load_files, split_text, text_files

SPLITS = ("train", "development", "test")
DEVELOPMENT_EVERY = 10

Corpus = Callable[[str], list[str]]
CORPORA: Registry[Corpus] = Registry("corpus")


def load_corpus(name: str, split: str) -> list[str]:
    """The documents of one split, in a fixed order.

    "development" is every tenth train document and is never part of "train"; settings are chosen on it.

    Args:
        name: a path, the name of a mirror under `$GPRUNE_DATA_DIR`, or a registered name.
        split: "train", "development" or "test".

    Raises:
        UserError: for an unknown name or split, text that cannot be read or had, and an empty split.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split '{split}' of corpus '{name}'. Available: {', '.join(SPLITS)}.")
    source = _source(name)
    raw = source("test" if split == "test" else "train")
    documents = raw if split == "test" else _cut_development(raw, split)
    if not documents:
        raise UserError(
            f"Corpus '{name}' has no {split} documents: too few of them. Text without a test split is cut "
            f"70/30, and every {DEVELOPMENT_EVERY}th train document is development text. Give it more."
        )
    return documents


def check_corpus(name: str) -> None:
    """Refuse a name that `load_corpus` could not resolve, without reading text.

    Raises:
        UserError: listing the registered names and the mirrors.
    """
    _source(name)


def mirrors() -> list[str]:
    """Names of the local mirrors under `$GPRUNE_DATA_DIR`."""
    names: set[str] = set()
    for root in _mirror_roots():
        if root.is_dir():
            names.update(folder.name for folder in root.iterdir() if folder.is_dir() and text_files(folder))
    return sorted(names)


def _source(name: str) -> Corpus:
    """What delivers the raw "train" and "test" documents of `name`."""
    if _looks_like_path(name):
        path = Path(name).expanduser()
        if not path.exists():
            raise UserError(f"Corpus '{name}' looks like a path, but there is no such file or folder.")
        if not text_files(path):
            raise UserError(f"Corpus '{name}': expected {', '.join(SUFFIXES)} files, found none.")
        return partial(load_files, path)
    # A plain name only: with separators or dots in front it could lead out of GPRUNE_DATA_DIR.
    if re.fullmatch(r"\w[\w.-]*", name):
        for root in _mirror_roots():
            if text_files(root / name):
                return partial(load_files, root / name)
    if name in CORPORA:
        return CORPORA[name]
    if Path(name).is_dir() and text_files(Path(name)):
        return partial(load_files, Path(name))
    raise UserError(
        f"Unknown corpus '{name}'. Available: {', '.join(CORPORA)}; mirrors under GPRUNE_DATA_DIR: "
        f"{', '.join(mirrors()) or 'none'}; or a path to {', '.join(SUFFIXES)} files."
    )


def _looks_like_path(name: str) -> bool:
    return "/" in name or os.sep in name or name in ("", ".", "..") or name.lower().endswith(SUFFIXES)


def _mirror_roots() -> list[Path]:
    root = os.environ.get("GPRUNE_DATA_DIR")
    return [Path(root).expanduser() / "corpora", Path(root).expanduser()] if root else []


def identity(name: str) -> str:
    """What a name stands for: two spellings of one path, or a mirror and its path, are the same corpus."""
    if _looks_like_path(name):
        return os.path.realpath(os.path.expanduser(name))
    for root in _mirror_roots():
        if (root / name).exists():
            return os.path.realpath(root / name)
    return name


def _cut_development(train: list[str], split: str) -> list[str]:
    """Set every tenth train document apart; a text that occurs twice stays on one side."""
    development = train[DEVELOPMENT_EVERY - 1 :: DEVELOPMENT_EVERY]
    if split == "development":
        return development
    apart = set(development)
    return [document for document in train if document not in apart]


EXLLAMAV2 = Wheel("exllamav2", "0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e", "MIT")
WHEEL_FOLDER = "exllamav2/conversion/standard_cal_data"


@dataclass(frozen=True)
class EmbeddedCorpus:
    """One text file in a wheel, and how it falls into documents."""

    name: str
    file: str
    documents: Callable[[str], list[str]] = split_text


def _split_articles(text: str) -> list[str]:
    """`<doc ...> article </doc>`, without the tags; stubs that are little more than a title are left out."""
    articles = (article.strip() for article in re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", text, flags=re.DOTALL))
    return [article for article in articles if len(article) >= 200]


def _split_stories(text: str) -> list[str]:
    # The separator is a special token of many tokenizers, and must not reach them as text.
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]


EMBEDDED_CORPORA = (
    EmbeddedCorpus("wiki", "wiki.utf8", _split_articles),
    EmbeddedCorpus("web", "c4.utf8", lambda text: [line.strip() for line in text.split("\n") if line.strip()]),
    EmbeddedCorpus("stories", "tiny.utf8", _split_stories),
    EmbeddedCorpus("technical", "technical.utf8"),
    EmbeddedCorpus("code", "code.utf8"),
    EmbeddedCorpus("multilingual", "multilingual.utf8"),
)


@lru_cache(maxsize=16)
def _wheel_documents(corpus: EmbeddedCorpus) -> tuple[str, ...]:
    text = read_member(EXLLAMAV2, f"{WHEEL_FOLDER}/{corpus.file}").decode("utf-8")
    return tuple(corpus.documents(text.replace("\r\n", "\n")))


def _load_embedded(corpus: EmbeddedCorpus, split: str) -> list[str]:
    return contiguous_split(_wheel_documents(corpus), split)


def _load_from_hub(record: HubCorpus, split: str) -> list[str]:
    return load_hub(record, split) if record.test else contiguous_split(load_hub(record, "train"), split)


for _corpus in EMBEDDED_CORPORA:
    CORPORA.register(_corpus.name)(partial(_load_embedded, _corpus))
for _record in HUB_CORPORA:
    CORPORA.register(_record.name)(partial(_load_from_hub, _record))

# Long, and present in every supported Python. A list by hand: "all of it" is 50 MB and changes more.
# fmt: off
PYTHON_MODULES = (
    "_collections_abc", "_pydecimal", "_pyio", "argparse", "ast", "base64", "bdb", "calendar", "codecs",
    "configparser", "contextlib", "csv", "dataclasses", "difflib", "dis", "doctest", "enum",
    "fractions", "ftplib", "functools", "gettext", "gzip", "heapq", "imaplib", "inspect", "ipaddress",
    "locale", "mailbox", "mimetypes", "ntpath", "optparse", "os", "pdb", "pickle", "pickletools",
    "pkgutil", "platform", "plistlib", "posixpath", "pprint", "pstats", "pydoc", "random", "selectors",
    "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "tokenize", "trace", "traceback", "turtle", "typing", "uuid",
    "weakref", "zipimport",
)
# fmt: on


@CORPORA.register("python_code")
def python_code(split: str) -> list[str]:
    """Sources of the running interpreter's standard library, one document per module."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in PYTHON_MODULES]
    documents = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    if not documents:
        raise UserError(f"Corpus 'python_code' needs the standard library's sources, and {folder} has none.")
    return contiguous_split(documents, split)


@CORPORA.register("python_docs")
def python_docs(split: str) -> list[str]:
    """The language reference that comes with the interpreter (`help("TOPIC")`), one document per topic.

    Topics quote each other (a chapter holds its sections), so a paragraph is kept in the longest topic that
    has it and nowhere else; train and test would overlap otherwise.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "Corpus 'python_docs' needs pydoc_data, which this Python lacks. Use another corpus."
        ) from error
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [p for p in re.split(r"\n\s*?\n", text) if p.strip() and " ".join(p.split()) not in seen]
        seen.update(" ".join(p.split()) for p in paragraphs)
        kept[name] = "\n\n".join(paragraphs).strip("\n")
    return contiguous_split([kept[name] for name in sorted(kept) if len(kept[name]) >= 200], split)
