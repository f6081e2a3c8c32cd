"""The share of n-grams of evaluation text that also occur in the text used for pruning."""

from __future__ import annotations

import pytest

from gprune.corpora.windows import Sample, make_windows
from gprune.method.evaluate import leaked_share, leaked_share_of_windows
from tests.corpora.test_windows import word_tokenizer


def words(start, stop):
    return [f"w{i}" for i in range(start, stop)]


def test_leaked_share_is_the_share_of_common_ngrams():
    evaluated = " ".join(words(0, 32))  # 20 n-grams of 13 words
    used = "Other text. " + ", ".join(words(0, 18)).upper() + "!"  # the first 6 of them
    assert leaked_share([evaluated], [used]) == pytest.approx(6 / 20)


def test_leaked_share_of_disjoint_equal_and_short_texts():
    text = " ".join(words(0, 40))
    assert leaked_share([text], [" ".join(words(40, 90))]) == 0.0
    assert leaked_share([text], [text]) == 1.0
    assert leaked_share([" ".join(words(0, 12))], [text]) == 0.0  # no n-gram at all
    assert leaked_share([], []) == 0.0


def test_ngrams_do_not_cross_documents_and_repetitions_count():
    text = " ".join(words(0, 13))
    assert leaked_share([text], [" ".join(words(0, 7)), " ".join(words(7, 13))]) == 0.0
    assert leaked_share([text, text, " ".join(words(50, 63))], [text, text]) == pytest.approx(2 / 3)


def test_leakage_ignores_case_and_punctuation_of_unicode_words():
    assert leaked_share(["Ähre_ÖL naïve — 42"], ["ähre, öl; NAÏVE 42"], n=4) == 1.0


def test_leakage_of_windows_is_measured_on_their_decoded_text():
    tokenizer = word_tokenizer(words(0, 200))
    arguments = {"tokenizer": tokenizer, "sample": Sample(None, 20, shuffle=False), "corpus": "x", "split": "test"}
    evaluated = make_windows([" ".join(words(0, 40))], **arguments)
    used = make_windows([" ".join(words(0, 20) + words(100, 120))], **arguments)
    assert leaked_share_of_windows([evaluated], [used], tokenizer) == pytest.approx(0.5)
