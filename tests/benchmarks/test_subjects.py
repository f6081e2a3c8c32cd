"""What a run's files say of its model is no consent to run the model's code."""

from __future__ import annotations

import json

import pytest
import torch

from gprune.benchmarks.subjects import load_dense
from gprune.errors import UserError
from tests import tiny_run

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
"""


@pytest.fixture
def stranger(tmp_path):
    """A model folder with code of its own that leaves a trace."""
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return folder


def test_a_manifest_that_trusts_code_is_not_believed(stranger, tmp_path):
    model = {"name": str(stranger), "dtype": "float32", "trust_remote_code": True}
    settings = {"model": model, "inputs": {"model": "x"}}
    with pytest.raises(UserError, match=r"^--model\.name: no usable configuration"):
        load_dense(tmp_path, settings, torch.float32)
    assert not (tmp_path / "ran").exists()
