"""The method, one call per step: start with `prune.py`."""
