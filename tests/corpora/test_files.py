from __future__ import annotations

import json
import resource

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gprune.corpora import files
from gprune.corpora.files import contiguous_split, split_text
from gprune.errors import UserError


@given(st.lists(st.sampled_from(["word", "    indented", "", "a much longer line " * 5]), max_size=80))
def test_split_text_loses_only_newlines(lines):
    text = "\n".join(lines)
    documents = split_text(text, size=50)
    assert "".join(documents).replace("\n", "") == text.replace("\n", "")
    assert all(document.strip() for document in documents)
    assert all(len(document) < 100 + 96 for document in documents)  # twice the size and one line


def test_split_text_prefers_blank_lines():
    block = "x" * 30 + "\n" + "  y" * 10
    documents = split_text("\n\n".join([block] * 6), size=100)
    assert documents == ["\n\n".join([block] * 2)] * 3


@given(st.lists(st.text(max_size=2)))
def test_contiguous_split_is_a_partition(documents):
    train, test = contiguous_split(documents, "train"), contiguous_split(documents, "test")
    assert train + test == list(dict.fromkeys(documents))
    assert abs(len(train) - 0.7 * len(train + test)) <= 0.5


# --- files that never end -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from(["a", "b ", "\n", "\n\n", "\r\n", "\r", "\x0b", "\u2028", "é"])).map("".join))
def test_files_are_cut_as_text_in_one_piece_is(text, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 3)
    (tmp_path / "a.txt").write_bytes(f"word\n\n{text}".encode())
    whole = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert files.load_files(tmp_path / "a.txt", "train") == contiguous_split(split_text(whole), "train")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_sparse_file_is_no_text(suffix, tmp_path):
    with (tmp_path / f"a{suffix}").open("wb") as file:
        file.truncate(30 * 2**30)
    with pytest.raises(UserError, match="it holds NUL"):
        files.load_files(tmp_path / f"a{suffix}", "train")


def test_no_more_is_read_than_a_corpus_can_need(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "MOST", 10_000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} " * 100}) + "\n" for n in range(1000)))
    found = files.load_files(tmp_path / "a.jsonl", "train") + files.load_files(tmp_path / "a.jsonl", "test")
    assert 10_000 <= sum(map(len, found)) < 10_500
    assert "the first 10,000 characters are read" in caplog.text
    (tmp_path / "b.jsonl").write_text('{"text": "' + "a" * 20_000)
    with pytest.raises(UserError, match=r"b\.jsonl.* a line of more than 10,000 characters"):
        files.load_files(tmp_path / "b.jsonl", "train")


@pytest.mark.parametrize("texts", [[["a", "b"]], [{"role": "user"}], [1], [b"a"]])
def test_a_column_that_is_no_text_is_one_line(texts, tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.array(texts)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="expected a column 'text' of strings, got one of"):
        files.load_files(tmp_path / "a.parquet", "train")


def test_parquet_that_is_a_bomb_costs_nothing(tmp_path):
    """570 bytes that stand for 4.6 GB as one text of many rows, and a text that is packed ten thousandfold."""
    rows, texts = pyarrow.array([0] * 4600, pyarrow.int32()), pyarrow.array(["word " * 200_000])
    shared = pyarrow.DictionaryArray.from_arrays(rows, texts)
    parquet.write_table(pyarrow.table({"text": shared}), tmp_path / "a.parquet", compression="zstd")
    packed = pyarrow.array(["a" * 10**8])
    parquet.write_table(pyarrow.table({"text": packed}), tmp_path / "b.parquet", compression="zstd")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (
        len(files.load_files(tmp_path / "a.parquet", "test") + files.load_files(tmp_path / "a.parquet", "train")) == 1
    )
    with pytest.raises(UserError, match="bytes in a group of rows"):
        files.load_files(tmp_path / "b.parquet", "train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
