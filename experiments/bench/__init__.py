"""How fast is it: ratios measured side by side in one run. `python -m experiments.bench inference --help`."""
