"""Corpora in local files: splitting text into documents, the size limit, and refusal of invalid files."""

from __future__ import annotations

import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from gprune.corpora import load
from gprune.corpora.documents import contiguous_split
from gprune.corpora.load import SPLITS, load_corpus, load_files, source_of, split_text
from gprune.errors import UserError


@given(st.lists(st.sampled_from(["word", "    indented", "", "a much longer line " * 5]), max_size=80))
def test_split_text_drops_only_newlines(lines):
    text = "\n".join(lines)
    documents = split_text(text, size=50)
    assert "".join(documents).replace("\n", "") == text.replace("\n", "")
    assert all(document.strip() for document in documents)
    assert all(len(document) < 100 + 96 for document in documents)  # at most twice the size plus one line


def test_split_text_prefers_blank_lines():
    block = "x" * 30 + "\n" + "  y" * 10
    documents = split_text("\n\n".join([block] * 6), size=100)
    assert documents == ["\n\n".join([block] * 2)] * 3


@given(st.lists(st.text(max_size=2)))
def test_contiguous_split_partitions_the_distinct_documents_70_to_30(documents):
    train, test = contiguous_split(documents, "train"), contiguous_split(documents, "test")
    assert train + test == list(dict.fromkeys(documents))
    assert abs(len(train) - 0.7 * len(train + test)) <= 0.5


def test_all_files_without_text_are_named(tmp_path):
    files = [tmp_path / name for name in ("train-1.jsonl", "train-2.jsonl")]
    for file in files:
        file.write_text("\n")
    with pytest.raises(UserError, match=r"Corpus files '.*train-1\.jsonl', '.*train-2\.jsonl' must have at least one"):
        load._read_all(files)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one\n\ntwo\n"), ("a.jsonl", '{"text": "one\\n\\ntwo"}')])
def test_a_byte_order_mark_is_removed_from_the_first_document(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert load._read_all([tmp_path / name]) == ["one\n\ntwo"]


INVALID_FILES = {  # file name, content, expected error
    "an empty file": ("x.jsonl", b"", "got no text"),
    "only blanks": ("x.jsonl", b'{"text": "  "}\n', "got no text"),
    "another field": ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ":2: The row must be .*; got the keys body"),
    "messages without a content":
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}\n',
         r":1: The field 'messages' must be a list of objects with .*; message 2 is {'role': 'assistant'}"),
    "messages with parts":
        ("x.jsonl", b'{"messages": [{"role": "user", "content": ["a"]}]}\n', r"message 1 is .*\['a'\]"),
    "messages that are no list": ("x.jsonl", b'{"messages": "a"}\n', "got 'a'"),
    "no messages": ("x.jsonl", b'{"messages": []}\n', r"got \[\]"),
    "a list": ("x.jsonl", b"[1]\n", r"got \[1\]"),
    "an object": ("x.jsonl", b'{"text": {}}\n', "got {'text': {}}"),
    "no JSON":
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "a"\n', "Cannot read line 3 .* as jsonl: Expecting.* at column 13"),
    "no UTF-8": ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "Cannot read line 2 .* jsonl: 'utf-8'"),
    "half a character": ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "Cannot read line 2 .* as jsonl"),
    "deeply nested": ("x.jsonl", b"[" * 50_000 + b"\n", "Cannot read line 1 .* as jsonl"),
    "no parquet": ("x.parquet", b"no parquet", "Cannot read .* as parquet"),
    "another column": ("x.parquet", {"id": [1], "body": ["a"]}, "string 'text' .*; got the keys id, body"),
    "another column of a table": ("x.csv", b"id,body\n1,a\n", "string 'text' .*; got the keys id, body"),
    "a column of lists": ("x.parquet", {"text": [["a", "b"]]}, r"got {'text': \['a', 'b'\]}"),
    "a column of bytes": ("x.parquet", {"text": [b"a"]}, "got {'text': b'a'}"),
}  # fmt: skip


@pytest.mark.parametrize("row", INVALID_FILES)
def test_an_invalid_corpus_file_is_refused_by_name(row, tmp_path):
    name, content, expected = INVALID_FILES[row]
    if isinstance(content, dict):
        parquet.write_table(pyarrow.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    source_of(str(tmp_path / name))  # does not read the text
    with pytest.raises(UserError, match=expected) as error:
        load_files(tmp_path / name, "train")
    assert name in str(error.value)


def test_a_parquet_text_column_is_a_corpus_without_nulls(tmp_path):
    texts = [f"a {n}" for n in range(20)]
    parquet.write_table(pyarrow.table({"text": [*texts[:4], None, *texts[4:]]}), tmp_path / "x.parquet")
    assert load_corpus(str(tmp_path / "x.parquet"), "test") == texts[16:]
    packed = pyarrow.array(["b", "c", "b"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": packed}), tmp_path / "y.parquet")
    assert load_files(tmp_path / "y.parquet", "train") + load_files(tmp_path / "y.parquet", "test") == ["b", "c"]


def test_a_csv_text_column_is_a_corpus(tmp_path):
    (tmp_path / "x.csv").write_text("id,text\n" + "".join(f'{n},"line {n}\nnext, ""quoted"""\n' for n in range(20)))
    assert load_corpus(str(tmp_path / "x.csv"), "test") == [f'line {n}\nnext, "quoted"' for n in range(16, 20)]


@pytest.mark.parametrize("count", [1, 3])
def test_few_long_documents_are_cut_into_passages_for_all_splits(count, tmp_path):
    words = [f"w{n}" for n in range(9000)]
    documents = [" ".join(words[start::count]) for start in range(count)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    parts = {split: " ".join(load_corpus(str(tmp_path / "x.jsonl"), split)).split() for split in SPLITS}
    assert sorted(word for part in parts.values() for word in part) == sorted(words)
    shares = [len(parts[split]) / len(words) for split in ("train", "development", "test")]
    assert shares == pytest.approx([0.72, 0.08, 0.2], abs=0.04)
