"""One command beside train.py, and one boundary where errors become a line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gprune.__main__ as command
from gprune.console import Parser, guarded, quieted
from gprune.errors import UserError
from tests.tiny_run import environment

ROOT = Path(__file__).parent.parent


def helped(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main([*args, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys):
    text = helped(capsys)
    assert all(f"\n  {name} " in text and about in text for name, (_, about) in command.COMMANDS.items())


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_a_command_has_examples_and_tells_every_default(name, capsys):
    text = helped(capsys, name)
    assert text.startswith(f"usage: gprune {name} ")
    assert f"\n  gprune {name} " in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 120
    room, _ = command.COMMANDS[name]
    for action in importlib.import_module(f"{room}.command").parser()._actions:
        assert action.help
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "%(default)s" in action.help, action.option_strings


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_wrong_flag_is_one_line_that_names_the_command(name, capsys):
    assert command.main([name, "x", "--colour", "red"]) == 2
    assert capsys.readouterr().err == f"gprune {name}: unrecognized arguments: --colour red; see --help.\n"


@pytest.mark.parametrize(
    ("args", "message"), [([], "required: COMMAND"), (["exprot"], "invalid choice: 'exprot' (choose from 'report'")]
)
def test_what_is_no_command_is_one_line(args, message, capsys):
    assert command.main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gprune: ")
    assert message in line


@pytest.mark.slow
def test_python_runs_it_and_the_console_script_is_the_same_function(tmp_path):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"gprune": f"{command.__name__}:{command.main.__name__}"}
    args = [sys.executable, "-m", "gprune", "report", "no/such/run"]
    done = subprocess.run(args, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gprune report: ")
    assert "no/such/run" in line


class SIGTERMException(SystemExit):
    pass


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("expected a,\n got b"), 2, "expected a, got b"),
        (KeyboardInterrupt(), 130, "Interrupted. All is kept."),
        (SIGTERMException(), 143, "Terminated. All is kept."),
        (MemoryError(), 2, "Out of memory; ask for less."),
        (OutOfMemoryError("CUDA"), 2, "Out of memory; ask for less."),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 2, "Out of memory; ask for less."),
        (OSError(28, "No space left on device", "x/y"), 2,
         "The system refused to work on x/y: No space left on device. What was finished is kept."),
    ],
)  # fmt: skip
def test_the_boundary(error, code, line, capsys):
    def work():
        raise error

    assert guarded("a verb", work, stopped=". All is kept.", memory="; ask for less.") == code
    assert capsys.readouterr().err == f"a verb: {line}\n"


@pytest.mark.parametrize("error", [SystemExit(143), RuntimeError("a bug"), ValueError("a bug")])
def test_the_boundary_hides_no_bug_and_no_exit(error):
    def work():
        raise error

    with pytest.raises(type(error)):
        guarded("a verb", work)


def test_of_several_processes_the_first_speaks_unless_one_fails_alone(capsys, monkeypatch):
    def failing(error):
        def work():
            raise error

        return guarded("a verb", work)

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert failing(UserError("all of us")) == 2
    assert failing(RuntimeError("Connection closed by peer")) == 2
    assert capsys.readouterr().err == ""
    assert failing(MemoryError()) == 2
    assert capsys.readouterr().err == "a verb: Out of memory.\n"


def test_work_that_ends_well_prints_its_text(capsys):
    assert guarded("a verb", lambda: "done\n") == 0
    assert capsys.readouterr() == ("done\n", "")


def test_a_parser_raises_where_argparse_would_leave():
    with pytest.raises(UserError, match=r"unrecognized arguments: --x; see --help\."):
        Parser("a verb").parse_args(["--x"])


def test_libraries_speak_again_afterwards(capsys):
    logger = logging.getLogger("some.library")
    logger.setLevel(logging.INFO)
    with pytest.raises(KeyError), quieted("some.library", stderr=True):  # noqa: PT012
        assert logger.level == logging.ERROR
        sys.stderr.write("a bar")
        raise KeyError
    assert logger.level == logging.INFO
    sys.stderr.write("heard")
    assert capsys.readouterr().err == "heard"
