"""The currency `seconds`: targets such as 1.4x, by the latency table of this machine."""

from __future__ import annotations

from typing import Any

from gprune.errors import UserError
from gprune.sparsity.cost import COST, Currency, ModelCosts


class Seconds(Currency):
    """Seconds for a prompt and a few generated tokens on this machine, in --model.dtype."""

    @staticmethod
    def flag(cfg: Any) -> str:
        """Return the flag that needs the latency table."""
        return "--sparsity.cost seconds" if cfg.sparsity.cost else f"--sparsity.target {cfg.sparsity.target}"

    def refuse_settings(self, cfg: Any) -> None:
        """Raise UserError for several processes or devices."""
        device_map, processes = cfg.model.device_map, cfg.processes
        if processes > 1 or device_map is not None:
            setting = f"{processes} processes" if processes > 1 else f"--model.device_map {device_map}"
            flag = self.flag(cfg)
            raise UserError(f"{flag} cannot be combined with {setting}, because speed is measured in one process.")

    def table(self, pricing: Any) -> dict[str, Any]:
        """Return the latency table, measured unless it is cached."""
        import torch

        from gprune.evaluation.speed import latency_table

        if not pricing.device_available:
            raise UserError(f"{self.flag(pricing.cfg)} needs a GPU in this machine to measure on.")
        dtype = getattr(torch, pricing.cfg.model.dtype)
        return latency_table(pricing.skeleton, pricing.device, dtype, pricing.cfg.attention)

    def costs(self, pricing: Any) -> ModelCosts:
        """Return the costs of the model in picoseconds."""
        from gprune.evaluation.speed import costs_from_table
        from gprune.models.blocks import blocks_of

        return costs_from_table(pricing.latency_table, blocks_of(pricing.skeleton))

    def summary(self, run: Any, masks: Any, pruned: Any) -> dict[str, Any]:
        """Return the speed of the pruned model, measured in alternation with the dense model, and the table."""
        from gprune.evaluation.speed import GENERATE, PROMPT, describe_device, time_generation

        if (measured_earlier := run.folder.manifest.get("summary", {}).get("speed")) is not None:
            return {"speed": measured_earlier}
        dense_cost = run.budget.model  # in units of time
        seconds = time_generation([run.model, pruned])
        speeds = {
            "asked": dense_cost / (dense_cost - run.budget.target),
            "predicted": dense_cost / (dense_cost - run.budget.removed_by(masks)),
            "got": seconds[0] / seconds[1],
        }
        numbers = ", ".join(f"{name} {speed:.2f}x" for name, speed in speeds.items())
        setting = f"prompt of {PROMPT} tokens, {GENERATE} generated, {describe_device(run.model.device)}"
        said = f"Speed: {numbers} of dense ({setting})."
        table = run.plan.pricing.latency_table
        return {"speed": speeds | {"said": said, "numbers": speeds, "seconds": seconds, "latency": table}}


COST.register("seconds")(Seconds())
