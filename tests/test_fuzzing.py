"""Entry points accept or refuse any input in the documented way: random input, and a table of damaged runs.

`fuzzing.py` contains the entry points and their input. `TRIES=1000` tries a thousand times as many inputs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gprune.runs import schema
from tests import synthetic_run, tiny_run
from tests.fuzzing import ENTRY_POINTS, READERS, is_acceptable, outcome, replace_file

TRIES = int(os.environ.get("TRIES", "1"))
EXAMPLES = {"flags": 20, "study": 20, "text": 40}  # for an entry point; 12 for the others


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
    """Limit the time and the additional memory (bytes), to detect code that hangs or allocates without bound."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def fail_on_timeout(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail_on_timeout)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + memory, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_random_input_is_accepted_without_output_or_refused_in_one_line(entry_point, tiny):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(
        max_examples=TRIES * EXAMPLES.get(entry_point, 12), deadline=None, suppress_health_check=checks, database=None
    )
    @given(rng=st.randoms(use_true_random=False))
    def run_example(rng):
        with tempfile.TemporaryDirectory() as folder, bounded():
            result = ENTRY_POINTS[entry_point](rng, Path(folder), *([tiny] if entry_point == "model" else []))
        assert is_acceptable(result), result

    run_example()


# --- every damage for every reader --------------------------------------------------------------------------------


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return a function that changes a JSON file and removes its checksum."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        content.pop("checksum", None)
        change(content)
        path.write_text(json.dumps(content))

    return damage


def with_number(name: str, value: object) -> Callable[[Path], None]:
    """Return a function that replaces a field of the second record of metrics.json."""
    return edited(lambda content: content["records"][1].update({name: value}))


TEXTS = {"null": "null", "a list": "[]", "text": '"x"', "empty": "", "deep": "[" * 10**5, "not JSON": "{"}
REPLACED = ("a FIFO", "a device", "a folder", "a loop")
NUMBERS = {"perplexity": (None, "x", 0, float("nan"), float("inf")), "tokens": (-1,), "window_nll": (None, "x", [])}
SETTINGS = {"run": None, "sparsity": 3.5, "model": [], "inputs": 3, "gprune": "x", "recovery": 3}
Damage = tuple[str, Callable[[Path], object], str]
DAMAGES: dict[str, Damage] = {  # the file, the damage, words of the message of every reader
    **{f"{name} is {what}": (name, lambda path, text=text: path.write_text(text), name)
       for name in ("manifest.json", "metrics.json") for what, text in TEXTS.items()},
    **{f"{name} is {what}": (name, partial(replace_file, what=what), name)
       for name in ("manifest.json", "metrics.json") for what in REPLACED},
    **{f"{name} is {value}": ("metrics.json", with_number(name, value), name)
       for name, values in NUMBERS.items() for value in values},
    **{f"without {name}": ("metrics.json", edited(lambda c, name=name: c["records"][1].pop(name)), name)
       for name in ("stage", "perplexity", "window_nll", "content_hash", "seen")},
    **{f"settings: {name}": ("manifest.json", edited(lambda c, n=name: c["settings"].update({n: SETTINGS[n]})), name)
       for name in SETTINGS},
    "no dense model": ("metrics.json", edited(lambda c: c.update(records=c["records"][2:])), "dense"),
    "no records": ("metrics.json", edited(lambda c: c.update(records=[])), "records"),
    "a number twice": ("metrics.json", edited(lambda c: c["records"].append(c["records"][0])), "twice"),
    "other windows": ("metrics.json", with_number("content_hash", "other"), "windows"),
}  # fmt: skip


@pytest.mark.parametrize("row", DAMAGES)
def test_every_damage_to_a_run_is_refused_in_one_line_by_every_reader(row, tmp_path):
    name, damage, expected = DAMAGES[row]
    run = synthetic_run.write_run(tmp_path / "run")
    damage(run / name)
    for entry_point, read in READERS.items():
        with bounded():
            code, lines = outcome(lambda read=read: read(run))
        assert (code, len(lines)) == (2, 1), (entry_point, code, lines)
        assert expected in lines[0], (entry_point, lines)
        assert not list(tmp_path.rglob("report.md"))


def test_the_report_of_the_undamaged_run_is_accepted(tmp_path):
    run = synthetic_run.write_run(tmp_path / "run")
    assert outcome(lambda: READERS["report"](run)) == (0, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [("correct", 5), ("correct", None), ("correct", "012"), ("correct", "01"), ("correct_norm", []), ("acc", "x")],
)
def test_invalid_task_results_are_reported_with_the_name_of_the_field(name, value):
    assert schema.Evaluation.problem({"records": [synthetic_run.ANSWERS]}) is None
    assert name in schema.Evaluation.problem({"records": [synthetic_run.ANSWERS | {name: value}]})
