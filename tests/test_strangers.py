"""Properties of what takes files and flags from strangers, and every cause at every surface.

The surfaces and what is handed over are in `strangers.py`; `python -m tests.fuzz` goes on for as long as asked.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gprune.benchmarks.command import main as evaluate
from gprune.export.command import main as export
from gprune.report.command import main as report
from gprune.runs import schema
from gprune.runs.results import load_run
from tests import made_up, tiny_run
from tests.strangers import SURFACES, changed, outcome, sound, tree

EXAMPLES = {"report": 12, "load_run": 20, "export": 12, "evaluate": 12, "flags": 40, "--config": 25, "study": 25,
            "model": 12, "text": 40}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _isolated(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, tiny_run.isolated(tmp_path_factory.mktemp("cache")):
        tiny_run.quick(patch)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@contextmanager
def bounded(seconds: int = 20, memory: int = 3 * 2**30) -> Iterator[None]:
    """Little time and little more memory than there is now, for what hangs or grows."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def hangs(*_: object) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + memory, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("surface", SURFACES)
def test_whatever_comes_is_success_or_one_line(surface, tiny):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=EXAMPLES[surface], deadline=None, suppress_health_check=checks, database=None)
    @given(rng=st.randoms(use_true_random=False))
    def surfaces(rng):
        with tempfile.TemporaryDirectory() as folder, bounded():
            found = SURFACES[surface](rng, Path(folder), *([tiny] if surface == "model" else []))
        assert sound(found), found

    surfaces()


@settings(max_examples=300, deadline=None, database=None)
@given(rng=st.randoms(use_true_random=False))
def test_shapes_say_what_is_wrong_or_give_finite_numbers(rng):
    whole = {"summary": made_up.SUMMARY, "records": made_up.records()}
    content = changed(rng, whole) if rng.random() < 0.8 else tree(rng)
    said = schema.metrics(content)
    if said is None:
        for r in content["records"]:
            assert 1 <= r["perplexity"] <= 1e300
            assert all(0 <= value <= 1e12 for value in r["window_nll"])
    else:
        assert said
        assert "\n" not in said


# --- every cause at every surface ---------------------------------------------------------------------------------


def edited(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A JSON file changed by hand, without its checksum."""

    def edit(run: Path) -> None:
        content = json.loads((run / name).read_text())
        content.pop("checksum", None)
        change(content)
        (run / name).write_text(json.dumps(content))

    return edit


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of a file."""

    def edit(run: Path) -> None:
        (run / name).unlink()
        make(run / name)

    return edit


FILES = ("manifest.json", "metrics.json")
SHAPES = {
    "null": "null",
    "a list": "[]",
    "a number": "3",
    "text": '"x"',
    "nothing": "",
    "deep": "[" * 10**5,
    "no JSON": "{",
}
PLACES = {
    "a FIFO": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/zero"), "a folder": Path.mkdir,
    "a loop": lambda path: path.symlink_to(path.name), "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
}  # fmt: skip
NUMBERS = {
    "null": None,
    "text": "x",
    "zero": 0,
    "negative": -1.0,
    "NaN": float("nan"),
    "endless": float("inf"),
    "list": [],
}
CAUSES: dict[str, Callable[[Path], object]] = {
    **{f"{name} is {what}": instead(name, lambda p, text=text: p.write_text(text))
       for name in FILES for what, text in SHAPES.items()},
    **{f"{name} is {what}": instead(name, make) for name in FILES for what, make in PLACES.items()},
    **{f"{number} is {what}": edited("metrics.json", lambda c, n=number, v=value: c["records"][1].update({n: v}))
       for number in ("perplexity", "nll", "tokens", "seq_len", "window_nll") for what, value in NUMBERS.items()},
    **{f"without {key}": edited("metrics.json", lambda c, key=key: c["records"][1].pop(key))
       for key in ("stage", "corpus", "perplexity", "window_nll", "content_hash", "seen")},
    **{f"settings.{key} is {what}": edited("manifest.json", lambda c, k=key, v=value: c["settings"].update({k: v}))
       for key in ("run", "sparsity", "model", "inputs", "gprune", "recovery")
       for what, value in {"null": None, "a number": 3.5, "a list": []}.items()},
    "no dense model": edited("metrics.json", lambda c: c.update(records=c["records"][2:])),
    "no records": edited("metrics.json", lambda c: c.update(records=[])),
    "a number twice": edited("metrics.json", lambda c: c["records"].append(c["records"][0])),
    "other windows": edited("metrics.json", lambda c: c["records"][3].update(content_hash="other")),
    "another seed": edited("metrics.json", lambda c: [r.update(seed=1) for r in c["records"]]),
    "another run's": lambda run: shutil.copy(made_up.write_run(run.parent / "o", ridge=0.5) / "metrics.json", run),
}  # fmt: skip
READERS: dict[str, Callable[[Path], int | None]] = {
    "report": lambda run: report([str(run)]),
    "export": lambda run: export([str(run), "--unchecked"]),
    "evaluate": lambda run: evaluate([str(run), "--tasks", "wikitext2"]),
    "load_run": lambda run: load_run(run) and 0,
}


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_is_one_line_at_every_surface(cause, tmp_path):
    run = made_up.write_run(tmp_path / "run")
    CAUSES[cause](run)
    for surface, read in READERS.items():
        with bounded():
            code, lines = outcome(lambda read=read: read(run))
        assert (code, len(lines)) == (2, 1), (surface, code, lines)
        assert "run" in lines[0]
        assert not list(tmp_path.rglob("report.md"))


def test_the_run_that_causes_are_made_from_is_read(tmp_path):
    run = made_up.write_run(tmp_path / "run")
    assert outcome(lambda: report([str(run)])) == (0, [])


@pytest.mark.parametrize(
    "damage",
    [{"correct": 5}, {"correct": None}, {"correct": "012"}, {"correct": "01"}, {"correct_norm": []}, {"acc": "x"}],
)
def test_answers_that_are_none_are_named(damage):
    record = {"kind": "zero_shot", "task": "piqa", "stage": "base", "split": "test", "dtype": "float32", "note": "",
              "standard_protocol": True, "content_hash": "h", "questions": 3, "acc": 0.5, "acc_stderr": 0.1,
              "acc_norm": None, "acc_norm_stderr": None, "correct": "010"}  # fmt: skip
    assert schema.evaluation({"records": [record]}) is None
    assert next(iter(damage)) in schema.evaluation({"records": [record | damage]})
