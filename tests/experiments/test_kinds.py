"""Corpora of many kinds: documents from clones of repositories at a fixed commit."""

from __future__ import annotations

import re
import subprocess

import pytest

from experiments import kinds
from experiments.corpora import write
from gprune.corpora.load import load_corpus
from gprune.errors import UserError

CONLLU = "# newdoc id = one\n# text = First sentence.\n1\tFirst\n\n# text = Second one.\n1\tSecond\n"
PLAY = (
    '<TEI xmlns="http://www.tei-c.org/ns/1.0"><div type="act"><div type="scene"><head>Scene 1</head>'
    "<stage>Enter.</stage><sp><speaker>ROBIN </speaker><l>How now,\n spirit? </l></sp>"
    "<sp><speaker>FAIRY </speaker><p><lb/>Over hill, <lb/>over dale. </p></sp></div></div></TEI>"
)
LAW = (
    '<document xmlns="https://code.dccouncil.us/schemas/dc-library"><meta><text>2021</text></meta>'
    "<text>Be it enacted.</text><container><para><text>Section 1 of\n the act.</text></para></container></document>"
)


def commit_files(clone, files: dict[str, str]) -> str:
    """Make a repository with these files, and return its commit."""
    for path, content in files.items():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).write_text(content, encoding="utf-8")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "text"]):
        subprocess.run(["git", "-C", str(clone), *arguments], check=True)
    return subprocess.check_output(["git", "-C", str(clone), "rev-parse", "HEAD"], text=True).strip()


def kind(commit: str, files: str, read=kinds.treebank_document) -> kinds.Kind:
    return kinds.Kind("somebody/texts", commit, files, read, "CC0")


def test_each_format_becomes_plain_documents():
    for read, content, documents in (
        (kinds.treebank_document, CONLLU, ["First sentence. Second one."]),
        (kinds.treebank, CONLLU * 11, [" ".join(["First sentence. Second one."] * 10), "First sentence. Second one."]),
        (kinds.abstracts_of_medicine, '{"1": {"CONTEXTS": ["Aim.", "Result."]}}', ["Aim.\nResult."]),
        (kinds.abstracts_of_papers, '{"source": ["We prune.", "It works."]}\n', ["We prune. It works."]),
        (kinds.play, PLAY, ["ROBIN\nHow now, spirit?\n\nFAIRY\nOver hill, over dale."]),
        (kinds.law, LAW, ["Be it enacted.\n\nSection 1 of the act."]),
    ):
        assert read(content) == documents


def test_documents_come_from_the_fixed_commit_in_the_order_of_paths(tmp_path, monkeypatch):
    clone = tmp_path / "clones/texts"
    commit = commit_files(clone, {"b.conllu": CONLLU, "a.conllu": "# text = Of a.\n", "a.txt": "# text = Not read.\n"})
    commit_files(clone, {"a.conllu": "# text = Later.\n"})
    monkeypatch.setattr(kinds, "KINDS", {"mine": kind(commit, r".*\.conllu")})
    monkeypatch.setattr(kinds, "MIXTURES", {"mixed": {"c4": None, "code_github": 4, "mine": 5}})
    for corpus in ("c4", "code_github"):
        with pytest.raises(
            UserError, match=rf"--output must have the corpus {corpus} .* python -m experiments.corpora"
        ):
            kinds.work(["--clones", str(tmp_path / "clones"), "--output", str(tmp_path / "data")])
        write(tmp_path / "data", corpus, {split: [f"{split} of {corpus}"] for split in ("train", "test")})
    table = kinds.work(["--clones", str(tmp_path / "clones"), "--output", str(tmp_path / "data")])
    assert "unseen" in table
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path / "data"))
    assert load_corpus("mine", "train") == ["Of a."]
    assert load_corpus("mine", "test") == ["First sentence. Second one."]
    assert load_corpus("mixed", "train") == ["train of c4", "trai", "Of a."]
    assert load_corpus("mixed", "test") == ["test of c4", "test", "First"]


def test_a_missing_clone_or_commit_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=re.escape("git clone https://github.com/somebody/texts")):
        kinds.documents_of(kind("0" * 40, ".*"), tmp_path)
    commit_files(tmp_path / "texts", {"a.conllu": CONLLU})
    with pytest.raises(UserError, match="commit 000000000000"):
        kinds.documents_of(kind("0" * 40, ".*"), tmp_path)


def test_unseen_text_and_text_for_choosing_share_no_repository_except_that_of_gum_with_other_genres():
    unseen, choosing = ([kinds.KINDS[name] for name in names] for names in (kinds.UNSEEN, kinds.CHOOSING))
    assert len({(kind.repository, kind.files) for kind in unseen}) >= 10
    assert len({(kind.repository, kind.files) for kind in choosing}) >= 8
    assert {kind.repository for kind in unseen} & {kind.repository for kind in choosing} <= {kinds.GUM[0]}
    assert not {kind.files for kind in unseen} & {kind.files for kind in choosing if kind.repository == kinds.GUM[0]}


def test_the_error_for_a_missing_corpus_has_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    for name in (*(kinds.KINDS.keys() - kinds.TREEBANKS), *kinds.MIXTURES):
        with pytest.raises(UserError, match=rf"python -m experiments\.kinds .* makes {name}\."):
            load_corpus(name, "test")
