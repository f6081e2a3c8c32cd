"""Stages: LightningModules, most of them with a frozen language model, their callbacks, and the recovery `distill`."""

from gprune.stages import distill_recovery  # noqa: F401 - registers the recovery
