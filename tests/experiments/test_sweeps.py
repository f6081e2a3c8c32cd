"""W&B sweeps: the command lines of the agent parse, run names are unique, and runs share calibration."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from gprune.cli import main
from gprune.config.parse import parse
from gprune.runs.numbers import keyed
from gprune.runs.results import read_numbers
from tests import tiny_run, wandb_files

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "experiments/sweeps").glob("*.yaml"))
every_sweep = pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def points(sweep: dict) -> list[dict]:
    """Return all points of the grid: a dictionary {parameter: value} for each run."""
    choices = [p["values"] if "values" in p else [p["value"]] for p in sweep["parameters"].values()]
    return [dict(zip(sweep["parameters"], values, strict=True)) for values in itertools.product(*choices)]


def flags(sweep: dict, point: dict) -> list[str]:
    """Return the flags that W&B's agent passes to `train.py` for a point: Python notation, such as `['a', 'b']`."""
    args = create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})["args"]
    words = []
    for part in sweep["command"]:
        words += args if part == "${args}" else [part]
    assert words[:3] == ["${env}", "${interpreter}", "${program}"]
    assert not [word for word in words[3:] if "${" in word]
    return words[3:]


def calibration(cfg) -> str:
    """Return the settings that determine the cached statistics of one machine, as a text that can be compared."""
    corpora = cfg.corpora
    text = (sorted(cfg.calibration_corpora), corpora.num_samples, corpora.seq_len, cfg.run.seed)
    rounding = (cfg.model.name, cfg.model.dtype, corpora.batch_size, cfg.trainer.devices * cfg.trainer.num_nodes)
    return repr((text, rounding, sorted(cfg.needs), cfg.sparsity.scope))


@every_sweep
def test_every_command_line_gives_a_run_with_a_unique_name_and_runs_of_a_seed_share_calibration(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")  # has no effect on runs of an agent
    sweep = read(path)
    assert sweep["method"] == "grid"
    configs = [parse(flags(sweep, point)) for point in points(sweep)]
    assert len({cfg.run_name for cfg in configs}) == len(configs) > 1
    for cfg in configs:
        cfg.check_names()
        assert cfg.run.name is None
        assert cfg.logging.resolved_mode == "online"
        assert cfg.logging.project is None  # W&B uses the project of the sweep
        assert cfg.export.format == "none"
    assert len({calibration(cfg) for cfg in configs}) == len({cfg.run.seed for cfg in configs})
    # W&B does not define the order of parameters, and later flags override earlier ones.
    reversed_points = [dict(reversed(point.items())) for point in points(sweep)[-8:]]
    assert [parse(flags(sweep, point)) for point in reversed_points] == configs[-8:]


def test_booleans_and_lists_of_sweep_parameters_are_parsed():
    """W&B replaces `${args}` by values in Python notation, such as `False` and `['wiki', 'web']`."""
    sweep = {"program": "train.py", "command": ["${env}", "${interpreter}", "${program}", "${args}"]}
    point = {"reliability.switch": False, "corpora.drift": ["wiki", "web"], "sparsity.protect": [0, -1]}
    cfg = parse(flags(sweep, point))
    assert (cfg.reliability.switch, cfg.corpora.drift, cfg.sparsity.protect) == tuple(point.values())


@pytest.mark.slow
def test_a_run_started_by_an_agent_belongs_to_the_sweep_and_logs_its_metric(tmp_path):
    """The W&B run has the ids of the agent, the settings, the metric of the sweep at the end, and curves before it."""
    (tmp_path / "world").mkdir()
    world = tiny_run.make_world(tmp_path / "world")
    sweep = read(ROOT / "experiments/sweeps/budgets.yaml")
    point = points(sweep)[0]
    args = world.args(tmp_path / "runs", *flags(sweep, point), "--logging.mode=offline", "--run.name=null")
    (tmp_path / "point.yaml").write_text(
        "wandb_version: 1\n" + yaml.safe_dump({name: {"value": value} for name, value in point.items()})
    )
    agent = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "given", "WANDB_DIR": str(tmp_path)}
    wandb.teardown()  # wandb reads the environment once per process, and an agent starts a new process
    with tiny_run.isolated(tmp_path / "cache", **agent, WANDB_SWEEP_PARAM_PATH=str(tmp_path / "point.yaml")):
        assert main(args) == 0
    wandb.teardown()
    run = tmp_path / "runs" / parse(args).run_name
    assert not (run / "model").exists()

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")  # in $WANDB_DIR, which agents set
    logged = wandb_files.read(file)
    assert (logged.about["run_id"], logged.about["sweep_id"]) == ("given", "sweep")
    # The config has the flat entry of the sweep, and gprune's nested entry.
    assert logged.config["sparsity.target"] == logged.config["sparsity"]["target"] == point["sparsity.target"]
    numbers = keyed(read_numbers(run).frame())
    for path in SWEEPS:
        metric = read(path)["metric"]
        assert metric["goal"] == "minimize"  # perplexity, times dense
        values = [row[metric["name"]] for row in logged.history if metric["name"] in row]
        assert values == [logged.summary[metric["name"]]] == [numbers[metric["name"]]]
    curve = [row for row in logged.history if "development/perplexity" in row]
    final_step = next(row["_step"] for row in logged.history if "final/unseen" in row)
    assert len(curve) > 1
    assert max(row["_step"] for row in curve) < final_step
