"""Uploads: what would go up is said, what goes up is the folder, and refusals are one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
from huggingface_hub import HfApi

from gprune.export import hf
from gprune.export.command import main
from tests.export.test_gguf import byte_tokenizer, make_pruned
from tests.tiny_run import isolated


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's client, which takes what huggingface_hub's takes, and does nothing."""
    api = create_autospec(HfApi, instance=True)
    monkeypatch.setattr("huggingface_hub.HfApi", Mock(return_value=api))
    with isolated(tmp_path / "cache"):
        yield api


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x") / "model"
    return hf.save_pruned(make_pruned(), byte_tokenizer(), folder)


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(hub, capsys, *args):
    """The one line on stderr of a command that uploads nothing."""
    assert main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    hub.upload_folder.assert_not_called()
    return line


def test_without_a_word_nothing_goes_up(hub, folder, capsys):
    assert main([str(folder), "--push", "me/small"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Would go up to me/small")
    assert all(path.name in said for path in folder.iterdir())
    assert not hub.method_calls


def test_the_folder_goes_up_into_a_private_repository(hub, folder, capsys):
    assert main([str(folder), "--push", "me/small", "--no-dry-run"]) == 0
    assert "Went up to me/small" in capsys.readouterr().out
    hub.create_repo.assert_called_once_with("me/small", private=True, exist_ok=True)
    sent = hub.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"]) == ("me/small", folder)
    assert sorted(sent["allow_patterns"]) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--push", "small"], "expected owner/name, got 'small'"),
        (["--push", "a/b/c"], "expected owner/name, got 'a/b/c'"),
        (["--push", "me/sm all"], "expected owner/name, got 'me/sm all'"),
        (["--push", "me/small", "--type", "q8_0"], "expected no --type"),
        (["--no-dry-run"], "expected --push"),
    ],
)
def test_what_cannot_be_is_one_line(hub, folder, capsys, args, words):
    assert words in refused(hub, capsys, folder, *args)


def test_a_link_is_not_published(hub, folder, capsys, tmp_path):
    (tmp_path / "secret").write_text("of mine")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    line = refused(hub, capsys, folder, "--push", "me/small", "--no-dry-run")
    assert "chat_template.jinja is a link out of the folder" in line


def test_what_the_hub_refuses_is_one_line(hub, folder, capsys):
    hub.create_repo.side_effect = ConnectionError("no rights to make a model\nunder this namespace")
    line = refused(hub, capsys, folder, "--push", "me/small", "--no-dry-run")
    assert "--push me/small: the hub refused or was not reached (no rights to make a model" in line
