"""Zero-shot accuracy by EleutherAI's lm_eval, of a model in memory: pruned, masked or read from a folder.

from gprune.benchmarks.zero_shot import zero_shot
records = zero_shot(model, tokenizer, ["piqa", "arc_easy"], limit=200)

lm_eval builds the requests and counts; log-likelihoods are computed in gprune/benchmarks/answers.py. Where tasks come
from: gprune/benchmarks/tasks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.tasks import LoadedTask, content_hash, load_tasks, require_lm_eval
from gprune.console import quieted
from gprune.corpora.windows import opening
from gprune.errors import require_finite

COLUMNS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 4,
    source: str = "auto",
) -> list[dict[str, Any]]:
    """One record per task: acc and acc_norm with standard errors, and the protocol they were measured under.

    The log-softmax is taken in float32, whatever the model's dtype. Tokens before the prompt are the tokenizer's own
    habit (`bos` says whether there is one), as in lm_eval by default; no chat template.

    Args:
        tasks: names of multiple-choice tasks; a group of lm_eval's stands for all of its tasks.
        limit: the first so many questions of each task; None for all.
        source: hub (lm_eval's own data), local (files under `$GPRUNE_DATA_DIR/tasks`), or auto: the hub if it answers.

    Raises:
        UserError: without lm_eval, for an unknown task, for one that is not multiple choice, for data that cannot be
            had, and for log-likelihoods that are not finite.
    """
    stamp = {
        "harness": f"lm_eval {require_lm_eval()}",
        "num_fewshot": 0,
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
        for loaded in by_name.values():
            loaded.task.set_config(key="num_fewshot", value=0)
        # Standard errors of means have a closed form, for which lm_eval needs a positive number of iterations.
        outcome = evaluate(
            AnswerLM(model, tokenizer, batch_size),
            {name: loaded.task for name, loaded in by_name.items()},
            limit=limit,
            bootstrap_iters=1,
        )
    return [record(loaded, outcome, stamp) for loaded in by_name.values()]


def record(loaded: LoadedTask, outcome: dict[str, Any], stamp: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one task from what lm_eval measured, with everything needed to repeat them.

    `correct` and `correct_norm` hold a digit per question, `answers` the choices, for paired comparisons of models;
    `content_hash` is that of every string that was scored: records with the same one answer the same questions.
    """
    task, name = loaded.task, loaded.task.task_name
    samples = sorted(outcome["samples"][name], key=lambda sample: sample["doc_id"])
    of_choices = [[float(ll) for ll, _ in s["filtered_resps"]] for s in samples]
    require_finite(f"log-likelihood came up in task '{name}'", torch.tensor([ll for lls in of_choices for ll in lls]))
    choices = [task.doc_to_choice(s["doc"]) for s in samples]
    # Where the choices come before the question (winogrande), lm_eval's target is the end of the text.
    targets = [task.doc_to_text(s["doc"]) if task.multiple_input else s["target"] for s in samples]
    labels = [own.index(target) if target in own else target for target, own in zip(targets, choices, strict=True)]
    columns = {c: outcome["results"][name].get(f"{c},none") for c in COLUMNS}
    numbers = {c: None if value == "N/A" else value for c, value in columns.items()}  # the error of a single question
    partial = len(samples) < len(task.eval_docs)
    return {
        "kind": "zero_shot",
        "task": name,
        "task_version": loaded.version,
        "split": loaded.split,
        "source": loaded.source,
        "questions": len(samples),
        **numbers,
        "answers": [max(range(len(lls)), key=lls.__getitem__) for lls in of_choices],
        "chance": sum(1 / len(own) for own in choices) / len(choices),
        "standard_protocol": loaded.complete and not partial,
        "note": (f"only the first {len(samples)} questions; " if partial else "") + loaded.note,
        **stamp,
        "content_hash": content_hash(zip((s["arguments"] for s in samples), labels, strict=True)),
    } | {
        "correct" + metric.removeprefix("acc"): "".join(str(int(s[metric])) for s in samples)
        for metric in ("acc", "acc_norm")
        if metric in samples[0]
    }
