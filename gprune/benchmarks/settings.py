"""Settings of benchmarks. This file does not import PyTorch, so that invalid flags are reported quickly."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from gprune.benchmarks.engines import ENGINES
from gprune.checks import AtLeast1, AtLeast2, UpTo4096, validation_message
from gprune.errors import UserError

WIKITEXT = "wikitext2"
TEXTS = {WIKITEXT: "WikiText-2", "c4": "C4"}  # corpora with perplexities in the literature
SPEED = "speed"


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True, extra="forbid"))
class Benchmarks:
    """Flags of `gprune evaluate`, with their help."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("piqa", "arc_easy")
    """names of lm_eval tasks, wikitext2, c4, and speed"""
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
    source: Literal["auto", "hub", "local"] = "auto"
    """source of tasks: hub, local, or auto (the hub if it answers)"""
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
