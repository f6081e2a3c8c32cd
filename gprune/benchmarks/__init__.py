"""Benchmarks of runs and models: zero-shot tasks, WikiText-2, C4 and speed (`gprune evaluate`)."""
