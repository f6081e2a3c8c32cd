"""What a run's files say of its model is no consent to run the model's code."""

from __future__ import annotations

import json

import pytest
import torch

from gprune.benchmarks.subjects import load_dense
from gprune.errors import UserError
from tests import tiny_run

CODE = "from pathlib import Path\nPath({ran!r}).touch()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"


def test_a_manifest_that_trusts_code_is_not_believed(tmp_path):
    """Code that leaves a trace."""
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    own = {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    model = {"name": str(folder), "dtype": "float32", "trust_remote_code": True}
    with pytest.raises(UserError, match=r"^--model\.name: no usable configuration"):
        load_dense(tmp_path, {"model": model, "inputs": {"model": "x"}}, torch.float32)
    assert not (tmp_path / "ran").exists()
