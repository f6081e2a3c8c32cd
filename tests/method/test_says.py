"""What the model says: continuations of the prompts of a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gprune.config import RunConfig
from gprune.method import says
from gprune.method.says import continuation, one_line, prompt_tokens
from gprune.models.masks import masked
from gprune.models.surgery import slice_model
from tests import tiny_run
from tests.world import make_tiny, make_tiny_llama, some_masks

GENERATE = {"do_sample": False, "max_new_tokens": says.NEW_TOKENS, "pad_token_id": 3}
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}{{ ' </s>' if add_generation_prompt }}"


def test_a_run_shows_how_the_dense_the_pruned_and_the_recovered_model_continue_its_prompts(
    world, shared_cache, tmp_path, monkeypatch, capsys
):
    flags = ("--recovery=least_squares", "--gprune=false")
    world.run(tmp_path, *flags, name="first")  # fills the cache
    plain = world.run(tmp_path, *flags, name="plain")
    prompts = [" ".join(tiny_run.WORDS[:3]), f"<b>\n{tiny_run.WORDS[3]} ?"]
    flags += (f"--evaluation.prompts={json.dumps(prompts)}",)
    tiny_run.draw(monkeypatch)
    result = world.run(tmp_path, *flags)
    assert "says" not in plain.summary
    assert result.summary["forward_tokens"] == plain.summary["forward_tokens"]
    assert result.records == plain.records
    entry = result.summary["says"]
    assert list(entry["texts"]) == [prompts[0], f"<b> ⏎ {tiny_run.WORDS[3]} ?"]
    for prompt, by_stage in zip(prompts, entry["texts"].values(), strict=True):
        assert list(by_stage) == ["dense", "pruned", "recovered"]
        assert by_stage["dense"] != by_stage["recovered"]
        ids = result.tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = result.model.generate(ids, **GENERATE)[0, ids.shape[1] :]  # of the folder
        assert by_stage["recovered"] == result.tokenizer.decode(generated, skip_special_tokens=True)
        assert f"\n      recovered  {by_stage['recovered'][:60]}" in entry["said"]
    assert entry["said"] in (result.path / "model/README.md").read_text(encoding="utf-8")
    page = (result.path / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert entry["said"].replace("<b>", "&lt;b&gt;") in page
    capsys.readouterr()
    monkeypatch.setattr(says, "continuation", None)  # a finished run continues nothing
    assert world.run(tmp_path, *flags).summary == result.summary
    assert entry["said"] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_continuations_are_greedy_and_those_of_the_masked_and_the_sliced_model_are_equal(name):
    model, prompt = make_tiny(name), torch.tensor([[5, 6, 7]])
    model.generation_config.update(do_sample=True, repetition_penalty=5.0)
    dense = continuation(model, prompt, None).tolist()
    ids = prompt
    for _ in range(says.NEW_TOKENS):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert dense == ids[0, 3:].tolist()
    masks = some_masks(model, attention=False)
    sliced = continuation(slice_model(model, masks), prompt, None).tolist()
    with masked(model, masks):
        assert continuation(model, prompt, None).tolist() == sliced != dense
    end = dense[3]
    assert continuation(model, prompt, [end, 1]).tolist() == dense[: dense.index(end) + 1]


def test_a_prompt_may_be_longer_than_the_model_has_positions():
    config = GPT2Config(vocab_size=128, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    model, prompt = GPT2LMHeadModel(config).eval(), torch.arange(5, 105)[None]
    assert torch.equal(continuation(model, prompt, None), continuation(model, prompt[:, -10:], None))


def test_a_question_goes_through_the_chat_template_if_there_is_one():
    tokenizer = tiny_run.tiny_tokenizer()
    assert prompt_tokens("a?", tokenizer).tolist() == [tokenizer("a?")["input_ids"]]
    tokenizer.chat_template = CHAT
    assert prompt_tokens("a?\n", tokenizer).tolist() == [tokenizer("user a? </s>")["input_ids"]]
    assert prompt_tokens("? a", tokenizer).tolist() == [tokenizer("? a")["input_ids"]]


@pytest.mark.parametrize(
    ("prompt", "template", "embeddings", "message"),
    [
        ("a?", "{{ raise_exception('no users') }}", 128, "no users. The run continues; --evaluation.prompts '[]'"),
        (tiny_run.WORDS[-1], None, 100, "of corpus '--evaluation.prompts' must be less than 100"),
    ],
)
def test_a_run_continues_without_prompts_that_do_not_fit_the_model(prompt, template, embeddings, message, caplog):
    run = fake_run(prompt, make_tiny_llama(vocab_size=embeddings))
    run.tokenizer.chat_template = template
    says.continue_prompts(run, "dense", run.model)
    assert message in caplog.text
    assert says.says_entry(run.manifest) == {}


def test_an_offloaded_model_continues_nothing(monkeypatch, tiny_model, caplog):
    run = fake_run("a", tiny_model)
    monkeypatch.setattr(says, "is_offloaded", lambda model: True)
    with caplog.at_level("INFO", logger="gprune"):
        says.continue_prompts(run, "dense", run.model)
    assert "The dense model continues no prompts" in caplog.text
    assert not run.manifest


def fake_run(prompt, model):
    manifest = {}
    return SimpleNamespace(
        cfg=RunConfig(evaluation={"prompts": [prompt]}), model=model, tokenizer=tiny_run.tiny_tokenizer(),
        meter=SimpleNamespace(forward=0), manifest=manifest, folder=SimpleNamespace(update_manifest=manifest.update),
    )  # fmt: skip


def test_a_continuation_is_on_one_line():
    assert one_line(" a \n\n b\tc\x1b[1m ") == "a ⏎ ⏎ b c [1m"
