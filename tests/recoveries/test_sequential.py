"""Sequential least squares against an independent float64 reference, on each family without experts."""

from __future__ import annotations

import json
from operator import attrgetter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from experiments.architectures import example
from gprune.cli import main
from gprune.config.parse import parse
from gprune.errors import UserError
from gprune.models.blocks import blocks_of, decoder_layers
from gprune.models.masks import Masks
from gprune.models.offload import is_offloaded
from gprune.models.surgery import prune, prune_to_files
from gprune.pipeline import plan as preparation
from gprune.recoveries import RECOVERY, Material
from gprune.recoveries.prefix import PrunedPrefix, projections_to_solve
from gprune.storage.files import read_json
from tests import tiny_run
from tests.calibration.test_layerwise import assert_same_run
from tests.conftest import collect
from tests.tiny_families import TYPES, WITH_EXPERTS, make_tiny, some_masks

DENSE = [name for name in TYPES if name not in WITH_EXPERTS]
RIDGE = 0.01


def windows(batches: tuple[int, ...] = (4, 4, 2), *, seed: int = 1) -> list[torch.Tensor]:
    """Token ids (B, 24) each, longer than the sliding window of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n, 24), generator=generator) for n in batches]


def recovered(model, masks, ids=None, **settings):
    small, prefix = prune(model, masks), PrunedPrefix(model, masks, windows() if ids is None else ids, **settings)
    kept = [block for block, stays in zip(blocks_of(model), masks.blocks, strict=True) if stays]
    for dense, block in zip(kept, blocks_of(small), strict=True):
        prefix.recover(dense, block)
    return small


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- the reference: whole forward passes per projection, explicit residuals, and a stacked least-squares problem


def trace(model, layer, paths: dict[str, str], ids: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Inputs of a layer (`before`), inputs (`x`) and outputs (`y`) of its projections, (tokens, size) in float64."""
    rows: dict[str, list[torch.Tensor]] = {}

    def keep(name, tensor):
        rows.setdefault(name, []).append(tensor.reshape(-1, tensor.shape[-1]).double())

    def record_input(_module, args, kwargs):
        keep("before", args[0] if args else kwargs["hidden_states"])

    def projection(part):
        def hook(_module, inputs, output):
            keep(f"x {part}", inputs[0])
            keep(f"y {part}", output)

        return hook

    handles = [layer.register_forward_pre_hook(record_input, with_kwargs=True)]
    handles += [attrgetter(path)(layer).register_forward_hook(projection(part)) for part, path in paths.items()]
    for batch in ids:
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


def solved_reference(
    model, masks: Masks, ids: list[torch.Tensor], target: str | dict[str, str] = "residual", ridge: float = RIDGE
):
    """The pruned model in float64 with projections solved one after the other.

    Args:
        target: fit the dense model's `residual` stream or the `output` of the projection; a dict has one per part.
    """
    block = blocks_of(model)[0]
    family = block.family
    dense = prune(model, Masks(*([torch.ones_like(m) for m in kind] for kind in (masks.ffn, masks.attention)))).double()
    small = prune(model, masks).double()
    paths = {"output": family.output, "down": family.down}
    normed = {"output": family.after_attention, "down": family.after_ffn}
    remaining = [i for i, stays in enumerate(masks.blocks) if stays]
    for index, layer in zip(remaining, decoder_layers(small), strict=True):
        for part, mask in (("output", masks.attention[index]), ("down", masks.ffn[index])):
            if mask.all() and (part == "output" or masks.blocks[index - 1]):
                continue
            pruned_rows = trace(small, layer, paths, ids)
            dense_rows = trace(dense, decoder_layers(dense)[index], paths, ids)
            host = attrgetter(paths[part])(layer)
            W = (host.weight.T if block.output.transposed else host.weight).numpy()
            y, x = dense_rows[f"y {part}"], pruned_rows[f"x {part}"]
            if (target if isinstance(target, str) else target[part]) == "residual":
                scale = getattr(layer, "residual_multiplier", 1.0)

                def summand(part, y, layer=layer):
                    """The summand of the residual stream: a projection's output, normalized if a norm follows."""
                    if normed[part] in (None, paths[part]):
                        return y
                    return attrgetter(normed[part])(layer)(torch.from_numpy(y)).numpy()

                r_d, r_p = dense_rows["before"], pruned_rows["before"]
                if part == "down":
                    r_d = r_d + scale * summand("output", dense_rows["y output"])
                    r_p = r_p + scale * summand("output", pruned_rows["y output"])
                missing = (r_d + scale * summand(part, y) - r_p) / scale
                if normed[part] is None:
                    y = missing
                else:
                    size = np.sqrt(np.square(y).mean(1, keepdims=True))
                    unit = np.ones((1, y.shape[1]))
                    g = summand(part, unit)  # the gain of an RMS norm, by an input whose root mean square is 1
                    m = 0.1 * np.sort(np.square(g).ravel())[(g.size - 1) // 2]
                    x, y = x / size, (g * missing + m * y / size) / (g**2 + m)
            if host.bias is not None:
                y = y - host.bias.numpy()
            lam = ridge * np.square(x).sum(0).mean()
            A = np.vstack([x, np.sqrt(lam) * np.eye(x.shape[1])])
            V = np.linalg.lstsq(A, np.vstack([y, np.sqrt(lam) * W.T]), rcond=None)[0].T
            host.weight.copy_(torch.from_numpy(V.T if block.output.transposed else V))
    return small


def assert_close_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within a thousandth of the largest weight of each tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name].double() - tensor).abs().max()) <= 1e-3 * float(tensor.abs().max()), name


@pytest.mark.parametrize("family", DENSE)
def test_sequential_least_squares_equals_the_float64_reference(family):
    model, ids = make_tiny(family), windows()
    masks = some_masks(model, attention=True)
    expected = weights(solved_reference(model, masks, ids))
    plain, found = weights(prune(model, masks)), weights(recovered(model, masks, ids, ridge=RIDGE))
    assert_close_weights(found, expected)
    solved = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    record = blocks_of(make_tiny(family))[0].family
    # The second block keeps all neurons and groups, and hence its weights.
    prefix = f"{model.base_model_prefix}.{'decoder.' * (family == 'opt')}{record.layers}."
    assert solved == {f"{prefix}{i}.{path}.weight" for i in (0, 2) for path in (record.down, record.output)}


def test_blocks_after_a_removed_block_are_fitted_to_the_dense_residual():
    model, ids = make_tiny("llama"), windows()
    masks = some_masks(model, (17, model.config.intermediate_size, 24), attention=False)
    masks.ffn[0][:], masks.attention[0][:] = False, False  # block 1, which keeps all units, is fitted
    assert projections_to_solve(masks) == [(), ("down",), ("down",)]
    expected, found = solved_reference(model, masks, ids), recovered(model, masks, ids)
    assert_close_weights(weights(found), weights(expected))


def test_gram_matrices_summed_in_several_panels_give_the_reference():
    model, ids = make_tiny("llama", neurons=600, num_hidden_layers=1), windows((10,) * 8)
    masks = some_masks(model, (400,), attention=False)
    expected, found = solved_reference(model, masks, ids), recovered(model, masks, ids)
    assert_close_weights(weights(found), weights(expected))


@pytest.mark.parametrize("flag", [True, False])
def test_outputs_are_fitted_if_a_norm_follows_the_residual_sum(flag):
    model = make_tiny("opt", do_layer_norm_before=flag)
    masks = some_masks(model, attention=True)
    expected = solved_reference(model, masks, windows(), "residual" if flag else "output")
    assert_close_weights(weights(recovered(model, masks)), weights(expected))


# --- properties


def errors(model, small, ids) -> tuple[float, float]:
    """Mean square error of the last hidden states and mean KL divergence of the next token, in nats."""
    square, kl, tokens = 0.0, 0.0, 0
    for batch in ids:
        want, got = (m(batch, output_hidden_states=True, use_cache=False) for m in (model, small))
        square += float((want.hidden_states[-1] - got.hidden_states[-1]).square().mean(-1).sum())
        logs = [F.log_softmax(out.logits.double(), -1) for out in (got, want)]
        kl += float(F.kl_div(*logs, log_target=True, reduction="sum"))
        tokens += batch.numel()
    return square / tokens, kl / tokens


@pytest.mark.parametrize(("family", "attention"), [("llama", False), ("llama", True), ("gemma3_text", False)])
def test_sequential_recovery_is_closer_to_the_dense_model_than_parallel_recovery(family, attention):
    model, ids = make_tiny(family, num_hidden_layers=4), windows((10,) * 4)
    for block in blocks_of(model):
        if norm := block.norm_after("down"):  # gains that differ between channels
            norm.weight.uniform_(-0.9, 4, generator=torch.Generator().manual_seed(block.index))
    masks = some_masks(model, (24, 30, 24, 30), attention=attention)
    small = {name: prune(model, masks) for name in ("none", "least_squares")}
    statistics = collect(model, [{"input_ids": i, "index": torch.arange(len(i))} for i in ids], gram=True)
    revise = RECOVERY["least_squares"].revise(Material(model, masks, ridge=1e-3, statistics=statistics))
    for old, new in zip(blocks_of(model), blocks_of(small["least_squares"]), strict=True):
        revise(old, new)
    ends = [errors(model, m, ids) for m in (*small.values(), recovered(model, masks, ids, ridge=1e-3))]
    for none, parallel, sequential in zip(*ends, strict=True):
        assert sequential < parallel < none


@pytest.mark.parametrize("model_type", ["olmo", "nanochat"])
def test_outputs_are_fitted_if_a_norm_after_the_projection_is_unknown(model_type):
    model = example(model_type)
    masks = some_masks(model, [n // 2 for n in (block.neurons for block in blocks_of(model))], attention=True)
    assert not blocks_of(model)[0].joins_residual("output")
    expected = weights(solved_reference(model, masks, windows(), {"output": "output", "down": "residual"}))
    assert_close_weights(weights(recovered(model, masks)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recovery_of_16_bit_models_is_close_to_float32(dtype):
    """The same weights as in float32 except for rounding of activations. G and E are summed in float32."""
    model, ids = make_tiny("llama"), windows((10,) * 6)
    masks = some_masks(model, attention=True)
    exact = weights(recovered(model, masks, ids, ridge=0.1))
    small = recovered(make_tiny("llama").to(dtype), masks, ids, ridge=0.1)
    plain = weights(prune(model, masks))
    for name, tensor in weights(small).items():
        assert tensor.dtype == dtype
        correction = float((exact[name] - plain[name]).norm())
        assert float((tensor.float() - exact[name]).norm()) <= 0.1 * correction + 0.01 * float(exact[name].norm()), name


def test_sequential_recovery_is_deterministic_and_does_not_change_the_dense_model():
    model = make_tiny("llama")
    masks, before = some_masks(model, attention=True), weights(model)
    one, two = weights(recovered(model, masks)), weights(recovered(model, masks))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Other batch sizes change only rounding.
    assert_close_weights(weights(recovered(model, masks, [torch.cat(windows())])), one)


@pytest.mark.parametrize(
    ("kept", "attention", "passes"),
    [
        ((48,) * 5, False, 0),
        # Block 1: a pass for attention, a pass for the FFN that also gives its output. Block 2: a pass for its output.
        # Block 3, the last that is recovered: a pass for the FFN.
        ((48, 30, 48, 20, 48), True, 2 + 1 + 1),
        # Only attention of block 1 is recovered, so its output needs another pass.
        ((48, 48, 48, 20, 48), True, 2 + 1 + 1),
    ],
)
def test_pruned_layers_run_only_the_passes_that_are_needed(kept, attention, passes):
    model = make_tiny("llama", num_hidden_layers=5)
    masks = some_masks(model, kept, attention=False)
    masks.attention[1][0] = not attention
    prefix = PrunedPrefix(model, masks, windows())
    for old, new in zip(blocks_of(model), blocks_of(prune(model, masks)), strict=True):
        prefix.recover(old, new)
    assert prefix.tokens == passes * 10 * 24


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_idle_neurons_keep_their_weights_and_few_tokens_are_fitted(ridge):
    """With singular Gram matrices, idle neurons keep their weights, and the error on the text is small."""
    model, ids = make_tiny("llama"), [windows()[0][:1, :10]]
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.model.layers[1].mlp.up_proj.weight.data[::3] = 0
    masks = some_masks(model, (20, 30, 24), attention=True)
    plain, small = weights(prune(model, masks)), recovered(model, masks, ids, ridge=ridge)
    found = weights(small)
    assert all(tensor.isfinite().all() for tensor in found.values())
    down = "model.layers.{}.mlp.down_proj.weight".format
    assert torch.equal(found[down(0)], plain[down(0)])
    idle = ~small.model.layers[1].mlp.up_proj.weight.any(1)
    assert 0 < idle.sum() < len(idle)
    assert torch.equal(found[down(1)][:, idle], plain[down(1)][:, idle])
    assert not torch.equal(found[down(1)], plain[down(1)])
    ends = [errors(model, m, ids)[0] for m in (prune(model, masks), small)]
    assert ends[1] < 0.1 * ends[0]


def test_a_non_finite_activation_of_the_pruned_model_raises_a_user_error():
    model = make_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    masks = some_masks(model, (48, 24, 24), attention=False)
    masks.ffn[1][0] = True
    with pytest.raises(UserError, match="non-finite activation came up in block 1 of the pruned model"):
        recovered(model, masks)


# --- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequential")
    world = tiny_run.make_world(folder)
    with tiny_run.isolated(folder / "cache"):
        yield world


@pytest.fixture
def quick(monkeypatch):
    tiny_run.quick(monkeypatch)


FLAGS = ["--recovery=least_squares_sequential", "--sparsity.scope=attention+ffn"]


def test_a_run_recovers_its_controls_within_the_planned_tokens(world, tmp_path, quick):
    result = world.run(tmp_path, *FLAGS)
    stages = ("base", "averaged", "gprune")
    assert {(r["stage"], r["recovery"]) for r in result.records} == {("dense", "none")} | {
        (stage, recovery) for stage in stages for recovery in ("none", "least_squares_sequential")
    }
    dense = AutoModelForCausalLM.from_pretrained(world.model).eval().requires_grad_(False)
    plain = weights(prune(dense, result.masks))
    moved = {name for name, tensor in weights(result.model).items() if not torch.equal(tensor, plain[name])}
    parts = {"output": "self_attn.o_proj", "down": "mlp.down_proj"}
    solved = projections_to_solve(result.masks)
    assert moved == {f"model.layers.{i}.{parts[p]}.weight" for i, found in enumerate(solved) for p in found}
    assert "recovery `least_squares_sequential`" in (tmp_path / "run/model/README.md").read_text()
    # Tokens of forward passes are counted and planned.
    plan = preparation.check(result.config)
    step = read_json(tmp_path / "run/manifest.json")["steps"]["shrink"]
    tokens = 3 * 4 * 32
    parts = projections_to_solve(result.masks)
    outputs_needed = sum("down" not in found for found in parts[:-1])  # the output of the last block is not needed
    assert step["forward_tokens"] == tokens + tokens * (sum(map(len, parts)) + outputs_needed) // 3
    none = preparation.check(parse(world.args(tmp_path, FLAGS[1])))
    assert plan.forward_tokens == none.forward_tokens + 3 * (4 * tokens + 3 * 2 * 32)
    assert result.summary["forward_tokens"] <= plan.forward_tokens


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(world, tmp_path, quick):
    flags = [*FLAGS, "--gprune=false", f"--corpora.recover={world.names('beta')}"]
    first = world.run(tmp_path, *flags)
    # There are no statistics of corpora that are used for recovery only.
    assert list(first.statistics) == [str(world.corpora["alpha"])]
    model = (tmp_path / "run/model/model.safetensors").read_bytes()
    other = world.run(tmp_path, *flags, name="other")
    assert_same_run(other, first)
    (tmp_path / "other/metrics.json").unlink()
    manifest = tmp_path / "other/manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in read_json(manifest).items() if k not in ("logits", "model")}))
    assert_same_run(world.run(tmp_path, *flags, name="other"), first)
    assert (tmp_path / "other/model/model.safetensors").read_bytes() == model


def test_a_run_recovers_models_without_whole_blocks(world, tmp_path, quick):
    flags = ["--gprune=false", "--sparsity.allocation=depth", "--recovery=least_squares_sequential"]
    result = world.run(tmp_path, *flags, "--model.dtype=bfloat16")
    assert result.model.config.num_hidden_layers == 2
    assert {r["recovery"] for r in result.records} == {"none", "least_squares_sequential"}


@pytest.mark.slow
def test_recovery_of_an_offloaded_model_has_the_same_bits(world, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("gprune.pipeline.save.check_reload", lambda *_, **__: 0.0)
    flags = [*FLAGS, "--gprune=false"]
    whole = world.run(tmp_path, *flags)
    model = AutoModelForCausalLM.from_pretrained(world.model)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    limit = sum(p.nbytes for p in model.parameters()) - sum(layers) + int(1.5 * max(layers))
    pruned = []
    monkeypatch.setattr(
        "gprune.pipeline.recover.prune_to_files",
        lambda model, *args: pruned.append(model) or prune_to_files(model, *args),
    )
    place = ["--model.device_map=auto", f"--model.max_memory={{cpu: {limit}B}}"]
    assert_same_run(world.run(tmp_path, *flags, *place, name="away"), whole)
    assert pruned
    assert all(is_offloaded(model) for model in pruned)


def test_sequential_recovery_refuses_experts_and_sharded_models(world, tmp_path, capsys):
    make_tiny("mixtral").save_pretrained(tmp_path / "mixtral")
    sharded = ["--model.shard=true", "--trainer.devices=2", "--trainer.strategy=ddp"]
    for flags, message in (
        ([f"--model.name={tmp_path / 'mixtral'}"], "cannot recover experts (model type 'mixtral')"),
        (sharded, "--recovery least_squares_sequential cannot be combined with --model.shard true"),
    ):
        assert main(world.args(tmp_path / "runs", *FLAGS, *flags)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "runs").exists()
