"""Corpora on the Hugging Face hub: rows formatted as documents, splits, and the error without network."""

from __future__ import annotations

import string

import datasets
import huggingface_hub
import pytest

from gprune.corpora import hub, is_local
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
        line = "# text = " if record.documents is hub.join_sentences else ""
        file = f" {options['data_files']}" if options["data_files"] else ""
        return ({field: f"{line}{field} {options['split']} {i}{file}" for field in fields} for i in range(3000))

    monkeypatch.setattr(datasets, "load_dataset", rows)
    documents = load_corpus(record.name, "test")
    assert requested["split"] == (record.test or "train")
    assert requested["streaming"] == (record.limit is not None)
    assert all(field in documents[0] for field in fields)
    assert requested["where"] == (record.path, record.config)
    if record.test is None:  # split 70/30 after the limit
        in_all = 2 * 3000 / hub.SENTENCES if record.documents is hub.join_sentences else record.limit or 3000
        assert len(documents) == 0.3 * in_all
        assert not set(documents) & set(load_corpus(record.name, "train"))


def test_any_other_owner_and_name_is_a_data_set_on_the_hub(unreachable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"document {i}"} for i in range(100)]
    data_sets = {
        ("me/plain", None): {"train": rows},
        ("me/parts", "small"): {"train": rows[:80], "validation": rows[80:]},
        ("me/other", None): {"train": [{"body": "x"}]},
        ("me/tests", None): {"test": rows},
    }

    def load_dataset(path, name, streaming):
        assert streaming
        return data_sets[path, name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    plain = {split: load_corpus("me/plain", split) for split in ("train", "development", "test")}
    assert plain["test"] == [row["text"] for row in rows[70:]]
    assert len(plain["development"]) == 7
    assert not {*plain["train"]} & {*plain["development"]}
    assert load_corpus("me/parts:small", "test") == [row["text"] for row in rows[80:]]
    monkeypatch.setattr(hub, "MOST_ROWS", 10)
    assert load_corpus("me/plain", "test") == [row["text"] for row in rows[7:10]]
    for name, message in (
        ("me/other", "me/other, row 1: .* got the keys body"),
        ("me/tests", "must have the split train; got test"),
        ("me/missing", "'me/missing', which is no file or folder here, from the Hugging Face hub: .* name that file"),
    ):
        with pytest.raises(UserError, match=message):
            load_corpus(name, "train")
    assert not is_local("me/plain")
    (tmp_path / "me").mkdir()
    (tmp_path / "me/plain").write_text("x")
    with pytest.raises(UserError, match=r"must have \.txt, \.jsonl"):  # a path that exists is no data set
        load_corpus("me/plain", "train")


def test_wikitext_lines_are_joined_to_articles():
    first, second = [" = One = \n", "", " text = \n", " = = Section = = \n", " more \n"], [" = Two Words = \n", " x \n"]
    assert hub.join_articles(["", *first, *second]) == ["".join(first), "".join(second)]
