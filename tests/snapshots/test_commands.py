"""Every command in README, docs and notebooks has the settings that it had when the snapshot was written."""

from __future__ import annotations

import pytest

from tests.snapshots import commands, files

STORED = files.read("commands")
PAGES = dict.fromkeys([*commands.PAGES, *STORED["pages"]])


def fail_for(where: str, lines: list[str]) -> None:
    """Fail with the settings that differ, if any."""
    if lines:
        pytest.fail("\n".join([f"{where}:", *lines, files.REGENERATE]), pytrace=False)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_those_of_the_snapshot(page):
    stored = STORED["pages"].get(page, {})
    found = commands.commands_in(page) if page in commands.PAGES else []
    lines = [f"not in the snapshot: {command}" for command in found if command not in stored]
    fail_for(page, lines + [f"no longer on the page: {command}" for command in stored if command not in found])


def test_the_defaults_of_every_command_are_those_of_the_snapshot():
    for name, settings in commands.default_settings().items():
        fail_for(f"defaults of {name}", commands.different_settings(STORED["defaults"][name], settings))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_has_the_same_settings(page):
    """Commands of the snapshot, so that one that was removed from a page still means the same."""
    defaults = commands.default_settings()  # a default that has changed fails in the test above alone
    for command, expected in STORED["pages"].get(page, {}).items():
        got = commands.changed_settings(command, defaults)
        fail_for(f"{page}, `{command}`", commands.different_settings(expected, got))
