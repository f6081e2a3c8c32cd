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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.tasks import COUNTED, LoadedTask, load_tasks, questions_hash, require_lm_eval
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
    tasks have none.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: names of tasks or of groups of tasks.
        limit: use only the first questions of each task.
        batch_size: choices per forward pass.
        source: hub (lm_eval's data), local (files in `$GPRUNE_DATA_DIR/tasks`), or auto (the hub if it answers).

    Raises:
        UserError: if lm_eval is missing, a task is unknown, its metric is not supported, its data cannot be loaded, or
            a log-likelihood is not finite.
    """
    stamp = {
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
        every = (loaded for name in tasks for loaded in load_tasks(name, source))
        by_name = {loaded.task.task_name: loaded for loaded in every}  # groups may overlap
        for name, loaded in by_name.items():
            _build_requests(name, loaded.task, limit)
        outcome = evaluate(
            AnswerLM(model, tokenizer, batch_size),
            {name: loaded.task for name, loaded in by_name.items()},
            limit=limit,
            bootstrap_iters=0,
        )
    return [
        task_record(loaded, list(own)) | stamp
        for name, loaded in by_name.items()
        for _, own in itertools.groupby(outcome["samples"][name], key=lambda sample: sample["filter"])
    ]


def _build_requests(name: str, task: Task, limit: int | None) -> None:
    """Build the prompts of a task, with few-shot examples if the task generates text.

    Raises:
        UserError: if prompts cannot be built.
    """
    shots = task.config.num_fewshot or 0 if task.OUTPUT_TYPE == "generate_until" else 0
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(1234)  # the default of lm_eval
    needed = f" It needs {shots} examples in train.jsonl." if shots else ""
    with quoting(f"Cannot make prompts of task '{name}': ", f".{needed}"):
        task.build_all_requests(limit=limit)
    task.build_all_requests = lambda **_: None  # lm_eval would call it again


def task_record(loaded: LoadedTask, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Convert lm_eval's samples of a task to a record with the evaluation protocol.

    `correct` and `correct_norm` have a digit per question, and `answers` the choices or texts, for paired comparisons
    of models. Records with the same `content_hash` have the same questions.
    """
    from lm_eval.api.metrics import mean, mean_stderr

    task, kind, name = loaded.task, loaded.task.OUTPUT_TYPE, loaded.task.task_name
    if len(task.config.filter_list or ()) > 1:
        name = f"{name}/{samples[0]['filter']}"
    numbers: dict[str, Any] = dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
    for metric in filter(samples[0].__contains__, COUNTED[kind]):
        right = [int(s[metric]) for s in samples]
        numbers |= {metric: mean(right), f"{metric}_stderr": mean_stderr(right) if len(right) > 1 else None}
        numbers["correct_norm" if metric == "acc_norm" else "correct"] = "".join(map(str, right))
    given, labels = [s["filtered_resps"] for s in samples], [s["target"] for s in samples]
    if kind == "generate_until":
        numbers["answers"] = [text for (text,) in given]
    else:
        lls = [[float(ll) for ll, _ in own] for own in given]
        require_finite(f"log-likelihood came up in task '{name}'", torch.tensor([ll for own in lls for ll in own]))
    if kind == "loglikelihood":
        numbers |= {"answers": right, "perplexity": math.exp(-mean([ll for (ll,) in lls]))}
    if kind == "multiple_choice":
        choices = [task.doc_to_choice(s["doc"]) for s in samples]
        if task.multiple_input:  # choices are in the context (winogrande), and lm_eval's target is the end of the text
            labels = [task.doc_to_text(s["doc"]) for s in samples]
        labels = [own.index(label) if label in own else label for label, own in zip(labels, choices, strict=True)]
        numbers["answers"] = [max(range(len(own)), key=own.__getitem__) for own in lls]
    partial = len(samples) < len(task.eval_docs)
    return {
        "kind": "zero_shot",
        "task": name,
        "task_version": str(task.VERSION),
        "split": task.config.test_split or task.config.validation_split,
        "source": loaded.source,
        "num_fewshot": task.config.num_fewshot,
        "questions": len(samples),
        **numbers,
        "standard_protocol": loaded.complete and not partial,
        "note": (f"only the first {len(samples)} questions; " if partial else "") + loaded.note,
        "content_hash": questions_hash(zip((s["arguments"] for s in samples), labels, strict=True)),
    }
