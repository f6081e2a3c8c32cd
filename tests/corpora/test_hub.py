"""Corpora on the Hugging Face hub: rows formatted as documents, splits, and the error without network."""

from __future__ import annotations

import string

import datasets
import huggingface_hub
import pytest

from gprune.corpora import hub
from gprune.corpora.load import load_corpus
from gprune.errors import UserError


@pytest.fixture
def unreachable(monkeypatch):
    """No local mirror, and a hub that cannot be reached."""

    class Session:
        def head(self, *_, **__):
            raise OSError("no route")

    monkeypatch.delenv("GPRUNE_DATA_DIR", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)


@pytest.mark.parametrize("record", hub.HUB_CORPORA, ids=lambda record: record.name)
def test_without_network_one_line_names_the_corpus_and_the_remedy(record, unreachable, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=f"corpus '{record.name}'.*GPRUNE_DATA_DIR") as caught:
        load_corpus(record.name, "test")
    assert "\n" not in str(caught.value)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # restored


@pytest.mark.parametrize("record", hub.HUB_CORPORA, ids=lambda record: record.name)
def test_hub_corpora_format_rows_as_documents_of_the_requested_split(record, unreachable, monkeypatch):
    fields = [field for _, field, _, _ in string.Formatter().parse(record.text) if field]
    requested = {}

    def rows(path, name, **options):
        requested.update(options, where=(path, name))
        return ({field: f"{field} {options['split']} {i}" for field in fields} for i in range(3000))

    monkeypatch.setattr(datasets, "load_dataset", rows)
    documents = load_corpus(record.name, "test")
    assert requested["split"] == (record.test or "train")
    assert requested["streaming"] == (record.limit is not None)
    assert all(field in documents[0] for field in fields)
    assert requested["where"] == (record.path, record.config)
    if record.test is None:  # split 70/30 after the limit
        assert len(documents) == 0.3 * (record.limit or 3000)
        assert not set(documents) & set(load_corpus(record.name, "train"))


def test_wikitext_lines_are_joined_to_articles():
    first, second = [" = One = \n", "", " text = \n", " = = Section = = \n", " more \n"], [" = Two Words = \n", " x \n"]
    assert hub.join_articles(["", *first, *second]) == ["".join(first), "".join(second)]
