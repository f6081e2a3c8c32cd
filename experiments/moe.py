"""Make a mixture of experts from a dense model: a stock qwen2_moe model with a shared expert, then distil it.

    python -m experiments.moe --output runs/mixture     # writes start/, and after distillation distilled/model/

In each block the neurons with the largest mean size become the shared expert, which every token uses. The size of a
neuron is its absolute activation times the norm of its column in `down_proj`. The other neurons become experts of equal
size: neurons that are active for the same tokens are in the same expert (balanced k-means). The router starts as a
linear classifier of the experts with the largest outputs. With all experts chosen by a router of zeros, the mixture
computes the same function as the dense model. Distillation (experiments/distil.py) trains all weights of the layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import gprune
from experiments.distil import distil
from gprune.config import parse
from gprune.console import Parser, run_guarded
from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, make_windows
from gprune.errors import UserError
from gprune.models.loading import load_weights, locate_model
from gprune.report.tables import result_table
from gprune.storage.paths import expanded

DENSE = "smollm2-135m"
CONFIG = "experiments/moe.yaml"
CHOOSING = ["wikitext2", "c4", "code_github"]  # text that chooses experts and routers
SHARED, EXPERTS = 512, 16
TOP_K = 4
ROUTER_SCALE = 0.2  # of the fitted logits: the weights of the chosen experts are nearly equal at the start
WINDOWS, LENGTH = 10, 512  # number of each corpus in CHOOSING, and their tokens


@dataclass(frozen=True)
class Layout:
    """Neurons of one block of the dense model: those of the shared expert (S,), and of each expert (E, N), int64."""

    shared: Tensor
    experts: Tensor


@contextmanager
def recorded(mlps: Sequence[nn.Module]) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Record inputs (n, H) and activations (n, N) of llama's FFNs in the forward passes inside the context."""
    inputs: list[list[Tensor]] = [[] for _ in mlps]
    activations: list[list[Tensor]] = [[] for _ in mlps]
    hooks = []
    for block, mlp in enumerate(mlps):
        for module, kept in ((mlp, inputs[block]), (mlp.down_proj, activations[block])):
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1)))
            )
    yield inputs, activations
    for hook in hooks:
        hook.remove()


def balanced_groups(features: Tensor, count: int, generator: torch.Generator, rounds: int = 8) -> Tensor:
    """Group rows of `features` (M, D) by k-means in groups of equal size. Returns rows by group, (count, M / count)."""
    size = len(features) // count
    rows = F.normalize(features, dim=1)
    centres = rows[torch.randperm(len(rows), generator=generator)[:count]]
    assigned = np.zeros(0)
    for _ in range(rounds):
        similarity = (rows @ centres.T).repeat_interleave(size, dim=1)
        seats = linear_sum_assignment(similarity.numpy(), maximize=True)[1]
        groups = torch.tensor(seats // size)
        if np.array_equal(groups.numpy(), assigned):
            break
        assigned = groups.numpy()
        centres = F.normalize(torch.stack([rows[groups == group].mean(0) for group in range(count)]), dim=1)
    return torch.stack([(groups == group).nonzero().flatten() for group in range(count)])


def layout_of(activations: Tensor, down: Tensor, shared: int, experts: int, generator: torch.Generator) -> Layout:
    """Choose the shared neurons and the experts of a block by activations (n, N) and the down projection (H, N)."""
    sizes = activations.abs() * down.norm(dim=0)
    order = sizes.mean(0).argsort(descending=True)
    rest = order[shared:].sort().values
    groups = balanced_groups(sizes[:, rest].T, experts, generator)
    return Layout(order[:shared].sort().values, rest[groups])


def output_norms(layout: Layout, activations: Tensor, down: Tensor) -> Tensor:
    """Norm of the output of each expert for each token, (n, E)."""
    return torch.stack([(activations[:, e] @ down[:, e].T).norm(dim=1) for e in layout.experts], dim=1)


def fit_router(inputs: Tensor, norms: Tensor, top_k: int, steps: int = 300) -> Tensor:
    """Fit a linear classifier (E, H) of the `top_k` experts with the largest outputs.

    The norms (n, E) of an expert's outputs are divided by their mean, so that all experts are chosen about equally
    often. The loss is the cross-entropy between the softmax over experts and the tokens' shares of the squared norms of
    the chosen experts.
    """
    norms = norms / norms.mean(0)
    chosen = norms.topk(top_k, dim=1)
    target = torch.zeros_like(norms).scatter(1, chosen.indices, chosen.values.square())
    target = target / target.sum(1, keepdim=True)
    weight = torch.zeros(norms.shape[1], inputs.shape[1], dtype=inputs.dtype, requires_grad=True)
    scale = inputs.square().mean().sqrt()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (1024,), generator=generator)
        loss = F.cross_entropy(inputs[rows] / scale @ weight.T, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight.detach() / scale


def convert(
    dense: PreTrainedModel, layouts: Sequence[Layout], routers: Sequence[Tensor], top_k: int
) -> PreTrainedModel:
    """Return the mixture of a Llama model in float32, for a layout and a router (E, H) of each block.

    The router's weights of the chosen experts have sum 1 in the mixture, so down projections of experts are multiplied
    by `top_k`: with equal weights a chosen expert then has the output of its neurons in the dense model. The gate of
    the shared expert is 0, its sigmoid 1/2, so the shared down projection is multiplied by 2.
    """
    old = dense.config
    experts, size = layouts[0].experts.shape
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"]
    names += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"]
    names += ["tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in names}, qkv_bias=False, num_experts=experts, moe_intermediate_size=size,
        shared_expert_intermediate_size=len(layouts[0].shared), num_experts_per_tok=top_k, norm_topk_prob=True,
    )  # fmt: skip
    state = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    for block, (layout, router) in enumerate(zip(layouts, routers, strict=True)):
        mlp, prefix = dense.model.layers[block].mlp, f"model.layers.{block}.mlp."
        gate, up, down = (getattr(mlp, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj"))
        state |= {
            prefix + "gate.weight": router,
            prefix + "experts.gate_up_proj": torch.cat([gate[layout.experts], up[layout.experts]], dim=1),
            prefix + "experts.down_proj": top_k * down[:, layout.experts].transpose(0, 1).contiguous(),
            prefix + "shared_expert.gate_proj.weight": gate[layout.shared],
            prefix + "shared_expert.up_proj.weight": up[layout.shared],
            prefix + "shared_expert.down_proj.weight": 2 * down[:, layout.shared],
            prefix + "shared_expert_gate.weight": torch.zeros(1, old.hidden_size),
        }
    mixture = Qwen2MoeForCausalLM(config)
    mixture.load_state_dict(state)
    return mixture.eval()


@torch.no_grad()
def start(
    dense: PreTrainedModel, tokens: Tensor, *, shared: int = SHARED, experts: int = EXPERTS, top_k: int = TOP_K,
    seed: int = 0,
) -> PreTrainedModel:  # fmt: skip
    """Return the mixture of a dense Llama model before distillation, made by its activations on tokens (n, T)."""
    mlps = [layer.mlp for layer in dense.model.layers]
    generator = torch.Generator().manual_seed(seed)
    with recorded(mlps) as (inputs, activations):
        for batch in tokens.split(4):
            dense.model(batch)
    layouts, routers = [], []
    for block, mlp in enumerate(mlps):
        x, a, down = torch.cat(inputs[block]), torch.cat(activations[block]), mlp.down_proj.weight.detach()
        layouts.append(layout_of(a, down, shared, experts, generator))
        with torch.enable_grad():
            router = fit_router(x, output_norms(layouts[-1], a, down), top_k)
        routers.append(ROUTER_SCALE * router)
    return convert(dense, layouts, routers, top_k)


def text(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the windows (n, T) of training text that choose experts and routers."""
    windows = [
        make_windows(load_corpus(name, "train"), tokenizer, Sample(WINDOWS, LENGTH), corpus=name, split="train").tokens
        for name in CHOOSING
    ]
    return torch.cat(windows)


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.moe", description=__doc__)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for start/ and distilled/")
    parser.add_argument("--top_k", type=int, default=TOP_K, help=f"number of experts of a token (default: {TOP_K})")
    parser.add_argument(
        "--config", metavar="FILE", default=CONFIG, help=f"settings of the distillation (default: {CONFIG})"
    )
    options = parser.parse_args(arguments)
    folder = expanded(options.output)
    if not 1 <= options.top_k <= EXPERTS:
        raise UserError(f"--top_k must be 1 to {EXPERTS}, the number of experts; got {options.top_k}.")
    cfg = parse(["--config", options.config])
    if not (folder / "start").exists():
        source = locate_model(DENSE)
        dense, tokenizer = load_weights(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
        mixture = start(dense, text(tokenizer), top_k=options.top_k)
        mixture.save_pretrained(folder / "start")
        tokenizer.save_pretrained(folder / "start")
    cfg.model.name = DENSE
    distil(str(folder / "start"), cfg, folder / "distilled/model")
    return f"\n{result_table(gprune.measure(folder / 'distilled/model', DENSE, cfg)).for_stdout()}\n"


def main() -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.moe", work)


if __name__ == "__main__":
    sys.exit(main())
