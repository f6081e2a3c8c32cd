"""Corpora on the Hugging Face hub, as one table: formats that `datasets` 5 loads without running code."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import huggingface_hub

from gprune.console import quieted
from gprune.corpora.files import contiguous_split
from gprune.corpora.load import CORPORA
from gprune.errors import UserError


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus is and how a row becomes text.

    Attributes:
        name: the name in gprune.
        path, config, files: handed to `datasets.load_dataset`; `{split}` in `files` is replaced.
        text: format string over the row's columns.
        test: the hub's name of the test split; None when there is only "train", to be cut by the caller.
        limit: number of rows to stream, for data sets too large to fetch; None fetches the split.
        documents: makes documents of rows that are only lines or sentences.
    """

    name: str
    path: str
    config: str | None = None
    files: str | None = None
    text: str = "{text}"
    test: str | None = "test"
    limit: int | None = None
    documents: Callable[[list[str]], list[str]] = list


def join_articles(lines: list[str]) -> list[str]:
    """WikiText comes line by line; an article starts at a ` = Title = ` line (sections have more signs)."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line):
            articles.append([])
        articles[-1].append(line)
    return ["".join(article) for article in articles if "".join(article).strip()]


def join_sentences(sentences: list[str], per_document: int = 20) -> list[str]:
    """The Penn Treebank comes sentence by sentence."""
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
    HubCorpus(
        "alpaca",
        "tatsu-lab/alpaca",
        text="Instruction: {instruction}\n{input}\nResponse: {output}",
        test=None,
    ),
    HubCorpus("gsm8k", "openai/gsm8k", "main", text="Question: {question}\nAnswer: {answer}"),
    HubCorpus("codeparrot", "codeparrot/codeparrot-clean-valid", text="{content}", test=None, limit=2000),
)


def load_hub(record: HubCorpus, split: str) -> list[str]:
    """The documents of "train" or "test", in the hub's order."""
    import datasets  # takes a second, and only hub corpora need it

    wanted = record.test if split == "test" else "train"
    assert wanted is not None, f"'{record.name}' has no test split"
    files = {wanted: record.files.format(split=wanted)} if record.files else None
    reachable = True
    try:
        with offline_if_unreachable() as reachable:
            rows = datasets.load_dataset(
                record.path, record.config, data_files=files, split=wanted, streaming=record.limit is not None
            )
            texts = [record.text.format(**row) for row in itertools.islice(rows, record.limit)]
    except Exception as error:  # datasets, fsspec, the hub and the http client each raise their own
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if not reachable:
            reason = f"no answer from {huggingface_hub.constants.ENDPOINT}, and no cached copy"
        raise UserError(
            f"Corpus '{record.name}' could not be had from the Hugging Face hub ({reason}). Without network "
            f"put a mirror into $GPRUNE_DATA_DIR/corpora/{record.name}/{split}.jsonl (an object with 'text' "
            f"per line), name a text file, or use an embedded corpus such as 'wiki'."
        ) from error
    return [document for document in record.documents(texts) if document.strip()]


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Ask the hub once, with a short timeout; without an answer use cached copies only.

    Yields whether the hub answered.
    `datasets` by itself retries for half a minute per file and writes a warning for each try.
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


def _load(record: HubCorpus, split: str) -> list[str]:
    return load_hub(record, split) if record.test else contiguous_split(load_hub(record, "train"), split)


for _record in HUB_CORPORA:
    CORPORA.register(_record.name)(functools.partial(_load, _record))
