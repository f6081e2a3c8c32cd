"""Killed anywhere (SIGKILL) and started again, does a run end with the same bits? Prints how often it was tried where.

python -m tests.pipeline.kills                # 50 kills and 8 at random times on a tiny model: minutes
python -m tests.pipeline.kills --count 5 --random 0
python -m tests.pipeline.kills --real 3       # as many on the embedded model with small settings

A process takes seconds to import what a run needs, so this one imports it once and forks; the child runs `train.py`.
An undisturbed run notes every point it passes: steps entered, batches, and each write when its file is half written,
when it is whole but has not got its name, and when it has just got it. Points are then drawn evenly from each kind. A
life of a run folder, with a cache of its own, is a chain of kills at later and later points, each followed by a start
that must take up what is there, and a last start that must end. Every other
life shares one cache with those before it. Results are compared byte by byte: masks, thresholds, modules, statistics,
model, records.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
from transformers import LlamaForCausalLM

from gprune.models.embedded import embedded_model_dir
from gprune.pipeline import evaluate as outcome
from gprune.pipeline import prune as pipeline
from gprune.pipeline import run as opening
from gprune.report.table import markdown
from gprune.stages.calibration import CalibrationStage
from gprune.stages.distillation import DistillationStage
from gprune.stages.refinement import AssignmentRefinement
from gprune.stages.threshold_learning import ThresholdLearning
from gprune.storage import files as artifacts
from gprune.storage.cache import cache_dir

ROOT = Path(__file__).parents[2]
IN_THE_BOX = (
    *("opened", "calibrate", "score", "base_masks", "measure_drift", "partition", "assess", "learn_sparsity"),
    *("shrink", "save", "evaluate", "summarise"),
)
STEPS = {"load": opening, "prepare_text": opening} | dict.fromkeys(IN_THE_BOX, pipeline)  # where each is looked up
BATCHES = (
    (CalibrationStage, "test_step"),
    (AssignmentRefinement, "training_step"),
    (ThresholdLearning, "training_step"),
    (DistillationStage, "training_step"),
    (outcome, "perplexity"),
)
KINDS = ("step entered", "batch", "half written", "not renamed", "renamed")
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
    downloads: Path | None = None  # a cache whose models and wheels every life may have

    def start(self, life: Path, cache: Path, target: Point | None = None, after: float | None = None) -> int:
        """One sitting at the run in `life`; returns the wait status. `after`: seconds until it is killed anyway."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os._exit(self.sit(life, cache, target))
            finally:  # whatever goes wrong, a child must not go on as this process
                traceback.print_exc()
                os._exit(1)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)  # of a child that has ended nothing is left but its status
        return os.waitpid(child, 0)[1]

    def sit(self, life: Path, cache: Path, target: Point | None) -> int:
        life.mkdir(parents=True, exist_ok=True)
        out = os.open(life / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115
        cache.mkdir(parents=True, exist_ok=True)
        for name in ("models", "wheels") if self.downloads else ():
            with suppress(FileExistsError):
                (cache / name).symlink_to(self.downloads / name)
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

    def end(self, life: Path, cache: Path) -> dict[str, str]:
        """Start without a kill; the digests of what it leaves."""
        if (status := self.start(life, cache)) != 0:
            tail = (life / "output.txt").read_text()[-2000:]
            raise SystemExit(f"{life}: a start after a kill ended with status {status}:\n{tail}")
        return digests(life / "run")


def points_of(life: Path) -> list[Point]:
    """The points that the last sitting passed."""
    notes = life / "points.txt"
    return [Point(*json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []


def digests(run: Path) -> dict[str, str]:
    """File (or part of metrics.json) -> SHA-256 of everything in a run folder that is a result."""
    found = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in RESULTS
        for file in run.glob(pattern)
        if file.is_file()
    }
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    # What was paid is more after a kill.
    summary = {name: value for name, value in metrics["summary"].items() if not name.endswith("_tokens")}
    for name, part in (("records", metrics["records"]), ("summary", summary)):
        found[f"metrics.json: {name}"] = hashlib.sha256(json.dumps(part).encode()).hexdigest()
    return found


def left_behind(folder: Path) -> list[Path]:
    """Scratch files and folders of writes that did not end."""
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".new", ".old"))]


def drawn(points: Sequence[Point], count: int, generator: random.Random) -> list[Point]:
    """`count` of the points, in the order of the run: kinds in turn, each time in the step that had fewest of them."""
    piles: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        piles.setdefault((point.kind, point.step), []).append(point)
    for pile in piles.values():
        generator.shuffle(pile)
    chosen: list[Point] = []
    while len(chosen) < min(count, len(points)):
        for kind in KINDS:
            ours = [pile for (k, _), pile in piles.items() if k == kind and pile]
            if ours and len(chosen) < count:
                alike, any_kind = (Counter(p.step for p in chosen if p.kind in kinds) for kinds in ([kind], KINDS))
                generator.shuffle(ours)
                chosen.append(min(ours, key=lambda pile: (alike[pile[0].step], any_kind[pile[0].step])).pop())
    order = {point: i for i, point in enumerate(points)}
    return sorted(chosen, key=order.__getitem__)


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

    def compare(self, life: Path, found: dict[str, str], expected: dict[str, str]) -> None:
        self.lives += 1
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        self.differing += [f"{life.name}: {', '.join(wrong)}"] * bool(wrong)

    def table(self) -> str:
        kinds = [*KINDS, "random time"]
        rows = [
            [step, *(self.kills[step, kind] or "" for kind in kinds), sum(self.kills[step, kind] for kind in kinds)]
            for step in ("start", *STEPS)
            if any(self.kills[step, kind] for kind in kinds)
        ]
        rows.append(["all", *(sum(n for (_, k), n in self.kills.items() if k == kind) for kind in kinds)])
        rows[-1].append(sum(self.kills.values()))
        return markdown([["killed in", *kinds, "all"], *[[str(cell) for cell in row] for row in rows]])


def torture(bench: Bench, *, count: int, at_random: int, length: int, seed: int, say: Callable = print) -> Tally:
    """Kill `count` sittings at drawn points and `at_random` at random times; compare the results of every life."""
    generator, tally = random.Random(seed), Tally()
    shared = bench.folder / "shared-cache"
    started = time.monotonic()
    expected = bench.end(bench.folder / "undisturbed", bench.folder / "cache")
    seconds = time.monotonic() - started
    passed = points_of(bench.folder / "undisturbed")
    points = drawn(passed, count, generator)
    say(f"undisturbed: {seconds:.1f} s, {len(passed)} points, {len(expected)} results to compare")

    def kill(life: Path, cache: Path, **how) -> bool:
        status = bench.start(life, cache, **how)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if killed:
            last = (points_of(life) or [Point("start", "", "", 1)])[-1]
            tally.kills[last.step, how["target"].kind if "target" in how else "random time"] += 1
        elif status != 0:
            tail = (life / "output.txt").read_text()[-2000:]
            raise SystemExit(f"{life}: a start after a kill ended with status {status}:\n{tail}")
        return killed

    todo = [(chain, shared if place % 2 else None) for place, chain in enumerate(chains(points, length))]
    while todo:
        life = bench.folder / f"life-{tally.lives}"
        chain, cache = todo.pop(0)
        for place, target in enumerate(chain):
            if not kill(life, cache or life / "cache", target=target):
                # Finished by an earlier sitting, or in the shared cache: such a point takes a life of its own.
                assert place or cache, f"{target} was not reached"
                todo.append((chain[place:], None))
                break
        finish(bench, life, cache or life / "cache", tally, expected)
    for _ in range(at_random):
        life, longest = bench.folder / f"life-{tally.lives}", seconds
        while not kill(life, life / "cache", after=generator.uniform(0, longest)):
            longest /= 2  # it had ended; to take up a finished run takes less
        finish(bench, life, life / "cache", tally, expected)
    return tally


def finish(bench: Bench, life: Path, cache: Path, tally: Tally, expected: dict[str, str]) -> None:
    """The last sitting of a life, its comparison, and no trace of the kills in the run folder."""
    tally.compare(life, bench.end(life, cache), expected)
    tally.differing += [f"{life.name}: left {path.relative_to(life)}" for path in left_behind(life)]
    shutil.rmtree(life)


def tiny(folder: Path) -> list[str]:
    """Flags of a run of seconds."""
    from tests import tiny_run

    world = tiny_run.make_world(folder)
    own = ("--run.dir", "--run.name")
    learns = ["--recovery=[least_squares,distill]", "--distill.tokens=960", "--distill.points=2"]
    more = [*learns, "--sparsity.epochs=2", "--run.checkpoint_minutes=0"]
    return [flag for flag in world.args(folder, *more) if not flag.startswith(own)]


def small() -> list[str]:
    """Flags of a short run of the embedded model: no download but its own, text of the standard library."""
    two = "[python_docs,python_code]"
    roles = [f"--corpora.{role}={two}" for role in ("drift", "learn", "recover", "evaluate")]
    sizes = ["--corpora.num_samples=4", "--corpora.seq_len=64", "--evaluation.num_samples=2", "--evaluation.seq_len=64"]
    fewer = ["--sparsity.epochs=1", "--evaluation.development_samples=1", "--evaluation.curve=[0.25]"]
    return ["--corpora.score=python_docs", *roles, *sizes, *fewer, "--trainer.accelerator=cpu"]


def main() -> int:
    parser = argparse.ArgumentParser("kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills at chosen points")
    parser.add_argument("--random", type=int, default=8, help="kills at random times on top")
    parser.add_argument("--real", type=int, default=0, metavar="N", help="N kills of the embedded model instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gprune-kills-") as place:
        folder = Path(place)
        if options.real:
            embedded_model_dir("smollm2-135m")
            bench = Bench(folder, small(), downloads=cache_dir())
            tally = torture(bench, count=options.real, at_random=0, length=options.real, seed=options.seed)
        else:
            bench = Bench(folder, tiny(folder))
            tally = torture(bench, count=options.count, at_random=options.random, length=6, seed=options.seed)
    same = tally.lives - len({line.split(":")[0] for line in tally.differing})
    print(f"\n{tally.table()}\n")
    print(f"{sum(tally.kills.values())} kills in {tally.lives} lives, of which {same} ended bit for bit alike.")
    for line in tally.differing:
        print(f"differs: {line}")
    return bool(tally.differing)


if __name__ == "__main__":
    raise SystemExit(main())
