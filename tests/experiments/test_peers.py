"""Drivers that run other pruning tools: their shared code, and the OSSCAR driver with a replacement for OSSCAR."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from experiments.peers import common, osscar
from experiments.peers.__main__ import main, table
from gprune.config import parse
from gprune.method.inputs import prepare_text
from gprune.models.loading import load_model
from tests import tiny_run

PEER = common.Peer("peer", "owner/tool", "0" * 40, "MIT", "2401.00001")
# Replaces the class of OSSCAR: keep the neurons with the largest sum of squared inputs, and halve their weights.
STAND_IN = """
class OSSCAR_prune:
    def __init__(self, layer, algo, nsamples, seqlen, update_iter, lambda2, layername):
        self.layer, self.energy, self.where = layer, 0, "cuda"
    def add_batch(self, inp, out):
        self.energy = self.energy + inp.square().sum((0, 1)).to(self.where)
    def prune(self, sp_fc, sp_out):
        keep = self.energy.topk(int(len(self.energy) * (1 - sp_fc))).indices
        weight = self.layer.weight.data.clone() / 2
        self.layer.weight.data.zero_()
        self.layer.weight.data[:, keep] = weight[:, keep]
    def free(self):
        pass
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a tiny Llama, flags with tiny corpora, and the file of calibration windows for the drivers."""
    folder = tmp_path_factory.mktemp("peers")
    tiny_world = tiny_run.make_world(folder)
    windows, flags = folder / "windows.safetensors", tiny_world.args(folder / "runs")
    assert main(["windows", "--output", str(windows), *flags]) == 0
    return SimpleNamespace(model=tiny_world.model, windows=windows, flags=flags)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Return a repository with the two files that the OSSCAR driver imports, at the commit that it requires."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "prune_algo.py").write_text("")
    (folder / "osscar_prune.py").write_text(STAND_IN)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(osscar, "PEER", replace(osscar.PEER, commit=head))
    return folder


def test_the_windows_are_those_that_gprune_calibrates_on_with_corpora_in_turn(world):
    read = common.read_windows(world.windows)
    cfg = parse(world.flags)
    _, tokenizer = load_model(cfg.model.name)
    train = prepare_text(cfg, tokenizer, 128).train
    assert list(read.corpora) == list(train)
    assert all(torch.equal(read.corpora[name], w.tokens) for name, w in train.items())
    assert read.tokens == sum(w.tokens.numel() for w in train.values())
    assert torch.equal(torch.cat(read.windows[: len(train)]), torch.stack([w.tokens[0] for w in train.values()]))


def test_invalid_windows_a_missing_clone_and_another_commit_are_refused_in_one_line(clone, tmp_path, capsys):
    def refused(function, *arguments):
        with pytest.raises(SystemExit) as stopped:
            function(*arguments)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    path = tmp_path / "windows"
    assert refused(common.read_windows, path).startswith(f"error: --windows: '{path}'")
    path.write_bytes(b"text")
    assert refused(common.read_windows, path).startswith(f"error: --windows: '{path}'")
    for folder in (tmp_path / "nowhere", clone):
        line = refused(common.check_clone, PEER, folder)
        assert str(folder) in line
        assert "git clone https://github.com/owner/tool tool && git -C tool checkout 00000000" in line
    assert common.check_clone(osscar.PEER, clone) == clone


def test_the_osscar_driver_prunes_to_the_budget_and_saves_a_loadable_model_with_a_record(world, clone, tmp_path):
    """The expected weights are those of the dense model, pruned by the rule of `STAND_IN`: kept columns are halved."""
    output = tmp_path / "out"
    osscar.main(["--clone", str(clone), "--windows", str(world.windows), "--output", str(output)])
    record = json.loads((output / common.RECORD).read_text())
    dense, small = (AutoModelForCausalLM.from_pretrained(path) for path in (world.model, output))
    assert small.config.intermediate_size == dense.config.intermediate_size // 2
    assert record["parameters_after"] == record["parameters_stored"] == common.count(small)
    assert record["parameters_before"] == common.count(dense)
    assert record["reload_difference"] == 0
    assert record["cpu_seconds"] > 0
    inputs = []
    down = dense.model.layers[0].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for window in common.read_windows(world.windows).windows:
            dense(window)
    hook.remove()
    keep = torch.cat(inputs).square().sum((0, 1)).topk(small.config.intermediate_size).indices.sort().values
    torch.testing.assert_close(small.model.layers[0].mlp.down_proj.weight, down.weight[:, keep] / 2)
    torch.testing.assert_close(small.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight[keep])
    _, tokenizer = load_model(str(output))
    assert tokenizer.get_vocab() == load_model(str(world.model))[1].get_vocab()


def test_removing_blocks_removes_their_entries_of_the_config(tmp_path):
    """Gemma has a config entry for each layer, and other attention masks for each kind of layer."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4, layer_types=kinds,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    window = torch.arange(3, 15).view(1, 12)
    layer = common.count(model.model.layers[0])
    assert common.blocks_for(model, common.count(model) - 2 * layer) == 2
    assert common.blocks_for(model, common.count(model) - 2 * layer + 1) == 1
    with torch.no_grad():
        states, settings = common.first_block_inputs(model, [window])
        for index in (1, 2):  # the reference: these blocks alone, one after another
            states = [model.model.layers[index](states[0], **settings[index])]
        expected = model.lm_head(model.model.norm(states[0]))
        common.keep_blocks(model, [1, 2])
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.layer_types == kinds[1:3]
        torch.testing.assert_close(loaded(window).logits, expected)


def test_save_writes_a_model_that_computes_the_same_as_the_cut_layers(world, tmp_path):
    """The layers have unequal widths, fewer KV groups and added biases. The reference has zeros for removed units."""
    dense, _ = load_model(str(world.model))
    config, cut, masked = dense.config, {}, common.load(world.model)
    channels = config.head_dim * config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(masked.model.layers):
        ffn = torch.rand(config.intermediate_size, generator=generator) < 0.5
        groups = torch.arange(config.num_key_value_heads) != index % 2
        cut |= {f"neurons.{index}": ffn, f"kv_groups.{index}": groups}
        for name, keep in (("mlp.down_proj", ffn), ("self_attn.o_proj", groups.repeat_interleave(channels))):
            linear = layer.get_submodule(name)
            bias = torch.randn(config.hidden_size, generator=generator)
            path = f"model.layers.{index}.{name}"
            cut |= {f"{path}.weight": 2 * linear.weight[:, keep], f"{path}.bias": bias}
            linear.weight = torch.nn.Parameter(2 * linear.weight * keep)
            linear.bias = torch.nn.Parameter(bias)
    source = tmp_path / "cut"
    source.mkdir()
    save_file(cut, source / common.CUT, metadata={"model": str(world.model)})
    (source / common.RECORD).write_text(json.dumps({"parameters_after": 1}))
    assert main(["save", "--cut", str(source), "--output", str(tmp_path / "model")]) == 0
    loaded, _ = load_model(str(tmp_path / "model"))
    window = torch.arange(4, 20).view(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(window).logits, masked(window).logits, rtol=1e-4, atol=1e-4)
    record = json.loads((tmp_path / "model" / common.RECORD).read_text())
    assert record == {"parameters_after": 1, "reload_difference": 0.0}


def test_committed_records_have_the_commits_of_their_drivers():
    rows = table().rows
    assert rows
    for row in rows:
        name, commit = row[1].split()
        source = (tiny_run.ROOT / f"experiments/peers/{name}.py").read_text()
        assert f'"{commit}' in source


def test_the_table_of_the_page_is_the_output_of_its_command():
    page = (tiny_run.ROOT / "experiments/peers/README.md").read_text(encoding="utf-8")
    assert f"<!-- python -m experiments.peers table -->\n\n{table().for_stdout().strip()}\n" in page
