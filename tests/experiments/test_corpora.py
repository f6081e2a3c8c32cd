"""The script that downloads the standard corpora: documents made of dataset rows, and a comparison of their hashes."""

from __future__ import annotations

import re

import datasets
import pytest

from experiments import corpora
from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, make_windows
from tests.tiny_run import WORDS, tiny_tokenizer

LINES = [
    "", " = First = \n", "", " text of it \n", "", " = = Section = = \n", "", " = 1 rad and k = \n", " more \n", "",
    " = Second One = \n", "", " the rest \n", "",
]  # fmt: skip


def random_documents(seed: int, documents: int = 40) -> list[str]:
    """Return documents of 90 words."""
    return [" ".join(WORDS[(seed + 7 * i + j * j) % len(WORDS)] for j in range(90)) for i in range(documents)]


@pytest.fixture
def dataset_calls(monkeypatch):
    """Replace `datasets.load_dataset` and the tokenizer. Return a list of the calls, as (path, name, split, files)."""
    calls = []

    def load_dataset(path, name=None, *, split, data_files=None):
        calls.append((path, name, split, data_files))
        if path == "Salesforce/wikitext":
            return [{"text": line} for line in LINES]
        if path == "openai/gsm8k":
            return [{"question": text, "answer": f"{split} {i}"} for i, text in enumerate(random_documents(3))]
        return [{"text": text, "meta": {}} for text in random_documents(len(calls))]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpora, "embedded_model_dir", lambda name: name)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda place: tiny_tokenizer())
    return calls


def records(**hashes: str) -> dict[corpora.Recorded, set[str]]:
    """Return committed records with a hash of two windows of 16 test tokens for each corpus."""
    return {corpora.Recorded(name, "test", 2, 16, 0): {content_hash} for name, content_hash in hashes.items()}


def content_hash_of(texts: list[str]) -> str:
    return make_windows(texts, tiny_tokenizer(), Sample(2, 16), corpus="x", split="test").content_hash


def test_downloaded_rows_become_corpora_that_load_corpus_reads(dataset_calls, tmp_path, monkeypatch):
    gsm8k = [f"Question: {text}\nAnswer: test {i}" for i, text in enumerate(random_documents(3))]
    monkeypatch.setattr(corpora, "recorded", lambda: records(gsm8k=content_hash_of(gsm8k)))
    assert "as in the records" in corpora.work(["--output", str(tmp_path / "data")])
    assert {path.name for path in (tmp_path / "data/corpora").iterdir()} == {*corpora.SOURCES, *corpora.MIXTURES}
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path / "data"))
    assert load_corpus("gsm8k", "test") == gsm8k
    loaded = [(path, name, split) for path, name, split, _ in dataset_calls if path != "json"]
    assert loaded == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
    ]
    (url,) = next(files for path, *_, files in dataset_calls if path == "json").values()
    assert re.fullmatch(r"https://raw\.githubusercontent\.com/.*/c4-rp/sample_c4-rp1\.jsonl", url)


def test_text_that_differs_from_the_records_is_an_error_that_names_the_corpus(
    dataset_calls, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(corpora, "recorded", lambda: records(gsm8k="0" * 16, c4=content_hash_of(random_documents(4))))
    monkeypatch.setattr("sys.argv", ["corpora", "--output", str(tmp_path)])
    assert corpora.main() == 2
    out, err = capsys.readouterr()
    assert err.endswith("must have the text of the committed records; got other text of gsm8k (test).\n")
    assert err.count("\n") == 1
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")]
    assert [cells[7].strip() for cells in rows[1:]] == ["NO", "yes"]  # the column `as in the records`, without header


def test_wikitext_articles_begin_at_titles_and_not_at_formulas():
    train, test = corpora.wikitext_articles(LINES, LINES)
    # Empty lines are "" in one split and " \n" in the other.
    first = " = First = \n{0} text of it \n{0} = = Section = = \n{0} = 1 rad and k = \n more \n{0}"
    assert train == [first.format("").removesuffix("\n"), " = Second One = \n the rest \n"]
    assert test[0] == first.format(" \n").removesuffix("\n")
    assert len(test) == 2


def test_only_whole_lines_within_the_size_limit_are_read_and_duplicates_removed_across_splits(monkeypatch):
    monkeypatch.setattr(corpora, "MOST", len("".join(LINES[:9]).encode()) + 3)
    train, test = corpora.wikitext_articles(LINES, LINES)
    assert train == ["".join(LINES[:9])]
    assert len(test) == 2
    assert corpora.distinct(["a", "b", "a"], ["c", "b", "c"]) == (["a", "b"], ["c"])


def test_a_failed_download_and_a_missing_corpus_are_reported_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for arguments, message in (
        (["--output", str(tmp_path)], "Cannot download Corpus 'wikitext2' from the Hugging Face hub: no route"),
        (["--output", str(tmp_path), "--check"], "--check needs the corpus wikitext2 in"),
    ):
        monkeypatch.setattr("sys.argv", ["corpora", *arguments])
        assert corpora.main() == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_committed_records_have_one_hash_for_each_text_sample():
    """Two hashes of one sample would mean that records were made with different text."""
    hashes_of_samples = corpora.recorded()
    assert {(sample.corpus, sample.split) for sample in hashes_of_samples} >= {
        ("wikitext2", "train"), ("wikitext2", "test"), ("c4", "train"), ("code_github", "train"),
        ("stackexchange", "test"), ("gsm8k", "test"), ("c4_code", "train"), ("c4_code_wiki", "train"),
    }  # fmt: skip
    assert {len(hashes) for hashes in hashes_of_samples.values()} == {1}


def test_a_mixture_has_the_first_characters_of_its_parts_and_is_made_if_it_is_missing(
    dataset_calls, tmp_path, monkeypatch
):
    parts = {"a": ["a" * 7, "b" * 7], "c": ["d" * 4, "e" * 4, "f" * 4], "g": ["h"]}
    for name, texts in parts.items():
        corpora.write(tmp_path, name, {"train": texts, "test": [text.upper() for text in texts]})
    mixed = corpora.mix(tmp_path, {"a": None, "c": 6})
    assert mixed == {"train": ["a" * 7, "b" * 7, "dddd", "ee"], "test": ["A" * 7, "B" * 7, "DDDD", "EE"]}
    monkeypatch.setattr(corpora, "recorded", dict)
    for name in corpora.SOURCES:
        corpora.write(tmp_path, name, {"train": [name], "test": [name]})
    corpora.write(tmp_path, "c4_code_wiki", {"train": ["mine"]})
    corpora.work(["--output", str(tmp_path), "--check"])
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    assert load_corpus("c4_code", "train") == ["c4", "code_github"]
    assert load_corpus("c4_code_wiki", "train") == ["mine"]
    assert dataset_calls == []
