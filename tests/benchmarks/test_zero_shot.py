"""Zero-shot records: answers compared with float64 log-likelihoods and lm_eval's HFLM, and the recorded protocol."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gprune.benchmarks import task_sources, tasks
from gprune.errors import UserError
from gprune.models.masks import Masks, masked
from gprune.models.surgery import slice_model
from gprune.report.task_tables import evaluation_table
from tests.benchmarks.conftest import questions, write_task
from tests.tiny_llama import make_tiny_llama
from tests.tiny_run import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("data")


def measured(*names, **options) -> list[dict]:
    return tasks.measure_tasks(make_tiny_llama(), tiny_tokenizer(), names, **options)


def float64_loglikelihoods(model, tokenizer, row) -> np.ndarray:
    """Sums of the float64 log-probabilities of each choice's tokens after the prompt."""
    sums = []
    for choice in row["choices"]:
        context, whole = tokenizer(row["prompt"]).input_ids, tokenizer(f"{row['prompt']} {choice}").input_ids
        logits = model.double()(torch.tensor([whole])).logits[0]
        log_p = logits.log_softmax(-1)[torch.arange(len(whole) - 1), whole[1:]]
        sums.append(float(log_p[len(context) - 1 :].sum()))
    return np.array(sums)


def test_accuracies_equal_those_of_float64_loglikelihoods():
    (record,), rows = measured("mine"), questions(12)
    lls = [float64_loglikelihoods(make_tiny_llama(), tiny_tokenizer(), row) for row in rows]
    normed = [ll / [len(choice) for choice in row["choices"]] for ll, row in zip(lls, rows, strict=True)]
    for suffix, scores in (("", lls), ("_norm", normed)):
        correct = [int(np.argmax(score) == row["label"]) for score, row in zip(scores, rows, strict=True)]
        assert record[f"acc{suffix}"] == pytest.approx(np.mean(correct), abs=1e-12)
        assert record[f"acc{suffix}_stderr"] == pytest.approx(np.std(correct, ddof=1) / 12**0.5, abs=1e-12)
        assert record[f"correct{suffix}"] == "".join(map(str, correct))
    assert record["correct"] != record["correct_norm"]
    assert record["answers"] == [int(np.argmax(ll)) for ll in lls]


def test_greedy_is_how_often_greedy_decoding_gives_the_right_choice(data):
    """The choices of every second question have the most likely token as the right one."""
    model, tokenizer, rows = make_tiny_llama(), tiny_tokenizer(), questions(12)
    for row in rows[::2]:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        row["choices"][row["label"]] = tokenizer.decode(model(ids).logits[0, -1].argmax())
    write_task(data, "mine", "test", rows)
    (record,) = measured("mine")
    assert record["correct_greedy"] == "10" * 6
    assert (record["greedy"], record["greedy_stderr"]) == (0.5, pytest.approx((0.25 / 11) ** 0.5))
    dense = record | {"run": "r", "model": "tiny", "stage": "dense"}
    pruned = dense | {"stage": "gprune", "greedy": 5 / 12, "correct_greedy": "00" + "10" * 5}
    table = evaluation_table([dense, pruned])
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    assert cells["greedy"] == "0.417 +- 0.151 (-0.083 +- 0.083)"


@pytest.mark.parametrize(("batch_size", "has_logits_to_keep"), [(1, True), (3, True), (8, False)])
def test_answers_equal_hflms_and_logits_are_computed_for_continuations_only(
    batch_size, has_logits_to_keep, monkeypatch
):
    """Continuations of one or more tokens, several for one context, and some longer than the model's positions."""
    from lm_eval.models.huggingface import HFLM

    from gprune.benchmarks.answers import AnswerLM

    rng = np.random.default_rng(3)
    contexts = [rng.integers(5, 60, n).tolist() for n in (1, 4, 4, 17, 30)]
    requests = [
        ((str(i), str(j)), context, rng.integers(5, 60, n).tolist())
        for i, context in enumerate(contexts)
        for j, n in enumerate((1, 1, 1, 2, 7, 9))
    ]
    model, logit_rows = make_tiny_llama(max_position_embeddings=32), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: logit_rows.append(inputs[0].shape[:-1].numel()))
    if not has_logits_to_keep:
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda tokens: forward(tokens))
    answers = {}
    for lm in (
        HFLM(pretrained=model, tokenizer=tiny_tokenizer(), backend="causal", batch_size=batch_size),
        AnswerLM(model, tiny_tokenizer(), batch_size),
    ):
        logit_rows.clear()
        with torch.inference_mode():
            answers[type(lm)] = lm._loglikelihood_tokens(requests, disable_tqdm=True), sum(logit_rows)
    (theirs, all_rows), (ours, our_rows) = answers[HFLM], answers[AnswerLM]
    assert [ll for ll, _ in ours] == pytest.approx([ll for ll, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    if has_logits_to_keep:
        assert our_rows < 0.9 * all_rows
    else:
        assert our_rows == all_rows
    # The same tokens, split into context and continuation at two places. HFLM scores the second with the first's row.
    same = (("same", "input"), requests[3][1] + requests[3][2][:1], requests[3][2][1:])
    both, alone = (lm._loglikelihood_tokens(batch, disable_tqdm=True) for batch in ([requests[3], same], [same]))
    assert both[1] == pytest.approx(alone[0], abs=1e-5)


@pytest.fixture
def lm():
    """A model of 32 positions for lm_eval."""
    answers = pytest.importorskip("gprune.benchmarks.answers")
    return answers.AnswerLM(make_tiny_llama(max_position_embeddings=32), tiny_tokenizer(), 4)


def test_an_answer_after_a_prompt_of_spaces_is_scored_after_bos(lm):
    bos, answer = tiny_tokenizer().bos_token_id, [5, 6, 7]
    empty, with_bos = (lm._loglikelihood_tokens([((" ", "x"), c, answer)], disable_tqdm=True) for c in ([], [bos]))
    assert empty == with_bos
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token = tokenizer.unk_token, None, None
    with pytest.raises(UserError, match="A task needs a tokenizer with BOS or EOS"):
        type(lm)(lm.model, tokenizer, 4)


@pytest.mark.parametrize("tokens", [0, 33])
def test_answers_without_tokens_or_longer_than_the_model_are_refused(lm, tokens):
    with pytest.raises(UserError, match=rf"1 to 32 tokens, the positions of the model; got {tokens} in 'an answer'"):
        lm._loglikelihood_tokens([(("a prompt", "an answer"), [5], [6] * tokens)], disable_tqdm=True)


def test_texts_longer_than_the_positions_of_the_model_are_not_generated(lm):
    request = SimpleNamespace(args=("a prompt", {"until": ["x"], "max_gen_toks": 32}), task_name="gsm8k")
    with pytest.raises(UserError, match="'gsm8k' needs a model with more than 32 positions"):
        lm.generate_until([request])


def test_prompts_that_are_cut_are_counted_and_are_not_the_standard_protocol(lm, data, monkeypatch):
    rows = questions(3)
    rows[1]["prompt"] = " ".join(30 * ["Question:"])
    task = task_sources.local_task(write_task(data, "long", "test", rows))
    monkeypatch.setattr(tasks, "load_tasks", lambda *_: [replace(task, complete=True)])
    (record,) = tasks.measure_tasks(lm.model, tiny_tokenizer(), ["long"])
    assert record["note"].startswith("questions with prompts cut to the positions of the model: 1; ")
    assert record["standard_protocol"] is False
    del rows[1]
    short = task_sources.local_task(write_task(data, "long", "test", rows))
    monkeypatch.setattr(tasks, "load_tasks", lambda *_: [replace(short, complete=True)])
    assert tasks.measure_tasks(lm.model, tiny_tokenizer(), ["long"])[0]["standard_protocol"] is True
    prompts = ["Question: " * 9, "Answer:"]  # of texts to generate
    lm.tok_batch_encode(prompts, left_truncate_len=8)
    assert lm.cut_prompts == {prompts[0]}


def test_a_task_with_acc_norm_only_has_no_acc_and_is_compared_by_acc_norm(monkeypatch):
    (task,) = tasks.load_tasks("mine", "local")
    del task.task._metric_fn_list["acc"]
    monkeypatch.setattr(tasks, "load_tasks", lambda *_: [task])
    (record,) = measured("mine", batch_size=2)
    assert record["acc_norm"] == pytest.approx(record["correct_norm"].count("1") / 12)
    assert record["acc"] is None
    row = record | {"run": "r", "model": "tiny"}
    assert "+0.000" in evaluation_table([row | {"stage": "dense"}, row | {"stage": "gprune"}]).to_markdown()


def test_non_finite_loglikelihoods_are_refused():
    model = make_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="non-finite log-likelihood came up in task 'piqa'"):
        tasks.measure_tasks(model, tiny_tokenizer(), ["piqa"])


def test_tokens_beyond_the_embedding_are_refused():
    model = make_tiny_llama(vocab_size=100)
    with pytest.raises(UserError, match=r"Tokens must be less than 100, the number of embeddings; got 1\d\d\."):
        tasks.measure_tasks(model, tiny_tokenizer(), ["piqa"])


def test_records_contain_their_protocol_and_the_number_of_questions():
    records = measured("piqa", "sciq", "blimp")
    whole, _, pairs = records
    assert [r["split"] for r in records] == ["validation", "validation", "test"]
    protocol = {"source": "local", "num_fewshot": 0, "limit": None, "bos": False, "dtype": "float32"}
    assert all(protocol.items() <= r.items() and r["harness"].startswith("lm_eval ") for r in records)
    assert all("never to be set beside published figures" in r["note"] for r in records[1:])
    assert pairs["acc_norm"] is None
    assert "correct_norm" not in pairs
    json.dumps(records, allow_nan=False)
    (limited,) = measured("piqa", limit=5)
    assert limited["questions"] == 5
    assert limited["note"].startswith("only the first 5 questions; ")
    assert whole["correct"].startswith(limited["correct"])
    assert limited["content_hash"] != whole["content_hash"]
    assert measured("piqa", limit=1)[0]["acc_stderr"] is None


def test_masked_and_sliced_models_answer_alike_and_evaluation_has_no_side_effects(data, capfd):
    write_task(data, "many", "test", questions(60))
    generator = torch.Generator().manual_seed(0)
    masks = Masks([torch.rand(48, generator=generator) < 0.2 for _ in range(3)], [torch.ones(2, dtype=torch.bool)] * 3)
    model, tokenizer = make_tiny_llama(), tiny_tokenizer()
    tokenizer.pad_token = None
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    (dense,) = tasks.measure_tasks(model, tokenizer, ["many"])
    with masked(model, masks):
        (first,) = tasks.measure_tasks(model, tokenizer, ["many"])
    (second,) = tasks.measure_tasks(slice_model(model, masks), tokenizer, ["many"])
    assert first == second
    assert first["correct"] != dense["correct"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert tokenizer.pad_token is None
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert capfd.readouterr().err == ""
