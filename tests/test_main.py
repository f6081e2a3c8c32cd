"""One command beside train.py, and one boundary where errors become a line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gprune.__main__ as command
from gprune.config import parse
from gprune.console import guarded, log_to_stdout, process_index, quieted
from gprune.errors import UserError
from tests.tiny_run import environment

ROOT = Path(__file__).parent.parent


def helped(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main([*args, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


WITH_PARSERS = [name for name in command.COMMANDS if name != "prune"]  # whose flags are settings


def test_help_of_prune_is_that_of_train_py(capsys):
    text = helped(capsys, "prune")
    assert text.startswith("usage: gprune prune [--config FILE] [--FLAG VALUE ...]")
    with pytest.raises(SystemExit):
        parse(["--help"])
    ours = capsys.readouterr().out
    assert ours.startswith("usage: train.py ")
    assert text.partition("\n")[2] == ours.partition("\n")[2]


def test_prune_is_train_py_by_another_name(capsys):
    assert command.main(["prune", "--config", "smoke", "--model.name=nothing"]) == 2
    assert re.match("gprune prune: --model.name.*'nothing'", capsys.readouterr().err)
    assert command.main(["prune", "--colour", "red"]) == 2
    assert capsys.readouterr().err.startswith("gprune prune: --colour: Unknown setting 'colour'")


@pytest.mark.parametrize("name", WITH_PARSERS)
def test_help_of_a_command_has_examples_and_tells_every_default(name, capsys):
    module, about = command.COMMANDS[name]
    assert re.search(rf"\n  {name} +{re.escape(about)}\n", helped(capsys))
    text = helped(capsys, name)
    assert text.startswith(f"usage: gprune {name} ")
    assert f"\n  gprune {name} " in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 120
    for action in importlib.import_module(module).parser()._actions:
        assert action.help
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "(default: " in action.help, action.option_strings


@pytest.mark.parametrize(
    ("args", "line"),
    [
        *(([name, "x", "--colour", "red"],
           f" {name}: Cannot read the command line: unrecognized arguments: --colour red. See --help.")
          for name in WITH_PARSERS),
        ([], ": Cannot read the command line: the following arguments are required: COMMAND. See --help."),
        (["exprot"], ": Cannot read the command line: argument COMMAND: invalid choice: 'exprot' (choose from "
                     "'prune', 'report', 'export', 'evaluate', 'study'). See --help."),
    ],
)  # fmt: skip
def test_what_is_no_command_and_no_flag_is_one_line(args, line, capsys):
    assert command.main(args) == 2
    plain = line.replace("'prune', 'report', 'export', 'evaluate', 'study'", "prune, report, export, evaluate, study")
    assert capsys.readouterr().err in {f"gprune{line}\n", f"gprune{plain}\n"}  # as of Python 3.13.1


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


def failing(error: BaseException, **said: str) -> int:
    """The exit code of a command that raises this."""

    def work():
        raise error

    return guarded("a verb", work, **said)


class SIGTERMException(SystemExit):
    pass


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("It must be a;\n got b."), 2, "It must be a; got b."),
        (KeyboardInterrupt(), 130, "Interrupted. All is kept."),
        (SIGTERMException(), 143, "Terminated. All is kept."),
        (MemoryError(), 2, "Out of memory; ask for less."),
        (OutOfMemoryError("CUDA"), 2, "Out of memory; ask for less."),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 2, "Out of memory; ask for less."),
        (OSError(28, "No space left on device", "x/y"), 2,
         "Cannot read or write x/y: No space left on device. Finished work is kept."),
    ],
)  # fmt: skip
def test_the_boundary(error, code, line, capsys):
    assert failing(error, stopped=". All is kept.", memory="; ask for less.") == code
    assert capsys.readouterr().err == f"a verb: {line}\n"


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError("a bug"), ValueError("a bug")])
def test_the_boundary_hides_no_bug_and_no_exit(error):
    with pytest.raises(type(error)):
        failing(error)


def in_a_child(work, stdout: int | None) -> tuple[int, str]:
    """Exit code and stderr of a command in a process whose stdout is this descriptor, or closed."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        os.close(1) if stdout is None else os.dup2(stdout, 1)
        sys.stdout = None if stdout is None else os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = guarded("a verb", work, stopped=". All is kept.")
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def progress() -> str:
    """Lines of the log and a text, as a run has them."""
    log_to_stdout()
    for n in range(300):
        logging.getLogger("gprune").info("line %d", n)
    return "a table\n" * 10_000


def test_an_output_that_takes_nothing_is_one_line():
    with open("/dev/full", "wb") as full:
        for work in (progress, lambda: parse(["--print_config"])):
            code, said = in_a_child(work, full.fileno())
            assert (code, said.count("\n")) == (2, 1)
            assert "No space left" in said
    read, write = os.pipe()
    os.close(read)
    code, said = in_a_child(progress, write)
    os.close(write)
    assert (code, said.count("\n")) == (2, 1)
    assert "the output pipe is closed" in said
    assert in_a_child(progress, None) == (0, "")


@pytest.mark.parametrize(
    ("signum", "code", "word"), [(signal.SIGTERM, 143, "Terminated"), (signal.SIGHUP, 129, "Hung up")]
)
def test_signals_outside_a_trainer_are_one_line(signum, code, word):
    before = signal.signal(signum, signal.SIG_DFL)  # `nohup pytest` would have it ignored, which is respected
    try:
        with open(os.devnull, "wb") as nowhere:
            found = in_a_child(lambda: os.kill(os.getpid(), signum) or "x", nowhere.fileno())
    finally:
        signal.signal(signum, before)
    assert found == (code, f"a verb: {word}. All is kept.\n")


def test_what_controls_a_terminal_is_shown(capsys):
    assert guarded("a verb", lambda: "a \x1b[31mname\x07, a\ttab\n") == 0
    log_to_stdout()
    logging.getLogger("gprune").info("\x1b]0;title\x07")
    out, err = capsys.readouterr()
    assert out.startswith("a \\x1b[31mname\\x07, a\ttab\n")
    assert "\x1b" not in out + err


def test_of_several_processes_the_first_speaks_unless_one_fails_alone(capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert failing(UserError("all of us")) == 2
    assert failing(RuntimeError("Connection closed by peer")) == 2
    assert capsys.readouterr().err == ""
    assert failing(MemoryError()) == 2
    assert capsys.readouterr().err == "a verb: Out of memory.\n"


def test_the_first_process_says_in_one_line_that_another_has_ended(capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("RANK", "0")
    assert failing(RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")) == 2
    said = "a verb: Another process of this run has ended; its own error, if any, is above.\n"
    assert capsys.readouterr().err == said
    with pytest.raises(RuntimeError, match="a bug"):
        failing(RuntimeError("a bug"))


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


MEET = {"MASTER_ADDR": "here"}


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({}, 0), (MEET | {"LOCAL_RANK": "1"}, 1), (MEET | {"LOCAL_RANK": "x"}, 0),
        (MEET | {"LOCAL_RANK": "0", "RANK": "8"}, 8),  # torchrun, on the second machine
        (MEET | {"NODE_RANK": "1"}, 1), (MEET | {"NODE_RANK": "1", "LOCAL_RANK": "0"}, 1),
        (MEET | {"NODE_RANK": "1", "RANK": "0"}, 0), ({"SLURM_NTASKS": "16", "SLURM_PROCID": "9"}, 9),
        ({"RANK": "1", "LOCAL_RANK": "1", "NODE_RANK": "1", "SLURM_PROCID": "9"}, 0),  # left over in a shell
    ],
)  # fmt: skip
def test_the_first_of_several_processes_is_told_by_whoever_numbers_them(given, number, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert process_index() == number
