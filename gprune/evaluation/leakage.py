"""Leak check: how much of the evaluated text was in the text the run used.

Above 1 % of 13-word n-grams (13 as in GPT-3's contamination study, Brown et al. 2020, appendix C) a corpus
counts as seen, whatever its name says.
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

    Words are lower-cased runs of letters and digits of any script; n-grams do not cross documents. Scripts
    without spaces have few "words", so the check says little about them. Without any n-gram the share is 0.

    Args:
        evaluated: documents or decoded windows that are evaluated on.
        used: those the run used for anything else.
        n: words per n-gram.
    """
    counts = Counter(gram for text in evaluated for gram in _ngrams(text, n))
    total = counts.total()
    # The evaluated side is the small one: its n-grams stay in memory, the used text streams past them.
    leaked = sum(counts.pop(gram, 0) for text in used for gram in _ngrams(text, n))
    return leaked / total if total else 0.0


def leaked_share_of_windows(
    evaluated: Sequence[Windows], used: Sequence[Windows], tokenizer: PreTrainedTokenizerBase, n: int = 13
) -> float:
    """`leaked_share` of the text that the windows hold."""
    return leaked_share(_decode(evaluated, tokenizer), _decode(used, tokenizer), n)


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)


def _decode(windows: Sequence[Windows], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [text for w in windows for text in tokenizer.batch_decode(w.tokens.tolist())]
