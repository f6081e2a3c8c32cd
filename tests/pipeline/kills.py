"""Killed anywhere (SIGKILL) and started again, does a run end with the same bits? Prints how often it was tried where.

python -m tests.pipeline.kills --count 50     # kills on a tiny model: minutes

A process takes seconds to import what a run needs, so this one imports it once and forks; the child runs `train.py`.
An undisturbed run notes every point it passes: steps entered, batches, and each write when its file is half written,
when it is whole but has not got its name, and when it has just got it. Points are then drawn evenly from each kind. A
life of a run folder, with a cache of its own, is a chain of kills at later and later points, each followed by a start
that must take up what is there, and a last start that must end. Every other
life shares one cache with those before it. Results are compared byte by byte: masks, thresholds, modules, statistics,
model, records; and the count of tokens, save where others have filled the cache.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
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

from gprune.pipeline import evaluate as outcome
from gprune.pipeline import prune as pipeline
from gprune.pipeline import run as opening
from gprune.stages.calibration import CalibrationStage
from gprune.stages.distillation import DistillationStage
from gprune.stages.refinement import AssignmentRefinement
from gprune.stages.threshold_learning import ThresholdLearning
from gprune.storage import files as artifacts

ROOT = Path(__file__).parents[2]
IN_THE_BOX = (
    *("open_run", "calibrate", "score", "base_masks", "measure_drift", "partition", "assess", "learn_sparsity"),
    *("with_learning_budget", "with_quality_budget", "meet_budget", "shrink", "save", "evaluate", "summarise"),
)
STEPS = {"load_dense": opening, "prepare_text": opening} | dict.fromkeys(IN_THE_BOX, pipeline)  # step -> caller
BATCHES = (
    (CalibrationStage, "test_step"),
    (AssignmentRefinement, "training_step"),
    (ThresholdLearning, "training_step"),
    (DistillationStage, "training_step"),
    (outcome, "perplexity"),
)
KINDS = ("step entered", "batch", "half written", "not renamed", "renamed")
TOKENS = "metrics.json: tokens"
RESULTS = ("masks/*", "statistics/*", "recovery/*", "*.safetensors", "model/*.safetensors", "model/config.json")


@dataclass(frozen=True)
class Point:
    """A moment in a run that comes again in every run that gets there."""

    step: str
    kind: str
    what: str  # the file, or the batch's method
    count: int  # among those alike, in this process

    def line(self) -> str:
        return json.dumps([self.step, self.kind, self.what, self.count])


@dataclass
class Watch:
    """Notes each point in a file and kills the process at `target`. Lives in the child only."""

    notes: int  # file descriptor
    target: Point | None
    step: str = "start"
    counts: Counter = field(default_factory=Counter)

    def __call__(self, kind: str, what: str) -> None:
        alike = (self.step, kind, what)
        self.counts[alike] += 1
        point = Point(*alike, self.counts[alike])
        os.write(self.notes, (point.line() + "\n").encode())
        if point == self.target:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Wrap the steps, the batches and the writes of this process."""
        for name, owner in STEPS.items():
            setattr(owner, name, self.entering(name, getattr(owner, name)))
        for owner, name in BATCHES:
            setattr(owner, name, self.before("batch", name, getattr(owner, name)))
        artifacts.save_file = self.halving(artifacts.save_file, lambda tensors, file, **_: file)
        Path.write_text = self.halving(Path.write_text, lambda file, *_, **__: file)
        LlamaForCausalLM.save_pretrained = self.halving(
            LlamaForCausalLM.save_pretrained, lambda model, folder, **_: folder / "model.safetensors"
        )
        L.Trainer.save_checkpoint = self.halving(L.Trainer.save_checkpoint, lambda _trainer, file, **_: Path(file))
        os.replace = self.renaming(os.replace)

    def entering(self, name: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def inside(*args, **kwargs):
            self.step = name
            self("step entered", "")
            return call(*args, **kwargs)

        return inside

    def before(self, kind: str, what: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def inside(*args, **kwargs):
            self(kind, what)
            return call(*args, **kwargs)

        return inside

    def halving(self, call: Callable, file_of: Callable[..., Path]) -> Callable:
        """After the file is written it is cut in half for as long as the point lasts."""

        @functools.wraps(call)
        def inside(*args, **kwargs):
            result = call(*args, **kwargs)
            path = file_of(*args, **kwargs)
            whole = path.read_bytes()
            os.truncate(path, len(whole) // 2)
            self("half written", path.name)
            path.write_bytes(whole)
            return result

        return inside

    def renaming(self, call: Callable) -> Callable:
        @functools.wraps(call)
        def inside(source, target, **kwargs):
            self("not renamed", Path(target).name)
            call(source, target, **kwargs)
            self("renamed", Path(target).name)

        return inside


@dataclass
class Bench:
    """Starts runs in forked processes: where they work, and what their flags are."""

    folder: Path
    flags: Sequence[str]
    prepare: Callable[[], None] = lambda: None  # called in the child

    def start(self, life: Path, cache: Path, target: Point | None = None) -> bool:
        """One sitting at the run in `life`; whether it was killed at its target. SystemExit if it fails otherwise."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os._exit(self.sit(life, cache, target))
            finally:  # whatever goes wrong, a child must not go on as this process
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, -signal.SIGKILL):
            tail = (life / "output.txt").read_text()[-2000:]
            raise SystemExit(f"{life}: a sitting ended with status {code}:\n{tail}")
        return code != 0

    def sit(self, life: Path, cache: Path, target: Point | None) -> int:
        life.mkdir(parents=True, exist_ok=True)
        out = os.open(life / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["GPRUNE_CACHE"] = str(cache)
        sys.argv = ["train.py", *self.flags, f"--run.dir={life}", "--run.name=run"]
        self.prepare()
        Watch(os.open(life / "points.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target).install()
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            sys.stdout.flush()
        return 1

    def end(self, life: Path, cache: Path) -> dict[str, Any]:
        """Start without a kill; the digests of what it leaves."""
        assert not self.start(life, cache)
        return digests(life / "run", tokens=True)


def points_of(life: Path) -> list[Point]:
    """The points that the last sitting passed."""
    notes = life / "points.txt"
    return [Point(*json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []


def digests(run: Path, *, tokens: bool = False) -> dict[str, Any]:
    """File (or part of metrics.json) -> SHA-256 of everything in a run folder that is a result; and its tokens."""
    found = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in RESULTS
        for file in run.glob(pattern)
        if file.is_file()
    }
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    summary = metrics["summary"]
    paid = {name: summary.pop(name) for name in list(summary) if name.endswith("_tokens")}
    for name, part in {"records": metrics["records"], "summary": summary}.items():
        found[f"metrics.json: {name}"] = hashlib.sha256(json.dumps(part).encode()).hexdigest()
    return found | ({TOKENS: paid} if tokens else {})


def left_behind(folder: Path) -> list[Path]:
    """Scratch files and folders of writes that did not end."""
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".new", ".old"))]


def drawn(points: Sequence[Point], count: int, generator: random.Random) -> list[Point]:
    """`count` of the points, in the order of the run: kinds in turn, each time in the step that had fewest of them."""
    left, chosen = generator.sample(points, len(points)), []
    for kind in itertools.islice(itertools.cycle(KINDS), min(count, len(points))):
        alike, steps = (Counter(p.step for p in chosen if p.kind in kinds) for kinds in ([kind], KINDS))
        candidates = [point for point in left if point.kind == kind] or left
        chosen.append(min(candidates, key=lambda point: (alike[point.step], steps[point.step])))
        left.remove(chosen[-1])
    return sorted(chosen, key=points.index)


def chains(points: Sequence[Point], length: int) -> Iterator[list[Point]]:
    """The points dealt out to as many lives as it takes for no life to have more than `length`."""
    lives = -(-len(points) // length)
    yield from (list(points[first::lives]) for first in range(lives))


@dataclass
class Tally:
    """Kills by step and kind, and what became of the lives."""

    kills: Counter = field(default_factory=Counter)
    lives: int = 0
    differing: list[str] = field(default_factory=list)

    def compare(self, life: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
        self.lives += 1
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if wrong:
            self.differing.append(f"{life.name}: {', '.join(wrong)}")

    def lines(self) -> list[str]:
        """Kills by step, and the lives that ended otherwise."""
        steps = [f"{step}: {count} {kind}" for (step, kind), count in self.kills.items()]
        same = self.lives - len({line.split(":")[0] for line in self.differing})
        total = f"{self.kills.total()} kills in {self.lives} lives, of which {same} ended bit for bit alike."
        return [*steps, total, *(f"differs: {line}" for line in self.differing)]


def torture(bench: Bench, *, count: int, length: int, seed: int) -> Tally:
    """Kill `count` sittings at drawn points, at most `length` in a life; compare the results of every life."""
    tally, shared = Tally(), bench.folder / "shared-cache"
    expected = bench.end(bench.folder / "undisturbed", bench.folder / "cache")
    points = drawn(points_of(bench.folder / "undisturbed"), count, random.Random(seed))
    todo = [(chain, shared if place % 2 else None) for place, chain in enumerate(chains(points, length))]
    while todo:
        life = bench.folder / f"life-{tally.lives}"
        chain, cache = todo.pop(0)
        for place, target in enumerate(chain):
            if not bench.start(life, cache or life / "cache", target):
                # Finished by an earlier sitting, or in the shared cache: such a point takes a life of its own.
                assert place or cache, f"{target} was not reached"
                todo.append((chain[place:], None))
                break
            tally.kills[target.step, target.kind] += 1
        found = bench.end(life, cache or life / "cache")
        if cache:  # filled by others, for whom it counts
            found[TOKENS] = expected[TOKENS]
        tally.compare(life, found, expected)
        tally.differing += [f"{life.name}: left {path.relative_to(life)}" for path in left_behind(life)]
        shutil.rmtree(life)
    return tally


def tiny(folder: Path) -> list[str]:
    """Flags of a run of seconds."""
    from tests import tiny_run

    world = tiny_run.make_world(folder)
    own = ("--run.dir", "--run.name")
    learns = ["--recovery=[least_squares,distill]", "--distill.tokens=960", "--trainer.val_check_interval=0.5"]
    more = [*learns, "--sparsity.epochs=2", "--run.checkpoint_minutes=0"]
    return [flag for flag in world.args(folder, *more) if not flag.startswith(own)]


def main() -> int:
    parser = argparse.ArgumentParser("kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills at chosen points")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gprune-kills-") as folder:
        bench = Bench(Path(folder), tiny(Path(folder)))
        tally = torture(bench, count=options.count, length=6, seed=options.seed)
    print("\n".join(tally.lines()))
    return bool(tally.differing)


if __name__ == "__main__":
    raise SystemExit(main())
