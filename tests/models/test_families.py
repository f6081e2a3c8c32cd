"""Well-known families: statistics, fine-tuned exports, gradients of losses, and refusals, on tiny random models."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import gprune
from gprune.cli import main
from gprune.export.hf import save_pruned
from gprune.importance.scores import score_units
from gprune.models.blocks import blocks_of, decoder_layers
from gprune.models.embedded import byte_tokenizer
from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import gated, masked
from gprune.models.surgery import slice_model
from tests import tiny_run
from tests.tiny_families import SIZES, TYPES, WITH_EXPERTS, make_tiny, some_masks
from tests.tiny_llama import collect

EXPERTS = WITH_EXPERTS
NEURONS = 48  # differs from all other sizes of the tiny models


def down_modules(layer: nn.Module) -> list[nn.Module]:
    """Modules with one input per neuron, found by shape without a record."""
    return [
        m
        for m in layer.modules()
        if (isinstance(m, nn.Linear) and m.weight.shape[1] == NEURONS)
        or (isinstance(m, Conv1D) and m.weight.shape[0] == NEURONS)
    ]


@pytest.fixture
def ids() -> torch.Tensor:
    """Tokens (4, 24), longer than the sliding window."""
    return torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))


# --- statistics


@pytest.mark.parametrize("family", [f for f in TYPES if f not in EXPERTS])
def test_statistics_equal_those_of_forward_hooks(family, ids):
    model, recorded = make_tiny(family), {"ffn": [], "attention": []}
    record, handles = blocks_of(model)[0].family, []
    for layer in decoder_layers(model):
        (down,) = down_modules(layer)
        output = layer.get_submodule(record.output)
        for kind, module in (("ffn", down), ("attention", output)):
            x = []
            recorded[kind].append(x)
            handles.append(module.register_forward_pre_hook(lambda _m, inputs, x=x: x.append(inputs[0].clone())))
    model(ids)
    for handle in handles:
        handle.remove()
    statistics = collect(model, [{"input_ids": ids, "index": torch.arange(4)}], gram=True)
    for kind, channels in (("ffn", statistics.ffn), ("attention", statistics.attention)):
        for (x,), channel in zip(recorded[kind], channels, strict=True):
            x = x.double().view(4, 24, -1)
            for half in (0, 1):
                x_half, moments = x[half::2].flatten(0, 1).numpy(), channel.halves[half]
                assert int(moments.count) == 48  # two windows of 24 tokens
                np.testing.assert_allclose(moments.sum, x_half.sum(0), rtol=1e-5, atol=1e-4)
                np.testing.assert_allclose(moments.sum_sq, (x_half**2).sum(0), rtol=1e-5)
            flat = x.flatten(0, 1).numpy()
            np.testing.assert_allclose(channel.gram, flat.T @ flat, rtol=1e-4, atol=1e-3)


def expert_activations(model: nn.Module, ids: torch.Tensor) -> list[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Per block and expert, the windows (n,) and activations (n, N) of its tokens in float64, from forward hooks."""
    calls = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda m, inputs: calls.append((m, *(i.clone() for i in inputs))))
        for layer in decoder_layers(model)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    per_block = []
    for module, hidden, index, _ in calls:
        per_expert = {}
        gate_up = module.gate_up_proj.double()
        for expert in range(len(gate_up)):
            tokens = (index == expert).any(1).nonzero()[:, 0]
            gate, up = (hidden[tokens].double() @ gate_up[expert].T).chunk(2, -1)
            per_expert[expert] = (tokens // ids.shape[1]).numpy(), (module.act_fn(gate) * up).numpy()
        per_block.append(per_expert)
    return per_block


@pytest.mark.parametrize("family", EXPERTS)
def test_statistics_of_experts_equal_those_of_forward_hooks(family, ids):
    model = make_tiny(family)
    expected = expert_activations(model, ids)
    statistics = collect(model, [{"input_ids": ids, "index": torch.arange(4)}], gram=True)
    for channel, experts in zip(statistics.ffn, expected, strict=True):
        for half in (0, 1):
            for expert, (window, x) in experts.items():
                x_half, moments = x[window % 2 == half], channel.halves[half].of_expert(expert, 4)
                assert (moments.count == len(x_half)).all()
                np.testing.assert_allclose(moments.sum, x_half.sum(0), rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(moments.sum_sq, (x_half**2).sum(0), rtol=1e-4, atol=1e-9)
        for expert, (_, x) in experts.items():
            np.testing.assert_allclose(channel.gram[expert], x.T @ x, rtol=1e-3, atol=1e-3)
    assert sum(len(w) for w, _ in expected[0].values()) == 2 * ids.numel()  # two experts per token


def train_a_step(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Train one step without dropout, so that losses are comparable. Returns the loss before the step."""
    optimizer = torch.optim.SGD(model.requires_grad_(True).parameters(), lr=1e-3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def with_lora(model: nn.Module) -> nn.Module:
    """Add random LoRA adapters to all linear layers of attention and FFN. They require correct `in_features`."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft, which the extra `test` installs")
    block = blocks_of(model)[0]
    record = block.family
    targets = {path.rpartition(".")[2] for path in (record.query, record.key, record.value, record.output)}
    if not record.experts:
        targets |= {path.rpartition(".")[2] for path in (record.gate, record.up, record.down) if path}
    config = peft.LoraConfig(
        r=2, target_modules=sorted(targets), task_type="CAUSAL_LM", init_lora_weights=False,
        fan_in_fan_out=block.output.transposed,
    )  # fmt: skip
    return peft.get_peft_model(model.requires_grad_(False), config).eval()


@pytest.mark.slow
def test_exported_and_fine_tuned_models_load_without_gprune(ids, tmp_path):
    """Exports and fine-tuned models, loaded by a process that cannot import gprune."""
    folders, models = tmp_path / "folders", {}
    for family in TYPES:
        model = make_tiny(family)
        models[family] = small = gprune.apply_masks(model, some_masks(model, attention=True))
        save_pruned(small, None, folders / family)
        tuned = copy.deepcopy(small)
        train_a_step(tuned, ids)
        models[f"{family}-tuned"] = with_lora(tuned).merge_and_unload()
    for name, model in models.items():
        if not (folder := folders / name).exists():
            model.save_pretrained(folder)
        assert sorted(path.name for path in folder.glob("*.py")) == ["modeling_pruned.py"]
        logits = model(ids, use_cache=False).logits.detach().contiguous()
        save_file({"logits": logits, "ids": ids}, folder / "expected.safetensors")
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in Path(sys.argv[1]).iterdir():\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "    want = load_file(folder / 'expected.safetensors')\n"
        "    got = model(want['ids'], use_cache=False).logits\n"
        "    print(folder.name, (got - want['logits']).abs().max().item())\n"
        "assert 'gprune' not in sys.modules\n"
    )
    environment = tiny_run.environment(tmp_path / "cache", HF_MODULES_CACHE=str(tmp_path / "modules"))
    process = subprocess.run(
        [sys.executable, "-P", str(script), str(folders)], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    differences = dict(line.split() for line in process.stdout.splitlines() if line)
    assert {name: float(value) for name, value in differences.items()} == dict.fromkeys(models, 0.0)


@pytest.mark.parametrize(("family", "overrides"), [("gemma2", {"final_logit_softcapping": 3.0}), ("granite", {})])
def test_gradients_include_the_softcap_and_the_scaling_of_logits(family, overrides, ids):
    model = make_tiny(family, **overrides)

    def gradient(loss_of) -> torch.Tensor:
        """The gradient of a loss with respect to gates of neurons."""
        gates = [torch.linspace(0.2, 1, NEURONS, requires_grad=True) for _ in range(3)]
        with gated(model, gates):
            loss_of().backward()
        return torch.stack([gate.grad for gate in gates])

    log_q, teacher = model(ids).logits[:, :-1].log_softmax(-1), final_hidden(model, ids)  # of the dense model

    def divergence() -> torch.Tensor:
        return (log_q.exp() * (log_q - model(ids).logits[:, :-1].log_softmax(-1))).sum(-1).mean()

    # Cross-entropy without a teacher, and KL divergence with the dense model as the teacher.
    for reference, hidden in ((lambda: model(input_ids=ids, labels=ids).loss, None), (divergence, teacher)):
        expected = gradient(reference)
        assert float(expected.abs().max()) > 1e-4
        chunked = gradient(lambda hidden=hidden: next_token_losses(model, ids, teacher=hidden).mean())
        torch.testing.assert_close(chunked, expected, atol=1e-6, rtol=1e-3)


# --- experts


@pytest.mark.parametrize("family", EXPERTS)
def test_an_expert_without_tokens_is_ranked_by_an_activation_free_metric(family, ids):
    model = make_tiny(family)
    experts = decoder_layers(model)[0].mlp
    bias = torch.tensor([2.0, 1.0, 0.0, -9.0])
    handle = experts.gate.register_forward_hook(lambda _m, _i, out: constant_routing(bias, out))
    statistics = collect(model, [{"input_ids": ids, "index": torch.arange(4)}])
    handle.remove()
    token_counts = statistics.ffn[0].total.count.view(4, -1)[:, 0]
    assert token_counts.tolist() == [ids.numel(), ids.numel(), 0, 0]
    blocks = blocks_of(model)
    scores = score_units("wanda_sp", blocks, statistics, attention=False).ffn[0].view(4, -1)
    activation_free = score_units("magnitude", blocks, statistics, attention=False).ffn[0].view(4, -1)
    # Experts 2 and 3 have the order of the other metric, and the mean distribution of the experts with tokens.
    mean_of_busy_experts = scores[:2].sort(1).values.mean(0)
    for expert in (2, 3):
        assert torch.equal(scores[expert].argsort(), activation_free[expert].argsort())
        torch.testing.assert_close(scores[expert].sort().values, mean_of_busy_experts)
    assert not torch.equal(scores[0].argsort(), activation_free[0].argsort())


def constant_routing(bias: torch.Tensor, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A router's output if every token is routed to the two experts with the largest bias."""
    logits, weights, index = out
    return logits, weights, bias.topk(2).indices.expand_as(index)


def test_masks_with_experts_of_unequal_widths_are_refused():
    model = make_tiny("mixtral")
    masks = some_masks(model, attention=False)
    masks.ffn[0][:] = True
    masks.ffn[0][0] = False
    with pytest.raises(ValueError, match=r"Masks\.ffn\[0\] must keep equally many neurons of every expert"):
        slice_model(model, masks)


# --- refusals


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A function that returns a tiny world with a model of a family."""
    folder = tmp_path_factory.mktemp("families")
    world = tiny_run.make_world(folder)

    def make(family: str, **overrides) -> tiny_run.World:
        path = folder / "-".join([family, *overrides])
        if not path.exists():
            # A byte-level tokenizer, since tokenizer classes of some families convert any tokenizer to byte-level BPE.
            make_tiny(family, neurons=tiny_run.NEURONS, vocab_size=264, **overrides).save_pretrained(path)
            byte_tokenizer().save_pretrained(path)
        return tiny_run.World(path, world.corpora)

    with tiny_run.isolated(folder / "cache"):
        yield make


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--recovery=bias"], "--recovery bias cannot recover experts"),
        (["--importance=taylor"], "Taylor saliency cannot be collected for experts"),
    ],
)
def test_options_that_experts_do_not_support_are_refused(family, flags, reason, worlds, tmp_path, capsys):
    args = worlds(family).args(tmp_path, *flags)
    capsys.readouterr()  # the progress of saving the model
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_windows_longer_than_the_learned_positions_are_refused(family, worlds, tmp_path, capsys):
    args = worlds(family).args(tmp_path, f"--corpora.seq_len={SIZES['max_position_embeddings'] + 1}")
    capsys.readouterr()
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "at most 256 tokens" in line


def test_the_factor_of_norms_over_kept_heads_is_not_rounded_to_bfloat16():
    """With 7 of 8 heads kept the factor is 1.06904, and 1.07031 in bfloat16."""
    model = make_tiny("olmo2", hidden_size=64, num_attention_heads=8, num_key_value_heads=8).to(torch.bfloat16)
    masks = some_masks(model, attention=True)
    ids = torch.arange(3, 67).view(2, 32)

    def size_of_keys(m):
        """Return the sum of absolute values of the normalised keys."""
        norm, found = m.model.layers[0].self_attn.k_norm, []
        with norm.register_forward_hook(lambda _module, _inputs, output: found.append(output.double().abs())):
            m(ids)
        return float(found[0].sum())

    with masked(model, masks):
        of_masked = size_of_keys(model)
    assert of_masked == pytest.approx(size_of_keys(slice_model(model, masks)), rel=3e-4)
