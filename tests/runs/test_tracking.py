"""Logging to W&B, read from offline files with wandb's own reader, and to CSV files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd
import psutil
import pytest
import wandb

from gprune.benchmarks.subjects import log_evaluation
from gprune.config import LoggingConfig, RunConfig
from gprune.config.parse import parse
from gprune.errors import UserError
from gprune.method.prune import prune
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import keyed, run_frame
from gprune.runs.results import load_run
from gprune.runs.tracking import curves_hint, log_numbers, log_scalars, tracking, wandb_run
from tests import synthetic_run, tiny_run, wandb_files


@pytest.fixture(scope="module")
def logged(world, tmp_path_factory):
    """Return the W&B file of a run with mode offline. The flag overrides WANDB_MODE=disabled."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--logging.mode=offline", "--logging.group=tiny", "--logging.tags=[ours]", "--sparsity.epochs=3"]
    flags.append("--logging.artifacts=[masks,model]")
    with tiny_run.isolated(runs / "cache", WANDB_MODE="disabled"):
        run = world.run(runs, *flags)
        assert os.environ["WANDB_MODE"] == "disabled"
    (file,) = wandb_files.find(run.path)
    logged = wandb_files.read(file)
    logged.run = run
    return logged


@pytest.fixture(scope="module")
def curves(logged):
    """Return the (x, y) values of each metric from the CSV file, with the x axis that W&B has for the metric."""
    frame = pd.read_csv(logged.run.path / "csv/version_0/metrics.csv")
    points = defaultdict(list)
    for name in frame:
        for pattern, axis in logged.axes.items():
            if name.startswith(pattern.removesuffix("*")) and axis in frame:
                points[name] = list(frame[[axis, name]].dropna().itertuples(index=False, name=None))
    return points


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a context manager that starts `tracking` with default settings."""
    monkeypatch.delenv("WANDB_MODE", raising=False)

    @contextmanager
    def enter():
        cfg, folder = RunConfig(), RunFolder(tmp_path, key="abc")
        with folder.in_use(cfg.settings(), ""), tracking(folder, cfg) as loggers:
            yield loggers

    return enter


def test_development_perplexity_is_logged_against_tokens_and_against_sparsity(logged, curves):
    manifest = json.loads((logged.run.path / "manifest.json").read_text())
    learning, tokens_of_an_epoch = manifest["learning"], 2 * 4 * 32  # corpora, windows, tokens
    by_epoch, by_sparsity = (learning[f"development_perplexity_by_{axis}"] for axis in ("epoch", "sparsity"))
    for corpus in by_epoch[0]:
        name = Path(corpus).name
        expected = [(i * tokens_of_an_epoch, y[corpus]) for i, y in enumerate(by_epoch)]
        assert curves[f"development/perplexity/{name}"] == expected
        points = curves[f"curve/perplexity/{name}"]
        assert [x for x, _ in points] == [0.0, 0.25, 0.5]
        assert [y for _, y in points] == pytest.approx([values[corpus] for values in by_sparsity.values()])
    geometric_means = [math.prod(y.values()) ** 0.5 for y in by_epoch]  # over two corpora
    assert curves["development/perplexity"] == [
        (i * tokens_of_an_epoch, pytest.approx(mean)) for i, mean in enumerate(geometric_means)
    ]


def test_the_wandb_history_has_the_values_of_the_csv_file(logged):
    """Compares all values of five metrics of different steps."""
    frame = pd.read_csv(logged.run.path / "csv/version_0/metrics.csv")
    for name in ("partition/temperature", "learn/loss", "learn/gradient_norm", "curve/sparsity", "final/unseen"):
        values = [row[name] for row in logged.history if name in row]
        assert values == pytest.approx(frame[name].dropna().tolist()), name
        assert values
    temperatures = frame["partition/temperature"].dropna()
    assert list(temperatures) == sorted(temperatures, reverse=True)
    assert list(frame["learn/learning_rate"].dropna()) == pytest.approx([0.1] * 6)


def test_the_wandb_summary_has_the_results_under_fixed_keys(logged):
    run, summary = logged.run, logged.summary
    assert keyed(run.to_frame()).items() <= summary.items()
    for record in run.records:
        corpus = Path(record["corpus"]).name
        for name in ("perplexity", "kl", "agreement"):
            assert summary.get(f"{record['stage']}/{name}/{corpus}") == record.get(name)
    assert summary["final/unseen_over_dense"] == summary["pruned/unseen_over_dense"]
    assert summary["final/parameters"] == run.summary["parameters_after"]
    assert {"final/seen", "final/gap", "final/unseen_kl", "final/steps/evaluate/seconds"} <= summary.keys()
    assert not any(blank in key for key in summary for blank in " +")


def test_numbers_of_modules_are_logged_against_their_index(logged, curves):
    result, rows = logged.run, logged.run.modules.rows()
    assert len(rows) > 3
    sparsity = {}
    for i, row in enumerate(rows):
        mask, labels = result.masks.ffn[row["block"]], result.modules.labels[row["block"]]
        sparsity[i] = 1 - float(mask[labels == row["module"]].float().mean())
    assert dict(curves["modules/sparsity"]) == pytest.approx(sparsity)
    for name in ("sensitivity", "agreement"):  # None for a module in which it is not defined
        expected = {i: row[name] for i, row in enumerate(rows) if row[name] is not None}
        assert dict(curves[f"modules/{name}"]) == pytest.approx(expected)


def test_a_wandb_run_has_config_group_job_type_and_tags(logged):
    config = {name: value for name, value in logged.config.items() if name != "_wandb"}
    assert config == logged.run.config.model_dump()
    assert config["sparsity"]["learning_rate"] == 0.1  # a default value
    about = logged.about
    assert (about["display_name"], about["run_group"], about["job_type"]) == ("run", "tiny", "gprune")
    assert {"wanda_sp", "ffn", "learned", "refined", "target 0.5", "ours"} == set(about["tags"])
    assert logged.exit_code == 0


def test_load_run_loads_downloaded_artifacts(logged, tmp_path):
    """The files that W&B would upload are copied to the layout of a download."""
    masks, model = (artifact for artifact in logged.artifacts if artifact["type"] in ("masks", "model"))
    assert [artifact["name"] for artifact in (masks, model)] == ["tiny-llama-masks", "tiny-llama-model"]
    metadata = json.loads(masks["metadata"])
    key = "final/unseen_over_dense"
    assert (metadata["budget"], metadata[key]) == (0.5, logged.summary[key])
    for artifact in (masks, model):
        for entry in artifact["manifest"]["contents"]:
            path = tmp_path / artifact["type"] / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry["local_path"], path)
        loaded = load_run(tmp_path / artifact["type"])
        assert (loaded.masks, loaded.records) == (logged.run.masks, logged.run.records)
        assert (loaded.model is None) is (artifact is masks)


def test_an_artifact_that_cannot_be_downloaded_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"^Cannot download artifact wandb:a/b/c:v0: .*wandb login.*$"):
        load_run("wandb:a/b/c:v0")


def test_task_results_are_logged_to_the_wandb_run_of_their_run(logged):
    """They are in a second file of the same W&B run. `latest-run` still points to the file with the curves."""
    piqa = {"kind": "zero_shot", "task": "piqa", "acc": 0.5, "acc_norm": None, "acc_stderr": 0.1}
    wikitext = {"kind": "perplexity", "task": "wikitext2", "seq_len": 128, "perplexity": 9.0, "stage": "pruned"}
    latest = os.readlink(logged.run.path / "wandb/latest-run")
    log_evaluation(logged.run.path, [piqa | {"stage": "dense"}, piqa | {"stage": "pruned"}, wikitext])
    first, second = wandb_files.find(logged.run.path)
    assert first.name == second.name
    resumed = wandb_files.read(second)
    assert resumed.about["resume"]
    assert {name: value for name, value in resumed.summary.items() if not name.startswith("_")} == {
        "dense/tasks/piqa/acc": 0.5, "pruned/tasks/piqa/acc": 0.5, "final/tasks/piqa/acc": 0.5,
        "pruned/tasks/wikitext2/128/perplexity": 9.0, "final/tasks/wikitext2/128/perplexity": 9.0,
    }  # fmt: skip
    assert os.readlink(logged.run.path / "wandb/latest-run") == latest
    shutil.rmtree(second.parent)


def environment(folder, **variables):
    """Set environment variables of W&B, whose names are given without `WANDB_`."""
    return tiny_run.isolated(folder, **{f"WANDB_{name}": value for name, value in variables.items()})


@pytest.fixture
def unread_environment():
    """W&B reads the environment once per process, and keeps it for the tests that follow unless it is torn down."""
    yield
    wandb.teardown()


def test_wandb_variables_apply_unless_a_flag_is_given(tmp_path, unread_environment):
    variables = {"PROJECT": "p", "NAME": "n", "TAGS": "x,y", "RUN_GROUP": "g", "DIR": str(tmp_path), "ENTITY": "e"}
    about = {"id": "abc", "name": "ours", "group": "ours", "job_type": "j", "tags": ["t"], "config": {}}
    for flags, expected in (
        ({}, ["p", "n", "g", ["t", "x", "y"], "e"]),
        ({"project": "q", "name": "m", "group": "h", "tags": ["z"]}, ["q", "m", "h", ["t", "z"], "e"]),
    ):
        wandb.teardown()  # wandb reads the environment once per process
        with environment(tmp_path, **variables), wandb_run(tmp_path / "unused", LoggingConfig(**flags), **about):
            pass
        logged = wandb_files.read(wandb_files.find(tmp_path)[-1]).about
        assert [logged[name] for name in ("project", "display_name", "run_group", "tags", "entity")] == expected
    assert not (tmp_path / "unused").exists()


def test_an_open_wandb_run_is_used_and_stays_open(world, tmp_path):
    with tiny_run.isolated(tmp_path / "cache"):
        about = {"project": "mine", "mode": "offline", "config": {"model": "x"}, "dir": tmp_path / "mine"}
        open_run = wandb.init(**about, settings=wandb.Settings(silent=True))
        open_run.log({"loss": 2.0})
        args = world.args(tmp_path, "--recovery=[distill]", "--distill.tokens=192", "--gprune=false")
        result = prune(parse([a for a in args if not a.startswith("--logging")]))
        assert wandb.run is open_run
        open_run.log({"loss": 1.0})
        open_run.finish()
    assert not (result.path / "wandb").exists()
    logged = wandb_files.read(*wandb_files.find(tmp_path))
    assert [row["loss"] for row in logged.history if "loss" in row] == [2, 1]
    assert [row["_step"] for row in logged.history] == list(range(len(logged.history)))
    assert (logged.about["project"], logged.about.get("run_group"), logged.about.get("tags")) == ("mine", None, None)
    assert (logged.config["model"], logged.config["gprune"]["importance"]) == ("x", "wanda_sp")
    assert not any(fnmatch(name, pattern) for pattern in logged.axes for name in ("loss", "epoch"))
    assert logged.axes["distill/*"] == "distill/tokens"
    assert logged.summary["final/unseen"] == keyed(result.to_frame())["recovered/unseen"]


@pytest.mark.slow
def test_a_wandb_failure_during_a_run_is_one_warning(start, tmp_path, caplog):
    assert str(tmp_path / "csv") in curves_hint(tmp_path)  # there is no W&B run yet
    with start() as loggers:
        log_scalars(loggers, {"a": 1.0}, step=0)
        for child in psutil.Process().children(recursive=True):
            if "wandb-core" in child.name():
                child.kill()
                child.wait()
        for step in range(1, 4):
            log_scalars(loggers, {"a": 1.0}, step=step)
        log_numbers(loggers, run_frame("", synthetic_run.records()))
    assert len(pd.read_csv(tmp_path / "csv/version_0/metrics.csv")) == 5  # four steps, and the final number
    (line,) = [record.message for record in caplog.records if record.name == "gprune" and record.levelname == "WARNING"]
    assert "Could not write to W&B from now on" in line
    assert wandb.run is None


@pytest.mark.slow
def test_a_run_is_logged_offline_if_the_server_cannot_be_reached(tmp_path, caplog):
    variables = {"API_KEY": 40 * "a", "BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "1", "MODE": "online"}
    about = {"id": "abc", "name": "n", "group": "g", "job_type": "j", "tags": [], "config": {}}
    wandb.teardown()
    with environment(tmp_path, **variables), wandb_run(tmp_path, LoggingConfig(), **about) as run:
        run.log({"a": 1})
    wandb.teardown()
    assert wandb_files.read(wandb_files.find(tmp_path)[-1]).summary["a"] == 1
    (line,) = [record.message for record in caplog.records if record.name == "gprune"]
    assert "The run is logged offline, for `wandb sync`" in line


def test_an_exception_closes_the_wandb_run_as_failed_and_the_hint_on_curves_has_its_path(start, tmp_path, monkeypatch):
    exit_codes, finish = [], wandb.Run.finish

    def record_exit_code(self, exit_code=None):
        exit_codes.append(exit_code)
        return finish(self)

    monkeypatch.setattr(wandb.Run, "finish", record_exit_code)
    with pytest.raises(ZeroDivisionError), start():
        raise ZeroDivisionError
    assert (wandb.run, exit_codes) == (None, [1])
    command = curves_hint(tmp_path).split("`")[1]
    assert command == f"wandb leet run {tmp_path / 'wandb/latest-run'}"
    assert len(list((tmp_path / "wandb/latest-run").glob("*.wandb"))) == 1


def wandb_ids_and_csv_versions(path):
    """Return the W&B run ids in a run folder, and the versions of its CSV files."""
    # Folders are named offline-run-DATE-ID, followed by a number if two were started in the same second.
    ids = [folder.name.split("-")[3] for folder in (path / "wandb").glob("offline-run-*")]
    return ids, sorted(folder.name for folder in (path / "csv").iterdir())


def test_runs_are_logged_offline_once_unless_wandb_mode_disables_it_and_keep_their_id_on_resuming(world, tmp_path):
    args = [a for a in world.args(tmp_path, "--gprune=false") if not a.startswith("--logging")]
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    with tiny_run.isolated(tmp_path / "cache", WANDB_MODE="disabled"):
        assert tiny_run.main([*args, "--run.name=quiet"]) == 0
        assert os.environ["WANDB_MODE"] == "disabled"
    assert not (quiet / "wandb").exists()
    assert "final/unseen" in (quiet / "csv/version_0/metrics.csv").read_text()
    with tiny_run.isolated(tmp_path / "cache", WANDB_MODE=None):
        assert tiny_run.main(args) == 0
        first = wandb_ids_and_csv_versions(run)
        assert (len(first[0]), first[1]) == (1, ["version_0"])
        assert tiny_run.main(args) == 0  # it is finished
        assert wandb_ids_and_csv_versions(run) == first
        (run / "metrics.json").unlink()  # so the run is not finished, and resumes
        assert tiny_run.main(args) == 0
        assert "WANDB_MODE" not in os.environ
    ids, versions = wandb_ids_and_csv_versions(run)
    assert set(ids) == set(first[0])
    assert versions == ["version_0", "version_1"]


def test_a_run_interrupted_while_drawing_figures_logs_its_summary_after_resuming(world, tmp_path, monkeypatch):
    with tiny_run.isolated(tmp_path / "cache"):
        args = world.args(tmp_path, "--gprune=false")
        with monkeypatch.context() as patch:
            patch.setattr("gprune.method.summary.write_figures", raise_keyboard_interrupt)
            assert tiny_run.main(args) == 130
        assert "summary" not in json.loads((tmp_path / "run/metrics.json").read_text())
        assert tiny_run.main(args) == 0
    frames = [pd.read_csv(path) for path in (tmp_path / "run/csv").glob("*/metrics.csv")]
    assert sum("final/unseen" in frame for frame in frames) == 1


def raise_keyboard_interrupt(*args, **kwargs):
    raise KeyboardInterrupt
