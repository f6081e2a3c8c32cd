"""Two processes on CPU (ddp, gloo) agree with one: statistics, thresholds, masks; the last batch is uneven."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

from gprune.calibration.statistics import kind_of
from gprune.runs.results import load_run
from gprune.storage.files import read_json, read_tensors
from tests import tiny_run
from tests.pipeline.test_bad_input import poison

pytestmark = pytest.mark.slow
UNEVEN = [
    "--corpora.num_samples=5",  # batches of 4 and 1: in the second one a process has nothing to do, nor in learning
    "--sparsity.epochs=2",
    "--sparsity.scope=attention+ffn+blocks",
    "--sparsity.block_share=0.8",  # one block goes as a whole
    "--recovery=least_squares",
    "--logging.mode=offline",
]


def uneven(world):
    return [*UNEVEN, f"--corpora.learn={world.names('alpha')}"]


TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def launched(world, folder, *flags):
    """A fork of this process, which starts the second process itself, as `train.py` does: that one imports anew."""
    (done,) = tiny_run.train(world.args(folder, *flags, *TWO), folder)
    return done


def train(world, folder, *flags, processes=2, **how):
    """As many forks of this process, of which the first may speak; what the first one says."""
    two = TWO if processes > 1 else []
    first, *others = tiny_run.train(world.args(folder, *flags, *two), folder, processes=processes, **how)
    assert all((other.stdout, other.stderr) == ("", "") for other in others)
    assert all(other.returncode == first.returncode for other in others)
    return first


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        yield


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The same run by one process and by two, each with its own cache."""
    folders = {}
    for name, start in (("one", functools.partial(train, processes=1)), ("two", launched)):
        folder = tmp_path_factory.mktemp(name)
        done = start(world, folder, *uneven(world))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout.count("Removed ") == 1  # only the first process speaks
        assert ("Tokens of rank 0" in done.stdout) == (name == "two")
        folders[name] = folder / "run"
    return folders


def test_the_work_was_shared(runs):
    """Of windows 0 to 3 and 4 the first process has two and one, in each of two epochs of learning."""
    one, two = (read_json(runs[n] / "manifest.json")["steps"] for n in ("one", "two"))
    assert one["thresholds"]["forward_backward_tokens"] == 2 * 5 * 32
    assert two["thresholds"]["forward_backward_tokens"] == 2 * 3 * 32
    assert two["calibrate"]["forward_tokens"] == one["calibrate"]["forward_tokens"] * 3 // 5


def test_the_numbers_agree_and_where_nothing_was_learned_they_are_the_same_bits(runs):
    """Two windows of each corpus are one batch here: the second process has none of its own."""
    one, two = (read_json(runs[n] / "metrics.json")["records"] for n in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        same = [[r[name] for name in ("stage", "recovery", "corpus", "content_hash")] for r in (mine, theirs)]
        assert same[0] == same[1]
        assert mine["nll"] == pytest.approx(theirs["nll"], rel=1e-4)
        if mine["stage"] in ("dense", "base") and mine["recovery"] == "none":
            for name in ("nll", "window_nll", "kl", "window_kl", "agreement", "window_agreement"):
                assert mine.get(name) == theirs.get(name), name
            assert ("kl" in mine) == (mine["stage"] == "base")


def test_development_perplexity_agrees_to_the_digits_that_are_printed(runs):
    """The validation loop, with a window of each corpus; the same bits where nothing was learned."""
    one, two = (read_json(runs[n] / "manifest.json")["learning"] for n in ("one", "two"))
    dense, *others = (f"development_perplexity_by_{axis}" for axis in ("sparsity", "epoch"))
    assert one[dense]["0"] == two[dense]["0"]
    assert one[others[0]][0] == two[others[0]][0]  # the masks at the start
    for mine, theirs in zip(one[others[0]], two[others[0]], strict=True):
        assert {c: f"{v:.2f}" for c, v in mine.items()} == {c: f"{v:.2f}" for c, v in theirs.items()}


def test_statistics_agree(runs):
    worst = 0.0
    for file in sorted((runs["one"] / "statistics").iterdir()):
        one, two = read_tensors(file), read_tensors(runs["two"] / "statistics" / file.name)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name].dtype == value.dtype
            if name.endswith("count"):
                assert torch.equal(two[name], value), name  # every window counted once
            scale = value.abs().max()  # a sum of both signs may nearly vanish
            worst = max(worst, float((two[name] - value).abs().max() / scale))
    assert worst <= 1e-6


def test_modules_and_thresholds_agree(runs):
    one, two = (read_tensors(runs[n] / "assignment.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (read_tensors(runs[n] / "thresholds.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-3
    start = {float(t) for value in one.values() for t in value}
    assert len(start) > 6  # they were learned, not left where they began


def changed(one, two):
    """Units of which two masks decide otherwise."""
    kinds = ((one.ffn, two.ffn), (one.attention, two.attention))
    return sum(int((a != b).sum()) for mine, theirs in kinds for a, b in zip(mine, theirs, strict=True))


def test_masks_agree_but_for_units_inside_the_noise(runs):
    one, two = (load_run(runs[n]) for n in ("one", "two"))
    assert one.masks.blocks == two.masks.blocks
    assert one.masks.blocks.count(False) == 1
    assert changed(one.masks, two.masks) <= 2  # one goes in the place of another


@pytest.fixture(scope="module")
def taylor(world, tmp_path_factory):
    """A run from gradients by one process and by two, nothing learned."""
    flags = ["--importance=taylor", "--gprune=false", "--export=none", "--sparsity.scope=attention+ffn"]
    folders = {}
    for processes, name in enumerate(("one", "two"), start=1):
        folder = tmp_path_factory.mktemp(f"taylor-{name}")
        done = train(world, folder, "--corpora.num_samples=5", *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        folders[name] = folder / "run"
    return folders


def test_saliency_and_masks_agree(taylor):
    one, two = (load_run(taylor[n]) for n in ("one", "two"))
    steps = [read_json(taylor[n] / "manifest.json")["steps"]["calibrate"] for n in ("one", "two")]
    assert [step["forward_backward_tokens"] for step in steps] == [5 * 32, 3 * 32]  # the work was shared
    mine, theirs = (r.statistics[r.config.corpora.score].tensors() for r in (one, two))
    assert mine.keys() == theirs.keys()
    assert sum(kind_of(name) == "saliency" for name in mine) == 3 * 2 * 3
    for name, value in mine.items():  # an absolute value of a signed sum may nearly vanish
        assert (theirs[name] - value).abs().max() <= 1e-6 * value.abs().max(), name
    assert changed(one.masks, two.masks) <= 2


def test_only_the_first_process_wrote(runs):
    one, two = (
        {str(f.relative_to(runs[n])) for f in runs[n].rglob("*") if f.is_file() and "wandb" not in f.parts}
        for n in ("one", "two")
    )
    assert one == two
    assert len(list((runs["two"] / "wandb").glob("offline-run-*"))) == 1


def test_started_again_after_a_part_is_lost_two_processes_end_with_the_same_bits(world, runs):
    before = {file: file.read_bytes() for file in runs["two"].rglob("*.safetensors")}
    for file in [*(runs["two"] / "masks").iterdir(), runs["two"] / "thresholds.safetensors"]:
        file.unlink()
    done = train(world, runs["two"].parent, *uneven(world))
    assert done.returncode == 0, done.stderr
    assert {file: file.read_bytes() for file in before} == before


def test_statistics_that_one_process_alone_finds_are_collected_by_all(world, tmp_path):
    """As when another run fills the cache between the first process's look and the second's."""
    caches = [tmp_path / "first", tmp_path / "second"]
    base = ["--gprune=false", "--export=none"]
    assert train(world, tmp_path, *base, "--run.name=before", caches=[caches[0]] * 2).returncode == 0
    done = train(world, tmp_path, *base, "--run.name=after", caches=caches)
    assert done.returncode == 0, done.stderr
    before, after = (read_json(tmp_path / n / "metrics.json")["records"] for n in ("before", "after"))
    assert [r["window_nll"] for r in before] == [r["window_nll"] for r in after]
    assert read_json(tmp_path / "after/manifest.json")["steps"]["calibrate"]["forward_tokens"] > 0


# A run in which the processes measure other errors of blocks, as rounding may do it; each notes its masks.
APART = """
import sys
from pathlib import Path
import torch
from gprune.cli import main
from gprune.pipeline import sparsity
from gprune.pipeline import prune as pipeline

def apart(*args, measure=sparsity.block_errors, **how):
    errors = measure(*args, **how)
    return errors.flip(0) if torch.distributed.get_rank() else errors

def noted(run, masks_of, meet=pipeline.meet_budget):
    thresholds, masks = meet(run, masks_of)
    widths = [int(keep.sum()) for keep in masks["base"].ffn]
    Path(sys.argv[1], f"widths.{torch.distributed.get_rank()}").write_text(str(widths))
    return thresholds, masks

sparsity.block_errors, pipeline.meet_budget = apart, noted
if __name__ == "__main__":
    raise SystemExit(main(sys.argv[2:]))
"""


def test_processes_that_measure_other_errors_of_blocks_have_the_masks_of_the_first(world, tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    flags = ["--gprune=false", "--export=none", "--sparsity.allocation=reconstruction", "--recovery=least_squares"]
    args = [str(tmp_path), *world.args(tmp_path, *flags, *TWO)]
    done, _ = tiny_run.train(args, tmp_path, processes=2, script=tmp_path / "apart.py")
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"widths.{rank}").read_text() for rank in (0, 1))
    assert first == second
    errors = read_tensors(tmp_path / "run/errors_base.safetensors")["errors"]
    assert not torch.equal(errors, errors.flip(0))  # each on its own, the two would have cut other widths


def test_an_error_in_two_processes_is_still_one_line(world, tmp_path):
    broken = shutil.copytree(world.model, tmp_path / "model")
    poison(broken)
    done = train(world, tmp_path, f"--model.name={broken}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "non-finite activation" in done.stderr


def test_both_processes_refuse_a_run_with_other_settings(world, runs):
    """Or the second would wait for a first one that has left."""
    done = train(world, runs["two"].parent, *uneven(world), "--ridge=0.5")
    assert done.returncode == 2
    assert "it has a run with other settings: ridge" in done.stderr


def test_when_the_first_process_alone_fails_the_second_leaves_quietly(world, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/statistics").write_text("in the way")
    done = train(world, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Cannot write" in done.stderr
