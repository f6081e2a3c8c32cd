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
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gprune.runs.folder import check_evaluation
from gprune.storage.files import read_json, write_json
from tests import synthetic_run, tiny_run
from tests.fuzzing import ENTRY_POINTS, READERS, is_acceptable, outcome

TRIES = int(os.environ.get("TRIES", "1"))
EXAMPLES = {"flags": 20, "study": 20, "text": 40}  # for an entry point; 12 for the others


@pytest.fixture(scope="module", autouse=True)
def _isolated(tmp_path_factory):
    with tiny_run.isolated(tmp_path_factory.mktemp("cache")):
        yield


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
def test_random_input_is_accepted_without_a_message_or_refused_in_one_line(entry_point):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(
        max_examples=TRIES * EXAMPLES.get(entry_point, 12), deadline=None, suppress_health_check=checks, database=None
    )
    @given(rng=st.randoms(use_true_random=False))
    def run_example(rng):
        with tempfile.TemporaryDirectory() as folder, bounded():
            result = ENTRY_POINTS[entry_point](rng, Path(folder))
        assert is_acceptable(result), result

    run_example()


# --- every damage for every reader --------------------------------------------------------------------------------


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return a function that changes a JSON file, which keeps its run's key and gets a valid checksum."""

    def damage(path: Path) -> None:
        run = json.loads(path.read_text()).get("run")
        content = read_json(path)
        change(content)
        write_json(path, content, run=run)

    return damage


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def edit_without_checksum(path: Path) -> None:
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"})
    )


TEXTS = {"null": "null", "a list": "[]", "text": '"x"', "empty": "", "deep": "[" * 10**5, "not JSON": "{"}
FILES: dict[str, Callable[[Path], object]] = {
    **{what: lambda path, text=text: path.write_text(text) for what, text in TEXTS.items()},
    "a folder": replace_by_folder, "edited": edit_without_checksum,
}  # fmt: skip
SETTINGS = {"run": None, "sparsity": 3.5, "model": [], "gprune": "x", "recovery": 3}
Damage = tuple[str, Callable[[Path], object], str]
DAMAGES: dict[str, Damage] = {  # the file, the damage, words of the message of every reader
    **{f"{name} is {what}": (name, damage, name)
       for name in ("manifest.json", "metrics.json") for what, damage in FILES.items()},
    **{f"without {name}": ("metrics.json", edited(lambda c, name=name: c["records"][1].pop(name)), name)
       for name in ("stage", "perplexity", "window_nll", "content_hash", "seen")},
    **{f"settings: {name}": ("manifest.json", edited(lambda c, n=name: c["settings"].update({n: SETTINGS[n]})), name)
       for name in SETTINGS},
    "of another run": ("metrics.json", lambda path: write_json(path, read_json(path), run="x"), "another run"),
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


@pytest.mark.parametrize("name", ["kind", "questions", "acc", "content_hash"])
def test_task_results_without_a_required_name_are_refused(name):
    check_evaluation({"records": [synthetic_run.ANSWERS]})
    with pytest.raises(ValueError, match=f"without {name}"):
        check_evaluation({"records": [{key: value for key, value in synthetic_run.ANSWERS.items() if key != name}]})
