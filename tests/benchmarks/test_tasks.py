"""Tasks of lm_eval: answers compared with float64 log-likelihoods and with lm_eval's own results, and records."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gprune.benchmarks import tasks
from gprune.errors import UserError
from gprune.models.masks import Masks, masked
from gprune.models.surgery import slice_model
from gprune.report.task_tables import evaluation_table
from tests.benchmarks.conftest import pairs, questions, sentence, write_tasks
from tests.tiny_run import ROOT, SPECIAL, WORDS, tiny_tokenizer
from tests.world import make_tiny_llama


def measured(*names, model=None, tokenizer=None, include_path=None, **options) -> list[dict]:
    """Load and measure tasks. Raise the first error."""
    by_name, errors = tasks.load_tasks(names, include_path)
    for error in errors.values():
        raise error
    tokenizer = tokenizer or tiny_tokenizer()
    model = model or make_tiny_llama()
    return [r for loaded in by_name.values() for r in tasks.measure_tasks(model, tokenizer, loaded, **options)]


def words_and_numbers() -> PreTrainedTokenizerFast:
    """One token for each number up to 77, for each word of GSM8K's prompts, and for 40 other words."""
    words = [*SPECIAL, *map(str, range(78)), "####", "Question", "Answer", ":", "?", *WORDS[:40]]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def float64_loglikelihoods(model, tokenizer, row) -> np.ndarray:
    """Sums of the float64 log-probabilities of each choice's tokens after the prompt."""
    sums = []
    for choice in row["choices"]:
        context, whole = tokenizer(row["prompt"]).input_ids, tokenizer(f"{row['prompt']} {choice}").input_ids
        logits = model.double()(torch.tensor([whole])).logits[0]
        log_p = logits.log_softmax(-1)[torch.arange(len(whole) - 1), whole[1:]]
        sums.append(float(log_p[len(context) - 1 :].sum()))
    return np.array(sums)


def test_accuracies_equal_those_of_float64_loglikelihoods(data):
    (record,), (part,), rows = measured("mine"), measured("mine", limit=5), questions(12)
    lls = [float64_loglikelihoods(make_tiny_llama(), tiny_tokenizer(), row) for row in rows]
    normed = [ll / [len(choice) for choice in row["choices"]] for ll, row in zip(lls, rows, strict=True)]
    for suffix, scores in (("", lls), ("_norm", normed)):
        correct = [int(np.argmax(score) == row["label"]) for score, row in zip(scores, rows, strict=True)]
        assert record[f"acc{suffix}"] == pytest.approx(np.mean(correct), abs=1e-12)
        assert record[f"acc{suffix}_stderr"] == pytest.approx(np.std(correct, ddof=1) / 12**0.5, abs=1e-12)
        assert record[f"correct{suffix}"] == "".join(map(str, correct))
    assert record["correct"] != record["correct_norm"]
    assert record["answers"] == [int(np.argmax(ll)) for ll in lls]
    assert (part["questions"], part["correct"], part["limit"]) == (5, record["correct"][:5], 5)
    assert part["note"].startswith("only the first 5 questions; 12 questions, not known to be all of lm_eval's, ")
    assert (record["standard_protocol"], part["standard_protocol"]) == (False, False)
    assert record["content_hash"] != part["content_hash"]


def test_greedy_is_how_often_greedy_decoding_gives_the_right_choice(data):
    """The choices of every second question have the most likely token as the right one."""
    model, tokenizer, rows = make_tiny_llama(), tiny_tokenizer(), questions(12)
    for row in rows[::2]:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        row["choices"][row["label"]] = tokenizer.decode(model(ids).logits[0, -1].argmax())
    write_tasks(data, mine={"test": rows})
    (record,) = measured("mine")
    assert record["correct_greedy"] == "10" * 6
    assert (record["greedy"], record["greedy_stderr"]) == (0.5, pytest.approx((0.25 / 11) ** 0.5))
    dense = record | {"run": "r", "model": "tiny", "stage": "dense"}
    pruned = dense | {"stage": "pruned", "greedy": 5 / 12, "correct_greedy": "00" + "10" * 5}
    table = evaluation_table([dense, pruned])
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    assert cells["greedy"] == "0.417 +- 0.151 (-0.083 +- 0.083)"


def test_a_masked_model_gives_the_answers_of_the_sliced_one_and_minimal_pairs_have_no_acc_norm(data):
    generator = torch.Generator().manual_seed(0)
    masks = Masks.of_blocks(
        [torch.rand(48, generator=generator) < 0.2 for _ in range(3)], [torch.ones(2, dtype=torch.bool)] * 3
    )
    model = make_tiny_llama()
    with masked(model, masks):
        (of_masked,) = measured("blimp", model=model)
    (of_sliced,) = measured("blimp", model=slice_model(model, masks))
    assert (of_masked["answers"], of_masked["correct"]) == (of_sliced["answers"], of_sliced["correct"])
    assert of_sliced["acc_norm"] is None
    lls = [
        float64_loglikelihoods(make_tiny_llama(), tiny_tokenizer(), {"prompt": "<s>", "choices": [p["good"], p["bad"]]})
        for p in pairs()
    ]
    (dense,) = measured("blimp")
    assert sorted(map(int, dense["correct"])) == sorted(int(good > bad) for good, bad in lls)


GSM8K = [{"question": f"{WORDS[i]} {i} ?", "answer": f"{WORDS[i]} <<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(9)]


def test_generated_answers_have_lm_evals_number_of_examples_and_both_filters(tmp_path, monkeypatch, only):
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    only("gsm8k")
    model, rows = make_tiny_llama(max_position_embeddings=512), [dict(row) for row in GSM8K[:4]]
    options = {"model": model, "tokenizer": words_and_numbers()}
    # The first pass reads the model's answers. They become the expected answers of every second row.
    for _ in range(2):
        write_tasks(tmp_path, gsm8k={"train": GSM8K, "test": rows})
        records = measured("gsm8k", **options)
        for row, answer in zip(rows[::2], records[1]["answers"][::2], strict=True):
            row["answer"] = f"ban\n#### {answer}"
    for record, name in zip(records, ("strict-match", "flexible-extract"), strict=True):
        assert (record["task"], record["num_fewshot"], record["acc"]) == (f"gsm8k/{name}", 5, None)
    assert (record["correct"], record["exact_match"]) == ("1010", 0.5)
    assert record["exact_match_stderr"] == pytest.approx(12**-0.5)
    (_, without) = measured("gsm8k", num_fewshot=2, **options)
    assert (without["num_fewshot"], without["own_num_fewshot"]) == (2, 5)
    assert without["note"].startswith("2 examples in prompts, lm_eval's own number is 5; ")
    # One of four answers changes from correct to wrong in the table.
    dense = record | {"run": "r", "model": "tiny", "stage": "dense"}
    pruned = dense | {"stage": "pruned", "answers": ["?", *dense["answers"][1:]], "correct": "0010"}
    (_, cells) = evaluation_table([dense, pruned]).rows
    assert cells[5:9] == ["0.500 +- 0.289", None, "-0.250 +- 0.250", "25.0%: -25.0% +0.0%"]


def test_metrics_of_a_tasks_own_are_compared_by_question(tmp_path, monkeypatch, only):
    """TruthfulQA's mc2 is the share of probability that the model gives to correct answers."""
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    only("truthfulqa")
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(7):
        targets = {"choices": [sentence(rng, 3) for _ in range(4)], "labels": [1, 1, 0, 0]}
        rows.append({"question": sentence(rng, 5), "mc1_targets": targets, "mc2_targets": targets})
    write_tasks(tmp_path, truthfulqa_mc2={"validation": rows})
    (ours,) = measured("truthfulqa_mc2", model=make_tiny_llama(max_position_embeddings=512))
    assert (ours["task"], ours["metric"], ours["acc"]) == ("truthfulqa_mc2/acc", "acc", None)
    assert ours["score"] == pytest.approx(np.mean(ours["scores"]), abs=1e-12)
    assert ours["score_stderr"] == pytest.approx(np.std(ours["scores"], ddof=1) / 7**0.5, abs=1e-12)
    dense = ours | {"run": "r", "model": "tiny", "stage": "dense"}
    differences = -0.1 * (np.arange(7) % 2)
    shifted = list(ours["scores"] + differences)
    pruned = dense | {"stage": "pruned", "scores": shifted, "score": np.mean(shifted)}
    (_, cells) = evaluation_table([dense, pruned]).rows
    error = differences.std(ddof=1) / 7**0.5
    assert cells[5:8] == [f"{np.mean(shifted):.3f} +- {ours['score_stderr']:.3f}", None,
                          f"{differences.mean():+.3f} +- {error:.3f}"]  # fmt: skip
    corpus_level = [{k: v for k, v in r.items() if k != "scores"} for r in (dense, pruned)]
    assert evaluation_table(corpus_level).rows[1][7] is None


def test_presets_groups_and_tags_are_replaced_by_their_tasks_once(data):
    folder = data / "tasks"
    group = {"group": "both", "task": ["piqa", "mine"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    config = yaml.safe_load((folder / "sciq.yaml").read_text())
    (folder / "sciq.yaml").write_text(yaml.safe_dump(config | {"tag": "science"}))
    by_name, errors = tasks.load_tasks(["both", "piqa", "science", "zeroshot7"])
    groups = {loaded.task.task_name: loaded.groups for of_name in by_name.values() for loaded in of_name}
    both = {"both": {"tasks": 2, "by_size": True}}
    assert groups == {
        "piqa": both | {"zeroshot7": {"tasks": 7, "by_size": False}}, "mine": both,
        "sciq": {"science": {"tasks": 1, "by_size": False}},
    }  # fmt: skip
    assert by_name["piqa"] == []  # it is in `both`
    assert [*errors] == ["boolq", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


def test_tasks_that_cannot_be_loaded_or_measured_are_refused_with_lm_evals_reason(data, only):
    only("sciq", "gsm8k")
    with pytest.raises(tasks.TaskError, match=r"^Cannot load task 'pica': .*not a registered task.* YAML tasks"):
        measured("pica")
    model = make_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="non-finite log-likelihood came up in task 'mine'"):
        measured("mine", model=model)
    with pytest.raises(tasks.TaskError, match=r"^Cannot load task 'gsm8k': .*(Hub|offline).* Without the hub"):
        measured("gsm8k")
    (data / "tasks/mine/test.jsonl").write_text("not json\n")
    with pytest.raises(tasks.TaskError, match=r"^Cannot load task 'mine': "):
        measured("mine")
    config = yaml.safe_load((data / "tasks/piqa.yaml").read_text())
    (data / "tasks/piqa.yaml").write_text(yaml.safe_dump(config | {"unsafe_code": True}))
    with pytest.raises(tasks.TaskError, match=r"^Cannot measure task 'piqa': .* marked as unsafe"):
        measured("piqa")


def test_the_recipe_of_the_docs_measures_a_file_of_questions(tmp_path, monkeypatch, only):
    """The YAML task and the lines of docs/tasks.md, in a folder that `--include_path` names."""
    page = (ROOT / "docs/tasks.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(# my_tasks/mine\.yaml\n.*?)```", page, re.S)
    (lines,) = re.findall(r"```json\n(\{\"prompt\".*?)```", page, re.S)
    folder = tmp_path / "my_tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(recipe.replace("/data/my_tasks", str(folder)))
    (folder / "questions.jsonl").write_text(lines)
    (record,) = measured("mine", include_path=str(folder))
    about = (record["questions"], record["source"], record["standard_protocol"])
    assert about == (len(lines.splitlines()), "local", False)
    assert record["acc_norm"] is not None
