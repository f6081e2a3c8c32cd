"""Settings and flags that are refused, with the beginning or a part of the message.

Flags of a whole run with a tiny Llama: `method/test_bad_input.py`.
"""

from __future__ import annotations

import json
import re

import pytest
from transformers import GPT2Config

from experiments.architectures import default_config
from gprune.config import config_from_mapping
from gprune.discovery.tiny import shrunk
from gprune.errors import UserError
from tests import tiny_run

CHAIN = "--recovery must be a chain such as [least_squares,distill]; got "
REFUSED = [
    ({"recovery": "leastsquares"}, "Unknown recovery 'leastsquares'. Did you mean 'least_squares'?"),
    ({"corpora.drift": ["wiki"], "reliability.everywhere": True},
     "--reliability.everywhere true needs two or more --corpora.drift; got ['wiki']"),
    ({"corpora.drift": ["wiki"], "partition.method": "drift_only"}, "--partition.method drift_only needs two"),
    ({"sparsity.allocation": "bas"}, "Unknown allocation 'bas'. Available: learned, equal, uniform, global"),
    ({"sparsity.start": "equal"}, "--sparsity.start must be an allocation by blocks such as uniform; got 'equa"),
    ({"sparsity": {"allocation": "owl", "options": {"spread": -0.1}}},
     "--sparsity.options.spread must be 0 or more; got -0.1"),
    ({"sparsity.start": "owl", "sparsity.options.multiple": 0.5},
     "--sparsity.options.multiple must be 1 or more; got 0.5"),
    ({"sparsity": {"allocation": "owl", "options": {"multiples": 5}}},
     "--sparsity.options must name options of 'owl' (multiple, spread); got 'multiples'"),
    ({"sparsity.options.spread": 0.1}, "--sparsity.options must name options of 'uniform' (none); got 'spread'"),
    ({"sparsity": {"uniform_width": True, "allocation": "reconstruction"}},
     "--sparsity.uniform_width true needs --sparsity.allocation uniform, because all blocks lose equally much; got "
     "reconstruction."),
    ({"sparsity": {"uniform_width": True, "start": "owl"}}, "--sparsity.uniform_width true needs --sparsity.start"),
    ({"sparsity": {"cost": "seconds"}, "trainer.devices": 2},
     "--sparsity.cost seconds cannot be combined with 2 processes"),
    ({"export": "onnx"}, "--export.format must be 'hf', 'gguf', 'nemotron-nas' or 'none'; got 'onnx'."),
    ({"sparsity.width_multiple": "defalt"},
     "--sparsity.width_multiple must be a whole number or default; got 'defalt'."),
    ({"sparsity.width_multiple": 0}, "--sparsity.width_multiple must be 1 or more; got 0"),
    ({"sparsity.width_multiple": "auto"}, "--sparsity.width_multiple auto was removed. Use --sparsity.width_multiple"),
    ({"sparsity.width_multiple": None}, "--sparsity.width_multiple must be a whole number or default; got null."),
    ({"speed": {"prompt": 9}}, "Unknown setting 'speed'. Use --sparsity.target 1.4x alone"),
    ({"model.max_memory": {"cpu": "2GiB"}}, "--model.max_memory needs --model.device_map auto"),
    ({"model": {"device_map": "auto", "max_memory": {"cpu": "lots"}}},
     "--model.max_memory.cpu must be a size such as 2GiB or 500MB; got 'lots'"),
    ({"model": {"device_map": "auto", "max_memory": {"cpu": "0GB"}}},
     "--model.max_memory.cpu must be more than 0; got '0GB'"),
    ({"model": {"device_map": "auto", "max_memory": {"disk": "2GB"}}}, "--model.max_memory"),
    ({"model.device_map": "auto", "trainer.devices": 2}, "--model.device_map auto needs one process"),
    ({"sparsity.cost": "parametres"},
     "Unknown cost 'parametres'. Did you mean 'parameters'? Available: parameters, kv_cache"),
    ({"corpora.drift": []}, "--corpora.drift must name at least one corpus"),
    ({"corpora.evaluate": ["wiki", "wiki"]}, "--corpora.evaluate must name each corpus once; got ['wiki', 'wiki']"),
    ({"reliability.metric": "wifv"}, "--reliability.metric must be an activation-free metric (magnitude,"),
    ({"model.dtype": "float16"}, "--model.dtype must be bfloat16 or float32 for --sparsity.allocation learned"),
    ({"run.name": "../x"}, "--run.name must be a folder name of at most 200 bytes; got '../x'"),
    ({"evaluation.split": "development", "sparsity.target": "+5%"},
     "--sparsity.target +5% cannot be combined with --evaluation.split development"),
    ({"stages": "not_there"}, "--stages must be a module of --import; got 'not_there'. Add --import not_there."),
    ({"stages": "json"}, "--stages must be a module that sets calibrator, refiner, learner, or some of them; got"),
    ({"sparsity.learner": "x"}, "Unknown setting 'sparsity.learner'. Use --stages MODULE"),
    ({"partition.refiner": "x"}, "Unknown setting 'partition.refiner'. Use --stages MODULE"),
    ({"corpora.calibrator": "x"}, "Unknown setting 'corpora.calibrator'. Use --stages MODULE"),
    ({"options.soft_assignment.tau": 1}, "--options must name recoveries that the run uses"),
    ({"options": {"x": 1}}, "--options.x must be a mapping of names to values; got 1."),
    ({"sparsity": {"target": "9KiB", "cost": "kv_cache"}},
     "--sparsity.target 9KiB cannot be combined with --sparsity.cost kv_cache"),
    ({"sparsity": {"target": "9M", "cost": "bytes"}},
     "--sparsity.target 9M cannot be combined with --sparsity.cost bytes"),
    ({"distill.kl": 0}, "--distill.kl or --distill.cross_entropy must be more than 0"),
    ({"distill": {"learning_rate": 0.01, "absolute_learning_rate": 5e-4}},
     "--distill.absolute_learning_rate cannot be combined with --distill.learning_rate"),
    ({"recovery": ["least_squares", "distill"], "distill.tokens": 100}, "--distill.tokens must be 768 or more"),
    ({"recovery": ["distill", "least_squares"]}, f"{CHAIN}distill+least_squares ('least_squares' goes block"),
    ({"recovery": ["bias", "least_squares"]}, f"{CHAIN}bias+least_squares ('least_squares' goes block"),
    ({"recovery": ["distill", "distill"]}, f"{CHAIN}distill+distill (each once"),
    ({"recovery": ["none", "distill"]}, f"{CHAIN}none+distill (each once, and no 'none'"),
    ({"recovery": ["least_squares", "heal"]}, "Unknown recovery 'heal'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_invalid_or_incompatible_settings_are_refused_with_the_reason(settings, message):
    with pytest.raises(UserError, match="^" + re.escape(f"Row 'x': {message}")) as error:
        config_from_mapping(settings, where="Row 'x'")
    assert "\n" not in str(error.value)


# --- flags that are refused with the model, before its weights are loaded

GGUF = "--export=gguf"
UNTIED = {"tie_word_embeddings": False}
IN_GPT2 = UNTIED | {"text_config": shrunk(GPT2Config(**UNTIED)).to_dict()}
BLOCKS = ["--sparsity.scope=ffn+blocks", "--sparsity.block_share=1", "--gprune=false", "--sparsity.target=0.4"]
BY_MODEL = [  # model type, other entries of its config, flags, a part of the message
    ("mixtral", {}, ["--recovery=bias"], "--recovery bias cannot recover experts"),
    ("mixtral", {}, ["--importance=taylor"], "Taylor saliency cannot be collected for experts"),
    ("opt", {}, ["--corpora.seq_len=129"], "must be at most 128 tokens"),
    ("gpt2", {}, ["--corpora.seq_len=129"], "must be at most 128 tokens"),
    ("llava", IN_GPT2, ["--corpora.seq_len=129"], "must be at most 128 tokens"),  # those of its text model
    ("qwen3_next", {}, BLOCKS, "must name a layer with attention of model type 'qwen3_next'"),
    ("roberta", {}, [],
     "Cannot measure the perplexity of model type 'roberta': its logits are not the product of hidden"),
    ("blt", {}, [], "Cannot measure the perplexity of model type 'blt': its config has no hidden_size."),
    ("gpt_neox_japanese", {}, ["--recovery=distill", "--distill.checkpointing=true"],
     "--distill.checkpointing must be false"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, [], "got a quantised checkpoint (gptq)"),
    ("gemma", {"quantization_config": {"quant_method": "bitnet"}}, [], "got a quantised checkpoint (bitnet)"),
    ("llama", {"model_type": "own_type", "auto_map": {"AutoConfig": "code.OwnConfig"}},
     ["--model.trust_remote_code=true"], "Model type 'own_type' needs a class in transformers that predicts next"),
    ("qwen3", {}, [GGUF], "Cannot export 'qwen3' to GGUF: it must compute like Llama, but is not one of"),
    ("llama", {}, ["--export=nemotron-nas", "--sparsity.scope=attention+ffn"],
     "scope includes attention"),
    ("llama", {}, ["--model.device_map=auto", "--export.dtype=float16"],
     "--model.dtype (float32) with --model.device_map"),
    ("llama", {}, [GGUF, "--export.type=q8_0", "--sparsity.width_multiple=1"],
     "--export.type q8_0 needs --sparsity.width_multiple 32 or a multiple of 32; got 1."),
]  # fmt: skip


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    """Discover each type once."""
    with tiny_run.isolated(tmp_path_factory.mktemp("structures")):
        yield


@pytest.mark.usefixtures("structures")
@pytest.mark.parametrize(("model_type", "settings", "flags", "message"), BY_MODEL)
def test_flags_that_do_not_fit_the_model_are_refused_in_one_line_before_its_weights_are_loaded(
    model_type, settings, flags, message, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("gprune.export.gguf.has_llama_cpp", lambda: True)
    folder = tmp_path / "model"
    shrunk(default_config(model_type)).save_pretrained(folder)  # no weights
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | settings))
    own = "class OwnConfig(PretrainedConfig):\n    model_type = 'own_type'\n"
    (folder / "code.py").write_text(f"from transformers import PretrainedConfig\n{own}")
    tiny_run.tiny_tokenizer().save_pretrained(folder)
    capsys.readouterr()
    assert tiny_run.main(world.args(tmp_path / "runs", f"--model.name={folder}", *flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("structures")
def test_a_hybrid_model_may_lose_layers_if_one_with_attention_is_protected(world, tmp_path, capsys):
    shrunk(default_config("qwen3_next")).save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    flags = [f"--model.name={tmp_path / 'model'}", *BLOCKS, "--sparsity.protect=[2]", "--dry_run=true"]
    assert tiny_run.main(world.args(tmp_path / "runs", *flags)) == 0
    assert "1 are removed as a whole" in capsys.readouterr().out
