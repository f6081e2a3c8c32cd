"""What identifies the user's code: bytes of files, and in notebooks the definitions and constants that a run uses."""

from __future__ import annotations

import importlib
import runpy
import sys
from hashlib import sha256
from types import ModuleType

import pytest
from IPython.core.interactiveshell import InteractiveShell

import gprune
from gprune import user_code
from gprune.importance import IMPORTANCE
from gprune.recoveries import RECOVERY
from gprune.user_code import changed_code, code_at, code_of, compare_code
from tests import tiny_run
from tests.world import restored

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
    monkeypatch.setattr(user_code, "IMPORTED", [])
    folder = tmp_path / "code_of_mine"
    folder.mkdir()
    for name, source in {"__init__": "", "metric": METRIC, "helper": "FACTOR = 1\n", "unused": "X = 1\n"}.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with restored(IMPORTANCE):
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
        ("metric", "  # a comment", "", "code_of_mine.metric"),
        ("helper", "1", "2", "code_of_mine.helper"),
        ("__init__", "", "import torch", "code_of_mine"),
        ("unused", "1", "2", None),
    ],
)
def test_code_is_the_bytes_of_the_files_of_a_module_and_of_its_imports(file, old, new, changed, package):
    before = imported_code()
    names = {"code_of_mine": "__init__", "code_of_mine.metric": "metric", "code_of_mine.helper": "helper"}
    assert before == {name: sha256((package / f"{of}.py").read_bytes()).hexdigest() for name, of in names.items()}
    path = package / f"{file}.py"
    path.write_text(path.read_text().replace(old, new, 1))
    after = imported_code()
    assert changed_code(before, after) == ([f"the code of {changed} has changed"] if changed else [])
    assert compare_code(before, after) == ("other" if changed else "same")


def test_an_import_in_a_try_statement_counts(package):
    path = package / "metric.py"
    optional_import = "try:\n    from code_of_mine import helper\nexcept ImportError:\n    helper = None\n"
    path.write_text(path.read_text().replace("from code_of_mine import helper\n", optional_import))
    assert "code_of_mine.helper" in imported_code()


def test_relative_imports_of_a_package_that_loads_its_modules_lazily_count(package):
    """As transformers does where it lies outside of site-packages: the package replaces itself by a bare module."""
    (package / "__init__.py").write_text(
        "import sys, types\nfrom . import unused\nlazy = types.ModuleType(__name__)\nlazy.__spec__ = __spec__\n"
        "lazy.__file__, lazy.__path__ = __file__, __path__\nsys.modules[__name__] = lazy\n"
    )
    assert "code_of_mine.unused" in imported_code()


def test_an_imported_module_counts_as_it_was_imported_until_it_is_reloaded(package):
    """A file that is edited during a run does not change what the run records."""
    before = imported_code()
    path = package / "helper.py"
    path.write_text("FACTOR = 3\n")
    assert IMPORTANCE.code("coded") == before
    importlib.reload(sys.modules["code_of_mine.helper"])
    assert IMPORTANCE.code("coded") != before


def test_a_class_path_has_the_code_of_its_module_and_is_unknown_if_it_is_not_loaded(package):
    importlib.import_module("code_of_mine.helper")
    assert code_at("code_of_mine.helper.Mine") == {"code_of_mine.helper.Mine": None}
    importlib.import_module("code_of_mine.metric")
    assert code_at("code_of_mine.metric.scaled").keys() == imported_code().keys()


def test_functions_and_classes_of_gprune_and_lightning_have_no_code_of_the_user():
    from lightning.pytorch.callbacks import Timer

    assert IMPORTANCE.code("wanda_sp") == code_of(Timer) == {}


def test_functions_of_a_script_have_the_code_of_its_file(package):
    script = package.parent / "script.py"
    script.write_text("from code_of_mine import helper\ndef score(weights): return weights\n")
    main = ModuleType("__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", main)
        main.__file__ = str(script)
        vars(main).update(runpy.run_path(str(script), run_name="__main__") | {"__file__": str(script)})
        assert code_of(main.score).keys() == {"__main__", "code_of_mine", "code_of_mine.helper"}


def test_a_function_without_source_code_has_an_unknown_hash(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", main := ModuleType("__main__"))
    exec("def score(weights): return weights", vars(main))
    assert code_of(main.score) == {"__main__.score": None}


@pytest.fixture
def run_cell(monkeypatch):
    """Return a function that runs a cell in `__main__` as a notebook does, and returns the variables."""
    monkeypatch.setitem(sys.modules, "__main__", main := ModuleType("__main__"))
    shell = InteractiveShell(user_module=main)

    def run(cell: str) -> dict:
        shell.run_cell(cell, store_history=True).raise_error()
        return vars(main)

    return run


CELL = """
import torch
from math import sqrt
ALPHA, WEIGHTS, unused = 0.5, {"a": [1, 2]}, 1
def root(x):
    return sqrt(x) * ALPHA
def power(p):
    return lambda x: x ** p
square = power(2)
class Base:
    RATE = 3
class Stage(Base):
    def loss(self, x):
        return [root(y) + WEIGHTS["a"][0] + self.RATE for y in square(x)]
class Scorer:
    def score(self, x, scale=torch.tensor(1.0)):
        x = 2  # local
        return Stage().loss(x)
"""


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("Stage().loss(x)", "-Stage().loss(x)", "Scorer"),
        ("tensor(1.0)", "tensor(2.0)", "Scorer"),
        ("self.RATE for", "2 * self.RATE for", "Stage"),
        ("RATE = 3", "RATE = 4", "Base"),
        ("sqrt(x) *", "sqrt(x) +", "root"),
        ("0.5", "0.6", "ALPHA"),
        ("[1, 2]", "[1, 3]", "WEIGHTS"),
        ("power(2)", "power(3)", "square"),
        ("x ** p", "x ** -p", "power"),
        ("# local", "# a comment", None),
        (", 1\n", ", 2\nx = 5\n", None),
    ],
)
def test_code_of_a_notebook_is_what_a_class_refers_to(old, new, changed, run_cell):
    first, again = (code_of(run_cell(CELL)["Scorer"]) for _ in range(2))
    assert first == again
    assert first.keys() == {
        f"__main__.{name}" for name in ("Scorer", "Stage", "Base", "root", "square", "power", "ALPHA", "WEIGHTS")
    }
    assert CELL.count(old) == 1
    edited = code_of(run_cell(CELL.replace(old, new))["Scorer"])
    assert changed_code(first, edited) == ([f"the code of __main__.{changed} has changed"] if changed else [])


NOTEBOOK = """
import gprune, torch
from gprune.stages.base import FrozenLMStage
from gprune.stages.threshold_learning import ThresholdLearning
SCALE = 1.0
class Tuning(FrozenLMStage):
    def __init__(self, dense, pruned):
        super().__init__(dense)
        self.student = pruned.requires_grad_()
    def training_step(self, batch, index):
        return self.student(batch["input_ids"], labels=batch["input_ids"]).loss
    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)
@gprune.recovery("tuned")
class Tuned(gprune.Recovery):
    learns = True
    def tokens(self, text, fresh, *, attention):
        return 0, fresh
    def tune(self, material, pruned):
        material.fit("Tuning", Tuning(material.dense, pruned))
        return pruned.requires_grad_(False)
class Learner(ThresholdLearning):
    def configure_optimizers(self):
        return torch.optim.SGD(self.learned_thresholds, lr=30 * SCALE)
"""


@pytest.mark.filterwarnings("ignore:.*in eval mode")  # of Lightning, which the command line keeps quiet
def test_a_run_of_a_notebook_is_repeated_after_its_code_or_a_constant_has_changed(world, tmp_path, run_cell):
    """The loss of a class that a recovery uses, and a constant that a learner reads, are no part of a class's path."""
    flags = ["--recovery=tuned", "--distill.tokens=512", "--evaluation.before_recovery=false", "--export=none"]
    args = [flag for flag in world.args(tmp_path, *flags) if not flag.startswith("--run.name")]

    def run(cell: str, **settings: str) -> gprune.PruningResult:
        learner = run_cell(cell)["Learner"]
        cfg = gprune.config.parse(args)
        cfg.run.name = settings.get("name")
        return gprune.prune(cfg, learner=learner)

    with tiny_run.isolated(tmp_path / "cache"), restored(RECOVERY):
        first, again = run(NOTEBOOK), run(NOTEBOOK)
        assert again.path == first.path
        loss = run(NOTEBOOK.replace(".loss\n", ".loss * 0\n"))
        constant = run(NOTEBOOK.replace("SCALE = 1.0", "SCALE = 1e-9"))
        assert len({first.path, loss.path, constant.path}) == 3
        assert first.masks == loss.masks != constant.masks
        assert first.records[-1]["nll"] != loss.records[-1]["nll"]
        run(NOTEBOOK, name="named")
        message = f"{tmp_path}/named: it has a run with other code: the code of __main__.SCALE has changed. Choose "
        with pytest.raises(gprune.UserError, match=message):
            run(NOTEBOOK.replace("SCALE = 1.0", "SCALE = 2.0"), name="named")


def test_code_is_compared_by_its_known_parts():
    one, two, three, old = "1" * 64, "2" * 64, "3" * 64, "4" * 16
    known, edited, unreadable = {"a": one, "b": two}, {"a": one, "b": three}, {"a": one, "b": None}
    assert compare_code({}, {}) == "same"
    assert compare_code(known, edited) == compare_code(unreadable, {"a": three}) == "other"
    assert compare_code(known, {"a": one}) == "other"
    assert compare_code(known, unreadable) == compare_code(known, {}) == compare_code({}, known) == "unknown"
    assert compare_code({"a": old}, known) == compare_code({"__main__": old}, known) == "unknown"
    assert changed_code({"a": old}, {"a": one}) == ["the code of a was recorded in another form by an earlier version"]
