"""What the dry run says of FLOPs and time."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from experiments.bench.measure import flops as counted
from gprune.config import RunConfig
from gprune.config.groups import CorporaConfig
from gprune.config.running import EvaluationConfig
from gprune.models.losses import next_token_loss
from gprune.pipeline.cost import count_tokens, flops, speed
from tests import tiny_run
from tests.tiny_families import make_tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_token_costs_what_torch_counts(family):
    """Without learning, recovery and Gram matrices all tokens go forward; calibration leaves the head out."""
    model = make_tiny(family)
    corpora = CorporaConfig(num_samples=2, seq_len=64)
    cfg = RunConfig(
        gprune=False, recovery="none", corpora=corpora, evaluation=EvaluationConfig(seq_len=64, controls=[])
    )
    ids = torch.randint(3, 128, (2, 64))
    head = counted(lambda: model.get_output_embeddings()(torch.zeros(128, 32)))
    token = (counted(lambda: model.get_decoder()(input_ids=ids, use_cache=False)) + head) / 128
    forward, backward = count_tokens(cfg)
    calibrated = len(cfg.calibration) * 2 * 64
    assert backward == 0
    assert flops(cfg, model) == pytest.approx(forward * token - calibrated * head / 128, rel=1e-9)


def test_learning_costs_twice_a_pass(tiny_model):
    """Frozen weights: forward, and backward to activations; of the head both in the forward pass."""
    learning = RunConfig(recovery="none", corpora=CorporaConfig(seq_len=64), evaluation=EvaluationConfig(curve=[0.2]))
    more = replace(learning, sparsity=replace(learning.sparsity, epochs=3))
    tokens = [count_tokens(cfg) for cfg in (learning, more)]
    difference = [b - a for a, b in zip(*tokens, strict=True)]
    ids = torch.randint(3, 128, (2, 64))
    tiny_model.set_attn_implementation("eager")  # the counter does not know the fused one's backward pass

    def step() -> None:
        asks = tiny_model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
        next_token_loss(tiny_model, ids).backward()
        asks.remove()

    forward = counted(lambda: tiny_model(input_ids=ids)) / 128
    expected = difference[0] * forward + difference[1] * counted(step) / 128
    assert flops(more, tiny_model) - flops(learning, tiny_model) == pytest.approx(expected, rel=0.01)


def test_the_dry_run_says_them_and_a_time(tmp_path, capsys):
    with tiny_run.isolated(tmp_path / "cache"):
        world = tiny_run.make_world(tmp_path)
        assert tiny_run.main(world.args(tmp_path / "runs", "--dry_run=true")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compute")]
    number = r"[\d.e+]+"
    assert re.match(rf"compute +at most {number} [kMG]FLOP: {number} s at {number} [MGT]FLOP/s, which matrix", line)


def test_speed_is_measured():
    start = [speed(torch.device("cpu"), torch.float32, (64, 64), seconds=0.02) for _ in range(2)]
    assert all(1e6 < found < 1e14 for found in start)
