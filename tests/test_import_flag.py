"""`--import`: commands know what the imported module registers, and no other code is executed."""

from __future__ import annotations

import sys

import pytest

from gprune import user_code
from gprune.__main__ import main
from gprune.config import parse
from gprune.errors import UserError
from gprune.importance import IMPORTANCE
from gprune.runs.results import load_run
from tests import tiny_run
from tests.world import restored

METRIC = """
import gprune

@gprune.metric("norm_of_mine", activation_free=True)
def norm_of_mine(weights, moments, generator):
    return weights.output.norm(dim=0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with the module `metric_of_mine`, and return the folder. Undo imports afterwards."""
    (tmp_path / "metric_of_mine.py").write_text(METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    user_code.IMPORTED.clear()
    with restored(IMPORTANCE):
        yield tmp_path
    user_code.IMPORTED.clear()
    for name in ("metric_of_mine", "raises"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["metric_of_mine", "./metric_of_mine.py"])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.usefixtures("folder")
def test_import_accepts_a_module_name_or_path_before_and_after_the_flag_that_needs_it(name, position):
    args = ["--importance=norm_of_mine"]
    args[position:position] = ["--import", name]
    assert parse(args).importance == "norm_of_mine"


def test_load_run_names_the_import_that_registers_its_metric_and_works_after_it(folder):
    world = tiny_run.make_world(folder)
    with tiny_run.isolated(folder / "cache"), restored(IMPORTANCE):
        flags = ("--import=metric_of_mine", "--importance=norm_of_mine", "--gprune=false", "--export=none")
        assert world.run(folder / "runs", *flags).config.importance == "norm_of_mine"
    sys.modules.pop("metric_of_mine")
    with pytest.raises(UserError, match=r"run: .*Unknown importance metric.* Register it first: import metric_of_mine"):
        load_run(folder / "runs/run")
    assert "metric_of_mine" not in sys.modules  # load_run does not import modules
    (folder / "list.yaml").write_text("rows: {a: {importance: norm_of_mine, gprune: false}}")
    assert main(["study", "list.yaml", "--table", "--import", "metric_of_mine"]) == 0
    assert load_run(folder / "runs/run").config.importance == "norm_of_mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere_at_all", "", "--import nowhere_at_all: .* ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raises", "1 / 0", "--import raises: .* ZeroDivisionError: division by zero"),
        ("raises", "raise SystemExit(3)", "--import raises: .* SystemExit: 3"),
        ("./nowhere.py", "", "--import must be a module or an existing .py file .* other dots; got './nowhere.py'"),
        ("./plugins/", "", "--import must be a module or an existing .py file .*; got './plugins/'"),
        ("./folder.py", "", "--import must be a module or an existing .py file .*; got './folder.py'"),
        ("./my.raises.py", "", "--import must be a module or an existing .py file .*; got './my.raises.py'"),
        ("./json.py", "", "--import ./json.py: .* json is another module"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_the_cause(name, content, message, folder):
    (folder / ("json.py" if name == "./json.py" else "raises.py")).write_text(content)
    (folder / "my.raises.py").touch()
    for subfolder in ("plugins", "folder.py"):
        (folder / subfolder).mkdir()
    with pytest.raises(UserError, match=message):
        parse(["--import", name])


def test_the_key_import_is_refused_in_files_of_flags(folder):
    (folder / "a.yaml").write_text("import: metric_of_mine")
    with pytest.raises(UserError, match=r"Unknown setting 'import'\. Use the command's flag --import"):
        parse(["--config", "a.yaml"])
    assert "metric_of_mine" not in sys.modules
