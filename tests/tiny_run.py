"""Run gprune in seconds: a tiny model folder, tiny corpora, and flags of `train.py` that use them.

world = make_world(folder)
assert main(world.args(folder / "runs")) == 0
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pty
import random
import runpy
import signal
import socket
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import IO, Any

import pytest
from lightning.fabric.utilities import registry as lightning_registry
from lightning.pytorch.utilities import rank_zero_only
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gprune.cli import main
from gprune.export import hf, reload
from gprune.method import summary
from gprune.runs.results import PruningResult, load_run
from tests.world import make_tiny_llama

ROOT = Path(__file__).parents[1]
WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"][:124]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SEEN, UNSEEN = ("alpha", "beta", "gamma"), ("delta", "epsilon")
NEURONS = 160  # five modules of the minimum size, 32


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of `WORDS`: 128 tokens with the special ones."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny_model(folder: Path, **overrides: Any) -> Path:
    """Save a random Llama with its tokenizer as a Hugging Face folder."""
    make_tiny_llama(**{"intermediate_size": NEURONS, **overrides}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(path: Path, *, seed: int, documents: int = 36, words: int = 560) -> Path:
    """Write random words with frequencies by Zipf's law. The order of the words by frequency depends on the seed."""
    generator = random.Random(seed)
    order = generator.sample(WORDS, len(WORDS))
    weights = [1 / (rank + 3) for rank in range(len(order))]
    texts = []
    for _ in range(documents):
        text = generator.choices(order, weights, k=words)
        texts.append("\n".join(" ".join(text[i : i + 12]) for i in range(0, words, 12)))
    # `corpora.load.split_text` splits at the first blank line after 2000 characters.
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class World:
    """The inputs of tiny runs: a model folder, and corpora by name."""

    model: Path
    corpora: dict[str, Path]

    def names(self, *corpora: str) -> str:
        """Return the paths of corpora as the value of a flag, such as `[/tmp/alpha.txt,/tmp/beta.txt]`."""
        return "[" + ",".join(str(self.corpora[c]) for c in corpora) + "]"

    def args(self, runs: Path, *more: str, name: str = "run") -> list[str]:
        """Return the flags of a run of a few seconds. Flags in `more` override them."""
        has_target = any(flag.startswith("--sparsity.target") for flag in more)  # which may be in quality
        return [
            f"--model.name={self.model}",
            f"--corpora.score={self.corpora['alpha']}",
            f"--corpora.drift={self.names(*SEEN)}",
            f"--corpora.learn={self.names('alpha', 'beta')}",
            f"--corpora.recover={self.names(*SEEN)}",
            f"--corpora.evaluate={self.names('alpha', *UNSEEN)}",
            "--corpora.num_samples=4", "--corpora.seq_len=32", "--corpora.batch_size=4",
            "--recovery=none", "--partition.num_modules=4", "--partition.steps=10", "--sparsity.epochs=1",
            "--evaluation.num_samples=2", "--evaluation.seq_len=32", "--evaluation.development_samples=1",
            "--evaluation.curve=[0.25]", "--evaluation.prompts=[]", "--logging.mode=disabled",
            "--trainer.accelerator=cpu", "--trainer.precision=32-true",  # the same bits on every processor
            f"--run.dir={runs}", f"--run.name={name}", "--allow_unused=true",
            *([] if has_target else ["--sparsity.target=0.5"]), *more,
        ]  # fmt: skip

    def run(self, runs: Path, *more: str, name: str = "run") -> PruningResult:
        """Run the command line in this process, and load the run folder."""
        assert main(self.args(runs, *more, name=name)) == 0
        return load_run(runs / name)


def make_world(folder: Path) -> World:
    """Write a model and corpora into a folder."""
    corpora = {}
    for seed, name in enumerate([*SEEN, *UNSEEN]):
        corpora[name] = write_corpus(folder / f"{name}.txt", seed=seed)
    return World(save_tiny_model(folder / "tiny-llama"), corpora)


@contextmanager
def isolated(cache: Path, **environment: str | None) -> Iterator[None]:
    """Use the given cache and environment variables, and restore the environment and the logging setup at the end.

    Args:
        environment: values by name; None removes a variable. Three inherited variables are removed in any case.
    """
    logger = logging.getLogger("gprune")
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "GPRUNE_DATA_DIR", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("GPRUNE_CACHE", str(cache))
        for name, value in environment.items():
            patch.setenv(name, value) if value is not None else patch.delenv(name, raising=False)
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def world_with_cache(folder: Path) -> Iterator[World]:
    """Yield a world in `folder`, and use a cache of its own meanwhile. For fixtures `world` of modules."""
    world = make_world(folder)
    with isolated(folder / "cache"):
        yield world


def in_this_process(command: list[str], *, input: str, **_: object) -> CompletedProcess[str]:
    """Replacement for `subprocess.run` in the export's reload check, without a fresh process."""
    reload.main(json.loads(input))
    return CompletedProcess(command, 0)


WRITE_PAGE, WRITE_FIGURES = summary.write_page, summary.write_figures


def quick(patch: pytest.MonkeyPatch) -> None:
    """Replace the slowest parts of tiny runs; `conftest.py` does so for all tests.

    - The export is reloaded in this process, except in tests with the fixture `fresh_process` and in scripts.
    - A run draws no figures and writes no page, except after `draw`.
    - Lightning looks for callbacks of installed packages once, and not for each Trainer.
    """
    patch.setattr(hf, "subprocess", SimpleNamespace(run=in_this_process))
    patch.setattr(lightning_registry, "entry_points", functools.cache(lightning_registry.entry_points))
    patch.setattr(summary, "write_page", lambda *_: None)
    patch.setattr(summary, "write_figures", lambda *_: None)


def draw(patch: pytest.MonkeyPatch) -> None:
    """Let runs draw figures and write pages, as for users."""
    patch.setattr(summary, "write_page", WRITE_PAGE)
    patch.setattr(summary, "write_figures", WRITE_FIGURES)


@dataclass(frozen=True)
class Started:
    """A forked process in its own session."""

    id: int
    output: tuple[Path, Path]  # files of stdout and stderr

    def wait(self) -> CompletedProcess[str]:
        """Wait for the end of the process, and return its exit code and output."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])
        return CompletedProcess([], code, *(path.read_text() for path in self.output))


def start(
    args: Sequence[str],
    folder: Path,
    *,
    processes: int = 1,
    script: Path = ROOT / "train.py",
    caches: Sequence[Path] | None = None,
    **more: str,
) -> list[Started]:
    """Start a script in forked processes. Compared with new processes this saves seconds of importing.

    With two or more processes, set the environment variables that Lightning sets for the processes that it starts. A
    single process with `--trainer.devices=2` starts the second one itself.

    Args:
        folder: for the output, and for the cache in `cache`.
        caches: one cache folder for each process, instead of a shared one.
        more: additional environment variables.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # the system chooses a free port
        port = str(unused.getsockname()[1])
    children = []
    for rank in range(processes):
        if processes > 1:
            more |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(processes)}
            more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = environment(caches[rank] if caches else folder / "cache", **more)
        output = (folder / f"stdout.{rank}", folder / f"stderr.{rank}")
        for file in output:
            file.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            try:
                os._exit(_started(script, args, variables, rank, output))
            finally:  # the child must never return from here
                os._exit(1)
        children.append(Started(child, output))
    return children


def _started(script: Path, args: Sequence[str], variables: dict[str, str], rank: int, output: tuple[Path, Path]) -> int:
    """Run the script in this process, and return its exit code."""
    os.setsid()
    # Background jobs inherit SIGINT as ignored, and nohup makes SIGHUP ignored. Python keeps ignored signals ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables | {"TOKENIZERS_PARALLELISM": "false"})
    rank_zero_only.rank = rank
    sys.argv = [str(script), *args]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 1


class ForkedScript:
    """Replacement for `subprocess.Popen` that forks this process, which saves seconds of importing."""

    def __init__(self, command: Sequence[str], *, env: dict[str, str], stderr: IO[str], **_: object):
        (requests, self.stdin), (self.stdout, answers) = (
            (os.fdopen(read, "r"), os.fdopen(write, "w")) for read, write in (os.pipe(), os.pipe())
        )
        sys.stdout.flush()
        sys.stderr.flush()
        self.id = os.fork()
        if self.id == 0:
            try:
                for number, file in enumerate((requests, answers, stderr)):
                    os.dup2(file.fileno(), number)
                sys.stdin = os.fdopen(0, "r", closefd=False)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                os.environ.clear()
                os.environ.update(env)
                script = next(i for i, word in enumerate(command) if word.endswith(".py"))
                sys.argv = list(command[script:])
                runpy.run_path(sys.argv[0], run_name="__main__")
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:  # the child must never return from here
                sys.stderr.flush()
                os._exit(1)
        requests.close()
        answers.close()

    def kill(self) -> None:
        """End the process."""
        os.kill(self.id, signal.SIGKILL)

    def communicate(self) -> None:
        """Wait for the end of the process."""
        os.waitpid(self.id, 0)
        self.stdin.close()
        self.stdout.close()


def train(args: Sequence[str], folder: Path, **options: Any) -> list[CompletedProcess[str]]:
    """Call `start` with the options, and wait for the processes to end."""
    return [child.wait() for child in start(args, folder, **options)]


def on_a_terminal(
    work: Callable[[], object], width: int, *, press: tuple[str, bytes] | None = None, **variables: str
) -> str:
    """Run a command on a terminal in a forked process, and return its output. The command must end with 0.

    Args:
        work: returns the exit code; None: 0.
        width: columns of the terminal.
        press: a text to wait for, and the keys to press then.
        variables: additional environment variables.
    """
    child, screen = pty.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            termios.tcsetwinsize(1, (40, width))
            for name in ("COLUMNS", "NO_COLOR"):
                os.environ.pop(name, None)
            os.environ.update({"TERM": "xterm-256color"} | variables)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os._exit(work() or 0)
        finally:
            traceback.print_exc()
            os._exit(1)
    written = b""
    with suppress(OSError):  # raised at the end of the output
        while part := os.read(screen, 65536):
            written += part
            if press is not None and press[0].encode() in written:
                time.sleep(0.3)  # until the interpreter is waiting again
                os.write(screen, press[1])
                press = None
    os.close(screen)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, written
    return written.decode().replace("\r\n", "\n")


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Return the environment of a subprocess: one thread, the given cache, no W&B account and no network."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "GPRUNE", "LOCAL_RANK"))}
    return inherited | {"GPRUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
