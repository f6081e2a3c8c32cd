"""What trackers are told: W&B by its own calls, curves in the CSV beside it, TensorBoard by its own reader."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from types import SimpleNamespace

import pandas as pd
import pytest
import wandb

from gprune.config import LoggingConfig
from gprune.config import running as config
from gprune.errors import UserError
from gprune.runs.tracking import how_to_look, tracking
from tests import tiny_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def told(world, tmp_path_factory):
    """A run that says offline although the environment says disabled, the flag wins; and what W&B was told of it."""
    runs, told = tmp_path_factory.mktemp("runs"), SimpleNamespace(axes={}, history=[], about={})
    flags = ["--logging.mode=offline", "--logging.group=tiny", "--logging.tags=[ours]", "--sparsity.epochs=3"]
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny_run.isolated(runs / "cache", WANDB_MODE="disabled"),
    ):
        spy(patch, told)
        tiny_run.quick(patch)
        told.run = world.run(runs, *flags)
        assert os.environ["WANDB_MODE"] == "disabled"
    return told


def spy(patch, told):
    """Note what goes to W&B, which gets it all the same."""
    init, log, define = wandb.init, wandb.Run.log, wandb.Run.define_metric

    def noted_init(**about):
        told.about = about
        return init(**about)

    def noted_log(self, values, *args, **kwargs):
        told.history.append(values)
        return log(self, values, *args, **kwargs)

    def noted_define(self, name, step_metric=None, **kwargs):
        told.axes[name] = step_metric
        return define(self, name, step_metric, **kwargs)

    patch.setattr(wandb, "init", noted_init)
    patch.setattr(wandb.Run, "log", noted_log)
    patch.setattr(wandb.Run, "define_metric", noted_define)


@pytest.fixture(scope="module")
def curves(told):
    """(x, y) of each metric over the axis that W&B is told of, from the run's own CSV."""
    frame, found = pd.read_csv(told.run.path / "csv/version_0/metrics.csv"), defaultdict(list)
    for name in frame:
        for pattern, axis in told.axes.items():
            if axis and name.startswith(pattern.removesuffix("*")):
                found[name] = list(frame[[axis, name]].dropna().itertuples(index=False, name=None))
    return found


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`tracking` with settings that do not matter here."""
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def enter(tracker):
        about = {"name": "n", "group": "g", "job_type": "j", "tags": ["t"], "config": {"a": {"b": 1}}, "id": "abc"}
        return tracking(tmp_path, LoggingConfig(tracker=tracker), **about)

    return enter


def test_perplexity_is_a_curve_against_epoch_and_against_sparsity_from_the_dense_model_on(world, told, curves):
    manifest = json.loads((told.run.path / "manifest.json").read_text())
    by_sparsity = manifest["learning"]["development_perplexity_by_sparsity"]
    for corpus in (str(world.corpora[name]) for name in ("alpha", "beta")):
        epochs, points = curves[f"learn/perplexity/{corpus}"], curves[f"curve/perplexity/{corpus}"]
        assert [x for x, _ in epochs] == [0.0, 1.0, 2.0, 3.0]
        assert all(y > 1 and math.isfinite(y) for _, y in epochs)
        assert [x for x, _ in points] == [0.0, 0.25, 0.5]
        assert [y for _, y in points] == pytest.approx([values[corpus] for values in by_sparsity.values()])
    assert told.axes["learn/perplexity/*"] == "learn/epoch"
    assert told.axes["curve/perplexity/*"] == "curve/sparsity"


def test_wandb_is_told_what_the_csv_says(told):
    """Every scalar of every row: the one file is read for the other."""
    frame = pd.read_csv(told.run.path / "csv/version_0/metrics.csv")
    for name in ("partition/consistency", "learn/loss", "curve/sparsity", "final/unseen"):
        given = [float(row[name]) for row in told.history if name in row]
        assert given == pytest.approx(frame[name].dropna().tolist()), name
        assert given
    unseen = told.run.summary["geometric_means"]["gprune"]["unseen"]
    assert frame["final/unseen"].dropna().tolist() == [pytest.approx(unseen)]


def test_modules_are_a_table_and_scalars(told, curves):
    (table,) = [row["modules"] for row in told.history if "modules" in row]
    assert isinstance(table, wandb.Table)
    result, expected = told.run, told.run.modules.rows()
    assert len(table.data) == len(expected) > 3
    for values, row in zip(table.data, expected, strict=True):
        got = dict(zip(table.columns, values, strict=True))
        removed = 1 - float(
            result.masks.ffn[row["block"]][result.modules.labels[row["block"]] == row["module"]].float().mean()
        )
        assert got.pop("sparsity") == pytest.approx(removed)
        assert got == pytest.approx(row)
    for name in ("sensitivity", "agreement"):
        known = {i: r[name] for i, r in enumerate(expected) if r[name] is not None}
        assert dict(curves[f"modules/{name}"]) == pytest.approx(known)


def test_figures_are_images(told):
    images = {k: v for row in told.history for k, v in row.items() if k.startswith("figures/")}
    assert set(images) == {f"figures/{path.stem}" for path in (told.run.path / "figures").glob("*.png")}
    assert len(images) >= 2
    assert all(isinstance(image, wandb.Image) for image in images.values())
    files = told.run.path.glob("wandb/offline-run-*/files/media/images/figures/*.png")
    assert len(list(files)) == len(images)


def test_wandb_knows_config_group_job_type_and_tags(told):
    assert told.about["config"] == told.run.config.model_dump()
    assert told.about["config"]["sparsity"]["learning_rate"] == 0.1  # a default that no flag named
    assert (told.about["group"], told.about["job_type"]) == ("tiny", "gprune")
    assert {"wanda_sp", "ffn", "learned", "refined", "ours"} <= set(told.about["tags"])


def test_offline_is_the_default_and_the_environment_is_heard(world, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    args = [a for a in world.args(tmp_path, "--gprune=false") if not a.startswith("--logging")]
    for name, mode in (("quiet", "disabled"), ("default", None)):
        with tiny_run.isolated(tmp_path / "cache", WANDB_MODE=mode):
            assert tiny_run.main([*args, f"--run.name={name}"]) == 0
            assert os.environ.get("WANDB_MODE") == mode
    assert not (tmp_path / "quiet/wandb").exists()
    assert "final/unseen" in (tmp_path / "quiet/csv/version_0/metrics.csv").read_text()
    assert len(list((tmp_path / "default").glob("wandb/offline-run-*/*.wandb"))) == 1


def test_csv_writes_no_wandb_folder_and_starts_no_run(start, tmp_path):
    with start("csv") as loggers:
        assert wandb.run is None
        assert len(loggers) == 1
    assert not (tmp_path / "wandb").exists()
    assert str(tmp_path / "csv") in how_to_look(tmp_path, "csv")


def test_an_exception_closes_the_run_as_failed(start, monkeypatch):
    codes, finish = [], wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda self, exit_code=None: (codes.append(exit_code), finish(self))[1])
    with pytest.raises(ZeroDivisionError), start("wandb"):
        raise ZeroDivisionError
    assert wandb.run is None
    assert codes == [1]


def test_the_command_that_shows_the_curves_names_what_is_there(start, tmp_path):
    with start("wandb"):
        pass
    command = how_to_look(tmp_path, "wandb").split("`")[1]
    assert command.startswith("wandb leet run ")
    (file,) = (tmp_path / "wandb/latest-run").glob("*.wandb")
    assert file.read_bytes().startswith(b":W&B")
    assert command.endswith(str(tmp_path / "wandb/latest-run"))


def test_tensorboard_is_asked_for_before_anything_begins(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--logging\.tracker: .* `pip install tensorboard`, or take csv\."):
        LoggingConfig(tracker="tensorboard")


def test_tensorboard_has_the_curves_tables_and_figures(world, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tiny_run.quick(monkeypatch)
    with tiny_run.isolated(tmp_path / "cache"):
        result = world.run(tmp_path, "--logging.tracker=tensorboard", "--sparsity.epochs=3")
    assert not (result.path / "wandb").exists()
    found = reader.EventAccumulator(str(result.path / "tensorboard")).Reload()
    frame = pd.read_csv(result.path / "csv/version_0/metrics.csv")
    for name in ("learn/loss", "partition/consistency", "final/unseen"):
        assert [event.value for event in found.Scalars(name)] == pytest.approx(frame[name].dropna().tolist(), rel=1e-6)
    assert set(found.Tags()["images"]) == {f"figures/{path.stem}" for path in (result.path / "figures").glob("*.png")}
    assert "modules/text_summary" in found.Tags()["tensors"]
    assert "--logdir" in how_to_look(result.path, "tensorboard")


def sittings(path):
    """The ids of W&B's runs in a run folder, and the versions of its CSV."""
    # offline-run-DATE-ID, and a number behind it for a sitting that began in the same second
    ids = [folder.name.split("-")[3] for folder in (path / "wandb").glob("offline-run-*")]
    return ids, sorted(folder.name for folder in (path / "csv").iterdir())


def test_a_finished_run_is_read_and_not_logged_again(world, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    with tiny_run.isolated(tmp_path / "cache"):
        flags = ("--logging.mode=offline", "--gprune=false")
        first = world.run(tmp_path, *flags)
        before = sittings(first.path)
        again = world.run(tmp_path, *flags)
        assert sittings(again.path) == before
        assert again.records == first.records
        (first.path / "metrics.json").unlink()  # no longer finished: another sitting, of the same run of W&B's
        ids, versions = sittings(world.run(tmp_path, *flags).path)
    assert set(ids) == set(before[0])
    assert versions == ["version_0", "version_1"]


def test_a_run_that_is_stopped_while_figures_are_drawn_logs_its_summary_when_it_goes_on(world, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    with tiny_run.isolated(tmp_path / "cache"):
        args = world.args(tmp_path, "--gprune=false")
        with monkeypatch.context() as patch:
            patch.setattr("gprune.pipeline.evaluate.write_figures", interrupt)
            assert tiny_run.main(args) == 130
        assert "summary" not in json.loads((tmp_path / "run/metrics.json").read_text())
        assert tiny_run.main(args) == 0
    frames = [pd.read_csv(path) for path in (tmp_path / "run/csv").glob("*/metrics.csv")]
    assert sum("final/unseen" in frame for frame in frames) == 1


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt
