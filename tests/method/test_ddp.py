"""Two processes on the CPU (DDP, gloo) give the results of one process; the last batch is uneven."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from pathlib import Path

import lightning
import pytest
import torch

from gprune.calibration.statistics import kind_of
from gprune.runs.results import load_run
from gprune.storage.files import read_json, read_tensors
from tests import tiny_run
from tests.method.test_bad_input import write_nan_weight

pytestmark = pytest.mark.slow
UNEVEN = [
    "--corpora.num_samples=5",  # batches of 4 and 1: one process has no window in the second batch, also in training
    "--sparsity.epochs=2",
    "--sparsity.scope=attention+ffn+blocks",
    "--sparsity.block_share=0.8",  # one whole block is removed
    "--recovery=least_squares",
    "--evaluation.prompts=[the]",
]


def uneven_flags(world):
    return [*UNEVEN, f"--corpora.learn={world.names('alpha')}"]


TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def launched(world, folder, *flags):
    """Run `train.py` with W&B as a user does: start one process, which starts the second one itself."""
    (done,) = tiny_run.train(world.args(folder, *flags, *TWO, "--logging.mode=offline"), folder)
    return done


def train(world, folder, *flags, processes=2, **how):
    """Fork all ranks. Assert that only rank 0 prints, and return its result."""
    two = TWO if processes > 1 else []
    first, *others = tiny_run.train(world.args(folder, *flags, *two), folder, processes=processes, **how)
    assert all((other.stdout, other.stderr) == ("", "") for other in others)
    assert all(other.returncode == first.returncode for other in others)
    return first


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Return the folders of the same run by one process and by two, each with its own cache."""
    folders = {}
    for name, start in (("one", functools.partial(train, processes=1)), ("two", launched)):
        folder = tmp_path_factory.mktemp(name)
        done = start(world, folder, *uneven_flags(world))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout.count("Removed ") == 1  # only rank 0 prints
        tokens = read_json(folder / "run/metrics.json")["summary"]["forward_tokens"]
        assert f"Tokens: {tokens:,} forward, " in done.stdout
        folders[name] = folder / "run"
    return folders


def test_two_processes_share_the_windows_and_the_tokens_of_both_are_counted(runs):
    """Of five windows in batches of four, both ranks have two of the first batch, and rank 0 the fifth window.

    Rank 1 has a window with weight 0 beside the fifth one. It is computed, so it is counted, but nothing is learned
    from it.
    """
    one, two = (read_json(runs[n] / "manifest.json") for n in ("one", "two"))
    steps_of_one, steps_of_two = one["steps"], two["steps"]
    assert steps_of_one["thresholds"]["forward_backward_tokens"] == 2 * 5 * 32  # epochs, windows, tokens
    assert steps_of_two["thresholds"]["forward_backward_tokens"] == 2 * 6 * 32
    assert steps_of_two["calibrate"]["forward_tokens"] == steps_of_one["calibrate"]["forward_tokens"] * 6 // 5
    assert one["learned_tokens"] == two["learned_tokens"] == {"thresholds": 2 * 5 * 32}
    assert two["says"]["dense"] == one["says"]["dense"]  # by rank 0
    for name in ("shrink", "save_and_check"):  # each process has the whole text, or rank 0 alone
        for kind in ("forward_tokens", "forward_backward_tokens"):
            assert steps_of_one[name][kind] == steps_of_two[name][kind]
    summary = read_json(runs["two"] / "metrics.json")["summary"]
    assert summary["forward_tokens"] == sum(step["forward_tokens"] for step in steps_of_two.values())
    assert summary["forward_tokens"] > read_json(runs["one"] / "metrics.json")["summary"]["forward_tokens"]


def test_losses_of_two_processes_agree_with_one_and_are_identical_without_training(runs):
    """Evaluation gives whole batches to ranks. A corpus has one batch (two windows), so rank 1 gets none."""
    one, two = (read_json(runs[n] / "metrics.json")["records"] for n in ("one", "two"))
    for of_one, of_two in zip(one, two, strict=True):
        for name in ("stage", "recovery", "corpus", "content_hash"):
            assert of_one[name] == of_two[name]
        assert of_one["nll"] == pytest.approx(of_two["nll"], rel=1e-4)
        assert ("kl" in of_one) == ("kl" in of_two) == (of_one["stage"] != "dense")
        if of_one["stage"] == "dense":
            assert (of_one["nll"], of_one["window_nll"]) == (of_two["nll"], of_two["window_nll"])


def test_development_perplexity_agrees_to_two_decimals(runs):
    """The values of the dense model, and of the masks before training, are identical."""
    one, two = (read_json(runs[n] / "manifest.json")["learning"] for n in ("one", "two"))
    by_sparsity, by_epoch = (f"development_perplexity_by_{axis}" for axis in ("sparsity", "epoch"))
    assert one[by_sparsity]["0"] == two[by_sparsity]["0"]
    assert one[by_epoch][0] == two[by_epoch][0]
    for of_one, of_two in zip(one[by_epoch], two[by_epoch], strict=True):
        assert {c: f"{v:.2f}" for c, v in of_one.items()} == {c: f"{v:.2f}" for c, v in of_two.items()}


def test_statistics_of_one_and_two_processes_agree(runs):
    largest_difference = 0.0  # relative to the largest value of a tensor
    for file in sorted((runs["one"] / "statistics").iterdir()):
        one, two = read_tensors(file), read_tensors(runs["two"] / "statistics" / file.name)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name].dtype == value.dtype
            if name.endswith("count"):
                assert torch.equal(two[name], value), name  # every window counted once
            scale = value.abs().max()  # a sum of positive and negative terms may be nearly 0
            largest_difference = max(largest_difference, float((two[name] - value).abs().max() / scale))
    assert largest_difference <= 1e-6


def test_modules_are_equal_and_thresholds_agree(runs):
    one, two = (read_tensors(runs[n] / "assignment.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (read_tensors(runs[n] / "thresholds.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-3
    different_values = {float(t) for value in one.values() for t in value}
    assert len(different_values) > 6  # training has changed the thresholds


def differing_units(one, two):
    """Return the number of units that only one of two masks keeps."""
    pairs = [*zip(one.ffn, two.ffn, strict=True), *zip(one.attention, two.attention, strict=True)]
    return sum(int((a != b).sum()) for a, b in pairs)


def test_masks_differ_in_at_most_two_units(runs):
    one, two = (load_run(runs[n]) for n in ("one", "two"))
    assert one.masks.blocks == two.masks.blocks
    assert one.masks.blocks.count(False) == 1
    assert differing_units(one.masks, two.masks) <= 2  # rounding may exchange one unit for another


@pytest.fixture(scope="module")
def taylor(world, tmp_path_factory):
    """Return the folders of a run with a gradient metric and without training, by one process and by two."""
    flags = ["--importance=taylor", "--gprune=false", "--export=none", "--sparsity.scope=attention+ffn"]
    folders = {}
    for processes, name in enumerate(("one", "two"), start=1):
        folder = tmp_path_factory.mktemp(f"taylor-{name}")
        done = train(world, folder, "--corpora.num_samples=5", *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        folders[name] = folder / "run"
    return folders


def test_saliency_agrees_and_masks_differ_in_at_most_two_units(taylor):
    one, two = (load_run(taylor[n]) for n in ("one", "two"))
    steps = [read_json(taylor[n] / "manifest.json")["steps"]["calibrate"] for n in ("one", "two")]
    assert [step["forward_backward_tokens"] for step in steps] == [5 * 32, 6 * 32]  # shared; one window is padding
    of_one, of_two = (r.statistics[r.config.corpora.scored[0]].tensors() for r in (one, two))
    assert of_one.keys() == of_two.keys()
    # Three blocks, FFN and attention, and a tensor for each half of the corpus and for the whole corpus.
    assert sum(kind_of(name) == "saliency" for name in of_one) == 3 * 2 * 3
    for name, value in of_one.items():  # the absolute value of a signed sum may be nearly 0
        assert (of_two[name] - value).abs().max() <= 1e-6 * value.abs().max(), name
    assert differing_units(one.masks, two.masks) <= 2


def test_two_processes_write_the_same_files_as_one_and_a_single_wandb_run(runs):
    one, two = (
        {str(f.relative_to(runs[n])) for f in runs[n].rglob("*") if f.is_file() and "wandb" not in f.parts}
        for n in ("one", "two")
    )
    assert one == two
    assert len(list((runs["two"] / "wandb").glob("offline-run-*"))) == 1


def test_two_processes_restore_lost_files_with_identical_contents(world, runs):
    before = {file: file.read_bytes() for file in runs["two"].rglob("*.safetensors")}
    for name in ("masks", "thresholds"):
        (runs["two"] / f"{name}.safetensors").unlink()
    done = train(world, runs["two"].parent, *uneven_flags(world))
    assert done.returncode == 0, done.stderr
    assert {file: file.read_bytes() for file in before} == before


def test_statistics_in_the_cache_of_rank_0_only_are_collected_again_by_all_ranks(world, tmp_path):
    """The ranks see different caches if another run writes the statistics between their look-ups."""
    caches = [tmp_path / "first", tmp_path / "second"]
    base = ["--gprune=false", "--export=none"]
    assert train(world, tmp_path, *base, "--run.name=before", caches=[caches[0]] * 2).returncode == 0
    done = train(world, tmp_path, *base, "--run.name=after", caches=caches)
    assert done.returncode == 0, done.stderr
    before, after = (read_json(tmp_path / n / "metrics.json")["records"] for n in ("before", "after"))
    assert [r["window_nll"] for r in before] == [r["window_nll"] for r in after]
    assert read_json(tmp_path / "after/manifest.json")["steps"]["calibrate"]["forward_tokens"] > 0


# A script in which rank 1 measures the errors of blocks in reverse order, as an extreme case of rounding. Each rank
# writes the widths of its masks to a file.
DIFFERENT_ERRORS = """
import sys
from pathlib import Path
import torch
from gprune.cli import main
from gprune.method import prune as steps

def different_errors(*args, measure=steps.block_errors, **options):
    errors = measure(*args, **options)
    return errors.flip(0) if torch.distributed.get_rank() else errors

def meet_and_write_widths(run, masks_at, meet=steps.meet_budget):
    thresholds, masks = meet(run, masks_at)
    widths = [int(keep.sum()) for keep in masks.ffn]
    Path(sys.argv[1], f"widths.{torch.distributed.get_rank()}").write_text(str(widths))
    return thresholds, masks

steps.block_errors = different_errors
steps.meet_budget = meet_and_write_widths
if __name__ == "__main__":
    raise SystemExit(main(sys.argv[2:]))
"""


def test_all_ranks_use_the_block_errors_of_rank_0(world, tmp_path):
    (tmp_path / "different_errors.py").write_text(DIFFERENT_ERRORS)
    flags = ["--gprune=false", "--export=none", "--sparsity.allocation=reconstruction", "--recovery=least_squares"]
    args = [str(tmp_path), *world.args(tmp_path, *flags, *TWO)]
    done, _ = tiny_run.train(args, tmp_path, processes=2, script=tmp_path / "different_errors.py")
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"widths.{rank}").read_text() for rank in (0, 1))
    assert first == second
    errors = read_tensors(tmp_path / "run/errors_base.safetensors")["errors"]
    assert not torch.equal(errors, errors.flip(0))  # each rank's own errors would give other widths


def test_an_error_in_both_processes_is_printed_once(world, tmp_path):
    damaged = shutil.copytree(world.model, tmp_path / "model")
    write_nan_weight(damaged)
    done = train(world, tmp_path, f"--model.name={damaged}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "non-finite activation" in done.stderr


def test_both_ranks_refuse_a_run_with_other_settings(world, runs):
    """Otherwise rank 1 would wait forever for rank 0."""
    done = train(world, runs["two"].parent, *uneven_flags(world), "--ridge=0.5")
    assert done.returncode == 2
    assert "it has a run with other settings: ridge" in done.stderr


def test_if_only_rank_0_fails_the_other_rank_exits_without_output(world, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/statistics").write_text("in the way")
    done = train(world, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Cannot write" in done.stderr


class Begun(lightning.Callback):
    """Write a file after a step of training of a stage."""

    def __init__(self, folder: str, stage: str):
        self.folder, self.stage = Path(folder), stage

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        if type(stage).__name__ == self.stage:
            (self.folder / f"begun.{trainer.global_rank}").touch()


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("AssignmentRefinement", ["--partition.steps=1000000"]),
        ("ThresholdLearning", ["--sparsity.epochs=1000000"]),
        (
            "DistillationStage",
            ["--gprune=false", "--recovery=distill", "--distill.tokens=100000", "--distill.repeat=true"],
        ),
    ],
)
def test_sigterm_ends_both_processes_in_any_stage(stage, flags, world, tmp_path):
    """The signal reaches the ranks at different points of a step, perhaps in different steps."""
    begun = f"class_path: tests.method.test_ddp.Begun, init_args: {{folder: {tmp_path}, stage: {stage}}}"
    flags = [*flags, *TWO, f"--trainer.callbacks=[{{{begun}}}]"]
    children = tiny_run.start(world.args(tmp_path, *flags), tmp_path, processes=2)
    wait_until(lambda: all((tmp_path / f"begun.{rank}").exists() for rank in (0, 1)))
    try:
        for child in children:
            os.kill(child.id, signal.SIGTERM)
            time.sleep(0.013)
        wait_until(lambda: not any(map(is_running, children)), seconds=60)
    finally:
        for child in filter(is_running, children):
            os.kill(child.id, signal.SIGKILL)
    ended = [child.wait() for child in children]
    assert [done.returncode for done in ended] == [143, 143], ended[0].stderr + ended[1].stderr
    assert [done.stderr.count("\n") for done in ended] == [1, 0]
    if stage == "DistillationStage":  # its epoch has many batches
        assert len(list((tmp_path / "run/checkpoints").rglob("*.ckpt"))) == 1


def is_running(child):
    """Return whether a forked process has not ended, without reaping it."""
    return os.waitid(os.P_PID, child.id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
