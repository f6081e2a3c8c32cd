"""The method, one call per step. `prune.py` has the order of the steps."""
