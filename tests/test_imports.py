"""Help, early errors and the first line of a run do not import PyTorch, checked in a fresh process."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gprune
import gprune.report
from gprune import __main__ as command
from tests.tiny_run import environment

ROOT = Path(__file__).parent.parent
REQUIRED = re.findall(r"^[a-z-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
HEAVY = {name.replace("scikit-learn", "sklearn") for name in REQUIRED} | {"numpy"}
# jsonargparse and pydantic read flags. Of safetensors only an error class is imported, without numpy or torch.
HEAVY -= {"jsonargparse", "pydantic", "safetensors"}
MAX_PACKAGES = 13  # packages outside the standard library: jsonargparse, pydantic and their dependencies
COUNT_IMPORTS = """
import json, sys
before = {name.partition(".")[0] for name in sys.modules}  # imported by site and coverage
def print_imports():
    found = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
    sys.stderr.write(json.dumps(sorted(name for name in found if not name.startswith("_"))))
"""
MAIN = "from gprune.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    print_imports()"
TRAIN = COUNT_IMPORTS + MAIN
# The process ends before the first heavy import.
FIRST_LINE = "import gprune.cli as cli\ncli.quiet = lambda: (print_imports(), sys.exit(0))\ncli.main(sys.argv[1:])"
OWN_METRIC = "import gprune\n@gprune.metric('mine', activation_free=True)\ndef mine(weights, moments, generator): ...\n"
COMMANDS = """
from gprune.__main__ import main
for name in sys.argv[1:]:
    try:
        main([name, "--help"])
    except SystemExit:
        pass
print_imports()
"""
STUDY = "from gprune.__main__ import run\nrun('study', sys.argv[1:])\nprint_imports()\n"
REPORT = STUDY.replace("study", "report")


def imported(code: str, *args: str, tmp_path: Path) -> tuple[str, set[str]]:
    """Return the output of a fresh process, and the packages outside the standard library that it imported.

    The code writes a JSON list of the packages at the end of stderr.
    """
    command_line = [sys.executable, "-c", code, *args]
    done = subprocess.run(
        command_line, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    messages, bracket, packages = done.stderr.rpartition("[")
    return done.stdout + messages, set(json.loads(bracket + packages))


@pytest.mark.parametrize(
    ("code", "args", "words"),
    [
        (TRAIN, ["--help"], ["--sparsity.target", "--distill.tokens"]),
        (TRAIN, ["--help_all"], ["at most 5 %"]),
        (TRAIN, ["--print_config"], ["target: 0.3"]),
        (TRAIN, ["--sparsity.start", "owl", "--recovery", "distil"], ["Did you mean 'distill'?"]),
        (COUNT_IMPORTS + COMMANDS, list(command.COMMANDS), [f"usage: gprune {name}" for name in command.COMMANDS]),
        (COUNT_IMPORTS + FIRST_LINE, ["--run.name", "first"], ["smollm2-135m: pruning ffn, target 0.3"]),
        (COUNT_IMPORTS + OWN_METRIC + MAIN, ["--importance", "mine", "--print_config"], ["importance: mine"]),
        (TRAIN, ["--model.name", "nothing"], ["--model.name", "'nothing'", "smollm2-135m"]),
        (TRAIN, ["--corpora.score", "nothing"], ["Unknown corpus 'nothing'"]),
        (TRAIN, ["--run.dir", "/dev/null/runs"], ["Cannot write /dev/null/runs/smollm2-135m"]),
        (
            COUNT_IMPORTS + STUDY,
            ["LIST", "--table", "--output", "t.xlsx"],
            ["--output must end in one of .csv, .json, "],
        ),
        (COUNT_IMPORTS + REPORT, ["runs/nothing"], ["there is no folder 'runs/nothing'"]),
    ],
    ids=[
        "help", "complete help", "settings", "unknown recovery", "help of commands", "first line of a run",
        "registered metric", "unknown model", "unknown corpus", "unwritable folder", "invalid output", "missing run",
    ],
)  # fmt: skip
def test_help_early_errors_and_the_first_line_of_a_run_do_not_import_pytorch(code, args, words, tmp_path):
    output, packages = imported(code, *args, tmp_path=tmp_path)
    assert all(word in output for word in words)
    assert "Run folder: " not in output  # no run was started
    assert not packages & HEAVY
    assert len(packages) <= MAX_PACKAGES, packages


@pytest.mark.parametrize("package", [gprune, gprune.report])
def test_lazily_imported_names_match_the_imports_for_type_checkers(package):
    """Every public name exists, and comes from the module in the `TYPE_CHECKING` block."""
    assert dir(package) == sorted(package.__all__)
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.asname or alias.name: (statement.module, alias.name)
        for statement in block.body
        for alias in statement.names
    }
    for name, (module, origin) in declared.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), origin)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    not_lazy = {alias.asname or alias.name for statement in imports for alias in statement.names}
    not_lazy |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(package.__all__) <= declared.keys() | not_lazy
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_name'"):
        _ = package.no_such_name


def test_no_public_name_shadows_a_subpackage():
    """`import gprune.recoveries.least_squares as x` would be an ImportError if `gprune.recoveries` were a function."""
    assert not {module.name for module in pkgutil.iter_modules(gprune.__path__)} & set(gprune.__all__)


def test_the_package_contains_py_typed():
    assert (Path(gprune.__file__).parent / "py.typed").is_file()
