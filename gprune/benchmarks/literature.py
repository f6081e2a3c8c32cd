"""Perplexity on WikiText-2 and C4 in the conventions of the pruning and quantisation literature.

WikiText-2: lines of the raw test file, including their line ends, with blank lines as empty strings, joined by two line
ends. (With GPT-2's vocabulary the text has 287,644 tokens.)

C4: the first 1,100 documents of the validation shard `en/c4-validation.00000-of-00008.json.gz` of allenai/c4, joined by
a space, and the first 256 windows, as in the scripts of SparseGPT and Wanda, and GPTQ's `c4-new` (its `c4` samples
windows).

Both: the text is tokenised as one string, and cut into windows of 2048 tokens (128 in old tables) without overlap. The
last partial window is dropped. Each window begins with BOS if the tokenizer adds it to a text. Scripts in which a Llama
tokenizer adds it to the whole text have BOS in the first window only.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.settings import TEXTS, WIKITEXT
from gprune.console import quieted
from gprune.corpora.hub import hub_errors, offline_if_unreachable
from gprune.corpora.windows import JOIN, Bos, Sample, Windows, check_tokens, leading_token, make_windows
from gprune.errors import UserError, quoting
from gprune.evaluation.intervals import mean_perplexity
from gprune.evaluation.perplexity import perplexity
from gprune.screen import Screen
from gprune.storage.paths import expanded, read_required_text

WIKITEXT_FILE = "corpora/wikitext2/wiki.test.raw"
WIKITEXT_CHARACTERS = 1_294_336  # length of the joined WikiText-2
C4_FILE = "c4-validation.00000-of-00008.json.gz"
C4_DOCUMENTS = 1100  # number of documents of C4 that are joined
C4_WINDOWS = 256  # number of windows of C4
BATCH_TOKENS = 2048  # tokens per forward pass


def join_lines(raw: str) -> str:
    """Join the lines of `wiki.test.raw` to the text that is scored."""
    # splitlines() would also split at other characters, such as form feeds.
    lines = re.findall(r"[^\n]*\n|[^\n]+", raw)
    return JOIN.join(line if line.strip() else "" for line in lines)


def read_wikitext2() -> str:
    """Read WikiText-2 from `$GPRUNE_DATA_DIR/corpora/wikitext2/wiki.test.raw` or the hub."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    if root and (path := expanded(root) / WIKITEXT_FILE).is_file():
        return join_lines(read_required_text(path, "WikiText-2's raw test file"))
    import datasets

    with (
        hub_errors("WikiText-2", f"the raw test file into $GPRUNE_DATA_DIR/{WIKITEXT_FILE}"),
        offline_if_unreachable(),
    ):
        return JOIN.join(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def read_c4() -> tuple[str, int]:
    """Read C4 from `$GPRUNE_DATA_DIR/corpora/c4` or the hub. Return the text and its number of documents."""
    import datasets

    path = expanded(os.environ.get("GPRUNE_DATA_DIR", "")) / "corpora/c4" / C4_FILE
    is_local = path.is_file()
    source, file = ("json", str(path)) if is_local else ("allenai/c4", f"en/{C4_FILE}")
    errors = quoting(f"Cannot read C4 from {file}: ", f". Put the file into $GPRUNE_DATA_DIR/corpora/c4/{C4_FILE}.")
    with errors, quieted("datasets") if is_local else offline_if_unreachable():
        rows = datasets.load_dataset(source, data_files={"validation": file}, split="validation", streaming=True)
        texts = [row["text"] for row in itertools.islice(rows, C4_DOCUMENTS)]
        return " ".join(texts), len(texts)


def literature_windows(text: str, tokenizer: PreTrainedTokenizerBase, task: str, *, seq_len: int, bos: Bos) -> Windows:
    """Cut a text into windows, (n, seq_len): all complete windows in order or, for C4, the first 256."""
    sample = Sample(None, seq_len, shuffle=False, bos=leading_token(tokenizer, bos), flags=("--limit", "--seq_len"))
    if task == WIKITEXT:
        return make_windows([text], tokenizer, sample, corpus=task, split="test")
    windows = make_windows([text], tokenizer, sample, corpus=task, split="validation")
    return replace(windows, tokens=windows.tokens[:C4_WINDOWS])


def literature_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str = WIKITEXT,
    *,
    seq_len: int = 2048,
    bos: Bos = "auto",
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure perplexity in the convention of the literature, with a 95 % interval over windows, as a record."""
    positions = getattr(model.config, "max_position_embeddings", None) or seq_len
    if not 2 <= seq_len <= positions:
        raise UserError(f"--seq_len must be from 2 to {positions}, the model's positions; got {seq_len}.")
    text, join, note, missing = _convention(task)
    all_windows = literature_windows(text, tokenizer, task, seq_len=seq_len, bos=bos)
    windows = replace(all_windows, tokens=all_windows.tokens[:limit])
    check_tokens(windows, tokenizer, model.get_input_embeddings().num_embeddings)
    batch_size = max(1, BATCH_TOKENS // seq_len)
    with Screen({0: windows.tokens.numel()}) as screen:
        screen.begin_part(f"Perplexity on {TEXTS[task]}")
        result = perplexity(model, windows, batch_size=batch_size, progress=screen.add_batch)
    _, low, high = mean_perplexity({task: result.window_nll}, seq_len - 1)
    if len(windows.tokens) < len(all_windows.tokens):
        missing = [f"only the first {len(windows.tokens)} windows", *missing]
    return {
        "kind": "perplexity",
        "task": task,
        "split": windows.split,
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
        "join": join,
        "limit": limit,
        "standard_protocol": not missing,
        "note": "; ".join([*missing, note]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "content_hash": windows.content_hash,
    }


def _convention(task: str) -> tuple[str, str, str, list[str]]:
    """Return the text of a task, what joins its documents, a note on the convention, and what the text lacks."""
    if task == WIKITEXT:
        text = read_wikitext2()
        missing = [] if len(text) == WIKITEXT_CHARACTERS else [f"{len(text):,} of {WIKITEXT_CHARACTERS:,} characters"]
        return text, JOIN, "the convention of the literature", missing
    text, documents = read_c4()
    missing = [] if documents == C4_DOCUMENTS else [f"{documents:,} of {C4_DOCUMENTS:,} documents"]
    note = f"the convention of SparseGPT and Wanda: up to {C4_WINDOWS} windows of the first {C4_DOCUMENTS:,} documents"
    return text, " ", note, missing
