"""Zero-shot tasks by EleutherAI's lm_eval on a model in memory.

from gprune.benchmarks.zero_shot import zero_shot
records = zero_shot(model, tokenizer, ["piqa", "lambada_openai", "gsm8k"], limit=200)

lm_eval builds the requests and computes metrics. gprune/benchmarks/answers.py computes log-likelihoods, and
gprune/benchmarks/tasks.py loads tasks.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.tasks import SUPPORTED_METRICS, LoadedTask, load_tasks, questions_hash, require_lm_eval
from gprune.console import quieted
from gprune.corpora.windows import leading_token
from gprune.errors import quoting, require_finite

if TYPE_CHECKING:
    from lm_eval.api.task import Task


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
    with quieted("lm_eval", stderr=not sys.stderr.isatty()), torch.inference_mode():
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
