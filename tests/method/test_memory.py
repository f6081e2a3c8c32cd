"""Peak memory that a dry run predicts: compared with the bytes of tensors in real runs, and as printed."""

from __future__ import annotations

import json
import re
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gprune
from gprune.config import parse
from gprune.config.running import DistillConfig
from gprune.errors import UserError
from gprune.method.dry_run import MemoryEstimate, estimated_peaks
from gprune.method.plan import make_plan
from gprune.models.experts import EXPERTS_PER_TOKEN, active_experts
from gprune.runs.folder import RunFolder
from gprune.stages import distill_recovery
from gprune.stages.student import Student
from tests import tiny_run
from tests.world import make_tiny

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}
TRAINED = "--gprune=false --evaluation.before_recovery=false --recovery=distill"  # without Gram matrices
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip


LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": True}
SHAPES_ON_THE_PAGE = {
    "Llama-3.2-1B": LLAMA_3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64,
    },
    "Llama-3.2-3B": LLAMA_3 | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "head_dim": 128,
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages of all live tensors, now and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}  # storages that are counted, until they are freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, result)):
            if isinstance(t, torch.Tensor) and not t.is_meta and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.known[key] = weakref.finalize(storage, self.free, key, size)
                self.now += size
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key, size):
        self.now -= size
        del self.known[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab_size", "flags"),
    [
        (4096, "--trainer.precision=bf16-mixed"),
        (4096, "--model.dtype=bfloat16 --recovery=distill --distill.targets=mlp --sparsity.scope=attention+ffn"),
        (4096, "--importance=taylor --recovery=least_squares --gprune=false"),
        # Three quarters of the peak are activations of layers, or a third is AdamW's moments.
        (4096, f"{TRAINED} --distill.batch_size=12 --distill.tokens=3072"),
        (512, f"{TRAINED} --distill.batch_size=1 --distill.tokens=768 --corpora.seq_len=64 --sparsity.target=0.1"),
    ],
)
def test_predicted_memory_peaks_are_within_25_percent_of_measured_ones(vocab_size, flags, tmp_path, monkeypatch):
    world = tiny_run.make_world(tmp_path)
    live, measured, step = LiveBytes(), {}, RunFolder.step
    tiny_run.save_tiny_model(world.model, **SIZES, vocab_size=vocab_size, initializer_range=0.05)

    @contextmanager
    def measured_step(self, name):
        live.peak = live.now
        with step(self, name):
            yield
        measured[name] = live.peak

    monkeypatch.setattr(RunFolder, "step", measured_step)
    args = ("--corpora.seq_len=256", "--evaluation.seq_len=256", "--recovery=least_squares+distill", "--export=none")
    short = ("--evaluation.curve=[]", f"--corpora.evaluate={world.names('alpha')}")
    cfg = parse(world.args(tmp_path / "runs", *args, "--distill.tokens=1024", *short, *flags.split()))
    with tiny_run.isolated(tmp_path / "cache"), live:
        gprune.prune(cfg)
    peaks = {"calibrate": measured["calibrate"], "recover": measured["shrink"]}
    peaks |= {"learn": measured["thresholds"]} if cfg.learns else {}
    predicted = {step: sum(terms) for step, terms in estimated_peaks(make_plan(cfg)).items()}
    assert {name: predicted[name] for name in peaks} == pytest.approx(peaks, rel=0.25)
    # Perplexity needs less memory than the highest peak, so a dry run never warns of it.
    assert predicted["evaluate"] <= max(measured.values())


@pytest.fixture
def plan_of_8b(tmp_path, capsys):
    """Return the lines of a dry run for an 8B Llama that has a config.json and no weights."""
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b/config.json").write_text(json.dumps(LLAMA_8B))

    def plan(*flags):
        model = [f"--model.name={tmp_path / '8b'}", "--model.dtype=bfloat16"]
        with tiny_run.isolated(tmp_path / "cache"):
            assert tiny_run.main([*model, "--dry_run=true", *flags]) == 0
        return {line[:16].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}

    return plan


def test_a_dry_run_plans_lora_without_peft_which_a_run_needs(plan_of_8b, tiny_model, monkeypatch):
    monkeypatch.setattr(distill_recovery, "find_spec", lambda _: None)
    assert plan_of_8b("--trainer.accelerator=gpu", "--distill.targets=lora")["memory"].startswith("about ")
    cfg = SimpleNamespace(dry_run=False, distill=DistillConfig(targets="lora"))
    with pytest.raises(UserError, match=r"lora needs peft, which is not installed\. Run pip install peft"):
        distill_recovery.Distill().refuse(SimpleNamespace(skeleton=tiny_model, cfg=cfg))


@pytest.mark.parametrize("targets", ["mlp", "all", "lora"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3_moe", "mixtral", "ernie4_5_moe"])
def test_a_dry_run_counts_the_parameters_that_the_optimizer_gets(family, targets, tmp_path):
    """At almost no sparsity, where the pruned model is nearly the dense one. Experts have no adapters."""
    make_tiny(family).save_pretrained(tmp_path)
    flags = ("--sparsity.target=0.01", "--sparsity.scope=ffn", f"--distill.targets={targets}", "--recovery=distill")
    plan = make_plan(parse([f"--model.name={tmp_path}", "--sparsity.width_multiple=1", *flags]))
    student = Student(make_tiny(family), targets=targets)
    trained = sum(parameter.numel() for parameter in student.learned.values())
    assert MemoryEstimate(plan).trained_parameters == pytest.approx(trained, rel=0.03)


def test_a_dry_run_predicts_the_memory_of_an_8b_model_for_another_machine(plan_of_8b):
    gpus = ("--trainer.accelerator=gpu", "--trainer.devices=8", "--trainer.num_nodes=2")
    predicted = plan_of_8b(*gpus)
    assert predicted["memory"].startswith("about 131.7 GiB of each GPU in the step recover")
    kept = 6_339_039_232  # parameters, of which embeddings and head are not trained
    trained = kept - 2 * LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"]
    assert f"{16 * trained / 2**30:.2f} gradients and optimizer" in predicted["of which"]
    sharded = plan_of_8b(*gpus, "--trainer.strategy=fsdp")
    assert f" {trained / 2**30:.2f} gradients and optimizer" in sharded["of which"]  # over 16 processes
    assert "12,678.1 MB in bfloat16" in predicted["exports"]
    assert predicted["text"].startswith("not counted, because the tokenizer of ")
    assert "not counted" in plan_of_8b("--model.device_map=auto")["memory"]


@pytest.mark.parametrize(("model", "config"), SHAPES_ON_THE_PAGE.items())
def test_the_table_of_large_models_has_the_planned_memory(model, config, plan_of_8b, tmp_path):
    """The config alone is enough, also of Qwen3, whose tokenizer transformers then makes without a vocabulary."""
    page = (tiny_run.ROOT / "docs/large_models.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {model} \| (.*) \|$", page, re.M)
    (tmp_path / "8b/config.json").write_text(json.dumps(config))
    size, *cells = row.split(" | ")
    trained = "--config=trained"
    recipes = (
        [trained],
        [trained, "--distill.targets=mlp"],
        [trained, "--distill.targets=lora"],
        ["--config=untrained"],
    )
    for cell, flags in zip(cells, recipes, strict=True):
        planned = plan_of_8b(*flags, "--trainer.accelerator=gpu")
        assert planned["memory"].split()[1] == cell.split()[0]
        assert planned["text"].startswith("not counted, because the tokenizer of ")
        terms = re.findall(r"\d+\.\d+", planned["of which"])
        assert "(" not in cell or re.findall(r"\d+\.\d+", cell)[1:] == terms
        assert f"{float(re.findall(r': ([0-9,.]+) MB', planned['exports'])[0].replace(',', '')) / 1000:.1f} GB" == size


@pytest.mark.parametrize("name", EXPERTS_PER_TOKEN)
def test_active_experts_are_read_by_any_name_and_default_to_all(name):
    """A list has one number for each layer, of which the largest one counts. There are at most all four experts."""
    block_with_experts, dense_block = SimpleNamespace(rows=4), SimpleNamespace(rows=1)
    for value, active in ((2, 2), ([1, 3], 3), (8, 4), (None, 4)):
        assert active_experts(SimpleNamespace(**{name: value}), block_with_experts) == active
        assert active_experts(SimpleNamespace(**{name: value}), dense_block) == 1
    assert active_experts(SimpleNamespace(), block_with_experts) == 4
