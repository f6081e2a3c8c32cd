"""The command `gprune`, and `run_guarded`, which turns errors into one line and an exit code."""

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
from gprune.config import RunConfig, parse
from gprune.config.parse import EXAMPLES, GROUPS, MAIN_FLAGS
from gprune.console import log_to_stdout, process_index, quieted, run_guarded
from gprune.errors import UserError
from gprune.storage.files import scratch_folder
from tests.tiny_run import environment

ROOT = Path(__file__).parent.parent


def help_text(capsys, *args: str) -> str:
    """Return the output of `gprune ARGS --help`."""
    with pytest.raises(SystemExit) as stop:
        command.main([*args, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


WITH_PARSERS = [name for name in command.COMMANDS if name != "prune"]  # the flags of prune are settings


def test_help_of_prune_is_that_of_train_py(capsys):
    text = help_text(capsys, "prune")
    assert text.startswith("usage: gprune prune [--config FILE] [--FLAG VALUE ...]")
    with pytest.raises(SystemExit):
        parse(["--help"])
    expected = capsys.readouterr().out
    assert expected.startswith("usage: train.py ")
    assert text == expected.replace("train.py", "gprune prune")


def test_train_py_without_installed_packages_names_the_command_that_installs_them():
    command = [sys.executable, "-S", str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"train.py: The package \w+ is not installed; run `pip install -r requirements.txt -e .` .+", line)


def test_help_has_examples_and_the_main_flags_and_help_all_has_the_complete_text_about_each_flag(capsys):
    texts = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse([flag])
        assert stop.value.code == 0
        texts[flag] = re.sub(r"(?<=\w-) ", "", " ".join(capsys.readouterr().out.split()))  # without hyphenation
    examples, _, options = texts["--help"].partition(" options: ")
    for example in EXAMPLES:
        flags = example.partition("  ")[0]
        assert f"train.py {flags}" in examples
    for name, group in ((None, RunConfig), *GROUPS.items()):
        for setting, field in group.model_fields.items():
            flag = f"{group.prefix}{setting}"
            if name or setting not in GROUPS:
                text = re.sub(r"(?<=\w-) ", "", " ".join(field.description.split()))
                assert f"--{flag} " in texts["--help_all"]
                assert text in texts["--help_all"]
                if flag in MAIN_FLAGS:
                    assert f" --{flag} " in options
                    assert text.partition(". ")[0] in options
                else:
                    assert f" --{flag} " not in options


@pytest.mark.parametrize("name", WITH_PARSERS)
def test_help_of_a_command_has_examples_and_every_default(name, capsys):
    module, about = command.COMMANDS[name]
    assert re.search(rf"\n  {name} +{re.escape(about)}\n", help_text(capsys))
    text = help_text(capsys, name)
    assert text.startswith(f"usage: gprune {name} ")
    assert f"\n  gprune {name} " in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 120
    for action in importlib.import_module(module).parser()._actions:
        assert action.help
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "(default: " in action.help, action.option_strings


@pytest.mark.slow
def test_python_m_gprune_and_the_console_script_call_the_same_function(tmp_path):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"gprune": f"{command.__name__}:{command.main.__name__}"}
    args = [sys.executable, "-m", "gprune", "report", "no/such/run"]
    done = subprocess.run(args, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gprune report: ")
    assert "no/such/run" in line


def exit_code_of(error: BaseException, *, stopped: str = ".", memory: str = ".") -> int:
    """Return the exit code of a command that raises an error. The texts are those of `run_guarded`."""

    def work():
        raise error

    return run_guarded("a command", work, stopped=stopped, memory=memory)


class SIGTERMException(SystemExit):
    """An error with the name of the one that Lightning raises."""


class OutOfMemoryError(RuntimeError):
    """An error with the name of the one that torch raises."""


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
def test_run_guarded_turns_errors_into_one_line_and_an_exit_code(error, code, line, capsys):
    assert exit_code_of(error, stopped=". All is kept.", memory="; ask for less.") == code
    assert capsys.readouterr().err == f"a command: {line}\n"


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError("a bug"), ValueError("a bug")])
def test_run_guarded_does_not_catch_bugs_and_system_exit(error):
    with pytest.raises(type(error)):
        exit_code_of(error)


def in_a_child_process(work, stdout: int | None) -> tuple[int, str]:
    """Run a command in a child process with the given stdout, None for closed. Return its exit code and stderr."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        os.close(1) if stdout is None else os.dup2(stdout, 1)
        sys.stdout = None if stdout is None else os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = run_guarded("a command", work, stopped=". All is kept.")
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        messages = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), messages


def log_and_return_text() -> str:
    """Write lines to the log and return a text, like a run."""
    log_to_stdout()
    for n in range(300):
        logging.getLogger("gprune").info("line %d", n)
    return "a table\n" * 10_000


@pytest.mark.parametrize("work", [log_and_return_text, lambda: parse(["--print_config"])])
def test_a_full_device_as_stdout_ends_the_command_in_one_line(work):
    with open("/dev/full", "wb") as full:
        code, messages = in_a_child_process(work, full.fileno())
    assert (code, messages.count("\n")) == (2, 1)
    assert "No space left" in messages


def test_a_closed_pipe_as_stdout_ends_the_command_in_one_line():
    read_end, write_end = os.pipe()
    os.close(read_end)
    code, messages = in_a_child_process(log_and_return_text, write_end)
    os.close(write_end)
    assert (code, messages.count("\n")) == (2, 1)
    assert "the output pipe is closed" in messages


def test_a_command_without_stdout_succeeds_without_output():
    assert in_a_child_process(log_and_return_text, None) == (0, "")


@pytest.mark.parametrize(
    ("signum", "code", "word"), [(signal.SIGTERM, 143, "Terminated"), (signal.SIGHUP, 129, "Hung up")]
)
def test_signals_outside_a_trainer_end_the_command_in_one_line(signum, code, word):
    # Under `nohup pytest` the signal is ignored, and gprune keeps ignored signals ignored.
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        with open(os.devnull, "wb") as devnull:
            code_and_stderr = in_a_child_process(lambda: os.kill(os.getpid(), signum) or "x", devnull.fileno())
    finally:
        signal.signal(signum, before)
    assert code_and_stderr == (code, f"a command: {word}. All is kept.\n")


def test_signals_that_follow_the_first_one_do_not_interrupt_the_cleanup(tmp_path):
    """Job schedulers send SIGTERM several times."""

    def work():
        with scratch_folder(tmp_path / "file") as scratch:
            (scratch / "part").touch()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                (tmp_path / "cleaned").touch()
                os.kill(os.getpid(), signal.SIGHUP)
        return "x"

    before = [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with open(os.devnull, "wb") as devnull:
            code_and_stderr = in_a_child_process(work, devnull.fileno())
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
    assert code_and_stderr == (143, "a command: Terminated. All is kept.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["cleaned"]


def test_only_rank_0_prints_errors_unless_a_single_rank_fails(capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code_of(UserError("raised by all ranks")) == 2
    assert exit_code_of(RuntimeError("Connection closed by peer")) == 2
    assert capsys.readouterr().err == ""
    assert exit_code_of(MemoryError()) == 2
    assert capsys.readouterr().err == "a command: Out of memory.\n"


def test_rank_0_reports_in_one_line_that_another_process_has_ended(capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("RANK", "0")
    assert exit_code_of(RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")) == 2
    messages = "a command: Another process of this run has ended; its own error, if any, is above.\n"
    assert capsys.readouterr().err == messages
    with pytest.raises(RuntimeError, match="a bug"):
        exit_code_of(RuntimeError("a bug"))


def test_quieted_libraries_print_again_afterwards(capsys):
    logger = logging.getLogger("some.library")
    logger.setLevel(logging.INFO)
    with pytest.raises(KeyError), quieted("some.library", stderr=True):  # noqa: PT012
        assert logger.level == logging.ERROR
        sys.stderr.write("a progress bar")
        raise KeyError
    assert logger.level == logging.INFO
    sys.stderr.write("printed afterwards")
    assert capsys.readouterr().err == "printed afterwards"


DISTRIBUTED = {"MASTER_ADDR": "here"}


@pytest.mark.parametrize(
    ("variables", "index"),
    [
        ({}, 0), (DISTRIBUTED | {"LOCAL_RANK": "1"}, 1), (DISTRIBUTED | {"LOCAL_RANK": "x"}, 0),
        (DISTRIBUTED | {"LOCAL_RANK": "0", "RANK": "8"}, 8),  # torchrun on the second machine
        (DISTRIBUTED | {"NODE_RANK": "1"}, 1), (DISTRIBUTED | {"NODE_RANK": "1", "LOCAL_RANK": "0"}, 1),
        (DISTRIBUTED | {"NODE_RANK": "1", "RANK": "0"}, 0), ({"SLURM_NTASKS": "16", "SLURM_PROCID": "9"}, 9),
        ({"RANK": "1", "LOCAL_RANK": "1", "NODE_RANK": "1", "SLURM_PROCID": "9"}, 0),  # left over from another launcher
    ],
)  # fmt: skip
def test_the_process_index_comes_from_the_variables_of_the_launcher(variables, index, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert process_index() == index
