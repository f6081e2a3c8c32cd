"""Download the corpora of the standard protocol, and check that they have the text of the committed records.

    python -m experiments.corpora --output data && export GPRUNE_DATA_DIR=data

Writes `corpora/NAME/train.jsonl` and `test.jsonl` for wikitext2, c4, code_github, stackexchange and gsm8k, with an
object with the key `text` per line. Documents are loaded with the `datasets` library: WikiText-2 (raw) and GSM8K from
the Hugging Face hub, the others from the samples of RedPajama in the repository of LLM-Shearing. Mixtures of these
corpora with unequal shares (`MIXTURES`) are written too. The check makes the same windows as the records in
`experiments/lists/records`, and compares their hashes: equal hashes mean equal tokens. It needs the tokenizer of
SmolLM2, so it downloads the embedded model if it is not cached. `--check` checks an existing folder, and makes mixtures
that are missing.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gprune.console import Parser, quiet, run_guarded
from gprune.corpora.hub import SHEARING, hub_errors, offline_if_unreachable
from gprune.corpora.load import load_corpus, read_corpus
from gprune.corpora.windows import Sample, make_windows
from gprune.errors import UserError
from gprune.models.embedded import embedded_model_dir
from gprune.report.tables import Table
from gprune.storage.files import read_json, replacing
from gprune.storage.paths import expanded

RECORDS = Path(__file__).resolve().parent / "lists/records"
SPLITS = ("train", "test")
MODEL = "smollm2-135m"  # its tokenizer determines the hashes
TITLE = re.compile(r" = [^=\n]+ = \n")
MOST = 1_000_000  # bytes of WikiText-2's train text


@dataclass(frozen=True)
class Source:
    """Data set of a corpus, and the conversion of its rows to documents.

    Attributes:
        arguments: a function from the split to arguments of `datasets.load_dataset`.
        documents: a function from the rows' texts of the train and the test split to the documents of both splits.
        text: format string for the columns of a row.
    """

    arguments: Callable[[str], dict]
    documents: Callable[[list[str], list[str]], tuple[list[str], list[str]]]
    text: str = "{text}"


def distinct(train: list[str], test: list[str]) -> tuple[list[str], list[str]]:
    """Remove duplicates inside the splits, and documents of train from test."""
    train = list(dict.fromkeys(train))
    return train, [text for text in dict.fromkeys(test) if text not in set(train)]


def wikitext_articles(train: list[str], test: list[str]) -> tuple[list[str], list[str]]:
    """Articles of WikiText-2: the first megabyte of train without blank lines, and all of test with blank lines."""
    return _split_articles(_first_lines(train, MOST), ""), _split_articles(test, " \n")


def _first_lines(lines: Sequence[str], most: int) -> list[str]:
    """Return the first lines with at most `most` bytes in total."""
    size, kept = 0, []
    for line in lines:
        size += len(line.encode())
        if size > most:
            break
        kept.append(line)
    return kept


def _split_articles(lines: Sequence[str], blank: str) -> list[str]:
    """Split lines into articles, each from its title to the next title. Only the last article ends in a newline.

    A title is followed by a blank line. Formulas with the same pattern are not.
    """
    articles: list[list[str]] = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if TITLE.fullmatch(line) and not after.strip():
            articles.append([])
        if articles:
            articles[-1].append(line if line.strip() else blank)
    texts = ["".join(article) for article in articles]
    return [text.removesuffix("\n") for text in texts[:-1]] + texts[-1:]


def _shearing(name: str) -> Source:
    def arguments(split: str) -> dict:
        url = f"{SHEARING}/{name}/sample_{name}{1 + SPLITS.index(split)}.jsonl"
        return {"path": "json", "data_files": {split: url}, "split": split}

    return Source(arguments, distinct)


SOURCES = {
    "wikitext2": Source(
        lambda split: {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split}, wikitext_articles
    ),
    "c4": _shearing("c4-rp"),
    "code_github": _shearing("github"),
    "stackexchange": _shearing("stackexchange"),
    "gsm8k": Source(
        lambda split: {"path": "openai/gsm8k", "name": "main", "split": split}, lambda train, test: (train, test),
        "Question: {question}\nAnswer: {answer}",
    ),
}  # fmt: skip

# Most characters of each corpus in a mixture; None for all. By SmolLM2's tokens of train text, c4_code is 83 % C4 and
# 17 % code, and c4_code_wiki 76 % C4, 11 % code and 13 % WikiText-2.
MIXTURES: dict[str, dict[str, int | None]] = {
    "c4_code": {"c4": None, "code_github": 350_000},
    "c4_code_wiki": {"c4": None, "code_github": 260_000, "wikitext2": 380_000},
}


def mix(folder: Path, parts: Mapping[str, int | None]) -> dict[str, list[str]]:
    """Return the documents of a mixture by split, in the order of its parts."""
    documents: dict[str, list[str]] = {}
    for split in SPLITS:
        documents[split] = []
        for name, most in parts.items():
            texts = read_corpus(str(folder / "corpora" / name), split)
            documents[split] += texts if most is None else _first_characters(texts, most)
    return documents


def _first_characters(texts: Sequence[str], most: int) -> list[str]:
    """Return the first documents with `most` characters in total. The last one may be cut."""
    kept: list[str] = []
    left = most
    for text in texts:
        if left <= 0:
            break
        kept.append(text[:left])
        left -= len(text)
    return kept


def download(name: str) -> dict[str, list[str]]:
    """Download a corpus. Returns its documents by split.

    Raises:
        UserError: if the hub or the repository cannot be reached.
    """
    import datasets

    source = SOURCES[name]
    with (
        hub_errors(f"Corpus '{name}'", "its files into corpora/NAME of the folder, and add --check"),
        offline_if_unreachable(),
    ):
        rows = [
            [source.text.format(**row) for row in datasets.load_dataset(**source.arguments(split))] for split in SPLITS
        ]
    return dict(zip(SPLITS, source.documents(*rows), strict=True))


def write(folder: Path, name: str, documents: dict[str, list[str]]) -> None:
    """Write `corpora/NAME/<split>.jsonl`, replacing the folder of the corpus atomically."""
    with replacing(folder / "corpora" / name) as temporary:
        temporary.mkdir()
        for split, texts in documents.items():
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Recorded:
    """Windows of a record: their corpus, split, number, length and seed."""

    corpus: str
    split: str
    num_samples: int
    seq_len: int
    seed: int


def recorded(folder: Path = RECORDS) -> dict[Recorded, set[str]]:
    """Collect the hashes of all windows in the records of `MODEL`."""
    found: dict[Recorded, set[str]] = defaultdict(set)
    for path in sorted(folder.glob("*/*-seed*.json")):
        content = read_json(path)
        settings = content["settings"]
        if settings["model"]["name"] != MODEL:
            continue
        c, e = settings["corpora"], settings["evaluation"]
        for corpus in (*SOURCES, *MIXTURES):
            for role, what in (
                (f"{corpus} train", ("train", c["num_samples"], c["seq_len"], settings["run"]["seed"])),
                (f"{corpus} test evaluated", ("test", e["num_samples"], e["seq_len"], 0)),
            ):
                if role in content["inputs"]["text"]:
                    found[Recorded(corpus, *what)].add(content["inputs"]["text"][role])
    return found


def compare(folder: Path, expected: dict[Recorded, set[str]]) -> Iterator[tuple[Recorded, str, bool]]:
    """Hash the same windows of the folder's text. Yields windows, hash, and whether it is the only one in records."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir(MODEL))
    for what, hashes in expected.items():
        sample = Sample(what.num_samples, what.seq_len, what.seed)
        documents = load_corpus(str(folder / "corpora" / what.corpus), what.split)
        windows = make_windows(documents, tokenizer, sample, corpus=what.corpus, split=what.split)
        yield what, windows.content_hash, {windows.content_hash} == hashes


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.corpora", description=__doc__)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for $GPRUNE_DATA_DIR")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check an existing folder, download nothing, and make mixtures that are missing",
    )
    options = parser.parse_args(arguments)
    folder = expanded(options.output)
    if missing := [name for name in SOURCES if options.check and not (folder / "corpora" / name).is_dir()]:
        raise UserError(f"--check needs the corpus {missing[0]} in '{folder / 'corpora' / missing[0]}'.")
    quiet()
    for name in () if options.check else SOURCES:
        write(folder, name, download(name))
    for name, parts in MIXTURES.items():
        if not (options.check and (folder / "corpora" / name).is_dir()):
            write(folder, name, mix(folder, parts))
    found = list(compare(folder, recorded()))
    rows = [[w.corpus, w.split, w.num_samples, w.seq_len, w.seed, h, "yes" if same else "NO"] for w, h, same in found]
    columns = ["corpus", "split", "windows", "tokens", "seed", "hash", "as in the records"]
    text = Table("corpora", "Corpora", columns, rows).for_stdout()
    if other := [what for what, _, same in found if not same]:
        names = ", ".join(dict.fromkeys(f"{what.corpus} ({what.split})" for what in other))
        print(f"\n{text}\n")
        raise UserError(f"'{folder}' must have the text of the committed records; got other text of {names}.")
    return f"\n{text}\n\nThe text is that of the records. Use it: export GPRUNE_DATA_DIR={folder}\n"


def main() -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.corpora", work)


if __name__ == "__main__":
    sys.exit(main())
