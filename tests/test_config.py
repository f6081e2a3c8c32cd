"""The registry's messages, the configuration's checks and names, and every YAML file that ships."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gprune.config import RunConfig
from gprune.config.groups import CorporaConfig, ModelConfig, PartitionConfig, ReliabilityConfig, SparsityConfig
from gprune.config.parse import parse
from gprune.config.recovery import DistillConfig
from gprune.config.running import EvaluationConfig, LoggingConfig, RunFolderConfig, TrainerConfig
from gprune.errors import UserError
from gprune.registry import Registry

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
YAML = sorted(path for ending in ("*.yaml", "*.yml") for path in EXPERIMENTS.rglob(ending))


def test_registry_files_and_finds():
    registry = Registry("colour")

    @registry.register("red")
    def red():
        return 1

    assert registry["red"] is red
    assert "red" in registry
    assert "green" not in registry
    assert list(registry) == ["red"]


def test_registry_refuses_a_name_that_is_taken():
    registry = Registry("colour")

    @registry.register("red")
    def red():
        return 1

    def other():
        return 2

    with pytest.raises(ValueError, match="colour 'red' is registered already"):
        registry.register("red")(other)
    assert registry["red"] is red


def test_registry_refuses_another_modules_function_of_the_same_name():
    # A user's `def wanda_sp` in a notebook must not replace the built-in one without a word.
    registry = Registry("colour")

    def make(module: str):
        def red():
            return module

        red.__module__ = module
        return red

    registry.register("red")(make("library"))
    with pytest.raises(ValueError, match="registered already"):
        registry.register("red")(make("notebook"))


def test_running_a_notebook_cell_again_is_no_error():
    registry = Registry("colour")

    def cell(value: int):
        @registry.register("red")
        def red():
            return value

    cell(1)
    cell(2)
    assert registry["red"]() == 2


def test_registry_names_what_there_is_and_what_was_meant():
    registry = Registry("colour")
    for name in ("crimson", "blue"):
        registry.register(name)(object())
    with pytest.raises(UserError) as caught:
        registry["crimsom"]
    assert str(caught.value) == "Unknown colour 'crimsom'. Did you mean 'crimson'? Available: crimson, blue."
    with pytest.raises(UserError) as caught:
        registry["zzz"]
    assert str(caught.value) == "Unknown colour 'zzz'. Available: crimson, blue."


def test_a_user_error_is_one_line():
    assert str(UserError("one\n  two\n\nthree")) == "one two three"


def test_defaults_are_valid(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = RunConfig()
    config.check_names()
    assert config.logging.resolved_mode == "offline"  # a run never needs an account
    assert config.model.trust_remote_code is False


def test_the_command_line_gives_the_defaults():
    assert parse([]) == RunConfig()


def test_flags_reach_their_fields():
    config = parse(
        ["--sparsity.target", "0.25", "--corpora.drift", "[wiki,code]", "--importance=wifv", "--run.seed", "7"]
    )
    assert config.sparsity.target == 0.25
    assert config.corpora.drift == ["wiki", "code"]
    assert config.importance == "wifv"
    assert config.run.seed == 7
    assert config.recovery == RunConfig().recovery


def test_yaml_files_merge_left_to_right(tmp_path):
    (tmp_path / "a.yaml").write_text("importance: wifv\nsparsity: {target: 0.2, epochs: 3}\n")
    (tmp_path / "b.yaml").write_text("sparsity: {target: 0.4}\n")
    config = parse(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--run.seed=3"])
    assert (config.importance, config.sparsity.target, config.sparsity.epochs) == ("wifv", 0.4, 3)
    assert config.run.seed == 3


def test_settings_leave_out_where_results_go_and_how_they_are_logged():
    plain = RunConfig()
    elsewhere = RunConfig(
        run=RunFolderConfig(dir="/somewhere", name="mine"), logging=LoggingConfig(mode="disabled", tags=["x"]),
        corpora=CorporaConfig(collect=["gram", "saliency"]), export="none", dry_run=True,
    )  # fmt: skip
    assert "logging" not in plain.settings()
    assert plain.settings() == elsewhere.settings()
    assert elsewhere.run_name == "mine"
    same_folder = dataclasses.replace(elsewhere, run=RunFolderConfig(dir="/somewhere"))
    assert same_folder.run_name == plain.run_name


CHANGES = {
    "target": {"sparsity": SparsityConfig(target=0.4)},
    "target_digits": {"sparsity": SparsityConfig(target=0.5000001)},
    "epochs": {"sparsity": SparsityConfig(epochs=5)},
    "width": {"sparsity": SparsityConfig(width_multiple=8)},
    "scope": {"sparsity": SparsityConfig(scope="attention+ffn")},
    "allocation": {"sparsity": SparsityConfig(allocation="owl")},
    "start": {"sparsity": SparsityConfig(start="owl")},
    "protect": {"sparsity": SparsityConfig(protect=[0])},
    "owl_multiple": {"sparsity": SparsityConfig(allocation="owl", options={"multiple": 7.0})},
    "owl_spread": {"sparsity": SparsityConfig(allocation="owl", options={"spread": 0.1})},
    "metric": {"importance": "wifv"},
    "base": {"gprune": False},
    "seed": {"run": RunFolderConfig(seed=1)},
    "drift": {"corpora": CorporaConfig(drift=["wiki", "web"])},
    "windows": {"corpora": CorporaConfig(num_samples=17)},
    "method": {"partition": PartitionConfig(method="random")},
    "switch": {"reliability": ReliabilityConfig(switch=False)},
    "recovery": {"recovery": "least_squares"},
    "ridge": {"ridge": 0.1},
    "loss": {"sparsity": SparsityConfig(loss="kl")},
    "offset_rate": {"sparsity": SparsityConfig(offset_learning_rate=0.2)},
    "learn_samples": {"corpora": CorporaConfig(learn_samples=16)},
    "everywhere": {"reliability": ReliabilityConfig(everywhere=True)},
    "centred": {"sparsity": SparsityConfig(centred=False)},
    "split": {"evaluation": EvaluationConfig(split="development")},
    "evaluation": {"evaluation": EvaluationConfig(num_samples=9)},
    "devices": {"trainer": TrainerConfig(devices=2)},
}


def test_equal_settings_share_a_name_and_different_ones_do_not():
    assert RunConfig().run_name == RunConfig().run_name
    names = {key: RunConfig(**change).run_name for key, change in CHANGES.items()} | {"plain": RunConfig().run_name}
    assert len(set(names.values())) == len(names), names
    assert RunConfig(**CHANGES["metric"]).run_name.startswith("smollm2-135m-gprune-wifv-0.5-")
    assert RunConfig(**CHANGES["base"]).run_name.startswith("smollm2-135m-base-")


@pytest.mark.parametrize(
    ("allocation", "gprune", "learns", "base"),
    [
        ("learned", True, True, "owl"), ("learned", False, False, "owl"), ("equal", True, False, "owl"),
        ("uniform", True, False, "uniform"), ("global", True, False, "global"), ("owl", False, False, "owl"),
        ("depth", False, False, "depth"),
    ],
)  # fmt: skip
def test_the_base_metric_has_the_named_allocation_or_the_start(allocation, gprune, learns, base):
    config = RunConfig(gprune=gprune, sparsity=SparsityConfig(allocation=allocation, start="owl"))
    assert config.learns == learns
    assert config.base_allocation == base


@pytest.mark.parametrize(
    ("importance", "recovery", "needs"),
    [
        ("wanda_sp", "none", set()), ("wanda_sp", "bias", set()), ("wanda_sp", "least_squares", {"gram"}),
        ("wanda_sp", "least_squares_sequential", set()), ("obs", "least_squares_sequential", {"gram"}),
        ("obs", "none", {"gram"}), ("taylor", "none", {"saliency"}), ("taylor", "least_squares", {"gram", "saliency"}),
    ],
)  # fmt: skip
def test_a_run_needs_what_its_metric_and_its_recovery_need(importance, recovery, needs):
    collected = RunConfig(
        importance=importance, recovery=recovery, corpora=CorporaConfig(collect=["gram", "saliency"])
    )  # fmt: skip
    assert collected.needs == RunConfig(importance=importance, recovery=recovery).needs == needs


def test_lists_of_blocks_reach_protect():
    assert parse(["--sparsity.protect=[0,1,2,-1]"]).sparsity.protect == [0, 1, 2, -1]
    assert parse(["--corpora.collect=[gram,saliency]"]).corpora.collect == ["gram", "saliency"]


def test_two_nodes_of_one_device_and_one_of_two_are_the_same_run():
    one, two = (RunConfig(trainer=t) for t in (TrainerConfig(devices=2), TrainerConfig(num_nodes=2)))
    assert one.settings() == two.settings()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(importance="wandasp"), "Did you mean 'wanda_sp'.*Available"),
        (lambda: RunConfig(recovery="leastsquares"), "Unknown recovery.*Did you mean 'least_squares'"),
        (
            lambda: RunConfig(corpora=CorporaConfig(drift=["wiki"]), reliability=ReliabilityConfig(everywhere=True)),
            r"--reliability\.everywhere true: expected two or more --corpora\.drift, got \['wiki'\]",
        ),
        (lambda: RunConfig(ridge=-1), r"--ridge: expected 0 or more, got -1"),
        (lambda: RunConfig(ridge=float("nan")), r"--ridge: expected 0 or more, got nan"),
        (lambda: SparsityConfig(target=0), r"--sparsity\.target.*\(0, 1\), got 0"),
        (lambda: SparsityConfig(target=1), r"--sparsity\.target.*got 1"),
        (lambda: SparsityConfig(target=float("nan")), r"--sparsity\.target.*got nan"),
        (lambda: SparsityConfig(scope="mlp"), r"--sparsity\.scope: expected one of ffn, attention\+ffn, got 'mlp'"),
        (
            lambda: SparsityConfig(allocation="base"),
            r"--sparsity\.allocation: expected one of learned, equal, uniform, global, owl, depth, got 'base'",
        ),
        (
            lambda: SparsityConfig(start="depth"),
            r"--sparsity\.start: expected one of uniform, global, owl, got 'depth'",
        ),
        (
            lambda: SparsityConfig(allocation="owl", options={"spread": -0.1}),
            r"--sparsity\.options\.spread: expected 0 or more, got -0.1",
        ),
        (
            lambda: SparsityConfig(start="owl", options={"multiple": 0.5}),
            r"--sparsity\.options\.multiple: expected 1 or more, got 0.5",
        ),
        (
            lambda: SparsityConfig(allocation="owl", options={"multiples": 5}),
            r"--sparsity\.options: expected options of 'owl' \(multiple, spread\), got 'multiples'",
        ),
        (
            lambda: SparsityConfig(options={"spread": 0.1}),
            r"--sparsity\.options: expected options of 'uniform' \(none\), got 'spread'",
        ),
        (
            lambda: RunConfig(sparsity=SparsityConfig(allocation="depth")),
            r"--sparsity\.allocation depth: .* expected --gprune false",
        ),
        (lambda: CorporaConfig(collect=["grams"]), r"--corpora\.collect: expected one of gram, saliency, got 'grams'"),
        (lambda: SparsityConfig(width_multiple=0), r"--sparsity\.width_multiple: expected 1 or more, got 0"),
        (lambda: SparsityConfig(epochs=0), r"--sparsity\.epochs"),
        (lambda: SparsityConfig(learning_rate=0.0), r"--sparsity\.learning_rate: expected a positive"),
        (lambda: CorporaConfig(drift=[]), r"--corpora\.drift: expected at least one corpus"),
        (lambda: CorporaConfig(evaluate=["wiki", "wiki"]), r"--corpora\.evaluate: a corpus is named twice"),
        (lambda: CorporaConfig(num_samples=1), r"--corpora\.num_samples: expected 2 or more, got 1"),
        (lambda: CorporaConfig(seq_len=1), r"--corpora\.seq_len"),
        (lambda: PartitionConfig(method="kmeans"), r"--partition\.method: expected one of refined"),
        (lambda: PartitionConfig(num_modules=0), r"--partition\.num_modules"),
        (lambda: PartitionConfig(balance_weight=-0.1), r"--partition\.balance_weight: expected 0 or more"),
        (lambda: ReliabilityConfig(metric="wifv"), r"--reliability\.metric.*magnitude, .*random.*got 'wifv'"),
        (lambda: ReliabilityConfig(score_quantile=1.5), r"--reliability\.score_quantile.*\[0, 1\], got 1.5"),
        (lambda: EvaluationConfig(curve=[0.2, 1.0]), r"--evaluation\.curve.*got 1.0"),
        (lambda: TrainerConfig(devices=0), r"--trainer\.devices"),
        (
            lambda: RunConfig(corpora=CorporaConfig(drift=["wiki"]), partition=PartitionConfig(method="drift_only")),
            "drift_only: expected two or more",
        ),
        (lambda: RunConfig(model=ModelConfig(dtype="float16")), r"--model\.dtype float16: the gradients .* too small"),
        (
            lambda: RunConfig(
                evaluation=EvaluationConfig(split="development"),
                recovery="distill",
                distill=DistillConfig(keep="best"),
            ),
            r"--evaluation\.split development: .* chooses the weights on this text",
        ),
    ],
)
def test_bad_settings_name_the_flag_and_what_came(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_an_unknown_corpus_lists_what_there_is():
    with pytest.raises(UserError, match=r"wikki.*wiki"):
        RunConfig(corpora=CorporaConfig(score="wikki")).check_names()


def test_yaml_files_are_found_where_there_are_any():
    assert bool(YAML) == (EXPERIMENTS.is_dir() and any(p.suffix in (".yaml", ".yml") for p in EXPERIMENTS.rglob("*")))


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_every_yaml_that_ships_parses(path):
    import yaml

    if "rows" in (content := yaml.safe_load(path.read_text())):
        pytest.skip("a list: tests/test_experiment_lists.py reads it")
    if "method" in content and "parameters" in content:
        # a W&B sweep: its parameters must be flags
        for name, choice in content["parameters"].items():
            for value in choice.get("values", [choice["value"]] if "value" in choice else []):
                parse([f"--{name}={value}"])
        return
    config = parse(["--config", str(path)])
    assert isinstance(config, RunConfig)
    assert config.settings() != {}


def test_train_text_that_calibrates_is_not_measured_on():
    cfg = RunConfig()
    cfg.evaluation.split, cfg.corpora.evaluate = "train", ["stories", "web"]
    with pytest.raises(UserError, match=r"--evaluation\.split train: .* does not read, got 'web'"):
        cfg.check_names()
    cfg.corpora.evaluate = ["stories"]
    cfg.check_names()


@pytest.mark.parametrize(
    ("group", "name", "said"),
    [
        ("sparsity", "targt", "SparsityConfig has no setting 'sparsity.targt'; did you mean 'target'?"),
        (
            "run",
            "zzz",
            "RunFolderConfig has no setting 'run.zzz'; expected one of dir, name, seed, checkpoint_minutes.",
        ),
        (None, "sparsty", "RunConfig has no setting 'sparsty'; did you mean 'sparsity'?"),
    ],
)
def test_a_misspelt_setting_is_an_error_in_python_too(group, name, said):
    cfg = RunConfig()
    with pytest.raises(UserError) as error:
        setattr(cfg if group is None else getattr(cfg, group), name, 0.3)
    assert str(error.value) == said
