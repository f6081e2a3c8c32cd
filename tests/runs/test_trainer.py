"""What the progress bar says while something is learned."""

from __future__ import annotations

import lightning as L
import torch

from gprune.config import DistillConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.models.surgery import prune
from gprune.runs.trainer import NamedProgressBar
from gprune.stages.distillation import DistillationStage
from tests.tiny_families import some_masks


def test_the_bar_says_what_is_going_on_and_how_fast(tiny_model):
    bar, said = NamedProgressBar("Distilling 3 numbers"), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            said.append((bar.train_progress_bar.desc, bar.get_metrics(trainer, pl_module)))

    stage = DistillationStage(tiny_model, prune(tiny_model, some_masks(tiny_model, attention=False)), DistillConfig())
    text = [Windows("demo", "train", torch.arange(64).view(4, 16))]
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[bar, Look()],
    )  # fmt: skip
    trainer.fit(stage, CorpusDataModule(train=text, batch_size=2, seed=0))
    assert [what for what, _ in said] == ["Distilling 3 numbers: "] * 2
    assert all(set(metrics) == {"distill/loss", "tokens/s"} and metrics["tokens/s"] > 0 for _, metrics in said)
