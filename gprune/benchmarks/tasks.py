"""Zero-shot tasks by EleutherAI's lm_eval on a model in memory.

from gprune.benchmarks.tasks import zero_shot
records = zero_shot(model, tokenizer, ["piqa", "lambada_openai", "gsm8k"], limit=200)

lm_eval builds the requests and computes metrics. gprune/benchmarks/answers.py computes log-likelihoods. Tasks are those
of lm_eval, with data from the hub or from local files, and local questions.

Local files are `$GPRUNE_DATA_DIR/tasks/<name>/<split>.jsonl`. A line is one of these: a row of the data set of
lm_eval's task with this name; a question `{"prompt": ..., "choices": [...], "label": 0}`, where each choice is scored
as the continuation " " + choice of the prompt; a minimal pair `{"good": ..., "bad": ..., "paradigm": ...}`, where whole
sentences are scored.

Tasks need lm_eval (`pip install 'gprune[lm-eval]'`), which is imported when it is used.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.console import quieted
from gprune.corpora.hub import hub_errors, offline_if_unreachable
from gprune.corpora.windows import leading_token
from gprune.errors import UserError, quoting, require_finite
from gprune.storage.paths import expanded, read_required_text

if TYPE_CHECKING:
    from lm_eval.api.task import Task

log = logging.getLogger("gprune")
# Type of a task -> metrics that are used. acc of loglikelihood is the share of texts that greedy decoding gives.
SUPPORTED_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc",),
    "generate_until": ("exact_match",),
}
# Task -> how its complete split is recognised in local files: the number of rows; for a task with few-shot examples
# (rows, rows of train.jsonl); or the `content_hash` of local questions with lm_eval's prompts.
COMPLETE_SPLITS = {
    "lambada_openai": 5153,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_challenge": 1172,
    "gsm8k": (1319, 7473),
}
PARTIAL_NOTE = "not known to be all of lm_eval's, and never to be set beside published figures"


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval, and its description in records."""

    task: Any  # lm_eval.api.task.Task
    source: str  # "hub" or "local"
    complete: bool  # all questions of the split with lm_eval's prompts, so results can be compared with published ones
    note: str
    num_fewshot: int = 0  # number of worked examples in lm_eval's own protocol of the task


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 4,
    source: str = "auto",
) -> list[dict[str, Any]]:
    """Measure tasks, and return a record per task (and per filter of generated text) with standard errors.

    The log-softmax is computed in float32, whatever the model's dtype. The tokenizer decides whether BOS is added, as
    in lm_eval by default, and no chat template is used. Tasks that generate text have few-shot examples, because a base
    model does not know the format of answers: as many as lm_eval's default (5 in GSM8K), sampled with its seed. Other
    tasks have none, so a task whose own number is another one is not measured by the standard protocol.
    """
    protocol = {
        "harness": f"lm_eval {require_lm_eval()}",
        "limit": limit,
        "bos": leading_token(tokenizer, "auto") is not None,
        "chat_template": False,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    from lm_eval.evaluator import evaluate

    from gprune.benchmarks.answers import AnswerLM

    # lm_eval writes warnings and progress bars to stderr, which is kept for errors unless it is a terminal.
    # Sharded layers, which keep tensors between forward passes, fail in inference mode.
    with quieted("lm_eval", stderr=not sys.stderr.isatty()), torch.no_grad():
        by_name: dict[str, LoadedTask] = {}  # groups of tasks may overlap
        for name in tasks:
            by_name |= {loaded.task.task_name: loaded for loaded in load_tasks(name, source)}
        for name, loaded in by_name.items():
            _build_requests(name, loaded.task, limit)
        # simple_evaluate would also seed random generators, and describe the machine for seconds at each call.
        lm = AnswerLM(model, tokenizer, batch_size)
        outcome = evaluate(
            lm,
            {name: loaded.task for name, loaded in by_name.items()},
            limit=limit,
            bootstrap_iters=0,
        )
    records = []
    for name, loaded in by_name.items():
        for _, samples in itertools.groupby(outcome["samples"][name], key=lambda sample: sample["filter"]):
            records.append(task_record(loaded, list(samples), lm.cut_prompts) | protocol)
    return records


def _build_requests(name: str, task: Task, limit: int | None) -> None:
    """Build the prompts of a task, with few-shot examples if the task generates text."""
    generates_text = task.OUTPUT_TYPE == "generate_until"
    num_fewshot = (task.config.num_fewshot or 0) if generates_text else 0
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(1234)  # the default of lm_eval
    needed = f" It needs {num_fewshot} examples in train.jsonl." if num_fewshot else ""
    with quoting(f"Cannot make prompts of task '{name}': ", f".{needed}"):
        task.build_all_requests(limit=limit)
    task.build_all_requests = lambda **_: None  # lm_eval would call it again


def task_record(
    loaded: LoadedTask, samples: Sequence[dict[str, Any]], cut_prompts: Collection[str] = ()
) -> dict[str, Any]:
    """Convert lm_eval's samples of a task to a record with numbers and the evaluation protocol.

    Records with the same `content_hash` have the same questions.
    """
    task = loaded.task
    name = task.task_name
    if len(task.config.filter_list or ()) > 1:
        name = f"{name}/{samples[0]['filter']}"
    partial = len(samples) < len(task.eval_docs)
    num_cut = sum(any(texts[0] in cut_prompts for texts in sample["arguments"]) for sample in samples)
    notes = [f"only the first {len(samples)} questions"] * partial
    notes += [f"questions with prompts cut to the positions of the model: {num_cut}"] * bool(num_cut)
    num_fewshot = task.config.num_fewshot
    has_own_number = num_fewshot == loaded.num_fewshot
    if not has_own_number:
        notes.append(f"{num_fewshot} examples in prompts, lm_eval's own number is {loaded.num_fewshot}")
    return {
        "kind": "zero_shot",
        "task": name,
        "task_version": str(task.VERSION),
        "split": task.config.test_split or task.config.validation_split,
        "source": loaded.source,
        "num_fewshot": num_fewshot,
        "questions": len(samples),
        **_accuracies(task, samples),
        **_answers(task, name, samples),
        "standard_protocol": loaded.complete and has_own_number and not partial and not num_cut,
        "note": "; ".join([*notes, loaded.note]),
        "content_hash": questions_hash((sample["arguments"], sample["target"]) for sample in samples),
    }


def _accuracies(task: Task, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return metrics with standard errors, and for each metric a text with a digit per question (1: correct).

    The texts, `correct` and `correct_norm`, are for paired comparisons of models.
    """
    from lm_eval.api.metrics import mean, mean_stderr

    numbers: dict[str, Any] = dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
    for metric in SUPPORTED_METRICS[task.OUTPUT_TYPE]:
        if metric not in samples[0]:
            continue
        correct = [int(sample[metric]) for sample in samples]
        numbers[metric] = mean(correct)
        numbers[f"{metric}_stderr"] = mean_stderr(correct) if len(correct) > 1 else None
        numbers["correct_norm" if metric == "acc_norm" else "correct"] = "".join(map(str, correct))
    return numbers


def _answers(task: Task, name: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return `answers`, for paired comparisons of models, and for tasks of type `loglikelihood` also `perplexity`.

    An answer is the generated text, the index of the most likely choice, or whether greedy decoding gives the text.
    """
    from lm_eval.api.metrics import mean

    responses = [sample["filtered_resps"] for sample in samples]
    if task.OUTPUT_TYPE == "generate_until":
        return {"answers": [text for (text,) in responses]}
    log_likelihoods = [[float(log_likelihood) for log_likelihood, _ in choices] for choices in responses]
    flat = torch.tensor(list(itertools.chain.from_iterable(log_likelihoods)))
    require_finite(f"log-likelihood came up in task '{name}'", flat)
    if task.OUTPUT_TYPE == "loglikelihood":
        answers = [int(sample["acc"]) for sample in samples]
        return {"answers": answers, "perplexity": math.exp(-mean([of_text for (of_text,) in log_likelihoods]))}
    return {"answers": [max(range(len(choices)), key=choices.__getitem__) for choices in log_likelihoods]}


COMPLETE_SPLITS |= {"piqa": "f230db808510ef88", "arc_easy": "16b23eecab0a5935"}


def require_lm_eval() -> str:
    """Return the version of lm_eval. Raise UserError if it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        remedy = "Run pip install 'gprune[lm-eval]'"
        raise UserError(f"--tasks needs lm_eval for zero-shot tasks, which is not installed. {remedy}.") from error
    return version("lm_eval")


def load_tasks(name: str, source: str) -> list[LoadedTask]:
    """Load a task, or all tasks of a group."""
    path = local_file(name)
    if source == "local":
        if path is None:
            raise UserError(f"Task '{name}' needs the local file $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl.")
        return [local_task(path)]
    with offline_if_unreachable() as reachable:
        if source == "hub" or path is None:
            return hub_tasks(name)
        if reachable:
            try:
                return hub_tasks(name)
            except UserError as error:
                log.info("%s", error)
    log.info("Reading task %s from local files", name)
    return [local_task(path)]


def hub_tasks(name: str) -> list[LoadedTask]:
    """Load lm_eval's task, or all tasks of a group, with data from the hub."""
    manager = _task_manager()
    if name not in manager.all_tasks:
        remedy = f"`lm-eval ls tasks` lists all tasks; local files go to $GPRUNE_DATA_DIR/tasks/{name}"
        raise UserError(f"Unknown task '{name}'. {remedy}.")
    with hub_errors(f"task '{name}'", f"its questions into $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl"):
        tasks = manager.load([name])["tasks"].values()
    return [_to_loaded_task(task, "hub", "") for task in tasks]


def _to_loaded_task(task: Any, source: str, incomplete: str) -> LoadedTask:
    """Describe a task of lm_eval."""
    metrics, kind = list(task.aggregation()), task.OUTPUT_TYPE
    has_own_function = any(callable(metric["metric"]) for metric in task.config.metric_list or ())
    computes_own_metrics = task.config.process_results is not None or task.config.repeats > 1 or has_own_function
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"Task '{task.task_name}' must have text only; got images or audio.")
    if computes_own_metrics or not {*SUPPORTED_METRICS.get(kind, ())} & {*metrics}:
        raise UserError(
            f"Task '{task.task_name}' ({kind}) must have lm_eval's metric acc, acc_norm or exact_match; got its own "
            f"{', '.join(metrics)}. For such tasks run lm_eval on the exported model."
        )
    note = f"lm_eval's own task{incomplete}"
    return LoadedTask(task, source, complete=not incomplete, note=note, num_fewshot=task.config.num_fewshot or 0)


@functools.lru_cache(maxsize=1)
def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # cached, because it reads thousands of YAML files


def local_file(name: str) -> Path | None:
    """Return the file with the questions of a local task, or None."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    is_plain_name = name.replace("_", "").isalnum()  # with other characters the path could leave the folder
    if not root or not is_plain_name:
        return None
    files = (expanded(root) / "tasks" / name / f"{split}.jsonl" for split in ("test", "validation"))
    return next(filter(Path.is_file, files), None)


def local_task(path: Path) -> LoadedTask:
    """Load a task from a local file, which has rows of lm_eval's data set, or questions."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    name, split = path.parent.name, path.stem
    rows_by_line = _read_rows(path)
    first_row = next(iter(rows_by_line.values()))
    is_question = {"prompt", "choices", "label"} <= first_row.keys() or "good" in first_row
    if not is_question and name in _task_manager().all_subtasks:
        return _task_with_local_rows(path.parent)
    questions = [_parse_question(row, line) for line, row in rows_by_line.items()]
    are_pairs = all("paradigm" in question for question in questions)
    if are_pairs:
        _interleave_paradigms(questions)
    scored_texts = (([(q["prompt"], f" {choice}") for choice in q["choices"]], q["label"]) for q in questions)
    complete = questions_hash(scored_texts) == COMPLETE_SPLITS.get(name)
    # Minimal pairs are scored as whole sentences, so normalising by length (acc_norm) makes no sense.
    metrics = ["acc"] if are_pairs else ["acc", "acc_norm"]
    config = {
        "task": name, "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(questions)},
        f"{split}_split": split, "output_type": "multiple_choice", "target_delimiter": " ",
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "label",
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": "1.0" if complete else "local"},
    }  # fmt: skip
    note = "lm_eval's prompts" if complete else f"{len(questions):,} questions, {PARTIAL_NOTE}"
    with quoting(f"Cannot read questions in {path}: "):
        return LoadedTask(ConfigurableTask(config=config), "local", complete, note)


def _interleave_paradigms(pairs: list[dict[str, Any]]) -> None:
    """Sort minimal pairs in place: the first of every paradigm, the second of every paradigm, and so on.

    So any `--limit` covers all paradigms.
    """
    counters: dict[str, Iterator[int]] = defaultdict(itertools.count)
    pairs.sort(key=lambda pair: next(counters[pair["paradigm"]]))


def _task_with_local_rows(folder: Path) -> LoadedTask:
    """Load lm_eval's task, with rows of the local files `<split>.jsonl` instead of its data set."""
    import datasets

    splits: dict[str, Any] = defaultdict(lambda: datasets.Dataset.from_list([]))  # splits without a file are empty
    config = {"task": folder.name, "custom_dataset": lambda **_: splits}
    with quoting(f"Cannot read rows of lm_eval's data set, in the split that it evaluates, in {folder}: "):
        for path in folder.glob("*.jsonl"):
            rows = list(_read_rows(path).values())
            splits[path.stem] = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
        (task,) = _task_manager().load([{"group": "local", "task": [config]}])["tasks"].values()
    num_rows = len(task.eval_docs)
    has_few_shot_examples = task.OUTPUT_TYPE == "generate_until"
    sizes = (num_rows, len(splits["train"])) if has_few_shot_examples else num_rows
    complete = sizes == COMPLETE_SPLITS.get(folder.name)
    return _to_loaded_task(task, "local", "" if complete else f" on {num_rows:,} rows, {PARTIAL_NOTE}")


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file with a JSON object on each line. Return "file:line" -> object."""
    rows = {}
    for i, line in enumerate(read_required_text(path, "a question per line in UTF-8").split("\n"), 1):
        if line.strip():
            with quoting(f"{path}:{i}: Cannot read a JSON object: "):
                rows[f"{path}:{i}"] = {**json.loads(line)}
    if not rows:
        raise UserError(f"{path} must have a question per line; got an empty file.")
    return rows


def _parse_question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a row to a question with `prompt`, `choices` and `label`, and for a minimal pair also `paradigm`."""
    if "good" in row:
        question = {"prompt": "", "choices": [row["good"], row.get("bad")], "label": 0}
        question["paradigm"] = str(row.get("paradigm", ""))
    else:
        question = {name: row.get(name) for name in ("prompt", "choices", "label")}
    choices = question["choices"] if isinstance(question["choices"], list) else []
    are_texts = all(isinstance(text, str) for text in (question["prompt"], *choices))
    has_choices = len(choices) > 1 and all(choices)
    if not (are_texts and has_choices and question["label"] in range(len(choices))):
        expected = '{"prompt": str, "choices": [str, str, ...], "label": int} or {"good": str, "bad": str}'
        raise UserError(f"{where}: The line must be {expected}, or a row of lm_eval's data set.")
    return question


def questions_hash(questions: Iterable[tuple[list[tuple[str, str]], Any]]) -> str:
    """Return a hash of everything that is scored."""
    return hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()[:16]
