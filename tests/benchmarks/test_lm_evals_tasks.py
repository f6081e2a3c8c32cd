"""lm_eval's tasks on local files, compared with lm_eval's evaluator, model class and data loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gprune.benchmarks import task_sources, tasks
from gprune.benchmarks.tasks import measure_tasks
from gprune.errors import UserError
from gprune.report.task_tables import evaluation_table
from gprune.runs.folder import check_evaluation
from tests.benchmarks.conftest import fake_hub, manager_of, sentence, write_task
from tests.tiny_llama import make_tiny_llama
from tests.tiny_run import SPECIAL, WORDS

SPLIT = {"lambada_openai": "test", "hellaswag": "validation", "winogrande": "validation", "arc_challenge": "test"}


def rows_of(task: str, n: int) -> list[dict]:
    """Random rows with the columns of the task's data set."""
    rng = np.random.default_rng(n)
    # Texts for each row: `a` of five words, `b` and `c` of one, and three more of two, three and one.
    a, b, c, *ends = ([sentence(rng, words) for _ in range(n)] for words in (5, 1, 1, 2, 3, 1))
    columns = {
        "lambada_openai": lambda i: {"text": f"{a[i]} {b[i]}"},
        "hellaswag": lambda i: {
            "ind": i, "activity_label": b[i], "ctx_a": f"{a[i]}.", "ctx_b": c[i], "ctx": a[i], "split": "val",
            "endings": [f"[step] {end[i]}" for end in (a, *ends)], "source_id": "s", "split_type": "indomain",
            "label": str(i % 4),
        },
        "winogrande": lambda i: {
            "sentence": f"{a[i]} _ {ends[0][i]}.", "option1": b[i], "option2": c[i], "answer": str(1 + i % 2),
        },
        "arc_challenge": lambda i: {
            "id": f"q{i}", "question": a[i], "answerKey": "ABC"[i % 3],
            "choices": {"text": [end[i] for end in ends], "label": ["A", "B", "C"]},
        },
        "gsm8k": lambda i: {"question": f"{a[i]} {i} ?", "answer": f"{b[i]} <<{i}+1={i + 1}>>\n#### {i + 1}"},
    }  # fmt: skip
    return [columns[task.removesuffix("_cot_self_consistency")](i) for i in range(n)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each number up to 77, for each word of GSM8K's prompts, and for 40 other words."""
    words = [*SPECIAL, *map(str, range(78)), "####", "Question", "Answer", ":", "?", *WORDS[:40]]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """lm_eval's TaskManager, an unreachable hub, and local rows of five tasks."""
    task_manager = manager_of("lambada", "hellaswag", "winogrande", "arc", "gsm8k")
    fake_hub(monkeypatch, reachable=False, manager=task_manager)
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    for task, split in [*SPLIT.items(), ("gsm8k", "train"), ("gsm8k", "test")]:
        write_task(tmp_path, task, split, rows_of(task, 9 if split != "test" else 8))
    return task_manager


def reference(manager, model, folder: Path, *names: str, num_fewshot: int | None = None) -> dict:
    """Results of lm_eval's evaluator with the local files as data sets."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    specs = []
    for name in names:
        file_of_split = {path.stem: str(path) for path in (folder / "tasks" / name).iterdir()}
        any_file = next(iter(file_of_split.values()))  # for splits that the task names and that have no local rows
        files = dict.fromkeys(("train", "validation", "test"), any_file) | file_of_split
        kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
        specs += [{"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs}]
    lm = HFLM(pretrained=model, tokenizer=tokenizer(), backend="causal", batch_size=3)
    group = {"group": "local", "task": specs}
    return simple_evaluate(lm, tasks=[group], task_manager=manager, bootstrap_iters=0, num_fewshot=num_fewshot)[
        "results"
    ]


@pytest.mark.slow
def test_accuracies_and_perplexity_equal_lm_evals(manager, tmp_path):
    model, rows = make_tiny_llama(), rows_of("lambada_openai", 8)
    for row in rows[::2]:  # the last word is the model's prediction, so that half of the answers are correct
        context = row["text"].rsplit(" ", 1)[0]
        best = model(torch.tensor([tokenizer()(context).input_ids])).logits[0, -1].argmax()
        row["text"] = f"{context} {tokenizer().decode(best)}"
    write_task(tmp_path, "lambada_openai", "test", rows)
    theirs = reference(manager, model, tmp_path, *SPLIT)
    records = measure_tasks(model, tokenizer(), [*SPLIT], batch_size=2, source="local")
    assert records[0]["correct"] == "10101010"
    for ours in records:
        expected = {m: theirs[ours["task"]].get(f"{m},none", 0) for m in ("acc", "acc_norm", "perplexity")}
        assert {m: ours.get(m) or 0 for m in expected} == pytest.approx(expected, rel=1e-5)
        assert (ours["split"], ours["num_fewshot"], ours["source"]) == (SPLIT[ours["task"]], 0, "local")
        check_evaluation({"records": [ours | {"stage": "model"}]})


@pytest.mark.slow
def test_generated_answers_have_lm_evals_exact_match_and_are_compared_with_the_dense_model(
    manager, tmp_path, monkeypatch
):
    """Prompts have five examples from the training rows, and both filters of GSM8K are compared."""
    model, rows = make_tiny_llama(max_position_embeddings=512), rows_of("gsm8k", 4)
    # The first pass reads the model's answers. They become the expected answers of every second row.
    for _ in range(2):
        write_task(tmp_path, "gsm8k", "test", rows)
        records = measure_tasks(model, tokenizer(), ["gsm8k"], source="local")
        for row, answer in zip(rows[::2], records[1]["answers"][::2], strict=True):
            row["answer"] = f"ban\n#### {answer}"
    theirs = reference(manager, model, tmp_path, "gsm8k")["gsm8k"]
    for record, name in zip(records, ("strict-match", "flexible-extract"), strict=True):
        assert (record["task"], record["num_fewshot"], record["acc"]) == (f"gsm8k/{name}", 5, None)
        assert record["exact_match"] == theirs[f"exact_match,{name}"] == record["correct"].count("1") / 4
        check_evaluation({"records": [record | {"stage": "model"}]})
    assert record["correct"] == "1010"
    # The protocol is standard only if all training rows are there too, because they are the examples in the prompts.
    for train_rows, is_standard in ((9, True), (10, False)):
        monkeypatch.setitem(task_sources.COMPLETE_SPLITS, "gsm8k", (4, train_rows))
        complete = measure_tasks(model, tokenizer(), ["gsm8k"], limit=None, source="local")
        assert {r["standard_protocol"] for r in complete} == {is_standard}
    # One of four answers changes from correct to wrong in the table.
    dense = record | {"run": "r", "model": "tiny", "stage": "dense"}
    pruned = dense | {"stage": "gprune", "answers": ["?", *dense["answers"][1:]], "correct": "0010"}
    (_, cells) = evaluation_table([dense, pruned]).rows
    assert cells[5:9] == ["0.500 +- 0.289", None, "-0.250 +- 0.250", "25.0%: -25.0% +0.0%"]


def test_a_complete_local_split_counts_as_lm_evals_own_task(manager, monkeypatch):
    monkeypatch.setitem(task_sources.COMPLETE_SPLITS, "hellaswag", 9)  # the number of local rows
    assert tasks.load_tasks("hellaswag", "local")[0].note == "lm_eval's own task"


def test_choices_have_the_tasks_own_number_of_examples_and_other_numbers_are_not_standard(tmp_path, monkeypatch):
    """leaderboard_mmlu_pro has 5 worked examples in lm_eval."""
    fake_hub(monkeypatch, reachable=False, manager=manager_of("leaderboard/mmlu_pro"))
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    rows = [{"question": f"{WORDS[i]} ?", "options": WORDS[i : i + 3], "answer": "ABC"[i % 3]} for i in range(6)]
    for split in ("test", "validation"):
        write_task(tmp_path, "leaderboard_mmlu_pro", split, rows)
    options = {"tasks": ["leaderboard_mmlu_pro"], "source": "local"}
    monkeypatch.setattr(task_sources, "COMPLETE_SPLITS", {"leaderboard_mmlu_pro": (6, 6)})
    model = make_tiny_llama(max_position_embeddings=512)
    (own,), (without,) = (measure_tasks(model, tokenizer(), num_fewshot=number, **options) for number in (None, 0))
    assert (own["num_fewshot"], own["own_num_fewshot"], own["standard_protocol"]) == (5, 5, True)
    assert (without["num_fewshot"], without["own_num_fewshot"], without["standard_protocol"]) == (0, 5, False)
    assert without["note"] == "0 examples in prompts, lm_eval's own number is 5; lm_eval's own task"
    assert own["content_hash"] != without["content_hash"]
    monkeypatch.setattr(task_sources, "COMPLETE_SPLITS", {"leaderboard_mmlu_pro": (6, 7)})  # of the examples' split
    (unknown,) = measure_tasks(model, tokenizer(), **options)
    assert (unknown["num_fewshot"], unknown["standard_protocol"]) == (5, False)
    assert unknown["note"].startswith("examples are not known to be drawn from all of lm_eval's; ")
    check_evaluation({"records": [own | {"stage": "model"}]})


def test_numbers_of_the_literature_are_standard_and_the_table_says_which_number_it_is(manager, tmp_path, monkeypatch):
    """HellaSwag has no examples in lm_eval, and 10 in most published numbers."""
    monkeypatch.setitem(task_sources.COMPLETE_SPLITS, "hellaswag", (9, 12))
    write_task(tmp_path, "hellaswag", "train", rows_of("hellaswag", 12))
    model, standard = make_tiny_llama(max_position_embeddings=2048), {}
    for number, is_standard in ((None, True), (10, True), (3, False)):
        (record,) = measure_tasks(model, tokenizer(), ["hellaswag"], source="local", num_fewshot=number)
        assert record["num_fewshot"] == (number or 0)
        assert (record["own_num_fewshot"], record["literature_num_fewshot"]) == (0, 10)
        assert record["standard_protocol"] is is_standard
        (row,) = evaluation_table([record | {"run": "r", "model": "tiny", "stage": "model"}]).rows
        standard[number] = row[-2]
    assert standard == {None: "yes, lm_eval's 0 examples", 10: "yes, the literature's 10 examples", 3: "no"}


def test_prompts_have_the_examples_of_lm_evals_evaluator(manager, tmp_path):
    write_task(tmp_path, "lambada_openai", "train", rows_of("lambada_openai", 12))
    model = make_tiny_llama(max_position_embeddings=512)
    theirs = reference(manager, model, tmp_path, "lambada_openai", num_fewshot=3)["lambada_openai"]
    perplexities = [
        measure_tasks(model, tokenizer(), ["lambada_openai"], source="local", num_fewshot=number)[0]["perplexity"]
        for number in (3, 0)
    ]
    assert perplexities[0] == pytest.approx(theirs["perplexity,none"], rel=1e-5)
    assert perplexities[1] != pytest.approx(perplexities[0], rel=1e-3)


def test_metrics_of_a_tasks_own_are_those_of_lm_eval_and_are_compared_by_question(tmp_path, monkeypatch):
    """TruthfulQA's mc2 is the share of probability that the model gives to correct answers."""
    task_manager = manager_of("truthfulqa")
    fake_hub(monkeypatch, reachable=False, manager=task_manager)
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(7):
        targets = {"choices": [sentence(rng, 3) for _ in range(4)], "labels": [1, 1, 0, 0]}
        rows.append({"question": sentence(rng, 5), "mc1_targets": targets, "mc2_targets": targets})
    write_task(tmp_path, "truthfulqa_mc2", "validation", rows)
    model = make_tiny_llama(max_position_embeddings=512)
    theirs = reference(task_manager, model, tmp_path, "truthfulqa_mc2")["truthfulqa_mc2"]
    (ours,) = measure_tasks(model, tokenizer(), ["truthfulqa_mc2"], source="local")
    assert (ours["task"], ours["metric"], ours["acc"]) == ("truthfulqa_mc2/acc", "acc", None)
    assert ours["score"] == pytest.approx(theirs["acc,none"], abs=1e-6)
    assert ours["score"] == pytest.approx(np.mean(ours["scores"]), abs=1e-12)
    assert ours["score_stderr"] == pytest.approx(np.std(ours["scores"], ddof=1) / 7**0.5, abs=1e-12)
    dense = ours | {"run": "r", "model": "tiny", "stage": "dense"}
    shifted = [score - 0.1 * (i % 2) for i, score in enumerate(ours["scores"])]
    pruned = dense | {"stage": "gprune", "scores": shifted, "score": np.mean(shifted)}
    (_, cells) = evaluation_table([dense, pruned]).rows
    differences = -0.1 * (np.arange(7) % 2)
    error = differences.std(ddof=1) / 7**0.5
    assert cells[5:8] == [f"{np.mean(shifted):.3f} +- {ours['score_stderr']:.3f}", None,
                          f"{differences.mean():+.3f} +- {error:.3f}"]  # fmt: skip
    check_evaluation({"records": [pruned]})


def test_generation_refuses_non_finite_logits(manager):
    model = make_tiny_llama(max_position_embeddings=512)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="non-finite logit came up in generation"):
        measure_tasks(model, tokenizer(), ["gsm8k"], limit=1, source="local")


def test_messages_name_the_split_that_a_task_needs(manager, tmp_path):
    folder = tmp_path / "tasks" / "hellaswag"
    (folder / "validation.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(
        UserError, match=r"needs validation\.jsonl, the split that lm_eval evaluates, .*; got test\.jsonl"
    ):
        task_sources.load_tasks("hellaswag", "local")
    (folder / "test.jsonl").unlink()
    for source in ("local", "hub"):
        with pytest.raises(UserError, match=r"\$GPRUNE_DATA_DIR/tasks/hellaswag/validation\.jsonl"):
            task_sources.load_tasks("hellaswag", source)
    with pytest.raises(UserError, match=r"It needs 20 examples in train\.jsonl"):
        measure_tasks(make_tiny_llama(), tokenizer(), ["arc_challenge"], source="local", num_fewshot=20)


@pytest.mark.parametrize(
    ("task", "split", "rows", "message"),
    [
        ("gsm8k", "test", [*rows_of("gsm8k", 1), {"question": "q"}], "Cannot read rows .*gsm8k: .*'answer'"),
        ("gsm8k", "train", rows_of("gsm8k", 2), "Cannot make prompts of task 'gsm8k': .* 5 examples in train.jsonl"),
        ("winogrande", "validation", [row | {"answer": "3"} for row in rows_of("winogrande", 1)], "Cannot"),
        ("lambada_openai", "test", [{"text": "\ud800 a"}], "Cannot read rows .*lambada_openai: "),
        ("gsm8k_cot_self_consistency", "test", rows_of("gsm8k", 2), "got its own exact_match"),
        ("sciq", "test", [{"support": "s"}], r"sciq/test\.jsonl:1: The line must be .* or a row of lm_eval's"),
    ],
)  # fmt: skip
def test_unreadable_task_rows_are_refused(task, split, rows, message, manager, tmp_path):
    write_task(tmp_path, task, split, rows)
    with pytest.raises(UserError, match=message):
        measure_tasks(make_tiny_llama(), tokenizer(), [task], source="local")
