"""`experiments.distil`: a model of another tool is distilled from its dense model."""

import gprune
from experiments.distil import main
from gprune.config import parse
from tests import tiny_run


def test_distillation_lowers_the_kl_of_the_folder_and_writes_a_new_one(tmp_path, monkeypatch, capsys):
    world = tiny_run.make_world(tmp_path)
    with tiny_run.isolated(tmp_path / "cache"):
        flags = ("--gprune=false", "--importance=magnitude", "--export=hf", "--export.dtype=float32")
        pruned = world.run(tmp_path / "runs", *flags).path / "model"
        flags = [flag for flag in world.args(tmp_path) if not flag.startswith("--run.")]
        flags += ["--distill.tokens=3072", "--distill.learning_rate=0.02"]
        monkeypatch.setattr("sys.argv", ["distil", f"--model={pruned}", f"--output={tmp_path / 'distilled'}", *flags])
        assert main() == 0
        frames = [gprune.measure(tmp_path / name, world.model, parse(flags)) for name in (pruned, "distilled")]
        kl = [frame[frame["number"] == "unseen_kl"]["value"].item() for frame in frames]
        assert 0 < kl[1] < kl[0]
        assert list(tmp_path.rglob("distilled-curves/*/metrics.csv"))
        assert main() == 2
        assert "must be a new folder" in capsys.readouterr().err
