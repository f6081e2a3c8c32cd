"""Runs that are killed and resumed, and runs with another order of directory listings, have the same bits.

A run in a forked process reports every point that it passes: the start of each step, each batch, and for each file
three moments: its temporary file is half written, it is complete but not yet renamed, and it has just been renamed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import runpy
import shlex
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path

import lightning as L
import pytest
from transformers import LlamaForCausalLM

from gprune.method import evaluate as evaluate_module
from gprune.method import prune as pipeline
from gprune.method import run as run_module
from gprune.stages.calibration import CalibrationStage
from gprune.stages.distillation import DistillationStage
from gprune.stages.refinement import AssignmentRefinement
from gprune.stages.threshold_learning import ThresholdLearning
from gprune.storage import files as artifacts
from tests import tiny_run
from tests.world import make_tiny_llama

TAUGHT_TOKENS = 576
EARLY = "{class_path: EarlyStopping, init_args: {monitor: development/perplexity, patience: 2, min_delta: 1e9}}"
BEST = "{class_path: ModelCheckpoint, init_args: {monitor: development/perplexity}}"
CONFIGURATIONS = {
    "distilled": "--recovery=[least_squares,distill] --trainer.val_check_interval=0.5 --sparsity.epochs=2",
    "stopped early": f"'--trainer.callbacks=[{EARLY}, {BEST}]' --sparsity.epochs=6 --trainer.val_check_interval=2 "
    "--recovery=distill",
    "layers and adapters": "--sparsity.scope=attention+ffn+blocks --sparsity.block_share=0.8 --sparsity.learn=both "
    "--sparsity.loss=kl --recovery=distill --distill.targets=lora",
    "reconstruction": "--gprune=false --sparsity.allocation=reconstruction --recovery=least_squares",
    "quality": "--sparsity.target=+5% --evaluation.development_samples=2 --recovery=[least_squares,distill]",
    "accumulated": "--gprune=false --importance=taylor --recovery=distill --distill.accumulate=2 "
    "--model.dtype=bfloat16",
}
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
RESULTS = ("statistics/*", "recovery/*", "*.safetensors", "model/*.safetensors", "model/config.json")
Point = tuple[str, str, str, int]  # step, kind, file or method, and how often these have occurred in the process


class Watch:
    """Write each point to a file, and kill the process at `target`. Used in a child only."""

    def __init__(self, points_file: int, target: Point | None):
        self.points_file, self.target, self.step, self.counts = points_file, target, "start", Counter()

    def __call__(self, kind: str, what: str) -> None:
        moment = (self.step, kind, what)
        self.counts[moment] += 1
        point = (*moment, self.counts[moment])
        os.write(self.points_file, (json.dumps(point) + "\n").encode())
        if point == self.target:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Wrap the steps, the batches and the writes of this process."""
        for name, owner in STEPS.items():
            setattr(owner, name, self.before("step entered", name, getattr(owner, name)))
        for owner, name in BATCHES:
            setattr(owner, name, self.before("batch", name, getattr(owner, name)))
        artifacts.save_file = self.truncating(artifacts.save_file, lambda tensors, file, **_: file)
        Path.write_text = self.truncating(Path.write_text, lambda file, *_, **__: file)
        LlamaForCausalLM.save_pretrained = self.truncating(
            LlamaForCausalLM.save_pretrained, lambda model, folder, **_: folder / "model.safetensors"
        )
        L.Trainer.save_checkpoint = self.truncating(L.Trainer.save_checkpoint, lambda _, file, *__, **___: Path(file))
        os.replace = self.renaming(os.replace)

    def before(self, kind: str, what: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            if kind == "step entered":
                self.step = what
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


def ends(flags: Sequence[str], folder: Path, target: Point | None = None) -> bool:
    """Run `train.py` in a forked process with its cache in `folder`. Return whether it was not killed at `target`."""
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(output, number)
            sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
            os.environ["GPRUNE_CACHE"] = str(folder / "cache")
            sys.argv = ["train.py", *flags, f"--run.dir={folder}"]
            Watch(os.open(folder / "points.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target).install()
            runpy.run_path(str(tiny_run.ROOT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(int(stop.code or 0))
        finally:  # the child must never return from here
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), (folder / "output.txt").read_text()[-2000:]
    return code == 0


def digests(run: Path) -> dict[str, str]:
    """Return {file, or part of metrics.json: SHA-256} of the results of a run, without numbers of tokens."""
    files = [file for pattern in RESULTS for file in run.glob(pattern) if file.is_file()]
    hashes = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    summary = {name: value for name, value in metrics["summary"].items() if not name.endswith("_tokens")}
    for name, part in {"records": metrics["records"], "summary": summary}.items():
        hashes[f"metrics.json: {name}"] = hashlib.sha256(json.dumps(part).encode()).hexdigest()
    return hashes


def tokens_of(run: Path) -> dict[str, int]:
    summary = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["summary"]
    return {name: value for name, value in summary.items() if name.endswith("_tokens")}


def points_of_death(points: Sequence[Point], number: int) -> list[Point]:
    """Return a training batch, a half written file and a point of another kind, in the order of the run."""
    other = ("step entered", "before rename", "after rename")[number % 3]
    generator, chosen = random.Random(number), []
    for kind in ("batch", "half written", other):
        of_kind = [point for point in points if point[1] == kind]
        training = [point for point in of_kind if point[2] == "training_step"]
        chosen.append(generator.choice(training[1:] or of_kind[1:]))
    return sorted(chosen, key=points.index)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_that_is_killed_at_three_points_and_resumed_has_the_same_bits(name, world, tmp_path):
    more = shlex.split(CONFIGURATIONS[name])
    if "distill" in CONFIGURATIONS[name]:
        more += [f"--distill.tokens={TAUGHT_TOKENS}", "--distill.batch_size=2"]
    flags = world.args(tmp_path, *more, "--run.checkpoint_minutes=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ends(flags, whole)
    points = [tuple(json.loads(line)) for line in (whole / "points.txt").read_text().splitlines()]
    for target in points_of_death(points, [*CONFIGURATIONS].index(name)):
        assert not ends(flags, killed, target), f"{target} was not reached"
    assert ends(flags, killed)
    assert digests(killed / "run") == digests(whole / "run")
    assert not [path for path in killed.rglob(".*") if path.name.endswith((".tmp", ".new", ".old"))]
    assert [p.name for p in whole.rglob("*.ckpt")] == [p.name for p in killed.rglob("*.ckpt")]
    expected, found = tokens_of(whole / "run"), tokens_of(killed / "run")
    # Only forward passes of the teacher and of validation may be repeated.
    repeated = found.pop("forward_tokens") - expected.pop("forward_tokens")
    assert 0 <= repeated <= 3 * TAUGHT_TOKENS
    assert found == expected


# --- independence of undefined orders --------------------------------------------------------------------------------


class Listing(contextlib.nullcontext):
    """A replacement for the return value of `os.scandir`, with the order of a given iterator."""

    def __iter__(self):
        return self.enter_result

    def __next__(self):
        return next(self.enter_result)


@pytest.mark.slow
def test_results_do_not_depend_on_the_order_of_directory_listings(tmp_path, monkeypatch):
    """Corpora and model consist of several files. With each order, a second run uses the cache of the first one."""
    world = tiny_run.make_world(tmp_path)
    shards = tmp_path / "shards"
    make_tiny_llama(intermediate_size=tiny_run.NEURONS).save_pretrained(shards, max_shard_size="40KB")
    tiny_run.tiny_tokenizer().save_pretrained(shards)
    assert len(list(shards.glob("*.safetensors"))) > 2
    for name, path in world.corpora.items():
        folder = tmp_path / name
        folder.mkdir()
        for part, text in enumerate(path.read_text().split("\n\n")):
            (folder / f"part-{part:02}.txt").write_text(text)
        world.corpora[name] = folder
    listdir, scandir = os.listdir, os.scandir
    results, orders = [], []
    for is_reversed in (False, True):
        runs = tmp_path / f"runs-{is_reversed}"

        def sorted_listdir(*args, is_reversed=is_reversed):
            return sorted(listdir(*args), reverse=is_reversed)

        def sorted_scandir(*args, is_reversed=is_reversed):
            return Listing(iter(sorted(scandir(*args), key=attrgetter("name"), reverse=is_reversed)))

        with monkeypatch.context() as patch, tiny_run.isolated(runs / "cache"):
            patch.setattr(os, "listdir", sorted_listdir)
            patch.setattr(os, "scandir", sorted_scandir)
            orders.append([file.name for file in Path(world.corpora["alpha"]).iterdir()])
            for name in ("run", "shares-the-cache"):
                assert tiny_run.main(world.args(runs, f"--model.name={shards}", name=name)) == 0
        results.append(digests(runs / "run"))
        assert digests(runs / "shares-the-cache") == results[-1]
    assert orders[0] == orders[1][::-1] != orders[1]
    assert results[0] == results[1]
