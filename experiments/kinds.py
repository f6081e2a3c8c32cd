"""Corpora of many kinds, made from clones of public repositories: for choosing, for unseen text, and for mixtures.

    python -m experiments.kinds --clones clones --output data && export GPRUNE_DATA_DIR=data

`--clones` is a folder with a clone of every repository in `KINDS`, each named like the repository; for a clone that is
missing, an error has the command that makes it. A repository is read at a fixed commit, so that everybody has the same
text. Writes `corpora/NAME/text.jsonl`, with an object with the key `text` per line, and prints what was written. The
first 70 % of the documents of a corpus are its train split, the others its test split (`gprune.corpora.load`). Kinds
for choosing settings and kinds of unseen text have no repository in common, except that documents of different genres
come from the corpus GUM. Languages for calibration are parts of `MIXTURES`, which also need `c4` and `code_github` in
the folder (`python -m experiments.corpora --output data` writes them). German is in no mixture.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from experiments.corpora import mix, write
from gprune.console import Parser, run_guarded
from gprune.corpora.hub import TREEBANKS, join_sentences
from gprune.corpora.load import split_text
from gprune.errors import UserError
from gprune.report.tables import Table
from gprune.storage.paths import expanded

GUM = ("UniversalDependencies/UD_English-GUM", "afb41ee9bca57991125814fa04d96a0e61470c8b")
TEI = "{http://www.tei-c.org/ns/1.0}"
LAW = "{https://code.dccouncil.us/schemas/dc-library}"


@dataclass(frozen=True)
class Kind:
    """A kind of text: the files of a repository that have it, and how they become documents."""

    repository: str
    commit: str
    files: str  # regular expression of paths
    read: Callable[[str], list[str]]  # content of a file -> documents
    licence: str
    purpose: str = "unseen"  # or "choosing" settings, or "calibration": a part of mixtures


def _sentences(conllu: str) -> list[str]:
    """Return the sentences of a treebank in CoNLL-U format."""
    return re.findall(r"^# text = (.+)$", conllu, re.MULTILINE)


def treebank_document(conllu: str) -> list[str]:
    """Return a file of a treebank as one document."""
    return [" ".join(_sentences(conllu))]


def treebank(conllu: str) -> list[str]:
    """Return documents of neighbouring sentences."""
    return join_sentences(conllu.split("\n"))  # not at other line ends, which sentences may have


def abstracts_of_medicine(content: str) -> list[str]:
    """Return the abstracts of PubMedQA."""
    return ["\n".join(article["CONTEXTS"]) for article in json.loads(content).values()]


def abstracts_of_papers(content: str) -> list[str]:
    """Return the abstracts of SciTLDR."""
    return [" ".join(json.loads(line)["source"]) for line in content.splitlines()]


def play(content: str) -> list[str]:
    """Return the scenes of a play in TEI format: the speaker on a line, then the speech."""
    scenes = []
    for scene in ElementTree.fromstring(content).iter(f"{TEI}div"):
        speeches = []
        for speech in scene.findall(f"{TEI}sp"):
            lines = (" ".join("".join(line.itertext()).split()) for line in speech)
            speeches.append("\n".join(line for line in lines if line))
        scenes.append("\n\n".join(speeches))
    return [scene for scene in scenes if scene]


def law(content: str) -> list[str]:
    """Return a law in pieces of about 2,000 characters."""
    root = ElementTree.fromstring(content)
    for meta in root.findall(f"{LAW}meta"):
        root.remove(meta)
    paragraphs = (" ".join("".join(text.itertext()).split()) for text in root.iter(f"{LAW}text"))
    return split_text("\n\n".join(filter(None, paragraphs)))


def _genre(name: str, licence: str, purpose: str = "unseen") -> Kind:
    """Return a genre of GUM."""
    return Kind(*GUM, rf"not-to-release/sources/GUM_{name}_.*\.conllu", treebank_document, licence, purpose)


KINDS = {
    "news": _genre("news", "CC BY"),
    "interviews": _genre("interview", "CC BY"),
    "conversation": _genre("conversation", "CC BY"),
    "fiction": _genre("fiction", "CC BY-NC-SA"),
    "speeches": _genre("speech", "public domain"),
    "travel": _genre("voyage", "CC BY"),
    "medicine": Kind(
        "pubmedqa/pubmedqa", "1cbae8e92f72f20c8d3747cbb3bf5bc53554d997", r"data/ori_pqal\.json", abstracts_of_medicine,
        "MIT",
    ),
    "papers": Kind(
        "allenai/scitldr", "5ccad9c00a60ad75c9e04abf7f27d0f53f983b20", r"SciTLDR-Data/SciTLDR-A/(dev|test)\.jsonl",
        abstracts_of_papers, "Apache-2.0",
    ),
    "drama": Kind(
        "dracor-org/shakedracor", "1146c6ce9e6cd251006f748f925eef4c817ecc7c", r"tei/.*\.xml", play, "CC BY-NC 3.0"
    ),
    "law": Kind(
        "DCCouncil/law-xml", "9123af018003a6666851734d92eb3a81862a0f33", r"us/dc/council/periods/24/laws/.*\.xml", law,
        "public domain",
    ),
    "rust": Kind(
        "BurntSushi/ripgrep", "3fce3b5bb0236da2df6d99672afb8a719642eca7", r"crates/.*\.rs", split_text, "MIT"
    ),
    "german": Kind(
        "UniversalDependencies/UD_German-GSD", "297fcf350481058d0737a27f0f8fd03b2eadd67a", r"de_gsd-ud-test\.conllu",
        treebank, "CC BY-SA 4.0",
    ),
    "howto": _genre("whow", "CC BY-NC-SA", "choosing"),
    "biography": _genre("bio", "CC BY", "choosing"),
    "essays": _genre("essay", "CC BY-NC-SA", "choosing"),
    "letters": _genre("letter", "CC BY-NC-SA", "choosing"),
    "podcasts": _genre("podcast", "CC BY-NC-SA", "choosing"),
    "vlogs": _genre("vlog", "CC BY", "choosing"),
    "court": _genre("court", "CC BY-NC-SA", "choosing"),
    "textbooks": _genre("textbook", "CC BY", "choosing"),
    "c": Kind(
        "DaveGamble/cJSON", "a29814f285cc531c00223743ad3c55cd38c0dc56", r"[^/]+\.[ch]", split_text, "MIT", "choosing"
    ),
    "french": Kind(
        "UniversalDependencies/UD_French-GSD", "830e2782304af08b3cc1c9250475343e04274d81", r"fr_gsd-ud-test\.conllu",
        treebank, "CC BY-SA 4.0", "choosing",
    ),
}  # fmt: skip
KINDS |= {  # languages for mixtures of calibration text
    name: Kind(of.repository, of.commit, "|".join(map(re.escape, of.files)), treebank, of.licence, "calibration")
    for name, of in TREEBANKS.items()
}
UNSEEN, CHOOSING, CALIBRATION = (
    [name for name, kind in KINDS.items() if kind.purpose == purpose]
    for purpose in ("unseen", "choosing", "calibration")
)

# Most characters of each corpus in a mixture; None for all. By SmolLM2's tokens of train text, 83 % of what is not in a
# language is C4 and 17 % is code. The number in a name is the percentage of other languages.
ROMANCE = ("spanish", "italian", "portuguese")
MIXTURES: dict[str, dict[str, int | None]] = {
    "c4_code_5": {"c4": None, "code_github": 350_000, **dict.fromkeys(ROMANCE, 26_000)},
    "c4_code_10": {"c4": None, "code_github": 350_000, **dict.fromkeys(ROMANCE, 55_000)},
    "c4_code_25": {"c4": 1_680_000, "code_github": 300_000, **dict.fromkeys(ROMANCE)},
    "c4_code_25_spanish": {"c4": 675_000, "code_github": 123_000, "spanish": None},
    "c4_code_25_russian": {"c4": 840_000, "code_github": 155_000, "russian": None},
    "c4_code_25_four": {"c4": 1_320_000, "code_github": 243_000, **dict.fromkeys(ROMANCE, 84_000), "russian": 40_000},
}


def documents_of(kind: Kind, clones: Path) -> list[str]:
    """Return the distinct documents of a kind, in the order of the paths of their files.

    Raises:
        UserError: if the clone is missing, or does not have the commit.
    """
    clone = clones / kind.repository.partition("/")[2]
    if not clone.is_dir():
        raise UserError(
            f"--clones must have a clone of {kind.repository}; '{clone}' does not exist. Make it: "
            f"git clone https://github.com/{kind.repository} {clone}"
        )
    paths = _git(clone, kind, "ls-tree", "-r", "--name-only", kind.commit).splitlines()
    documents = []
    for path in sorted(path for path in paths if re.fullmatch(kind.files, path)):
        documents += kind.read(_git(clone, kind, "show", f"{kind.commit}:{path}"))
    return list(dict.fromkeys(documents))


def _git(clone: Path, kind: Kind, *arguments: str) -> str:
    """Return the output of a git command in a clone. Raise UserError if the commit is missing."""
    result = subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True)
    if result.returncode:
        raise UserError(
            f"'{clone}' must be a clone of {kind.repository} with the commit {kind.commit[:12]}. Run `git fetch "
            f"--unshallow` there."
        )
    return result.stdout.decode("utf-8")


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.kinds", description=__doc__)
    parser.add_argument("--clones", metavar="FOLDER", required=True, help="folder with clones of the repositories")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for $GPRUNE_DATA_DIR")
    options = parser.parse_args(arguments)
    clones, folder = expanded(options.clones), expanded(options.output)
    documents = {name: documents_of(kind, clones) for name, kind in KINDS.items()}
    rows = []
    for name, texts in documents.items():
        write(folder, name, {"text": texts})
        kind = KINDS[name]
        rows.append([name, kind.purpose, kind.repository, kind.licence, len(texts), sum(map(len, texts))])
    for name, parts in MIXTURES.items():
        for part in ("c4", "code_github"):
            if not (folder / "corpora" / part).is_dir():
                raise UserError(
                    f"--output must have the corpus {part} for mixtures; '{folder / 'corpora' / part}' does not exist. "
                    f"Make it: python -m experiments.corpora --output {options.output}"
                )
        write(folder, name, mix(folder, parts))
    columns = ["corpus", "for", "repository", "licence", "documents", "characters"]
    return f"\n{Table('kinds', 'Kinds of text', columns, rows).for_stdout()}\n"


def main() -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.kinds", work)


if __name__ == "__main__":
    sys.exit(main())
