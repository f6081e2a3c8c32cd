"""What a terminal shows: steps, bars, the time that is left; nothing where there is none."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from gprune.report import Estimate, Table
from gprune.screen import Screen


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def shown(screen: Screen, width: int) -> list[str]:
    """The lines of a screen at this moment."""
    console = terminal(width)
    console.print(screen)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_bars_fit_and_say_step_speed_and_time_left(width):
    worked = [0.0]
    with Screen({1: 100, 2: 300}, lambda: worked[0], console=terminal(width)) as screen:
        assert screen.step(1, "Calibrating") == "step 1/2 Calibrating"
        advance = screen.bar("Calibrating on wiki, web, python_code", 4)
        for _ in range(3):
            time.sleep(0.01)
            worked[0] += 25
            advance(25, "loss 3.210")
        run, step = shown(screen, width)
    assert re.fullmatch(r"run .*0:00:\d\d left", run)
    assert re.fullmatch(r"step 1/2 Calibrating on wiki, .+ [\d,]+ tokens/s 0:00:\d\d left", step)
    assert max(len(run), len(step)) == width


def test_the_run_is_as_far_as_its_work_whatever_the_cache_had():
    worked = [0.0]
    screen = Screen({1: 100, 2: 100, 3: 200}, lambda: worked[0], console=terminal(80))
    assert screen.share_done() == 0
    assert screen.seconds_left() is None
    screen.step(1, "one")
    worked[0] = 60
    assert screen.share_done() == pytest.approx(0.15)
    screen.step(2, "two")  # step 1 took less than was planned
    assert screen.share_done() == pytest.approx(0.25)
    worked[0] = 1000  # and step 2 more
    assert screen.share_done() == pytest.approx(0.5)
    screen.step(3, "three")
    screen.step(3, "another part of it")
    assert screen.share_done() == pytest.approx(0.5)
    worked[0] = 1100
    assert screen.share_done() == pytest.approx(0.75)
    assert screen.seconds_left() >= 0


def test_without_a_terminal_nothing_is_shown(capsys):
    with Screen({1: 10}) as screen:
        screen.step(1, "one")
        screen.bar("one", 2)(5)
    assert capsys.readouterr() == ("", "")


TABLE = Table(
    "result", "", ["", "wiki*", "web", "python_docs", "stackexchange", "unseen / base"],
    [["averaged + least_squares+distill", 1.5, 22.25, 333.125, 4444.0, Estimate(0.5, 0.25, 0.75)],
     ["dense", 1.0, 2.0, None, 4.0, None]],
    {"unseen / base": 3}, "\\* seen: a note that is long enough to be wrapped in a terminal that has but few columns.",
)  # fmt: skip


@pytest.mark.parametrize("width", [50, 60, 80, 100, 120, 200])
def test_a_table_fits_any_terminal_and_loses_nothing(width):
    text = TABLE.to_terminal(width)
    assert max(map(len, text.splitlines())) <= width
    for cell in ("wiki*", "python_docs", "1.50", "333.12", "4444.00", "0.500 [0.250, 0.750]", "unseen / base"):
        assert cell in text, cell
    assert "\\" not in text
    assert text.count("dense") == {50: 3, 60: 2}.get(width, 1)


def test_where_stdout_is_no_terminal_tables_are_markdown():
    assert TABLE.shown() == TABLE.to_text().replace("\\*", "*")
