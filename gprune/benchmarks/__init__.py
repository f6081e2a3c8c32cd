"""A finished run, or any model, against others: zero-shot tasks and WikiText-2. `gprune evaluate`."""
