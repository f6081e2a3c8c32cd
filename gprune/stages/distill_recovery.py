"""The recovery `distill`. PyTorch and `DistillationStage` are imported when it runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gprune.checks import select_options
from gprune.config.running import DistillConfig
from gprune.errors import UserError
from gprune.models.families import PRUNED
from gprune.recoveries.contract import Material, Recovery, recovery

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@recovery("distill")
class Distill(Recovery):
    """Recovery by end-to-end distillation from the dense model on text of `corpora.recover` (`DistillationStage`)."""

    learns = True
    group = "distill"

    def __init__(self) -> None:
        self.settings = DistillConfig()

    def refuse(self, plan: Any) -> None:
        """Raise UserError as `Recovery.refuse`, if LoRA cannot be used, or layers cannot be recomputed."""
        super().refuse(plan)
        settings = plan.cfg.distill
        if settings.targets == "lora" and find_spec("peft") is None and not plan.cfg.dry_run:
            raise UserError("--distill.targets lora needs peft, which is not installed. Run pip install peft.")
        if settings.checkpointing and not plan.skeleton.supports_gradient_checkpointing:
            raise UserError(
                "--distill.checkpointing must be false, because transformers does not support it for model type "
                f"'{plan.skeleton.config.model_type.removeprefix(PRUNED)}'; got true."
            )

    def tune(self, material: Material, pruned: PreTrainedModel) -> PreTrainedModel:
        """Train a `DistillationStage` with `material.fit`, and return the trained model as a plain model."""
        from accelerate.hooks import remove_hook_from_submodules

        from gprune.stages.distillation import DistillationStage

        settings = self.settings
        remove_hook_from_submodules(pruned)  # hooks of a dense model on several devices; the student is on one device
        stage = DistillationStage(
            material.dense,
            pruned,
            **select_options(DistillationStage, dict(settings)),
        )
        title = f"Distilling into {sum(p.numel() for p in stage.learned.values()):,} weights"
        material.fit(title, stage, clip=settings.clip, batch_size=settings.batch_size, accumulate=settings.accumulate)
        return stage.finished()

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """Return the teacher's forward tokens, and the student's forward and backward tokens."""
        return fresh, fresh
