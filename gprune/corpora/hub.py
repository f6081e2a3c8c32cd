"""Corpora on the Hugging Face hub: a table of known ones, and any other as `OWNER/NAME` or `OWNER/NAME:CONFIG`.

`datasets` 5 loads all formats without running remote code.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import huggingface_hub

from gprune.console import quieted
from gprune.corpora.documents import CORPORA, contiguous_split, document_of
from gprune.errors import UserError, quoting

MOST_ROWS = 20_000  # of a data set that is not in the table


@dataclass(frozen=True)
class HubCorpus:
    """Location of a corpus on the hub or of its files, and how rows are converted to text."""

    name: str  # in gprune
    path: str  # on the hub
    config: str | None = None
    text: str = "{text}"  # format string over the row's columns
    test: str | None = "test"  # the hub's name of the test split; None if "train" is the only split, which is cut 70/30
    limit: int | None = None  # number of rows to stream from a large data set; None downloads the split
    documents: Callable[[list[str]], list[str]] = list  # joins rows into documents, where rows are lines or sentences
    # Split -> addresses of files, for text that is not on the hub; `path` is then a format of `datasets`.
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)


def join_articles(lines: list[str]) -> list[str]:
    """Join WikiText's lines into articles. An article starts at a line ` = Title = `; sections have more signs."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line):
            articles.append([])
        articles[-1].append(line)
    return ["".join(article) for article in articles if "".join(article).strip()]


def join_sentences(lines: Sequence[str]) -> list[str]:
    """Join the sentences of a treebank in CoNLL-U format into documents of `SENTENCES` neighbouring sentences."""
    sentences = [line.removeprefix("# text = ") for line in lines if line.startswith("# text = ")]
    return [" ".join(sentences[first : first + SENTENCES]) for first in range(0, len(sentences), SENTENCES)]


@dataclass(frozen=True)
class Treebank:
    """A treebank of Universal Dependencies at a fixed commit, whose dev and test files are a corpus in its language."""

    repository: str
    commit: str
    prefix: str  # of its files
    licence: str

    @property
    def files(self) -> list[str]:
        """Names of the files, in order."""
        return [f"{self.prefix}-ud-{split}.conllu" for split in ("dev", "test")]

    def corpus(self, name: str) -> HubCorpus:
        """Return the corpus with these files."""
        files = {"train": [f"{RAW}/{self.repository}/{self.commit}/{file}" for file in self.files]}
        return HubCorpus(name, "text", test=None, documents=join_sentences, files=files)


def _red_pajama(name: str, folder: str) -> HubCorpus:
    """Return a sample of RedPajama that LLM-Shearing has."""
    files = {split: [f"{SHEARING}/{folder}/sample_{folder}{n}.jsonl"] for n, split in enumerate(("train", "test"), 1)}
    return HubCorpus(name, "json", files=files)


RAW = "https://raw.githubusercontent.com"
SHEARING = (
    f"{RAW}/princeton-nlp/LLM-Shearing/cbf39a32dba040025c373a63c742d305df1860cd/llmshearing/data/sample_redpajama"
)
SENTENCES = 20  # of a treebank, in one document
TREEBANKS = {  # languages of `--config trained`
    "spanish": Treebank(
        "UniversalDependencies/UD_Spanish-GSD", "57c045644664e5c1e169263cc4e3b95e40c078ba", "es_gsd", "CC BY-SA 4.0"
    ),
    "italian": Treebank(
        "UniversalDependencies/UD_Italian-ISDT",
        "689c1bf3c7d132903d2196ac69b76a0933c90997",
        "it_isdt",
        "CC BY-NC-SA 3.0",
    ),
    "portuguese": Treebank(
        "UniversalDependencies/UD_Portuguese-GSD", "691a8b597cc37e1c822ba808244c8eaca498eeb2", "pt_gsd", "CC BY-SA 4.0"
    ),
    "russian": Treebank(
        "UniversalDependencies/UD_Russian-GSD", "5400f2fd7264b7699727bb61b09f53841899df26", "ru_gsd", "CC BY-SA 4.0"
    ),
}
HUB_CORPORA = (
    HubCorpus("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", documents=join_articles),
    HubCorpus("c4", "allenai/c4", "en", test="validation", limit=2000),
    HubCorpus("alpaca", "tatsu-lab/alpaca", text="Instruction: {instruction}\n{input}\nResponse: {output}", test=None),
    HubCorpus("gsm8k", "openai/gsm8k", "main", text="Question: {question}\nAnswer: {answer}"),
    HubCorpus("codeparrot", "codeparrot/codeparrot-clean-valid", text="{content}", test=None, limit=2000),
    _red_pajama("code_github", "github"),
    _red_pajama("stackexchange", "stackexchange"),
    *(treebank.corpus(name) for name, treebank in TREEBANKS.items()),
)  # fmt: skip


def load_hub(corpus: HubCorpus, split: str) -> list[str]:
    """Load the documents of "train" or "test" in the hub's order. Without a test split "train" is cut 70/30."""
    if corpus.test is None:
        whole_corpus = load_hub(replace(corpus, test="train"), "train")
        return contiguous_split(whole_corpus, split)
    import datasets  # takes a second, and only hub corpora need it

    hub_split = corpus.test if split == "test" else "train"
    mirror = f"a mirror into $GPRUNE_DATA_DIR/corpora/{corpus.name}/{split}.jsonl (an object with 'text' per line), "
    remedy = f"{mirror}name a text file, or use an embedded corpus such as 'wiki'"
    with hub_errors(f"corpus '{corpus.name}'", remedy), offline_if_unreachable():
        documents = []
        for address in corpus.files.get(hub_split, [None]):  # documents do not cross the end of a file
            rows = datasets.load_dataset(
                corpus.path, corpus.config, data_files=address and {hub_split: address}, split=hub_split,
                streaming=corpus.limit is not None,
            )  # fmt: skip
            documents += corpus.documents([corpus.text.format(**row) for row in itertools.islice(rows, corpus.limit)])
    return [document for document in documents if document.strip()]


def load_named(name: str, split: str) -> list[str]:
    """Load the documents of "train" or "test" of the data set `OWNER/NAME` or `OWNER/NAME:CONFIG`.

    Rows have the column `text` or `messages`. At most `MOST_ROWS` rows are read. Without a test split, the validation
    split is used, and without both train is cut 70/30.
    """
    import datasets

    path, _, config = name.partition(":")
    remedy = "its text into a .jsonl file, and name that file"
    with hub_errors(f"corpus '{name}', which is no file or folder here,", remedy), offline_if_unreachable():
        splits = datasets.load_dataset(path, config or None, streaming=True)
        of_test = next((other for other in ("test", "validation") if other in splits), None)
        chosen = of_test if split == "test" and of_test else "train"
        if chosen not in splits:
            raise UserError(f"Corpus '{name}' must have the split train; got {', '.join(splits)}.")
        rows = itertools.islice(splits[chosen], MOST_ROWS)
        documents = [document_of(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
    documents = [document for document in documents if document.strip()]
    return documents if of_test else contiguous_split(documents, split)


def hub_errors(what: str, remedy: str) -> contextlib.AbstractContextManager[None]:
    """Context manager that converts errors of datasets, fsspec, the hub and the HTTP client to UserError."""
    return quoting(f"Cannot download {what} from the Hugging Face hub: ", f". Without network put {remedy}.")


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Context manager that sends the hub one request, and allows only cached copies if the hub does not answer.

    It yields whether the hub may be used: False if it did not answer, or offline mode was already set.
    `datasets` alone would retry for half a minute per file, with a warning each time.
    """
    import datasets

    constants = huggingface_hub.constants
    config = datasets.config
    former = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not any(former):
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # the class depends on the HTTP client
            constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        with quieted("datasets", "huggingface_hub"):
            yield not (constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE)
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = former


for _corpus in HUB_CORPORA:
    CORPORA.register(_corpus.name)(functools.partial(load_hub, _corpus))
