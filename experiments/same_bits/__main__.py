"""Compare the bits of runs by two commits: labels, masks, thresholds, recovered weights, and numbers in records.

    python -m experiments.same_bits HEAD                     the last commit, and the tree as it stands
    python -m experiments.same_bits 0a054b53 --real          short runs of SmolLM2 and Gemma too
    python -m experiments.same_bits HEAD~3 --only speed      one configuration
    python -m experiments.same_bits HEAD -- --run.seed=1     shows what a difference looks like

Both trees run the same configurations (configurations.py) at the same time, in a process each, with the same number of
threads and with caches and run folders of their own. Bits differ between processors, so results of a commit are not
stored. Compared is the run's own model: masks, and numbers before and after recovery. Controls, which runs had until
commit 5c9b025f, are left out. The exit code is 1 if a configuration differs, except those of `--expect`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gprune.console import Parser, run_guarded
from gprune.errors import UserError
from gprune.report.tables import Table

from . import layout
from .configurations import configurations

ROOT = Path(__file__).parents[2]
EQUAL = "equal"


def parse_arguments(args: Sequence[str]) -> Namespace:
    """Parse the command line. Arguments after `--` become `flags`."""
    parser = Parser("python -m experiments.same_bits", description=__doc__)
    parser.add_argument("commit", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these configurations")
    parser.add_argument("--real", action="store_true", help="run the configurations of SmolLM2 and Gemma too")
    expect = "configurations that may differ, because a decision changes them"
    parser.add_argument("--expect", nargs="+", metavar="NAME", default=[], help=expect)
    parser.add_argument("--threads", type=int, default=1, help="threads of each of the two processes (default: 1)")
    work = "folder in which run folders and logs are kept (default: a temporary one, which is removed)"
    parser.add_argument("--work", metavar="FOLDER", help=work)
    args = list(args)
    end = args.index("--") if "--" in args else len(args)
    # Flags of train.py for the tree as it stands only.
    return Namespace(**vars(parser.parse_args(args[:end])), flags=args[end + 1 :])


def select(options: Namespace) -> dict[str, list[str]]:
    """Return name -> flags of the configurations to run. Raise UserError for an unknown name."""
    known = configurations(real=True)
    for flag, names in (("--only", options.only or []), ("--expect", options.expect)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{flag} must name configurations ({'; '.join(known)}); got '{unknown[0]}'.")
    selected = configurations(real=options.real)
    return selected if options.only is None else {name: known[name] for name in options.only}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Context manager that checks out a commit in a temporary git worktree, and removes the worktree at the end."""
    with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
        tree = Path(folder, "tree")
        added = subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), commit],
            capture_output=True, text=True,
        )  # fmt: skip
        if added.returncode:
            raise UserError(f"COMMIT must be a commit of {ROOT}; got '{commit}' ({added.stderr.strip()}).")
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def start(tree: Path, folder: Path, selected: Mapping[str, list[str]], threads: int) -> subprocess.Popen:
    """Start a process that runs configurations with the code of a tree. Runs and the cache are written to `folder`."""
    folder.mkdir(parents=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GPRUNE", "WANDB"))}
    number = str(threads)
    own = {"PYTHONPATH": str(tree), "GPRUNE_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    own |= {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    # -P: the folder of the script, whose modules have common names, is not a place to import from.
    command = [sys.executable, "-P", layout.__file__, str(tree), str(folder), json.dumps(selected)]
    return subprocess.Popen(command, cwd=tree, env=inherited | own)


def run_both(options: Namespace, selected: Mapping[str, list[str]], work: Path) -> None:
    """Run the configurations by the commit into `work/commit`, and by the tree as it stands into `work/tree`."""
    with checked_out(options.commit) as tree:
        changed = {name: [*flags, *options.flags] for name, flags in selected.items()}
        processes = [
            start(tree, work / "commit", selected, options.threads),
            start(ROOT, work / "tree", changed, options.threads),
        ]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()  # no-op unless the command was interrupted
        if any(codes):
            raise UserError("A process that runs configurations must end with 0; its own error is above.")


def compare(name: str, work: Path) -> tuple[dict[str, int], list[str]]:
    """Compare the two runs of a configuration.

    Returns:
        The number of compared values by group, and a text for each group that differs.
    """
    before, after = (layout.read_results(work / side / name) for side in ("commit", "tree"))
    missing = [
        f"no {group} in {side} ({_last_line(work / side / f'{name}.log')})"
        for side, results in (("commit", before), ("tree", after))
        for group in layout.ALWAYS
        if not results[group]
    ]
    counts = {group: len({*before[group], *after[group]}) for group in layout.GROUPS}
    return counts, missing or differences(before, after)


def _last_line(log: Path) -> str:
    """Return the last line of a run's output: the error, if it failed."""
    lines = log.read_text(encoding="utf-8").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "without output")


def differences(before: Mapping[str, layout.Values], after: Mapping[str, layout.Values]) -> list[str]:
    """Return a text for each group of results that differs, with the first value that does; empty if all are equal."""
    texts = []
    for group in layout.GROUPS:
        names = list(dict.fromkeys([*before[group], *after[group]]))
        different = [name for name in names if not layout.same(before[group].get(name), after[group].get(name))]
        if different:
            first = different[0]
            detail = _describe(before[group].get(first), after[group].get(first))
            texts.append(f"{group}: {len(different)} of {len(names)}, first '{first}' ({detail})")
    return texts


def _describe(before: Any, after: Any) -> str:
    """Describe the difference of two values."""
    if before is None or after is None:
        return "only in tree" if before is None else "only in commit"
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype:
            return f"{before.dtype} {tuple(before.shape)} -> {after.dtype} {tuple(after.shape)}"
        return f"{int((before != after).sum())} of {before.numel()} entries"
    return f"{before} -> {after}"


def main(args: Sequence[str]) -> int:
    """Run the command and return the exit code: 0 if all are equal, 1 for a difference, 2 for an error."""
    unexpected: list[str] = []

    def work() -> str:
        options = parse_arguments(args)
        selected = select(options)
        with ExitStack() as stack:
            folder = options.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-"))
            if options.work and any((Path(folder) / side).exists() for side in ("commit", "tree")):
                raise UserError(f"--work must be a folder without earlier runs; got '{folder}'.")
            run_both(options, selected, Path(folder).resolve())
            rows, totals = [], dict.fromkeys(layout.GROUPS, 0)
            for name in selected:
                counts, texts = compare(name, Path(folder))
                totals = {group: total + counts[group] for group, total in totals.items()}
                if texts and name not in options.expect:
                    unexpected.append(name)
                expected = "as expected, " if texts and name in options.expect else ""
                rows.append([name, *counts.values(), expected + "; ".join(texts) if texts else EQUAL])
        if not options.only and (unread := [group for group, total in totals.items() if total == 0]):
            raise UserError(f"No run has {unread[0]}: experiments/same_bits/layout.py does not know where they are.")
        table = Table("same_bits", "", ["configuration", *layout.GROUPS, f"{options.commit} and the tree"], rows)
        return f"{table.for_stdout()}\n\n{len(selected) - len(unexpected)} of {len(selected)} as they should be.\n"

    return run_guarded("experiments.same_bits", work) or int(bool(unexpected))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
