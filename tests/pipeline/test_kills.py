"""The same bits, whatever happens: five SIGKILLs, another hash order, another order of files.

`python -m tests.pipeline.kills` kills fifty times and more.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from gprune.runs.folder import RunFolder
from gprune.storage import files as artifacts
from tests import tiny_run
from tests.conftest import make_tiny_llama
from tests.pipeline import kills


@pytest.mark.slow
def test_killed_five_times_a_run_ends_with_the_same_bits(tmp_path):
    """Each kind of point once, in runs that spare themselves the fresh process of the export's check."""
    with tiny_run.isolated(tmp_path / "none"):
        flags = kills.tiny(tmp_path)
        bench = kills.Bench(tmp_path, flags, prepare=lambda: tiny_run.quick(pytest.MonkeyPatch()))
        tally = kills.torture(bench, count=5, length=5, seed=0)
        assert tally.differing == []
        assert {kind for _, kind in tally.kills} == set(kills.KINDS)
        assert len({step for step, _ in tally.kills}) == tally.kills.total() == 5
        # the comparison sees other masks, and the run refuses them
        life, file = tmp_path / "undisturbed", tmp_path / "undisturbed/run/masks/base.safetensors"
        before, masks = kills.digests(life / "run"), artifacts.read_tensors(file)
        masks["ffn.0"][0] ^= True
        artifacts.write_tensors(file, masks)
        tally.compare(life, kills.digests(life / "run"), before)
        assert tally.differing == ["undisturbed: masks/base.safetensors"]
        with pytest.raises(SystemExit, match="it has other masks"):
            bench.end(life, tmp_path / "cache")


DIES = """
import os, sys
from gprune.cli import main
from gprune.runs.checkpoints import Checkpoints

save = Checkpoints._save

def dies(self, trainer):
    save(self, trainer)
    if trainer.global_step == 3 and "distill" in str(self.path):
        os._exit(137)

if "once" in os.environ["MORE"]:
    Checkpoints._save = dies
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_what_a_killed_run_had_learned_from_counts(tmp_path):
    """No `finally` runs in a process that is killed: its tokens are noted with each checkpoint."""
    world, script = tiny_run.make_world(tmp_path), tmp_path / "dies.py"
    script.write_text(DIES)
    flags = ["--recovery=distill", "--distill.tokens=576", "--run.checkpoint_minutes=0", "--export=none"]
    flags += ["--gprune=false", "--evaluation.controls=[]"]

    def ends(code: int, name: str, more: str) -> None:
        (done,) = tiny_run.train(world.args(tmp_path, *flags, name=name), tmp_path, script=script, MORE=more)
        assert done.returncode == code, done.stderr

    ends(0, "whole", "")
    ends(137, "killed", "once")
    ends(0, "killed", "")
    whole, killed = (RunFolder(tmp_path / name).manifest["steps"]["shrink"] for name in ("whole", "killed"))
    assert whole["forward_backward_tokens"] == 576
    assert {kind: killed[kind] for kind in whole if kind.endswith("tokens")} == {
        kind: whole[kind] for kind in whole if kind.endswith("tokens")
    }
    before = RunFolder(tmp_path / "whole").manifest["steps"]
    ends(0, "whole", "")  # what a finished run computes again, to give it back, is no cost of its own
    assert RunFolder(tmp_path / "whole").manifest["steps"] == before


# --- order that nobody has promised ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fresh_process_says_nothing_on_stderr_and_does_not_depend_on_the_order_of_hashes(tmp_path, monkeypatch):
    """A fresh process with a hash seed of its own, and this one with another.

    Progress, warnings and W&B's own words all stay off stderr. Libraries that the fresh process imports late, such as
    Lightning, say nothing on stdout either.
    """
    world = tiny_run.make_world(tmp_path)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    scope = "--sparsity.scope=attention+ffn"
    done = subprocess.run(
        [sys.executable, "train.py", *world.args(tmp_path / "there", scope, "--logging.mode=offline")],
        cwd=kills.ROOT, env=tiny_run.environment(tmp_path / "cache", PYTHONHASHSEED=seed),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search("Traceback|GPU available|Tip:|LOCAL_RANK", done.stdout)
    tiny_run.quick(monkeypatch)
    with tiny_run.isolated(tmp_path / "other-cache"):
        assert tiny_run.main(world.args(tmp_path / "here", scope)) == 0
    assert kills.digests(tmp_path / "there/run") == kills.digests(tmp_path / "here/run")


class Listing(contextlib.nullcontext):
    """What `os.scandir` returns, of an iterator in an order of our own."""

    def __iter__(self):
        return self.enter_result

    def __next__(self):
        return next(self.enter_result)


@pytest.mark.slow
def test_results_do_not_depend_on_the_order_of_files(tmp_path, monkeypatch):
    """Corpora that are folders of several files, a model in several files, a cache and a folder that are taken up."""
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
    tiny_run.quick(monkeypatch)
    real, scan, named, found, orders = os.listdir, os.scandir, attrgetter("name"), [], []
    for backwards in (False, True):
        runs = tmp_path / f"runs-{backwards}"
        with monkeypatch.context() as patch, tiny_run.isolated(runs / "cache"):
            patch.setattr(os, "listdir", lambda *a, b=backwards: sorted(real(*a), reverse=b))
            patch.setattr(os, "scandir", lambda *a, b=backwards: Listing(iter(sorted(scan(*a), key=named, reverse=b))))
            orders.append([file.name for file in Path(world.corpora["alpha"]).iterdir()])
            for name in ("run", "shares-the-cache"):
                assert tiny_run.main(world.args(runs, f"--model.name={shards}", name=name)) == 0
        found.append(kills.digests(runs / "run"))
        assert kills.digests(runs / "shares-the-cache") == found[-1]
    assert orders[0] == orders[1][::-1] != orders[1]
    assert found[0] == found[1]
