"""Results are the same in every environment and with every hash seed, and nothing is printed on stderr.

Two fresh processes cover all environments, since an import of PyTorch takes as long as the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import ROOT, environment, on_a_terminal, train

pytestmark = pytest.mark.slow
SET_LOCALE = "import locale\nlocale.setlocale(locale.LC_ALL, '')\nassert locale.localeconv()['decimal_point'] == ','\n"
MATPLOTLIBRC = "text.usetex: True\nfont.family: Comic Sans MS\nsavefig.format: pdf\nbackend: QtAgg\n"


# A script or notebook that calls gprune inside its own W&B run, and continues to log to that run afterwards. The second
# call of gprune is silenced.
FROM_PYTHON = """
import logging, sys, wandb
run = wandb.init(project="mine", mode="offline", dir=sys.argv[1], settings=wandb.Settings(silent=True))
import gprune
flags = sys.argv[2:]
gprune.prune(gprune.config.parse(flags))
print("silenced", flush=True)
logging.getLogger("gprune").setLevel("WARNING")
gprune.prune(gprune.config.parse([*flags, "--run.name=second", "--gprune=false", "--export=none"]))
run.log({"mine": 1})
run.finish()
"""


def flags(folder: Path) -> list[str]:
    """Return the flags of a smoke run in a folder, with fewer steps than by default."""
    fewer = ["--partition.steps=20"]
    return ["--config=smoke", *fewer, f"--run.dir={folder / 'runs'}", "--run.name=smoke"]


def records_and_weights(folder: Path) -> tuple[Any, bytes]:
    """Return the records of the run in this folder, and the bytes of its weights."""
    return records_of(folder), (folder / "runs/smoke/model/model.safetensors").read_bytes()


def records_of(folder: Path) -> Any:
    return json.loads((folder / "runs/smoke/metrics.json").read_text())["records"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return the records and weights of a smoke run in the plain environment."""
    folder = tmp_path_factory.mktemp("plain")
    (done,) = train(flags(folder), folder)
    assert (done.returncode, done.stderr) == (0, "")
    return records_and_weights(folder)


def german_locale(folder: Path) -> dict[str, str]:
    """Build a German locale with decimal commas, and make the interpreter use it, if this machine has `localedef`."""
    if shutil.which("localedef") is None:
        return {}
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], check=True)
    (folder / "sitecustomize.py").write_text(SET_LOCALE)
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.UTF-8", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def home_is_a_file(folder: Path) -> dict[str, str]:
    """Set HOME to a file, so that not even root can write there."""
    (folder / "home").touch()
    return {"HOME": str(folder / "home")}


def matplotlibrc(folder: Path) -> dict[str, str]:
    (folder / "matplotlibrc").write_text(MATPLOTLIBRC)
    return {"MATPLOTLIBRC": str(folder / "matplotlibrc")}


def test_a_run_from_python_has_the_same_results_in_any_environment_and_logs_its_steps_unless_silenced(
    expected, tmp_path
):
    """Another hash seed, locale, matplotlibrc and umask, and W&B's run of the caller. No library gives advice."""
    (tmp_path / "mine.py").write_text(FROM_PYTHON)
    variables = {"PYTHONHASHSEED": "2", "PYTHONPATH": str(ROOT)}
    variables |= matplotlibrc(tmp_path) | german_locale(tmp_path)
    done = subprocess.run(
        [sys.executable, tmp_path / "mine.py", tmp_path, *flags(tmp_path)], cwd=ROOT, umask=0o077,
        env=environment(tmp_path / "cache", **variables), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    progress, silenced = done.stdout.split("silenced\n")
    assert all(f"step {number}/10" in progress for number in (1, 7, 9, 10))
    assert silenced == ""
    assert records_and_weights(tmp_path) == expected


def test_results_do_not_depend_on_a_terminal_on_home_or_on_warnings_as_errors(expected, tmp_path):
    def work() -> None:
        os.chdir(ROOT)
        os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        more = {"TERM": "xterm-256color", "PYTHONWARNINGS": "error"} | home_is_a_file(tmp_path)
        command = [sys.executable, "train.py", *flags(tmp_path), "--export=none"]
        os.execve(sys.executable, command, environment(tmp_path / "cache", **more))

    screen = on_a_terminal(work, 100)
    assert "python_help" in screen
    assert "recovered" in screen
    assert (tmp_path / "stderr").read_text() == ""
    assert records_of(tmp_path) == expected[0]
