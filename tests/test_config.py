"""Registration, validation of settings however they are set, and names of runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import gprune
from gprune.cli import run
from gprune.config import RunConfig, config_from_mapping, parse
from gprune.config.groups import REPLACEMENTS, CorporaConfig, SparsityConfig
from gprune.config.parse import FLAG_TYPES, GROUPS, given_flags
from gprune.config.running import SET_BY_GPRUNE, LoggingConfig, RunFolderConfig, TrainerConfig
from gprune.corpora import is_local
from gprune.errors import UserError
from gprune.registry import Registry
from gprune.storage.yaml_text import to_yaml
from gprune.studies.listing import Listing

ROOT = Path(__file__).parent.parent
YAML = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("experiments", "gprune")
    for path in (ROOT / folder).rglob("*.yaml")
}


def test_a_name_can_be_registered_again_only_from_the_same_module():
    registry = Registry("colour")

    def register_red(value: int, module: str):
        def red():
            return value

        red.__module__ = module
        registry.register("red")(red)

    register_red(1, "notebook")
    register_red(2, "notebook")  # a notebook cell that is run again
    with pytest.raises(ValueError, match="colour 'red' is already registered"):
        register_red(3, "another_module")
    assert (registry["red"](), "red" in registry, "blue" in registry) == (2, True, False)


def test_replacements_of_names_are_existing_flags():
    replacements = re.findall(r"--([\w.]+)", " ".join([*REPLACEMENTS.values(), *SET_BY_GPRUNE.values()]))
    assert len(replacements) > len(SET_BY_GPRUNE)
    assert set(replacements) - {"import", "trainer.log_every_n_steps", "trainer.fast_dev_run"} <= FLAG_TYPES.keys()
    assert not REPLACEMENTS.keys() & FLAG_TYPES.keys()
    assert not SET_BY_GPRUNE.keys() & TrainerConfig.model_fields.keys()


# --- the same validation for every way to set a value --------------------------------------------------------------


def ways_to_set(name: str, value: object, folder: Path):
    """Return the ways to set a value: {name of the way: function that sets the value and returns the resulting value}.

    Args:
        name: name of the setting, such as `ridge`, or `sparsity.target` in the group `sparsity`.
        folder: for a file of flags.
    """
    group, _, setting = name.partition(".")
    nested = {group: {setting: value}} if setting else {group: value}

    def value_in(cfg: RunConfig):
        return getattr(getattr(cfg, group), setting) if setting else getattr(cfg, group)

    def from_command_line():
        return value_in(parse([f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]))

    def from_file(content: dict):
        (folder / "a.yaml").write_text(yaml.safe_dump(content))
        return value_in(parse(["--config", str(folder / "a.yaml")]))

    def from_constructor():
        if setting:
            return getattr(GROUPS[group](**{setting: value}), setting)
        return value_in(RunConfig(**{group: value}))

    def from_assignment():
        cfg = RunConfig()
        if setting:
            setattr(getattr(cfg, group), setting, value)
        else:
            setattr(cfg, group, value)
        return value_in(cfg)

    return {
        "command line": from_command_line,
        "nested file": lambda: from_file(nested),
        "dotted file": lambda: from_file({name: value}),
        "nested settings": lambda: value_in(config_from_mapping(nested)),
        "dotted settings": lambda: value_in(config_from_mapping({name: value})),
        "Python": from_constructor,
        "assignment": from_assignment,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparsity.target", 0.25), ("sparsity.protect", [0, 1, -1]), ("evaluation.before_recovery", False),
        ("corpora.drift", ["wiki", "code"]), ("corpora.learn_samples", None), ("importance", "wifv"), ("ridge", 1),
        ("gprune", False), ("run.seed", 7), ("run.name", "null and # void"), ("logging.mode", None),
        ("model.device_map", "cuda:0"), ("evaluation.curve", []), ("recovery", "bias"),
    ],
)  # fmt: skip
def test_a_setting_has_the_same_value_however_it_is_set(name, value, tmp_path):
    for way, get_value in ways_to_set(name, value, tmp_path).items():
        assert get_value() == value, way


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ridge", -1, "--ridge must be 0 or more; got -1."),
        ("ridge", float("nan"), "--ridge must be a finite number; got nan."),
        ("ridge", 1e31, "--ridge must be 1e+30 or less; got 1e+31."),
        ("sparsity.target", 0, "--sparsity.target"),
        ("sparsity.target", True, "--sparsity.target"),
        ("sparsity.scope", "mlp",
         "--sparsity.scope must be 'ffn', 'attention+ffn', 'ffn+blocks', 'attention+ffn+blocks', 'experts', "
        "'ffn+experts', 'attention+ffn+experts', 'experts+blocks', 'ffn+experts+blocks' or "
        "'attention+ffn+experts+blocks'; got 'mlp'."),
        ("sparsity.scope", "blocks+attention", "--sparsity.scope must be 'ffn', 'attention+ffn', 'ffn+blocks', 'att"),
        ("sparsity.block_share", 1.5, "--sparsity.block_share must be 1 or less; got 1.5."),
        ("sparsity.epochs", 2.5, "--sparsity.epochs must be a valid integer; got 2.5."),
        ("sparsity.options", {"spread": "wide"}, "--sparsity.options.spread must be a valid number; got 'wide'."),
        ("distill.tokens", 10**13, "--distill.tokens must be 1000000000000 or less; got 10000000000000."),
        ("corpora.drift", "wiki", "--corpora.drift must be a valid list; got 'wiki'."),
        ("logging.artifacts", ["masks", "x"], "--logging.artifacts[1] must be 'masks' or 'model'; got 'x'."),
        ("gprune", 1, "--gprune must be a valid boolean; got 1."),
        ("run.seed", 2**32, "--run.seed must be less than 4294967296; got 4294967296."),
        ("run.dir", ["runs"], "--run.dir must be a valid string; got ['runs']."),
        ("logging.tags", [""], "--logging.tags[0] must have at least 1 character; got ''."),
        ("logging.project", "a/b", "--logging.project must match pattern '^[^/"),
    ],
)  # fmt: skip
def test_an_invalid_value_gives_the_same_message_however_it_is_set(name, value, message, tmp_path):
    for way, get_value in ways_to_set(name, value, tmp_path).items():
        is_nan = value != value
        if way == "command line" and is_nan:  # `json.dumps` writes NaN as a word, which a flag reads as text
            continue
        with pytest.raises(UserError) as error:
            get_value()
        assert str(error.value).startswith(message), way


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparsity.targt", "Unknown setting 'sparsity.targt'. Did you mean 'target'? Available: target, "),
        ("run.zzz", "Unknown setting 'run.zzz'. Available: dir, name, seed, checkpoint_minutes."),
        ("sparsty", "Unknown setting 'sparsty'. Did you mean 'sparsity'? Available: model, "),
        ("seed", "Unknown setting 'seed'. Use --run.seed."),
    ],
)
def test_an_unknown_or_replaced_name_is_refused_however_it_is_set(name, message, tmp_path):
    for way, get_value in ways_to_set(name, 0.3, tmp_path).items():
        with pytest.raises(UserError) as error:
            get_value()
        message_for_stored = f"The settings must be those of this version; they differ in {name}."
        assert (message_for_stored if way == "stored" else message) in str(error.value), way


def test_validate_checks_combinations_of_assigned_values_and_changed_lists():
    cfg = RunConfig()
    cfg.sparsity.limit = "worst"
    with pytest.raises(UserError, match=r"--sparsity\.limit worst needs a --sparsity\.target in quality"):
        cfg.validate()
    cfg.sparsity.target = "+5%"
    cfg.validate()
    cfg.corpora.drift.append(3)
    with pytest.raises(UserError, match=r"--corpora\.drift\[3\] must be a valid string; got 3"):
        cfg.validate()


OTHERS = ["wiki", "web", "stories", "technical", "python_docs"]  # that are evaluated by default


@pytest.mark.parametrize(
    ("flags", "roles", "evaluated"),
    [
        ("--corpora.text a.txt", ["a.txt"] * 4, ["a.txt", *OTHERS]),
        ("--config protocol --corpora.text [a.txt,c4]", ["a.txt c4"] * 4,
         ["a.txt", "c4", "wikitext2", "code_github", "stackexchange", "gsm8k", "stories", "python_docs"]),
        ("--corpora.text a.txt --corpora.recover [web] --corpora.evaluate [a.txt]", ["a.txt"] * 3 + ["web"], ["a.txt"]),
        ("--corpora.recover [web] --corpora.text a.txt", ["a.txt"] * 4, ["a.txt", *OTHERS]),
        ("--corpora.text '{a.txt: 0.7, b.txt: 0.3}'", ["a.txt b.txt"] * 4, ["a.txt", "b.txt", *OTHERS]),
    ],
)  # fmt: skip
def test_ones_own_text_takes_the_roles_that_earlier_flags_and_files_name(flags, roles, evaluated):
    cfg = parse(shlex.split(flags))
    assert [" ".join(getattr(cfg.corpora, role)) for role in ("score", "drift", "learn", "recover")] == roles
    assert cfg.corpora.evaluate == evaluated
    assert cfg.repeat == "auto"
    assert config_from_mapping(cfg.resolved()).settings() == cfg.settings()  # as when a run is resumed


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--corpora.text 5",
      "--corpora.text must be a name, a list of names, or shares by name such as '{a.txt: 0.7, c4: 0.3}'; got 5."),
     ("--corpora.text '{a: 0.7, b: 0.2}'",
      "--corpora.text must have shares above 0 that add up to 1; got {'a': 0.7, 'b': 0.2}, in all 0.9."),
     ("--corpora.text '{a: 1.2, b: -0.2}'",
      "--corpora.text must have shares above 0 that add up to 1; got {'a': 1.2, 'b': -0.2}, in all 1."),
     ("--corpora.text '{a: half}'",
      "--corpora.text must be a name, a list of names, or shares by name such as '{a.txt: 0.7, c4: 0.3}'; got {'a': "
      "'half'}."),
     ("--corpora.evaluate stories --corpora.text a.txt", "--corpora.evaluate must be a valid list; got 'stories'."),
     ("--corpora.evaluate 5 --corpora.text a.txt", "--corpora.evaluate must be a valid list; got 5.")],
)  # fmt: skip
def test_ones_own_text_of_a_wrong_type_is_refused_by_name(flags, message):
    with pytest.raises(UserError) as error:
        parse(shlex.split(flags))
    assert str(error.value) == message


def test_corpora_of_a_mixture_share_windows_and_training_tokens():
    flags = ["--corpora.text={a: 0.7, b: 0.25, c: 0.05}", "--corpora.num_samples=8", "--corpora.seq_len=100"]
    cfg = parse([*flags, "--distill.tokens=60000"])
    assert cfg.corpora.windows_of(["a", "b", "c"], 8, least=2) == {"a": 17, "b": 6, "c": 2}
    assert cfg.corpora.windows_of(["b", "c"], 9) == {"b": 15, "c": 3}  # shares of the corpora that are read
    assert cfg.corpora.windows_of(["a", "b", "c"], cfg.fresh_windows) == {"a": 420, "b": 150, "c": 30}
    assert cfg.settings()["corpora"]["shares"] == {"a": 0.7, "b": 0.25, "c": 0.05}
    equal = parse(["--corpora.text=[a, b, c]", "--corpora.num_samples=8", "--corpora.seq_len=100"])
    assert equal.corpora.windows_of(["a", "b", "c"], 8) == {"a": 8, "b": 8, "c": 8}
    assert "shares" not in equal.settings()["corpora"]
    with pytest.raises(UserError, match=r"--corpora.text must have shares above 0 that add up to 1; got .* 0\.9\."):
        cfg.corpora.text = {"a": 0.7, "b": 0.2}
    with pytest.raises(UserError, match=r"--corpora.text must have a share of each corpus that .*; got none of 'd'"):
        parse([*flags, "--corpora.drift=[a, d]"]).corpora.windows_of(["a", "d"], 1)


def test_ones_own_text_is_short_for_other_flags_and_set_in_python_too():
    by_flag = parse(["--corpora.text=a.txt"])
    assigned = RunConfig()
    assigned.corpora.text = "a.txt"
    own = ["a.txt"]
    long_form = RunConfig(
        corpora=CorporaConfig(score=own, drift=own, learn=own, recover=own, evaluate=[*own, *OTHERS]),
        distill={"repeat": "auto"},
    )
    assert by_flag.settings() == assigned.settings() == RunConfig(corpora={"text": "a.txt"}).settings()
    assert by_flag.settings() == long_form.settings()
    by_flag.distill.repeat = False
    assert by_flag.repeat is False
    assert RunConfig().settings()["distill"]["repeat"] is False


def test_flags_accept_how_sweeps_of_wandb_write_null_and_whole_numbers():
    cfg = parse(["--corpora.learn_samples=None", "--corpora.score=None", "--sparsity.epochs=2.0", "--ridge=1.0"])
    assert (cfg.corpora.learn_samples, cfg.corpora.score, cfg.sparsity.epochs, cfg.ridge) == (None, None, 2, 1.0)
    with pytest.raises(UserError, match=r"--sparsity\.epochs must be a valid integer; got 2\.5"):
        parse(["--sparsity.epochs=2.5"])


def test_two_hyphens_are_the_value_of_a_flag():
    """argparse of Python 3.11 would replace them by an empty list."""
    assert parse(["--run.name=--"]).run.name == "--"


def test_files_and_flags_merge_from_left_to_right(tmp_path):
    (tmp_path / "a.yaml").write_text("importance: wifv\nsparsity: {target: 0.2, epochs: 3, start: owl}\n")
    (tmp_path / "b.yaml").write_text("sparsity: {target: 0.4}\nsparsity.options: {multiple: 3}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    cfg = parse([*files, "--sparsity.options.spread", "0.1", "--run.seed=3", "--model={dtype: bfloat16}"])
    assert (cfg.importance, cfg.sparsity.target, cfg.sparsity.epochs, cfg.run.seed) == ("wifv", 0.4, 3, 3)
    assert (cfg.sparsity.options, cfg.model.dtype) == ({"multiple": 3, "spread": 0.1}, "bfloat16")
    assert parse([*files, "--sparsity.options={spread: 0.1}"]).sparsity.options == {"spread": 0.1}


def test_the_output_of_print_config_is_a_valid_file_of_flags(tmp_path, capsys):
    flags = ["--sparsity.target=0.3", "--recovery=[bias]", "--run.name=a #b"]
    with pytest.raises(SystemExit) as stop:
        parse([*flags, "--print_config"])
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert stop.value.code == 0
    assert parse(["--config", str(tmp_path / "a.yaml")]) == parse(flags) != parse([])


def test_print_config_can_skip_default_values(capsys):
    with pytest.raises(SystemExit):
        parse(["--print_config=skip_default", "--ridge=3e-5", "--distill.tokens=9000"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["ridge"], printed["distill"]) == (3e-5, {"tokens": 9000})
    assert config_from_mapping(printed) == RunConfig(ridge=3e-5, distill={"tokens": 9000})
    assert not printed.keys() & {"model", "corpora", "recovery"}


@pytest.mark.parametrize("setting", ["trainer.callbacks", "trainer.logger"])
def test_class_paths_in_flags_and_files_are_data_and_are_not_imported(setting, tmp_path, monkeypatch):
    (tmp_path / "module_of_a_stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    value = [{"class_path": "module_of_a_stranger.Callback", "init_args": {"every": 3e-5}}]
    for way, get_value in ways_to_set(setting, value, tmp_path).items():
        if way != "stored":
            assert [item.model_dump() if hasattr(item, "model_dump") else item for item in get_value()] == value, way
    assert "module_of_a_stranger" not in sys.modules


# --- values derived from the settings -----------------------------------------------------------------------------


def test_the_default_configuration_is_valid_and_logs_offline(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert parse([]) == RunConfig()
    RunConfig().check_names()
    assert (RunConfig().logging.resolved_mode, RunConfig().model.trust_remote_code) == ("offline", False)


def test_settings_and_generated_run_names_exclude_the_run_folder_logging_and_export():
    """Two devices and two nodes are the same setting: the number of processes."""
    plain = RunConfig()
    with_other_output = RunConfig(
        run=RunFolderConfig(dir="/somewhere", name="mine"), logging=LoggingConfig(mode="disabled", tags=["x"]),
        export="none", dry_run=True,
    )  # fmt: skip
    assert "logging" not in plain.settings()
    assert plain.settings() == with_other_output.settings()
    assert with_other_output.run_name == "mine"
    assert with_other_output.model_copy(update={"run": RunFolderConfig(dir="/somewhere")}).run_name == plain.run_name
    two_devices, two_nodes = (RunConfig(trainer=t) for t in (TrainerConfig(devices=2), TrainerConfig(num_nodes=2)))
    assert two_devices.settings() == two_nodes.settings() != plain.settings()


def test_run_names_are_equal_only_for_equal_settings():
    changes = [
        {}, {"sparsity.target": 0.4}, {"sparsity.target": 0.3000001}, {"sparsity.epochs": 5}, {"gprune": False},
        {"sparsity.width_multiple": 8}, {"sparsity.scope": "attention+ffn"}, {"sparsity.allocation": "owl"},
        {"sparsity.start": "owl"}, {"sparsity.protect": [0]}, {"importance": "wifv"}, {"run.seed": 1},
        {"sparsity.allocation": "owl", "sparsity.options.multiple": 7}, {"corpora.drift": ["wiki", "web"]},
        {"sparsity.allocation": "owl", "sparsity.options.spread": 0.1}, {"corpora.num_samples": 17},
        {"partition.method": "random"}, {"reliability.switch": False}, {"recovery": "least_squares"}, {"ridge": 0.1},
        {"sparsity.loss": "kl"}, {"sparsity.offset_learning_rate": 0.2}, {"corpora.learn_samples": 16},
        {"reliability.everywhere": True}, {"sparsity.centred": False}, {"evaluation.split": "development"},
        {"evaluation.num_samples": 9}, {"trainer.devices": 2}, {"sparsity.scope": "ffn+blocks"},
        {"sparsity.scope": "ffn+blocks", "sparsity.block_share": 0.5},
        {"sparsity.scope": "ffn+blocks", "sparsity.block_choice": "influence"},
    ]  # fmt: skip
    names = [config_from_mapping(change).run_name for change in changes]
    assert names == [config_from_mapping(change).run_name for change in changes]
    assert len(set(names)) == len(names)
    assert config_from_mapping({"importance": "wifv"}).run_name.startswith("smollm2-135m-gprune-wifv-0.3-")
    assert config_from_mapping({"gprune": False}).run_name.startswith("smollm2-135m-base-")


@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        ({}, {}), ({"allocation": "reconstruction"}, {"strength": 0.75}),
        ({"start": "owl"}, {"multiple": 5, "spread": 0.08}),
        ({"allocation": "owl", "options": {"multiple": 7}}, {"multiple": 7, "spread": 0.08}),
    ],
)  # fmt: skip
def test_settings_have_all_options_of_the_allocation(sparsity, options):
    settings = config_from_mapping({"sparsity": sparsity}).settings()
    assert settings["sparsity"]["options"] == options
    assert config_from_mapping({"sparsity": sparsity | {"options": options}}).settings() == settings


def test_scopes_are_sorted_and_only_scopes_with_blocks_have_block_settings():
    """Older records have no block settings. They still match, because scopes without blocks have none either."""
    without_blocks, with_blocks = (
        config_from_mapping({"sparsity.scope": scope}) for scope in ("ffn+attention", "blocks+ffn+attention")
    )
    assert (without_blocks.sparsity.scope, with_blocks.sparsity.scope) == ("attention+ffn", "attention+ffn+blocks")
    added = with_blocks.settings()["sparsity"].keys() - without_blocks.settings()["sparsity"].keys()
    assert added == {"block_share", "block_choice"}
    with_block_share = config_from_mapping({"sparsity": {"scope": "attention+ffn", "block_share": 0.5}})
    assert without_blocks.settings() == with_block_share.settings()


@pytest.mark.parametrize(
    ("importance", "recovery", "needs"),
    [
        ("wanda_sp", "none", set()), ("wanda_sp", "bias", set()), ("wanda_sp", "least_squares", {"gram"}),
        ("taylor", "none", {"saliency"}), ("taylor", "least_squares", {"gram", "saliency"}),
    ],
)  # fmt: skip
def test_needed_statistics_are_those_of_the_metric_and_the_recovery(importance, recovery, needs):
    assert RunConfig(importance=importance, recovery=recovery).needs == needs


def test_calibration_corpora_are_refused_for_evaluation_on_train_text():
    cfg = config_from_mapping({"evaluation.split": "train", "corpora.evaluate": ["stories", "web"]})
    with pytest.raises(UserError, match=r"--evaluation\.split train needs .*; got 'web'"):
        cfg.check_names()
    cfg.corpora.evaluate = ["stories"]
    cfg.check_names()


@pytest.mark.parametrize("path", [path for path in YAML if not re.search("^(rows|parameters):", YAML[path], re.M)])
def test_every_shipped_file_of_flags_parses_and_only_default_yaml_has_all_defaults(path):
    """Lists and sweeps are not files of flags. Other tests parse their rows."""
    assert (parse(["--config", str(ROOT / path)]) == RunConfig()) == path.endswith("/default.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "gprune/configs").glob("*.yaml")))
def test_shipped_configurations_load_by_name_unless_a_file_has_that_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = parse(["--config", str(ROOT / f"gprune/configs/{name}.yaml")])
    assert parse(["--config", name]) == by_path != RunConfig()
    (tmp_path / name).mkdir()  # a folder of that name is ignored
    assert parse([f"--config={name}"]) == by_path
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("ridge: 0.5")
    assert parse(["--config", name]) == RunConfig(ridge=0.5)
    assert parse(["--config", f"./{name}"]) == RunConfig(ridge=0.5)
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gprune"]
    assert "configs/*.yaml" in package


def test_the_recipes_name_their_text_and_embedded_names_another_one(caplog):
    trained, untrained = parse(["--config", "trained"]), parse(["--config", "untrained"])
    assert trained.corpora.shares == untrained.corpora.shares
    assert sum(trained.corpora.shares.values()) == pytest.approx(1)
    assert untrained.recovery == "least_squares"
    untrained.recovery, untrained.distill = trained.recovery, trained.distill
    assert untrained == trained
    offline = parse(["--config", "trained", "--config", "embedded"])
    assert all(map(is_local, offline.train_corpora))
    assert offline.distill == trained.distill
    own = parse(["--config", "trained", "--corpora.text", "mine.jsonl"])
    assert own.train_corpora == ["mine.jsonl"]
    assert own.corpora.shares == {}
    assert parse(["--config", "best"]) == trained
    assert [record.message for record in caplog.records] == [
        "--config best is now --config trained, which also names its text."
    ]
    recipe = parse(["--config", str(ROOT / "experiments/recipe.yaml")])
    for name in ("importance", "gprune", "recovery", "distill"):
        assert getattr(recipe, name) == getattr(trained, name)
    assert recipe.sparsity == trained.sparsity


class Unexpected:
    """An object of an unexpected type."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: RunConfig(sparsity=CorporaConfig()),
            "--sparsity must be a mapping of names to values; got CorporaConfig",
        ),
        (lambda: RunConfig(ridge=Unexpected()), "--ridge must be a valid number; got <"),
        (lambda: SparsityConfig(target=np.array([0.5])), "--sparsity.target"),
        (lambda: gprune.prune({}), "The configuration must be a RunConfig"),
        (lambda: gprune.load_run(None), "The run must be the path of a run folder"),
        (
            lambda: gprune.prune(RunConfig(), [Unexpected]),
            "Callbacks must be objects of lightning.pytorch.Callback; got <",
        ),
        (lambda: gprune.apply_masks(Unexpected(), None), "a model of transformers; got <"),
    ],
)
def test_misuse_of_the_python_api_is_refused_in_one_line(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_numpy_torch_and_path_values_become_plain_python_values():
    cfg = RunConfig(
        importance=np.str_("wifv"), ridge=np.float64(0.5), gprune=np.bool_(False), run={"dir": Path("a/b")},
        sparsity={"protect": np.array([0, 1]), "epochs": np.int64(3), "width_multiple": torch.tensor(8)},
        corpora={"drift": [np.str_("wiki"), Path("c/d.txt")], "learn": np.array(["wiki", "web"])},
        recovery=[np.str_("least_squares"), np.str_("distill")],
    )  # fmt: skip
    cfg.corpora.recover = ("wiki", Path("web"))
    assert yaml.safe_load(to_yaml(cfg.model_dump())) == json.loads(json.dumps(cfg.model_dump()))
    assert (cfg.run.dir, cfg.corpora.drift, cfg.sparsity.protect) == ("a/b", ["wiki", "c/d.txt"], [0, 1])
    assert (cfg.corpora.recover, cfg.recovery) == (["wiki", "web"], "least_squares+distill")
    assert {type(value) for value in (cfg.importance, cfg.corpora.learn[0], cfg.run.dir)} == {str}
    assert (type(cfg.ridge), type(cfg.gprune), type(cfg.sparsity.epochs)) == (float, bool, int)


def test_settings_of_a_byte_budget_include_only_export_flags_that_change_bytes():
    def settings_with(**export):
        return config_from_mapping({"sparsity": {"target": "200MiB"}, "export": export}).settings()

    assert settings_with(format="hf") == settings_with(format="none") == settings_with(format="hf", type="q8_0")
    exports_of_different_size = ({}, {"dtype": "float16"}, {"format": "gguf"}, {"format": "gguf", "type": "q8_0"})
    assert len({str(settings_with(**export)) for export in exports_of_different_size}) == 4


def test_seconds_and_bytes_are_currencies_like_others():
    seconds, file_size = (
        config_from_mapping({"sparsity.target": 0.3, "sparsity.cost": name}) for name in ("seconds", "bytes")
    )
    assert (seconds.sparsity.currency, file_size.sparsity.currency) == ("seconds", "bytes")
    assert file_size.settings()["export"] == {"dtype": None}


# --- flags that the chosen method does not use ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--distill.rank=8", "--distill.rank (--distill.targets all)"),
        ("--export=none --export.dtype=float16", "--export.dtype (--export.format none)"),
        ("--export=none --export.dtype=float16 --sparsity.target=400KiB", ""),
        ("--gprune=false --sparsity.epochs=1 --partition.steps=3 --recovery=none --distill.kl=1 --ridge=1",
         "--distill.kl, --ridge (--recovery none); --partition.steps, --sparsity.epochs (--gprune false)"),
        ("--gprune=false --corpora.drift=[wiki] --corpora.learn=[web]",
         "--corpora.drift, --corpora.learn (--gprune false)"),
        ("--gprune=false --corpora.drift=[wiki] --sparsity.scope=ffn+blocks", ""),
        ("--reliability.switch=false --reliability.metric=random --sparsity.allocation=owl --sparsity.loss=kl",
         "--reliability.metric (--reliability.switch false); --sparsity.loss (--sparsity.allocation owl)"),
        ("--recovery=[bias,distill] --ridge=1 --distill.tokens=8000", "--ridge (--recovery bias+distill)"),
        ("--sparsity.allocation=global --sparsity.start=owl", "--sparsity.start (--sparsity.allocation global)"),
        ("--sparsity.learn=offsets --sparsity.learning_rate=5 --sparsity.offset_limit=2",
         "--sparsity.learning_rate (--sparsity.learn offsets)"),
        ("--sparsity.offset_limit=9 --partition.method=initial --partition.steps=9 --partition.drift_weight=2",
         "--partition.steps (--partition.method initial); --sparsity.offset_limit (--sparsity.learn thresholds)"),
        ("--sparsity.block_share=0.5 --sparsity.expert_metric=random",
         "--sparsity.block_share, --sparsity.expert_metric (--sparsity.scope ffn)"),
        ("--sparsity.allocation=reconstruction --recovery=none --ridge=1", ""),
        ("--sparsity.start=owl --sparsity.options.spread=0.1 --distill.targets=lora --distill.rank=8", ""),
    ],
)  # fmt: skip
def test_given_flags_that_the_method_does_not_use_are_refused_with_the_reason_unless_allowed(flags, expected, tmp_path):
    (tmp_path / "a.yaml").write_text("distill: {rank: 4}\nsparsity.epochs: 3\n")  # settings of files are not refused
    args = [f"--config={tmp_path / 'a.yaml'}", *flags.split()]
    if not expected:
        return parse(args).check_used(given_flags(args))
    with pytest.raises(UserError) as error:
        run([*args, "--corpora.evaluate=[none-such]"])  # nothing is loaded before
    assert str(error.value) == f"The run cannot use {expected}. Remove these flags, or add --allow_unused true."
    with pytest.raises(UserError, match="none-such"):
        run([*args, "--corpora.evaluate=[none-such]", "--allow_unused=true"])


def test_a_row_that_sets_what_its_method_does_not_use_is_refused_and_settings_of_all_rows_are_not(tmp_path):
    (tmp_path / "list.yaml").write_text(
        "common: {sparsity.epochs: 2, gprune: false}\nrows: {a: {}, b: {partition: {steps: 3}}, c: {gprune: true}}\n"
    )
    a, b, c = Listing.read(tmp_path / "list.yaml").rows
    a.check()
    c.check()
    with pytest.raises(UserError, match=r"^Row 'b': The run cannot use --partition\.steps \(--gprune false\)"):
        b.check()
    assert "--allow_unused=true" in a.command
    assert "--allow_unused" not in c.command
