"""Recovery along the pruned prefix, against an independent float64 reference, and on every family with plain blocks."""

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


# The reference: whole forward passes for every projection, residuals written out, one stacked least-squares problem


def trace(model, layer, paths: dict[str, str], ids: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """What enters a layer (`before`), and what enters (`x`) and leaves (`y`) its projections, in float64 by tokens."""
    rows: dict[str, list[torch.Tensor]] = {}

    def keep(name, tensor):
        rows.setdefault(name, []).append(tensor.reshape(-1, tensor.shape[-1]).double())

    def entering(_module, args, kwargs):
        keep("before", args[0] if args else kwargs["hidden_states"])

    def projection(part):
        def hook(_module, inputs, output):
            keep(f"x {part}", inputs[0])
            keep(f"y {part}", output)

        return hook

    handles = [layer.register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [attrgetter(path)(layer).register_forward_hook(projection(part)) for part, path in paths.items()]
    for batch in ids:
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


def solved_by_lstsq(
    model, masks: Masks, ids: list[torch.Tensor], target: str | dict[str, str] = "residual", ridge: float = RIDGE
):
    """The pruned model in float64, its projections solved one after the other.

    Args:
        target: what equals the dense model's, `residual` or `output` of the projection; of each part, if they differ.
    """
    block = blocks_of(model)[0]
    family = block.family
    dense = prune(model, Masks(*([torch.ones_like(m) for m in kind] for kind in (masks.ffn, masks.attention)))).double()
    small = prune(model, masks).double()
    paths = {"output": family.output, "down": family.down}
    normed = {"output": family.after_attention, "down": family.after_ffn}
    left = [i for i, stays in enumerate(masks.blocks) if stays]
    for index, layer in zip(left, decoder_layers(small), strict=True):
        for part, mask in (("output", masks.attention[index]), ("down", masks.ffn[index])):
            if mask.all() and (part == "output" or masks.blocks[index - 1]):
                continue
            there = trace(small, layer, paths, ids)
            wanted = trace(dense, decoder_layers(dense)[index], paths, ids)
            host = attrgetter(paths[part])(layer)
            W = (host.weight.T if block.output.transposed else host.weight).numpy()
            y, x = wanted[f"y {part}"], there[f"x {part}"]
            if (target if isinstance(target, str) else target[part]) == "residual":
                scale = getattr(layer, "residual_multiplier", 1.0)

                def entered(part, y, layer=layer):
                    """What a projection's output adds to the stream: itself, or what its norm makes of it."""
                    if normed[part] in (None, paths[part]):
                        return y
                    return attrgetter(normed[part])(layer)(torch.from_numpy(y)).numpy()

                r_d, r_p = wanted["before"], there["before"]
                if part == "down":
                    r_d = r_d + scale * entered("output", wanted["y output"])
                    r_p = r_p + scale * entered("output", there["y output"])
                missing = (r_d + scale * entered(part, y) - r_p) / scale
                if normed[part] is None:
                    y = missing
                else:
                    size = np.sqrt(np.square(y).mean(1, keepdims=True))
                    unit = np.ones((1, y.shape[1]))
                    g = entered(part, unit)  # of an RMS norm, whose input has a root mean square of 1
                    m = 0.1 * np.sort(np.square(g).ravel())[(g.size - 1) // 2]
                    x, y = x / size, (g * missing + m * y / size) / (g**2 + m)
            if host.bias is not None:
                y = y - host.bias.numpy()
            lam = ridge * np.square(x).sum(0).mean()
            A = np.vstack([x, np.sqrt(lam) * np.eye(x.shape[1])])
            V = np.linalg.lstsq(A, np.vstack([y, np.sqrt(lam) * W.T]), rcond=None)[0].T
            host.weight.copy_(torch.from_numpy(V.T if block.output.transposed else V))
    return small


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within a thousandth of the largest weight of each tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name].double() - tensor).abs().max()) <= 1e-3 * float(tensor.abs().max()), name


@pytest.mark.parametrize("family", DENSE)
def test_against_stacked_rows_and_whole_forward_passes(family):
    model, ids = make_tiny(family), windows()
    masks = some_masks(model, attention=True)
    expected = weights(solved_by_lstsq(model, masks, ids))
    plain, found = weights(prune(model, masks)), weights(recovered(model, masks, ids, ridge=RIDGE))
    assert_near(found, expected)
    solved = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    record = blocks_of(make_tiny(family))[0].family
    # Of the second block every neuron stays, and every group: it keeps its weights.
    prefix = f"{model.base_model_prefix}.{'decoder.' * (family == 'opt')}{record.layers}."
    assert solved == {f"{prefix}{i}.{path}.weight" for i in (0, 2) for path in (record.down, record.output)}


def test_dropped_blocks_are_made_up_for_by_later_ones():
    model, ids = make_tiny("llama"), windows()
    masks = some_masks(model, (17, model.config.intermediate_size, 24), attention=False)
    masks.ffn[0][:], masks.attention[0][:] = False, False  # the next block, of which nothing goes, makes up for it
    assert projections_to_solve(masks) == [(), ("down",), ("down",)]
    expected, found = solved_by_lstsq(model, masks, ids), recovered(model, masks, ids)
    assert_near(weights(found), weights(expected))


def test_gram_matrices_that_are_summed_in_several_panels():
    model, ids = make_tiny("llama", neurons=600, num_hidden_layers=1), windows((10,) * 8)
    masks = some_masks(model, (400,), attention=False)
    expected, found = solved_by_lstsq(model, masks, ids), recovered(model, masks, ids)
    assert_near(weights(found), weights(expected))


@pytest.mark.parametrize("flag", [True, False])
def test_a_norm_behind_the_sum_is_no_residual_to_meet(flag):
    model = make_tiny("opt", do_layer_norm_before=flag)
    masks = some_masks(model, attention=True)
    expected = solved_by_lstsq(model, masks, windows(), "residual" if flag else "output")
    assert_near(weights(recovered(model, masks)), weights(expected))


# What must hold


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
def test_it_ends_nearer_to_the_dense_model_than_projection_by_projection(family, attention):
    model, ids = make_tiny(family, num_hidden_layers=4), windows((10,) * 4)
    for block in blocks_of(model):
        if norm := block.norm_behind("down"):  # channels reach the stream with different gains
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
def test_outputs_are_fitted_if_a_norm_after_the_projection_is_not_found(model_type):
    model = example(model_type)
    masks = some_masks(model, [n // 2 for n in (block.neurons for block in blocks_of(model))], attention=True)
    assert not blocks_of(model)[0].joins_residual("output")
    expected = weights(solved_by_lstsq(model, masks, windows(), {"output": "output", "down": "residual"}))
    assert_near(weights(recovered(model, masks)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """The same weights as in float32 but for the rounding of activations; G and E are summed in float32."""
    model, ids = make_tiny("llama"), windows((10,) * 6)
    masks = some_masks(model, attention=True)
    exact = weights(recovered(model, masks, ids, ridge=0.1))
    small = recovered(make_tiny("llama").to(dtype), masks, ids, ridge=0.1)
    plain = weights(prune(model, masks))
    for name, tensor in weights(small).items():
        assert tensor.dtype == dtype
        correction = float((exact[name] - plain[name]).norm())
        assert float((tensor.float() - exact[name]).norm()) <= 0.1 * correction + 0.01 * float(exact[name].norm()), name


def test_the_same_bits_twice_and_the_dense_model_as_it_was():
    model = make_tiny("llama")
    masks, before = some_masks(model, attention=True), weights(model)
    one, two = weights(recovered(model, masks)), weights(recovered(model, masks))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # The batches that the text is cut into are rounding.
    assert_near(weights(recovered(model, masks, [torch.cat(windows())])), one)


@pytest.mark.parametrize(
    ("kept", "attention", "passes"),
    [
        ((48,) * 5, False, 0),
        # block 1 for attention and for the FFN, which takes the text on too; 2 on; 3, the last one, for the FFN
        ((48, 30, 48, 20, 48), True, 2 + 1 + 1),
        # behind block 1, of which attention alone loses something, the text goes on with another pass
        ((48, 48, 48, 20, 48), True, 2 + 1 + 1),
    ],
)
def test_only_what_is_needed_goes_through_the_pruned_layers(kept, attention, passes):
    model = make_tiny("llama", num_hidden_layers=5)
    masks = some_masks(model, kept, attention=False)
    masks.attention[1][0] = not attention
    prefix = PrunedPrefix(model, masks, windows())
    for old, new in zip(blocks_of(model), blocks_of(prune(model, masks)), strict=True):
        prefix.recover(old, new)
    assert prefix.tokens == passes * 10 * 24


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_idle_neurons_and_fewer_tokens_than_neurons_end_in_the_least_correction(ridge):
    """Singular Gram matrices: what is kept of idle neurons keeps its weights, and the text itself is met."""
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


def test_what_is_not_finite_is_one_line():
    model = make_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    masks = some_masks(model, (48, 24, 24), attention=False)
    masks.ffn[1][0] = True
    with pytest.raises(UserError, match="non-finite activation came up in block 1 of the pruned model"):
        recovered(model, masks)


# The whole run


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


def test_a_run_recovers_its_controls_too_and_stays_below_its_plan(world, tmp_path, quick):
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
    # Tokens: what went through the layers was counted, and foreseen.
    plan = preparation.check(result.config)
    step = read_json(tmp_path / "run/manifest.json")["steps"]["shrink"]
    tokens = 3 * 4 * 32
    parts = projections_to_solve(result.masks)
    on = sum("down" not in found for found in parts[:-1])  # the last block's output nobody needs
    assert step["forward_tokens"] == tokens + tokens * (sum(map(len, parts)) + on) // 3
    none = preparation.check(parse(world.args(tmp_path, FLAGS[1])))
    assert plan.forward_tokens == none.forward_tokens + 3 * (4 * tokens + 3 * 2 * 32)
    assert result.summary["forward_tokens"] <= plan.forward_tokens


@pytest.mark.slow
def test_a_run_taken_up_has_the_same_bits(world, tmp_path, quick):
    flags = [*FLAGS, "--gprune=false", f"--corpora.recover={world.names('beta')}"]
    first = world.run(tmp_path, *flags)
    assert list(first.statistics) == [str(world.corpora["alpha"])]  # no statistics of what is only recovered on
    model = (tmp_path / "run/model/model.safetensors").read_bytes()
    other = world.run(tmp_path, *flags, name="other")
    assert_same_run(other, first)
    (tmp_path / "other/metrics.json").unlink()
    manifest = tmp_path / "other/manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in read_json(manifest).items() if k not in ("logits", "model")}))
    assert_same_run(world.run(tmp_path, *flags, name="other"), first)
    assert (tmp_path / "other/model/model.safetensors").read_bytes() == model


def test_whole_blocks_that_go_are_made_up_for(world, tmp_path, quick):
    flags = ["--gprune=false", "--sparsity.allocation=depth", "--recovery=least_squares_sequential"]
    result = world.run(tmp_path, *flags, "--model.dtype=bfloat16")
    assert result.model.config.num_hidden_layers == 2
    assert {r["recovery"] for r in result.records} == {"none", "least_squares_sequential"}


@pytest.mark.slow
def test_an_offloaded_model_is_recovered_to_the_same_bits(world, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("gprune.pipeline.save.check_reload", lambda *_, **__: 0.0)
    flags = [*FLAGS, "--gprune=false"]
    whole = world.run(tmp_path, *flags)
    model = AutoModelForCausalLM.from_pretrained(world.model)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    limit = sum(p.nbytes for p in model.parameters()) - sum(layers) + int(1.5 * max(layers))
    seen = []
    monkeypatch.setattr(
        "gprune.pipeline.recover.prune_to_files",
        lambda model, *args: seen.append(model) or prune_to_files(model, *args),
    )
    place = ["--model.device_map=auto", f"--model.max_memory={{cpu: {limit}B}}"]
    assert_same_run(world.run(tmp_path, *flags, *place, name="away"), whole)
    assert seen
    assert all(is_offloaded(model) for model in seen)


def test_experts_and_a_sharded_model_are_refused_at_once(world, tmp_path, capsys):
    make_tiny("mixtral").save_pretrained(tmp_path / "mixtral")
    sharded = ["--model.shard=true", "--trainer.devices=2", "--trainer.strategy=ddp"]
    for flags, words in (
        ([f"--model.name={tmp_path / 'mixtral'}"], "cannot recover experts (model type 'mixtral')"),
        (sharded, "--recovery least_squares_sequential cannot be combined with --model.shard true"),
    ):
        assert main(world.args(tmp_path / "runs", *FLAGS, *flags)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not (tmp_path / "runs").exists()
