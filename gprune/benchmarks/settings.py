"""Settings of benchmarks. This file does not import PyTorch, so that invalid flags are reported quickly."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from gprune.checks import AtLeast0, AtLeast1, AtLeast2, Memory, validation_message
from gprune.errors import UserError
from gprune.storage.yaml_text import load_yaml

WIKITEXT = "wikitext2"
TEXTS = {WIKITEXT: "WikiText-2", "c4": "C4"}  # corpora with perplexities in the literature
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
    openbookqa), wikitext2 and c4"""
    num_fewshot: AtLeast0 | None = None
    """worked examples in the prompts of every task (default: the task's own number in lm_eval). A 0 that lm_eval's task
    names is not replaced"""
    limit: AtLeast1 | None = None
    """use only the first questions or windows of each task (default: all)"""
    seq_len: Annotated[tuple[AtLeast2, ...], Field(min_length=1)] = (2048,)
    """tokens per window of wikitext2 and c4; several lengths give a record each"""
    bos: Literal["auto", "always", "never"] = "auto"
    """whether windows of wikitext2 and c4 begin with BOS: auto (if the tokenizer adds it), always or never"""
    batch_size: AtLeast1 = 4
    """choices per forward pass; large batches are not faster on a CPU"""
    include_path: str | None = None
    """folder with YAML tasks of lm_eval, which have priority over its own (default: $GPRUNE_DATA_DIR/tasks)"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """float32, bfloat16 or float16 (default: that of the run; float32 for other models)"""
    device_map: Literal["auto"] | None = None
    """auto: distribute weights over all devices, then CPU memory, then the disk (default: that of the run)"""
    max_memory: Annotated[Memory, BeforeValidator(_read_limits)] | None = None
    """limits of --device_map for weights by device number or cpu, such as '{0: 20GiB, cpu: 60GiB}'"""
    trust_remote_code: bool = False
    """run Python code in the model's repository; use it only if you have read that code"""

    def __post_init__(self) -> None:
        """Raise UserError if flags contradict each other."""
        if self.max_memory is not None and self.device_map is None:
            raise UserError("--max_memory needs --device_map auto.")


def parse_benchmarks(**settings: Any) -> Benchmarks:
    """Build `Benchmarks` from settings. Numbers may be given as text. Raise UserError for invalid settings."""
    try:
        return Benchmarks(**settings)
    except ValidationError as error:
        # Errors of `Memory` name the flag of a run.
        raise UserError(f"{validation_message(error, '--')}.".replace("--model.max", "--max")) from error
