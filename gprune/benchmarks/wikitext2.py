"""WikiText-2 perplexity in the convention of the pruning and quantisation literature.

The raw test file line by line, each line with its line end, a blank line as the empty string, joined by two line ends;
tokenised as one string; windows of 2048 tokens (128 in old tables) that do not overlap; the last partial window
dropped. (With GPT-2's vocabulary the text is 287,644 tokens.) BOS opens each window where the tokenizer puts one before
a text, and no window otherwise. Scripts that let a Llama tokenizer put it before the whole text alone have it in the
first window only.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.corpora.hub import had_from_hub, offline_if_unreachable
from gprune.corpora.windows import JOIN, Bos, Sample, Windows, check_tokens, make_windows, opening
from gprune.errors import UserError
from gprune.evaluation.intervals import mean_perplexity
from gprune.evaluation.perplexity import perplexity
from gprune.screen import Screen
from gprune.storage.reading import expanded, needed_text

MIRROR = "corpora/wikitext2/wiki.test.raw"
CHARACTERS = 1_294_336  # of the whole text, as it is joined


def join_lines(raw: str) -> str:
    """The text that is scored, from the content of `wiki.test.raw`."""
    # Not splitlines(), which also cuts at characters that are no line ends here.
    lines = re.findall(r"[^\n]*\n|[^\n]+", raw)
    return JOIN.join(line if line.strip() else "" for line in lines)


def wikitext2() -> str:
    """The text that is scored, from `$GPRUNE_DATA_DIR/corpora/wikitext2/wiki.test.raw` or the hub."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    if root and (path := expanded(root) / MIRROR).is_file():
        return join_lines(needed_text(path, "WikiText-2's raw test file"))
    import datasets

    with had_from_hub("WikiText-2", f"the raw test file into $GPRUNE_DATA_DIR/{MIRROR}"), offline_if_unreachable():
        return JOIN.join(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def literature_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, bos: Bos = "auto") -> Windows:
    """(n, seq_len) tokens: all whole windows in order."""
    sample = Sample(None, seq_len, shuffle=False, bos=opening(tokenizer, bos), flags=("--limit", "--seq_len"))
    return make_windows([text], tokenizer, sample, corpus="wikitext2", split="test")


def wikitext2_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int = 2048,
    bos: Bos = "auto",
    limit: int | None = None,
) -> dict[str, Any]:
    """One record: perplexity on WikiText-2's test text with a 95 % interval over windows, and its protocol.

    Args:
        bos: whether BOS opens each window, as in `opening`.
        limit: the first so many windows; None for all. With a limit the number stands beside nobody's.

    Raises:
        UserError: for windows longer than the model's positions, and for text that cannot be had.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or seq_len
    if not 2 <= seq_len <= positions:
        raise UserError(f"--seq_len: expected 2 to {positions} tokens (the model's positions), got {seq_len}.")
    text = wikitext2()
    every = literature_windows(text, tokenizer, seq_len=seq_len, bos=bos)
    windows = replace(every, tokens=every.tokens[:limit])
    check_tokens(windows, tokenizer, model.get_input_embeddings().num_embeddings)
    batch_size = max(1, 2048 // seq_len)
    with Screen() as screen:
        advance = screen.bar("Perplexity on WikiText-2", math.ceil(len(windows.tokens) / batch_size))
        result = perplexity(model, windows, batch_size=batch_size, progress=advance)
    _, low, high = mean_perplexity({"wikitext2": result.window_nll}, seq_len - 1)
    deviations = []
    if len(windows.tokens) < len(every.tokens):
        deviations.append(f"only the first {len(windows.tokens)} windows")
    if len(text) != CHARACTERS:
        deviations.append(f"{len(text):,} of {CHARACTERS:,} characters")
    return {
        "kind": "perplexity",
        "task": "wikitext2",
        "split": "test",
        "perplexity": result.perplexity,
        "low": low,
        "high": high,
        "nll": result.nll,
        "tokens": result.tokens,
        "windows": len(windows.tokens),
        "window_nll": result.window_nll,
        "seq_len": seq_len,
        "stride": seq_len,
        "bos": windows.bos,
        "join": JOIN,
        "limit": limit,
        "standard_protocol": not deviations,
        "note": "; ".join([*deviations, "the convention of the literature"]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "content_hash": windows.content_hash,
    }
