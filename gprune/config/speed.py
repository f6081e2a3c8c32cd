"""Speed targets such as 1.4x: their flags, and the currency `seconds` with its latency table of this machine."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from gprune.checks import AtLeast0, AtLeast1, UpTo4096
from gprune.config.groups import Group
from gprune.errors import UserError
from gprune.sparsity.cost import COST, Currency, ModelCosts

log = logging.getLogger("gprune")
FILE = "speed.json"  # file in a run's folder


class SpeedConfig(Group, prefix="speed."):
    """Workload for speed targets such as 1.4x, timed with transformers on this machine in --model.dtype."""

    batch: UpTo4096 = 1
    """Batch size (prompts)."""
    prompt: AtLeast1 = 128
    """Tokens of each prompt (prefill)."""
    generate: AtLeast0 = 32
    """Tokens generated after the first one (decoding); 0 times prefill alone."""
    measure: bool = False
    """Measure the latency table of this machine again instead of using the cached table, for example if its
    load has changed. A resumed run keeps its table."""

    def workload(self) -> dict[str, int]:
        """Return the workload that is timed: `batch`, `prompt` and `generate`."""
        return self.model_dump(exclude={"measure"})

    def __str__(self) -> str:
        decode = f", decode {self.generate}" if self.generate else ""
        return f"prefill {self.prompt} tokens{decode}, batch {self.batch}"


class Seconds(Currency):
    """Seconds of the workload of `--speed` on this machine, by its latency table."""

    reads = frozenset({"speed"})

    @staticmethod
    def flag(cfg: Any) -> str:
        """Return the flag that needs the latency table, or an empty string. A dry run only shows a cached table."""
        if cfg.sparsity.currency == "seconds":
            return "--sparsity.cost seconds" if cfg.sparsity.cost else f"--sparsity.target {cfg.sparsity.target}"
        return "--sparsity.width_multiple auto" if cfg.sparsity.width_multiple is None else ""

    def identity(self, cfg: Any) -> dict[str, Any]:
        """Return the workload if the run needs the table, which is itself an input of the run."""
        return {"speed": cfg.speed.workload()} if self.flag(cfg) else {}

    def refuse_settings(self, cfg: Any) -> None:
        """Raise UserError if a run that needs the table has several processes or devices."""
        device_map, processes = cfg.model.device_map, cfg.processes
        if (flag := self.flag(cfg)) and (processes > 1 or device_map is not None):
            setting = f"{processes} processes" if processes > 1 else f"--model.device_map {device_map}"
            raise UserError(f"{flag} cannot be combined with {setting}, because speed is measured in one process.")

    def table(self, pricing: Any) -> dict[str, Any] | None:
        """Return the latency table, measured unless it is cached; without a flag that needs it, only a cached table."""
        if "seconds" not in pricing.measured:
            pricing.measured["seconds"] = self._table(pricing)
        return pricing.measured["seconds"]

    def _table(self, pricing: Any) -> dict[str, Any] | None:
        """Return `table` without its cache in `pricing`. Raise UserError if it is needed and cannot be measured."""
        import torch

        from gprune.evaluation.speed import speed_table

        cfg, flag = pricing.cfg, self.flag(pricing.cfg)
        positions = getattr(pricing.skeleton.config, "max_position_embeddings", math.inf)
        length = cfg.speed.prompt + cfg.speed.generate
        if flag and length > positions:
            raise UserError(
                f"--speed.prompt and --speed.generate must add up to at most {positions:,} positions; got {length:,}."
            )
        if flag and not pricing.device_available:
            raise UserError(f"{flag} needs a GPU in this machine to measure on.")
        return speed_table(
            pricing.skeleton, pricing.device, getattr(torch, cfg.model.dtype), cfg.speed.workload(),
            measure=bool(flag), again=cfg.speed.measure, run_table=Path(cfg.folder) / FILE,
        )  # fmt: skip

    def costs(self, pricing: Any) -> ModelCosts:
        """Return the costs of the model in picoseconds."""
        from gprune.evaluation.speed import costs_from_table
        from gprune.models.blocks import blocks_of

        return costs_from_table(self.table(pricing), blocks_of(pricing.skeleton))

    def best_multiple(self, pricing: Any) -> int:
        """Return the width multiple of `--sparsity.width_multiple auto`."""
        from gprune.evaluation.speed import best_multiple

        return best_multiple(self.table(pricing))

    def lines(self, plan: Any) -> dict[str, str]:
        """Return the speed at uniform sparsity, which is predicted from the latency table, if there is one."""
        from gprune.sparsity.budget import removed_cost
        from gprune.sparsity.cut import uniform_masks

        if not plan.pricing.device_available or self.table(plan.pricing) is None:
            return {"speed": "not measured; --sparsity.target 1.2x measures it"}
        costs, time_outside = self.costs(plan.pricing)
        time = sum(of_block.whole for of_block in costs) + time_outside
        saved_time = removed_cost(costs, uniform_masks(plan.budget))
        return {"speed": f"{time / (time - saved_time):.2f}x of dense by the table ({plan.cfg.speed})"}

    def inputs(self, plan: Any) -> dict[str, str]:
        """Return the hash of the table, because another table gives another budget."""
        from gprune.storage.files import key_of

        return {"speed": key_of(table=self.table(plan.pricing))}

    def store(self, plan: Any, folder: Any) -> None:
        """Write the table to the run's folder, so that a resumed run has the same budget."""
        import torch

        from gprune.evaluation.speed import speed_key
        from gprune.storage.files import write_json

        key = speed_key(plan.skeleton, plan.device, getattr(torch, plan.cfg.model.dtype), plan.cfg.speed.workload())
        write_json(folder / FILE, {"key": key, "table": self.table(plan.pricing)})

    def summary(self, run: Any, masks: Any, pruned: Any) -> dict[str, Any]:
        """Return the table and, for a target in seconds, the speed of the pruned model beside the dense model."""
        summary = {"speed_table": self.table(run.plan.pricing) | {"layers": len(run.budget.by_layer)}}
        if run.cfg.sparsity.currency == "seconds":
            measured_earlier = run.folder.manifest.get("summary", {}).get("speed")
            summary["speed"] = measured_earlier or self._reached(run, masks, pruned)
        return summary

    def _reached(self, run: Any, masks: Any, pruned: Any) -> dict[str, Any]:
        """Return the summary's entry `speed`, with the pruned model measured in alternation with the dense model."""
        from gprune.evaluation.speed import describe_device, time_generation

        dense_cost = run.budget.model  # in units of time
        (_, _, (dense_seconds, pruned_seconds)), spread = time_generation(
            [run.model, pruned], **run.cfg.speed.workload()
        )
        speeds = {
            "asked": dense_cost / (dense_cost - run.budget.target),
            "predicted": dense_cost / (dense_cost - run.budget.removed_by(masks)),
            "got": dense_seconds / pruned_seconds,
        }
        numbers = ", ".join(f"{name} {speed:.2f}x" for name, speed in speeds.items())
        sentence = f"Speed: {numbers} of dense ({run.cfg.speed}, {describe_device(run.model.device)})."
        return speeds | {
            "said": sentence, "numbers": speeds, "spread": spread, "seconds": [dense_seconds, pruned_seconds],
        }  # fmt: skip


COST.register("seconds")(Seconds())
