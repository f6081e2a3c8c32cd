"""A whole run in seconds: a tiny model folder, tiny corpora, and flags of `train.py` that use them.

world = make_world(folder)
assert main(world.args(folder / "runs")) == 0
"""

from __future__ import annotations

import base64
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
from typing import Any, TextIO

import pytest
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gprune.cli import main
from gprune.export import reload
from gprune.runs.results import PruningResult, load_run
from tests.conftest import make_tiny_llama

ROOT = Path(__file__).parents[1]
WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"][:124]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SEEN, UNSEEN = ("alpha", "beta", "gamma"), ("delta", "epsilon")
NEURONS = 160  # five modules of the smallest size, 32


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`: 128 tokens with the special ones."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny_model(folder: Path, **overrides: Any) -> Path:
    """A random Llama with its tokenizer, as a Hugging Face folder."""
    make_tiny_llama(**{"intermediate_size": NEURONS, **overrides}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(path: Path, *, seed: int, documents: int = 36, words: int = 560) -> Path:
    """Sentences of words whose frequencies follow Zipf's law in an order that depends on the seed."""
    generator = random.Random(seed)
    order = generator.sample(WORDS, len(WORDS))
    weights = [1 / (rank + 3) for rank in range(len(order))]
    texts = []
    for _ in range(documents):
        drawn = generator.choices(order, weights, k=words)
        texts.append("\n".join(" ".join(drawn[i : i + 12]) for i in range(0, words, 12)))
    # `corpora.local.split_text` cuts at the first blank line after 2000 characters.
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class World:
    """What a tiny run reads: a model folder and corpora by name."""

    model: Path
    corpora: dict[str, Path]

    def names(self, *corpora: str) -> str:
        return "[" + ",".join(str(self.corpora[c]) for c in corpora) + "]"

    def args(self, runs: Path, *more: str, name: str = "run") -> list[str]:
        """Flags of a run of a few seconds; `more` are further flags, the last of equal ones wins."""
        return [
            f"--model.name={self.model}",
            f"--corpora.score={self.corpora['alpha']}",
            f"--corpora.drift={self.names(*SEEN)}",
            f"--corpora.learn={self.names('alpha', 'beta')}",
            f"--corpora.recover={self.names(*SEEN)}",
            f"--corpora.evaluate={self.names('alpha', *UNSEEN)}",
            "--corpora.num_samples=4", "--corpora.seq_len=32", "--corpora.batch_size=4",
            "--recovery=none", "--partition.num_modules=4", "--partition.steps=20", "--sparsity.epochs=1",
            "--evaluation.num_samples=2", "--evaluation.seq_len=32", "--evaluation.development_samples=1",
            "--evaluation.curve=[0.25]", "--logging.mode=disabled",
            "--trainer.accelerator=cpu", "--trainer.precision=32-true",  # the same bits on every processor
            f"--run.dir={runs}", f"--run.name={name}", *more,
        ]  # fmt: skip

    def run(self, runs: Path, *more: str, name: str = "run") -> PruningResult:
        """Run the command line in this process, and read the run folder back."""
        assert main(self.args(runs, *more, name=name)) == 0
        return load_run(runs / name)


def make_world(folder: Path) -> World:
    """Model and corpora, written into a folder."""
    corpora = {}
    for seed, name in enumerate([*SEEN, *UNSEEN]):
        corpora[name] = write_corpus(folder / f"{name}.txt", seed=seed)
    return World(save_tiny_model(folder / "tiny-llama"), corpora)


@contextmanager
def isolated(cache: Path, **environment: str | None) -> Iterator[None]:
    """A cache and an environment of its own, and logging as it was: the command line sets both up for itself."""
    ours = logging.getLogger("gprune")
    before = ours.handlers, ours.propagate, ours.level
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "GPRUNE_DATA_DIR", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("GPRUNE_CACHE", str(cache))
        for name, value in environment.items():
            patch.setenv(name, value) if value is not None else patch.delenv(name, raising=False)
        try:
            yield
        finally:
            ours.handlers, ours.propagate = before[:2]
            ours.setLevel(before[2])


def in_this_process(command: list[str], *, input: str, **_: object) -> CompletedProcess[str]:
    """`subprocess.run` of the export's check, without the fresh process."""
    reload.main(json.loads(input))
    return CompletedProcess(command, 0)


# A PNG of one white pixel.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")


def quick(patch: pytest.MonkeyPatch, *, draw: bool = False) -> None:
    """Spare runs what takes longer than the rest together: the one place where tests say so.

    - The export is reloaded in this process. `tests/export/test_hf.py` and the scripts' own tests start a fresh one.
    - Figures are files of one pixel and there is no page, unless `draw`. `tests/report` draws them.
    """
    patch.setattr("gprune.export.hf.subprocess", SimpleNamespace(run=in_this_process))
    if not draw:
        patch.setattr("gprune.pipeline.prune.write_pages", lambda run: None)
        patch.setattr("matplotlib.figure.Figure.savefig", _not_drawn)


def _not_drawn(_: Figure, file: Path | TextIO, **options: Any) -> None:
    """A figure that a page holds is empty."""
    file.write_bytes(PIXEL) if isinstance(file, Path) else file.write("<svg/>")


@dataclass(frozen=True)
class Started:
    """A process that was forked from this one, in a session of its own, with its output in two files."""

    id: int
    output: tuple[Path, Path]

    def wait(self) -> CompletedProcess[str]:
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
    """A script in processes of their own, forked from this one, which spares each of them seconds of importing.

    Two or more find each other by the variables that Lightning sets for the processes that it starts. A single one that
    is told `--trainer.devices=2` starts the second process itself.

    Args:
        folder: for its cache, in `cache`, and its output.
        caches: of each process, in place of the one of all.
        more: further variables of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
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
            finally:  # whatever goes wrong, a child must not go on as this process
                os._exit(1)
        children.append(Started(child, output))
    return children


def _started(script: Path, args: Sequence[str], variables: dict[str, str], rank: int, output: tuple[Path, Path]) -> int:
    """The exit code of the script, run by this process."""
    os.setsid()
    # A job in the background of a script inherits SIGINT as ignored, behind nohup SIGHUP, and Python then leaves it so.
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


def train(args: Sequence[str], folder: Path, **how: Any) -> list[CompletedProcess[str]]:
    """As `start`, waiting for the end."""
    return [child.wait() for child in start(args, folder, **how)]


def on_a_terminal(
    work: Callable[[], object], width: int, *, press: tuple[str, bytes] | None = None, **variables: str
) -> str:
    """What a command writes to a terminal so wide, in a process forked from this one.

    Args:
        press: keys, after the text that is waited for.
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
    with suppress(OSError):  # at the end
        while part := os.read(screen, 65536):
            written += part
            if press is not None and press[0].encode() in written:
                time.sleep(0.3)  # until the interpreter waits again
                os.write(screen, press[1])
                press = None
    os.close(screen)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, written
    return written.decode().replace("\r\n", "\n")


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Of a subprocess: one thread, its own cache, no account and no network."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "GPRUNE", "LOCAL_RANK"))}
    return inherited | {"GPRUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
