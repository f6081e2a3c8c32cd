"""WikiText-2 and C4 by the protocol of the literature, compared with that protocol's script in float64."""

from __future__ import annotations

import gzip
import io
import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing

from gprune.benchmarks import literature
from gprune.benchmarks.literature import join_lines, literature_perplexity, literature_windows
from gprune.errors import UserError
from tests.tiny_run import WORDS, tiny_tokenizer
from tests.world import make_tiny_llama


@contextmanager
def unreachable_hub():
    yield False


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A WikiText-2 file of 30 lines in the local mirror. The hub is unreachable."""
    rng = np.random.default_rng(0)
    lines = [" \n" if i % 4 == 0 else " " + " ".join(rng.choice(WORDS, 20)) + " \n" for i in range(30)]
    path = tmp_path / "corpora" / "wikitext2" / "wiki.test.raw"
    path.parent.mkdir(parents=True)
    path.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(literature, "offline_if_unreachable", unreachable_hub)
    monkeypatch.setattr(literature, "WIKITEXT_CHARACTERS", len(join_lines("".join(lines))))
    return path


def rows_of_the_data_set(raw: str) -> list[str]:
    """The rows of the data set on the hub: one per line of the file, with blank lines made empty."""
    return [line if line.strip() else "" for line in io.StringIO(raw, newline="\n")]


def test_lines_keep_their_newline_and_blank_lines_become_empty():
    for raw in (
        " \n = Title = \n \n Text of a line . \n Another . \n", "a\n\n\nb\n", "no line end", "a \x0c b\n c \u2028 d \n",
        "\n", "a\n \t \nb",
    ):  # fmt: skip
        assert join_lines(raw) == "\n\n".join(rows_of_the_data_set(raw))


def test_windows_are_consecutive_and_start_with_bos_if_the_tokenizer_adds_it():
    text = " ".join(np.random.default_rng(1).choice(WORDS, 100))
    tokenizer = tiny_tokenizer()
    plain = tokenizer(text).input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer(text).input_ids[0] == 1
    windows = literature_windows(text, tokenizer, "wikitext2", seq_len=16, bos="auto")
    assert windows.tokens.tolist() == [[1, *plain[i : i + 15]] for i in range(0, 90, 15)]
    for without in (literature_windows(text, tokenizer, "wikitext2", seq_len=16, bos="never"),
                    literature_windows(text, tiny_tokenizer(), "wikitext2", seq_len=16, bos="auto")):  # fmt: skip
        assert without.tokens.tolist() == [plain[i : i + 16] for i in range(0, 96, 16)]


def literature_script(model, tokenizer, text: str, seq_len: int) -> float:
    """Perplexity by the loop of the pruning and quantization literature, in float64.

    Like that loop, it multiplies the mean over seq_len - 1 predictions of a window by seq_len.
    """
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    samples = ids.numel() // seq_len
    total = 0.0
    for i in range(samples):
        window = ids[:, i * seq_len : (i + 1) * seq_len]
        logits = model(window).logits.double()
        mean = F.cross_entropy(logits[0, :-1], window[0, 1:])
        total += float(mean) * seq_len
    return math.exp(total / (samples * seq_len))


@pytest.mark.parametrize("seq_len", [16, 128])
def test_wikitext2_perplexity_equals_the_literatures_script(seq_len, raw):
    model, tokenizer = make_tiny_llama(), tiny_tokenizer()
    record = literature_perplexity(model, tokenizer, seq_len=seq_len)
    expected = literature_script(model, tokenizer, join_lines(raw.read_text()), seq_len)
    assert record["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert record["low"] < record["perplexity"] < record["high"]
    assert record["windows"] * (seq_len - 1) == record["tokens"]
    assert math.exp(sum(record["window_nll"]) / record["tokens"]) == pytest.approx(record["perplexity"])
    json.dumps(record, allow_nan=False)


def test_records_contain_the_protocol_and_whether_it_is_the_standard_one(raw):
    whole = literature_perplexity(make_tiny_llama(), tiny_tokenizer(), seq_len=32)
    protocol = {"seq_len": 32, "stride": 32, "bos": False, "join": "\n\n", "split": "test", "dtype": "float32"}
    assert protocol.items() <= whole.items()
    assert whole["standard_protocol"]
    part = literature_perplexity(make_tiny_llama(), tiny_tokenizer(), seq_len=32, limit=3)
    assert not part["standard_protocol"]
    assert "only the first 3 windows" in part["note"]
    assert part["window_nll"] == pytest.approx(whole["window_nll"][:3], rel=1e-6)
    assert part["content_hash"] != whole["content_hash"]
    assert literature_perplexity(make_tiny_llama(), tiny_tokenizer(), seq_len=32, limit=10**6)["standard_protocol"]
    raw.write_text("".join(raw.read_text().splitlines(keepends=True)[:-3]))
    short = literature_perplexity(make_tiny_llama(), tiny_tokenizer(), seq_len=32)
    assert not short["standard_protocol"]
    assert f"of {literature.WIKITEXT_CHARACTERS:,} characters" in short["note"]


def test_invalid_window_lengths_and_texts_of_less_than_one_window_are_refused(raw):
    raw.write_text("a few words\n")
    for seq_len, message in (
        (257, "must be from 2 to 256"),
        (1, "got 1"),
        (256, r"1 windows of 256 tokens \(256 tokens\); got 0 \(3\)\. Use more text\."),
    ):
        with pytest.raises(UserError, match=message):
            literature_perplexity(make_tiny_llama(), tiny_tokenizer(), seq_len=seq_len)


def test_wikitext2_is_downloaded_if_the_mirror_has_no_file_and_the_error_names_its_path(raw, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it\nsecond line")

    raw.unlink()
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"corpora/wikitext2/wiki\.test\.raw") as error:
        literature.read_wikitext2()
    assert "second line" not in str(error.value)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"text": ["", " a \n", "b\n"]})
    assert literature.read_wikitext2() == "\n\n a \n\n\nb\n"


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """A local C4 shard with one document more than the protocol reads: its path and its texts."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 9)) for _ in range(literature.C4_DOCUMENTS + 1)]
    path = tmp_path / "corpora" / "c4" / literature.C4_FILE
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts)
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    return path, texts


def test_c4_perplexity_equals_the_literatures_script_on_the_first_1100_documents(shard, monkeypatch):
    assert (literature.C4_DOCUMENTS, literature.C4_WINDOWS) == (1100, 256)
    monkeypatch.setattr(literature, "C4_WINDOWS", 16)
    model, tokenizer = make_tiny_llama(), tiny_tokenizer()
    _, texts = shard
    record = literature_perplexity(model, tokenizer, "c4", seq_len=32)
    text = " ".join(" ".join(texts[:1100]).split()[: 16 * 32])  # each word is one token
    assert record["perplexity"] == pytest.approx(literature_script(model, tokenizer, text, 32), rel=1e-6)
    assert (record["windows"], record["task"], record["split"], record["join"]) == (16, "c4", "validation", " ")
    assert record["standard_protocol"]
    assert "SparseGPT and Wanda: up to 16 windows of the first 1,100 documents" in record["note"]


def test_c4_records_of_fewer_documents_or_windows_are_not_standard_and_an_invalid_shard_is_refused(shard, monkeypatch):
    path, _ = shard
    whole = gzip.compress(b'{"text": "ban ben bin bor ban ben bin"}\n' * 9)
    path.write_bytes(whole)
    record = literature_perplexity(make_tiny_llama(), tiny_tokenizer(), "c4", seq_len=16, limit=2)
    assert record["note"].startswith("only the first 2 windows; 9 of 1,100 documents; ")
    assert not record["standard_protocol"]
    number, no_text = (gzip.compress(line) for line in (b'{"text": "ban"}\n{"text": [1]}\n', b'{"url": "u"}\n'))
    for content in (b"no gzip", number, no_text, whole[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"Cannot read C4 from .*json\.gz: "):
            literature_perplexity(make_tiny_llama(), tiny_tokenizer(), "c4", seq_len=16)
    path.unlink()  # so it is downloaded
    monkeypatch.setattr(literature, "offline_if_unreachable", unreachable_hub)
    monkeypatch.setattr("datasets.load_dataset", lambda path, **_: [{"text": path}] * 2000)
    assert literature.read_c4() == (" ".join(["allenai/c4"] * 1100), 1100)
