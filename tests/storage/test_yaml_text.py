"""The one loader of YAML: what people write is what they mean, and what a stranger writes costs nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gprune.checks import NO_TEXT
from gprune.config import parse
from gprune.errors import UserError
from gprune.storage.yaml_text import load_yaml, read_yaml
from gprune.studies.listing import Listing

MEANT = {
    "1e-3": 1e-3, "1e5": 1e5, "-.5": -0.5, "1_000": 1000, "010": 10, "1:30": "1:30", "2020-01-01": "2020-01-01",
    "0x10": "0x10", "=": "=", "null": None, "": None, "[a, 1]": ["a", 1], "{a: {b: yes}}": {"a": {"b": True}},
}  # fmt: skip


@pytest.mark.parametrize("text", MEANT)
def test_numbers_and_text_are_what_people_mean(text):
    found = load_yaml(text)
    assert found == MEANT[text]
    assert type(found) is type(MEANT[text])


def bomb(items: str, count: int = 9) -> str:
    """Lists of lists of the one before: a few lines that stand for `count`**9 words."""
    names = "abcdefghi"
    lines = [f"a: &a [{','.join(['lol'] * count)}]"]
    lines += [f"{b}: &{b} {items.format(','.join([f'*{a}'] * count))}" for a, b in itertools.pairwise(names)]
    return "\n".join(lines)


ENDLESS = {
    "lists": bomb("[{}]"),
    "merges": bomb("{{<<: [{}]}}").replace("&a [" + ",".join(["lol"] * 9) + "]", "&a {x: 1}"),
    "depth": "[" * 100_000,
    "mappings": "{a: " * 100_000,
    "blocks": "- " * 100_000,
    "keys": "\n".join(f"k{n}: {n}" for n in range(60_000)),
    "itself": "&a [*a]",
    "length": '"' + "a" * 2**21 + '"',
    "digits": "9" * 5000,
}
REFUSED = {
    "twice": "a: 1\na: 2",
    "twice inside": "a: {b: 1, b: 2}",
    "python": "!!python/object/apply:os.system ['touch RAN']",
    "tag": "a: !!set {b, c}",
    "key is a list": "? [a, b]\n: 3",
    "key is true": "on: 3",
    "two documents": "a: 1\n---\nb: 2",
    "escape": "a: \x1b[31m",
    "merge of a number": "<<: 3",
}


@pytest.mark.parametrize("row", [*ENDLESS, *REFUSED])
@pytest.mark.parametrize("aliases", [False, True])
def test_what_is_no_settings_is_refused_at_once(row, aliases, tmp_path):
    started = time.process_time()
    with pytest.raises(yaml.YAMLError):
        load_yaml((ENDLESS | REFUSED)[row], aliases=aliases)
    assert time.process_time() - started < 1
    (tmp_path / "a.yaml").write_text((ENDLESS | REFUSED)[row])
    with pytest.raises(UserError, match=r"a list, got '.*a\.yaml': ") as error:
        read_yaml(tmp_path / "a.yaml", "a list, got", aliases=aliases)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_lists_may_share_settings():
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: *x"
    assert load_yaml(text, aliases=True) == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": 1, "b": 2}}
    with pytest.raises(yaml.YAMLError, match="aliases"):
        load_yaml(text)


NAMES = st.text(st.characters(exclude_categories=NO_TEXT), max_size=8)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | NAMES,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(NAMES, inside, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_every_tree_comes_back(tree):
    assert load_yaml(yaml.safe_dump(tree, allow_unicode=True)) == tree


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.text("[]{}:,*&<!'\"|>-? \n0ae", max_size=40))
def test_any_text_is_data_or_no_yaml(text):
    for aliases in (False, True):
        with contextlib.suppress(yaml.YAMLError):
            load_yaml(text, aliases=aliases)


# --- files of flags ---------------------------------------------------------------------------------------------

SECRET = "root:x:0:0\n"
FILES = {  # content of a --config file -> what the line says
    "a file behind a group": ("model: SECRET", "expected settings by name for the group model"),
    "a file behind config": ("config: SECRET", "there is no setting 'config'"),
    "a file behind a value": ("corpora: {num_samples: SECRET}", "--corpora.num_samples: expected 2 or more"),
    "yaml in a value": ('corpora: {num_samples: "{a: &a [b], c: *a}"}', "--corpora.num_samples: expected 2 or more"),
    "null for a number": ("sparsity: {target: null}", "--sparsity.target: expected a fraction"),
    "null for a list": ("corpora: {drift: null}", "--corpora.drift: expected a list, each text, got null"),
    "nested and dotted": ("sparsity: {target: 0.3}\nsparsity.target: 0.4", "got 'sparsity.target' twice"),
    "misspelt": ("sparsity: {tarrget: 0.3}", "did you mean 'target'?"),
    "minutes": ("sparsity: {target: 1:30}", "got 1:30"),
    "infinite": ("ridge: .inf", "--ridge: expected 0 or more (at most 1e+30), got inf"),
    "astronomic": ("distill: {tokens: 10000000000000}", "(at most 1,000,000,000,000)"),
    "no mapping": ("[a]", "expected settings such as"),
}


@pytest.mark.parametrize("row", FILES)
def test_a_file_of_flags_names_no_other_file_and_says_what_is_wrong(row, tmp_path):
    content, expected = FILES[row]
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "a.yaml").write_text(content.replace("SECRET", str(tmp_path / "secret")))
    with pytest.raises(UserError) as error:
        parse(["--config", str(tmp_path / "a.yaml")])
    assert expected in str(error.value)
    assert SECRET.strip() not in str(error.value)


def test_no_file_consents_to_run_code(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {trust_remote_code: true}")
    (tmp_path / "list.yaml").write_text("rows: {a: {model.trust_remote_code: true}}")
    with pytest.raises(UserError, match=r"expected --model\.trust_remote_code true as a flag"):
        parse(["--config", str(tmp_path / "a.yaml")])
    with pytest.raises(UserError, match=r"expected --model\.trust_remote_code=true behind --"):
        Listing.read(tmp_path / "list.yaml")
    consent = "--model.trust_remote_code=true"
    assert parse([consent, "--config", str(tmp_path / "a.yaml")]).model.trust_remote_code
    assert Listing.read(tmp_path / "list.yaml", flags=[consent]).rows[0].config.model.trust_remote_code


@pytest.mark.parametrize("flag", ["--model", "--sparsity.options", "--corpora.drift", "--conf", "--sparsity.targ"])
def test_files_come_by_config_alone_and_flags_by_their_whole_names(flag, tmp_path):
    (tmp_path / "a.yaml").write_text("{spread: 0.1}")
    with pytest.raises(UserError) as error:
        parse(["--sparsity.start=owl", f"{flag}={tmp_path / 'a.yaml'}"])
    assert flag in str(error.value)


def test_a_pipe_is_read_once():
    read, write = os.pipe()
    os.write(write, b"sparsity: {target: 0.25}\nsparsity.options.spread: 0.1\nsparsity.start: owl\n")
    os.close(write)
    found = parse(["--config", f"/dev/fd/{read}", "--model={dtype: bfloat16}"])
    os.close(read)
    assert (found.sparsity.target, found.sparsity.options, found.model.dtype) == (0.25, {"spread": 0.1}, "bfloat16")


@pytest.mark.parametrize("place", ["/dev/zero", "folder", "nowhere", "binary"])
def test_what_is_no_file_of_text_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=rf"--config: expected a YAML file of flags, got '{place}'"):
        parse(["--config", place])
