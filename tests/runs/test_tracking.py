"""The offline `.wandb` file itself is read back: curves over their axes, tables, images, the run's settings."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from dataclasses import asdict

import pytest
import wandb

from gprune.errors import UserError
from gprune.runs.tracking import tracking
from tests import tiny_run
from tests.wandb_files import read_offline


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def result(world, tmp_path_factory):
    """A run that says offline although the environment says disabled: the flag wins."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--logging.mode=offline", "--logging.group=tiny", "--logging.tags=[ours]", "--sparsity.epochs=3"]
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny_run.isolated(runs / "cache", WANDB_MODE="disabled"),
    ):
        tiny_run.quick(patch)
        found = world.run(runs, *flags)
        assert os.environ["WANDB_MODE"] == "disabled"
    return found


@pytest.fixture(scope="module")
def logged(result):
    return read_finished(result.path)


def read_finished(path, seconds=20):
    """W&B's own process writes the last entries a moment after `finish` has returned."""
    end = time.monotonic() + seconds
    while (run := read_offline(path)).exit_code is None and time.monotonic() < end:
        time.sleep(0.05)
    return run


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`tracking` with settings that do not matter here."""
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def enter(mode):
        return tracking(
            tmp_path, mode=mode, name="n", project="p", group="g", job_type="j", tags=["t"], config={"a": {"b": 1}}
        )

    return enter


def corpora(world, *names):
    return [str(world.corpora[name]) for name in names]


def test_perplexity_against_epoch_is_a_curve(world, logged):
    for corpus in corpora(world, "alpha", "beta"):
        points = logged.curve(f"learn/perplexity/{corpus}")
        assert [x for x, _ in points] == [0.0, 1.0, 2.0, 3.0]
        assert all(y > 1 and math.isfinite(y) for _, y in points)
    assert logged.axes["learn/perplexity/*"] == "learn/epoch"


def test_perplexity_against_sparsity_is_a_curve_from_the_dense_model_on(world, logged, result):
    manifest = json.loads((result.path / "manifest.json").read_text())
    expected = manifest["learning"]["development_perplexity_by_sparsity"]
    for corpus in corpora(world, "alpha", "beta"):
        points = logged.curve(f"curve/perplexity/{corpus}")
        assert [x for x, _ in points] == [0.0, 0.25, 0.5]
        assert [y for _, y in points] == pytest.approx([values[corpus] for values in expected.values()])
    assert logged.axes["curve/perplexity/*"] == "curve/sparsity"


def test_the_loss_of_both_learned_parts_is_there(logged):
    for metric in ("partition/consistency", "learn/loss"):
        assert any(metric in row for row in logged.history), metric


def test_modules_are_a_table_and_scalars(logged, result):
    (entry,) = [row["modules"] for row in logged.history if "modules" in row]
    assert entry["_type"] == "table-file"
    (file,) = result.path.glob(f"wandb/offline-run-*/files/{entry['path']}")
    table = json.loads(file.read_text())
    expected = result.modules.rows()
    assert len(table["data"]) == len(expected) > 3
    for values, row in zip(table["data"], expected, strict=True):
        got = dict(zip(table["columns"], values, strict=True))
        removed = 1 - float(
            result.masks.ffn[row["block"]][result.modules.labels[row["block"]] == row["module"]].float().mean()
        )
        assert got.pop("sparsity") == pytest.approx(removed)
        assert got == pytest.approx(row)
    for name in ("sensitivity", "agreement"):
        logged_values = dict(logged.curve(f"modules/{name}"))
        assert logged_values == pytest.approx({i: r[name] for i, r in enumerate(expected) if r[name] is not None})


def test_figures_are_images(logged, result):
    images = {k: v for row in logged.history for k, v in row.items() if k.startswith("figures/")}
    assert set(images) == {f"figures/{path.stem}" for path in (result.path / "figures").glob("*.png")}
    assert len(images) >= 2
    for image in images.values():
        assert image["_type"] == "image-file"
        (file,) = result.path.glob(f"wandb/offline-run-*/files/{image['path']}")
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_resolved_config_is_the_runs_config(logged, result):
    config = {name: value for name, value in logged.config.items() if name != "_wandb"}
    assert config == json.loads(json.dumps(asdict(result.config)))
    assert config["sparsity"]["learning_rate"] == 0.1  # a default that no flag named


def test_group_job_type_and_tags(logged):
    assert logged.group == "tiny"
    assert logged.job_type == "gprune"
    assert {"wanda_sp", "ffn", "learned", "refined", "ours"} <= set(logged.tags)


def test_final_numbers_are_there(logged, result):
    scalars = {k: v for row in logged.history for k, v in row.items() if k.startswith("summary/")}
    assert scalars["summary/gprune/unseen"] == pytest.approx(result.summary["geometric_means"]["gprune"]["unseen"])


def test_a_csv_stands_beside_it(world, result):
    with (result.path / "csv/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for corpus in corpora(world, "alpha", "beta"):
        epochs = [row["learn/epoch"] for row in rows if row[f"learn/perplexity/{corpus}"]]
        assert [float(x) for x in epochs] == [0.0, 1.0, 2.0, 3.0]
        assert [float(r["curve/sparsity"]) for r in rows if r[f"curve/perplexity/{corpus}"]] == [0.0, 0.25, 0.5]


def test_offline_is_the_default_and_the_environment_is_heard(world, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    args = [a for a in world.args(tmp_path, "--gprune=false") if not a.startswith("--logging")]
    for name, mode in (("quiet", "disabled"), ("default", None)):
        with tiny_run.isolated(tmp_path / "cache", WANDB_MODE=mode):
            assert tiny_run.main([*args, f"--run.name={name}"]) == 0
            assert os.environ.get("WANDB_MODE") == mode
    assert not (tmp_path / "quiet/wandb").exists()
    assert "summary/base/unseen" in (tmp_path / "quiet/csv/version_0/metrics.csv").read_text()
    assert read_finished(tmp_path / "default").job_type == "base"


def test_disabled_writes_no_wandb_folder_and_starts_no_run(start, tmp_path):
    with start("disabled") as loggers:
        assert wandb.run is None
        assert len(loggers) == 1
    assert not (tmp_path / "wandb").exists()


def test_an_exception_closes_the_run_as_failed(start, tmp_path):
    with pytest.raises(ZeroDivisionError), start("offline"):
        raise ZeroDivisionError
    assert wandb.run is None
    run = read_finished(tmp_path)
    assert run.exit_code == 1
    assert run.config["a"] == {"b": 1}


def test_entries_longer_than_a_block_and_truncated_files(start, tmp_path):
    long = "x" * 100_000  # three blocks
    with start("offline") as loggers:
        for step in range(3):
            loggers[1].experiment.log({"text": long + str(step), "x": step})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [row["text"] for row in read_finished(file).history]
    assert rows == [long + str(step) for step in range(3)]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])  # killed while writing: the whole entries count
    steps = [row["x"] for row in read_offline(file).history]
    assert steps == list(range(len(steps)))
    assert 1 <= len(steps) < 3
    file.write_bytes(content[:50_000] + b"?" + content[50_001:])
    with pytest.raises(UserError, match="damaged"):
        read_offline(file)
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"no \.wandb file"):
        read_offline(file)
    with pytest.raises(UserError, match="--logging"):
        read_offline(tmp_path / "wandb")


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
