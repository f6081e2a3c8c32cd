"""Sequential least squares against an independent float64 reference, on each family without experts."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconMLP
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from experiments.architectures import example
from gprune.cli import main
from gprune.config.parse import parse
from gprune.discovery import family_of
from gprune.discovery.tiny import tiny_model
from gprune.errors import UserError
from gprune.method import plan as preparation
from gprune.models.blocks import blocks_of, decoder_layers
from gprune.models.masks import Masks
from gprune.models.offload import is_offloaded
from gprune.models.surgery import slice_model, slice_to_files
from gprune.recoveries import RECOVERY, Material
from gprune.recoveries.prefix import SAMPLE_TOKENS, PrunedPrefix, projections_to_solve
from gprune.storage.files import read_json, write_json
from tests import tiny_run
from tests.calibration.test_layerwise import assert_same_run
from tests.tiny_families import TYPES, WITH_EXPERTS, make_tiny, some_masks
from tests.tiny_llama import collect

DENSE = [name for name in TYPES if name not in WITH_EXPERTS]
RIDGE = 0.01


def windows(batches: tuple[int, ...] = (4, 4, 2), *, seed: int = 1) -> list[torch.Tensor]:
    """Token ids (B, 24) each, longer than the sliding window of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n, 24), generator=generator) for n in batches]


def recovered(model, masks, ids=None, **settings):
    """The pruned model after sequential least squares on `ids`, by default on `windows()`."""
    small = slice_model(model, masks)
    prefix = PrunedPrefix(model, masks, windows() if ids is None else ids, **settings)
    remaining = [block for block, stays in zip(blocks_of(model), masks.blocks, strict=True) if stays]
    for dense, block in zip(remaining, blocks_of(small), strict=True):
        prefix.recover(dense, block)
    return small


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- the reference: whole forward passes per projection, explicit residuals, and a stacked least-squares problem


def trace(model, layer, paths: dict[str, str], ids: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Inputs of a layer (`before`), inputs (`x`) and outputs (`y`) of its projections, (tokens, size) in float64."""
    rows: dict[str, list[torch.Tensor]] = {}

    def store(name, tensor):
        rows.setdefault(name, []).append(tensor.reshape(-1, tensor.shape[-1]).double())

    def record_input(_module, args, kwargs):
        store("before", args[0] if args else kwargs["hidden_states"])

    def record_projection(part):
        """A forward hook that stores inputs and outputs."""

        def hook(_module, inputs, output):
            store(f"x {part}", inputs[0])
            store(f"y {part}", output)

        return hook

    handles = [layer.register_forward_pre_hook(record_input, with_kwargs=True)]
    handles += [attrgetter(path)(layer).register_forward_hook(record_projection(part)) for part, path in paths.items()]
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
    all_kept = Masks(*([torch.ones_like(m) for m in kind] for kind in (masks.ffn, masks.attention)))
    dense = slice_model(model, all_kept).double()  # a copy
    small = slice_model(model, masks).double()
    paths = {part: path for part, path in (("output", family.output), ("down", family.down)) if path}
    normed = {"output": family.after_attention, "down": family.after_ffn}
    remaining = [i for i, stays in enumerate(masks.blocks) if stays]
    for index, layer in zip(remaining, decoder_layers(small), strict=True):
        for part, mask in (("output", masks.attention[index]), ("down", masks.ffn[index])):
            # A projection that keeps all inputs is solved only if it is the down projection after a removed block.
            if mask.all() and (part == "output" or masks.blocks[index - 1]):
                continue
            pruned_rows = trace(small, layer, paths, ids)
            dense_rows = trace(dense, decoder_layers(dense)[index], paths, ids)
            host = attrgetter(paths[part])(layer)
            W = (host.weight.T if block.down.transposed else host.weight).numpy()
            y, x = dense_rows[f"y {part}"], pruned_rows[f"x {part}"]
            if (target if isinstance(target, str) else target[part]) == "residual":
                scale = getattr(layer, "residual_multiplier", 1.0)

                def summand(part, y, layer=layer):
                    """The summand of the residual stream: a projection's output, normalized if a norm follows."""
                    if normed[part] in (None, paths[part]):
                        return y
                    return attrgetter(normed[part])(layer)(torch.from_numpy(y)).numpy()

                dense_residual, pruned_residual = dense_rows["before"], pruned_rows["before"]
                if part == "down":
                    dense_residual = dense_residual + scale * summand("output", dense_rows["y output"])
                    pruned_residual = pruned_residual + scale * summand("output", pruned_rows["y output"])
                # What the summand of the pruned model must be for equal residual streams after this projection.
                target_summand = (dense_residual + scale * summand(part, y) - pruned_residual) / scale
                if normed[part] is None:
                    y = target_summand
                else:
                    rms = np.sqrt(np.square(y).mean(1, keepdims=True))
                    ones = np.ones((1, y.shape[1]))
                    gain = summand(part, ones)  # of the RMS norm: the root mean square of its input is 1
                    # Small gains are damped by a tenth of the median square.
                    damping = 0.1 * np.sort(np.square(gain).ravel())[(gain.size - 1) // 2]
                    x, y = x / rms, (gain * target_summand + damping * y / rms) / (gain**2 + damping)
            if host.bias is not None:
                y = y - host.bias.numpy()
            ridge_weight = np.sqrt(ridge * np.square(x).sum(0).mean())
            A = np.vstack([x, ridge_weight * np.eye(x.shape[1])])
            solved = np.linalg.lstsq(A, np.vstack([y, ridge_weight * W.T]), rcond=None)[0].T
            host.weight.copy_(torch.from_numpy(solved.T if block.down.transposed else solved))
    return small


def assert_close_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Weights are within a thousandth of the largest weight of each tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((actual[name].double() - tensor).abs().max()) <= 1e-3 * float(tensor.abs().max()), name


@pytest.mark.parametrize("family", DENSE)
def test_sequential_least_squares_equals_the_float64_reference(family):
    model, ids = make_tiny(family), windows()
    masks = some_masks(model, attention=True)
    expected = weights(solved_reference(model, masks, ids))
    unrecovered, actual = weights(slice_model(model, masks)), weights(recovered(model, masks, ids, ridge=RIDGE))
    assert_close_weights(actual, expected)
    solved = {name for name, tensor in actual.items() if not torch.equal(tensor, unrecovered[name])}
    record = blocks_of(make_tiny(family))[0].family
    # The second block keeps all neurons and groups, and hence its weights.
    prefix = f"{model.base_model_prefix}.{'decoder.' * (family == 'opt')}{record.layers}."
    assert solved == {f"{prefix}{i}.{path}.weight" for i in (0, 2) for path in (record.down, record.output)}


def test_blocks_after_a_removed_block_are_fitted_to_the_dense_residual():
    model, ids = make_tiny("llama"), windows()
    masks = some_masks(model, (17, model.config.intermediate_size, 24), attention=False)
    masks.ffn[0][:], masks.attention[0][:] = False, False  # block 1, which keeps all units, is fitted
    assert projections_to_solve(masks) == [(), ("down",), ("down",)]
    expected, actual = solved_reference(model, masks, ids), recovered(model, masks, ids)
    assert_close_weights(weights(actual), weights(expected))


def test_gram_matrices_summed_in_several_panels_give_the_reference():
    model, ids = make_tiny("llama", neurons=600, num_hidden_layers=1), windows((10,) * 8)
    masks = some_masks(model, (400,), attention=False)
    expected, actual = solved_reference(model, masks, ids), recovered(model, masks, ids)
    assert_close_weights(weights(actual), weights(expected))


@pytest.mark.parametrize("norm_before", [True, False])
def test_outputs_are_fitted_if_a_norm_follows_the_residual_sum(norm_before):
    """With a norm before the projections, the residual stream is fitted. With a norm after the sum, the output is."""
    model = make_tiny("opt", do_layer_norm_before=norm_before)
    masks = some_masks(model, attention=True)
    expected = solved_reference(model, masks, windows(), "residual" if norm_before else "output")
    assert_close_weights(weights(recovered(model, masks)), weights(expected))


def with_factors(model_type: str, values: dict, scaled: dict[str, float]):
    """Two models that compute the same: with factors after their projections, and with these factors in the weights.

    Args:
        values: settings of the model with factors -> (their value, the value that removes them).
        scaled: ends of names of weights -> the factor.
    """
    models = []
    for which in (0, 1):
        config = example(model_type).config
        for name, pair in values.items():
            setattr(config, name, pair[which])
        models.append(tiny_model(config, seed=7).requires_grad_(False))
        family_of(models[-1])
    model, plain = models
    for name, weight in plain.named_parameters():
        for end, factor in scaled.items():
            if name.endswith(end):
                weight.mul_(factor)
    return model, plain


@pytest.mark.parametrize(
    ("model_type", "values", "scaled"),
    [
        (
            "falcon_h1",
            {"mlp_multipliers": ([1.0, 0.25], [1.0, 1.0]), "attention_out_multiplier": (0.5, 1.0)},
            {"feed_forward.down_proj.weight": 0.25, "self_attn.o_proj.weight": 0.5},
        ),
        ("minicpm3", {"scale_depth": (0.75 * 3**0.5, 3**0.5)}, {"down_proj.weight": 0.75, "o_proj.weight": 0.75}),
        ("granite", {"residual_multiplier": (0.25, 1.0)}, {"down_proj.weight": 0.25, "o_proj.weight": 0.25}),
    ],
)
def test_recovered_weights_before_a_factor_equal_those_that_contain_the_factor(model_type, values, scaled):
    model, plain = with_factors(model_type, values, scaled)
    assert torch.allclose(model(windows()[0]).logits, plain(windows()[0]).logits, rtol=1e-4, atol=1e-4)
    masks = some_masks(model, [n // 2 for n in (block.neurons for block in blocks_of(model))], attention=True)
    actual, expected = weights(recovered(model, masks)), weights(recovered(plain, masks))
    for name, weight in actual.items():
        for end, factor in scaled.items():
            if name.endswith(end):
                weight.mul_(factor)
    assert_close_weights(actual, expected)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])
def test_measured_factors_change_nothing_where_the_config_names_the_factor(family, monkeypatch):
    model = make_tiny(family)
    masks = some_masks(model, attention=True)
    actual = weights(recovered(model, masks))
    factor = getattr(model.config, "residual_multiplier", 1.0)
    monkeypatch.setattr("gprune.recoveries.prefix.residual_factor", lambda *_: factor)
    expected = weights(recovered(model, masks))
    assert_close_weights(actual, expected)
    if family != "granite":  # the same bits
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_layers_that_multiply_their_output_are_fitted_to_the_stream_before(monkeypatch):
    model, ids = make_tiny("llama"), windows()
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **kwargs: 0.5 * forward(*args, **kwargs))
    masks = some_masks(model, attention=True)
    expected, actual = solved_reference(model, masks, ids), recovered(model, masks, ids, ridge=RIDGE)
    assert_close_weights(weights(actual), weights(expected))


def test_outputs_are_fitted_if_the_layer_changes_the_stream_after_the_ffn():
    """Gemma 4 adds a network of the stream and the token after the FFN."""
    model = example("gemma4_text")
    for layer in decoder_layers(model):
        layer.layer_scalar.fill_(0.5)
    masks = some_masks(model, [n // 2 for n in (block.neurons for block in blocks_of(model))], attention=False)
    expected = weights(solved_reference(model, masks, windows(), "output"))
    assert_close_weights(weights(recovered(model, masks)), expected)


# --- properties


def errors(model, small, ids) -> tuple[float, float]:
    """Mean square error of the last hidden states and mean KL divergence of the next token, in nats."""
    square, kl, tokens = 0.0, 0.0, 0
    for batch in ids:
        of_dense, of_small = (m(batch, output_hidden_states=True, use_cache=False) for m in (model, small))
        square += float((of_dense.hidden_states[-1] - of_small.hidden_states[-1]).square().mean(-1).sum())
        log_p, log_q = (F.log_softmax(output.logits.double(), -1) for output in (of_small, of_dense))
        kl += float(F.kl_div(log_p, log_q, log_target=True, reduction="sum"))
        tokens += batch.numel()
    return square / tokens, kl / tokens


@pytest.mark.parametrize(("family", "attention"), [("llama", False), ("llama", True), ("gemma3_text", False)])
def test_sequential_recovery_is_closer_to_the_dense_model_than_parallel_recovery(family, attention):
    model, ids = make_tiny(family, num_hidden_layers=4), windows((10,) * 4)
    for block in blocks_of(model):
        if norm := block.norm_after("down"):  # gains that differ between channels
            norm.weight.uniform_(-0.9, 4, generator=torch.Generator().manual_seed(block.index))
    masks = some_masks(model, (24, 30, 24, 30), attention=attention)
    small = {name: slice_model(model, masks) for name in ("none", "least_squares")}
    statistics = collect(model, [{"input_ids": i, "index": torch.arange(len(i))} for i in ids], gram=True)
    revise = RECOVERY["least_squares"].revise(Material(model, masks, ridge=1e-3, statistics=statistics))
    for dense, block in zip(blocks_of(model), blocks_of(small["least_squares"]), strict=True):
        revise(dense, block)
    errors_of = [errors(model, m, ids) for m in (*small.values(), recovered(model, masks, ids, ridge=1e-3))]
    for none, parallel, sequential in zip(*errors_of, strict=True):  # of hidden states, and of the next token
        assert sequential < parallel < none


def test_layers_that_change_the_output_of_down_in_place_are_recovered(monkeypatch):
    """Falcon adds the output of attention to the tensor that `down` returns."""
    model = example("falcon")
    masks = some_masks(model, [n // 2 for n in (block.neurons for block in blocks_of(model))], attention=False)
    actual, forward = weights(recovered(model, masks)), FalconMLP.forward
    monkeypatch.setattr(FalconMLP, "forward", lambda *args: forward(*args).clone())
    expected = weights(recovered(model, masks))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize("model_type", ["olmo", "nanochat"])
def test_outputs_are_fitted_if_a_norm_after_the_projection_is_unknown(model_type):
    model = example(model_type)
    masks = some_masks(model, [n // 2 for n in (block.neurons for block in blocks_of(model))], attention=True)
    assert not blocks_of(model)[0].joins_residual("output")
    expected = weights(solved_reference(model, masks, windows(), {"output": "output", "down": "residual"}))
    assert_close_weights(weights(recovered(model, masks)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recovery_of_16_bit_models_is_close_to_float32(dtype):
    """Sums are in float32, so that weights differ from those of a float32 model only by rounding of activations."""
    model, ids = make_tiny("llama"), windows((10,) * 6)
    masks = some_masks(model, attention=True)
    exact = weights(recovered(model, masks, ids, ridge=0.1))
    small = recovered(make_tiny("llama").to(dtype), masks, ids, ridge=0.1)
    unrecovered = weights(slice_model(model, masks))
    for name, tensor in weights(small).items():
        assert tensor.dtype == dtype
        correction = float((exact[name] - unrecovered[name]).norm())
        assert float((tensor.float() - exact[name]).norm()) <= 0.1 * correction + 0.01 * float(exact[name].norm()), name


def test_sequential_recovery_is_deterministic_leaves_the_dense_model_and_ignores_the_batch_size():
    model = make_tiny("llama")
    masks, before = some_masks(model, attention=True), weights(model)
    first, second = weights(recovered(model, masks)), weights(recovered(model, masks))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Other batch sizes change only rounding.
    assert_close_weights(weights(recovered(model, masks, [torch.cat(windows())])), first)


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
    """`attention`: whether block 1 also loses a KV group."""
    model = make_tiny("llama", num_hidden_layers=5)
    masks = some_masks(model, kept, attention=False)
    masks.attention[1][0] = not attention
    prefix = PrunedPrefix(model, masks, windows())
    for dense, block in zip(blocks_of(model), blocks_of(slice_model(model, masks)), strict=True):
        prefix.recover(dense, block)
    assert prefix.tokens == passes * 10 * 24  # ten windows of 24 tokens


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_idle_neurons_keep_their_weights_and_few_tokens_are_fitted(ridge):
    """With singular Gram matrices, idle neurons keep their weights, and the error on the text is small."""
    model, ids = make_tiny("llama"), [windows()[0][:1, :10]]
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.model.layers[1].mlp.up_proj.weight.data[::3] = 0
    masks = some_masks(model, (20, 30, 24), attention=True)
    unrecovered, small = weights(slice_model(model, masks)), recovered(model, masks, ids, ridge=ridge)
    actual = weights(small)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    down_0, down_1 = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    assert torch.equal(actual[down_0], unrecovered[down_0])
    idle = ~small.model.layers[1].mlp.up_proj.weight.any(1)
    assert 0 < idle.sum() < len(idle)
    assert torch.equal(actual[down_1][:, idle], unrecovered[down_1][:, idle])
    assert not torch.equal(actual[down_1], unrecovered[down_1])
    error_without_recovery, _ = errors(model, slice_model(model, masks), ids)
    error, _ = errors(model, small, ids)
    assert error < 0.1 * error_without_recovery


def test_a_non_finite_activation_of_the_pruned_model_raises_a_user_error():
    model = make_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    masks = some_masks(model, (48, 24, 24), attention=False)
    masks.ffn[1][0] = True  # the neuron with NaN is kept
    with pytest.raises(UserError, match="non-finite activation came up in block 1 of the pruned model"):
        recovered(model, masks)


# --- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from tiny_run.world_with_cache(tmp_path_factory.mktemp("world"))


FLAGS = ["--recovery=least_squares_sequential", "--sparsity.scope=attention+ffn"]


def test_a_run_recovers_its_controls_within_the_planned_tokens(world, tmp_path):
    result = world.run(tmp_path, *FLAGS)
    stages = ("base", "averaged", "gprune")
    assert {(r["stage"], r["recovery"]) for r in result.records} == {("dense", "none")} | {
        (stage, recovery) for stage in stages for recovery in ("none", "least_squares_sequential")
    }
    dense = AutoModelForCausalLM.from_pretrained(world.model).eval().requires_grad_(False)
    unrecovered = weights(slice_model(dense, result.masks))
    changed = {name for name, tensor in weights(result.model).items() if not torch.equal(tensor, unrecovered[name])}
    paths = {"output": "self_attn.o_proj", "down": "mlp.down_proj"}
    solved = projections_to_solve(result.masks)  # names of projections by block
    assert changed == {f"model.layers.{i}.{paths[part]}.weight" for i, parts in enumerate(solved) for part in parts}
    assert "recovery `least_squares_sequential`" in (tmp_path / "run/model/README.md").read_text()
    # Tokens of forward passes are counted and planned.
    plan = preparation.make_plan(result.config)
    step = read_json(tmp_path / "run/manifest.json")["steps"]["shrink"]
    tokens = 3 * 4 * 32  # of three corpora with four windows of 32 tokens
    # One pass of the dense model, and one pass of a pruned layer (of three) per projection. Another pass gives the
    # output of a block whose down projection is not solved, except for the last block.
    outputs_needed = sum("down" not in parts for parts in solved[:-1])
    passed = tokens + tokens * (sum(map(len, solved)) + outputs_needed) // 3
    assert step["forward_tokens"] == passed + SAMPLE_TOKENS  # one short text, with which factors are measured
    none = preparation.make_plan(parse(world.args(tmp_path, FLAGS[1])))
    assert plan.forward_tokens == none.forward_tokens + 3 * (4 * tokens + 3 * 2 * 32)
    assert result.summary["forward_tokens"] <= plan.forward_tokens


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(world, tmp_path):
    flags = [*FLAGS, "--gprune=false", f"--corpora.recover={world.names('beta')}"]
    first = world.run(tmp_path, *flags)
    # There are no statistics of corpora that are used for recovery only.
    assert list(first.statistics) == [str(world.corpora["alpha"])]
    model = (tmp_path / "run/model/model.safetensors").read_bytes()
    other = world.run(tmp_path, *flags, name="other")
    assert_same_run(other, first)
    (tmp_path / "other/metrics.json").unlink()
    manifest = tmp_path / "other/manifest.json"
    write_json(manifest, {k: v for k, v in read_json(manifest).items() if k not in ("logits", "model")})
    assert_same_run(world.run(tmp_path, *flags, name="other"), first)
    assert (tmp_path / "other/model/model.safetensors").read_bytes() == model


def test_a_run_recovers_models_without_whole_blocks(world, tmp_path):
    flags = ["--gprune=false", "--sparsity.allocation=depth", "--recovery=least_squares_sequential"]
    result = world.run(tmp_path, *flags, "--model.dtype=bfloat16")
    assert result.model.config.num_hidden_layers == 2
    assert {r["recovery"] for r in result.records} == {"none", "least_squares_sequential"}


@pytest.mark.slow
def test_recovery_of_an_offloaded_model_has_the_same_bits(world, tmp_path, monkeypatch):
    monkeypatch.setattr("gprune.method.save.check_reload", lambda *_, **__: 0.0)
    flags = [*FLAGS, "--gprune=false"]
    whole = world.run(tmp_path, *flags)
    model = AutoModelForCausalLM.from_pretrained(world.model)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    # All weights outside of layers, and one and a half layers.
    limit = sum(p.nbytes for p in model.parameters()) - sum(layers) + int(1.5 * max(layers))
    pruned = []
    monkeypatch.setattr(
        "gprune.method.recover.slice_to_files",
        lambda model, *args: pruned.append(model) or slice_to_files(model, *args),
    )
    placement = ["--model.device_map=auto", f"--model.max_memory={{cpu: {limit}B}}"]
    assert_same_run(world.run(tmp_path, *flags, *placement, name="away"), whole)
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
