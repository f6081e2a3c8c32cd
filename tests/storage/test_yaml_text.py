"""The YAML loader: intuitive types of numbers and text, and refusal of repeated keys and of Python objects."""

from __future__ import annotations

import os
import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gprune.config import parse
from gprune.errors import UserError
from gprune.storage.yaml_text import load_yaml, read_yaml, to_yaml
from gprune.studies.listing import Listing

EXPECTED = {
    "1e-3": 1e-3, "4e-1": 0.4, "1e5": 1e5, "-.5": -0.5, "1.5E+3": 1500.0, "1_000": 1000, "12": 12, "010": 10,
    "08": 8, "1.2.3": "1.2.3",
    "200:00": "200:00", "1:30.5": "1:30.5",
    "2020-01-01": "2020-01-01", "null": None, "": None, "[a, 1]": ["a", 1], "{a: {b: yes}}": {"a": {"b": True}},
    "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}": {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}},
}  # fmt: skip


def test_scalars_and_collections_have_the_intuitive_types():
    for text, expected in EXPECTED.items():
        content = load_yaml(text)
        assert (content, type(content)) == (expected, type(expected)), text


REFUSED = [  # text and expected error
    ("&a [*a]", "recursive"), ("[" * 20_000, "recursion"), ("9" * 5000, "digits"),
    ("a: 1\na: 2", "'a' is repeated on line 2"), ("a: {b: 1, b: 2}", "'b' is repeated on line 1"),
    ("!!python/object/apply:os.system ['touch RAN']", "tag"),
]  # fmt: skip


def test_invalid_or_malicious_yaml_is_refused_quickly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, expected in REFUSED:
        start = time.process_time()
        with pytest.raises(yaml.YAMLError, match=expected):
            load_yaml(text)
        assert time.process_time() - start < 2
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=r"a list; got '.*a\.yaml' \("):
            read_yaml(tmp_path / "a.yaml", what="a list; got")
    assert not (tmp_path / "RAN").exists()  # a command in the text was not run


NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=8)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | NAMES,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(NAMES, inside, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
@example(tree={"name": "1e-3", "0E0": "08"})
def test_all_trees_round_trip_through_yaml(tree):
    assert load_yaml(to_yaml(tree)) == tree


# --- --config files

SECRET = "root:x:0:0\n"
INVALID_CONFIGS = [  # content of a --config file, and parts of the expected error
    ("model: SECRET", ("model",)),
    ("config: SECRET", ("config",)),
    ("corpora: {num_samples: SECRET}", ("corpora.num_samples", "valid integer")),
    ("sparsity: {target: 0.3}\nsparsity.target: 0.4", ("sparsity.target", "twice")),
    ("sparsity: {class_path: os.system, init_args: {command: touch RAN}}", ("class_path",)),
    ("[a]", ("must hold settings",)),
]


def test_a_config_file_cannot_include_other_files_or_call_code_and_errors_name_the_setting(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    for content, expected in INVALID_CONFIGS:
        (tmp_path / "a.yaml").write_text(content.replace("SECRET", str(tmp_path / "secret")))
        with pytest.raises(UserError) as error:
            parse(["--config", str(tmp_path / "a.yaml")])
        assert all(part in str(error.value) for part in expected), error.value
        assert SECRET.strip() not in str(error.value)


def test_trust_remote_code_in_a_config_or_study_file_is_refused_without_the_flag(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {trust_remote_code: true}")
    (tmp_path / "list.yaml").write_text("rows: {a: {model.trust_remote_code: true}}")
    with pytest.raises(UserError, match=r"model\.trust_remote_code must be given as a flag"):
        parse(["--config", str(tmp_path / "a.yaml")])
    with pytest.raises(UserError, match=r"--model\.trust_remote_code=true must be given after --"):
        Listing.read(tmp_path / "list.yaml")
    flag = "--model.trust_remote_code=true"
    assert parse([flag, "--config", str(tmp_path / "a.yaml")]).model.trust_remote_code
    assert Listing.read(tmp_path / "list.yaml", flags=[flag]).rows[0].config.model.trust_remote_code


def test_files_are_read_only_with_config_and_flags_cannot_be_abbreviated(tmp_path):
    (tmp_path / "a.yaml").write_text("{spread: 0.1}")
    for flag in ("--model", "--sparsity.options", "--corpora.drift", "--conf", "--sparsity.targ"):
        with pytest.raises(UserError, match=flag):
            parse(["--sparsity.start=owl", f"{flag}={tmp_path / 'a.yaml'}"])


def test_a_config_can_be_a_pipe():
    read, write = os.pipe()
    os.write(write, b"sparsity: {target: 0.25}\nsparsity.options.spread: 0.1\nsparsity.start: owl\n")
    os.close(write)
    cfg = parse(["--config", f"/dev/fd/{read}", "--model={dtype: bfloat16}"])
    os.close(read)
    assert (cfg.sparsity.target, cfg.sparsity.options, cfg.model.dtype) == (0.25, {"spread": 0.1}, "bfloat16")


def test_config_must_be_a_readable_text_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in ("folder", "bset", "binary"):
        with pytest.raises(UserError, match=rf"--config must be a YAML file .* embedded, gates.*; got '{path}'"):
            parse(["--config", path])
