"""Kill runs with SIGKILL at many points, resume them, and compare the results byte by byte.

python -m tests.method.kill_and_resume --count 50     # kills on a tiny model: minutes

This process imports everything that a run needs once, and forks; each child runs `train.py`. An uninterrupted run
records every point it passes: the start of each step, each batch, and for each written file three moments: the
temporary file is half written, it is complete but not yet renamed, and it has just been renamed. Points are then
sampled evenly from each kind.

A trial is one run folder. Its run is killed at later and later points. After each kill the run is started again and
has to resume. The last start has to finish. Every other trial has its own cache; the remaining trials share one cache.
Compared are masks, thresholds, modules, statistics, model and records, and the token counts if the trial has its own
cache.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from transformers import LlamaForCausalLM

from gprune.method import evaluate as evaluate_module
from gprune.method import prune as pipeline
from gprune.method import run as run_module
from gprune.stages.calibration import CalibrationStage
from gprune.stages.distillation import DistillationStage
from gprune.stages.refinement import AssignmentRefinement
from gprune.stages.threshold_learning import ThresholdLearning
from gprune.storage import files as artifacts

ROOT = Path(__file__).parents[2]
PIPELINE_STEPS = (
    "open_run", "calibrate", "score", "base_masks", "measure_drift", "partition", "assess", "learn_sparsity",
    "with_learning_budget", "with_quality_budget", "meet_budget", "prune_and_recover", "save", "evaluate", "summarise",
)  # fmt: skip
# Function of a step -> the module in which the pipeline looks it up, where it is replaced
STEPS = {"load_dense": run_module, "prepare_text": run_module} | dict.fromkeys(PIPELINE_STEPS, pipeline)
BATCHES = (
    (CalibrationStage, "test_step"),
    (AssignmentRefinement, "training_step"),
    (ThresholdLearning, "training_step"),
    (DistillationStage, "training_step"),
    (evaluate_module, "perplexity"),
)
TAUGHT_TOKENS = 960  # --distill.tokens
KINDS = ("step entered", "batch", "half written", "before rename", "after rename")
TOKENS = "metrics.json: tokens"  # key of the token counts among the digests
RESULTS = ("statistics/*", "recovery/*", "*.safetensors", "model/*.safetensors", "model/config.json")


@dataclass(frozen=True)
class Point:
    """A moment that occurs again in every run with the same settings."""

    step: str
    kind: str
    what: str  # the file, or the batch's method
    count: int  # how often this step, kind and file (or method) have occurred in this process

    def line(self) -> str:
        return json.dumps([self.step, self.kind, self.what, self.count])


@dataclass
class Watch:
    """Write each point to a file, and kill the process at `target`. Used in the child only."""

    points_file: int  # file descriptor
    target: Point | None
    step: str = "start"
    counts: Counter = field(default_factory=Counter)

    def __call__(self, kind: str, what: str) -> None:
        moment = (self.step, kind, what)
        self.counts[moment] += 1
        point = Point(*moment, self.counts[moment])
        os.write(self.points_file, (point.line() + "\n").encode())
        if point == self.target:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Wrap the steps, the batches and the writes of this process."""
        for name, owner in STEPS.items():
            setattr(owner, name, self.entering(name, getattr(owner, name)))
        for owner, name in BATCHES:
            setattr(owner, name, self.before("batch", name, getattr(owner, name)))
        artifacts.save_file = self.truncating(artifacts.save_file, lambda tensors, file, **_: file)
        Path.write_text = self.truncating(Path.write_text, lambda file, *_, **__: file)
        LlamaForCausalLM.save_pretrained = self.truncating(
            LlamaForCausalLM.save_pretrained, lambda model, folder, **_: folder / "model.safetensors"
        )
        L.Trainer.save_checkpoint = self.truncating(L.Trainer.save_checkpoint, lambda _trainer, file, **_: Path(file))
        os.replace = self.renaming(os.replace)

    def entering(self, name: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            self.step = name
            self("step entered", "")
            return call(*args, **kwargs)

        return wrapper

    def before(self, kind: str, what: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            self(kind, what)
            return call(*args, **kwargs)

        return wrapper

    def truncating(self, call: Callable, file_of: Callable[..., Path]) -> Callable:
        """Truncate the written file to half its size at the point, and restore it afterwards."""

        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            result = call(*args, **kwargs)
            path = file_of(*args, **kwargs)
            content = path.read_bytes()
            os.truncate(path, len(content) // 2)
            self("half written", re.sub(r"\.\w{8}\.tmp$", "", path.name))  # without the random part of temporary names
            path.write_bytes(content)
            return result

        return wrapper

    def renaming(self, call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapper(source, target, **kwargs):
            self("before rename", Path(target).name)
            call(source, target, **kwargs)
            self("after rename", Path(target).name)

        return wrapper


@dataclass
class Launcher:
    """Starts runs with the same flags in forked processes."""

    folder: Path
    flags: Sequence[str]

    def start(self, trial: Path, cache: Path, target: Point | None = None) -> bool:
        """Start the run in `trial`. Return whether it was killed at `target`. Any other failure is a SystemExit."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os._exit(self.run_script(trial, cache, target))
            finally:  # the child must never return from here
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, -signal.SIGKILL):
            tail = (trial / "output.txt").read_text()[-2000:]
            raise SystemExit(f"{trial}: a process ended with status {code}:\n{tail}")
        return code != 0

    def run_script(self, trial: Path, cache: Path, target: Point | None) -> int:
        trial.mkdir(parents=True, exist_ok=True)
        out = os.open(trial / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["GPRUNE_CACHE"] = str(cache)
        sys.argv = ["train.py", *self.flags, f"--run.dir={trial}", "--run.name=run"]
        Watch(os.open(trial / "points.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target).install()
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            sys.stdout.flush()
        return 1

    def end(self, trial: Path, cache: Path) -> dict[str, Any]:
        """Run to the end without a kill, and return the digests of the results."""
        assert not self.start(trial, cache)
        return digests(trial / "run", tokens=True)


def points_of(trial: Path) -> list[Point]:
    """Return the points that the last process in `trial` passed."""
    notes = trial / "points.txt"
    return [Point(*json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []


def digests(run: Path, *, tokens: bool = False) -> dict[str, Any]:
    """Return {file, or part of metrics.json: SHA-256} of the results of a run; with `tokens`, also the token counts."""
    hashes = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in RESULTS
        for file in run.glob(pattern)
        if file.is_file()
    }
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    summary = metrics["summary"]
    tokens_by_kind = {name: summary.pop(name) for name in list(summary) if name.endswith("_tokens")}
    for name, part in {"records": metrics["records"], "summary": summary}.items():
        hashes[f"metrics.json: {name}"] = hashlib.sha256(json.dumps(part).encode()).hexdigest()
    return hashes | ({TOKENS: tokens_by_kind} if tokens else {})


def leftover_files(folder: Path) -> list[Path]:
    """Return temporary files and folders of interrupted writes."""
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".new", ".old"))]


def sample_points(points: Sequence[Point], count: int, generator: random.Random) -> list[Point]:
    """Sample `count` points, and return them in the order of the run.

    Kinds take turns. Each point is from the step with the fewest samples of its kind, and then with the fewest samples.
    """
    remaining, chosen = generator.sample(points, len(points)), []
    for kind in itertools.islice(itertools.cycle(KINDS), min(count, len(points))):
        of_kind = Counter(point.step for point in chosen if point.kind == kind)
        of_any_kind = Counter(point.step for point in chosen)
        candidates = [point for point in remaining if point.kind == kind] or remaining
        chosen.append(min(candidates, key=lambda point: (of_kind[point.step], of_any_kind[point.step])))
        remaining.remove(chosen[-1])
    return sorted(chosen, key=points.index)


def chains(points: Sequence[Point], length: int) -> Iterator[list[Point]]:
    """Distribute the points over trials of at most `length` points each."""
    trials = math.ceil(len(points) / length)
    yield from (list(points[first::trials]) for first in range(trials))


@dataclass
class Tally:
    """Kills by step and kind, and the trials with other results."""

    kills: Counter = field(default_factory=Counter)
    trials: int = 0
    differing: list[str] = field(default_factory=list)

    def compare(self, trial: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
        """Count a trial, and record the names of its digests that differ from the expected ones."""
        self.trials += 1
        names = found.keys() | expected.keys()
        differing = sorted(name for name in names if found.get(name) != expected.get(name))
        if differing:
            self.differing.append(f"{trial.name}: {', '.join(differing)}")

    def lines(self) -> list[str]:
        """Return the lines of the final report."""
        steps = [f"{step}: {count} {kind}" for (step, kind), count in self.kills.items()]
        identical = self.trials - len({line.split(":")[0] for line in self.differing})
        total = f"{self.kills.total()} kills in {self.trials} trials, {identical} of them with identical results."
        return [*steps, total, *(f"differs: {line}" for line in self.differing)]


def kill_and_resume(launcher: Launcher, *, count: int, length: int, seed: int) -> Tally:
    """Kill `count` processes at sampled points, at most `length` in each trial, and compare the results."""
    tally, shared = Tally(), launcher.folder / "shared-cache"
    expected = launcher.end(launcher.folder / "uninterrupted", launcher.folder / "cache")
    points = sample_points(points_of(launcher.folder / "uninterrupted"), count, random.Random(seed))
    pending = [(chain, shared if i % 2 else None) for i, chain in enumerate(chains(points, length))]
    while pending:
        trial = launcher.folder / f"trial-{tally.trials}"
        chain, cache = pending.pop(0)
        for i, target in enumerate(chain):
            if not launcher.start(trial, cache or trial / "cache", target):
                # An earlier process finished this work, or the shared cache has it: test the point in another trial.
                assert i or cache, f"{target} was not reached"
                pending.append((chain[i:], None))
                break
            tally.kills[target.step, target.kind] += 1
        found = launcher.end(trial, cache or trial / "cache")
        computed_again = found[TOKENS]["forward_tokens"] - expected[TOKENS]["forward_tokens"]
        if cache:  # other trials filled it, and counted the tokens
            found[TOKENS] = expected[TOKENS]
        elif 0 <= computed_again <= len(chain) * TAUGHT_TOKENS:
            found[TOKENS]["forward_tokens"] -= computed_again
        tally.compare(trial, found, expected)
        tally.differing += [f"{trial.name}: left {path.relative_to(trial)}" for path in leftover_files(trial)]
        shutil.rmtree(trial)
    return tally


def tiny_run_flags(folder: Path) -> list[str]:
    """Return the flags of a run that takes seconds."""
    from tests import tiny_run

    world = tiny_run.make_world(folder)
    more = [
        "--recovery=[least_squares,distill]", f"--distill.tokens={TAUGHT_TOKENS}", "--trainer.val_check_interval=0.5",
        "--sparsity.epochs=2", "--run.checkpoint_minutes=0",
    ]  # fmt: skip
    set_by_launcher = ("--run.dir", "--run.name")
    return [flag for flag in world.args(folder, *more) if not flag.startswith(set_by_launcher)]


def main() -> int:
    parser = argparse.ArgumentParser("kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills at chosen points")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gprune-kills-") as folder:
        launcher = Launcher(Path(folder), tiny_run_flags(Path(folder)))
        tally = kill_and_resume(launcher, count=options.count, length=6, seed=options.seed)
    print("\n".join(tally.lines()))
    return bool(tally.differing)


if __name__ == "__main__":
    raise SystemExit(main())
