"""Distillation: its loss, trained and frozen weights, resuming, and the resulting plain model."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import re
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from transformers import CONFIG_MAPPING

import gprune
from experiments.architectures import DEFAULTS, default_config
from gprune.config import parse
from gprune.discovery import tiny
from gprune.errors import UserError
from gprune.method.plan import make_plan
from gprune.models.agreement import random_masks
from gprune.models.families import decoder_layers, record_of
from gprune.models.paths import attribute_at, owner_of
from gprune.models.surgery import slice_model
from gprune.recoveries import RECOVERY, Recovery, recovery
from gprune.runs import folder
from gprune.runs.results import load_run
from gprune.stages.distillation import DistillationStage
from gprune.stages.student import Student
from gprune.storage.files import read_tensors
from tests import tiny_run
from tests.stages.test_threshold_learning import data_of, sampled_tokens, trainer_of
from tests.test_readme import run_recipe
from tests.world import make_tiny, some_masks, tiny_of, units_of_kind

TARGETS = ("mlp", "all", "lora")


def divergence(dense, pruned, tokens: torch.Tensor) -> float:
    """KL(dense || pruned) of the next token in nats, from the models' logits in float64."""
    with torch.no_grad():
        logs = [m(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (dense, pruned)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def fit(
    stage: DistillationStage, tokens: torch.Tensor, *, epochs: int = 1, batch_size: int = 4, **options
) -> L.Trainer:
    trainer = trainer_of(epochs=epochs, **options)
    trainer.fit(stage, data_of(tokens, batch_size))
    return trainer


@pytest.fixture
def problem(tiny_model):
    return tiny_model, slice_model(tiny_model, some_masks(tiny_model, attention=True)), sampled_tokens(tiny_model)


@pytest.mark.parametrize("targets", TARGETS)
def test_distillation_reduces_the_kl_divergence_changes_only_its_targets_and_returns_a_plain_model(targets, problem):
    dense, pruned, tokens = problem
    dense_weights = {name: t.clone() for name, t in dense.state_dict().items()}
    initial = {name: t.clone() for name, t in pruned.state_dict().items()}
    start = divergence(dense, pruned, tokens)
    stage = DistillationStage(dense, pruned, targets=targets, learning_rate=0.02)
    assert divergence(dense, stage.student, tokens) == pytest.approx(start, rel=1e-5)  # before training
    fit(stage, tokens, epochs=8)
    with torch.no_grad():
        expected = stage.student(tokens).logits
        small = stage.finished()
        # The result has folded scales or merged adapters.
        torch.testing.assert_close(small(tokens).logits, expected, atol=2e-4, rtol=1e-4)
    assert divergence(dense, small, tokens) < 0.8 * start
    # The dense model is unchanged. The result is a plain frozen model with the same shapes.
    assert all(torch.equal(dense_weights[name], t) for name, t in dense.state_dict().items())
    assert {name: t.shape for name, t in small.state_dict().items()} == {n: t.shape for n, t in initial.items()}
    assert not any(p.requires_grad for p in small.parameters())
    assert not any(m._forward_pre_hooks for m in small.modules())  # private, but there is no public way to list hooks
    # Frozen weights keep their bits: the embedding and the final norm, and with targets "mlp" also attention.
    unchanged = {name for name, t in small.state_dict().items() if torch.equal(t, initial[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= unchanged
    attention = {name for name in initial if ".self_attn." in name and "norm" not in name}
    assert (attention <= unchanged) == (targets == "mlp")


@pytest.mark.parametrize(("kl", "cross_entropy"), [(1, 0), (1, 0.5), (0, 2)])
def test_the_loss_is_the_weighted_sum_of_kl_and_cross_entropy(kl, cross_entropy, problem):
    dense, pruned, tokens = problem
    settings = {"learning_rate": 1e-9, "kl": kl, "cross_entropy": cross_entropy}
    trainer = fit(DistillationStage(dense, pruned, **settings), tokens, batch_size=len(tokens))
    with torch.no_grad():
        expected = kl * divergence(dense, pruned, tokens) + cross_entropy * float(pruned(tokens, labels=tokens).loss)
    assert float(trainer.callback_metrics["distill/loss"]) == pytest.approx(expected, rel=1e-4)


def train_two_steps(dense, tokens: torch.Tensor, *, precision: str = "32-true", accumulate: int = 1, **settings):
    """Distil a pruned copy in two steps. Return the trained copy, and the changes of all its weights as one vector.

    Assert that no hooks and no gradients remain, and that weights are float32.
    """
    pruned = slice_model(dense, some_masks(dense, attention=True))
    before = {name: t.clone() for name, t in pruned.state_dict().items()}
    stage = DistillationStage(dense, pruned, learning_rate=1e-3, warmup=0.5, **settings)
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    trainer = fit(stage, tokens, batch_size=4 // accumulate, **options)
    assert trainer.global_step == 2  # eight windows, four per step
    after = stage.finished().state_dict()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stage.student.modules())
    assert not stage.student(tokens[:1]).logits.requires_grad
    assert {t.dtype for t in after.values()} == {torch.float32}
    return pruned, torch.cat([(t - before[name]).flatten() for name, t in after.items()])


def relative_difference(dense, tokens: torch.Tensor, **settings) -> float:
    """Relative difference of the changes of weights, with and without settings of `train_two_steps`."""
    (_, plain), (_, changed) = (train_two_steps(dense, tokens, **of_run) for of_run in ({}, settings))
    return float((plain - changed).norm() / plain.norm())


@pytest.mark.parametrize(
    ("settings", "family"),
    [({"checkpointing": True}, "llama"), ({"checkpointing": True}, "opt"), ({"accumulate": 2}, "llama")],
)
def test_checkpointing_and_accumulation_train_the_same_weights(settings, family, problem):
    dense, _, tokens = problem
    if family != "llama":
        dense = make_tiny(family)
    assert relative_difference(dense, tokens, **settings) < 1e-3


def with_dropout(model_type: str):
    """Return a tiny random model of a type whose dropout probabilities are 0.5."""
    config = tiny.shrunk(default_config(model_type))
    text_config = getattr(config, "text_config", config)
    settings = vars(text_config).items()
    names = [name for name, value in settings if "dropout" in name and isinstance(value, (int, float))]
    assert names
    for name in names:
        setattr(text_config, name, 0.5)
    return tiny_of(config)


@pytest.mark.parametrize(
    "model_type", ["falcon", "doge", "bart", "whisper", "xglm", "biogpt", "opt", "stablelm", "persimmon", "fuyu"]
)
def test_checkpointing_recomputes_each_layer_without_dropout(model_type):
    dense = with_dropout(model_type)
    ids = torch.arange(3, 27).view(2, 12)
    plain, checkpointed = (Student(copy.deepcopy(dense), checkpointing=setting) for setting in (False, True))
    calls = []
    neurons = units_of_kind(checkpointed.model, "neurons")[1]
    layer = decoder_layers(checkpointed.model)[neurons.layer]
    layer.get_submodule(owner_of(neurons.inputs[-1].path)).register_forward_hook(lambda *_: calls.append(1))
    expected = plain.model(ids, use_cache=False).logits
    for _ in range(3):
        logits = checkpointed.model(ids, use_cache=False).logits
        assert torch.equal(logits, expected)
    assert len(calls) == 3
    for output in (logits, expected):
        output.square().mean().backward()
    assert len(calls) == 4  # once more in the backward pass
    for name, weight in plain.learned.items():
        torch.testing.assert_close(checkpointed.learned[name].grad, weight.grad)
    trained = checkpointed.to_plain_model()
    assert not any("forward" in module.__dict__ for module in trained.modules())
    if model_type == "opt":
        assert [layer.dropout for layer in decoder_layers(trained)] == [0.5] * 3  # the setting of the model is kept


def test_the_last_group_of_batches_has_the_mean_gradient_and_loss_of_its_own_batches(problem):
    """Three batches, two per step: the second step has one batch."""
    seen = []

    class Recorded(DistillationStage):
        def configure_gradient_clipping(self, *args, **options):
            seen.append((sum(self._losses_of_step) / len(self._losses_of_step), float(self.gradient_norm())))
            super().configure_gradient_clipping(*args, **options)

    dense, pruned, tokens = problem
    losses = []
    for accumulate in (1, 2):
        stage = Recorded(dense, pruned, learning_rate=1e-12)  # the weights stay the same
        callback = LambdaCallback(on_train_batch_end=lambda _, stage, *__: losses.append(stage.last_loss))
        trainer = trainer_of(callback, accumulate_grad_batches=accumulate)
        trainer.fit(stage, data_of(tokens[:6], 2))
        pruned = stage.finished()
    (first, second, third), (both, last) = seen[:3], seen[3:]
    assert last == pytest.approx(third, rel=1e-4)
    assert both[0] == pytest.approx((first[0] + second[0]) / 2, rel=1e-4)
    assert len(losses) == 6
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)  # losses of batches are logged without a factor


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *[(family, {}) for family in ("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe")],
        ("qwen3_moe", {"mlp_only_layers": [1]}),
    ],
)
def test_adapters_of_a_mixture_with_dense_layers_are_in_exactly_the_targets(family, settings):
    dense = tiny_of(tiny.shrunk(CONFIG_MAPPING[family](**DEFAULTS.get(family, {}) | settings))).requires_grad_(False)
    tokens, layers = sampled_tokens(dense), decoder_layers(dense)
    assert {bool(u.inside) for u in units_of_kind(dense, "neurons")} == {False, True}
    sliced = [(u, s) for kind in ("neurons", "kv_groups") for u in units_of_kind(dense, kind) for s in u.slices]
    modules = [layers[u.layer].get_submodule(owner_of(s.path)) for u, s in sliced if not s.is_norm]
    ids_of_linear = {id(module) for module in modules if hasattr(module, "weight")}
    expected = {f"{name}.lora_A" for name, module in dense.named_modules() if id(module) in ids_of_linear}
    pruned = slice_model(dense, random_masks(dense, scope="ffn"))
    start = divergence(dense, pruned, tokens)
    stage = DistillationStage(dense, pruned, targets="lora", learning_rate=0.01)
    assert {name for name, _ in stage._student.model.named_modules() if name.endswith("lora_A")} == expected
    fit(stage, tokens, epochs=2)
    assert divergence(dense, stage.finished(), tokens) < start


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("dtype", "resolution"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_16_bit_weights_are_trained_in_float32(dtype, resolution, targets, problem):
    dense, pruned, tokens = (part.to(dtype) if isinstance(part, torch.nn.Module) else part for part in problem)
    initial = {name: t.clone() for name, t in pruned.state_dict().items()}
    stage = DistillationStage(dense, pruned, targets=targets, learning_rate=1e-3)
    fit(stage, tokens)
    assert {parameter.dtype for parameter in stage.learned.values()} == {torch.float32}
    # Updates below the resolution of the stored dtype near 1 are not lost.
    assert all(torch.frac(p.float() * resolution).any() for p in stage.learned.values() if p.abs().max() > 0.5)
    small = stage.finished()
    assert {t.dtype for t in small.state_dict().values()} == {dtype}
    assert any(not torch.equal(initial[name], t) for name, t in small.state_dict().items())


def test_trained_tensors_are_in_the_order_of_the_model(problem):
    # The gradient norm is a sum in this order, so another one (a ParameterDict sorts a plain dict) changes its bits.
    dense, pruned, _ = problem
    stage = DistillationStage(dense, pruned)
    names = {id(parameter): name for name, parameter in pruned.model.layers.named_parameters()}
    assert [names[id(parameter)] for parameter in stage.learned.values()] == list(names.values())


def test_kl_to_a_student_with_another_output_embedding_is_refused(problem):
    """A recovery of the user may have trained it. The teacher's hidden states would then be used with a wrong head."""
    dense, student, _ = problem
    student.get_output_embeddings().weight.data += 0.01
    with pytest.raises(UserError, match=r"--distill\.kl must be 0, because .*output embedding differs .*; got 1\."):
        DistillationStage(dense, student)
    DistillationStage(dense, student, kl=0.0, cross_entropy=1.0)


# --- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from tiny_run.world_with_cache(tmp_path_factory.mktemp("world"))


FLAGS = (
    "--recovery=[least_squares,distill]",
    "--distill.tokens=576",
    "--distill.batch_size=2",
    "--distill.learning_rate=0.003",
)
ALONE = ("--gprune=false", "--evaluation.before_recovery=false", "--export=none")
EVERY_STEP = "--run.checkpoint_minutes=0"
TWO_PROCESSES = ("--trainer.devices=2", "--trainer.strategy=ddp")
CURVES = "distill"


def learned_of(run) -> dict[str, torch.Tensor]:
    (file,) = (run / "recovery").glob("*.safetensors")
    return read_tensors(file)


def assert_same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """An uninterrupted run with distillation and without early evaluation."""
    return world.run(tmp_path_factory.mktemp("uninterrupted"), *FLAGS, *ALONE)


def test_a_run_is_measured_before_and_after_distillation_which_does_not_depend_on_it(
    uninterrupted, world, tmp_path, capsys
):
    result = world.run(tmp_path, *FLAGS, "--gprune=false")
    before_training, after_training = capsys.readouterr().out.split("Distilling")
    # The table before training has no recovered model.
    headers = [re.findall(r"^\|.* dense .*$", text, re.M)[0].split("|") for text in (before_training, after_training)]
    stages = [[cell.strip() for cell in header[2:-1]] for header in headers]
    assert stages == [["dense", "pruned"], ["dense", "pruned", "recovered"]]
    assert all((r["distill"] is not None) == (r["stage"] == "recovered") for r in result.records)
    assert [r for r in result.records if r["stage"] != "pruned"] == uninterrupted.records
    # All training text is recorded as used.
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert sum(name.endswith(" recovered") for name in manifest["settings"]["inputs"]["text"]) == 3


def test_the_plan_counts_the_tokens_of_validation(uninterrupted):
    """Validation is at the start and after 3, 6 and 9 batches, on one window of each of three corpora."""
    steps = json.loads((uninterrupted.path / "manifest.json").read_text())["steps"]
    forward, _ = make_plan(uninterrupted.config).tokens[9]  # step 9 recovers the model
    assert forward - 3 * 32 == steps["shrink"]["forward_tokens"] == 576 + 4 * 3 * 32  # 3 x 32: the check of the export


class KilledError(Exception):
    """Simulates a kill during training."""


def steps_of(world, runs, *flags) -> list[int]:
    """Run to the end, and return the indices of the batches that were trained on."""
    batch_indices, original_step = [], DistillationStage.training_step

    def training_step(self, batch, batch_idx):
        batch_indices.append(batch_idx)
        return original_step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationStage, "training_step", training_step)
        world.run(runs, *flags)
    return batch_indices


def run_killed_at(step: int, world, runs, *flags) -> None:
    """Run a session that is killed before training step number `step` of the session, counted from 1."""
    remaining_steps, original_step = iter(range(step - 1)), DistillationStage.training_step

    def training_step(self, *args):
        if next(remaining_steps, None) is None:
            raise KilledError
        return original_step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationStage, "training_step", training_step)
        with pytest.raises(KilledError):
            tiny_run.main(world.args(runs, *flags))


def test_a_checkpoint_is_kept_until_the_learned_weights_are_written(world, tmp_path, monkeypatch):
    flags = (*FLAGS, *ALONE, EVERY_STEP)
    write_tensors = folder.write_tensors

    def fail_on_full_disk(path, tensors):
        if "recovery" in path.parts:
            raise OSError(28, "No space left on device")
        write_tensors(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_tensors", fail_on_full_disk)
        assert tiny_run.main(world.args(tmp_path, *flags)) == 2
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1
    assert steps_of(world, tmp_path, *flags) == [8]  # only the last of nine batches is repeated
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_recovery_with_options_is_the_same_object_in_revise_and_tune(world, tmp_path, monkeypatch):
    monkeypatch.setattr(RECOVERY, "_entries", dict(RECOVERY._entries))
    tuned = []

    @recovery("remembers")
    class Remembers(Recovery):
        def __init__(self, *, label: int = 1):
            self.label, self.revised = label, []

        def revise(self, material):
            return lambda dense, layer, units: self.revised.append(units[0].layer)

        def tune(self, material, pruned):
            tuned.append((self.label, self.revised))
            return pruned

    world.run(tmp_path, *ALONE, "--recovery=remembers", "--options.remembers.label=2")
    assert tuned == [(2, [0, 1, 2])]


@pytest.mark.slow
def test_a_recovery_with_two_training_phases_resumes_after_both(world, tmp_path, monkeypatch):
    """Each phase is trained once, stored, and loaded by a second session."""
    monkeypatch.setattr(RECOVERY, "_entries", dict(RECOVERY._entries))
    trained = []

    class Phase(DistillationStage):
        def on_train_end(self):
            trained.append(self.hparams.targets)

    @recovery("two_phases")
    class TwoPhases(Recovery):
        learns = True

        def tune(self, material, pruned):
            for targets in ("mlp", "all"):
                stage = Phase(material.dense, pruned, targets=targets, learning_rate=0.01)
                material.fit("Phase", stage)
                pruned = stage.finished()
            return pruned

        def tokens(self, text, fresh, *, attention):
            return 2 * fresh, 2 * fresh

    flags = (*ALONE, "--recovery=two_phases", "--distill.tokens=576")
    first = world.run(tmp_path, *flags)
    assert len(list((first.path / "recovery").iterdir())) == 2
    (first.path / "metrics.json").unlink()
    resumed = world.run(tmp_path, *flags)
    assert trained == ["mlp", "all"]
    assert [r["nll"] for r in resumed.records] == [r["nll"] for r in first.records]


@pytest.mark.slow
def test_an_unreadable_or_foreign_checkpoint_is_ignored(uninterrupted, world, tmp_path, capsys):
    """The file is truncated, or from another run. The stage logs a line and starts again."""
    flags = (*FLAGS, *ALONE, EVERY_STEP)
    content = {}
    for name, more_flags in (("other", ["--distill.learning_rate=0.004"]), ("good", [])):
        run_killed_at(4, world, tmp_path / name, *flags, *more_flags)
        (file,) = (tmp_path / name).rglob("*.ckpt")
        content[name] = file.read_bytes()
    for damaged in (content["good"][:-99], content["other"]):
        shutil.copytree(tmp_path / "good", tmp_path / "copy")
        (tmp_path / "copy" / file.relative_to(tmp_path / "good")).write_bytes(damaged)
        capsys.readouterr()
        restarted = world.run(tmp_path / "copy", *flags)
        assert capsys.readouterr().out.count(".ckpt: ") == 1
        assert [r["nll"] for r in restarted.records] == [r["nll"] for r in uninterrupted.records]
        assert restarted.summary["forward_backward_tokens"] == uninterrupted.summary["forward_backward_tokens"]
        shutil.rmtree(tmp_path / "copy")
    # With the undamaged checkpoint, training resumes after three batches.
    assert steps_of(world, tmp_path / "good", *flags) == list(range(3, 9))


def fake_losses(perplexity: float, noise: float = 0.0):
    """Return a replacement for `window_losses`: losses per token of two windows differ by twice the noise."""

    def losses(model, ids):
        signs = torch.tensor([1, -1], dtype=torch.float64)[: len(ids)]
        return (math.log(perplexity) + noise * signs) * (ids.shape[1] - 1)

    return losses


RISES = {  # last perplexity, noise of its windows, windows per corpus -> warning
    (4.5, 0.001, 2): "",
    (6.0, 0.001, 2): "rose from 5 at step 0 to 6 at step 9, beyond noise (ratio 1.2000 [1.1",
    (5.001, 0.1, 2): "rose from 5 at step 0 to 5.001 at step 9, within noise (ratio 1.0002 [0.",
    (6.0, 0.0, 1): "rose from 5 at step 0 to 6 at step 9, with unknown noise (one window per corpus).",
}


@pytest.mark.parametrize(("last", "noise", "windows"), RISES)
def test_the_validation_curve_is_logged_with_a_warning_if_perplexity_rose(
    last, noise, windows, world, tmp_path, monkeypatch, capsys
):
    """Perplexities at the four points of the curve are fake: 5, 3, 4 and `last`."""
    warning = RISES[last, noise, windows]
    students, on_validation_epoch_end = [], DistillationStage.on_validation_epoch_end

    def record_student(stage):
        students.append({name: t.clone() for name, t in stage.student.state_dict().items()})
        on_validation_epoch_end(stage)
        assert sorted(stage.development) == sorted(map(str, map(world.corpora.get, tiny_run.SEEN)))

    monkeypatch.setattr(DistillationStage, "on_validation_epoch_end", record_student)
    perplexities = [5.0, 3.0, 4.0, last]
    fakes = [fake_losses(p, noise * (p == last)) for p in perplexities]
    monkeypatch.setattr("gprune.stages.base.window_losses", lambda *args: fakes[len(students)](*args))
    flags = ["--trainer.val_check_interval=3", f"--evaluation.development_samples={windows}"]
    result = world.run(tmp_path, *FLAGS, *ALONE[:2], *flags)
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("Development perplexity rose") == bool(warning)
    assert warning in output
    rows = [row for file in (result.path / "csv").rglob("metrics.csv") for row in csv.DictReader(file.open())]
    tokens, names = [0, 192, 384, 576], ["development/perplexity", "development/perplexity/alpha.txt"]
    for axis, name in itertools.product((f"{CURVES}/tokens", "development/tokens"), names):
        curve = [(float(row[axis]), round(float(row[name]), 9)) for row in rows if row.get(name)]
        assert curve == list(zip(tokens, perplexities, strict=True))
    steps = [row for row in rows if row[f"{CURVES}/loss"]]
    assert [float(row[f"{CURVES}/tokens"]) for row in steps] == [64.0 * n for n in range(1, 10)]
    assert max(float(row[f"{CURVES}/learning_rate"]) for row in steps) == pytest.approx(0.003)
    assert all(float(row[f"{CURVES}/{n}"]) > 0 for row in steps for n in ("gradient_norm", "tokens_per_second"))
    assert all(torch.equal(t, students[3][name]) for name, t in result.model.state_dict().items())
    assert not torch.equal(*(s["model.layers.0.mlp.up_proj.weight"] for s in (students[1], students[3])))


def test_the_recipe_for_the_best_weights_restores_them_after_training(world, tmp_path, monkeypatch):
    """Perplexities are fake, and lowest at the third of four validations."""
    measured, on_validation_epoch_end = [], DistillationStage.on_validation_epoch_end

    def record_student(stage):
        measured.append({name: t.clone() for name, t in stage.student.state_dict().items()})
        on_validation_epoch_end(stage)

    monkeypatch.setattr(DistillationStage, "on_validation_epoch_end", record_student)
    fakes = [fake_losses(perplexity) for perplexity in (5.0, 4.0, 3.0, 4.5)]
    monkeypatch.setattr("gprune.stages.base.window_losses", lambda *args: fakes[len(measured)](*args))
    cfg = parse(world.args(tmp_path, *FLAGS, *ALONE[:2], "--trainer.val_check_interval=3"))
    best_weights = run_recipe("class BestWeights")["BestWeights"](monitor="development/perplexity")
    result = gprune.prune(cfg, callbacks=[best_weights])
    assert len(measured) == 4
    assert all(torch.equal(t, measured[2][name]) for name, t in result.model.state_dict().items())
    assert not all(torch.equal(t, measured[3][name]) for name, t in result.model.state_dict().items())


# --- step sizes


def scaled(parts: dict[str, float], model: torch.nn.Module) -> torch.nn.Module:
    """A copy in which parts of blocks are multiplied by powers of two.

    Args:
        parts: for each part (rows of a tensor with their bias) the exponent of the block's factor, 1 or -1. The factors
            of the three blocks are 8, 1/8 and 2.
    """
    model = copy.deepcopy(model)
    blocks = zip(units_of_kind(model, "neurons"), units_of_kind(model, "kv_groups"), (8.0, 1 / 8, 2.0), strict=True)
    with torch.no_grad():
        for neurons, groups, block_factor in blocks:
            up = owner_of(neurons.inputs[-1].path)
            slices = {
                "up": [s for s in neurons.slices[:-1] if owner_of(s.path) == up],
                "down": neurons.slices[-1:],
                "value": [s for s in groups.slices[:-1] if "value" in dict(s.parts)],
                "output": groups.slices[-1:],
            }
            for name, exponent in parts.items():
                for s in slices[name]:
                    tensor = attribute_at(decoder_layers(model)[neurons.layer], s.path).movedim(s.dim, 0)
                    rows = dict(s.parts).get("value", s.parts[-1][1])  # the last part of gate|up is up
                    tensor[rows] = tensor[rows] * block_factor**exponent
    return model


def gains_folded(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in which gains and biases of norms are divided by a factor, and the matrices after them multiplied."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        blocks = zip(units_of_kind(model, "neurons"), units_of_kind(model, "kv_groups"), strict=True)
        for (neurons, groups), layer, factor in zip(blocks, decoder_layers(model), (8.0, 1 / 8, 2.0), strict=True):
            modules = dict(layer.named_children())
            attention_norm, ffn_norm = (
                next(modules[name] for name in names if name in modules)
                for names in (
                    ("input_layernorm", "ln_1", "self_attn_layer_norm"),
                    ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm"),
                )
            )
            norms, readers = [attention_norm], {owner_of(s.path) for s in groups.slices[:-1] if not s.is_norm}
            if not neurons.inside:  # the FFN's norm of a block with experts also feeds the router
                norms += [ffn_norm]
                readers |= {owner_of(s.path) for s in neurons.slices[:-1]}
            for norm in norms:
                norm.weight.copy_((norm.weight + record_of(model).norm_offset) / factor - record_of(model).norm_offset)
                if getattr(norm, "bias", None) is not None:
                    norm.bias /= factor
            for path in readers:
                layer.get_submodule(path).weight.mul_(factor)
    return model


UP, VALUE = {"up": 1, "down": -1}, {"value": 1, "output": -1}


@pytest.mark.parametrize(
    ("family", "parts"),
    [("llama", {**UP, **VALUE}), ("opt", {**UP, **VALUE}), ("gpt2", VALUE), ("phi3", {**UP, **VALUE}),
     ("gemma3_text", {**UP, **VALUE}), ("mixtral", {**UP, **VALUE}), ("gpt_neox", VALUE)],
)  # fmt: skip
@pytest.mark.parametrize("targets", ["all", "lora"])
def test_training_is_invariant_to_rescaling_of_weights(family, parts, targets):
    """Factors that cancel in the model's output, such as 8 in `up` and 1/8 in `down`, do not change training."""
    dense = make_tiny(family)
    tokens = sampled_tokens(dense)
    divergences = []
    for model in (dense, gains_folded(scaled(parts, dense))):
        start = divergence(dense, model, tokens)
        assert start < 1e-9
        pruned = slice_model(model, some_masks(dense, attention=False))
        names = {name for name, _ in pruned.named_parameters()}
        torch.manual_seed(0)
        stage = DistillationStage(model, pruned, targets=targets, learning_rate=0.01)
        fit(stage, tokens, epochs=2)
        finished = stage.finished()
        assert {name for name, _ in finished.named_parameters()} == names  # no fused weight became a buffer
        divergences.append(divergence(model, finished, tokens))
    assert divergences[1] == pytest.approx(divergences[0], rel=1e-3 if targets == "all" else 0.02)
    assert divergences[0] < 0.95 * divergence(dense, slice_model(dense, some_masks(dense, attention=False)), tokens)


@pytest.mark.parametrize(("non_finite", "steps", "skipped"), [({2}, 6, 1), ({2, 3, 4, 5, 6}, 7, 5)])
def test_non_finite_steps_are_skipped_and_several_in_a_row_end_training(non_finite, steps, skipped, problem, caplog):
    dense, pruned, tokens = problem

    class Broken(DistillationStage):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if batch_idx in non_finite else 1)

    stage = Broken(dense, pruned, learning_rate=0.01)
    windows = tokens[:1].repeat(9 if len(non_finite) > 1 else 6, 1)
    start = divergence(dense, pruned, tokens[:1])
    trainer = fit(stage, windows, batch_size=1)
    assert trainer.global_step == steps
    assert f"Skipped {skipped} of {steps} steps" in caplog.text
    assert divergence(dense, stage.finished(), tokens[:1]) < start


def test_a_rare_window_with_a_hundred_times_the_loss_is_trained_on(tiny_model):
    """Windows of a rare language have a large loss, and skipping them would leave the language to drift."""
    tokens = sampled_tokens(tiny_model, windows=12)
    pruned = slice_model(tiny_model, random_masks(tiny_model, scope="ffn"))
    rare, steps = 9, []

    class Weighted(DistillationStage):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx) * (100 if batch_idx == rare else 1)
            self.last_loss = float(loss.detach())
            return loss

        def optimizer_step(self, *args, **options):
            before = [t.detach().clone() for t in self.learned.values()]
            super().optimizer_step(*args, **options)
            steps.append(any(not b.equal(t) for b, t in zip(before, self.learned.values(), strict=True)))

    fit(Weighted(tiny_model, pruned, learning_rate=0.01, warmup=0.0), tokens, batch_size=1)
    assert steps[rare]


def test_training_without_a_finite_loss_raises_a_user_error(problem):
    dense, pruned, tokens = problem
    stage = DistillationStage(dense, pruned, learning_rate=0.01)
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight[0] = math.nan
    with pytest.raises(UserError, match="The loss of distillation must be a finite number; got nan"):
        fit(stage, tokens.repeat(5, 1), batch_size=1)


def test_a_zero_tensor_stays_zero_and_weights_remain_finite(problem):
    dense, pruned, tokens = problem
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight.zero_()
        pruned.model.layers[1].input_layernorm.weight.fill_(1e4)
    stage = DistillationStage(dense, pruned, learning_rate=0.01, weight_decay=0.1)
    fit(stage, tokens)
    after = stage.finished().state_dict()
    assert not after["model.layers.0.mlp.up_proj.weight"].any()
    assert all(bool(t.isfinite().all()) for t in after.values())


def test_frozen_layers_do_not_change_and_one_window_is_one_step(problem):
    dense, pruned, tokens = problem
    start, first_layer = divergence(dense, pruned, tokens[:1]), copy.deepcopy(pruned.model.layers[0].state_dict())
    stage = DistillationStage(dense, pruned, learning_rate=0.01, weight_decay=0.1)
    stage.student.model.layers[0].requires_grad_(False)
    assert fit(stage, tokens[:1]).global_step == 1
    assert_same_tensors(stage.finished().model.layers[0].state_dict(), first_layer)
    assert divergence(dense, stage.finished(), tokens[:1]) < start


def test_weights_shared_between_layers_remain_shared(tiny_model):
    tokens, student = sampled_tokens(tiny_model), copy.deepcopy(tiny_model)
    first, last = (student.model.layers[i].self_attn for i in (0, 2))
    first.o_proj.weight = last.o_proj.weight
    start = divergence(tiny_model, student, tokens)
    stage = DistillationStage(tiny_model, student, learning_rate=0.01)
    fit(stage, tokens)
    assert stage.finished().model.layers[0].self_attn.o_proj.weight is last.o_proj.weight
    assert divergence(tiny_model, stage.finished(), tokens) < start


# --- several processes and offloaded models

KILLED_RUN = """
import math, os, sys
from gprune.cli import main
from gprune.models.families import decoder_layers
from gprune.stages.distillation import DistillationStage
original_step, remaining_steps = DistillationStage.training_step, iter(range(int(sys.argv[1])))
def training_step(self, batch, batch_idx):
    if next(remaining_steps, None) is None:
        os._exit(9)
    if "--trainer.strategy=fsdp" in sys.argv:
        for model in (self.lm, self.student):
            parameters = [p for layer in decoder_layers(model) for p in layer.parameters()]
            assert 2 * sum(p.to_local().numel() for p in parameters) == sum(p.numel() for p in parameters)
    loss = original_step(self, batch, batch_idx)
    return loss * float("nan") if batch_idx == 1 else loss
DistillationStage.training_step = training_step
on_validation_epoch_end = DistillationStage.on_validation_epoch_end
def rising(self):
    on_validation_epoch_end(self)
    perplexity = 5.0 + self.global_step
    self.development = dict.fromkeys(self.development, perplexity)
    nll = [math.log(perplexity) + sign * 0.001 * self.global_step for sign in (1, -1)]
    self.development_nll = dict.fromkeys(self.development, nll)
DistillationStage.on_validation_epoch_end = rising
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_processes_train_like_one_and_resume_to_the_same_bits(world, tmp_path):
    """Four batches of four windows and one of two. Step 2 is skipped, and the run is killed after it."""
    (tmp_path / "killed_run.py").write_text(KILLED_RUN)
    flags = ["--recovery=[least_squares,distill]", "--distill.tokens=576", "--distill.batch_size=4", "--export=none"]
    flags += ["--run.checkpoint_minutes=0", "--distill.learning_rate=0.001", "--gprune=false"]
    flags += ["--evaluation.development_samples=2", "--evaluation.before_recovery=false"]
    flags += [f"--corpora.evaluate={world.names('alpha')}"]
    two, sharded, learned = [*TWO_PROCESSES], ["--trainer.devices=2", "--trainer.strategy=fsdp"], {}
    manifests = {}
    all_steps = 99  # more than there are
    # Sessions are numbers of steps before a kill.
    for name, more_flags, sessions in (
        ("one", [], [all_steps]), ("two", two, [all_steps]), ("killed", two, [2, all_steps]),
        ("sharded", sharded, [all_steps]), ("sharded and killed", sharded, [2, all_steps]),
    ):  # fmt: skip
        folder_of_process, num_processes = tmp_path / f"{name}-process", 2 if more_flags else 1
        caches = [tmp_path / f"cache-{num_processes}"] * num_processes
        folder_of_process.mkdir()
        for steps in sessions:
            args = [str(steps), *world.args(tmp_path, *flags, *more_flags, name=name)]
            processes = tiny_run.train(
                args, folder_of_process, processes=num_processes, script=tmp_path / "killed_run.py", caches=caches
            )
            exit_code = 0 if steps == all_steps else 9
            assert [process.returncode for process in processes] == [exit_code] * num_processes, processes[0].stderr
        text = " ".join(processes[0].stdout.split())
        assert "Skipped 1 of 5 steps" in text
        assert "rose from 5 at step 0 to 10 at step 5, beyond noise" in text  # also of an earlier session
        learned[name] = learned_of(tmp_path / name)
        tokens = [
            float(row[f"{CURVES}/tokens"])
            for file in sorted((tmp_path / name / "csv").rglob("metrics.csv"))
            for row in csv.DictReader(file.open())
            if row.get(f"{CURVES}/tokens")
        ]
        # Tokens are those of all ranks and all sessions.
        assert sorted({*tokens}) == [0, 128, 256, 384, 512, 576], name
        manifests[name] = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifests[name]["learned_tokens"].popitem()[1] == 576
    for whole, killed in (("two", "killed"), ("sharded", "sharded and killed")):
        # Counted tokens, those of windows with weight 0 included, are of all ranks, also after resuming.
        for kind in ("forward_tokens", "forward_backward_tokens"):
            of_whole, of_killed = (manifests[n]["steps"]["shrink"][kind] for n in (whole, killed))
            assert of_whole == of_killed >= manifests["one"]["steps"]["shrink"][kind]
        assert all(torch.equal(learned[whole][name], t) for name, t in learned[killed].items())
        for name, t in learned["one"].items():
            torch.testing.assert_close(learned[whole][name], t, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_fused_matrices_and_adapters_can_be_sharded(world, tmp_path):
    make_tiny("phi3").save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    flags = (*FLAGS, *ALONE, f"--model.name={tmp_path / 'model'}", "--distill.learning_rate=0.001")
    flags += ("--distill.targets=lora", "--distill.checkpointing=true")
    results = {}  # learned weights and losses
    for name, more_flags in (("one", []), ("sharded", ["--trainer.devices=2", "--trainer.strategy=fsdp"])):
        (tmp_path / name).mkdir()
        args = world.args(tmp_path / "runs", *flags, *more_flags, name=name)
        processes = tiny_run.train(args, tmp_path / name, processes=2 if more_flags else 1)
        assert [process.returncode for process in processes] == [0] * len(processes), processes[0].stderr
        run = tmp_path / "runs" / name
        results[name] = [learned_of(run), [r["nll"] for r in load_run(run).records]]
    assert any("_parametrizations_" in name for name in results["one"][0])  # parts of a fused matrix
    torch.testing.assert_close(results["sharded"], results["one"], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_distillation_with_an_offloaded_dense_model_has_the_same_bits(uninterrupted, world, tmp_path):
    """Most layers of the dense model are offloaded by accelerate. Trained weights are in memory."""
    flags = ["--model.device_map=auto", '--model.max_memory={"cpu": "100KiB"}']
    assert_same_tensors(learned_of(uninterrupted.path), learned_of(world.run(tmp_path, *FLAGS, *ALONE, *flags).path))
