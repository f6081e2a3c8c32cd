"""Terminal output: progress bars, tables and escaping. Without a terminal there are no bars."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from gprune import __main__, cli
from gprune.benchmarks import measurement
from gprune.report import Estimate, Report, Table
from gprune.screen import Screen
from tests import synthetic_run
from tests.tiny_run import isolated, on_a_terminal


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def lines_of(screen: Screen, width: int) -> list[str]:
    """Return the current lines of a screen."""
    console = terminal(width)
    console.print(screen)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_and_shows_step_speed_and_time_left(width):
    work_done = [0.0]
    with Screen({1: 100, 2: 300}, lambda: work_done[0], console=terminal(width)) as screen:
        assert screen.step(1, "Calibrating") == "step 1/2 Calibrating"
        screen.begin_part("Calibrating on wiki, x[/b].txt")
        for _ in range(3):
            time.sleep(0.01)
            work_done[0] += 25
            screen.add_batch(25, "loss 3.210")
        line, _ = lines_of(screen, width)
    assert re.fullmatch(r"step 1/2 Calibrating on wiki, x\[.+ [\d,]+ tokens/s 0:00:\d\d", line)
    assert len(line) == width


def test_progress_is_the_share_of_work_also_if_a_step_takes_less_than_planned():
    """Step 1 is planned with 100 units of work and needs 40, so the total becomes 340 instead of 400."""
    work_done = [0.0]
    screen = Screen({1: 100, 2: 100, 3: 200}, lambda: work_done[0], console=terminal(80))
    task = screen.tasks[0]

    def percentage_after(work: float) -> float:
        work_done[0] = work
        screen.add_batch()
        return task.percentage

    assert percentage_after(0) == 0
    screen.step(1, "one")
    assert percentage_after(40) == pytest.approx(10)
    screen.step(2, "two")
    assert percentage_after(140) == pytest.approx(100 * 140 / 340)
    assert task.time_remaining >= 0
    screen.step(3, "three")
    screen.step(3, "another part of it")
    assert percentage_after(240) == pytest.approx(100 * 240 / 340)


def test_without_a_terminal_nothing_is_shown(capsys):
    with Screen({1: 10}) as screen:
        screen.step(1, "one")
        screen.add_batch(5)
    assert capsys.readouterr() == ("", "")


TABLE = Table(
    "result", "", ["", "wiki*", "[/b]", "python_docs", "stackexchange", "unseen / base"],
    [["averaged + least_squares+distill", 1.5, 22.25, 333.125, 4444.0, Estimate(0.5, 0.25, 0.75)],
     ["dense", 1.0, 2.0, None, 4.0, None]],
    {"unseen / base": 3}, "* seen: a note that is long enough to be wrapped in a terminal that has only few columns.",
)  # fmt: skip


def test_a_table_is_split_to_the_width_of_the_terminal_and_shows_all_cells():
    text = on_a_terminal(lambda: print(TABLE.for_stdout()), 60)
    assert max(map(len, text.splitlines())) <= 62  # pandas marks continued lines
    for cell in ("wiki*", "[/b]", "python_docs", "1.50", "333.12", "4444.00", "0.500 [0.250, 0.750]", "unseen / base"):
        assert cell in text, cell
    assert text.count("averaged + least_squares+distill") == text.count("dense") > 1  # in each part


NAMES = [
    "x[/b].txt", "[red]", "[a](b)", "<b>", "a|b", "_x_", "__x__", "*x*", "a*b*c", "~~x~~", "$x$", "100%", "&amp;",
    "`x`", "``", "\\|", "least_squares",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_special_characters_of_names_literally(name):
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    table = Table("t", "", ["run", name], [[name, 1.5], ["b*", Estimate(2.0, 1.0, 3.0)]])
    cells = [token.children for token in reader.parse(table.to_markdown()) if token.type == "inline"]
    assert {child.type for children in cells for child in children} == {"text"}
    texts = ["".join(child.content for child in children) for children in cells]
    assert texts == ["run", name, name, "1.50", "b*", "2.00 [1.00, 3.00]"]


def screen_after(written: str, width: int) -> list[str]:
    """Return the lines of a terminal after some output. Most control sequences, such as colours, are ignored."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", written, re.DOTALL):
        if part == "\x1b[2K":  # clear the line
            lines[row] = ""
        elif part.startswith("\x1b") and part.endswith("A"):  # move up, by default one row
            row -= int(part[2:-1] or 1)
        elif part.startswith("\x1b"):
            continue
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        else:
            if column == width:  # a full line wraps before the next character
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines if line.strip()]


def test_ctrl_c_leaves_one_line_and_no_bar():
    def wait():
        with Screen({1: 1}) as screen:
            screen.step(1, "Waiting")
            time.sleep(20)

    # The child process must end with 0, and 130 is the exit code of Ctrl-C.
    written = on_a_terminal(lambda: cli.run_guarded("train.py", wait) - 130, 80, press=("Waiting", b"\x03"))
    assert "step 1/1 Waiting" in written
    assert screen_after(written, 80) == ["train.py: Interrupted."]


MARKUP = "[b]a.txt"  # is markup for rich


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Return commands that print a table with a file name that looks like markup. The work before it is replaced."""
    records = [r | {"corpus": r["corpus"].replace("stories", MARKUP)} for r in synthetic_run.records()]
    monkeypatch.setattr(synthetic_run, "records", lambda: records)
    run = synthetic_run.write_run(tmp_path / "run")
    result = SimpleNamespace(records=records, summary=synthetic_run.SUMMARY, path=run)
    monkeypatch.setattr("gprune.method.prune.prune", lambda cfg: result)
    monkeypatch.setattr(Report, "write", lambda report, folder: [Path(folder) / "report.md"])
    measured = synthetic_run.ANSWERS | {"task": MARKUP, "run": "a run"}
    monkeypatch.setattr(measurement, "evaluate", lambda *args, **options: ([measured], None))
    with isolated(tmp_path / "cache"):
        yield {
            "train.py": lambda: cli.main([f"--run.dir={tmp_path}", "--logging.mode=disabled"]),
            "gprune report": lambda: __main__.run("report", [str(run)]),
            "gprune evaluate": lambda: __main__.run("evaluate", ["a model", "--tasks", "piqa"]),
        }


@pytest.mark.parametrize("name", ["train.py", "gprune report", "gprune evaluate"])
def test_commands_print_tables_with_plain_names_on_a_terminal(name, commands):
    text = on_a_terminal(commands[name], 80)
    assert "\x1b" not in text
    assert MARKUP in text
    assert not re.search("^\\|", text, re.M)  # no Markdown


def test_without_a_terminal_tables_are_markdown():
    assert TABLE.for_stdout() == TABLE.to_text().replace("\\*", "*")
    assert "\n\n\\* seen: a note" in TABLE.to_text()  # a leading * would be a list item in Markdown
