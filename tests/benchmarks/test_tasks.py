"""Sources of tasks: local files, compared with lm_eval's task on the same questions, and the hub."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gprune.benchmarks import task_sources
from gprune.errors import UserError
from tests.benchmarks.conftest import NoTasks, fake_hub, manager_of, needs_lm_eval, pairs, questions, write_task

# --- local files


@pytest.mark.parametrize(
    "line",
    [
        b"not json", b'"text"', b"{}", b'{"prompt": "p", "choices": ["a"], "label": 0}',
        b'{"prompt": "p", "choices": ["a", "b"], "label": 2}', b'{"prompt": "p", "choices": ["a", ""], "label": 0}',
        b'{"prompt": 1, "choices": ["a", "b"], "label": 0}', b'{"good": "g", "bad": 3}',
    ],
)  # fmt: skip
def test_an_invalid_line_of_a_task_is_refused_with_its_number(line, data):
    with (data / "tasks" / "mine" / "test.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"mine/test\.jsonl:13: (Cannot read a JSON object|The line must be)"):
        task_sources.load_tasks("mine", "local")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty file"), (b"\xe9", "Cannot read .* must hold a question")]
)
def test_empty_and_undecodable_task_files_are_refused(content, message, data):
    (data / "tasks" / "mine" / "test.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        task_sources.load_tasks("mine", "local")


def test_questions_of_blimp_alternate_between_paradigms(data):
    (task,) = task_sources.load_tasks("blimp", "local")
    paradigms = {(row["good"], row["bad"]): row["paradigm"] for row in pairs()}
    assert [paradigms[tuple(doc["choices"])] for doc in task.task.eval_docs] == ["island", "binding", "ellipsis"] * 4


def test_task_names_cannot_leave_the_tasks_folder(data):
    write_task(data / "tasks" / "x", "secret", "test", questions(2))
    for name in ("x/tasks/secret", "../tasks/mine", ".", "", "/etc"):
        assert task_sources.local_file(name) is None


def test_the_test_split_is_preferred_to_the_validation_split(data):
    write_task(data, "mine", "validation", questions(2))
    assert task_sources.local_file("mine").name == "test.jsonl"


def test_only_the_complete_question_set_of_lm_eval_counts_as_standard(data, monkeypatch):
    assert not any(task_sources.load_tasks(name, "local")[0].complete for name in ("piqa", "arc_easy", "sciq", "blimp"))
    rows = questions(12)
    scored_texts = (([(row["prompt"], f" {c}") for c in row["choices"]], row["label"]) for row in rows)
    scored = task_sources.questions_hash(scored_texts)
    monkeypatch.setitem(task_sources.COMPLETE_SPLITS, "piqa", scored)
    (whole,) = task_sources.load_tasks("piqa", "local")
    assert (whole.complete, whole.task.VERSION, whole.note) == (True, "1.0", "lm_eval's prompts")
    first, *others = rows
    other_prompt, other_label = first | {"prompt": "Q: other\nA:"}, first | {"label": (first["label"] + 1) % 3}
    for changed in (others, [*others, first], [other_prompt, *others], [other_label, *others]):
        write_task(data, "piqa", "validation", changed)
        (part,) = task_sources.load_tasks("piqa", "local")
        assert not part.complete
        assert f"{len(changed)} questions, not known to be all of lm_eval's" in part.note


# --- lm_eval's task on the same questions


def hub_columns(task: str, row: dict) -> dict:
    """A question in the columns of the data set that lm_eval reads."""
    question = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
    if task == "piqa":
        return {"goal": question, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["label"]}
    letters = [*"ABCDE"][: len(row["choices"])]
    choices = {"text": row["choices"], "label": letters}
    return {"question": question, "choices": choices, "answerKey": letters[row["label"]]}


def lm_evals_task(task: str, rows: list[dict]):
    """lm_eval's task, with these questions instead of those on the hub."""
    import datasets

    columns = datasets.Dataset.from_list([hub_columns(task, row) for row in rows])
    config = {"task": task, "custom_dataset": lambda **_: dict.fromkeys(("train", "validation", "test"), columns)}
    return manager_of("piqa", "arc").load([{"group": "local", "task": [config]}])["tasks"][task]


def requests_of(task) -> list[tuple[str, str]]:
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_local_questions_give_the_requests_and_metrics_of_lm_evals_task(task, data):
    rows = [row | {"choices": row["choices"][:2], "label": row["label"] % 2} for row in questions(12)]
    write_task(data, task, task_sources.local_file(task).stem, rows)
    (local,) = task_sources.load_tasks(task, "local")
    theirs = lm_evals_task(task, rows)
    assert requests_of(local.task) == requests_of(theirs)  # character for character
    assert requests_of(local.task)[0][1].startswith(" ")
    assert list(local.task._metric_fn_list) == list(theirs._metric_fn_list) == ["acc", "acc_norm"]
    assert str(theirs.VERSION) == "1.0"  # the version of complete local files


@pytest.mark.slow
@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_questions_of_the_local_mirror_are_the_complete_set_of_lm_eval(task):
    needs_lm_eval()
    path = task_sources.local_file(task)
    if path is None:
        pytest.skip(f"no $GPRUNE_DATA_DIR/tasks/{task}")
    theirs = lm_evals_task(task, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    choices = [theirs.doc_to_choice(doc) for doc in theirs.eval_docs]
    labels = [theirs.doc_to_target(doc) for doc in theirs.eval_docs]
    requests = iter(requests_of(theirs))  # one per choice
    scored = [([next(requests) for _ in of_doc], label) for of_doc, label in zip(choices, labels, strict=True)]
    assert task_sources.questions_hash(scored) == task_sources.COMPLETE_SPLITS[task]
    assert task_sources.local_task(path).complete


# --- groups


def test_presets_groups_and_tags_are_replaced_by_their_tasks(data, monkeypatch):
    assert [*task_sources.with_groups(["zeroshot7"])] == [
        "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ]  # fmt: skip
    fake_hub(monkeypatch, reachable=False, manager=manager_of("mmlu/default", "arc"))
    by_task = task_sources.with_groups(["mmlu", "ai2_arc", "arc_easy", "wikitext2", "mine", "zeroshot7"])
    mmlu = {"mmlu": {"tasks": 57, "by_size": True}}
    assert sum(groups == mmlu for groups in by_task.values()) == 57
    tag, preset = {"ai2_arc": {"tasks": 2, "by_size": False}}, {"zeroshot7": {"tasks": 7, "by_size": False}}
    assert by_task["arc_challenge"] == by_task["arc_easy"] == tag | preset
    assert by_task["wikitext2"] == by_task["mine"] == {}


# --- hub or local files


class Manager(NoTasks):
    """A TaskManager with two tasks."""

    all_tasks = ("piqa", "gsm8k")

    def __init__(self, task: object = None):
        self.task = task

    def load(self, names):
        if self.task is None:
            raise ConnectionError("Couldn't reach it\nsecond line")
        return {"tasks": dict.fromkeys(names, self.task)}


def fake_task(
    output_type="multiple_choice", metrics=None, process_results=None, repeats=1, metric_list=None, **attributes
) -> SimpleNamespace:
    config = SimpleNamespace(
        process_results=process_results, repeats=repeats, metric_list=metric_list, num_fewshot=None
    )
    attributes |= {"config": config, "aggregation": lambda: dict.fromkeys(metrics or {"acc", "acc_norm"})}
    return SimpleNamespace(task_name="cola", OUTPUT_TYPE=output_type, **attributes)


def test_a_reachable_hub_is_preferred_to_local_files(data, monkeypatch):
    fake_hub(monkeypatch, reachable=True, manager=Manager(fake_task()))
    (task,) = task_sources.load_tasks("piqa", "auto")
    assert (task.source, task.note, task.complete) == ("hub", "lm_eval's own task", True)
    assert task_sources.load_tasks("piqa", "local")[0].source == "local"
    assert task_sources.load_tasks("mine", "auto")[0].source == "local"  # lm_eval has no such task


@pytest.mark.parametrize("reachable", [True, False])
def test_local_files_are_the_fallback_for_an_unreachable_hub(reachable, data, monkeypatch):
    fake_hub(monkeypatch, reachable=reachable, manager=Manager())
    assert task_sources.load_tasks("piqa", "auto")[0].source == "local"
    with pytest.raises(UserError, match=r"Cannot download task .* from the Hugging Face hub: Couldn't reach it\."):
        task_sources.load_tasks("piqa", "hub")


@pytest.mark.parametrize(
    ("name", "source", "task", "message"),
    [
        ("pica", "auto", {}, "Unknown task 'pica'"),
        ("piqa2", "local", {}, r"'piqa2' needs the local file \$GPRUNE_DATA_DIR/tasks/piqa2/test\.jsonl"),
        ("gsm8k", "hub", {"output_type": "loglikelihood_rolling"}, r"'cola' \(loglikelihood_rolling\) must have"),
        ("gsm8k", "hub", {"output_type": "generate_until"}, "must have lm_eval.s metric acc, .*; got its own acc"),
        ("piqa", "hub", {"metrics": ["mcc"]}, "'cola' .* got its own mcc"),
        ("piqa", "hub", {"process_results": dict}, "Task 'cola' .* must have lm_eval's metric"),
        ("piqa", "hub", {"repeats": 3}, "Task 'cola' .* must have lm_eval's metric"),
        ("piqa", "hub", {"metric_list": [{"metric": max}]}, "Task 'cola' .* must have lm_eval's metric"),
        ("piqa", "hub", {"MULTIMODAL": True}, "Task 'cola' must have text only"),
    ],
)  # fmt: skip
def test_unknown_and_unsupported_tasks_are_refused(name, source, task, message, data, monkeypatch):
    fake_hub(monkeypatch, reachable=True, manager=Manager(fake_task(**task)))
    with pytest.raises(UserError, match=message):
        task_sources.load_tasks(name, source)
