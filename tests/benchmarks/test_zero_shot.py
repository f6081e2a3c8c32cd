"""Accuracies against NumPy, log-likelihoods of our own, and lm_eval's own tasks on the same questions."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gprune.benchmarks import harness, tasks, wikitext2, zero_shot
from gprune.benchmarks.command import main
from gprune.errors import UserError
from gprune.evaluation.accuracy import accuracy, chance, is_correct, paired_difference
from gprune.models.masks import Masks
from gprune.models.surgery import prune
from gprune.report.benchmark_table import evaluation_table
from gprune.sparsity.gates import masked
from tests import tiny_run
from tests.conftest import make_tiny_llama
from tests.tiny_run import WORDS, environment, isolated, tiny_tokenizer


def needs_lm_eval():
    return pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm-eval]'")


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def write_task(root: Path, name: str, split: str, rows: list[dict]) -> Path:
    path = root / "tasks" / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def piqa_rows(n: int = 12) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        fields = {"goal": sentence(rng, 5), "sol1": sentence(rng, 3), "sol2": sentence(rng, int(rng.integers(1, 9)))}
        choices = [fields["sol1"], fields["sol2"]]
        prompt = f"Question: {fields['goal']}\nAnswer:"
        rows.append(
            {"id": str(i), "prompt": prompt, "choices": choices, "label": int(rng.integers(2)), "fields": fields}
        )
    return rows


def arc_rows(n: int = 12) -> list[dict]:
    rng = np.random.default_rng(1)
    rows = []
    for i in range(n):
        question = sentence(rng, 6)
        choices = [sentence(rng, int(rng.integers(1, 6))) for _ in range(3 + i % 3)]  # three to five, as in ARC
        label = int(rng.integers(len(choices)))
        prompt = f"Question: {question}\nAnswer:"
        rows.append({"prompt": prompt, "choices": choices, "label": label, "fields": {"question": question}})
    return rows


def blimp_rows() -> list[dict]:
    rng = np.random.default_rng(2)
    return [
        {"good": sentence(rng, 5), "bad": sentence(rng, 5), "paradigm": paradigm}
        for paradigm in ("island", "binding", "ellipsis")
        for _ in range(4)
    ]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of local tasks, and a hub that does not answer."""
    write_task(tmp_path, "piqa", "validation", piqa_rows())
    write_task(tmp_path, "arc_easy", "test", arc_rows())
    write_task(tmp_path, "sciq", "validation", arc_rows())
    write_task(tmp_path, "blimp", "test", blimp_rows())
    write_task(tmp_path, "mine", "test", arc_rows(5))
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    hub(monkeypatch, reachable=False)
    for name in ("piqa", "arc_easy"):  # else twelve questions are a part of them
        monkeypatch.setitem(tasks.LOCAL_TASKS, name, replace(tasks.LOCAL_TASKS[name], questions=12))
    return tmp_path


def hub(monkeypatch, *, reachable: bool, manager: object = None) -> None:
    @contextmanager
    def answers():
        yield reachable

    monkeypatch.setattr(harness, "offline_if_unreachable", answers)
    monkeypatch.setattr(harness, "_manager", lambda: manager)


# --- arithmetic


def test_is_correct_is_the_argmax():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 6, 200)
    lls = [(-10 * rng.random(n)).tolist() for n in sizes]
    labels = [int(rng.integers(n)) for n in sizes]
    lengths = [rng.integers(1, 40, n).tolist() for n in sizes]
    expected = [int(np.argmax(row)) == label for row, label in zip(lls, labels, strict=True)]
    normed = [int(np.argmax(np.array(row) / np.array(n))) == y for row, n, y in zip(lls, lengths, labels, strict=True)]
    assert is_correct(lls, labels) == expected
    assert is_correct(lls, labels, lengths) == normed
    assert expected != normed


def test_of_equally_likely_choices_the_first_counts():
    assert is_correct([[-1.0, -1.0], [-1.0, -1.0]], [0, 1]) == [True, False]


def test_accuracy_has_the_standard_error_of_a_mean():
    right = np.random.default_rng(1).random(57) < 0.3
    mean, error = accuracy(right.tolist())
    assert mean == pytest.approx(right.mean(), rel=1e-14)
    assert error == pytest.approx(right.std(ddof=1) / np.sqrt(57), rel=1e-12)
    assert accuracy([True]) == (1.0, None)
    assert accuracy([False, False]) == (0.0, 0.0)


def test_a_paired_difference_is_as_certain_as_the_pairs_are():
    rng = np.random.default_rng(2)
    a = rng.random(400) < 0.5
    b = np.where(rng.random(400) < 0.05, ~a, a)  # the same answers but for a few
    difference, error = paired_difference(a.tolist(), b.tolist())
    assert difference == pytest.approx(a.mean() - b.mean(), abs=1e-14)
    assert error == pytest.approx((a.astype(int) - b.astype(int)).std(ddof=1) / 20, rel=1e-12)
    assert error < 0.5 * accuracy(a.tolist())[1]
    assert paired_difference([True], [False]) == (1.0, None)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([True, False], [True])


def test_chance_is_guessing():
    assert chance([2, 2, 4]) == pytest.approx((0.5 + 0.5 + 0.25) / 3)


# --- local files


@pytest.mark.parametrize(
    "line",
    [
        "not json", "[]", '"text"', "{}", '{"prompt": "p", "choices": ["a"], "label": 0}',
        '{"prompt": "p", "choices": ["a", "b"], "label": 2}', '{"prompt": "p", "choices": ["a", "b"], "label": -1}',
        '{"prompt": "p", "choices": ["a", ""], "label": 0}', '{"prompt": 1, "choices": ["a", "b"], "label": 0}',
        '{"prompt": "p", "choices": ["a", "b"]}', '{"good": "g"}', '{"good": "g", "bad": 3}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_question_is_named(line, tmp_path):
    path = write_task(tmp_path, "mine", "test", arc_rows(2))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"mine/test\.jsonl:3: expected"):
        tasks.load_questions(path)


def test_an_empty_file_is_no_task(tmp_path):
    with pytest.raises(UserError, match="empty file"):
        tasks.load_questions(write_task(tmp_path, "mine", "test", []))


@pytest.mark.parametrize("spoil", [{"prompt": "Q: other\nA:"}, {"fields": {}}, {"fields": None}])
def test_a_prompt_that_is_not_lm_evals_is_refused_where_that_is_claimed(spoil, tmp_path):
    rows = piqa_rows(3)
    assert len(tasks.load_questions(write_task(tmp_path, "piqa", "validation", rows)).rows) == 3
    rows[1] |= spoil
    with pytest.raises(UserError, match=r"validation\.jsonl:2: expected 'fields' that make lm_eval's prompt"):
        tasks.load_questions(write_task(tmp_path, "piqa", "validation", rows))
    tasks.load_questions(write_task(tmp_path, "other", "validation", rows))  # claims nothing


def test_any_limit_covers_the_paradigms(data):
    rows = tasks.load_questions(tasks.local_file("blimp")).rows
    assert [row["paradigm"] for row in rows] == ["island", "binding", "ellipsis"] * 4
    kept = {(row["choices"][0], row["choices"][1]) for row in rows}
    assert kept == {(row["good"], row["bad"]) for row in blimp_rows()}


def test_names_do_not_lead_out_of_the_folder(data):
    write_task(data / "tasks" / "x", "secret", "test", arc_rows(2))
    for name in ("x/tasks/secret", "../tasks/mine", ".", "", "/etc"):
        assert tasks.local_file(name) is None
    assert tasks.local_tasks() == ["arc_easy", "blimp", "mine", "piqa", "sciq"]


def test_the_test_split_comes_first_and_another_one_is_not_standard(data):
    assert tasks.local_file("arc_easy").name == "test.jsonl"
    other = write_task(data, "arc_easy", "validation", arc_rows(3))
    assert tasks.local_file("arc_easy").name == "test.jsonl"
    assert tasks.load_questions(tasks.local_file("arc_easy")).about.complete
    assert not tasks.load_questions(other).about.complete


def test_a_file_that_broke_off_is_not_standard(tmp_path):
    found = tasks.load_questions(write_task(tmp_path, "piqa", "validation", piqa_rows(100))).about
    assert (found.complete, found.note) == (False, "100 of 1,838 questions")


# --- prompts


def own_yaml(task: str) -> dict:
    """lm_eval's own configuration of a task."""
    import yaml

    folder = Path(needs_lm_eval().__file__).parent / "tasks"
    (path,) = folder.rglob(f"{task}.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def as_on_the_hub(task: str, row: dict) -> dict:
    """A row as the columns of the data set that lm_eval reads."""
    if task == "piqa":
        return {**row["fields"], "label": row["label"]}
    letters = [*"ABCDE"][: len(row["choices"])]
    return {
        "question": row["fields"]["question"],
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[row["label"]],
    }


@pytest.mark.parametrize(("task", "rows"), [("piqa", piqa_rows()), ("arc_easy", arc_rows())])
def test_the_prompts_are_lm_evals(task, rows):
    config = own_yaml(task)
    from lm_eval.utils import apply_template

    template = tasks.LOCAL_TASKS[task].prompt
    for row in rows:
        rendered = apply_template(config["doc_to_text"], as_on_the_hub(task, row))
        assert template.format_map(row["fields"]) == rendered
    assert tasks.LOCAL_TASKS[task].version == str(config["metadata"]["version"])
    assert tasks.LOCAL_TASKS[task].split == (config["test_split"] or config["validation_split"])
    assert config.get("target_delimiter", " ") == " "
    assert [m["metric"] for m in config["metric_list"]] == ["acc", "acc_norm"]


@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_every_prompt_and_choice_of_the_mirror_is_lm_evals(task):
    config, path = own_yaml(task), tasks.local_file(task)
    if path is None:
        pytest.skip(f"no $GPRUNE_DATA_DIR/tasks/{task}")
    import ast

    from lm_eval.utils import apply_template

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(tasks.load_questions(path).rows) == len(rows)
    assert tasks.load_questions(path).about.complete
    for row in rows:
        doc = as_on_the_hub(task, row)
        assert row["prompt"] == apply_template(config["doc_to_text"], doc)
        assert row["choices"] == ast.literal_eval(apply_template(config["doc_to_choice"], doc))


# --- through lm_eval


def own_loglikelihoods(model, tokenizer, row) -> list[float]:
    """Sum of the float64 log-probabilities of each choice's tokens after the prompt."""
    found = []
    for choice in row["choices"]:
        context, whole = tokenizer(row["prompt"]).input_ids, tokenizer(f"{row['prompt']} {choice}").input_ids
        logits = model.double()(torch.tensor([whole])).logits[0]
        log_p = logits.log_softmax(-1)[torch.arange(len(whole) - 1), whole[1:]]
        found.append(float(log_p[len(context) - 1 :].sum()))
    return found


@pytest.mark.parametrize("task", ["piqa", "arc_easy", "mine"])
def test_accuracies_are_those_of_our_own_loglikelihoods(task, data):
    needs_lm_eval()
    (record,) = zero_shot.zero_shot(make_tiny_llama(), tiny_tokenizer(), [task])
    rows = tasks.load_questions(tasks.local_file(task)).rows
    lls = [own_loglikelihoods(make_tiny_llama(), tiny_tokenizer(), row) for row in rows]
    labels, lengths = [r["label"] for r in rows], [[len(c) for c in r["choices"]] for r in rows]
    for metric, size in (("acc", None), ("acc_norm", lengths)):
        right = is_correct(lls, labels, size)
        assert record[metric] == pytest.approx(np.mean(right), abs=1e-12)
        assert record[f"{metric}_stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5, abs=1e-12)
        assert record["correct" + metric.removeprefix("acc")] == "".join(str(int(x)) for x in right)
    assert record["chance"] == pytest.approx(np.mean([1 / len(r["choices"]) for r in rows]))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices_before_the_question_and_one_metric_alone(metric):
    """As in winogrande, where lm_eval's target is the end of the sentence and the label is its `doc_to_text`."""
    needs_lm_eval()
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = [{"options": ["the dog", "a cat", "one bird"], "end": "is warm.", "label": i % 3} for i in range(7)]
    config = {
        "task": "before", "output_type": "multiple_choice", "test_split": "test",
        "doc_to_text": lambda doc: doc["label"], "doc_to_target": lambda doc: doc["end"],
        "doc_to_choice": lambda doc: doc["options"], "metric_list": [{"metric": metric}],
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
    }  # fmt: skip
    loaded = harness.LoadedTask(ConfigurableTask(config=config), "local", "test", "1", True, "")
    model, tokenizer = make_tiny_llama(), tiny_tokenizer()
    outcome = zero_shot._run(model, tokenizer, [loaded], limit=None, batch_size=2)
    found = zero_shot.record(loaded, outcome, {"dtype": "float32", "run": "r", "stage": "gprune", "model": "tiny"})
    lls = [float(ll) for ll, _ in outcome["samples"]["before"][0]["filtered_resps"]]
    if metric == "acc":
        assert found["correct"] == "".join(str(int(np.argmax(lls) == row["label"])) for row in rows)
    missing = {"acc": "acc_norm", "acc_norm": "acc"}[metric]
    assert (found[metric] is None, found[missing]) == (False, None)
    table = evaluation_table([found | {"stage": "dense"}, found])
    assert "+0.000" in table.to_markdown()


@pytest.mark.parametrize(("task", "rows"), [("piqa", piqa_rows()), ("arc_easy", arc_rows())])
def test_local_files_give_what_lm_evals_own_task_gives(task, rows, data):
    config = own_yaml(task)
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    split = config["test_split"] or config["validation_split"]
    columns = datasets.Dataset.from_list([as_on_the_hub(task, row) for row in rows])
    for name in ("dataset_path", "dataset_name", "training_split", "tag"):
        config.pop(name, None)
    own = ConfigurableTask(
        config=config | {"custom_dataset": lambda **_: dict.fromkeys(("validation", split), columns)}
    )
    own.set_config("num_fewshot", 0)
    lm = HFLM(pretrained=make_tiny_llama(), tokenizer=tiny_tokenizer(), backend="causal", batch_size=4)
    theirs = evaluate(lm=lm, task_dict={task: own}, bootstrap_iters=1)["results"][task]
    (record,) = zero_shot.zero_shot(make_tiny_llama(), tiny_tokenizer(), [task])
    for metric in ("acc", "acc_norm"):
        assert record[metric] == pytest.approx(theirs[f"{metric},none"], abs=1e-12)
        assert record[f"{metric}_stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"], abs=1e-12)
    (loaded,) = harness.load_tasks(task, "local")
    loaded.task.build_all_requests()
    strings = [instance.args for instance in own.instances]
    assert [instance.args for instance in loaded.task.instances] == strings  # character for character
    assert strings[0][1].startswith(" ")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_hflms_and_contexts_have_no_logits(batch_size):
    """Continuations of one token and of many, of one context and of several, and longer than the model's positions."""
    needs_lm_eval()
    from lm_eval.models.huggingface import HFLM

    from gprune.benchmarks.answers import AnswerLM

    rng = np.random.default_rng(3)
    contexts = [rng.integers(5, 60, n).tolist() for n in (1, 4, 4, 17, 30)]
    requests = [
        ((str(i), str(j)), context, rng.integers(5, 60, n).tolist())
        for i, context in enumerate(contexts)
        for j, n in enumerate((1, 1, 1, 2, 7, 9))
    ]
    requests.append((("same", "input"), requests[3][1] + requests[3][2][:1], requests[3][2][1:]))
    model, rows = make_tiny_llama().double(), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    found = {}
    for cls in (HFLM, AnswerLM):
        rows.clear()
        settings = {"backend": "causal", "batch_size": batch_size, "max_length": 32, "softmax_dtype": "float64"}
        lm = cls(pretrained=model, tokenizer=tiny_tokenizer(), **settings)
        with torch.inference_mode():
            found[cls] = lm._loglikelihood_tokens(requests, disable_tqdm=True), sum(rows)
    (theirs, all_rows), (ours, fewer) = found[HFLM], found[AnswerLM]
    assert [ll for ll, _ in ours] == pytest.approx([ll for ll, _ in theirs], abs=1e-10)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert fewer < 0.9 * all_rows


def test_loglikelihoods_that_are_no_numbers_are_no_answers(data):
    needs_lm_eval()
    model = make_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="non-finite log-likelihood came up in task 'piqa'"):
        zero_shot.zero_shot(model, tiny_tokenizer(), ["piqa"])
    assert not model.lm_head._forward_pre_hooks


def test_records_carry_their_protocol(data):
    needs_lm_eval()
    records = zero_shot.zero_shot(make_tiny_llama(), tiny_tokenizer(), ["piqa", "arc_easy", "sciq", "blimp", "mine"])
    found = {r["task"]: r for r in records}
    assert [(r["split"], r["source"], r["num_fewshot"], r["limit"]) for r in records] == [
        ("validation", "local", 0, None), ("test", "local", 0, None), ("validation", "local", 0, None),
        ("test", "local", 0, None), ("test", "local", 0, None),
    ]  # fmt: skip
    assert {r["task"] for r in records if r["standard_protocol"]} == {"piqa", "arc_easy"}
    for name in ("sciq", "blimp"):
        assert "never to be set beside published figures" in found[name]["note"]
    assert found["piqa"]["task_version"] == "1.0"
    assert found["blimp"]["acc_norm"] is None
    assert "correct_norm" not in found["blimp"]
    assert all(r["harness"].startswith("lm_eval ") and r["dtype"] == "float32" and not r["bos"] for r in records)
    json.dumps(records, allow_nan=False)
    (limited,) = zero_shot.zero_shot(make_tiny_llama(), tiny_tokenizer(), ["piqa"], limit=5)
    assert not limited["standard_protocol"]
    assert limited["questions"] == 5
    assert found["piqa"]["correct"].startswith(limited["correct"])
    assert limited["content_hash"] != found["piqa"]["content_hash"]


def test_masked_and_sliced_models_answer_alike_and_nothing_is_left_behind(data, capfd):
    needs_lm_eval()
    write_task(data, "many", "test", arc_rows(60))
    generator = torch.Generator().manual_seed(0)
    masks = Masks([torch.rand(48, generator=generator) < 0.2 for _ in range(3)], [torch.ones(2, dtype=torch.bool)] * 3)
    model, tokenizer = make_tiny_llama(), tiny_tokenizer()
    tokenizer.pad_token = None
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    (dense,) = zero_shot.zero_shot(model, tokenizer, ["many"])
    with masked(model, masks):
        (first,) = zero_shot.zero_shot(model, tokenizer, ["many"])
    (second,) = zero_shot.zero_shot(prune(model, masks), tokenizer, ["many"])
    assert first == second
    assert first["correct"] != dense["correct"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert tokenizer.pad_token is None
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert capfd.readouterr().err == ""


# --- hub or local files


class Manager:
    """lm_eval's TaskManager, as far as it is used."""

    def __init__(self, tasks_: dict | None = None):
        self.tasks, self.all_tasks = tasks_, ["piqa", "gsm8k"]

    def load(self, names):
        if self.tasks is None:
            raise ConnectionError("Couldn't reach it\nsecond line")
        return {"tasks": {name: self.tasks[name] for name in names}}


def fake_task(output_type: str = "multiple_choice") -> SimpleNamespace:
    config = SimpleNamespace(test_split=None, validation_split="validation", metric_list=None, process_results=None)
    return SimpleNamespace(task_name="piqa", OUTPUT_TYPE=output_type, VERSION=1.0, config=config)


def test_the_hub_comes_first_if_it_answers(data, monkeypatch):
    needs_lm_eval()
    hub(monkeypatch, reachable=True, manager=Manager({"piqa": fake_task()}))
    (loaded,) = harness.load_tasks("piqa", "auto")
    assert (loaded.source, loaded.split, loaded.version, loaded.complete) == ("hub", "validation", "1.0", True)
    assert harness.load_tasks("piqa", "local")[0].source == "local"
    assert harness.load_tasks("mine", "auto")[0].source == "local"  # lm_eval knows no such task


@pytest.mark.parametrize("reachable", [True, False])
def test_without_the_hub_local_files_serve(reachable, data, monkeypatch):
    needs_lm_eval()
    hub(monkeypatch, reachable=reachable, manager=Manager())
    assert harness.load_tasks("piqa", "auto")[0].source == "local"
    with pytest.raises(UserError, match=r"could not be had from the Hugging Face hub \(Couldn't reach it\)"):
        harness.load_tasks("piqa", "hub")


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("pica", "auto", "Unknown task 'pica'"),
        ("piqa2", "local", "No local files for task 'piqa2'. .*: arc_easy, blimp, mine, piqa, sciq"),
        ("gsm8k", "hub", "Task 'piqa' is of type generate_until; expected multiple_choice"),
    ],
)
def test_tasks_that_cannot_be(name, source, message, data, monkeypatch):
    needs_lm_eval()
    hub(monkeypatch, reachable=True, manager=Manager({"gsm8k": fake_task("generate_until")}))
    with pytest.raises(UserError, match=message):
        harness.load_tasks(name, source)


@pytest.mark.parametrize(
    ("metric_list", "process_results", "refused"),
    [
        (None, None, False),
        ([{"metric": "acc"}], None, False),
        ([{"metric": "mcc"}], None, True),
        ([{"metric": "acc"}], lambda doc, results: {"acc": 0.3}, True),
    ],
)
def test_a_task_that_counts_in_a_way_of_its_own_is_refused(metric_list, process_results, refused):
    config = SimpleNamespace(
        metric_list=metric_list, process_results=process_results, test_split="test", validation_split=None
    )
    task = SimpleNamespace(OUTPUT_TYPE="multiple_choice", task_name="cola", config=config, VERSION=1)
    with pytest.raises(UserError, match="Task 'cola' counts in a way of its own") if refused else nullcontext():
        assert harness._hub_task(task).split == "test"


@pytest.mark.parametrize("name", ["tasks/mine/test.jsonl", "corpora/wikitext2/wiki.test.raw"])
def test_files_that_are_not_utf8_are_one_line(name, tmp_path, monkeypatch):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes("é".encode("latin-1"))
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"expected .* but it cannot be read"):
        wikitext2.wikitext2() if "wiki" in name else tasks.load_questions(tmp_path / name)


def test_arguments_that_cannot_be(data):
    needs_lm_eval()
    for more in ({"source": "cloud"}, {"limit": 0}):
        with pytest.raises(UserError, match="expected"):
            zero_shot.zero_shot(make_tiny_llama(), tiny_tokenizer(), ["piqa"], **more)


@pytest.mark.slow
def test_lm_eval_is_imported_only_when_used(tmp_path):
    code = "import sys, gprune.benchmarks.zero_shot, gprune.benchmarks.job; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), check=True)


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("gprune.benchmarks.subjects.load_model", lambda *_, **__: pytest.fail("loaded a model first"))
    assert main([str(tmp_path), "--tasks", "piqa"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'gprune[lm-eval]'" in line


# --- the command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run with its model, one without, and local data; in an environment of their own."""
    folder = tmp_path_factory.mktemp("zero-shot")
    with pytest.MonkeyPatch.context() as patch, isolated(folder / "cache"):
        tiny_run.quick(patch)
        world = tiny_run.make_world(folder)
        kept = world.run(folder / "runs", "--sparsity.allocation=uniform", name="kept")
        world.run(folder / "runs", "--export=none", "--sparsity.allocation=uniform", name="masks")
    write_task(folder, "mine", "test", arc_rows())
    raw = folder / "corpora" / "wikitext2" / "wiki.test.raw"
    raw.parent.mkdir(parents=True)
    rng = np.random.default_rng(5)
    raw.write_text("\n".join(sentence(rng, 40) for _ in range(12)) + "\n")
    return SimpleNamespace(folder=folder, runs=folder / "runs", result=kept)


@pytest.fixture
def quiet_world(finished, monkeypatch):
    hub(monkeypatch, reachable=False)
    (finished.runs / "kept" / "evaluation.json").unlink(missing_ok=True)
    with isolated(finished.folder / "cache", GPRUNE_DATA_DIR=str(finished.folder)):
        yield finished


def records_in(path: Path) -> list[dict]:
    return json.loads(path.read_text())["records"]


def test_a_runs_model_and_its_dense_model(quiet_world, capsys):
    needs_lm_eval()
    run = quiet_world.runs / "kept"
    assert main([str(run), "--tasks", "mine,wikitext2", "--seq_len", "32", "--dense"]) == 0
    out = capsys.readouterr().out
    found = {(r["stage"], r["task"]): r for r in records_in(run / "evaluation.json")}
    assert set(found) == {(stage, task) for stage in ("dense", "gprune") for task in ("mine", "wikitext2")}
    (in_memory,) = zero_shot.zero_shot(quiet_world.result.model, quiet_world.result.tokenizer, ["mine"])
    exported = found["gprune", "mine"]
    assert in_memory.items() <= exported.items()
    assert exported["sparsity"] == 0.5
    difference, error = paired_difference(
        *([c == "1" for c in found[stage, "mine"]["correct"]] for stage in ("gprune", "dense"))
    )
    assert f"{difference:+.3f} +- {error:.3f}" in out
    ratio = found["gprune", "wikitext2"]["perplexity"] / found["dense", "wikitext2"]["perplexity"]
    assert f"x {ratio:.3f} [" in out


def test_records_are_kept_and_replaced_by_protocol(quiet_world):
    path = quiet_world.runs / "kept" / "evaluation.json"
    for seq_len, limit, expected in ((32, 2, 1), (32, 2, 1), (16, 2, 2), (32, 3, 3)):
        args = ["--tasks", "wikitext2", "--seq_len", str(seq_len), "--limit", str(limit)]
        assert main([str(path.parent), *args]) == 0
        assert len(records_in(path)) == expected
    assert main([str(path.parent), "--tasks", "wikitext2", "--seq_len", "32,16,32", "--limit", "3"]) == 0
    assert [r["seq_len"] for r in records_in(path)[-2:]] == [32, 16]
    assert len(records_in(path)) == 4  # 32 in the place of the same


def test_a_run_without_a_model_is_evaluated_under_its_masks(quiet_world):
    one, other = (quiet_world.runs / name for name in ("kept", "masks"))
    for run in (one, other):
        assert main([str(run), "--tasks", "wikitext2", "--seq_len", "32"]) == 0
    first, second = (records_in(run / "evaluation.json")[0] for run in (one, other))
    assert first["window_nll"] == pytest.approx(second["window_nll"], rel=1e-6)


def by_hand(run: Path, change) -> None:
    """Change the settings in a manifest; files without a checksum are taken as they are."""
    for name in ("manifest", "metrics"):
        content = json.loads((run / f"{name}.json").read_text())
        content.pop("checksum", None)
        if name == "manifest":
            change(content["settings"])
        (run / f"{name}.json").write_text(json.dumps(content))


def test_masks_do_not_hold_what_recovery_changed(quiet_world, tmp_path, capsys):
    run = Path(shutil.copytree(quiet_world.runs / "masks", tmp_path / "recovered"))
    by_hand(run, lambda settings: settings.update(recovery="bias"))
    assert main([str(run), "--tasks", "wikitext2", "--seq_len", "32"]) == 2
    assert "repeat it with --export hf" in capsys.readouterr().err


def test_a_folder_prints_and_writes_only_where_asked(quiet_world, capsys, tmp_path):
    folder = quiet_world.runs / "kept" / "model"
    before = sorted(os.listdir(folder))
    assert main([str(folder), "--tasks", "wikitext2", "--seq_len", "32"]) == 0
    assert "| wikitext2 " in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == before
    output = tmp_path / "out.json"
    assert main([str(folder), "--tasks", "wikitext2", "--seq_len", "32", "--output", str(output)]) == 0
    assert records_in(output)[0]["stage"] == "model"


def test_one_file_holds_several_runs_and_never_takes_the_place_of_another(quiet_world, capsys, tmp_path):
    output = tmp_path / "out.json"
    more = ["--tasks", "wikitext2", "--seq_len", "32", "--output", str(output)]
    for name in ("kept", "masks", "kept"):
        assert main([str(quiet_world.runs / name), *more]) == 0
    assert sorted(r["run"] for r in records_in(output)) == ["kept", "masks"]
    for place in ("here", "there", "here"):
        folder = tmp_path / place / "small"
        shutil.copytree(quiet_world.runs / "kept" / "model", folder, dirs_exist_ok=True)
        assert main([str(folder), *more]) == 0
    assert sorted(r["run"] for r in records_in(output)) == ["kept", "masks", "small", "small"]
    output.write_text('{"a": 1}')
    assert main([str(quiet_world.runs / "kept"), *more]) == 2
    assert "holds no records" in capsys.readouterr().err
    assert output.read_text() == '{"a": 1}'


def test_a_model_that_is_not_the_runs_is_refused(quiet_world, capsys, tmp_path):
    changed = Path(shutil.copytree(quiet_world.runs / "kept", tmp_path / "changed"))
    weights = changed / "model" / "model.safetensors"
    save_file({n: 1.5 * t for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert main([str(changed), "--tasks", "wikitext2", "--seq_len", "32"]) == 2
    assert "is not what the run left there" in capsys.readouterr().err
    by_hand(changed, lambda settings: settings["inputs"].update(model="another"))
    assert main([str(changed), "--tasks", "wikitext2", "--seq_len", "32", "--dense"]) == 2
    assert "has other weights than the model that" in capsys.readouterr().err
    assert not (changed / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", ","], "--tasks: expected at least one"),
        (["--limit", "0"], "--limit: expected 1 or more"),
        (["--batch_size", "0"], "--batch_size: expected"),
        (["--dtype", "int8"], "--dtype: expected float32"),
        (["--tasks", "wikitext2", "--seq_len", "99999"], "--seq_len: expected 2 to"),
        (["--seq_len", "32,many"], "--seq_len: expected whole numbers, such as 2048,128, got '32,many'"),
        (["--seq_len", ","], "--seq_len: expected 2 or more tokens, got none"),
        (["--seq_len", "32,1"], "--seq_len: expected 2 or more tokens, got 32, 1"),
        (["--colour", "red"], "unrecognized arguments"),
        ([], "required: MODEL"),
    ],
)
def test_one_line_and_exit_2(args, message, quiet_world, capsys):
    model = [str(quiet_world.runs / "kept")] if args else []
    assert main([*model, *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_places_that_are_no_model(quiet_world, capsys, tmp_path):
    (tmp_path / "manifest.json").write_text('{"settings": {}}')
    (tmp_path / "empty").mkdir()
    for place, more, message in (
        (tmp_path, [], "is no run of gprune's"),
        (tmp_path / "empty", [], "neither a run"),
        (quiet_world.runs / "kept" / "model", ["--dense"], "--dense: expected a run's folder"),
        (tmp_path / "nowhere", [], "neither an embedded model"),
    ):
        assert main([str(place), "--tasks", "wikitext2", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
