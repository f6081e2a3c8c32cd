"""Time runs, model folders or models by name in the engines that people serve with, and print the table of speeds.

    python -m experiments.engines runs/A runs/B --dense --batch 1,4,16 --prompt 64 --output engines.json \\
        --engine transformers,vllm=~/vllm/bin/python,vllm:nemotron-nas,llama.cpp:q8_0
    python -m experiments.engines RECORDS.json  # only the table

All models of an engine are loaded at the same time, each in a process of its own, by the engine's own code
(`engine_process.py`). They are timed in alternation, so that other load of the machine affects all of them equally.
Records are written to evaluation.json of each run, for its card, its page and W&B, or to `--output`.

Rows of the table are models in an engine, columns are the time to the first token and per token of a single request,
generated tokens per second (prompts included) for each number of requests, and their ratio to the dense model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from experiments import engine_process
from experiments.engine_process import ENGINES
from gprune.benchmarks.settings import Benchmarks
from gprune.benchmarks.subjects import Subject, find_evaluation
from gprune.console import Parser, quiet, run_guarded
from gprune.errors import UserError, first_line
from gprune.evaluation.speed import describe_device
from gprune.export.convert import FORMATS, format_named
from gprune.export.hf import save_pruned
from gprune.models import gguf
from gprune.storage.files import key_of
from gprune.storage.paths import expanded

log = logging.getLogger("gprune")
NEW_TOKENS = 32  # generated tokens per request
MIN_ROUNDS, MAX_ROUNDS = 2, 5  # numbers of rounds of a measurement
MAX_SECONDS = 20.0  # after this time no round begins, except the first ones
Record = dict[str, Any]


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


def check_prompt(model: PreTrainedModel, prompt: int) -> None:
    """Raise UserError if prompts of this length, and the tokens generated after them, exceed the model's positions."""
    longest = getattr(model.config, "max_position_embeddings", math.inf) - NEW_TOKENS
    if prompt > longest:
        raise UserError(f"--prompt must be {longest:,} tokens or less; got {prompt:,}.")


def evaluate_engines(
    models: Sequence[str], choices: Sequence[EngineChoice], batches: Sequence[int], prompt: int, *, dense: bool = False,
    dtype: str | None = None, output: Path | None = None,
) -> tuple[list[Record], list[Path]]:  # fmt: skip
    """Time models (runs, folders or names) in engines. Return the records, and the files that contain them.

    Engines that are not installed are skipped, and a dense model that runs share is timed once. Everything that can be
    refused is refused before anything is timed.
    """
    versions = installed_versions(choices)
    evaluations = [find_evaluation(model, Benchmarks(dtype=dtype), dense=dense, output=output) for model in models]
    subjects = {name_of(subject): subject for evaluation in evaluations for subject in evaluation.subjects}
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="gprune-engines-") as scratch:
        written: list[Forms] = []
        for index, subject in enumerate(subjects.values()):
            log.info("Writing model %d of %d in the forms of the engines", index + 1, len(subjects))
            forms = [choice.form for choice in versions]
            written.append(write_forms(subject, forms, Path(scratch) / str(index), prompt))
        for choice, version in versions.items():
            log.info("Timing %d models in %s %s", len(subjects), choice.label, version)
            by_model = time_models(choice, version, written, batches, prompt, Path(scratch))
            of_subject = dict(zip(subjects, by_model, strict=True))
            for evaluation in evaluations:
                new = [
                    r | subject.about | evaluation.origin
                    for subject in evaluation.subjects
                    for r in of_subject[name_of(subject)]
                ]
                evaluation.store(new)
                records += new
    for evaluation in evaluations:
        evaluation.publish([r for r in records if r["origin"] == evaluation.origin["origin"]])
    outputs = dict.fromkeys(evaluation.output for evaluation in evaluations)
    return records, [path for path in outputs if path is not None]


def name_of(subject: Subject) -> str:
    """Return a name that is equal for a dense model of several runs, and unique for other models."""
    return subject.weights or str(id(subject))


@dataclass(frozen=True)
class Forms:
    """A model that was written in several forms."""

    paths: dict[str, Path]  # by form
    dtype: str


def write_forms(subject: Subject, forms: Sequence[str], folder: Path, prompt: int) -> Forms:
    """Write a model in several forms."""
    model, tokenizer = subject.load()
    check_prompt(model, prompt)
    folder.mkdir()
    paths = {form: folder / form for form in dict.fromkeys(forms)}
    for form, path in paths.items():
        if form == "hf":
            save_pruned(model, tokenizer, path)
            continue
        target = format_named(form if form in FORMATS else "gguf")
        target.write(model, tokenizer, path, type=form, name=subject.about["model"], check=False)
    return Forms(paths, str(model.dtype).removeprefix("torch."))


def installed_versions(choices: Sequence[EngineChoice]) -> dict[EngineChoice, str]:
    """Return the versions of the installed engines, and log how to install the others. UserError without any."""
    versions: dict[EngineChoice, str] = {}
    for choice in choices:
        version = version_of(choice)
        if version is None:
            log.warning(
                "Skipped %s, which is not installed in the environment of %s. Run `%s`; --engine %s=PYTHON names the "
                "Python of another environment", choice.label, choice.python, ENGINES[choice.name].install, choice.name,
            )  # fmt: skip
        else:
            versions[choice] = version
    if not versions:
        raise UserError("--engine needs an engine that is installed; got none.")
    return versions


def version_of(choice: EngineChoice) -> str | None:
    """Return the version of an engine in its environment, or None."""
    try:
        process = subprocess.run(command_of(choice), input="", capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--engine {choice.name}=PYTHON must be the Python of an environment; got '{choice.python}'."
        ) from error
    return json.loads(process.stdout)


def command_of(choice: EngineChoice) -> list[str]:
    """Return the command of an engine's process."""
    return [choice.python, "-P", str(Path(engine_process.__file__)), choice.name]


class Server:
    """The process of an engine. The first request loads a model, others are timed. stderr is written to `errors`."""

    def __init__(self, choice: EngineChoice, errors: Path):
        environment = ENGINES[choice.name].environment | os.environ
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment.pop("PYTHONPATH", None)  # another environment has other packages
        self.name, self.errors = choice.label, errors
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                command_of(choice), env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=file,
            )  # fmt: skip
        self.receive()  # the version

    def send(self, request: dict[str, Any]) -> None:
        """Send a request."""
        with contextlib.suppress(BrokenPipeError):  # `receive` reports why the process has ended
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def receive(self) -> Any:
        """Wait for an answer. Raise UserError with the engine's error, or its last line if the process has ended."""
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": self.last_line()}
        if isinstance(answer, dict) and "error" in answer:
            raise UserError(f"Cannot run the model in {self.name}: {first_line(RuntimeError(answer['error']))}.")
        return answer

    def last_line(self) -> str:
        """Return what the process printed last."""
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.wait()}"

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def time_models(
    choice: EngineChoice, version: str, models: Sequence[Forms], batches: Sequence[int], prompt: int, scratch: Path
) -> list[list[Record]]:
    """Time models in an engine. Return for each model the records `prefill`, `decode` and `generate` by batch size."""
    load = {
        "threads": torch.get_num_threads(), "requests": max(batches), "length": prompt + NEW_TOKENS,
        "share": 1 / len(models),
    }  # fmt: skip
    records: list[list[Record]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        servers = []
        for index, model in enumerate(models):
            server = Server(choice, scratch / f"{index}.log")
            stack.callback(server.stop)
            server.send(load | {"path": str(model.paths[choice.form]), "dtype": model.dtype})
            servers.append(server)
        classes = [server.receive()["class"] for server in servers]
        for batch in batches:
            rounds = list(time_rounds(servers, batch, prompt))
            same_rounds = key_of(rounds=rounds)[:16]
            for i, model in enumerate(models):
                about = {
                    "engine": choice.name, "engine_version": version, "engine_class": classes[i], "form": choice.form,
                    "dtype": choice.form if choice.form in gguf.LIMITS else model.dtype, "rounds": same_rounds,
                }  # fmt: skip
                times = [of_round[i] for of_round in rounds]
                records[i] += [about | record for record in timing_records(choice.label, about, times, batch, prompt)]
    return records


def time_rounds(servers: Sequence[Server], batch: int, prompt: int) -> Iterator[list[dict[str, float]]]:
    """Yield the times of all models, which are timed one after another in each round."""
    request = {"requests": batch, "prompt": prompt, "tokens": NEW_TOKENS}
    start = time.monotonic()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.monotonic() - start > MAX_SECONDS:
            return
        times = []
        for server in servers:
            server.send(request)
            times.append(server.receive())
        yield times


def timing_records(
    label: str, about: Record, times: Sequence[dict[str, float]], batch: int, prompt: int
) -> list[Record]:
    """Return the records of a model and a number of requests. Of all rounds, the fastest counts."""
    fastest = {name: min(of_round[name] for of_round in times) for name in times[0]}
    slowest = max(of_round["total"] for of_round in times)
    device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    engine = f"{about['engine']} {about['engine_version']}, {about['engine_class']}"
    shared = {
        "kind": "speed", "split": "none", "batch": batch, "prompt": prompt, "spread": slowest / fastest["total"] - 1,
        "standard_protocol": False, "note": f"{engine}, prompts of {prompt} tokens, {device}",
        "content_hash": key_of(machine=[device, platform.node()], batch=batch, prompt=prompt, engine=label)[:16],
    }  # fmt: skip
    measured = {
        "prefill": (batch * prompt, fastest["first"]),
        "decode": (batch, fastest["step"]),
        "generate": (batch * NEW_TOKENS, fastest["total"]),
    }
    return [
        shared | {"task": f"{label} {task}", "tokens_per_second": tokens / seconds, "seconds": seconds}
        for task, (tokens, seconds) in measured.items()
    ]


def models_of(records: Sequence[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Yield the name of an engine, that of a model, and its records, with the dense model first."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for r in sorted(records, key=lambda r: r["stage"] != "dense"):
        engine = r["task"].rpartition(" ")[0]
        grouped.setdefault((engine, "dense" if r["stage"] == "dense" else r["run"]), []).append(r)
    engines = dict.fromkeys(r["task"].rpartition(" ")[0] for r in records)
    for engine in engines:
        for (of_engine, model), of_model in grouped.items():
            if of_engine == engine:
                yield engine, model, of_model


def rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table."""
    batches = sorted({r["batch"] for r in records})
    header = ["engine", "model", "its class", "first token, ms", "per token, ms"]
    header += [f"tokens/s at {batch}" for batch in batches] + [f"times dense at {batch}" for batch in batches]
    table, dense_rates = [], {}
    for engine, model, of_model in models_of(records):
        by_task = {(r["task"].rpartition(" ")[2], r["batch"]): r for r in of_model}
        rates = {batch: by_task["generate", batch]["tokens_per_second"] for batch in batches}
        if model == "dense":
            dense_rates[engine] = rates
        table.append([
            engine, model, of_model[0]["engine_class"],
            *(f"{1000 * by_task[task, batches[0]]['seconds']:.1f}" for task in ("prefill", "decode")),
            *(f"{rate:.1f}" for rate in rates.values()),
            *(f"{rates[batch] / dense_rates[engine][batch]:.2f}" if engine in dense_rates else "" for batch in batches),
        ])  # fmt: skip
    return header, table


def table_as_text(records: Sequence[Record]) -> str:
    """Return the table as Markdown, the largest spread of repeated measurements, and the versions of the engines."""
    header, table = rows(records)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *table)]
    lines.insert(1, "|" + "---|" * 3 + "---:|" * (len(header) - 3))
    spreads = sorted(r["spread"] for r in records)
    spread = f"{spreads[len(spreads) // 2]:.0%} (median), at most {spreads[-1]:.0%}"
    versions = ", ".join(sorted({f"{r['engine']} {r['engine_version']}" for r in records}))
    lines += ["", f"Repeated measurements differ by {spread}.", f"{versions} | {records[0]['note']}", ""]
    return "\n".join(lines)


def parse_sizes(flag: str, text: str) -> list[int]:
    """Parse whole numbers of 1 or more, separated by commas."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise UserError(f"{flag} must be whole numbers of 1 or more; got '{text}'.")
    return list(dict.fromkeys(numbers))


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser("python -m experiments.engines", description=__doc__)
    result.add_argument("models", metavar="MODEL", nargs="+", help="runs, model folders or names; or one RECORDS.json")
    forms = "; ".join(f"{name} ({', '.join(engine.forms)})" for name, engine in ENGINES.items())
    result.add_argument(
        "--engine", metavar="A,B", default="transformers",
        help="NAME, NAME:FORM or NAME=PYTHON, where PYTHON is that of another environment. Engines with the forms of "
        f"models that they load, the default first: {forms}",
    )  # fmt: skip
    result.add_argument("--dense", action="store_true", help="time the dense models of runs too")
    result.add_argument("--batch", metavar="N,N", default="1,8", help="numbers of requests at once")
    result.add_argument("--prompt", metavar="N", default="128", help="tokens of each prompt")
    result.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the run")
    result.add_argument("--output", metavar="FILE", help="JSON file for records (default: evaluation.json in the run)")
    return result


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Return the table and the paths of the records."""
    options = parser().parse_args(arguments)
    if options.models[0].endswith(".json"):
        return table_as_text(json.loads(Path(options.models[0]).read_text(encoding="utf-8"))["records"])
    choices, batches = parse_engines(options.engine.split(",")), parse_sizes("--batch", options.batch)
    (prompt, *_) = parse_sizes("--prompt", options.prompt)
    quiet()
    output = None if options.output is None else expanded(options.output)
    records, paths = evaluate_engines(
        options.models, choices, batches, prompt, dense=options.dense, dtype=options.dtype, output=output
    )
    return table_as_text(records) + "".join(f"Records: {path}\n" for path in paths)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and report expected failures as one line."""
    return run_guarded("experiments.engines", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
