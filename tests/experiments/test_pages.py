"""Pages of results, the log and the README: their tables are printed by the command that is named above each of them.

A page shows some rows and columns of a table.
"""

import re
import shlex

import pytest

from experiments import engines, frontier, groups, readme, stability, tokens
from gprune.__main__ import main
from tests.snapshots.lists import LISTS
from tests.tiny_run import ROOT

PAGES = sorted((ROOT / "experiments/pages").glob("*.md"))
LOG = ROOT / "experiments/README.md"
COMMANDS = {
    "gprune": main,
    "python -m experiments.engines": engines.main,
    "python -m experiments.frontier": frontier.main,
    "python -m experiments.groups": groups.main,
    "python -m experiments.stability": stability.main,
    "python -m experiments.tokens": tokens.main,
}
TABLE = r":\n\n((?:\|.*\n)+)"
ROWS_OF = re.compile(rf"[Rr]ows of\s`([^`]+)`{TABLE}")
WITHOUT_RECORD = re.compile(rf"Measured without a record.*{TABLE}")
RULE = re.compile(r"[-:]+")  # a cell of the line below the header of a Markdown table
CHOSEN = [
    (page, " ".join(command.split()), table)
    for page in (*PAGES, LOG)
    for command, table in ROWS_OF.findall(page.read_text())
]


def parse_tables(text):
    """Return the cells of the Markdown tables in a text, as lists of rows. The first row of a table is its header."""
    tables, previous_line = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous_line.startswith("|"):
                tables.append([])
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(RULE.fullmatch(cell) for cell in cells):
                tables[-1].append(cells)
        previous_line = line
    return tables


def printed_by(command, capsys):
    """Return the tables that a command prints."""
    program = next(name for name in COMMANDS if command.startswith(f"{name} "))
    assert COMMANDS[program](shlex.split(command.removeprefix(program))) == 0
    return parse_tables(capsys.readouterr().out)


@pytest.mark.parametrize(("page", "command", "table"), CHOSEN, ids=[f"{page.stem} {c}" for page, c, _ in CHOSEN])
def test_every_row_of_a_small_table_is_printed_by_its_command(page, command, table, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    columns, *rows = parse_tables(table)[0]
    printed = [
        [row[header.index(column)] for column in columns]
        for header, *body in printed_by(command, capsys)
        if {*columns} <= {*header}
        for row in body
    ]
    assert rows
    assert [row for row in rows if row not in printed] == [], f"{page.name}: not printed by `{command}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_of_a_page_names_its_command_or_that_it_has_no_record(page):
    text = page.read_text()
    named = [parse_tables(table)[0] for _, table in ROWS_OF.findall(text)]
    named += [parse_tables(table)[0] for table in WITHOUT_RECORD.findall(text)]
    assert [table[0] for table in parse_tables(text) if table not in named] == []


@pytest.mark.slow
def test_the_tables_of_the_readme_are_the_output_of_their_commands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    pasted = re.findall(
        r"<!-- python -m experiments.readme ?(.*?) ?-->\n\n(.*?)\n\n<!-- end of its output -->",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    assert len(pasted) == 2
    for flags, text in pasted:
        assert readme.main(flags.split()) == 0
        assert capsys.readouterr().out.strip() == text


def test_every_list_is_mentioned_on_a_page_or_in_the_log():
    text = " ".join(word for page in (*PAGES, LOG) for word in page.read_text().split())
    assert [name for name in LISTS if name not in text] == []


def test_the_log_links_every_page_and_pages_stay_short():
    log = LOG.read_text()
    assert [page.name for page in PAGES if f"(pages/{page.name}" not in log] == []
    assert len(PAGES) <= 15
    assert sum(len(page.read_text().split()) for page in PAGES) <= 15_000
    assert len(log.split()) <= 5000
