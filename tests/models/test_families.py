"""Well-known families: statistics, masking, slicing, exporting and whole runs, on tiny random models.

Some families have a record. The structure of the others is discovered.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig
from transformers.pytorch_utils import Conv1D

import gprune
from gprune.cli import main
from gprune.config.parse import parse
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.importance.scores import score_units
from gprune.models.blocks import blocks_of, decoder_layers
from gprune.models.embedded import byte_tokenizer
from gprune.models.families import FAMILIES, Family
from gprune.models.loading import read_config
from gprune.models.losses import final_hidden, iter_logits, next_token_losses
from gprune.models.masks import gated, masked
from gprune.models.surgery import slice_model, widths
from gprune.sparsity.budget import Budget, block_units
from gprune.sparsity.cut import keep_masks
from tests import tiny_run
from tests.tiny_families import SIZES, TYPES, WITH_EXPERTS, make_tiny, some_masks
from tests.tiny_llama import collect

EXPERTS = WITH_EXPERTS
NEURONS = 48  # differs from all other sizes of the tiny models
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "enable_bias", "use_parallel_residual")


def variants() -> list[tuple[str, dict]]:
    """Each family with its defaults and with each boolean flag of its config inverted; some with 1 and 4 KV heads."""
    rows: list[tuple[str, dict]] = [("qwen3_moe", {"mlp_only_layers": [1]})]  # a dense layer between experts
    rows.append(("smollm3", {"no_rope_layers": [1, 0, 1]}))
    for name in TYPES:
        known = CONFIG_MAPPING[name]()
        flags = [flag for flag in FLAGS if isinstance(getattr(known, flag, 0), bool)]
        rows += [(name, {}), *((name, {flag: not getattr(known, flag)}) for flag in flags)]
        if name in ("llama", "gemma2", "olmo2", "phi3", "mixtral"):
            rows += [(name, {"num_key_value_heads": heads}) for heads in (1, 4)]
    return rows


def name_of(overrides: object) -> str:
    if isinstance(overrides, dict):
        return "-".join(f"{k}={v}" for k, v in overrides.items()) or "plain"
    return str(overrides)


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


@pytest.mark.parametrize("family", TYPES)
def test_value_rows_of_a_group_feed_the_channels_of_that_group_only(family, ids):
    """Zero the value rows of one group, and compare the channels that become zero. Projections may be fused."""
    model, inputs = make_tiny(family), []
    block = blocks_of(model)[1]
    value, group = block.value, block.kv_groups - 1
    rows = torch.arange(group * block.head_dim, (group + 1) * block.head_dim)
    rows = rows if value.rows is None else value.rows[rows]
    (value.host.weight.T if value.transposed else value.host.weight)[rows] = 0
    if value.host.bias is not None:
        value.host.bias[rows] = 0
    block.output.host.register_forward_pre_hook(lambda _m, x: inputs.append(x[0].flatten(0, -2)))
    model(ids)
    is_zero = (inputs[0] == 0).all(0)
    assert torch.equal(is_zero, torch.arange(len(is_zero)) // block.channels_per_group == group)


# --- masked, sliced and reloaded models


@pytest.mark.parametrize(
    ("family", "overrides"),
    [pytest.param(*row, marks=[pytest.mark.slow] if row[1] else []) for row in variants()],
    ids=name_of,
)
def test_masked_sliced_and_reloaded_models_agree(family, overrides, ids, tmp_path):
    model = make_tiny(family, **overrides)
    dense = model(ids).logits
    masks = some_masks(model, attention=True)
    with masked(model, masks):
        reference = model(ids).logits
    assert torch.equal(model(ids).logits, dense)
    assert (reference - dense).abs().max() > 0.1  # the masks have an effect
    pruned = slice_model(model, masks)
    assert widths(pruned)["neurons"] == [17, 48, 33]
    # KV groups are removed with all of their heads.
    for before, after in zip(blocks_of(model), blocks_of(pruned), strict=True):
        assert after.heads * before.kv_groups == before.heads * after.kv_groups
        assert after.head_dim == before.head_dim
    removed = model.num_parameters() - pruned.num_parameters()
    assert removed == Budget(block_units(blocks_of(model), scope="attention+ffn"), 0).removed_by(masks)
    sliced = pruned(ids).logits
    torch.testing.assert_close(sliced, reference, atol=1e-4, rtol=0)
    save_pruned(pruned, None, tmp_path / "model")
    reloaded_model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(reloaded_model).__name__.startswith("Pruned")
    family_of(reloaded_model)
    assert widths(reloaded_model) == widths(pruned)
    assert torch.equal(reloaded_model(ids).logits, sliced)
    # Generation with and without a KV cache; with the family's defaults, it exceeds the sliding window.
    prompt = ids[:2, :9]
    settings = {"max_new_tokens": 3 if overrides else 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = pruned.generate(prompt, **settings)
    assert torch.equal(cached, pruned.generate(prompt, use_cache=False, **settings))
    assert torch.equal(cached, reloaded_model.generate(prompt, **settings))
    assert torch.equal(cached, reloaded_model.generate(prompt, cache_implementation="static", **settings))
    with masked(model, masks):
        assert torch.equal(cached, model.generate(prompt, **settings))


@pytest.mark.parametrize("family", TYPES)
def test_equal_blocks_are_exported_as_the_stock_class(family, ids, tmp_path):
    model = make_tiny(family)
    pruned = slice_model(model, some_masks(model, (24, 24, 24), attention=False))
    folder = save_pruned(pruned, None, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    reloaded_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(reloaded_model) is type(model)
    assert torch.equal(reloaded_model(ids).logits, pruned(ids).logits)


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    """Save a model with its `save_pretrained` and load it again."""
    model.save_pretrained(folder)
    reloaded_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    family_of(reloaded_model)
    return reloaded_model


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
def test_exported_and_fine_tuned_models_load_without_gprune(ids, worlds, tmp_path):
    """Exports, the result of a run, and fine-tuned models, loaded by a process that cannot import gprune."""
    folders, models = tmp_path / "folders", {}
    for family in TYPES:
        model = make_tiny(family)
        models[family] = small = gprune.apply_masks(model, some_masks(model, attention=True))
        save_pruned(small, None, folders / family)
        tuned = copy.deepcopy(small)
        train_a_step(tuned, ids)
        models[f"{family}-tuned"] = with_lora(tuned).merge_and_unload()
    flags = worlds("llama").args(tmp_path, "--gprune=false", "--sparsity.allocation=owl")
    models["run"] = gprune.prune(parse(flags)).model
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


# --- after pruning


@pytest.mark.parametrize("family", TYPES)
def test_a_pruned_model_can_be_saved_pruned_again_fine_tuned_and_adapted(family, ids, tmp_path):
    model = make_tiny(family)
    masks = some_masks(model, attention=True)
    once = gprune.apply_masks(model, masks)
    assert torch.equal(once(ids).logits, slice_model(model, masks)(ids).logits)
    once_reloaded = reloaded(once, tmp_path / "once")
    second = some_masks(once_reloaded, (7, 8, 9), attention=False)
    twice = gprune.apply_masks(once, second)
    assert widths(twice)["neurons"] == [7, 8, 9]
    for other in (slice_model(once_reloaded, second), reloaded(twice, tmp_path / "twice")):
        assert torch.equal(other(ids).logits, twice(ids).logits)
    before = train_a_step(once, ids)
    assert once(input_ids=ids, labels=ids).loss < before
    adapter = with_lora(once)
    with_adapter = adapter(ids).logits
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, with_adapter, atol=1e-3, rtol=0)
    assert torch.equal(reloaded(merged, tmp_path / "merged")(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("family", TYPES)
def test_chunked_losses_and_logits_equal_the_models(family, ids):
    """The head is applied in chunks, with the family's scaling or softcap of logits."""
    model = make_tiny(family)
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(next_token_losses(model, ids).mean(), expected, atol=1e-5, rtol=1e-5)
    logits, targets, _ = (torch.cat(rows) for rows in zip(*iter_logits(model, ids), strict=True))
    torch.testing.assert_close(logits, model(ids).logits[:, :-1], atol=1e-4, rtol=0)
    assert torch.equal(targets, ids[:, 1:])


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
def test_each_expert_keeps_its_best_neurons_and_experts_of_a_block_have_equal_widths(family):
    model = make_tiny(family)
    units = block_units(blocks_of(model), scope="ffn")
    # A neuron has a row of gate, a row of up and a column of down in four experts.
    assert [block.costs.neurons[1] for block in units] == [4 * 3 * 32] * 3
    generator = torch.Generator().manual_seed(0)
    margins = [torch.randn(4 * NEURONS, generator=generator) for _ in range(3)]
    masks = keep_masks(Budget.of(units, 0.5), margins)
    for margin, mask in zip(margins, masks.ffn, strict=True):
        rows, kept = margin.view(4, -1), mask.view(4, -1)
        assert len({int(k.sum()) for k in kept}) == 1
        for row, keep in zip(rows, kept, strict=True):
            assert row[keep].min() > row[~keep].max()
    # Slot i of a block is the i-th smallest margin of every expert. Over all blocks, the slots with the smallest means
    # over experts are removed.
    slots = [margin.view(4, -1).sort(1).values.mean(0) for margin in margins]
    removed = torch.cat([s[: NEURONS - int(m.sum()) // 4] for s, m in zip(slots, masks.ffn, strict=True)])
    kept_slots = torch.cat([s[NEURONS - int(m.sum()) // 4 :] for s, m in zip(slots, masks.ffn, strict=True)])
    assert removed.max() < kept_slots.min()


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


# --- whole runs


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


@pytest.mark.parametrize("overrides", [{"logits_scaling": 1.0}, {}], ids=["by_1", "by_4"])
def test_a_record_without_the_models_logit_scaling_is_refused(overrides, worlds, tmp_path, monkeypatch, capsys):
    """Without the scale in the record, perplexity would silently be that of other logits. A scale of 1 is accepted."""
    monkeypatch.setitem(FAMILIES, "granite", Family("granite"))
    args = worlds("granite", **overrides).args(tmp_path, "--gprune=false", "--evaluation.controls=[]")
    scale_is_one = bool(overrides)
    assert tiny_run.main([*args, "--export=none"]) == (0 if scale_is_one else 2)
    refused = "'granite': logits are not head times hidden states" in capsys.readouterr().err
    assert refused is not scale_is_one


# One family of each kind: gated; ungated with transposed weights; with experts.
KINDS = ("llama", "gpt2", "mixtral")
OTHERS = ("gemma3_text", "phi3", "opt")  # norms of heads, fused matrices, biases and learned positions


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in (*KINDS[1:], *OTHERS))])
def test_a_command_line_run_meets_budget_and_exports_each_kind_of_family(family, worlds, tmp_path):
    result = worlds(family).run(
        tmp_path, "--sparsity.scope=attention+ffn", "--recovery=least_squares", "--sparsity.width_multiple=8"
    )
    checks = json.loads((tmp_path / "run" / "manifest.json").read_text())["logits"]
    assert checks["sliced_minus_reloaded"] == 0.0
    assert checks["masked_minus_sliced"] <= 1e-4
    units = block_units(blocks_of(make_tiny(family, neurons=tiny_run.NEURONS)), scope="attention+ffn")
    budget = Budget.of(units, 0.5)
    most = budget.target + 8 * max(block.costs.neurons[1] for block in units)
    assert budget.target <= budget.removed_by(result.masks) < most
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| gprune + least_squares |" in " ".join(card.split())
    rows = {(r["stage"], r["recovery"]) for r in result.records}
    assert {("dense", "none"), ("base", "none"), ("gprune", "least_squares")} <= rows
    assert all(np.isfinite(r["perplexity"]) for r in result.records)
    if family in KINDS:  # an exported folder can be pruned again
        exported = tiny_run.World(tmp_path / "run" / "model", worlds(family).corpora)
        second_result = exported.run(tmp_path, "--sparsity.target=0.2", name="again")
        assert second_result.summary["parameters_before"] == result.summary["parameters_after"]
        assert second_result.summary["parameters_after"] < result.summary["parameters_after"]


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--recovery=bias"], "--recovery bias cannot recover experts"),
        (["--importance=taylor"], "Taylor saliency cannot be collected for experts"),
    ],
)
def test_options_that_experts_do_not_support_are_refused(family, flags, reason, worlds, tmp_path, capsys):
    assert main(worlds(family).args(tmp_path, *flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_windows_longer_than_the_learned_positions_are_refused(family, worlds, tmp_path, capsys):
    assert main(worlds(family).args(tmp_path, f"--corpora.seq_len={SIZES['max_position_embeddings'] + 1}")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "at most 256 tokens" in line


def test_an_unsupported_model_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    BertConfig().save_pretrained(tmp_path)  # without weights
    monkeypatch.setattr(
        "gprune.models.loading.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises(UserError, match=r"Model type 'bert' must be a decoder; got an encoder"):
        family_of(read_config(str(tmp_path)))


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
