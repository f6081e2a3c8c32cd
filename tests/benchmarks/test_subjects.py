"""Models loaded from a run's files: `trust_remote_code` in a manifest is ignored, and changed weights are refused."""

from __future__ import annotations

import json

import pytest
import torch

from gprune.benchmarks.subjects import load_dense_of_run
from gprune.errors import UserError
from tests import tiny_run

CODE = "from pathlib import Path\nPath({ran!r}).touch()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"


def test_trust_remote_code_in_a_manifest_does_not_run_the_models_code(tmp_path):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    auto_map = {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    model = {"name": str(folder), "dtype": "float32", "trust_remote_code": True}
    with pytest.raises(UserError, match=r"^--model\.name.* configuration"):
        load_dense_of_run(tmp_path, {"model": model, "inputs": {"model": "x"}}, torch.float32)
    assert not (tmp_path / "ran").exists()
