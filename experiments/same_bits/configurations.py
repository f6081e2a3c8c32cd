"""The compared configurations, as flags of `train.py`.

Together they have every allocation, recovery, scope without whole experts and kind of target, and all shipped
configurations except those that name text, whose methods are spelled out.
"""

from __future__ import annotations

import shlex

# The tiny random model, and text of the standard library: nothing is downloaded.
SMOKE = "--config smoke --trainer.accelerator cpu --trainer.precision 32-true --logging.mode disabled"
# Widths and the target are set, so that a change of their defaults does not change these configurations.
TINY = f"{SMOKE} --sparsity.width_multiple 1"
HALF = "--sparsity.target 0.5"
POOLED = "--gprune false --corpora.score null"  # as the shipped configurations `trained` and `untrained`, without text

TINY_CONFIGURATIONS = {
    "default": f"{SMOKE} {HALF}",
    "paper": f"{TINY} {HALF} --config paper --corpora.learn [python_docs] --corpora.learn_samples 8",
    "gates": f"{TINY} {HALF} --config gates",
    "best": f"{TINY} {HALF} {POOLED} --importance wanda_sp --sparsity.allocation uniform "
    "--recovery [least_squares,distill] --distill.tokens 512",
    "untrained": f"{TINY} {HALF} {POOLED} --importance act_norm --sparsity.allocation reconstruction "
    "--recovery least_squares",
    "equal_bias": f"{TINY} --sparsity.allocation equal --sparsity.target 30% --partition.method drift_only "
    "--reliability.metric consensus --recovery bias",
    "global_attention": f"{TINY} --sparsity.allocation global --sparsity.scope attention+ffn --sparsity.target 0.18M "
    "--recovery least_squares",
    "owl_protect": f"{TINY} --sparsity.allocation owl --sparsity.options.spread 0.05 --sparsity.protect [0,-1] "
    "--sparsity.target 0.3 --recovery distill --distill.targets mlp",
    "reconstruction": f"{TINY} {HALF} --sparsity.allocation reconstruction --gprune false --recovery least_squares",
    "blocks_lora": f"{TINY} {HALF} --sparsity.scope attention+ffn+blocks --sparsity.learn both --sparsity.loss kl "
    "--recovery [least_squares,distill] --distill.targets lora",
    "blocks_influence": f"{TINY} {HALF} --sparsity.scope ffn+blocks --sparsity.block_choice influence "
    "--importance taylor --partition.method random --recovery none",
    "bytes_uniform_width": f"{TINY} --sparsity.target 700KiB --sparsity.uniform_width true --recovery least_squares",
    "speed": f"{TINY} --sparsity.target 1.3x --sparsity.scope attention+ffn --recovery none "
    "--sparsity.width_multiple 64",
    # Small rises, because more cuts make the random model better.
    "quality": f"{TINY} --sparsity.target +0.1% --sparsity.allocation uniform --recovery least_squares",
    "quality_learned": f"{TINY} --sparsity.target +1% --importance random --recovery none",
    "bfloat16": f"{TINY} {HALF} --model.dtype bfloat16 --importance wifv --sparsity.epochs 2 "
    "--recovery [least_squares,distill]",
}
SMOLLM2 = f"{SMOKE} --model.name smollm2-135m --corpora.num_samples 2 --sparsity.width_multiple 1"
REAL_CONFIGURATIONS = {
    "smollm2": f"{SMOLLM2} {HALF} --recovery [least_squares,distill] --distill.tokens 256",
    "smollm2_bfloat16": f"{SMOLLM2} --model.dtype bfloat16 --config gates --sparsity.scope attention+ffn "
    "--sparsity.target 0.3 --recovery least_squares",
    "gemma": f"{SMOKE} --model.name gemma-3-270m --corpora.num_samples 2 --sparsity.width_multiple 1 "
    "--sparsity.scope ffn+blocks --sparsity.target 0.3 --recovery least_squares",
}


def configurations(*, real: bool) -> dict[str, list[str]]:
    """Return name -> flags of the tiny configurations and, with `real`, of those of SmolLM2."""
    texts = TINY_CONFIGURATIONS | (REAL_CONFIGURATIONS if real else {})
    return {name: shlex.split(text) for name, text in texts.items()}
