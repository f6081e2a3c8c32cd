"""Tasks by EleutherAI's lm_eval, of a model in memory: pruned, masked or read from a folder.

from gprune.benchmarks.zero_shot import zero_shot
records = zero_shot(model, tokenizer, ["piqa", "lambada_openai", "gsm8k"], limit=200)

lm_eval builds the requests and counts; log-likelihoods are computed in gprune/benchmarks/answers.py. Where tasks come
from: gprune/benchmarks/tasks.py.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.tasks import COUNTED, LoadedTask, content_hash, load_tasks, require_lm_eval
from gprune.console import quieted
from gprune.corpora.windows import opening
from gprune.errors import quoting, require_finite


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 4,
    source: str = "auto",
) -> list[dict[str, Any]]:
    """A record per task, and per filter of generated text: numbers with standard errors, and their protocol.

    The log-softmax is taken in float32, whatever the model's dtype. Tokens before the prompt are the tokenizer's own
    habit (`bos` says whether there is one), as in lm_eval by default; no chat template. Where text is generated, worked
    examples show the form of an answer, which a base model does not know: as many as lm_eval has by default (5 in
    GSM8K), drawn with its seed. Elsewhere there are none.

    Args:
        tasks: names of tasks; a group of lm_eval's stands for all of its tasks.
        limit: the first so many questions of each task; None for all.
        source: hub (lm_eval's own data), local (files under `$GPRUNE_DATA_DIR/tasks`), or auto: the hub if it answers.

    Raises:
        UserError: without lm_eval, for an unknown task, for one whose answers are counted otherwise, for data that
            cannot be had, and for log-likelihoods that are not finite.
    """
    stamp = {
        "harness": f"lm_eval {require_lm_eval()}",
        "limit": limit,
        "bos": opening(tokenizer, "auto") is not None,
        "chat_template": False,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    from lm_eval.evaluator import evaluate

    from gprune.benchmarks.answers import AnswerLM

    # lm_eval's warnings and progress bars only where someone watches: stderr is for the one line of an error.
    with quieted("lm_eval", stderr=not sys.stderr.isatty()), torch.inference_mode():
        every = (loaded for name in tasks for loaded in load_tasks(name, source))
        by_name = {loaded.task.task_name: loaded for loaded in every}  # groups may overlap
        for name, loaded in by_name.items():
            task = loaded.task
            shots = task.config.num_fewshot or 0 if task.OUTPUT_TYPE == "generate_until" else 0
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(1234)  # lm_eval's
            expected = "rows that prompts can be made of" + (f" and {shots} examples in train.jsonl" if shots else "")
            with quoting(f"Task '{name}': expected {expected} (", ")."):
                task.build_all_requests(limit=limit)
            task.build_all_requests = lambda **_: None  # which lm_eval would do again
        outcome = evaluate(
            AnswerLM(model, tokenizer, batch_size),
            {name: loaded.task for name, loaded in by_name.items()},
            limit=limit,
            bootstrap_iters=0,
        )
    return [
        record(loaded, list(own)) | stamp
        for name, loaded in by_name.items()
        for _, own in itertools.groupby(outcome["samples"][name], key=lambda sample: sample["filter"])
    ]


def record(loaded: LoadedTask, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one task from what lm_eval measured, with everything needed to repeat them.

    `correct` and `correct_norm` hold a digit per question, `answers` the choices or texts, for paired comparisons of
    models; `content_hash` is that of every string that was scored: records with the same one answer the same questions.
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
        if task.multiple_input:  # the choices come before the question (winogrande), whose end is lm_eval's target
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
        "content_hash": content_hash(zip((s["arguments"] for s in samples), labels, strict=True)),
    }
