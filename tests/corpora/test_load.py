"""Loading corpora by name: the local mirror, files, the registry, and disjoint splits."""

from __future__ import annotations

import json

import pytest

from gprune.corpora.documents import CORPORA
from gprune.corpora.embedded import EMBEDDED_CORPORA
from gprune.corpora.load import SPLITS, identity, load_corpus, source_of
from gprune.errors import UserError
from tests.world import restored


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts(prefix, count):
    return [f"{prefix} {i}" for i in range(count)]


def assert_disjoint(parts):
    """Assert that splits are not empty and share no document."""
    assert all(parts.values())
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not set(parts[a]) & set(parts[b])


def test_the_local_mirror_takes_precedence_over_the_registry(data_dir):
    write_jsonl(data_dir / "corpora" / "wikitext2" / "train.jsonl", texts("a", 25))
    write_jsonl(data_dir / "corpora" / "wikitext2" / "test.jsonl", texts("b", 4))
    assert load_corpus("wikitext2", "test") == texts("b", 4)
    assert load_corpus("wikitext2", "development") == ["a 9", "a 19"]
    train = load_corpus("wikitext2", "train")
    assert train == [text for text in texts("a", 25) if text not in ("a 9", "a 19")]


@pytest.mark.parametrize(
    "names",
    [
        ("Train.jsonl", "Test.jsonl"),
        ("train_0.jsonl", "test_0.jsonl"),
        ("training.jsonl", "dev.jsonl"),
        ("train.jsonl", "validation.jsonl"),
    ],
)
def test_files_of_splits_may_have_other_spellings(names, data_dir):
    for name, letter in zip(names, "ab", strict=True):
        write_jsonl(data_dir / "corpora/mine" / f"{name}.jsonl", texts(letter, 25))
    assert load_corpus("mine", "test") == texts("b", 25)
    assert set(load_corpus("mine", "train")) < set(texts("a", 25))


@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl", "anything.jsonl"])
@pytest.mark.parametrize(("folder", "tested"), [(True, 30), (False, 20)])
def test_text_without_splits_is_split_contiguously_without_duplicates(tmp_path, file, folder, tested):
    path = tmp_path / "folder" / file
    write_jsonl(path, [*texts("a", 100), "a 0"])
    parts = {split: load_corpus(str(path.parent if folder else path), split) for split in SPLITS}
    assert_disjoint(parts)
    assert parts["test"] == texts("a", 100)[-tested:]
    assert len(parts["development"]) == (7 if folder else 10)
    assert len(parts["train"]) + len(parts["development"]) == 100 - tested


def test_too_few_documents_are_refused_with_the_least_number(tmp_path):
    path = str(tmp_path / "x.jsonl")
    write_jsonl(tmp_path / "x.jsonl", texts("a", 5))
    with pytest.raises(UserError, match=r"must have 15 or more documents .*; got 4 of train"):
        load_corpus(path, "development")
    write_jsonl(tmp_path / "x.jsonl", texts("a", 15))
    assert all(load_corpus(path, split) for split in SPLITS)


@pytest.mark.parametrize("name", ["../../secret", "corpora/../../secret", ".hidden", "~nobody-at-all", ""])
def test_corpus_names_cannot_leave_the_mirror(name, data_dir, tmp_path, monkeypatch):
    for folder in ("secret", ".", "data/corpora/.hidden", "data/corpora/ok"):
        write_jsonl(tmp_path / folder / "train.jsonl", texts("s", 20))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError):
        load_corpus(name, "train")


def test_an_unknown_corpus_lists_the_available_ones(data_dir):
    write_jsonl(data_dir / "corpora" / "local_one" / "train.jsonl", ["a"])
    with pytest.raises(UserError, match=r"Unknown corpus 'c5'.*python_docs.*local_one"):
        source_of("c5")
    with pytest.raises(UserError, match="no such file"):
        source_of("nowhere/text.txt")
    for name in (*CORPORA, "local_one"):
        source_of(name)


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match=r"Unknown split 'dev'.*development"):
        load_corpus("python_docs", "dev")


@pytest.mark.parametrize(
    ("name", "min_characters"), [("python_docs", 50_000), ("python_code", 50_000), ("python_help", 10_000)]
)
def test_splits_of_interpreter_corpora_are_disjoint_and_deterministic(name, min_characters):
    parts = {split: load_corpus(name, split) for split in SPLITS}
    assert_disjoint(parts)
    assert parts == {split: load_corpus(name, split) for split in SPLITS}
    assert sum(map(len, parts["test"])) > min_characters


def test_python_help_shares_at_most_two_long_paragraphs_with_python_code_and_python_docs():
    """The corpus `python_help` serves as unseen text for runs calibrated on the other two."""
    help_text, *others = (
        " ".join(" ".join(load_corpus(name, split)) for split in ("train", "test"))
        for name in ("python_help", "python_docs", "python_code")
    )
    paragraphs = {text for text in help_text.split("\n\n") if len(text) > 60}
    assert len(paragraphs) > 100
    # A few long paragraphs may occur in several modules of the standard library.
    assert sum(any(text in other for other in others) for text in paragraphs) <= 2


def test_documents_of_python_docs_share_no_paragraph():
    documents = [document for split in SPLITS for document in load_corpus("python_docs", split)]
    paragraphs = [{" ".join(p.split()) for p in document.split("\n\n")} for document in documents]
    assert sum(map(len, paragraphs)) == len(set().union(*paragraphs)) > 1000


@pytest.mark.real
@pytest.mark.parametrize("name", EMBEDDED_CORPORA)
def test_splits_of_embedded_corpora_are_disjoint_and_have_no_markup(name, monkeypatch):
    monkeypatch.delenv("GPRUNE_DATA_DIR", raising=False)
    parts = {split: load_corpus(name, split) for split in SPLITS}
    assert_disjoint(parts)
    assert all("<doc " not in text and "<|endoftext|>" not in text for part in parts.values() for text in part)
    assert sum(map(len, parts["train"])) > (0 if name == "multilingual" else 100_000)


@pytest.mark.parametrize("returned", ["one text", None, ["a", 3]])
def test_a_corpus_function_must_return_a_list_of_strings(returned):
    """In a single string, each character would be a document."""
    with restored(CORPORA):
        CORPORA.register("given")(lambda split: returned)
        with pytest.raises(UserError, match=r"^Corpus 'given' must be a list of documents of type str; got "):
            load_corpus("given", "train")


def test_different_spellings_of_a_corpus_have_one_identity(tmp_path, monkeypatch):
    """Two spellings of a folder, two spellings of a mirrored corpus, and a mirror folder without text."""
    for folder, file in (("texts", "a.txt"), ("data/corpora/wiki", "note.pdf"), ("data/corpora/mine", "b.txt")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text("some text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path / "data"))
    assert identity("texts") == identity("./texts") == str((tmp_path / "texts").resolve())
    assert identity("wiki") == "wiki"
    assert identity("mine") == identity("./data/corpora/mine")
