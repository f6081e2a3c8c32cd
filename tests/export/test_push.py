"""Uploads: what would go up is said, what goes up is the folder, byte for byte, and refusals are one line."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from gprune.export import hf
from gprune.export.command import main
from tests.export.test_gguf import byte_tokenizer, make_pruned
from tests.tiny_run import isolated


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one commit of small files asks for."""

    def do_GET(self):
        self._answer({"sha": "0" * 40, "siblings": [], "id": "me/small"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        server = self.server
        server.asked.append((self.path, self.headers.get("Authorization")))
        if server.refuses:
            return self._answer({"error": "You don't have the rights to make a model under this namespace"}, 403)
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            return self._answer({"url": f"{server.url}/me/small", "id": "me/small", "name": "me/small"})
        if self.path == "/api/validate-yaml":  # of the card
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                server.stored[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(
            {"commitUrl": f"{self.server.url}/me/small/commit/0", "commitOid": "0" * 40, "success": True}
        )

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.stored, server.created, server.refuses = [], {}, None, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_mine")
    with isolated(tmp_path / "cache"):
        yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return hf.save_pruned(
        make_pruned(), byte_tokenizer(), tmp_path_factory.mktemp("x") / "model", model_card="# Mine\n"
    )


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def test_without_a_word_nothing_goes_up(hub, folder, capsys):
    assert main([str(folder), "--push", "me/small"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Would go up to me/small")
    assert all(path.name in said for path in folder.iterdir())
    assert not hub.asked


def test_the_folder_goes_up_byte_for_byte(hub, folder, capsys):
    assert main([str(folder), "--push", "me/small", "--no-dry-run"]) == 0
    assert "Went up to me/small" in capsys.readouterr().out
    assert (hub.created["name"], hub.created["organization"], hub.created["visibility"]) == ("small", "me", "private")
    assert hub.stored == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {token for _, token in hub.asked} == {"Bearer hf_of_mine"}


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
    assert main([str(folder), *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not hub.asked


def test_a_link_is_not_published(hub, folder, capsys, tmp_path):
    (tmp_path / "secret").write_text("of mine")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert main([str(folder), "--push", "me/small", "--no-dry-run"]) == 2
    assert "chat_template.jinja is a link out of the folder" in capsys.readouterr().err
    assert not hub.asked


def test_what_the_hub_refuses_is_one_line(hub, folder, capsys):
    hub.refuses = True
    assert main([str(folder), "--push", "me/small", "--no-dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--push me/small: the hub refused or was not reached" in line
    assert not hub.stored
