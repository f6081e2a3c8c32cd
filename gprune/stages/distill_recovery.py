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

    learns = uses_teacher = True
    flags = frozenset({"distill"})
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
            teacher=material.teacher,
            **select_options(DistillationStage, dict(settings)),
        )
        title = f"Distilling {sum(p.numel() for p in stage.learned.values()):,} numbers"
        material.fit(title, stage, clip=settings.clip, batch_size=settings.batch_size, accumulate=settings.accumulate)
        return stage.finished()

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """Return the teacher's forward tokens, and the student's forward and backward tokens."""
        return fresh, fresh

    def memory(self, sizes: Any) -> dict[str, float]:
        """Return the bytes by term of distillation with AdamW of a student in float32."""
        d, tokens = sizes.cfg.distill, sizes.tokens_of(sizes.cfg.distill.batch_size)
        trained = self._trained_parameters(sizes)
        layer = sizes.layer(tokens, activation=4, kept_share=sizes.kept_share)
        layers = layer + sizes.L * tokens * 4 * sizes.H if d.checkpointing else sizes.L * layer
        cast = sizes.cast + 2 * (sizes.H * sizes.V + trained) * sizes.autocast  # also of the student
        return {
            "weights": sizes.rows + 4 * sizes.kept_parameters + cast,
            "gradients": 4 * trained,
            "optimizer": (8 if sizes.cpu else 12) * trained,  # a GPU updates all weights at once, in copies
            "gram_matrices": sizes.grams,
            "activations": sizes.forecasts + layers + sizes.chunk_logits(teacher=True),
        }

    @staticmethod
    def _trained_parameters(sizes: Any) -> float:
        """Number of parameters that are trained in a model that keeps a share of its units."""
        from gprune.models.blocks import blocks_of

        d, blocks = sizes.cfg.distill, blocks_of(sizes.plan.skeleton)
        parts = [part for block in blocks for part in block.parts.values()]
        return {
            "all": sum(block.cost for block in blocks) - sizes.plan.removed,
            "mlp": sizes.kept_share * sum(block.unit_cost("ffn") * block.neurons for block in blocks),
            "lora": d.rank * sum(part.in_features + part.out_features for part in parts),
        }[d.targets]
