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

SEEN_ABOVE = 0.01


def leaked_share(evaluated: Sequence[str], used: Sequence[str], n: int = 13) -> float:
    """Share in [0, 1] of the n-grams in `evaluated` (each occurrence counts) that occur anywhere in `used`.

    Words are lower-cased runs of letters and digits of any script; n-grams of `n` words do not cross documents. Scripts
    without spaces have few "words", so the check is weak for them. Without any n-gram the share is 0.
    """
    counts = Counter(gram for text in evaluated for gram in _ngrams(text, n))
    total = counts.total()
    # Only n-grams of the evaluated text, which is smaller, stay in memory; the used text is streamed.
    leaked = sum(counts.pop(gram, 0) for text in used for gram in _ngrams(text, n))
    return leaked / total if total else 0.0


def leaked_share_of_windows(
    evaluated: Sequence[Windows], used: Sequence[Windows], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Compute `leaked_share` of decoded windows. Their n-grams may cross documents."""
    texts = (
        [text for w in part for text in tokenizer.batch_decode(w.tokens[:, w.bos :].tolist())]
        for part in (evaluated, used)
    )
    return leaked_share(*texts)


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
