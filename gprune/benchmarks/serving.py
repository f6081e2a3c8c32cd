"""`gprune evaluate RUN... --tasks speed`: the speed of models in this process, or in engines that people serve with.

With `--engine`, all models of an engine are loaded at the same time, each in a process of its own. In both cases models
are timed in alternation, so that other load of the machine affects all of them equally.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gprune.benchmarks import engines
from gprune.benchmarks.engines import ENGINES
from gprune.benchmarks.settings import SPEED, Benchmarks, EngineChoice
from gprune.benchmarks.subjects import Subject, find_evaluation
from gprune.errors import UserError, first_line
from gprune.evaluation import speed
from gprune.export import gguf
from gprune.export.convert import FORMATS, format_named
from gprune.export.hf import save_pruned
from gprune.models.offload import device_of
from gprune.storage.files import key_of

log = logging.getLogger("gprune")
NEW_TOKENS = 32  # generated tokens per request
MIN_ROUNDS, MAX_ROUNDS = 2, 5  # numbers of rounds of a measurement
MAX_SECONDS = 20.0  # after this time no round begins, except the first ones
Record = dict[str, Any]


def check_prompt(model: PreTrainedModel, prompt: int, generate: int) -> None:
    """Raise UserError if prompts of this length, and the tokens generated after them, exceed the model's positions."""
    longest = getattr(model.config, "max_position_embeddings", math.inf) - generate
    if prompt > longest:
        raise UserError(f"--speed_prompt must be {longest:,} tokens or less; got {prompt:,}.")


def time_in_alternation(models: Sequence[PreTrainedModel], benchmarks: Benchmarks) -> list[list[Record]]:
    """Time models in this process. Return for each model records of `prefill` (first token) and `decode` by batch size.

    There is no record of a time of 0, which is within the noise. Tokens per second are for the whole batch. Only
    records with the same `rounds` can be compared, because their models were timed in alternation.
    """
    log.info("Evaluating %s", SPEED)
    prompt = benchmarks.speed_prompt
    for model in models:
        check_prompt(model, prompt, speed.DECODING_STEPS)
    device = speed.describe_device(device_of(models[0]))
    records: list[list[Record]] = [[] for _ in models]
    for batch in dict.fromkeys(benchmarks.speed_batch):
        (first_seconds, step_seconds, _), spread = speed.time_generation(
            models, batch=batch, prompt=prompt, generate=speed.DECODING_STEPS
        )
        shared = {
            "kind": "speed", "split": "none", "batch": batch, "prompt": prompt, "spread": spread,
            "standard_protocol": False, "note": f"prompts of {prompt} tokens, {device}",
            "rounds": key_of(first=first_seconds, step=step_seconds)[:16],
            "content_hash": key_of(machine=[device, platform.node()], batch=batch, prompt=prompt)[:16],
        }  # fmt: skip
        for i, model in enumerate(models):
            shared["dtype"] = str(model.dtype).removeprefix("torch.")
            for task, tokens, seconds in (
                ("prefill", batch * prompt, first_seconds[i]),
                ("decode", batch, step_seconds[i]),
            ):
                if seconds:  # 0 if a decoding step is too fast compared with prefill
                    rate = {"task": task, "tokens_per_second": tokens / seconds, "seconds": seconds}
                    records[i].append(shared | rate)
    return records


def evaluate_engines(
    models: Sequence[str], choices: Sequence[EngineChoice], benchmarks: Benchmarks, *, dense: bool = False,
    output: Path | None = None,
) -> tuple[list[Record], list[Path]]:  # fmt: skip
    """Time models (runs, folders or names) in engines. Return the records, and the files that contain them.

    Engines that are not installed are skipped, and a dense model that runs share is timed once. Everything that can be
    refused is refused before anything is timed.
    """
    versions = installed_versions(choices)
    evaluations = [find_evaluation(model, benchmarks, dense=dense, output=output) for model in models]
    subjects = {name_of(subject): subject for evaluation in evaluations for subject in evaluation.subjects}
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="gprune-engines-") as scratch:
        written: list[Forms] = []
        for index, subject in enumerate(subjects.values()):
            log.info("Writing model %d of %d in the forms of the engines", index + 1, len(subjects))
            forms = [choice.form for choice in versions]
            written.append(write_forms(subject, forms, Path(scratch) / str(index), benchmarks.speed_prompt))
        for choice, version in versions.items():
            log.info("Timing %d models in %s %s", len(subjects), choice.label, version)
            by_model = time_models(choice, version, written, benchmarks, Path(scratch))
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
    check_prompt(model, prompt, NEW_TOKENS)
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
    return [choice.python, "-P", str(Path(engines.__file__)), choice.name]


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
    choice: EngineChoice, version: str, models: Sequence[Forms], benchmarks: Benchmarks, scratch: Path
) -> list[list[Record]]:
    """Time models in an engine. Return for each model the records `prefill`, `decode` and `generate` by batch size."""
    batches, prompt = dict.fromkeys(benchmarks.speed_batch), benchmarks.speed_prompt
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
                    "dtype": choice.form if choice.form in gguf.TYPES_OF_FILE else model.dtype, "rounds": same_rounds,
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
    device = speed.describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
