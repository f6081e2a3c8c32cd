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
from gprune.errors import quoting


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus is and how a row becomes text."""

    name: str  # in gprune
    path: str  # on the hub
    config: str | None = None
    text: str = "{text}"  # format string over the row's columns
    test: str | None = "test"  # the hub's name of the test split; None: there is only "train", which is cut 70/30
    limit: int | None = None  # rows to stream, of data sets too large to fetch; None fetches the split
    documents: Callable[[list[str]], list[str]] = list  # makes documents of rows that are only lines or sentences


def join_articles(lines: list[str]) -> list[str]:
    """Articles from WikiText's lines; an article starts at a ` = Title = ` line (sections have more signs)."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line):
            articles.append([])
        articles[-1].append(line)
    return ["".join(article) for article in articles if "".join(article).strip()]


HUB_CORPORA = (
    HubCorpus("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", documents=join_articles),
    HubCorpus("c4", "allenai/c4", "en", test="validation", limit=2000),
    HubCorpus("alpaca", "tatsu-lab/alpaca", text="Instruction: {instruction}\n{input}\nResponse: {output}", test=None),
    HubCorpus("gsm8k", "openai/gsm8k", "main", text="Question: {question}\nAnswer: {answer}"),
    HubCorpus("codeparrot", "codeparrot/codeparrot-clean-valid", text="{content}", test=None, limit=2000),
)  # fmt: skip


def load_hub(record: HubCorpus, split: str) -> list[str]:
    """The documents of "train" or "test", in the hub's order; "train" is cut 70/30 where the hub has no test split."""
    if record.test is None:
        return contiguous_split(load_hub(replace(record, test="train"), "train"), split)
    import datasets  # takes a second, and only hub corpora need it

    wanted = record.test if split == "test" else "train"
    mirror = f"a mirror into $GPRUNE_DATA_DIR/corpora/{record.name}/{split}.jsonl (an object with 'text' per line), "
    remedy = f"{mirror}name a text file, or use an embedded corpus such as 'wiki'"
    with had_from_hub(f"Corpus '{record.name}'", remedy), offline_if_unreachable():
        rows = datasets.load_dataset(record.path, record.config, split=wanted, streaming=record.limit is not None)
        texts = [record.text.format(**row) for row in itertools.islice(rows, record.limit)]
    return [document for document in record.documents(texts) if document.strip()]


def had_from_hub(what: str, remedy: str) -> contextlib.AbstractContextManager[None]:
    """Raise what datasets, fsspec, the hub and the HTTP client raise as a UserError; `remedy`: what to put where."""
    return quoting(f"{what} could not be had from the Hugging Face hub (", f"). Without network put {remedy}.")


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Ask the hub once, with a short timeout, and use cached copies only if it does not answer; yields whether it did.

    By itself, `datasets` retries for half a minute per file and warns at each try.
    """
    import datasets

    constants, config = huggingface_hub.constants, datasets.config
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not any(before):
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # whatever the http client in use calls it
            constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        with quieted("datasets", "huggingface_hub"):
            yield not (constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE)
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


for _record in HUB_CORPORA:
    CORPORA.register(_record.name)(functools.partial(load_hub, _record))
