"""What is trained: LightningModules around a frozen language model, and callbacks. Two of them are recoveries."""

from gprune.stages import links  # noqa: F401 - they register themselves
