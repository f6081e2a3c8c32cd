"""`experiments.moe`: the mixture that is made from a dense model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from experiments.moe import balanced_groups, start


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_with_all_experts_and_equal_weights_the_mixture_is_the_dense_model(dense, tokens, tmp_path):
    mixture = start(dense, tokens, shared=32, experts=8, top_k=8)
    for layer in mixture.model.layers:
        layer.mlp.gate.weight.zero_()
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    config = loaded.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen2_moe", 8, 8)
    torch.testing.assert_close(loaded(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)


def test_groups_have_equal_sizes_and_similar_rows():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4).repeat_interleave(6, dim=0)  # rows 0 to 5 are alike, and so on
    shuffled = torch.randperm(24, generator=generator)
    noisy = centres[shuffled] + 0.1 * torch.rand(24, 4, generator=generator)
    groups = balanced_groups(noisy, 4, generator)
    assert groups.shape == (4, 6)
    assert groups.flatten().sort().values.tolist() == list(range(24))
    for group in groups:
        assert len({int(row) // 6 for row in shuffled[group]}) == 1
