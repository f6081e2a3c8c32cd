"""Hashes of the user's code: which changes count, in modules, in scripts and in notebooks."""

from __future__ import annotations

import importlib
import linecache
import sys
from types import ModuleType

import pytest

from gprune import user_code
from gprune.importance import IMPORTANCE
from gprune.user_code import code_at, code_of, compare_code
from tests import registries

METRIC = '''"""About the module."""
import gprune
from code_of_mine import helper

@gprune.metric("coded", activation_free=True)
def coded(weights, moments, generator):
    """About the metric."""
    return scaled(weights.output.norm(dim=0))  # a comment

def scaled(scores):
    return helper.FACTOR * scores
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the folder of a package with a metric, which is on the path. Imports are undone afterwards."""
    folder = tmp_path / "code_of_mine"
    folder.mkdir()
    for name, source in {"__init__": "", "metric": METRIC, "helper": "FACTOR = 1\n", "unused": "X = 1\n"}.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with registries.restored(IMPORTANCE):
        yield folder
    forget()


def forget() -> None:
    """Remove the modules of the package, as in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "code_of_mine"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def imported_code() -> dict[str, str | None]:
    """Import the metric as in a new process, and return its code."""
    forget()
    importlib.import_module("code_of_mine.metric")
    return IMPORTANCE.code("coded")


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("metric", "helper.FACTOR *", "-helper.FACTOR *", "code_of_mine.metric"),
        ("helper", "1", "2", "code_of_mine.helper"),
        ("__init__", "", "import torch", "code_of_mine"),
        ("metric", "About the metric", "Edited text", None),
        ("metric", "About the module", "Edited text", None),
        ("metric", "  # a comment", "", None),
        ("unused", "1", "2", None),
    ],
)
def test_code_changes_with_the_statements_of_a_module_and_of_its_imports(file, old, new, changed, package):
    before = imported_code()
    assert set(before) == {"code_of_mine", "code_of_mine.metric", "code_of_mine.helper"}
    path = package / f"{file}.py"
    path.write_text(path.read_text().replace(old, new, 1))
    after = imported_code()
    assert [module for module in before if before[module] != after[module]] == ([changed] if changed else [])
    assert compare_code(before, after) == ("other" if changed else "same")


def test_an_import_in_a_try_statement_counts(package):
    path = package / "metric.py"
    optional_import = "try:\n    from code_of_mine import helper\nexcept ImportError:\n    helper = None\n"
    path.write_text(path.read_text().replace("from code_of_mine import helper\n", optional_import))
    assert "code_of_mine.helper" in imported_code()


def test_an_imported_module_counts_as_it_was_imported_until_it_is_reloaded(package):
    """A file that is edited during a run does not change what the run records."""
    before = imported_code()
    path = package / "helper.py"
    path.write_text("FACTOR = 3\n")
    assert IMPORTANCE.code("coded") == before
    importlib.reload(sys.modules["code_of_mine.helper"])
    assert IMPORTANCE.code("coded") != before


def test_the_code_of_a_class_is_that_of_its_module_when_it_was_imported(package, monkeypatch):
    monkeypatch.setattr(user_code, "IMPORTED", [])
    (package.parent / "code_of_mine_too.py").write_text("class Mine:\n    RATE = 1\n")
    user_code.import_user_module(str(package.parent / "code_of_mine_too.py"))
    (package.parent / "code_of_mine_too.py").write_text("class Mine:\n    RATE = 2\n")
    code = code_at("code_of_mine_too.Mine")
    del sys.modules["code_of_mine_too"]
    assert code_at("code_of_mine_too.Mine") == {"code_of_mine_too.Mine": None}
    linecache.checkcache()
    importlib.invalidate_caches()
    user_code.import_user_module(str(package.parent / "code_of_mine_too.py"))
    assert compare_code(code, code_at("code_of_mine_too.Mine")) == "other"
    del sys.modules["code_of_mine_too"]


def test_functions_and_classes_of_gprune_and_lightning_have_no_code_of_the_user():
    from lightning.pytorch.callbacks import Timer

    assert IMPORTANCE.code("wanda_sp") == code_of(Timer) == {}


def notebook(*cells: str) -> dict:
    """Run cells as a notebook does, whose sources are in `linecache`, and return the variables."""
    module = ModuleType("__main__")
    for number, cell in enumerate(cells):
        file = f"<cell {number} of {id(module)}>"
        linecache.cache[file] = (len(cell), None, cell.splitlines(keepends=True), file)
        exec(compile(cell, file, "exec"), vars(module))
    return vars(module)


CELL = """
class Scorer:
    def score(self, x): return x ** 2
unused = 1
"""


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("x ** 2", "x ** 3", True),
        ("unused = 1", "unused = 2  # and a comment", False),
        ("class Scorer:\n", 'class Scorer:\n    "About the class."\n', False),
    ],
)
def test_code_of_a_notebook_is_that_of_the_function_or_class(old, new, changes):
    cells = (CELL, CELL, CELL.replace(old, new))
    first, same, edited = (code_of(notebook(cell)["Scorer"], "__main__") for cell in cells)
    assert first.keys() == {"__main__"}
    assert first == same
    assert (first != edited) == changes


def test_a_function_without_source_code_has_an_unknown_hash():
    variables = {"__name__": "__main__"}
    exec("def score(weights): return weights", variables)
    assert code_of(variables["score"], "__main__") == {"__main__": None}


def test_code_is_compared_by_its_known_parts():
    known, edited, unreadable = {"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "b": None}
    assert compare_code({}, {}) == "same"
    assert compare_code(known, edited) == compare_code(unreadable, {"a": "5"}) == "other"
    assert compare_code(known, {"a": "1"}) == "other"
    assert compare_code(known, unreadable) == compare_code(known, {}) == compare_code({}, known) == "unknown"
