"""Features of Lightning: validation, EarlyStopping, ModelCheckpoint, loggers and fast_dev_run."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gprune import prune
from gprune.config.parse import parse
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.evaluation.perplexity import WindowPerplexity, perplexity, window_losses
from gprune.models.masks import masked
from gprune.models.surgery import slice_model as sliced
from gprune.stages.callbacks import ApplyMasks, PerplexityCurve
from gprune.stages.distillation import DistillationStage
from gprune.stages.threshold_learning import ThresholdLearning
from tests import tiny_run
from tests.stages.test_threshold_learning import data_of, make_stage, sampled_tokens, trainer_of
from tests.world import some_masks

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning, which the command line keeps quiet
]
NEVER_BETTER = {"monitor": "development/perplexity", "patience": 1, "min_delta": 1e9}
LEARNS = ("--sparsity.epochs=6", "--recovery=distill", "--distill.tokens=576", "--trainer.val_check_interval=2")


def flags(world, folder, *more, name="run"):
    """Return the flags of a run without export and without numbers before recovery."""
    return world.args(folder, "--export=none", "--evaluation.before_recovery=false", *more, name=name)


def logged(folder: Path, name: str) -> list[float]:
    """Return the values of a metric in the CSV files of a run."""
    rows = [row for file in sorted(folder.rglob("metrics.csv")) for row in csv.DictReader(file.open())]
    return [float(row[name]) for row in rows if row.get(name)]


# --- under any Trainer ------------------------------------------------------------------------------------------


def corpora_of(model) -> list[Windows]:
    """Return development windows of two corpora, `a` and `b`, that are sampled from the model."""
    return [Windows(name, "development", sampled_tokens(model, windows=5, seed=s)) for s, name in enumerate("ab")]


def data_with_validation(model, batch_size: int = 4) -> CorpusDataModule:
    train = [Windows("demo", "train", sampled_tokens(model))]
    return CorpusDataModule(train=train, validation=corpora_of(model), batch_size=batch_size, seed=0)


def test_a_stage_supports_early_stopping_and_checkpoints_under_any_trainer(tiny_model, tmp_path):
    default_stage = make_stage(tiny_model, lr=0.5)
    start = {key: t.detach().clone() for key, t in default_stage.thresholds.items()}
    arguments = {"model": tiny_model, "ranks": default_stage.ranks, "start": start, "budget": default_stage.budget}
    stage = ThresholdLearning(**arguments, learning_rate=0.5, centred=False)
    stopping, saving = EarlyStopping(**NEVER_BETTER), ModelCheckpoint(tmp_path, monitor="development/perplexity")
    trainer = L.Trainer(
        max_epochs=9, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[stopping, saving, ApplyMasks(stage.masks)],
    )  # fmt: skip
    trainer.fit(stage, data_with_validation(tiny_model))
    assert (trainer.current_epoch, stopping.stopped_epoch) == (2, 1)
    back = ThresholdLearning.load_from_checkpoint(saving.best_model_path, **arguments)
    assert (back.learning_rate, back.centred, back.loss) == (0.5, False, "cross_entropy")
    corpora = corpora_of(tiny_model)
    with masked(tiny_model, back.masks()):
        measured = [perplexity(tiny_model, windows).perplexity for windows in corpora]
    assert float(saving.best_model_score) == pytest.approx(math.prod(measured) ** 0.5, rel=1e-12)


def test_validation_perplexity_is_identical_to_that_of_the_function_perplexity(tiny_model):
    """Threshold learning validates the masked model, and distillation validates the student."""
    learning = make_stage(tiny_model)
    student = sliced(tiny_model, some_masks(tiny_model, attention=False))
    distillation = DistillationStage(tiny_model, student)
    corpora = corpora_of(tiny_model)
    for stage, callbacks, model in (
        (learning, [ApplyMasks(learning.masks)], tiny_model), (distillation, [], distillation.student),
    ):  # fmt: skip
        trainer = trainer_of(*callbacks)
        trainer.validate(stage, data_with_validation(tiny_model), verbose=False)
        logged_values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with masked(tiny_model, learning.masks()):  # does not affect the student
            expected = {w.corpus: perplexity(model, w).perplexity for w in corpora}
        assert {c: logged_values[f"development/perplexity/{c}"] for c in expected} == expected
        mean = math.prod(expected.values()) ** 0.5
        assert logged_values["development/perplexity"] == pytest.approx(mean, rel=1e-12)


def test_window_perplexity_is_identical_for_any_order_and_batching(tiny_model):
    windows = Windows("demo", "development", sampled_tokens(tiny_model, windows=7))
    expected = perplexity(tiny_model, windows).perplexity
    losses = torch.cat([window_losses(tiny_model, batch) for batch in windows.tokens.split(4)])
    for order in (torch.arange(7), torch.randperm(7, generator=torch.Generator().manual_seed(0))):
        metric = WindowPerplexity("demo")
        for batch in order.split(3):
            predicted_tokens = torch.full((len(batch),), windows.tokens.shape[1] - 1)
            metric.update(losses[batch], predicted_tokens, batch)
        # A window that pads a batch has no predicted tokens. Its loss is ignored.
        metric.update(torch.tensor([1e9], dtype=torch.float64), torch.tensor([0]), torch.tensor([0]))
        assert float(metric.compute()) == expected


def test_validation_uses_the_precision_of_the_trainer(tiny_model):
    values = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = trainer_of(precision=precision)
        trainer.validate(make_stage(tiny_model), data_with_validation(tiny_model), verbose=False)
        values.append(float(trainer.callback_metrics["development/perplexity"]))
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.01)


def test_masks_are_applied_only_during_validation(tiny_model, token_batch):
    stage, dense = make_stage(tiny_model), tiny_model(token_batch).logits
    is_dense = []  # by validation batch

    class CompareWithDense(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            is_dense.append(torch.equal(tiny_model(token_batch).logits, dense))

    curve = PerplexityCurve()
    trainer = trainer_of(ApplyMasks(stage.masks), CompareWithDense(), curve, epochs=2)
    data = data_with_validation(tiny_model)
    trainer.fit(stage, data)
    assert torch.equal(tiny_model(token_batch).logits, dense)
    assert sorted(curve.by_step) == [2, 4]
    assert not any(is_dense)
    is_dense.clear()
    by_sparsity = curve.against_sparsity(trainer, stage, data, {0.0: None, 0.5: stage.masks()})
    assert [by_sparsity[0.5], sorted(curve.by_step)] == [curve.by_step[4], [2, 4]]
    assert is_dense == [True] * 4 + [False] * 4  # four batches at sparsity 0, then four at 0.5


def test_callbacks_tell_validation_of_training_from_the_curve_and_see_the_masks_on_the_model(tiny_model):
    stage, seen = make_stage(tiny_model), []

    class Watching(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            (apply_masks,) = (callback for callback in trainer.callbacks if isinstance(callback, ApplyMasks))
            kept = None if apply_masks.applied is None else kept_units(apply_masks.applied)
            seen.append((pl_module.validation_prefix, kept))

    def kept_units(masks):
        return sum(int(mask.sum()) for mask in masks.ffn)

    curve, apply_masks = PerplexityCurve(), ApplyMasks(stage.masks)
    trainer = trainer_of(Watching(), apply_masks, curve)
    data = data_with_validation(tiny_model)
    trainer.fit(stage, data)
    target, other = stage.masks(), some_masks(tiny_model, attention=False)
    assert kept_units(other) != kept_units(target)
    curve.against_sparsity(trainer, stage, data, {0.0: None, 0.2: other})
    *of_training, dense, pruned = seen
    assert {prefix for prefix, _ in of_training} == {"development"}
    assert (dense, pruned) == (("curve", None), ("curve", kept_units(other)))
    assert apply_masks.applied is None
    trainer.validate(stage, data, verbose=False)
    assert seen[-1] == of_training[-1] == ("development", kept_units(target))


def test_an_exception_in_validation_removes_the_masks(tiny_model, token_batch):
    stage, dense = make_stage(tiny_model), tiny_model(token_batch).logits

    class Failing(L.Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(ApplyMasks(stage.masks), Failing()).validate(stage, data_with_validation(tiny_model))
    assert torch.equal(tiny_model(token_batch).logits, dense)


def test_validation_does_not_change_training(tiny_model):
    learned = {}
    for name, data in (("without", data_of(sampled_tokens(tiny_model))), ("with", data_with_validation(tiny_model))):
        torch.manual_seed(0)
        stage = make_stage(tiny_model, lr=0.5)
        trainer_of(ApplyMasks(stage.masks), epochs=3, val_check_interval=1).fit(stage, data)
        learned[name] = [*stage.learned_thresholds, torch.rand(1)]  # validation draws no random number either
    assert all(torch.equal(*pair) for pair in zip(*learned.values(), strict=True))


# --- in a run -----------------------------------------------------------------------------------------------------


def test_a_run_from_python_uses_callback_and_logger_objects(world, tmp_path, monkeypatch):
    tiny_run.draw(monkeypatch)
    stopping, saving = EarlyStopping(**NEVER_BETTER), ModelCheckpoint(monitor="development/perplexity", save_top_k=2)
    tensorboard = TensorBoardLogger(tmp_path / "tb", name="", version="")
    result = prune(parse(flags(world, tmp_path, *LEARNS)), callbacks=[stopping, saving], logger=tensorboard)
    # Both stages that train on text were stopped at the second validation, after 2 x 2 batches.
    assert [stopped["batches"] for stopped in result.summary["stopped"].values()] == [4, 4]
    assert Path(saving.best_model_path).is_file()
    folder = Path(saving.best_model_path).parent.relative_to(result.path).as_posix()
    assert folder == "checkpoints/recovery/DistillationStage"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    names = events.Tags()["scalars"]
    assert {"learn/loss", "distill/loss", "development/perplexity", "partition/hard_consistency"} <= {*names}
    points = sorted(event.value for event in events.Scalars("development/perplexity"))
    assert points == pytest.approx(sorted(logged(result.path / "csv", "development/perplexity")))
    assert any(name.startswith("figures/") for name in events.Tags()["images"])


def test_a_run_from_the_command_line_uses_callbacks_and_loggers_by_class_path(world, tmp_path):
    callbacks = [
        {"class_path": "EarlyStopping", "init_args": NEVER_BETTER},
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": "development/perplexity"}},
        {"class_path": "LearningRateMonitor"},
    ]
    loggers = [{"class_path": "TensorBoardLogger"}, {"class_path": "CSVLogger", "init_args": {"name": "mine"}}]
    trainer_flags = [f"--trainer.callbacks={json.dumps(callbacks)}", f"--trainer.logger={json.dumps(loggers)}"]
    assert tiny_run.main(flags(world, tmp_path, *LEARNS, *trainer_flags)) == 0
    run = tmp_path / "run"
    assert logged(run / "mine", "development/perplexity") == logged(run / "csv", "development/perplexity")
    assert logged(run / "csv", "lr-AdamW/pg1") or logged(run / "csv", "lr-AdamW")
    assert len(list((run / "checkpoints").rglob("*.ckpt"))) == 2
    assert list(run.rglob("events.out.tfevents.*"))


def test_a_fast_dev_run_trains_on_one_batch_and_calibrates_on_all_windows(world, tmp_path):
    result = prune(parse(flags(world, tmp_path, *LEARNS[:3], "--trainer.fast_dev_run=true")))
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["learning"]["steps"] == 1
    assert all(int(s.channels["neurons.0"].total.count) == 4 * 32 for s in result.statistics.values())
    assert not list((result.path / "checkpoints").rglob("*.ckpt"))


def test_an_object_that_is_not_a_logger_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"^Loggers must be objects of lightning\.pytorch\.loggers\.Logger; got 7"):
        prune(parse(flags(world, tmp_path)), logger=[7])
    assert not (tmp_path / "run").exists()


def test_a_validation_corpus_without_windows_is_refused(tiny_model):
    empty = Windows("nothing", "development", torch.zeros(0, 8, dtype=torch.long))
    with pytest.raises(UserError, match=r"^Corpus 'nothing' must have at least one window; got none"):
        CorpusDataModule(train=[], validation=[empty], batch_size=2, seed=0)


def test_masks_of_a_stage_that_a_callback_changed_are_refused_if_they_are_not_on_budget(world, tmp_path):
    class Changer(L.Callback):
        def on_train_end(self, trainer, pl_module):
            if isinstance(pl_module, ThresholdLearning):
                masks = pl_module.masks()
                nothing_removed = type(masks)({key: keep | True for key, keep in masks.items()})
                pl_module.masks = lambda budget=None: nothing_removed

    with pytest.raises(UserError, match=r"^Learner 'ThresholdLearning' must return masks on budget"):
        prune(parse(flags(world, tmp_path)), callbacks=[Changer()])


def test_a_logger_object_of_the_caller_is_not_modified(world, tmp_path):
    logger = CSVLogger(tmp_path, name="mine")
    prune(parse(flags(world, tmp_path)), logger=logger)
    assert "log_metrics" not in vars(logger)
