"""Entry points accept or refuse random input in the documented way.

`fuzzing.py` contains the entry points and their input. `TRIES=1000` tries a thousand times as many inputs.
"""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny_run
from tests.fuzzing import ENTRY_POINTS, is_acceptable

TRIES = int(os.environ.get("TRIES", "1"))
EXAMPLES = {"flags": 20, "study": 20, "text": 40}  # for an entry point; 12 for the others


@pytest.fixture(scope="module", autouse=True)
def _isolated(tmp_path_factory):
    with tiny_run.isolated(tmp_path_factory.mktemp("cache")), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gprune.method.dry_run.count_tokens", lambda *_: "0")  # 4 s for the whole embedded text
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
