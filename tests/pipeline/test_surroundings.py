"""The same numbers, and at most a line on stderr, wherever a run takes place: a fresh process in each surrounding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import ROOT, environment, on_a_terminal

pytestmark = pytest.mark.slow
GERMAN = "import locale\nlocale.setlocale(locale.LC_ALL, '')\nassert locale.localeconv()['decimal_point'] == ','\n"
RC = "text.usetex: True\nfont.family: Comic Sans MS\nsavefig.format: pdf\nbackend: QtAgg\n"


# A run of W&B of somebody's own, who goes on with it afterwards.
OPEN = """
import sys, wandb
run = wandb.init(project="mine", mode="offline", dir=sys.argv[1], settings=wandb.Settings(silent=True))
from gprune.cli import main
code = main(sys.argv[2:])
run.log({"mine": 1})
run.finish()
sys.exit(code)
"""


def command(folder: Path, *program: object) -> list[object]:
    return [
        sys.executable,
        *(program or ["train.py"]),
        "--config",
        "smoke",
        f"--run.dir={folder / 'runs'}",
    ]


def outcome(folder: Path) -> tuple[Any, bytes]:
    """The records of the run in this folder, and the weights of its model."""
    run = folder / "runs/smoke"
    records = json.loads((run / "metrics.json").read_text())["records"]
    return records, (run / "model/model.safetensors").read_bytes()


def smoke(folder: Path, *program: object, umask: int = -1, **variables: str) -> str:
    """What a smoke run in a fresh process says on stderr."""
    own = environment(folder / "cache", **variables)
    done = subprocess.run(
        command(folder, *program), cwd=ROOT, env=own, umask=umask, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    assert smoke(folder) == ""
    return outcome(folder)


def german(folder: Path) -> dict[str, str]:
    """A German locale that the interpreter takes up, with decimal commas; built where the machine has none."""
    if shutil.which("localedef") is None:
        pytest.skip("a German locale needs localedef")
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], check=True)
    (folder / "sitecustomize.py").write_text(GERMAN)
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.UTF-8", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def homeless(folder: Path) -> dict[str, str]:
    """A home in which nobody can write, not even root: it is a file."""
    (folder / "home").touch()
    return {"HOME": str(folder / "home")}


def drawing(folder: Path) -> dict[str, str]:
    (folder / "matplotlibrc").write_text(RC)
    return {"MATPLOTLIBRC": str(folder / "matplotlibrc")}


def strict(_: Path) -> dict[str, str]:
    return {"PYTHONWARNINGS": "error"}


@pytest.mark.parametrize(("surroundings", "umask"), [((homeless, strict), 0o002), ((german, drawing), 0o077)])
def test_a_run_is_the_same_in_other_surroundings(surroundings, umask, plain, tmp_path):
    variables = {name: value for surrounding in surroundings for name, value in surrounding(tmp_path).items()}
    said = smoke(tmp_path, umask=umask, **variables)
    assert said.count("\n") <= 1, said
    assert outcome(tmp_path) == plain


def test_a_run_is_the_same_inside_an_open_run_of_wandb(plain, tmp_path):
    (tmp_path / "mine.py").write_text(OPEN)
    assert smoke(tmp_path, tmp_path / "mine.py", tmp_path, PYTHONPATH=str(ROOT)).count("\n") <= 1
    assert outcome(tmp_path) == plain


def test_a_run_is_the_same_on_a_terminal(plain, tmp_path):
    def work() -> None:
        os.chdir(ROOT)
        os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.execve(sys.executable, command(tmp_path), environment(tmp_path / "cache", TERM="xterm-256color"))

    screen = on_a_terminal(work, 100)
    assert "python_help" in screen
    assert "gprune + least_squares+distill" in screen
    assert (tmp_path / "stderr").read_text().count("\n") <= 1
    assert outcome(tmp_path) == plain
