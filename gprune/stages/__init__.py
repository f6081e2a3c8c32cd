"""What is trained: LightningModules around a frozen language model, and callbacks. One of them is a recovery."""

from gprune.stages import distill_recovery  # noqa: F401 - it registers itself
