"""Help, refusals and the first line of a run wait for no PyTorch: counted by what a fresh process imports."""

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
HEAVY -= {"pydantic", "safetensors"}  # what checks flags; and a class of errors, without numpy or torch
MOST = 12  # packages beside the standard library: what checks flags, and what that needs
IMPORTED = """
import json, sys
before = {name.partition(".")[0] for name in sys.modules}  # by site, and by what is installed for coverage
def told():
    found = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
    sys.stderr.write(json.dumps(sorted(name for name in found if not name.startswith("_"))))
"""
MAIN = "from gprune.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    told()"
TRAIN = IMPORTED + MAIN
# The process ends where it would begin to import what is heavy.
FIRST_LINE = "import gprune.cli as cli\ncli.quiet = lambda: (told(), sys.exit(0))\ncli.main(sys.argv[1:])"
OWN = "import gprune\n@gprune.metric('mine', activation_free=True)\ndef mine(weights, moments, generator): ...\n"
COMMANDS = """
from gprune.__main__ import main
for name in sys.argv[1:]:
    try:
        main([name, "--help"])
    except SystemExit:
        pass
told()
"""


STUDY = "from gprune.__main__ import run\nrun('study', sys.argv[1:])\ntold()\n"
REPORT = STUDY.replace("study", "report")


def imported(code: str, *args: str, tmp_path: Path) -> tuple[str, set[str]]:
    """Stdout and stderr of a fresh process, and the packages outside the standard library that it imported."""
    run = [sys.executable, "-c", code, *args]
    done = subprocess.run(run, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    *lines, last = done.stderr.splitlines()
    said, mark, packages = last.rpartition("[")
    return done.stdout + "\n".join([*lines, said]), set(json.loads(mark + packages))


@pytest.mark.parametrize(
    ("code", "args", "words"),
    [
        (TRAIN, ["--help"], ["--sparsity.target"]),
        (TRAIN, ["--print_config"], ["target: 0.5"]),
        (TRAIN, ["--sparsity.start", "owl", "--recovery", "distil"], ["Did you mean 'distill'?"]),
        (IMPORTED + COMMANDS, list(command.COMMANDS), [f"usage: gprune {name}" for name in command.COMMANDS]),
        (IMPORTED + FIRST_LINE, ["--run.name", "first"], ["smollm2-135m: pruning ffn, target 0.5"]),
        (IMPORTED + OWN + MAIN, ["--importance", "mine", "--print_config"], ["importance: mine"]),
        (TRAIN, ["--model.name", "nothing"], ["--model.name", "'nothing'", "smollm2-135m"]),
        (TRAIN, ["--corpora.score", "nothing"], ["Unknown corpus 'nothing'"]),
        (TRAIN, ["--run.dir", "/dev/null/runs"], ["Cannot write /dev/null/runs/smollm2-135m"]),
        (IMPORTED + STUDY, ["LIST", "--table", "--output", "t.xlsx"], ["--output must end in one of .csv, .json, "]),
        (IMPORTED + REPORT, ["runs/nothing"], ["there is no folder 'runs/nothing'"]),
    ],
    ids=[
        "help",
        "settings",
        "refusal",
        "commands",
        "first line",
        "own metric",
        "model",
        "corpus",
        "folder",
        "output",
        "run",
    ],
)
def test_help_and_refusals_wait_for_no_pytorch(code, args, words, tmp_path):
    said, packages = imported(code, *args, tmp_path=tmp_path)
    assert all(one in said for one in words)
    assert "Run folder: " not in said
    assert not packages & HEAVY
    assert len(packages) <= MOST, packages


@pytest.mark.parametrize("package", [gprune, gprune.report])
def test_names_that_are_imported_later_are_those_that_type_checkers_see(package):
    """Every public name is there, and comes from where the imports for type checkers say."""
    assert dir(package) == sorted(package.__all__)
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {(one.asname or one.name): (line.module, one.name) for line in block.body for one in line.names}
    for name, (module, origin) in told.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), origin)
    eager = {one.asname or one.name for node in tree.body if isinstance(node, ast.ImportFrom) for one in node.names}
    eager |= {one.id for node in tree.body for one in ast.walk(node) if isinstance(one, ast.Name)}
    assert set(package.__all__) <= told.keys() | eager
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_name'"):
        _ = package.no_such_name


def test_no_public_name_hides_a_package():
    """`import gprune.recoveries.least_squares as x` would be an ImportError if `gprune.recoveries` were a function."""
    assert not {room.name for room in pkgutil.iter_modules(gprune.__path__)} & set(gprune.__all__)


def test_type_checkers_may_read_the_package():
    assert (Path(gprune.__file__).parent / "py.typed").is_file()
