"""Every part of the method on one and two simulated devices: same results as on the CPU, and few synchronisations."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import gprune.method.inputs
from gprune.calibration.collector import Collector
from gprune.cli import main
from gprune.runs.results import load_run
from tests import tiny_run
from tests.method import method_parts as parts
from tests.method.method_parts import EXPERTS, LEARNING, PARTS, close, model_of, run
from tests.simulated_devices import place_on_devices, simulate_devices

# Maximum number of host synchronisations of each part, for a model with three blocks and two batches. The numbers were
# measured. Terms with a factor 3 grow with the number of blocks, and terms with a factor 2 with the number of batches.
MAX_WAITS = {
    "calibration": 3 * 7 + 2,
    "calibration with Gram matrices": 3 * 9 + 2,
    "saliency": 3 * 35 + 2 * 2,
    "bias": 74,
    "least_squares": 72,
    # 31: also the comparison of both heads. 2: the norm of the gradient in each of two steps.
    "distill mlp": 31 + 2,
    "distill all, with all losses": 31 + 2,
    "distill lora": 31 + 2 + 3 * 14,  # PEFT makes its adapters on the CPU
    "pruning": 31,
    "perplexity": 10,
    "export check": 90,
}
MAX_WAITS_OF_A_STEP = {"cross_entropy": 2, "kl": 3}  # by loss; each forward pass has one, in transformers
FAST = ("calibration with Gram matrices", "saliency", "least_squares",
        "distill all, with all losses", "pruning", "perplexity", "thresholds, cross_entropy")  # fmt: skip


def with_slow_marks(names):
    """Return all names as parameters; names that are not in `FAST` are marked slow."""
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def models():
    return {(family, tied): model_of(family, tied=tied) for family in ("llama", "mixtral") for tied in (True, False)}


def check_part(part, model, devices, max_waits=None):
    """Assert that a part has the result of the CPU, and at most `max_waits` synchronisations (None: any number)."""
    expected, _ = run(part, model, 0)
    found, counted = run(part, model, devices)
    assert close(found, expected)
    if max_waits is not None:
        assert 0 < counted.waits <= max_waits, counted.by_place


PLACES = [(1, False), (2, True)]  # number of devices, whether the embeddings are tied


@pytest.mark.parametrize(("devices", "tied"), PLACES)
@pytest.mark.parametrize("name", with_slow_marks(PARTS))
def test_a_part_gives_the_same_result_on_every_placement_with_few_synchronisations(name, devices, tied, models):
    check_part(PARTS[name], models["llama", tied], devices, MAX_WAITS[name])


@pytest.mark.parametrize(("devices", "tied"), PLACES)
@pytest.mark.parametrize("name", with_slow_marks(LEARNING))
def test_threshold_learning_gives_the_same_result_on_every_placement_with_few_synchronisations(
    name, devices, tied, models
):
    settings, model = LEARNING[name], models["llama", tied]
    expected, _ = run(lambda place: parts.learn(place, **settings), model, 0)
    found, waits_of_a_step = parts.learn_and_count_waits(settings, model, devices)
    assert close(found, expected)
    assert 0 < waits_of_a_step <= MAX_WAITS_OF_A_STEP[settings["loss"]]


@pytest.mark.parametrize("name", with_slow_marks(EXPERTS))
def test_a_part_gives_the_same_result_for_experts_on_two_devices(name, models):
    check_part(PARTS[name], models["mixtral", False], 2)


def test_threshold_learning_gives_the_same_result_for_experts_on_two_devices(models):
    check_part(lambda place: parts.learn(place, attention=True), models["mixtral", False], 2)


def test_more_blocks_add_no_synchronisations_to_a_training_step():
    """The limit is that of a model with three blocks."""
    model = parts.make_tiny("llama", num_hidden_layers=5)
    _, waits_of_a_step = parts.learn_and_count_waits(LEARNING["both, cross_entropy, attention"], model, 2)
    assert waits_of_a_step <= MAX_WAITS_OF_A_STEP["cross_entropy"]


# The simulation detects mistakes


def add_input_with_mistake(self, metric, _module, given):
    """`Collector._add_input` with a mistake: the weights are always on the CPU, also for activations on a device."""
    metric.update(self._by_window(given[0].detach()), self._half, torch.ones(len(self._half)))


def test_the_simulation_detects_a_tensor_on_the_wrong_device(models, monkeypatch):
    monkeypatch.setattr(Collector, "_add_input", add_input_with_mistake)
    run(PARTS["calibration"], models["llama", False], 0)  # no error on the CPU
    with pytest.raises(RuntimeError, match="different devices"):
        run(PARTS["calibration"], models["llama", False], 1)


# The whole run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from tiny_run.world_with_cache(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_the_default_run_on_two_devices_matches_the_cpu(world, tmp_path, monkeypatch):
    """The run also removes KV groups, recovers by least squares and distillation, and exports the model."""
    flags = ("--sparsity.scope=attention+ffn", "--recovery=[least_squares,distill]", "--distill.tokens=384")
    flags += ("--evaluation.before_recovery=false", "--evaluation.curve=[]")
    expected = world.run(tmp_path, *flags, name="cpu")
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    load = gprune.method.inputs.load_without_tokenizer

    def load_on_devices(name, *, device_map=None, max_memory=None, **options):
        return place_on_devices(load(name, **options), 2)

    def reload(folder, input_ids, *, device, **_):
        model = place_on_devices(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(), 2)
        with torch.inference_mode():
            return model(input_ids.to(device), use_cache=False).logits

    monkeypatch.setattr("gprune.method.inputs.load_without_tokenizer", load_on_devices)
    monkeypatch.setattr("gprune.export.hf.reloaded_logits", reload)
    with simulate_devices():
        assert main(world.args(tmp_path, *flags, "--model.device_map=auto", name="simulated")) == 0
    found = load_run(tmp_path / "simulated")
    assert found.masks == expected.masks
    for on_devices, on_cpu in zip(found.records, expected.records, strict=True):
        assert on_devices["nll"] == pytest.approx(on_cpu["nll"], rel=1e-4)
