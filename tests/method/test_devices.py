"""Every part of the method on one and two simulated devices: same results as on the CPU, and few synchronisations."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

import gprune.method.inputs
from gprune.calibration.collector import Collector
from gprune.calibration.statistics import CorpusStatistics
from gprune.cli import main
from gprune.config.running import DistillConfig
from gprune.corpora.windows import Windows
from gprune.evaluation.perplexity import perplexity
from gprune.export import hf
from gprune.method.save import masked_logits
from gprune.models.families import attach_record, record_of
from gprune.models.masks import Masks
from gprune.models.surgery import kept_layers, slice_model
from gprune.models.units import units_of
from gprune.partition.modules import ranks_in_modules
from gprune.recoveries import Material, recoveries_of
from gprune.runs.results import load_run
from gprune.sparsity.budget import budget_of
from gprune.sparsity.cut import keep_masks
from gprune.sparsity.thresholds import start_thresholds
from gprune.stages.threshold_learning import ThresholdLearning
from tests import tiny_run
from tests.simulated_devices import TYPE, Devices, place_on_devices, simulate_devices
from tests.world import collect, make_tiny, some_masks

WINDOWS, LENGTH = 2, 16  # windows in a batch, tokens in a window
STEPS = 2  # batches of a part; the waits of one training step are measured from STEPS and 2 * STEPS batches


@dataclass(frozen=True)
class Place:
    """A model and the devices that it is on."""

    model: PreTrainedModel
    devices: int  # number of simulated devices; 0: the CPU

    def batches(self, steps: int = STEPS) -> list[dict[str, Tensor]]:
        """Return batches on the first device, where the trainer puts them."""
        ids = torch.randint(3, 128, (WINDOWS * steps, LENGTH), generator=torch.Generator().manual_seed(1))
        half = torch.arange(WINDOWS * steps) % 2
        batches = [
            {"input_ids": i, "half": h, "weight": torch.ones(WINDOWS)}
            for i, h in zip(ids.split(WINDOWS), half.split(WINDOWS), strict=True)
        ]
        if not self.devices:
            return batches
        return [{n: t.to(f"{TYPE}:0", non_blocking=True) for n, t in batch.items()} for batch in batches]

    @property
    def windows(self) -> Windows:
        ids = torch.cat([batch["input_ids"] for batch in Place(self.model, 0).batches()])
        return Windows("text", "test", ids)

    @property
    def masks(self) -> Masks:
        return some_masks(self.model, attention=True)


Part = Callable[[Place], Any]


def calibrate(place: Place, **kinds: Any) -> CorpusStatistics:
    return collect(place.model, place.batches(), **kinds)


def learn(place: Place, *, attention: bool, steps: int = STEPS, **settings: Any) -> list[Tensor]:
    """Return thresholds and offsets after `steps` steps under Lightning's Trainer."""
    units = [u for u in units_of(place.model) if u.kind in ("neurons", "kv_groups")]
    units.sort(key=lambda u: u.kind, reverse=True)  # first the neurons of all blocks
    generator = torch.Generator().manual_seed(0)
    labels = [torch.arange(u.size) % 3 for u in units if u.kind == "neurons"]

    def random_ranks(units: int) -> Tensor:
        return torch.rand(units, generator=generator, dtype=torch.float64) * 0.98 + 0.01

    ranks = ranks_in_modules({u.key: random_ranks(u.size) for u in units}, labels)
    budget = budget_of(units_of(place.model), 0.4, scope="attention+ffn" if attention else "ffn")
    start = start_thresholds(keep_masks(budget, ranks.p), ranks)
    stage = ThresholdLearning(place.model, ranks, start, budget, **{"centred": False} | settings)
    train(stage, DataLoader(place.batches(steps), batch_size=None))
    return [t.detach().cpu() for t in stage.state_dict().values()]


def train(stage: L.LightningModule, loader: DataLoader, **kwargs: Any) -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip
    trainer.fit(stage, loader)


def recover(place: Place, name: str, **settings: Any) -> Tensor:
    """Return the logits of a pruned and recovered model."""
    (method,), masks = recoveries_of(name, settings), place.masks
    statistics = calibrate(place, gram="gram" in method.needs) if method.needs - {"text"} else None
    gc.collect()  # metrics of torchmetrics contain reference cycles

    def fit(name: str, stage: L.LightningModule, *, clip: float | None = None, **_: Any) -> None:
        train(stage, DataLoader(place.batches(), batch_size=None), gradient_clip_val=clip)

    material = Material(
        place.model,
        masks,
        statistics=statistics,
        batches=place.windows.tokens.split(WINDOWS),
        fit=fit,
    )
    revise = method.revise(material)
    with torch.no_grad():
        small = slice_model(place.model, masks)
        for layers in kept_layers(place.model, small, masks):
            if revise is not None:
                revise(*layers)
    small = method.tune(material, small)
    return logits(small, place)


@torch.no_grad()
def logits(model: PreTrainedModel, place: Place) -> Tensor:
    return model(input_ids=place.batches()[0]["input_ids"], use_cache=False).logits.cpu()


def prune_and_mask(place: Place) -> list[Tensor]:
    """Return the logits of the masked model and of the pruned model."""
    masks = place.masks
    with torch.no_grad():
        of_masked = masked_logits(place.model, masks, place.batches()[0]["input_ids"]).cpu()
    return [of_masked, logits(slice_model(place.model, masks), place)]


def window_losses(place: Place) -> Tensor:
    return torch.tensor(perplexity(place.model, place.windows, batch_size=WINDOWS).window_nll)


def export_difference(place: Place) -> float:
    """Return the largest difference between the logits of the pruned model and of its reloaded export."""
    small = slice_model(place.model, place.masks)

    def reload(folder: Path, input_ids: Tensor, *, device: str, **_: Any) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
        attach_record(model, record_of(place.model))
        model = place_on_devices(model, place.devices) if place.devices else model
        return model(input_ids.to(device), use_cache=False).logits

    before, hf.reloaded_logits = hf.reloaded_logits, reload
    try:
        with tempfile.TemporaryDirectory() as folder:
            saved = hf.save_pruned(small, None, Path(folder) / "model")
            return hf.check_reload(small, saved, place.batches()[0]["input_ids"].cpu())
    finally:
        hf.reloaded_logits = before


def distill(place: Place, **settings: Any) -> Tensor:
    torch.manual_seed(0)  # for the initial LoRA weights
    return recover(place, "distill", distill=DistillConfig(**settings))


PARTS: dict[str, Part] = {
    "calibration": calibrate,
    "calibration with Gram matrices": lambda place: calibrate(place, gram=True),
    "saliency": lambda place: calibrate(place, saliency=("ffn", "attention")),
    "bias": lambda place: recover(place, "bias"),
    "least_squares": lambda place: recover(place, "least_squares"),
    "distill mlp": lambda place: distill(place, targets="mlp"),
    "distill all, with all losses": lambda place: distill(place, targets="all", cross_entropy=0.5),
    "distill lora": lambda place: distill(place, targets="lora", rank=2),
    "pruning": prune_and_mask,
    "perplexity": window_losses,
    "export check": export_difference,
}
LEARNING: dict[str, dict[str, Any]] = {
    f"{learn}, {loss}{', attention' if attention else ''}": {"learn": learn, "loss": loss, "attention": attention}
    for learn, loss, attention in (
        ("thresholds", "cross_entropy", False), ("thresholds", "kl", True), ("offsets", "kl", False),
        ("both", "cross_entropy", True),
    )
}  # fmt: skip
# Parts that support models with experts. Biases and saliency do not.
EXPERTS = ("calibration with Gram matrices", "least_squares", "distill mlp",
           "pruning", "perplexity", "export check")  # fmt: skip


def model_of(family: str, *, tied: bool = False) -> PreTrainedModel:
    return make_tiny(family, tie_word_embeddings=tied)


def run(part: Part, model: PreTrainedModel, devices: int) -> tuple[Any, Devices]:
    """Return the result of a part on a number of devices, and the counted synchronisations.

    Those of placing the model are not counted. With 0 devices the part runs on the CPU, and none are counted.
    """
    model = copy.deepcopy(model)
    if devices == 0:
        return part(Place(model, 0)), Devices()
    with simulate_devices() as counted:
        place = Place(place_on_devices(model, devices), devices)
        counted.by_place.clear()
        return part(place), counted


def learn_and_count_waits(settings: dict[str, Any], model: PreTrainedModel, devices: int) -> tuple[list[Tensor], int]:
    """Return the result of training, and the synchronisations of one step.

    These are the difference between 2 * STEPS and STEPS steps, which excludes the start and the end of training.
    """
    (thresholds, once), (_, twice) = (
        run(lambda place, n=n: learn(place, steps=n, **settings), model, devices) for n in (STEPS, 2 * STEPS)
    )
    return thresholds, (twice.waits - once.waits) // STEPS


def tensors(result: Any) -> Iterator[Tensor]:
    """Yield all numbers of a result as tensors."""
    if isinstance(result, CorpusStatistics):
        result = list(result.tensors().values())
    for item in result if isinstance(result, list) else [result]:
        yield torch.as_tensor(item)


def close(found: Any, expected: Any) -> bool:
    """Return whether two results agree within float32 rounding."""
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=2e-4, atol=2e-4) for a, b in pairs)


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
    expected, _ = run(lambda place: learn(place, **settings), model, 0)
    found, waits_of_a_step = learn_and_count_waits(settings, model, devices)
    assert close(found, expected)
    assert 0 < waits_of_a_step <= MAX_WAITS_OF_A_STEP[settings["loss"]]


@pytest.mark.parametrize("name", with_slow_marks(EXPERTS))
def test_a_part_gives_the_same_result_for_experts_on_two_devices(name, models):
    check_part(PARTS[name], models["mixtral", False], 2)


def test_threshold_learning_gives_the_same_result_for_experts_on_two_devices(models):
    check_part(lambda place: learn(place, attention=True), models["mixtral", False], 2)


def test_more_blocks_add_no_synchronisations_to_a_training_step():
    """The limit is that of a model with three blocks."""
    model = make_tiny("llama", num_hidden_layers=5)
    _, waits_of_a_step = learn_and_count_waits(LEARNING["both, cross_entropy, attention"], model, 2)
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
