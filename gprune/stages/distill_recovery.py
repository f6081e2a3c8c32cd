"""The recovery `distill`. PyTorch and `DistillationStage` are imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gprune.checks import select_options
from gprune.config import DistillConfig
from gprune.errors import UserError
from gprune.recoveries.contract import Material, Recovery, recovery

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gprune.models.blocks import Block


@recovery("distill")
class Distill(Recovery):
    """Recovery by end-to-end distillation from the dense model on text of `corpora.recover` (`DistillationStage`)."""

    learns = uses_teacher = True
    flags = frozenset({"distill"})
    group = "distill"

    def __init__(self, settings: DistillConfig | None = None):
        self.settings = settings or DistillConfig()

    def refuse(self, blocks: Sequence[Block], *, shard: bool = False) -> None:
        """Raise UserError as `Recovery.refuse`, and for LoRA if PEFT is missing or the model is sharded."""
        super().refuse(blocks, shard=shard)
        if self.settings.targets == "lora" and shard:
            raise UserError("--distill.targets must be mlp or all with --model.shard true; got lora.")
        if self.settings.targets == "lora" and find_spec("peft") is None:
            raise UserError("--distill.targets lora needs peft, which is not installed. Run pip install peft.")

    def tune(self, material: Material, pruned: PreTrainedModel) -> PreTrainedModel:
        """Train a `DistillationStage` with `material.fit`, and return the trained model as a plain model."""
        from accelerate.hooks import remove_hook_from_submodules

        from gprune.stages.distillation import DistillationStage

        settings = self.settings
        remove_hook_from_submodules(pruned)  # hooks of a dense model on several devices; the student is on one device
        stage = DistillationStage(
            material.dense,
            pruned,
            shard=material.shard,
            teacher=material.teacher,
            **select_options(DistillationStage, dict(settings)),
        )
        title = f"Distilling {sum(p.numel() for p in stage.learned.values()):,} numbers"
        material.fit(
            title,
            stage,
            clip=settings.clip,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            keep=settings.keep,
        )
        return stage.finished()

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """Return the teacher's forward tokens, and the student's forward and backward tokens."""
        return fresh, fresh
