"""Leak check: the share of the evaluated text that also occurs in the text that a run used.

A corpus counts as seen if more than 1 % of its 13-word n-grams were used, whatever its name (13 as in GPT-3's
contamination study, Brown et al. 2020, appendix C).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from gprune.corpora.windows import Windows

SEEN_ABOVE = 0.01  # leaked share above which a corpus counts as seen


def leaked_share(evaluated: Sequence[str], used: Sequence[str], n: int = 13) -> float:
    """Return the share of the n-grams in `evaluated` (each occurrence counts) that occur anywhere in `used`, in [0, 1].

    Words are lower-cased runs of letters and digits of any script; n-grams of `n` words do not cross documents. Scripts
    without spaces have few "words", so the check is weak for them. Without any n-gram the share is 0.
    """
    counts = Counter(gram for text in evaluated for gram in _ngrams(text, n))
    total = counts.total()
    # Only n-grams of the evaluated text, which is smaller, stay in memory; the used text is streamed.
    # An n-gram is removed when it is found, so that its occurrences are added once.
    leaked = sum(counts.pop(gram, 0) for text in used for gram in _ngrams(text, n))
    return leaked / total if total else 0.0


def leaked_share_of_windows(
    evaluated: Sequence[Windows], used: Sequence[Windows], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Compute `leaked_share` of decoded windows. Their n-grams may cross documents."""

    def decode(corpora: Sequence[Windows]) -> list[str]:
        """Return the text of each window, without a BOS token."""
        texts = []
        for windows in corpora:
            first_token = 1 if windows.bos else 0
            texts += tokenizer.batch_decode(windows.tokens[:, first_token:].tolist())
        return texts

    return leaked_share(decode(evaluated), decode(used))


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Yield the n-grams of words in a text. Words are lower-cased runs of letters and digits of any script."""
    words = re.findall(r"[^\W_]+", text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
