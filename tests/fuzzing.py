"""Random invalid input for every entry point that reads a file or a flag.

For any input, an entry point either succeeds without output on stderr, or ends with code 2 and exactly one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import yaml
from pyarrow import parquet

from gprune import cli
from gprune.__main__ import run as command
from gprune.config import RunConfig, flatten
from gprune.corpora.load import load_files
from gprune.errors import UserError

Outcome = tuple[int, list[str]]  # exit code, and lines on stderr
SCALARS = (
    None, True, False, 0, 1, -1, 3, 10**9, 10**30, 0.0, 0.5, -0.5, 1e300, 1e-300, math.inf, math.nan, "", "x", "0.5",
    "1:30", "null", "ffn", "dense", "base", "gprune", "none", "float32", "wiki", "$x_{", "é" * 300,
    "../x", "[a, b]", "{a: 1}", "*a", "&a [*a]", "!!python/name:os.system", "-", "--", "1e400", "9" * 400,
)  # fmt: skip


def random_json(rng: Random, depth: int = 3) -> Any:
    """Return a small random JSON value."""
    draw = rng.random()
    if depth == 0 or draw < 0.6:
        return rng.choice(SCALARS)
    if draw < 0.8:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(SCALARS)): random_json(rng, depth - 1) for _ in range(rng.randrange(4))}


def parts_of(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key or index) of each value in a JSON value, except of the root."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    for key, value in items:
        yield content, key
        yield from parts_of(value)


def mutated_json(rng: Random, content: Any) -> Any:
    """Return a copy of a JSON value with one to three parts replaced, removed or duplicated."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (parts := list(parts_of(content))):
            break
        container, key = rng.choice(parts)
        draw = rng.random()
        if draw < 0.2:
            del container[key]
        elif draw < 0.3 and isinstance(container, list):
            container.append(container[key])
        else:
            container[key] = random_json(rng, 2)
    return content


def corrupted_bytes(rng: Random, content: bytes) -> bytes:
    """Return a copy in which one to four parts of at most eight bytes are replaced, removed or inserted."""
    for _ in range(rng.randrange(1, 5)):
        start, removed = rng.randrange(len(content) + 1), rng.randrange(9)
        content = content[:start] + rng.randbytes(rng.randrange(9)) + content[start + removed :]
    return content


def outcome(call: Callable[[], int | None]) -> Outcome:
    """Return the outcome of a command. A UserError counts as exit code 2 with its message on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = call() or 0
        except UserError as error:
            code = 2
            err.write(f"python: {error}\n")
    return code, err.getvalue().splitlines()


def is_acceptable(result: Outcome) -> bool:
    """Return whether an outcome is success without output, or code 2 with one line of reasonable length."""
    code, lines = result
    return (code == 0 and not lines) or (code == 2 and len(lines) == 1 and 20 < len(lines[0]) < 6000)


# --- entry points ---------------------------------------------------------------------------------------------------
# Each function writes a random input into a folder, calls an entry point with it, and returns the outcome.


DEFAULTS = flatten(RunConfig().resolved())


def flags(rng: Random, folder: Path) -> Outcome:
    """Pass values of the right and of the wrong type on the command line."""
    args = []
    for name in rng.sample(sorted(DEFAULTS), rng.randrange(1, 4)):
        value = DEFAULTS[name] if rng.random() < 0.7 else random_json(rng, 2)
        text = value if isinstance(value, str) else rng.choice((json.dumps, str))(value)
        args.append(f"--{name}={text}")
    if rng.random() < 0.1:
        args.append(rng.choice(("--config", "--config=", "--conf=x", "--sparsity", "--sparsity=3", "x")))
    return outcome(lambda: cli.main([*args, "--dry_run=true", "--model.name=tiny-random", f"--run.dir={folder}"]))


def settings_files(rng: Random, folder: Path) -> Outcome:
    """Damage a YAML file of flags."""
    content = RunConfig().resolved() | {"dry_run": True}
    content["model"]["name"], content["run"]["dir"] = "tiny-random", str(folder)
    _write_yaml(rng, folder / "a.yaml", content)
    return outcome(lambda: cli.main(["--config", f"{folder}/a.yaml", "--dry_run=true", "--model.name=tiny-random"]))


def study_lists(rng: Random, folder: Path) -> Outcome:
    """Damage a list of configurations."""
    content = {
        "about": "a list", "common": {"model.name": "tiny-random"}, "seeds": [0], "seen": ["wiki"],
        "rows": {"a": {"gprune": False}, "b": {"sparsity": {"target": 0.4}}}, "compare": [["a: dense", "b: pruned"]],
        "tables": ["summary"], "tasks": {"names": ["piqa"], "limit": 5},
    }  # fmt: skip
    _write_yaml(rng, folder / "list.yaml", content)
    return outcome(lambda: command("study", [str(folder / "list.yaml"), "--table"]))


def _write_yaml(rng: Random, file: Path, content: Any) -> None:
    """Write damaged YAML: the content with other values, or other content, and sometimes with damaged bytes."""
    content = mutated_json(rng, content) if rng.random() < 0.8 else random_json(rng)
    text = yaml.safe_dump(content, allow_unicode=rng.random() < 0.5)
    file.write_bytes(corrupted_bytes(rng, text.encode()) if rng.random() < 0.2 else text.encode())


def corpus_files(rng: Random, folder: Path) -> Outcome:
    """Write a corpus file with random content, and often damage it."""
    file = folder / f"a{rng.choice(('.txt', '.jsonl', '.parquet'))}"
    if file.suffix == ".parquet":
        table = {rng.choice(("text", "texts")): ["one", "two", None] * rng.randrange(4)}
        parquet.write_table(pyarrow.table(table), file)
    else:
        rows = (
            json.dumps(random_json(rng) if rng.random() < 0.3 else {"text": "word " * 9})
            for _ in range(rng.randrange(9))
        )
        file.write_text("\n".join(rows))
    if rng.random() < 0.6:
        file.write_bytes(corrupted_bytes(rng, file.read_bytes()))
    return outcome(lambda: load_files(file, "train") and 0)


ENTRY_POINTS: dict[str, Callable[..., Outcome]] = {
    "flags": flags, "--config": settings_files, "study": study_lists, "text": corpus_files,
}  # fmt: skip
