"""Try what strangers hand over for as long as asked: `python -m tests.fuzz --minutes 10 --seed 1`.

Every case runs in a child process with little memory and little time. What is neither success nor one line is printed
with the command that repeats it. Not a test: `tests/test_strangers.py` draws from the same surfaces for seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

from tests import tiny_run
from tests.strangers import SURFACES, Outcome, sound

MEMORY, SECONDS = 2 * 2**30, 30  # of a case: bytes beside what the parent has, and of the clock


def case(surface: str, seed: str, tiny: Path) -> Outcome:
    """One case, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="stranger-") as folder:
        return SURFACES[surface](random.Random(seed), Path(folder), *([tiny] if surface == "model" else []))


def apart(surface: str, seed: str, tiny: Path) -> tuple[str, str]:
    """One case in a child: what became of it, and what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, resource.RLIM_INFINITY))
        signal.alarm(SECONDS)
        try:
            result = case(surface, seed, tiny)
            ending = ("success" if result[0] == 0 else "refusal") if sound(result) else "UNSOUND"
            said = f"{ending}\n{result[0]}\n" + "\n".join(result[1])
        except BaseException:
            said = f"TRACEBACK\n{traceback.format_exc()}"
        os.write(write, said.encode(errors="backslashreplace")[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0 or not said:
        return ("HANG" if status == -signal.SIGALRM else "KILLED"), f"exit status {status}"
    ending, _, rest = said.partition("\n")
    return ending, rest


def fuzz(surfaces: list[str], seed: int, seconds: float, tiny: Path) -> Counter[tuple[str, str]]:
    """Cases of all surfaces in turn until the time is over; (surface, what became of it) -> how often."""
    counts: Counter[tuple[str, str]] = Counter()
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for surface in surfaces:
            ending, said = apart(surface, f"{seed}.{number}", tiny)
            counts[surface, ending] += 1
            if ending not in ("success", "refusal"):
                command = f"python -m tests.fuzz --surface {surface} --case {seed}.{number}"
                print(f"--- {ending}: {command}\n{said[-3000:]}\n", flush=True)
        number += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--surface", nargs="+", choices=SURFACES, default=list(SURFACES))
    parser.add_argument("--case", help="repeat this case of one surface, here, and print its outcome")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        tiny = tiny_run.save_tiny_model(Path(folder) / "tiny")
        with tiny_run.isolated(Path(folder) / "cache"):
            if options.case:
                (surface,) = options.surface
                print(case(surface, options.case, tiny))
                return 0
            for surface in options.surface:  # what they import, and the embedded model, children then find
                with contextlib.suppress(Exception):
                    case(surface, "first", tiny)
            print(f"seed {options.seed}", flush=True)
            counts = fuzz(options.surface, options.seed, 60 * options.minutes, tiny)
    for surface in options.surface:
        print(f"{surface:10}", ", ".join(f"{n} {ending}" for (s, ending), n in sorted(counts.items()) if s == surface))
    return int(any(ending not in ("success", "refusal") for _, ending in counts))


if __name__ == "__main__":
    sys.exit(main())
