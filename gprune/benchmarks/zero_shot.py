"""Zero-shot accuracy through EleutherAI's lm_eval, of a model in memory: pruned, masked or read from a folder.

from gprune.benchmarks.zero_shot import zero_shot
records = zero_shot(model, tokenizer, ["piqa", "arc_easy"], limit=200)

lm_eval builds the requests and measures log-likelihoods; the accuracies are computed here, from what it measured, and
compared with its own. Where tasks come from: gprune/benchmarks/harness.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.harness import LoadedTask, load_tasks, require_lm_eval
from gprune.benchmarks.settings import Benchmarks
from gprune.console import quieted
from gprune.corpora.windows import opening
from gprune.errors import UserError, require_finite
from gprune.evaluation.accuracy import accuracy, chance, is_correct


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = Benchmarks.batch_size,
    source: str = "auto",
) -> list[dict[str, Any]]:
    """One record per task: acc and acc_norm with standard errors, and the protocol they were measured under.

    The log-softmax is taken in float32, whatever the model's dtype. Tokens before the prompt are the tokenizer's own
    habit (`bos` says whether there is one), as in lm_eval by default; no chat template.

    Args:
        model: eval mode; masks, if any, are the caller's context.
        tasks: names of multiple-choice tasks; a group of lm_eval's stands for all of its tasks.
        limit: the first so many questions of each task; None for all.
        batch_size: choices per forward pass.
        source: hub (lm_eval's own data), local (files under `$GPRUNE_DATA_DIR/tasks`), or auto: the hub if it answers.

    Raises:
        UserError: without lm_eval, for an unknown task, for one that is not multiple choice, for data that cannot be
            had, and for log-likelihoods that are not finite.
    """
    Benchmarks(tuple(tasks), limit=limit, batch_size=batch_size, source=source)  # refuses what cannot be
    harness = require_lm_eval()
    # lm_eval's warnings and progress bars only where someone watches: stderr is for the one line of an error.
    with quieted("lm_eval", stderr=not sys.stderr.isatty()):
        every = [found for name in tasks for found in load_tasks(name, source)]
        loaded = list({found.task.task_name: found for found in every}.values())  # groups may overlap
        try:
            outcome = _run(model, tokenizer, loaded, limit=limit, batch_size=batch_size)
        except (IndexError, RuntimeError) as error:
            if not any(words in str(error) for words in ("out of range", "device-side assert")):  # of a CPU, of CUDA
                raise
            raise UserError(f"The tokenizer makes tokens that the model has no embeddings for ({error}).") from error
    stamp = {
        "harness": f"lm_eval {harness}",
        "num_fewshot": 0,
        "limit": limit,
        "bos": opening(tokenizer, "auto") is not None,
        "chat_template": False,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return [record(task, outcome, stamp) for task in loaded]


def record(loaded: LoadedTask, outcome: dict[str, Any], stamp: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one task from lm_eval's log-likelihoods, with everything needed to repeat them.

    `correct` and `correct_norm` hold a digit per question, for paired comparisons between models; `content_hash` is
    that of every string that was scored, so that two records with the same one answer the same questions.
    """
    task, name = loaded.task, loaded.task.task_name
    samples = sorted(outcome["samples"][name], key=lambda sample: sample["doc_id"])
    choices = [task.doc_to_choice(s["doc"]) for s in samples]
    # Where the choices come before the question (winogrande), lm_eval's target is the end of the text.
    targets = [task.doc_to_text(s["doc"]) if task.multiple_input else s["target"] for s in samples]
    labels = [_label(target, c, name) for target, c in zip(targets, choices, strict=True)]
    lls = [[float(ll) for ll, _ in s["filtered_resps"]] for s in samples]
    require_finite(f"log-likelihood came up in task '{name}'", torch.tensor([ll for row in lls for ll in row]))
    lengths = [[len(c) for c in row] for row in choices]
    numbers: dict[str, Any] = dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
    digits = {}
    theirs = outcome["results"][name]
    for metric, size in (("acc", None), ("acc_norm", lengths)):
        if f"{metric},none" not in theirs:
            continue
        correct = is_correct(lls, labels, size)
        numbers[metric], numbers[f"{metric}_stderr"] = accuracy(correct)
        assert abs(numbers[metric] - theirs[f"{metric},none"]) < 1e-9, (name, metric, numbers, theirs)
        digits["correct" + metric.removeprefix("acc")] = "".join(str(int(c)) for c in correct)
    scored = json.dumps([[list(s["arguments"]), label] for s, label in zip(samples, labels, strict=True)])
    partial = len(samples) < len(task.eval_docs)
    return {
        "kind": "zero_shot",
        "task": name,
        "task_version": loaded.version,
        "split": loaded.split,
        "source": loaded.source,
        "questions": len(samples),
        **numbers,
        "chance": chance([len(c) for c in choices]),
        "standard_protocol": loaded.complete and not partial,
        "note": f"only the first {len(samples)} questions; " * partial + loaded.note,
        **stamp,
        "content_hash": hashlib.sha256(scored.encode()).hexdigest()[:16],
        **digits,
    }


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Sequence[LoadedTask],
    *,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """lm_eval's results for all tasks; the model is left as it was."""
    from lm_eval.evaluator import evaluate

    from gprune.benchmarks.answers import AnswerLM

    # A copy of the tokenizer, because a padding token is added where there is none.
    lm = AnswerLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size,
        softmax_dtype="float32",
    )  # fmt: skip
    for found in loaded:
        found.task.set_config(key="num_fewshot", value=0)
        found.task.set_fewshot_seed(seed=0)
    with torch.inference_mode():
        # lm_eval's closed form for the standard error of a mean needs a positive number here and draws nothing.
        return evaluate(
            lm=lm, task_dict={found.task.task_name: found.task for found in loaded}, limit=limit, bootstrap_iters=1
        )


def _label(target: Any, choices: Sequence[str], name: str) -> int:
    if isinstance(target, str) and target in choices:
        return choices.index(target)
    if not isinstance(target, int):
        raise UserError(f"Task '{name}': expected one right choice per question, got {target!r}; use another task.")
    return target
