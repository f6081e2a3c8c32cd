"""What the JSON files of runs hold, checked when they are read: types, finite numbers, and records that fit together.

A run folder comes from anywhere. What reads one gets plain data of these shapes, or one line that says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gprune.checks import refusal

Text = Annotated[str, Field(max_length=4096)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Digits = Annotated[str, Field(pattern="^[01]*$")]  # of questions, whether the answer is right
Share = Annotated[float, Field(ge=0, le=1)]
MOST_NLL = 690.0  # nats per token: exp of it is the largest perplexity below


class Shape(BaseModel):
    """Keys that have to be there; others may be, for later versions and other readers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Measured(Shape):
    """A perplexity with what it is made of."""

    perplexity: Annotated[float, Field(ge=1, le=1e300)]
    nll: Annotated[float, Field(ge=0, le=MOST_NLL)]
    tokens: Annotated[int, Field(ge=1, le=10**15)]
    window_nll: Annotated[list[Annotated[float, Field(ge=0, le=1e12)]], Field(min_length=1)]


class Record(Measured):
    """A number of `metrics.json` with its protocol."""

    stage: Text
    recovery: Text
    corpus: Text
    seen: bool
    seq_len: Annotated[int, Field(ge=2, le=10**9)]
    stride: Count
    bos: bool
    model: Text
    scope: Text
    sparsity: Share
    importance: Text | None
    split: Text
    dtype: Text
    seed: Count
    content_hash: Text


class Ratio(Shape):
    """Of two perplexities, with its interval."""

    ratio: Number
    low: Number
    high: Number


class Summary(Shape):
    """The headline of `metrics.json`."""

    sparsity_of_scope: Annotated[float, Field(ge=0)]  # whole blocks may take more along than the scope has
    sparsity_of_model: Share
    parameters_before: Count
    parameters_after: Count
    forward_tokens: Count
    forward_backward_tokens: Count
    unseen_over_base: dict[Text, Ratio] | None = None


class Metrics(Shape):
    """`metrics.json`; without a summary while the run goes on."""

    records: list[Record]
    summary: Summary | None = None


class Inputs(Shape):
    """What a run has read: the dense model's fingerprint, and text by role."""

    model: Text
    text: dict[Text, Text]


class Seed(Shape):
    """The part of `--run` that changes results."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]


class Settings(Shape):
    """What of a run's settings no flag describes; `config.check_settings` knows the others."""

    inputs: Inputs | None = None  # nothing before the first step
    run: Seed
    gprune: bool


class Manifest(Shape):
    """`manifest.json`."""

    settings: Settings
    steps: dict[Text, dict[Text, Number]]
    environment: dict[Text, Any] | None = None
    model: dict[Text, Text] | None = None
    learning: dict[Text, Any] | None = None
    fits: dict[Text, Count] | None = None  # what has learned, in order


class ZeroShot(Shape):
    """Accuracy on a task, in `evaluation.json`."""

    kind: Literal["zero_shot"]
    questions: Count
    acc: Share | None
    acc_stderr: Number | None
    acc_norm: Share | None
    acc_norm_stderr: Number | None
    correct: Digits = ""
    correct_norm: Digits = ""


class Wikitext(Measured):
    """Perplexity on WikiText-2, in `evaluation.json`."""

    kind: Literal["perplexity"]
    low: Number
    high: Number
    seq_len: Annotated[int, Field(ge=2, le=10**9)]


class Benchmark(Shape):
    """What all records of `evaluation.json` say."""

    kind: Literal["zero_shot", "perplexity"]
    task: Text
    stage: Text
    recovery: Text | None = None
    run: Text | None = None
    origin: Text | None = None  # a hash of the run's key, or of where a model lies: folders may share a name
    model: Text | None = None
    split: Text
    dtype: Text
    note: Text
    standard_protocol: bool
    content_hash: Text


class Evaluation(Shape):
    """`evaluation.json`."""

    records: list[Benchmark]


class Written(Shape):
    """What the models write after one beginning."""

    corpus: Text
    seen: bool
    prompt: str
    dense: str
    pruned: str
    text: str


class Samples(Shape):
    """`samples.json`."""

    split: Text
    rows: list[Written]


class Packed(Shape):
    """Masks in a record of a study."""

    sizes: list[Annotated[int, Field(ge=0, le=10**9)]]
    bits: str


class StudySummary(Summary):
    """The headline of a row of a list."""

    learned_tokens: Count  # forward and backward, without those of scores and controls


class Study(Shape):
    """The record of a row of a list."""

    name: Text
    settings: Settings
    inputs: Inputs
    steps: dict[Text, dict[Text, Number]]
    summary: StudySummary
    records: list[Record]
    masks: dict[Literal["ffn", "attention"], Packed] | None
    evaluation: list[Benchmark] = []
    learning: dict[Text, Any] | None = None


def problem(shape: Any, content: Any) -> str | None:
    """What keeps content from having a shape: the place, what was expected, what came; None if it has it."""
    try:
        TypeAdapter(shape).validate_python(content)
    except ValidationError as error:
        return refusal(error)
    except RecursionError:
        return "it is too deep"
    return None


def metrics(content: Any) -> str | None:
    """`problem` of `metrics.json`."""
    if (said := problem(Metrics, content)) is None and content.get("summary") and not content["records"]:
        said = "records: expected some"
    return said or records(content["records"])


def records(numbers: Sequence[dict[str, Any]]) -> str | None:
    """What keeps records from being those of one run: each number once, every stage on the dense model's windows."""
    by_row: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {}
    for n, r in enumerate(numbers):
        if (said := measured(r, r["seq_len"] - 1)) is not None:
            return f"records[{n}].{said}"
        row = by_row.setdefault((r["stage"], r["recovery"]), {})
        if r["corpus"] in row:
            return f"records[{n}]: expected each corpus once in a row, got '{r['corpus']}' twice"
        row[r["corpus"]] = r["content_hash"], r["seen"], r["seq_len"], len(r["window_nll"])
    if not numbers:
        return None
    dense = by_row.get(("dense", "none"))
    if dense is None:
        return "records: expected the dense model's"
    other = next((row for row, windows in by_row.items() if windows != dense), None)
    return other and f"records: expected {' + '.join(other)} on the windows of the dense model"


def measured(r: dict[str, Any], predicted: int | None = None) -> str | None:
    """What keeps a perplexity from being that of its windows, which may be rounded to four digits.

    Args:
        predicted: tokens of a window; None where windows differ.
    """
    total, nll = math.fsum(r["window_nll"]), r["nll"]
    if abs(math.log(r["perplexity"]) - nll) > 1e-6 * (1 + nll):
        return f"perplexity: expected exp of nll {nll}, got {r['perplexity']}"
    if abs(total - nll * r["tokens"]) > 1e-4 * (1 + total) + 1e-4 * len(r["window_nll"]):
        return f"window_nll: expected a sum of nll x tokens = {nll * r['tokens']}, got {total}"
    if predicted is not None and max(r["window_nll"]) > MOST_NLL * predicted:
        return f"window_nll: expected at most {MOST_NLL:g} per token, got {max(r['window_nll'])}"
    return None


def evaluation(content: Any) -> str | None:
    """`problem` of `evaluation.json`."""
    return problem(Evaluation, content) or benchmarks(content["records"])


def benchmarks(numbers: Sequence[dict[str, Any]]) -> str | None:
    """What keeps records of `gprune evaluate` from being such."""
    for n, r in enumerate(numbers):
        said = problem(ZeroShot if r["kind"] == "zero_shot" else Wikitext, r)
        if said is None:
            said = measured(r, r["seq_len"] - 1) if r["kind"] == "perplexity" else answered(r)
        if said is not None:
            return f"records[{n}].{said}"
    return None


def answered(r: dict[str, Any]) -> str | None:
    """What keeps the answers to a task from being those to its questions."""
    digits = [len(r[name]) for name in ("correct", "correct_norm") if name in r]
    if set(digits) != {r["questions"]}:
        return f"correct: expected a digit for each of {r['questions']} questions, got {digits or 'none'}"
    return None


def study(content: Any) -> str | None:
    """`problem` of the record of a study's row."""
    return problem(Study, content) or records(content["records"]) or benchmarks(content.get("evaluation") or [])


def shaped(shape: Any) -> Callable[[Any], str | None]:
    """`problem` of one shape."""
    return lambda content: problem(shape, content)
