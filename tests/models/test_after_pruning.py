"""Discovered types after pruning: fine-tuning, LoRA, merging, `save_pretrained`, and loading without gprune."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import save_file

import gprune
from experiments.architectures import LOADER, example
from gprune.calibration.saliency import channel_saliency
from gprune.models.agreement import random_masks
from gprune.models.blocks import blocks_of
from tests import tiny_run

IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))


# After the models of the first folder, print the kernel of the experts of another model.
PRINT_KERNEL = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
print("KERNEL", model.config._experts_implementation)
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """Return the output of a process that loads pruned models, and cannot import gprune.

    Fine-tuned and merged are a type with stacked experts, and a hybrid with linear attention and shared experts.
    """
    folder = tmp_path_factory.mktemp("after-pruning")
    for model_type in ("gpt_oss", "qwen3_next"):
        model = example(model_type)
        small = gprune.apply_masks(model, random_masks(model)).requires_grad_(True)
        before = small(IDS, use_cache=False).logits.detach()
        small(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        torch.optim.SGD(small.parameters(), lr=1e-2).step()
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        merged = peft.get_peft_model(small.requires_grad_(False), lora).merge_and_unload().eval()
        logits = merged(IDS, use_cache=False).logits.detach().contiguous()
        assert not torch.allclose(logits, before)
        merged.save_pretrained(folder / "models" / model_type)
        save_file({"input_ids": IDS, "logits": logits}, folder / "models" / model_type / "expected.safetensors")
    model = example("gpt_oss")
    masks = random_masks(model)
    for index, (block, ffn) in enumerate(zip(blocks_of(model), masks.ffn, strict=True)):
        kept_neurons = 8 if index == 0 else 16  # unequal, so that the exported type has its own code
        ffn.view(block.experts, -1)[:] = torch.arange(block.neurons) < kept_neurons
    gprune.apply_masks(model, masks).save_pretrained(folder / "experts")
    (folder / "load.py").write_text(LOADER + PRINT_KERNEL)
    return subprocess.run(
        [sys.executable, "-P", "load.py", "models", "experts"], cwd=folder, capture_output=True, text=True, check=False,
        env=tiny_run.environment(folder / "cache", HF_MODULES_CACHE=str(folder / "modules")),
    )  # fmt: skip


@pytest.mark.slow
def test_fine_tuned_and_merged_models_load_without_gprune(loaded):
    rows = [line for line in loaded.stdout.splitlines() if line.startswith("ROW")]
    # The largest difference of logits is 0.
    assert rows == ['ROW ["gpt_oss", 0.0]', 'ROW ["qwen3_next", 0.0]'], loaded.stderr[-2000:]


@pytest.mark.slow
def test_experts_use_the_same_kernel_without_gprune(loaded):
    """transformers reads the source file of a class to find out whether its experts have several kernels."""
    kernel = example("gpt_oss").get_correct_experts_implementation(None)
    assert loaded.stdout.splitlines()[-1] == f"KERNEL {kernel}" != "KERNEL eager", loaded.stderr[-2000:]


class FixedGradients:
    """`StreamingGradients` with the gradient of a single window."""

    def __init__(self, gradient: torch.Tensor):
        self.gradient = gradient

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([1.0, 1.0]), torch.stack([self.gradient, self.gradient])


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "deepseek_v3"])
def test_saliency_counts_every_row_of_a_head(model_type):
    """One type has a gate per query row, the other has key heads larger than value heads.

    Every row counts for a channel, so that the saliency of all channels sums to that of all weights.
    """
    (block, *_) = [block for block in blocks_of(example(model_type)) if block.output is not None]
    generator, total = torch.Generator().manual_seed(0), torch.zeros(())
    metrics = {}
    for name in ("query", "key", "value", "output"):
        weight = block.parts[name].weight
        gradient = torch.randn(weight.shape, generator=generator)
        metrics[name] = FixedGradients(gradient)
        total = total + (weight * gradient).abs().double().sum()
    whole = channel_saliency(block, "attention", metrics)[2]
    assert whole.shape == (block.channels,)
    torch.testing.assert_close(whole.sum(), total, rtol=1e-6, atol=0)
    assert block.query.out_features > block.channels or block.key.out_features > block.value.out_features
