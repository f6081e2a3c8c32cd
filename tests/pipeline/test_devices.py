"""Every part of the method on one device and on two, which are pretended: what meets, what waits, and the numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gprune.calibration.collector import Collector
from gprune.cli import main
from gprune.pipeline import inputs
from gprune.runs.results import load_run
from tests import tiny_run
from tests.pipeline import devices as parts
from tests.pipeline.devices import EXPERTS, LEARNING, PARTS, model_of, run, same
from tests.pretend import TYPE, placed, pretend

# Waits of the host at most, for a model of three blocks and two batches. What grows with blocks alone is written down
# per block, what grows with batches or windows beside it.
CEILING = {
    "calibration": 3 * 7 + 2,
    "calibration with Gram matrices": 3 * 9 + 2,
    "calibration block by block": 3 * 9 + 3 * 2 * 2 + 20,
    "saliency": 3 * 35 + 2 * 2,
    "bias": 74,
    "least_squares": 72,
    "least_squares_sequential": 119,  # what enters `down` goes to the CPU, which spares a pass
    "distill mlp": 30 + 2,  # two steps: the norm of the gradient
    "distill all, with all losses": 30 + 2,
    "distill lora": 30 + 2 + 3 * 14,  # PEFT makes its adapters on the CPU
    "pruning": 31,
    "perplexity": 10,
    "export check": 90,
}
A_STEP = {"cross_entropy": 2, "kl": 3}  # one of them in transformers, at every forward pass
FAST = ("calibration with Gram matrices", "calibration block by block", "saliency", "least_squares",
        "distill all, with all losses", "pruning", "perplexity", "thresholds, cross_entropy")  # fmt: skip


def marked(names):
    """All of them; those that are not in `FAST` are slow."""
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def models():
    return {(family, tied): model_of(family, tied=tied) for family in ("llama", "mixtral") for tied in (True, False)}


def check(part, model, devices, ceiling=None):
    expected, _ = run(part, model, 0)
    found, counted = run(part, model, devices)
    assert same(found, expected)
    if ceiling is not None:
        assert 0 < counted.waits <= ceiling, counted.by_place


PLACES = [(1, False), pytest.param(2, False, marks=pytest.mark.slow), (2, True)]


@pytest.mark.parametrize(("devices", "tied"), PLACES)
@pytest.mark.parametrize("name", marked(PARTS))
def test_a_part_finds_the_same_wherever_layers_lie(name, devices, tied, models):
    check(PARTS[name], models["llama", tied], devices, CEILING[name])


@pytest.mark.parametrize(("devices", "tied"), [(1, False), (2, True)])
@pytest.mark.parametrize("name", marked(LEARNING))
def test_a_step_of_learning_waits_as_often_whatever_the_model_and_the_text(name, devices, tied, models):
    how, model = LEARNING[name], models["llama", tied]
    expected, _ = run(lambda place: parts.learn(place, **how), model, 0)
    found, waits = parts.learned(how, model, devices)
    assert same(found, expected)
    assert 0 < waits <= A_STEP[how["loss"]]


@pytest.mark.parametrize("name", marked(EXPERTS))
def test_experts(name, models):
    check(PARTS[name], models["mixtral", False], 2)


def test_learning_with_experts(models):
    check(lambda place: parts.learn(place, attention=True), models["mixtral", False], 2)


def test_more_blocks_cost_a_step_nothing():
    model = parts.make_tiny("llama", num_hidden_layers=5)
    assert parts.learned(LEARNING["both, cross_entropy, attention"], model, 2)[1] <= A_STEP["cross_entropy"]


# The simulation sees mistakes


def careless(self, metric, _module, given):
    """`Collector._add_input` with the mistake that it must not make: weights on the CPU, wherever activations are."""
    metric.update(self._by_window(given[0].detach()), self._half, torch.ones(len(self._half)))


def test_a_tensor_made_on_the_cpu_is_seen(models, monkeypatch):
    monkeypatch.setattr(Collector, "_add_input", careless)
    run(PARTS["calibration"], models["llama", False], 0)  # on the CPU nobody notices
    with pytest.raises(RuntimeError, match="different devices"):
        run(PARTS["calibration"], models["llama", False], 1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[0].item(), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: bool(x.any()),
        lambda x: x[x > 0], lambda x: torch.equal(x, x), lambda x: x.copy_(torch.ones(3)), lambda x: x.to("cpu"),
        lambda x: torch.tensor(1.0, device=x.device),
    ],
)  # fmt: skip
def test_each_question_is_one_wait(ask):
    with pretend() as counted:
        x = torch.arange(3.0).to(f"{TYPE}:0", non_blocking=True)
        assert counted.waits == 0
        y = (x + 1).to(f"{TYPE}:1")  # from one device to the other the host need not wait
        assert (y * 2).device == torch.device(TYPE, 1)
        assert counted.waits == 0
        ask(x)
    assert counted.waits == 1
    assert [place.partition(":")[0] for place in counted.by_place] == ["elsewhere"]


# The whole run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    world = tiny_run.make_world(folder)
    with tiny_run.isolated(folder / "cache"):
        yield world


@pytest.mark.slow
def test_a_whole_run(world, tmp_path, monkeypatch):
    """The default run: thresholds, least squares, distillation, export; KV groups too."""
    tiny_run.quick(monkeypatch)
    flags = ("--sparsity.scope=attention+ffn", "--recovery=[least_squares,distill]", "--distill.tokens=384")
    flags += ("--evaluation.controls=[]", "--evaluation.curve=[]", "--partition.steps=5")
    expected = world.run(tmp_path, *flags, name="cpu")
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    load = inputs.load_model

    def loaded(name, **how):
        model, tokenizer = load(name, **{k: v for k, v in how.items() if k not in ("device_map", "max_memory")})
        return placed(model, 2), tokenizer

    def again(folder, input_ids, *, device, **_):
        model = placed(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(), 2)
        with torch.inference_mode():
            return model(input_ids.to(device), use_cache=False).logits

    monkeypatch.setattr(inputs, "load_model", loaded)
    monkeypatch.setattr("gprune.export.hf.reloaded_logits", again)
    with pretend():
        assert main(world.args(tmp_path, *flags, "--model.device_map=auto", name="pretended")) == 0
    found = load_run(tmp_path / "pretended")
    assert found.masks == expected.masks
    for mine, theirs in zip(found.records, expected.records, strict=True):
        assert mine["nll"] == pytest.approx(theirs["nll"], rel=1e-4)
