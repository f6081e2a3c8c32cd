"""Results are identical after SIGKILLs and with another order of directory listings.

`python -m tests.method.kill_and_resume` tests fifty kills, or as many as `--count` says.
"""

from __future__ import annotations

import contextlib
import os
from operator import attrgetter
from pathlib import Path

import pytest

from gprune.storage import files as artifacts
from tests import tiny_run
from tests.method.kill_and_resume import KINDS, Launcher, digests, kill_and_resume, tiny_run_flags
from tests.tiny_llama import make_tiny_llama


@pytest.mark.slow
def test_a_run_that_is_killed_at_five_points_and_resumed_has_the_same_results(tmp_path):
    """Each kind of point is tested once. At the end, the comparison itself is tested with a changed mask."""
    with tiny_run.isolated(tmp_path / "none"):
        flags = tiny_run_flags(tmp_path)
        launcher = Launcher(tmp_path, flags)
        tally = kill_and_resume(launcher, count=5, length=5, seed=0)
        assert tally.differing == []
        assert {kind for _, kind in tally.kills} == set(KINDS)
        assert len({step for step, _ in tally.kills}) == tally.kills.total() == 5
        # The comparison detects other masks, and the run refuses them.
        trial = tmp_path / "uninterrupted"
        file = trial / "run/masks.safetensors"
        before, masks = digests(trial / "run"), artifacts.read_tensors(file)
        masks["ffn.0"][0] ^= True
        artifacts.write_tensors(file, masks)
        tally.compare(trial, digests(trial / "run"), before)
        assert tally.differing == ["uninterrupted: masks.safetensors"]
        with pytest.raises(SystemExit, match="it has other masks"):
            launcher.end(trial, tmp_path / "cache")


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
