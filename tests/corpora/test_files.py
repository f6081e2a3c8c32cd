from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gprune.corpora.files import contiguous_split, split_text


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
