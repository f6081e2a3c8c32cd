"""Windows of tokens sampled from documents, their halves and hashes, loaders for several ranks, and BOS tokens."""

from __future__ import annotations

import json
import math
import re

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

from gprune.corpora.load import load_corpus
from gprune.corpora.loaders import CorpusDataModule, ShardedBatchSampler, TokenDataset
from gprune.corpora.windows import Sample, Windows, cut_text, leading_token, make_windows
from gprune.errors import UserError


def word_tokenizer(words):
    """A tokenizer with one id per word (its position + 1; 0 is unknown) and a BOS that it does not add itself."""
    vocabulary = {"[UNK]": 0} | {word: i for i, word in enumerate(words, 1)} | {"<s>": len(words) + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="[UNK]")


WORDS = [f"w{i}" for i in range(3000)]
TEXTS = [" ".join(WORDS[start : start + 100]) for start in range(0, 3000, 100)]  # 30 documents of 100 words


def windows_of(texts=TEXTS, **overrides):
    """Ten windows of 32 tokens by default; `overrides` are arguments of `Sample`, or `corpus` and `split`."""
    settings = {"corpus": "demo", "split": "train", "num_samples": 10, "seq_len": 32, "seed": 0} | overrides
    named = {name: settings.pop(name) for name in ("corpus", "split")}
    return make_windows(texts, word_tokenizer(WORDS), Sample(**settings), **named)


def test_without_shuffling_windows_are_the_consecutive_full_windows_of_the_text():
    windows = windows_of(shuffle=False)
    assert torch.equal(windows.tokens, torch.arange(1, 321).view(10, 32))
    assert (windows.corpus, windows.split) == ("demo", "train")
    assert torch.equal(windows_of(shuffle=False, num_samples=None).tokens, torch.arange(1, 93 * 32 + 1).view(93, 32))


def test_sampled_windows_do_not_overlap_are_spread_over_documents_and_have_no_bos():
    windows = windows_of()
    assert windows.tokens.shape == (10, 32)
    tokens = windows.tokens.flatten()
    assert len(tokens.unique()) == 320  # all words of the corpus are distinct, so no overlap
    assert tokens.min() > 0
    assert tokens.max() <= 3000
    assert len(((tokens - 1) // 100).unique()) >= 5  # of 30 documents; the first ten windows cover 4


@pytest.mark.parametrize("bos", [None, 3001])
def test_with_repeat_the_windows_of_a_small_corpus_are_used_again_in_order(caplog, bos):
    caplog.set_level("INFO", logger="gprune")
    once = windows_of(TEXTS[:1], num_samples=3, bos=bos)
    assert "asked for" not in caplog.text
    repeated = windows_of(TEXTS[:1], num_samples=8, bos=bos, repeat=math.inf)
    assert torch.equal(repeated.tokens, torch.cat([once.tokens, once.tokens, once.tokens[:2]]))
    assert "'demo' has 9" in caplog.text  # 96 tokens, or 93 beside BOS
    # A corpus with enough text is not changed.
    assert windows_of(repeat=4).content_hash == windows_of().content_hash
    with pytest.raises(UserError, match=r"must have 8 windows of 32 tokens \(256 tokens\); got 0 \(2\)\."):
        windows_of(["w1 w2"], num_samples=8, bos=bos, repeat=math.inf)


def test_text_is_used_at_most_as_often_as_allowed_and_refused_below_the_least_tokens(caplog):
    caplog.set_level("INFO", logger="gprune")
    once = windows_of(TEXTS[:1], num_samples=3)
    four_times = windows_of(TEXTS[:1], num_samples=80, repeat=4, least_tokens=96)
    assert torch.equal(four_times.tokens, once.tokens.repeat(4, 1))
    assert "has 96 tokens to train on, and 2,560 are asked for: each is used 4 times, 384 in all" in caplog.text
    with pytest.raises(UserError, match=r"must have 97 tokens to train on; got 96\."):
        windows_of(TEXTS[:1], num_samples=80, repeat=4, least_tokens=97)
    assert windows_of(TEXTS[:1], num_samples=3, repeat=4, least_tokens=97).content_hash == once.content_hash


def test_content_hashes_are_reproducible_and_depend_on_seed_and_shape():
    # Results are cached under these hashes, so a change here invalidates caches.
    assert windows_of().content_hash == "00fa0c0647dce3c3"
    assert windows_of(shuffle=False).content_hash == "5b7c7dfd054da562"
    assert windows_of(seed=1).content_hash != windows_of().content_hash
    assert windows_of(shuffle=False, seed=1).content_hash == windows_of(shuffle=False).content_hash
    # Statistics and perplexities of the same tokens differ between 4 x 8 and 8 x 4 windows, and so must the hashes.
    shapes = [Windows("c", "train", torch.arange(32).reshape(shape)) for shape in ((4, 8), (8, 4), (2, 16))]
    assert len({windows.content_hash for windows in shapes}) == 3


FRESH = {"flags": ("--distill.tokens", "--corpora.seq_len"), "per_window": 96}  # three corpora


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 4, "split": "test"},
         "'demo' (test) must have 4 windows of 32 tokens (128 tokens); got 3 (100). Use --corpora.num_samples 3, "
         "--corpora.seq_len 24, or more text."),
        ({"num_samples": None, "seq_len": 101}, "got 0 (100). Use --corpora.seq_len 96, or more text."),
        ({"num_samples": 20}, "got 3 (100). Use --corpora.num_samples 3, or more text."),
        ({"num_samples": 4, **FRESH}, "Use --distill.tokens 288, --distill.repeat true, or more text."),
    ],
)  # fmt: skip
def test_too_little_text_is_refused_with_what_there_is_what_is_needed_and_what_fits(settings, message):
    with pytest.raises(UserError) as error:
        windows_of(TEXTS[:1], **settings)
    assert str(error.value).endswith(message)
    remedies = dict(re.findall(r"(--[\w.]+) (\d+)", message))  # each of them is enough
    for flag, field in (("--corpora.num_samples", "num_samples"), ("--corpora.seq_len", "seq_len")):
        if flag in remedies:
            assert len(windows_of(TEXTS[:1], **settings | {field: int(remedies[flag])}).tokens)


def test_a_tokenizer_that_makes_no_token_of_the_text_is_refused(tmp_path):
    """transformers reads the tokenizer of every qwen2 model as byte-level BPE, even if its files differ."""
    CONFIG_MAPPING["qwen2"]().save_pretrained(tmp_path)
    word_tokenizer(WORDS).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sample = Sample(num_samples=2, seq_len=8, seed=0)
    with pytest.raises(UserError, match="the model's tokenizer can read; got no token from Qwen2Tokenizer"):
        make_windows(TEXTS, tokenizer, sample, corpus="demo", split="train")


@given(st.text(alphabet="ab \n", max_size=300), st.integers(2, 40))
def test_cut_text_drops_at_most_one_separator_per_cut(text, limit):
    pieces = list(cut_text(text, limit))
    assert all(len(piece) <= limit for piece in pieces)
    assert "".join(pieces).replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")
    assert len(text) - sum(map(len, pieces)) < len(pieces)


@given(
    num_windows=st.integers(0, 50),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 6),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_shards_of_all_ranks_together_are_the_batches_of_one_process(
    num_windows, batch_size, world_size, shuffle, epoch
):
    def batches(rank, world_size):
        """Batches of one rank: lists of (window index, weight). Weight 0 is padding."""
        sampler = ShardedBatchSampler(
            num_windows, batch_size, rank=rank, world_size=world_size, shuffle=shuffle, seed=5
        )
        sampler.set_epoch(epoch)
        result = list(sampler)
        assert len(result) == len(sampler)
        return result

    whole = batches(0, 1)
    shards = [batches(rank, world_size) for rank in range(world_size)]
    assert sorted(index for batch in whole for index, _ in batch) == list(range(num_windows))
    assert all(len(shard) == len(whole) for shard in shards)
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert all(parts)  # no rank has an empty batch
        without_padding = [item for part in parts for item in part if item[1] == 1.0]
        assert without_padding == [item for rank in range(world_size) for item in batch[rank::world_size]]
        assert all(weight in (0.0, 1.0) for part in parts for _, weight in part)


def demo_windows(start, count, seq_len=4):
    tokens = torch.arange(start * seq_len, (start + count) * seq_len).view(count, seq_len)
    return Windows(f"corpus{start}", "train", tokens)


def test_items_contain_their_window_index_and_half():
    """The halves of a corpus are its earlier and its later windows."""
    dataset = TokenDataset([demo_windows(0, 3), demo_windows(3, 4), demo_windows(7, 1)])
    items = [dataset[(index, 0.0)] for index in range(len(dataset))]
    assert [item["input_ids"].tolist() for item in items] == torch.arange(32).view(8, 4).tolist()
    assert [item["index"] for item in items] == list(range(8))
    assert [item["half"] for item in items] == [0, 0, 1, 0, 0, 1, 1, 0]
    assert items[4]["weight"].dtype == torch.float32


def test_halves_of_a_corpus_share_at_most_one_document():
    """Alternating windows would share most documents, so that halves would agree more than two independent samples."""
    texts = [" ".join(WORDS[start : start + 40]) for start in range(0, 3000, 40)]  # each text is one piece
    windows = windows_of(texts, num_samples=20)
    piece = (windows.tokens - 1) // 40
    half = torch.tensor([TokenDataset([windows])[(i, 1.0)]["half"] for i in range(20)])

    def shared_pieces(half):
        first_half, second_half = (set(piece[half == h].flatten().tolist()) for h in (0, 1))
        return len(first_half & second_half)

    assert shared_pieces(half) <= 1
    assert shared_pieces(torch.arange(20) % 2) >= 8


class Recorder(pl.LightningModule):
    """A module that records its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_indices, self.test_ids = [], {}

    def training_step(self, batch, _):
        assert torch.equal(batch["input_ids"][:, 0], 4 * batch["index"])
        self.train_indices.append((self.current_epoch, batch["index"].tolist()))
        return self.weight * batch["weight"].sum()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.test_ids.setdefault(dataloader_idx, []).extend(batch["input_ids"][:, 0].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_trainer_loaders_reshuffle_training_windows_each_epoch_and_keep_test_order(tmp_path):
    module = Recorder()
    windows = [demo_windows(0, 3), demo_windows(3, 4)]
    data = CorpusDataModule(train=windows, test=windows, batch_size=3, seed=0)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    epochs = [
        [index for batch_epoch, batch in module.train_indices if batch_epoch == epoch for index in batch]
        for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]  # Lightning calls set_epoch
    trainer.test(module, data, verbose=False)
    assert module.test_ids == {0: [0, 4, 8], 1: [12, 16, 20, 24]}


# --- BOS


def test_bos_is_the_first_token_of_every_window():
    plain, with_bos = windows_of(shuffle=False, seq_len=31), windows_of(shuffle=False, bos=3001)
    assert (plain.bos, with_bos.bos) == (False, True)
    assert with_bos.tokens.shape == (10, 32)
    assert with_bos.tokens[:, 0].tolist() == [3001] * 10
    assert torch.equal(with_bos.tokens[:, 1:], plain.tokens)
    assert len({plain.content_hash, with_bos.content_hash, windows_of(shuffle=False).content_hash}) == 3
    sampled = windows_of(bos=3001).tokens
    assert len(sampled[:, 1:].unique()) == 310  # 10 windows of 31 distinct words
    with pytest.raises(UserError, match=r"must have 97 windows of 32 tokens \(3,104 tokens\); got 96 "):
        windows_of(bos=3001, num_samples=97)


@pytest.mark.parametrize(
    ("bos", "adds_bos", "token"),
    [("auto", False, None), ("auto", True, 3001), ("never", True, None), ("always", False, 3001)],
)
def test_bos_auto_follows_the_tokenizer_and_other_values_override_it(bos, adds_bos, token):
    tokenizer = word_tokenizer(WORDS)
    if adds_bos:
        special = [("<s>", tokenizer.bos_token_id)]
        adding = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = adding
    assert leading_token(tokenizer, bos) == token


CHAT = """{% for m in messages %}{{ raise_exception("no tools") if m.role == "tool" }}{{ m.role }} {{ m.content }}
{% endfor %}"""


def write_chat(path, *, role="w1", messages=40):
    """Write a corpus of as many conversations of two messages."""
    lines = [
        {"messages": [{"role": role, "content": f"w{4 * n}"}, {"role": "w2", "content": f"w{4 * n + 3}"}]}
        for n in range(messages)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_messages_are_text_by_the_chat_template_of_the_tokenizer(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = CHAT
    documents = load_corpus(str(write_chat(tmp_path / "chat.jsonl")), "test")
    sample = Sample(num_samples=2, seq_len=8, shuffle=False)
    windows = make_windows(documents, tokenizer, sample, corpus="chat", split="test")
    assert tokenizer.decode(windows.tokens[0]) == "w1 w128 w2 w131 w1 w132 w2 w135"  # the last 8 of 40 conversations


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (
            None,
            "w1",
            r"chat\.jsonl:1: The tokenizer of the model must have a chat template for 'messages'; it has none",
        ),
        (CHAT, "tool", r"chat\.jsonl:1: Cannot apply the chat template of the model: no tools"),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused_by_file_and_line(template, role, message, tmp_path):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = template
    documents = load_corpus(str(write_chat(tmp_path / "chat.jsonl", role=role)), "train")
    with pytest.raises(UserError, match=message):
        make_windows(documents, tokenizer, Sample(2, 8), corpus="chat", split="train")


def test_bos_always_is_refused_for_a_tokenizer_without_bos():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.bos_token = None
    assert leading_token(tokenizer, "auto") is None
    with pytest.raises(UserError, match=r"^--corpora\.bos must be auto or never"):
        leading_token(tokenizer, "always")
