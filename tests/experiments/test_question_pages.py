"""Pages of questions and the README: tables are the output of commands on the committed records, and every list has a
page.

`tests/snapshots/test_lists.py` tests the output of `gprune study LIST --table`, which it has printed already. Two
tables, on metrics.md and dependence.md, are not tested: they are the output of a script that is not kept.
"""

import re
import shlex

import pytest
import yaml

from experiments import engines, groups, readme, stability, tokens
from gprune.__main__ import main
from tests.tiny_run import ROOT

PAGES = sorted((ROOT / "experiments/questions").glob("*.md"))
LISTS = [p for p in sorted((ROOT / "experiments").glob("**/*.yaml")) if "rows" in yaml.safe_load(p.read_text())]
COMMANDS = {
    "gprune": main,
    "python -m experiments.engines": engines.main,
    "python -m experiments.groups": groups.main,
    "python -m experiments.readme": readme.main,
    "python -m experiments.stability": stability.main,
    "python -m experiments.tokens": tokens.main,
}
OUTPUT = re.compile(rf"<!-- ({'|'.join(COMMANDS)}) ?(.*?) -->\n\n(.*?)\n\n<!-- end of its output -->", re.DOTALL)
OTHER_TABLES = [  # not those of tests/snapshots/test_lists.py
    (page, *match.groups())
    for page in (*PAGES, ROOT / "README.md")
    for match in OUTPUT.finditer(page.read_text(encoding="utf-8"))
    if not re.fullmatch(r"study \S+ --table", match[2])
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command", "args", "pasted"),
    OTHER_TABLES,
    ids=[f"{page.stem} {args}" for page, _, args, _ in OTHER_TABLES],
)
def test_every_table_that_test_lists_omits_is_the_output_of_its_command(
    page, command, args, pasted, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    assert COMMANDS[command](shlex.split(args)) == 0
    assert capsys.readouterr().out.strip() == pasted, f"paste the output of `{command} {args}` into {page.name}"


def test_every_list_is_mentioned_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [p.name for p in LISTS if str(p.relative_to(ROOT)) not in text] == []


def test_the_index_links_every_page_and_has_at_most_5000_words():
    index = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"(questions/{page.name})" not in index] == []
    assert len(index.split()) <= 5000
