"""Corpora on the Hugging Face hub, as one table; `datasets` 5 loads all of their formats without running code."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import huggingface_hub

from gprune.console import quieted
from gprune.corpora.load import CORPORA
from gprune.corpora.local import contiguous_split
from gprune.errors import UserError, first_line


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus is and how a row becomes text; `path`, `config` and `files` go to `datasets.load_dataset`."""

    name: str  # in gprune
    path: str
    config: str | None = None
    files: str | None = None  # `{split}` is replaced
    text: str = "{text}"  # format string over the row's columns
    test: str | None = "test"  # the hub's name of the test split; None: there is only "train", which is cut 70/30
    limit: int | None = None  # rows to stream, of data sets too large to fetch; None fetches the split
    documents: Callable[[list[str]], list[str]] = list  # makes documents of rows that are only lines or sentences

    @property
    def on_hub(self) -> str:
        """The data set's name on the hub; `path` may be a builder, such as parquet, that reads `files` of it."""
        return re.sub(r".*/datasets/([^/]+/[^/@]+).*", r"\1", self.files) if self.files else self.path


def join_articles(lines: list[str]) -> list[str]:
    """Articles from WikiText's lines; an article starts at a ` = Title = ` line (sections have more signs)."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line):
            articles.append([])
        articles[-1].append(line)
    return ["".join(article) for article in articles if "".join(article).strip()]


def join_sentences(sentences: list[str], per_document: int = 20) -> list[str]:
    """Documents of so many sentences each, from the Penn Treebank's sentences."""
    starts = range(0, len(sentences), per_document)
    return ["\n".join(sentences[start : start + per_document]) for start in starts]


HUB_CORPORA = (
    HubCorpus("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", documents=join_articles),
    HubCorpus("c4", "allenai/c4", "en", test="validation", limit=2000),
    # The data set's own repository is a script; the hub keeps a parquet conversion of it on a branch.
    HubCorpus(
        "ptb",
        "parquet",
        files="hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{split}/*.parquet",
        text="{sentence}",
        documents=join_sentences,
    ),
    HubCorpus("alpaca", "tatsu-lab/alpaca", text="Instruction: {instruction}\n{input}\nResponse: {output}", test=None),
    HubCorpus("gsm8k", "openai/gsm8k", "main", text="Question: {question}\nAnswer: {answer}"),
    HubCorpus("codeparrot", "codeparrot/codeparrot-clean-valid", text="{content}", test=None, limit=2000),
)


def load_hub(record: HubCorpus, split: str) -> list[str]:
    """The documents of "train" or "test", in the hub's order; "train" is cut 70/30 where the hub has no test split."""
    if record.test is None:
        return contiguous_split(load_hub(replace(record, test="train"), "train"), split)
    import datasets  # takes a second, and only hub corpora need it

    wanted = record.test if split == "test" else "train"
    files = {wanted: record.files.format(split=wanted)} if record.files else None
    reachable = True
    try:
        with offline_if_unreachable() as reachable:
            rows = datasets.load_dataset(
                record.path, record.config, data_files=files, split=wanted, streaming=record.limit is not None
            )
            texts = [record.text.format(**row) for row in itertools.islice(rows, record.limit)]
    except Exception as error:  # datasets, fsspec, the hub and the http client each raise their own
        reason = f"{type(error).__name__}: {first_line(error)}"
        if not reachable:
            reason = f"no answer from {huggingface_hub.constants.ENDPOINT}, and no cached copy"
        raise UserError(
            f"Corpus '{record.name}' cannot be loaded from the Hugging Face hub ({reason}). Without network "
            f"put a mirror into $GPRUNE_DATA_DIR/corpora/{record.name}/{split}.jsonl (an object with 'text' "
            f"per line), name a text file, or use an embedded corpus such as 'wiki'."
        ) from error
    return [document for document in record.documents(texts) if document.strip()]


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Ask the hub once, with a short timeout, and use cached copies only if it does not answer; yields whether it did.

    By itself, `datasets` retries for half a minute per file and warns at each try.
    """
    import datasets

    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    reachable = not any(before)
    if reachable:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # whatever the http client in use calls it
            reachable = False
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        with quieted("datasets", "huggingface_hub"):
            yield reachable
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


for _record in HUB_CORPORA:
    CORPORA.register(_record.name)(functools.partial(load_hub, _record))
